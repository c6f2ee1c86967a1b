// Weight-only formats: integers of 8 or 4 bits with a bf16 scale for each GROUP of inputs of an output.
//
// Layout of a group of a panel: scales [64], then vectors of 64 bytes that hold 16 outputs by 4 inputs (8 bits: sign and
// magnitude) or by 8 inputs (4 bits: value + 8), in the order in which they unfold to bf16 pairs. Unfolding is table look-up:
// a nibble is an index into 16 bf16 values that one register holds (4 permutes and 3 shifts give 128 weights); of a byte
// the upper and the lower half of its bf16 are each a look-up among 128 (2 permutes, an OR for the sign and 2 unpacks
// give 64), or among 64 where a permute of two registers takes twice as long: from 64 on both follow from the byte.
// Integers of this size are exact in bf16, so sums are those of gemm.h over a group, times its scale. Up to 6 rows are
// multiplied as the weights unfold (floor: memory); for more a group is unfolded into the first-level cache and all rows
// pass over it (floor: multiply-adds). Both give the same bits.

namespace fdserve {
namespace FD_ISA {

FD_INLINE const bf16* scales_of(const char* group) { return reinterpret_cast<const bf16*>(group); }

template <int BITS>
struct Unfold {
  static constexpr Format FORMAT = BITS == 4 ? Format::kWint4 : Format::kWint8;
  static constexpr int PAIRS = 16 / BITS;  // of inputs in a vector
  static constexpr int64_t VECTORS = GROUP / (2 * PAIRS) * 4;
  static constexpr int64_t LINES = (PANEL * 2 + VECTORS * 64) / LINE;
};

#ifdef FD_BF16

// What the look-ups choose from, made by the compiler.
struct TableData {
  alignas(64) uint16_t nibbles[32] = {};
  alignas(64) uint8_t high[128] = {};
  alignas(64) uint8_t low[128] = {};
  static constexpr uint16_t bf16_of(int x) {
    return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, static_cast<float>(x)) >> 16);
  }
  constexpr TableData() {
    for (int i = 0; i < 32; ++i) nibbles[i] = bf16_of(i % 16 - 8);
    for (int i = 0; i < 128; ++i) high[i] = static_cast<uint8_t>(bf16_of(i) >> 8), low[i] = static_cast<uint8_t>(bf16_of(i));
  }
};
constexpr TableData TABLE_DATA;

template <int BITS>
struct Tables;

template <>
struct Tables<4> {
  __m512i values;
  FD_MEMBER Tables() : values(_mm512_load_si512(TABLE_DATA.nibbles)) {}
  // Five bits of a word choose among 32: the fifth changes nothing.
  template <int PAIR>
  FD_MEMBER __m512i pair(__m512i packed) const {
    return _mm512_permutexvar_epi16(PAIR == 0 ? packed : _mm512_srli_epi16(packed, 4 * PAIR), values);
  }
  FD_MEMBER void unfold(__m512i packed, __m512i* pairs) const {
    pairs[0] = pair<0>(packed), pairs[1] = pair<1>(packed), pairs[2] = pair<2>(packed), pairs[3] = pair<3>(packed);
  }
};

template <>
struct Tables<8> {
  __m512i upper[2], lower[2];
  FD_MEMBER Tables() {
    for (int i = 0; i < 2; ++i) {
      upper[i] = _mm512_load_si512(TABLE_DATA.high + 64 * i);
      lower[i] = _mm512_load_si512(TABLE_DATA.low + 64 * i);
    }
  }
  FD_MEMBER void unfold(__m512i packed, __m512i* pairs) const {
#ifdef FD_AMX
    // From 64 on the bf16 is 0x4200 plus twice the magnitude.
    const __m512i twice = _mm512_add_epi8(packed, packed);
    const __mmask64 small = ~_mm512_movepi8_mask(twice);
    const __m512i low = _mm512_mask_permutexvar_epi8(twice, small, packed, lower[0]);
    const __m512i high = _mm512_mask_permutexvar_epi8(_mm512_set1_epi8(0x42), small, packed, upper[0]);
#else
    const __m512i high = _mm512_permutex2var_epi8(upper[0], packed, upper[1]);
    const __m512i low = _mm512_permutex2var_epi8(lower[0], packed, lower[1]);
#endif
    const __m512i signed_high = _mm512_ternarylogic_epi32(high, packed, _mm512_set1_epi8(-128), 0xf8);  // high | packed & sign
    pairs[0] = _mm512_unpacklo_epi8(low, signed_high);
    pairs[1] = _mm512_unpackhi_epi8(low, signed_high);
  }
};

template <int BITS>
FD_INLINE void unfold_group(const Tables<BITS>& tables, const char* packed, bf16* slice) {
  constexpr int PAIRS = Unfold<BITS>::PAIRS;
  for (int64_t i = 0; i < Unfold<BITS>::VECTORS; i += 4)
    for (int v = 0; v < 4; ++v) {
      __m512i pairs[PAIRS];
      tables.unfold(_mm512_loadu_si512(packed + (i + v) * 64), pairs);
      for (int p = 0; p < PAIRS; ++p) _mm512_store_si512(slice + ((i / 4 * PAIRS + p) * 4 + v) * 32, pairs[p]);
    }
}

template <int BITS, int ROWS>
void multiply_unfolding(const char* a, int64_t stride, const char* group, int64_t groups, float* acc) {
  constexpr int PAIRS = Unfold<BITS>::PAIRS;
  const Tables<BITS> tables;
  for (int64_t g = 0; g < groups; ++g) {
    vf c[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < 4; ++v) c[r][v] = vf{};
    const bf16* scales = scales_of(group);
    prefetch<2>(group + AHEAD_BYTES);
    group += PANEL * 2;
    for (int64_t i = 0; i < Unfold<BITS>::VECTORS; i += 4, group += 256, a += PAIRS * 4) {
      prefetch<4>(group + AHEAD_BYTES);
      for (int v = 0; v < 4; ++v) {
        __m512i pairs[PAIRS];
        tables.unfold(_mm512_loadu_si512(group + v * 64), pairs);
        for (int p = 0; p < PAIRS; ++p)
          for (int r = 0; r < ROWS; ++r) c[r][v] = Pairs::dot(c[r][v], Pairs::input(a + r * stride + 4 * p), (vi)pairs[p]);
      }
    }
    for (int v = 0; v < 4; ++v) {
      const vf scale = widened(scales + v * 16);
      for (int r = 0; r < ROWS; ++r) {
        float* sum = acc + r * PANEL + v * 16;
        store(sum, fma(c[r][v], scale, g == 0 ? vf{} : load(sum)));
      }
    }
  }
}

template <int BITS>
FD_INLINE bool multiply_few(const char* a, int64_t stride, int64_t rows, const char* panel, int64_t groups, float* acc) {
  switch (rows) {
    case 1: multiply_unfolding<BITS, 1>(a, stride, panel, groups, acc); return true;
    case 2: multiply_unfolding<BITS, 2>(a, stride, panel, groups, acc); return true;
    case 3: multiply_unfolding<BITS, 3>(a, stride, panel, groups, acc); return true;
    case 4: multiply_unfolding<BITS, 4>(a, stride, panel, groups, acc); return true;
    case 5: multiply_unfolding<BITS, 5>(a, stride, panel, groups, acc); return true;
    case 6: multiply_unfolding<BITS, 6>(a, stride, panel, groups, acc); return true;
    default: return false;
  }
}

#else

template <int BITS>
struct Tables {};

template <int BITS>
void unfold_group(Tables<BITS>, const char* packed, float* slice) {
  for (int64_t k = 0; k < GROUP; ++k)
    for (int64_t column = 0; column < PANEL; ++column)
      slice[k * PANEL + column] = static_cast<float>(weight_at(packed, Unfold<BITS>::FORMAT, k, column));
}

template <int BITS>
FD_INLINE bool multiply_few(const char*, int64_t, int64_t, const char*, int64_t, float*) {
  return false;
}

#endif

template <class E, int BITS>
void multiply_groups(const char* a, int64_t stride, int64_t rows, const char* group, int64_t groups, float* acc) {
  if (multiply_few<BITS>(a, stride, rows, group, groups, acc)) return;
  constexpr int64_t DEPTH = GROUP * sizeof(E) / 4;
  constexpr int64_t BYTES = Unfold<BITS>::LINES * LINE;
  alignas(64) E slice[GROUP * PANEL];
  const Tables<BITS> tables;
  for (int64_t g = 0; g < groups; ++g, group += BYTES, a += DEPTH * 4) {
    unfold_group<BITS>(tables, group + PANEL * 2, slice);
    gemm_passes<typename MathOf<E>::type, 1, true>(a, stride, rows, reinterpret_cast<const char*>(slice), DEPTH, acc,
                                                   g == 0, group + BYTES, Unfold<BITS>::LINES, scales_of(group));
  }
}

template <class E>
void gemm_groups(Rows a, int64_t rows, const void* panel_, Format format, int64_t groups, float* acc) {
  const char* panel = static_cast<const char*>(panel_);
  if (format == Format::kWint4) multiply_groups<E, 4>(a.data, a.stride, rows, panel, groups, acc);
  else multiply_groups<E, 8>(a.data, a.stride, rows, panel, groups, acc);
}

}  // namespace FD_ISA
}  // namespace fdserve
