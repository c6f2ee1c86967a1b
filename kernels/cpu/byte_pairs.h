// Signed bytes to bf16 pairs, by table look-up.
//
// Of a magnitude the upper and the lower half of its bf16 are each a look-up among 128 (2 permutes, an OR for the sign and 2
// unpacks give 64 numbers), or among 64 where a permute of two registers takes twice as long: from 64 on both follow from
// the byte. Unpacking takes bytes from halves of 128-bit lanes, so that those of a pair are brought together first.

namespace fdserve {
namespace FD_ISA {

// What the look-ups choose from, made by the compiler.
struct BytePairData {
  alignas(64) uint8_t high[128] = {};
  alignas(64) uint8_t low[128] = {};
  constexpr BytePairData() {
    for (int i = 0; i < 128; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(i));
      high[i] = static_cast<uint8_t>(bits >> 24), low[i] = static_cast<uint8_t>(bits >> 16);
    }
  }
};
constexpr BytePairData BYTE_PAIR_DATA;

struct BytePairs {
  __m512i upper[2], lower[2];
  FD_MEMBER BytePairs() {
    for (int i = 0; i < 2; ++i) {
      upper[i] = _mm512_load_si512(BYTE_PAIR_DATA.high + 64 * i);
      lower[i] = _mm512_load_si512(BYTE_PAIR_DATA.low + 64 * i);
    }
  }
  // Of four bytes each the first two to pairs[0], the others to pairs[1].
  FD_MEMBER void unfold(__m512i bytes, __m512i* pairs) const {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m512i sorted = _mm512_shuffle_epi8(bytes, order), packed = _mm512_abs_epi8(sorted);
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
    const __m512i signed_high = _mm512_ternarylogic_epi32(high, sorted, _mm512_set1_epi8(-128), 0xf8);  // high | sorted & sign
    pairs[0] = _mm512_unpacklo_epi8(low, signed_high);
    pairs[1] = _mm512_unpackhi_epi8(low, signed_high);
  }
};

}  // namespace FD_ISA
}  // namespace fdserve
