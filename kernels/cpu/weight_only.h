// Weight-only formats: integers of 8 or 4 bits with a bf16 scale for a group of inputs of an output.
//
// Layout of a group of a panel: scales [64], then the integers plus 128 (8 bits: [inputs / 4][64][4]) or plus 8 (4 bits:
// [inputs / 64][2][16][16][4], 64 inputs of 16 outputs a tile; low halves of bytes are of outputs 0 to 31, high ones of 32
// to 63). Activations come as two rows of digits a row (digits.h), and few rows take weights as they lie in memory: of 4
// bits whole bytes, and low halves, which one AND gives; high halves are what is left. For more rows a group of nibbles is
// unfolded into the first-level cache, times 16 for the first digits, so that both digits add up to one sum.
// Floor: memory for few rows, two products of bytes for many. Without instructions for bytes all unfolds to floats.

namespace fdserve {
namespace FD_ISA {

FD_INLINE const bf16* scales_of(const char* group) { return reinterpret_cast<const bf16*>(group); }

#ifdef FD_BF16

struct DigitMath : Bytes {
  FD_INLINE vi dot(vi sum, vi x, vi w) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
};

template <int BITS>
struct GroupOf {
  static constexpr Format FORMAT = DigitsOf<BITS>::FORMAT;
  static constexpr int64_t INPUTS = group_inputs(FORMAT), BYTES = group_bytes(FORMAT), CHUNK_BYTES = CHUNK * PANEL * BITS / 8;
  // Activations are less than twice the power of two below the largest, weights are whole bytes at most.
  static_assert((INPUTS * 255 << (DigitsOf<BITS>::BITS_BELOW_LARGEST + 1)) <= INT32_MAX, "a sum over a group may overflow");
};

constexpr int64_t DIGIT_ROWS = 24;  // whose sums share the first-level cache with a group

inline void multiply_bytes(Rows a, int64_t rows, const char* group, int64_t inputs, float* acc) {
  constexpr int64_t INPUTS = GroupOf<8>::INPUTS;
  alignas(64) int32_t sums[2 * DIGIT_ROWS * PANEL];
  for (int64_t k = 0, g = 0; k < inputs; k += INPUTS, ++g, group += GroupOf<8>::BYTES) {
    const int64_t depth = (inputs - k < INPUTS ? inputs - k : INPUTS) / 4;
    gemm_slice<DigitMath>(a.data + k, a.stride / 2, 2 * rows, group + PANEL * 2, depth, sums, true,
                          group + GroupOf<8>::BYTES, GroupOf<8>::BYTES / LINE);
    add_digit_sums<8, 4>(sums, 2 * PANEL, PANEL, rows, a.sum_scales + g, a.groups, scales_of(group), acc);
  }
}

// Sums over a group: [rows][2 digits][32 low, 32 whole].
template <int ROWS>
void multiply_nibbles(const char* a, int64_t stride, const char* packed, int64_t chunks, int32_t* sums) {
  const vi mask = (vi)_mm512_set1_epi8(15);
  for (int64_t tile = 0; tile < 2; ++tile) {
    vi low[2 * ROWS] = {}, whole[2 * ROWS] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const char* from = packed + (2 * c + tile) * CHUNK_TILE;
      prefetch<4>(from + AHEAD_BYTES);
      for (int64_t i = 0; i < CHUNK / 4; ++i) {
        if (i % 4 == 3) prefetch<4>(from + AHEAD_BYTES + i / 4 * 256);
        const vi bytes = DigitMath::weight(from + i * 64), nibbles = bytes & mask;
        for (int r = 0; r < 2 * ROWS; ++r) {
          const vi x = DigitMath::input(a + r * stride + c * CHUNK + 4 * i);
          low[r] = DigitMath::dot(low[r], x, nibbles);
          whole[r] = DigitMath::dot(whole[r], x, bytes);
        }
      }
    }
    for (int r = 0; r < 2 * ROWS; ++r) {
      store(sums + r * PANEL + tile * VL, low[r]);
      store(sums + r * PANEL + 32 + tile * VL, whole[r]);
    }
  }
}

FD_INLINE void multiply_few_nibbles(Rows a, int64_t rows, const char* packed, int64_t chunks, int32_t* sums) {
  switch (rows) {
    case 1: return multiply_nibbles<1>(a.data, a.stride / 2, packed, chunks, sums);
    case 2: return multiply_nibbles<2>(a.data, a.stride / 2, packed, chunks, sums);
    case 3: return multiply_nibbles<3>(a.data, a.stride / 2, packed, chunks, sums);
    case 4: return multiply_nibbles<4>(a.data, a.stride / 2, packed, chunks, sums);
    case 5: return multiply_nibbles<5>(a.data, a.stride / 2, packed, chunks, sums);
    default: return multiply_nibbles<6>(a.data, a.stride / 2, packed, chunks, sums);
  }
}

// Nibbles of a group as bytes [inputs / 4][64][4], and 16 times them.
FD_INLINE void unfold_nibbles(const char* packed, int64_t chunks, char* once, char* times_16) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(-16);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < CHUNK / 4; ++i, once += STEP_BYTES, times_16 += STEP_BYTES)
      for (int64_t tile = 0; tile < 2; ++tile) {
        const __m512i bytes = _mm512_loadu_si512(packed + (2 * c + tile) * CHUNK_TILE + i * 64);
        _mm512_store_si512(once + tile * 64, _mm512_and_si512(bytes, low));
        _mm512_store_si512(once + 128 + tile * 64, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
        _mm512_store_si512(times_16 + tile * 64, _mm512_and_si512(_mm512_slli_epi16(bytes, 4), high));
        _mm512_store_si512(times_16 + 128 + tile * 64, _mm512_and_si512(bytes, high));
      }
}

inline void multiply_nibble_groups(Rows a, int64_t rows, const char* group, int64_t inputs, float* acc) {
  constexpr int64_t INPUTS = GroupOf<4>::INPUTS;
  alignas(64) int32_t sums[DIGIT_ROWS * PANEL];
  alignas(64) char once[INPUTS * PANEL], times_16[INPUTS * PANEL];
  for (int64_t k = 0, g = 0; k < inputs; k += INPUTS, ++g, group += GroupOf<4>::BYTES, a.data += INPUTS) {
    const int64_t chunks = (inputs - k < INPUTS ? inputs - k : INPUTS) / CHUNK, depth = chunks * CHUNK / 4;
    const char* packed = group + PANEL * 2;
    const SumScale* row_scales = a.sum_scales + g;
    if (rows <= GEMM_ROWS) {
      multiply_few_nibbles(a, rows, packed, chunks, sums);
      add_digit_sums<4, 2>(sums, 2 * PANEL, PANEL, rows, row_scales, a.groups, scales_of(group), acc);
      continue;
    }
    unfold_nibbles(packed, chunks, once, times_16);
    for (int64_t first = 0; first < rows; first += DIGIT_ROWS) {
      const int64_t n = rows - first < DIGIT_ROWS ? rows - first : DIGIT_ROWS;
      const char* x = a.data + first * a.stride;
      gemm_slice<DigitMath>(x, a.stride, n, times_16, depth, sums, true, group + GroupOf<4>::BYTES,
                            GroupOf<4>::BYTES / LINE);
      gemm_slice<DigitMath>(x + a.stride / 2, a.stride, n, once, depth, sums, false, packed, 0);
      add_sums<4, true>(sums, PANEL, n, row_scales + first * a.groups, a.groups, scales_of(group), acc + first * PANEL);
    }
  }
}

template <class E>
void gemm_groups(Rows a, int64_t rows, const void* panel_, const void*, Format format, int64_t inputs, float* acc) {
  const char* panel = static_cast<const char*>(panel_);
  __builtin_memset(acc, 0, static_cast<size_t>(rows * PANEL) * sizeof(float));
  if (format == Format::kWint4) return multiply_nibble_groups(a, rows, panel, inputs, acc);
  for (int64_t first = 0; first < rows; first += DIGIT_ROWS)
    multiply_bytes(a.from(first), rows - first < DIGIT_ROWS ? rows - first : DIGIT_ROWS, panel, inputs, acc + first * PANEL);
}

#else

constexpr void (*to_digits)(const void*, int64_t, Format, char*, SumScale*) = nullptr;

template <class E>
void gemm_groups(Rows a, int64_t rows, const void* panel_, const void*, Format format, int64_t inputs, float* acc) {
  const int64_t group = group_inputs(format);
  alignas(64) float slice[CHUNK * PANEL];
  for (int64_t k = 0; k < inputs; k += CHUNK) {
    const char* from = static_cast<const char*>(panel_) + k / group * group_bytes(format);
    for (int64_t i = 0; i < CHUNK; ++i)
      for (int64_t column = 0; column < PANEL; ++column)
        slice[i * PANEL + column] = static_cast<float>(weight_at(from + PANEL * 2, format, k % group + i, column));
    gemm_passes<Floats, 1, true>(a.data + k * 4, a.stride, rows, reinterpret_cast<const char*>(slice), CHUNK, acc, k == 0,
                                 from, 0, scales_of(from));
  }
}

#endif

}  // namespace FD_ISA
}  // namespace fdserve
