// Activations as integers for weight-only panels: products of integers are exact, whatever their order.
//
// For weights of 8 bits a group of a row becomes multiples of a power of two, small enough that bf16 of nearly the largest
// magnitude are exact: integers of 15 bits (exact down to a 64th of the largest; the others are rounded to 2^-14 of it),
// which are written as two digits of a byte, 256 x first + second. For weights of 4 bits, whose own rounding is a tenth of
// them, bytes do: 127 is the largest. Where one activation has more than half of the sum of squares, so that the others
// are small beside it, they get a second digit of 4 bits, first + second / 16; elsewhere second digits are zeros, which
// need not be multiplied. Weights are taken as they are stored, with offsets for what that makes of sums.

namespace fdserve {
namespace FD_ISA {

FD_INLINE void store_digits(char* out, vi digits, int n) {
  _mm_mask_storeu_epi8(out, static_cast<__mmask16>((1u << n) - 1), _mm512_cvtepi32_epi8((__m512i)digits));
}

template <class Look>
FD_INLINE void each_vector(const bf16* x, int64_t size, Look&& look) {
  int64_t i = 0;
  for (; i + VL <= size; i += VL) look(i, load(x + i), VL);
  if (i < size) look(i, load_some(x + i, static_cast<int>(size - i)), static_cast<int>(size - i));
}

constexpr int32_t INFINITE = 255 << 23;

// Bits of the largest magnitude; INFINITE or more where there is an infinity or a NaN, which has no digits.
FD_INLINE int32_t largest_bits(const bf16* x, int64_t size) {
  vi largest = {};
  each_vector(x, size, [&](int64_t, vf v, int) {
    const vi bits = (vi)v & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  });
  return _mm512_reduce_max_epi32((__m512i)largest);
}

FD_INLINE float float_of(int32_t bits) { return ((vf)(vi{} + bits))[0]; }
FD_INLINE int32_t total(vi x) { return _mm512_reduce_add_epi32((__m512i)x); }
FD_INLINE vi nearest_integers(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }

constexpr SumScale BROKEN = {__builtin_nanf(""), 0};  // shows in the product
constexpr int BITS_BELOW_LARGEST = 13;

FD_INLINE SumScale group_for_bytes(const bf16* x, int64_t size, char* first, char* second) {
  const int32_t exponent = largest_bits(x, size) >> 23, least = BITS_BELOW_LARGEST + 1;
  if (exponent == 255) {
    __builtin_memset(first, 0, static_cast<size_t>(size));
    __builtin_memset(second, 0, static_cast<size_t>(size));
    return BROKEN;
  }
  const int32_t step = (exponent > least ? exponent : least) - BITS_BELOW_LARGEST;
  const vf inverse = splat(float_of((254 - step) << 23));
  vi all = {};
  each_vector(x, size, [&](int64_t i, vf v, int n) {
    const vi whole = nearest_integers(v * inverse), high = (whole + 128) >> 8;
    store_digits(first + i, high, n);
    store_digits(second + i, whole, n);  // the last byte is what the first digit leaves
    all += whole;
  });
  return {float_of(step << 23), 128 * total(all)};
}

constexpr float TOP = 127, PARTS = 16;

FD_INLINE void group_for_nibbles(const bf16* x, int64_t size, char* first, char* second, SumScale& scale, SumScale& rest) {
  const int32_t bits = largest_bits(x, size);
  const float largest = float_of(bits);
  const bool broken = bits >= INFINITE, tiny = !broken && largest < 1e-30f;
  const vf inverse = splat(TOP / largest);
  vf squares = {};
  vi all = {}, all_low = {};
  __builtin_memset(second, 0, static_cast<size_t>(size));
  rest = {0, 0};
  if (broken || tiny) {
    __builtin_memset(first, 0, static_cast<size_t>(size));
    scale = broken ? BROKEN : rest;
    return;
  }
  each_vector(x, size, [&](int64_t i, vf v, int n) {
    const vf scaled = v * inverse;
    const vi whole = nearest_integers(scaled);
    squares = fma(scaled, scaled, squares);
    store_digits(first + i, whole, n);
    all += whole;
  });
  if (sum(squares) < 2 * TOP * TOP) {
    all = vi{};
    each_vector(x, size, [&](int64_t i, vf v, int n) {
      const vi parts = nearest_integers(v * inverse * splat(PARTS)), high = (parts + 8) >> 4, low = parts - (high << 4);
      store_digits(first + i, high, n);
      store_digits(second + i, low, n);
      all += high, all_low += low;
    });
    rest = {largest / (TOP * PARTS), 8 * total(all_low)};
  }
  scale = {largest / TOP, 8 * total(all)};
}

inline void to_digits(const void* x_, int64_t size, Format format, char* digits, SumScale* scales) {
  const bf16* x = static_cast<const bf16*>(x_);
  const int64_t padded = padded_inputs(format, size), group = group_inputs(format), groups = groups_of(format, size);
  if (padded != size)
    for (char* row = digits; row <= digits + padded; row += padded)
      __builtin_memset(row + size, 0, static_cast<size_t>(padded - size));
  for (int64_t g = 0, i = 0; g < groups; ++g, i += group) {
    const int64_t n = size - i < group ? size - i : group;
    char *first = digits + i, *second = first + padded;
    if (format == Format::kWint4) group_for_nibbles(x + i, n, first, second, scales[g], scales[groups + g]);
    else scales[g] = group_for_bytes(x + i, n, first, second);
  }
}

// Whether a row has second digits: the scales of these are `groups` / 2 after those of the first.
FD_INLINE bool have_second_digits(const SumScale* row_scales, int64_t rows, int64_t groups) {
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) any |= row_scales[r * groups + groups / 2].scale != 0;
  return any;
}

// A sum of integers over a group, times the scale of the row and that of the output, is added to `acc`.
FD_INLINE void add_sum(float* acc, vi sum, float row_scale, vf scale) {
  store(acc, fma(__builtin_convertvector(sum, vf) * splat(row_scale), scale, load(acc)));
}

// Sums of some rows, whose scales are `groups` apart, by a panel.
FD_INLINE void add_sums(const int32_t* sums, int64_t rows, const SumScale* row_scales, int64_t groups, const bf16* scales,
                        float* acc) {
  for (int64_t v = 0; v < PANEL; v += VL) {
    const vf scale = load(scales + v);
    for (int64_t r = 0; r < rows; ++r) {
      const SumScale& row = row_scales[r * groups];
      add_sum(acc + r * PANEL + v, load(sums + r * PANEL + v) - (vi{} + row.offset), row.scale, scale);
    }
  }
}

// VECTORS of 16 outputs of bytes out of sums[rows] of first digits, and `apart` from these of second ones.
template <int VECTORS>
FD_INLINE void add_byte_sums(const int32_t* sums, int64_t stride, int64_t apart, int64_t rows, const SumScale* row_scales,
                             int64_t groups, const bf16* scales, float* acc) {
  for (int v = 0; v < VECTORS; ++v) {
    const vf scale = load(scales + v * VL);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* sum = sums + r * stride + v * VL;
      const SumScale& row = row_scales[r * groups];
      add_sum(acc + r * PANEL + v * VL, (load(sum) << 8) + load(sum + apart) - (vi{} + row.offset), row.scale, scale);
    }
  }
}

// Of nibbles: VECTORS of sums of low ones, of outputs 0 to 31, and `apart` from these those of whole bytes, which are 16
// times the sums of high ones, of outputs 32 to 63, too large by those of low ones.
template <int VECTORS>
FD_INLINE void add_nibble_sums(const int32_t* sums, int64_t stride, int64_t apart, int64_t rows, const SumScale* row_scales,
                               int64_t groups, const bf16* scales, float* acc) {
  for (int v = 0; v < VECTORS; ++v) {
    const vf low_scale = load(scales + v * VL), high_scale = load(scales + 32 + v * VL);
    for (int64_t r = 0; r < rows; ++r) {
      const SumScale& row = row_scales[r * groups];
      const int32_t* sum = sums + r * stride + v * VL;
      const vi low = load(sum), whole = load(sum + apart), offset = vi{} + row.offset;
      float* to = acc + r * PANEL + v * VL;
      add_sum(to, low - offset, row.scale, low_scale);
      add_sum(to + 32, ((whole - low) >> 4) - offset, row.scale, high_scale);
    }
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
