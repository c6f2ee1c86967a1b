// Weight-only formats: integers of 8 or 4 bits with a bf16 scale for a group of inputs of an output.
//
// Layout of a group of a panel: scales [64], then the integers plus 128 (8 bits: [inputs / 4][64][4]) or plus 8 (4 bits:
// [inputs / 64][2][16][16][4], 64 inputs of 16 outputs a tile; low halves of bytes are of outputs 0 to 31, high ones of 32
// to 63). Activations come as two rows of digits a row (digits.h), and few rows take weights as they lie in memory: of 4
// bits whole bytes, and low halves, which one AND gives; high halves are what is left. For more rows a group of nibbles is
// unfolded to bytes in the first-level cache. Second digits of nibbles are multiplied where rows at hand have any.
// Floor: memory for few rows, for many a product of bytes (nibbles) or two. Without instructions for bytes all unfolds to
// floats.

namespace fdserve {
namespace FD_ISA {

FD_INLINE const bf16* scales_of(const char* group) { return reinterpret_cast<const bf16*>(group); }

#ifdef FD_BF16

struct DigitMath : Bytes {
  FD_INLINE vi dot(vi sum, vi x, vi w) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
};

template <int BITS>
struct GroupOf {
  static constexpr Format FORMAT = BITS == 4 ? Format::kWint4 : Format::kWint8;
  static constexpr int64_t INPUTS = group_inputs(FORMAT), BYTES = group_bytes(FORMAT), CHUNK_BYTES = CHUNK * PANEL * BITS / 8;
  // Weights are whole bytes at most.
  static constexpr int64_t LARGEST_INPUT = BITS == 4 ? static_cast<int64_t>(TOP) : 1 << (BITS_BELOW_LARGEST + 1);
  static_assert(INPUTS * 255 * LARGEST_INPUT <= INT32_MAX, "a sum over a group may overflow");
};

constexpr int64_t DIGIT_ROWS = 24;  // whose sums share the first-level cache with a group

inline void multiply_bytes(Rows a, int64_t rows, const char* group, int64_t inputs, float* acc) {
  constexpr int64_t INPUTS = GroupOf<8>::INPUTS;
  alignas(64) int32_t sums[2 * DIGIT_ROWS * PANEL];
  for (int64_t k = 0, g = 0; k < inputs; k += INPUTS, ++g, group += GroupOf<8>::BYTES) {
    const int64_t depth = (inputs - k < INPUTS ? inputs - k : INPUTS) / 4;
    gemm_slice<DigitMath>(a.data + k, a.stride / 2, 2 * rows, group + PANEL * 2, depth, sums, true,
                          group + GroupOf<8>::BYTES, GroupOf<8>::BYTES / LINE);
    add_byte_sums<4>(sums, 2 * PANEL, PANEL, rows, a.sum_scales + g, a.groups, scales_of(group), acc);
  }
}

// 64 inputs of 16 and 16 outputs.
template <int ROWS>
FD_INLINE void nibble_tile(const char* a, int64_t stride, const char* packed, vi (&low)[ROWS], vi (&whole)[ROWS]) {
  const vi mask = (vi)_mm512_set1_epi8(15);
  for (int64_t i = 0; i < CHUNK / 4; ++i) {
    if (i % 4 == 0) prefetch<4>(packed + AHEAD_BYTES + i * LINE);
    const vi bytes = DigitMath::weight(packed + i * LINE), nibbles = bytes & mask;
    for (int r = 0; r < ROWS; ++r) {
      const vi x = DigitMath::input(a + r * stride + 4 * i);
      low[r] = DigitMath::dot(low[r], x, nibbles);
      whole[r] = DigitMath::dot(whole[r], x, bytes);
    }
  }
}

// Sums over a group: [rows][32 low, 32 whole].
template <int ROWS>
void multiply_nibbles(const char* a, int64_t stride, const char* packed, int64_t chunks, int32_t* sums) {
  vi low[2][ROWS], whole[2][ROWS];
  for (int r = 0; r < ROWS; ++r) low[0][r] = low[1][r] = whole[0][r] = whole[1][r] = vi{};
  for (int64_t c = 0; c < chunks; ++c, a += CHUNK, packed += 2 * CHUNK_TILE) {
    nibble_tile(a, stride, packed, low[0], whole[0]);
    nibble_tile(a, stride, packed + CHUNK_TILE, low[1], whole[1]);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int tile = 0; tile < 2; ++tile) {
      store(sums + r * PANEL + tile * VL, low[tile][r]);
      store(sums + r * PANEL + 32 + tile * VL, whole[tile][r]);
    }
}

FD_INLINE void multiply_few_nibbles(const char* a, int64_t stride, int64_t rows, const char* packed, int64_t chunks,
                                    int32_t* sums) {
  switch (rows) {
    case 1: return multiply_nibbles<1>(a, stride, packed, chunks, sums);
    case 2: return multiply_nibbles<2>(a, stride, packed, chunks, sums);
    case 3: return multiply_nibbles<3>(a, stride, packed, chunks, sums);
    case 4: return multiply_nibbles<4>(a, stride, packed, chunks, sums);
    case 5: return multiply_nibbles<5>(a, stride, packed, chunks, sums);
    default: return multiply_nibbles<6>(a, stride, packed, chunks, sums);
  }
}

// Nibbles of a group as bytes [inputs / 4][64][4].
FD_INLINE void unfold_nibbles(const char* packed, int64_t chunks, char* bytes) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < CHUNK / 4; ++i, bytes += STEP_BYTES)
      for (int64_t tile = 0; tile < 2; ++tile) {
        const __m512i pairs = _mm512_loadu_si512(packed + (2 * c + tile) * CHUNK_TILE + i * 64);
        _mm512_store_si512(bytes + tile * 64, _mm512_and_si512(pairs, low));
        _mm512_store_si512(bytes + 128 + tile * 64, _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low));
      }
}

// Second digits follow the first of all inputs of a row, and take another product where a row has them.
FD_INLINE void few_nibble_rows(Rows a, int64_t rows, const char* group, int64_t chunks, const SumScale* row_scales,
                               float* acc) {
  alignas(64) int32_t sums[GEMM_ROWS * PANEL];
  const int digits = have_second_digits(row_scales, rows, a.groups) ? 2 : 1;
  for (int digit = 0; digit < digits; ++digit) {
    multiply_few_nibbles(a.data + digit * a.stride / 2, a.stride, rows, group + PANEL * 2, chunks, sums);
    add_nibble_sums<2>(sums, PANEL, 32, rows, row_scales + digit * a.groups / 2, a.groups, scales_of(group), acc);
  }
}

FD_INLINE void many_nibble_rows(Rows a, int64_t rows, const char* group, int64_t chunks, const SumScale* row_scales,
                                float* acc) {
  alignas(64) int32_t sums[DIGIT_ROWS * PANEL];
  alignas(64) char bytes[GroupOf<4>::INPUTS * PANEL];
  unfold_nibbles(group + PANEL * 2, chunks, bytes);
  for (int64_t first = 0; first < rows; first += DIGIT_ROWS) {
    const int64_t n = rows - first < DIGIT_ROWS ? rows - first : DIGIT_ROWS;
    const char* x = a.data + first * a.stride;
    const SumScale* scales = row_scales + first * a.groups;
    const int digits = have_second_digits(scales, n, a.groups) ? 2 : 1;
    for (int digit = 0; digit < digits; ++digit) {
      gemm_slice<DigitMath>(x + digit * a.stride / 2, a.stride, n, bytes, chunks * CHUNK / 4, sums, true,
                            group + GroupOf<4>::BYTES, GroupOf<4>::BYTES / LINE);
      add_sums(sums, n, scales + digit * a.groups / 2, a.groups, scales_of(group), acc + first * PANEL);
    }
  }
}

inline void multiply_nibble_groups(Rows a, int64_t rows, const char* group, int64_t inputs, float* acc) {
  constexpr int64_t INPUTS = GroupOf<4>::INPUTS;
  const SumScale* row_scales = a.sum_scales;
  for (int64_t k = 0; k < inputs; k += INPUTS, group += GroupOf<4>::BYTES, a.data += INPUTS, ++row_scales) {
    const int64_t chunks = (inputs - k < INPUTS ? inputs - k : INPUTS) / CHUNK;
    if (rows <= GEMM_ROWS) few_nibble_rows(a, rows, group, chunks, row_scales, acc);
    else many_nibble_rows(a, rows, group, chunks, row_scales, acc);
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

// slice[CHUNK][64] of as many inputs of a group.
inline void bytes_to_floats(const char* packed, float* slice) {
  for (int64_t i = 0; i < CHUNK; i += 4, packed += PANEL * 4, slice += PANEL * 4) {
    prefetch<4>(packed + AHEAD_BYTES);
    for (int64_t column = 0; column < PANEL; column += VL) {
      const vi bytes = Bytes::weight(packed + column * 4);
      for (int64_t n = 0; n < 4; ++n)
        store(slice + n * PANEL + column, __builtin_convertvector((bytes >> 8 * n & 255) - 128, vf));
    }
  }
}

inline void nibbles_to_floats(const char* packed, float* slice) {
  for (int64_t tile = 0; tile < 2; ++tile)
    for (int64_t i = 0; i < CHUNK; ++i) {
      const char* line = packed + tile * CHUNK_TILE + i / 4 * LINE;
      if (i % 16 == 0) prefetch<4>(line + AHEAD_BYTES);
      for (int64_t column = 0; column < CHUNK_TILE / LINE; column += VL) {
        const vi nibbles = Bytes::weight(line + column * 4) >> i % 4 * 8;
        float* to = slice + i * PANEL + tile * 16 + column;
        store(to, __builtin_convertvector((nibbles & 15) - 8, vf));
        store(to + 32, __builtin_convertvector((nibbles >> 4 & 15) - 8, vf));
      }
    }
}

template <class E>
void gemm_groups(Rows a, int64_t rows, const void* panel_, const void*, Format format, int64_t inputs, float* acc) {
  const int64_t group = group_inputs(format);
  alignas(64) float slice[CHUNK * PANEL];
  for (int64_t k = 0; k < inputs; k += CHUNK) {
    const char* from = static_cast<const char*>(panel_) + k / group * group_bytes(format);
    if (format == Format::kWint8) bytes_to_floats(from + PANEL * 2 + k % group * PANEL, slice);
    else nibbles_to_floats(from + PANEL * 2 + k % group * PANEL / 2, slice);
    gemm_passes<Floats, 1, true>(a.data + k * 4, a.stride, rows, reinterpret_cast<const char*>(slice), CHUNK, acc, k == 0,
                                 from, 0, scales_of(from));
  }
}

#endif

}  // namespace FD_ISA
}  // namespace fdserve
