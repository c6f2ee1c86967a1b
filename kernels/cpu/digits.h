// Activations as integers for weight-only panels: products of integers are exact, whatever their order.
//
// A group of a row becomes multiples of a power of two, small enough that bf16 of nearly the largest magnitude are exact:
// of 15 bits for weights of 8 (those down to a 64th of it; the others are rounded to 2^-14 of it), of 12 for weights of 4
// (an eighth; 2^-11), where the weights' own rounding is 10 to 100 times as large. They are written as two digits of a
// byte, which the instructions for products of bytes take: integers = 2^SHIFT x first + second.

namespace fdserve {
namespace FD_ISA {

template <int BITS>
struct DigitsOf {
  static constexpr Format FORMAT = BITS == 4 ? Format::kWint4 : Format::kWint8;
  static constexpr int SHIFT = BITS, BITS_BELOW_LARGEST = BITS == 4 ? 10 : 13;
  static constexpr int32_t ZERO = 1 << (BITS - 1);  // the weight 0 as it is stored
  // Second digits are 0 to 15, or -128 to 127.
  FD_MEMBER static vi first(vi x) { return (BITS == 4 ? x : x + 128) >> SHIFT; }
};

FD_INLINE void store_digits(char* out, vi digits, int n) {
  _mm_mask_storeu_epi8(out, static_cast<__mmask16>((1u << n) - 1), _mm512_cvtepi32_epi8((__m512i)digits));
}

template <int BITS>
FD_INLINE SumScale group_to_digits(const bf16* x, int64_t size, char* first, char* second) {
  using Digits = DigitsOf<BITS>;
  vi largest = {}, total = {};
  const auto each = [&](auto&& look) {
    int64_t i = 0;
    for (; i + VL <= size; i += VL) look(i, load(x + i), VL);
    if (i < size) look(i, load_some(x + i, static_cast<int>(size - i)), static_cast<int>(size - i));
  };
  each([&](int64_t, vf v, int) {
    const vi bits = (vi)v & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  });
  const int32_t exponent = _mm512_reduce_max_epi32((__m512i)largest) >> 23, least = Digits::BITS_BELOW_LARGEST + 1;
  if (exponent == 255) {  // a NaN or an infinity, which must show in the product and has no digits
    __builtin_memset(first, 0, static_cast<size_t>(size));
    __builtin_memset(second, 0, static_cast<size_t>(size));
    return {__builtin_nanf(""), 0};
  }
  const int32_t step = (exponent > least ? exponent : least) - Digits::BITS_BELOW_LARGEST;
  const vf inverse = (vf)(vi{} + ((254 - step) << 23));
  each([&](int64_t i, vf v, int n) {
    const vi whole = (vi)_mm512_cvtps_epi32((__m512)(v * inverse)), high = Digits::first(whole);
    store_digits(first + i, high, n);
    store_digits(second + i, whole - (high << Digits::SHIFT), n);
    total += whole;
  });
  return {((vf)(vi{} + (step << 23)))[0], Digits::ZERO * _mm512_reduce_add_epi32((__m512i)total)};
}

template <int BITS>
FD_INLINE void row_to_digits(const bf16* x, int64_t size, char* digits, SumScale* scales) {
  constexpr Format FORMAT = DigitsOf<BITS>::FORMAT;
  const int64_t padded = padded_inputs(FORMAT, size), group = group_inputs(FORMAT);
  if (padded != size)
    for (char* row = digits; row <= digits + padded; row += padded)
      __builtin_memset(row + size, 0, static_cast<size_t>(padded - size));
  for (int64_t i = 0; i < size; i += group)
    *scales++ = group_to_digits<BITS>(x + i, size - i < group ? size - i : group, digits + i, digits + padded + i);
}

inline void to_digits(const void* x_, int64_t size, Format format, char* digits, SumScale* scales) {
  const bf16* x = static_cast<const bf16*>(x_);
  if (format == Format::kWint4) row_to_digits<4>(x, size, digits, scales);
  else row_to_digits<8>(x, size, digits, scales);
}

// A sum of integers over a group, times the scale of the row and that of the output, is added to `acc`.
FD_INLINE void add_sum(float* acc, vi sum, float row_scale, vf scale) {
  store(acc, fma(__builtin_convertvector(sum, vf) * splat(row_scale), scale, load(acc)));
}

// VECTORS of 16 outputs of some rows, whose scales are `groups` apart; OFFSET where weights are too large.
template <int VECTORS, bool OFFSET>
FD_INLINE void add_sums(const int32_t* sums, int64_t stride, int64_t rows, const SumScale* row_scales, int64_t groups,
                        const bf16* scales, float* acc) {
  for (int v = 0; v < VECTORS; ++v) {
    const vf scale = load(scales + v * VL);
    for (int64_t r = 0; r < rows; ++r) {
      const vi sum = load(sums + r * stride + v * VL);
      const SumScale& row = row_scales[r * groups];
      add_sum(acc + r * PANEL + v * VL, OFFSET ? sum - (vi{} + row.offset) : sum, row.scale, scale);
    }
  }
}

// VECTORS of 16 outputs out of sums[rows] of first digits, and `apart` from these of second ones. Of nibbles the sums of
// low ones are followed by those of whole bytes, which are 16 times those of high ones too large; outputs 32 to 63 are high.
template <int BITS, int VECTORS>
FD_INLINE void add_digit_sums(const int32_t* sums, int64_t stride, int64_t apart, int64_t rows, const SumScale* row_scales,
                              int64_t groups, const bf16* scales, float* acc) {
  for (int v = 0; v < VECTORS; ++v) {
    const vf scale = load(scales + v * VL), high_scale = BITS == 4 ? load(scales + 32 + v * VL) : vf{};
    for (int64_t r = 0; r < rows; ++r) {
      const auto at = [&](int64_t column) {
        const int32_t* sum = sums + r * stride + column;
        return (load(sum) << DigitsOf<BITS>::SHIFT) + load(sum + apart);
      };
      const SumScale& row = row_scales[r * groups];
      const vi low = at(v * VL), offset = vi{} + row.offset;
      float* to = acc + r * PANEL + v * VL;
      add_sum(to, low - offset, row.scale, scale);
      if (BITS == 4) add_sum(to + 32, ((at(32 + v * VL) - low) >> 4) - offset, row.scale, high_scale);
    }
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
