// Rows of a matrix into columns of a panel, when weights are loaded.

namespace fdserve {
namespace FD_ISA {

// The first or the second halves of a and b, lane by lane in turn.
template <bool second>
FD_INLINE vi interleaved(vi a, vi b) {
  vi lanes;
  for (int i = 0; i < VL; ++i) lanes[i] = i / 2 + second * (VL / 2) + i % 2 * VL;
  return __builtin_shuffle(a, b, lanes);
}

// Lane j of row i changes places with lane i of row j: with every round the bits of a number made of row and lane turn by
// one place.
FD_INLINE void turn_square(vi (&rows)[VL]) {
#pragma GCC unroll 4
  for (int round = 1; round < VL; round *= 2) {
    vi next[VL];
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; ++i) {
      next[2 * i] = interleaved<false>(rows[i], rows[i + VL / 2]);
      next[2 * i + 1] = interleaved<true>(rows[i], rows[i + VL / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) rows[i] = next[i];
  }
}

// 16 rows of 16 words (of 32 bits), `stride` bytes apart, into 16 columns of a panel of words; or, of two bf16 to a word,
// into 16 columns of a panel of floats.
template <bool widen>
void turn(const char* rows, int64_t stride, int32_t* panel) {
  for (int64_t row = 0; row < 16; row += VL)
    for (int64_t word = 0; word < 16; word += VL) {
      vi square[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) square[i] = load(reinterpret_cast<const int32_t*>(rows + (row + i) * stride) + word);
      turn_square(square);
      int32_t* to = panel + word * (widen ? 2 : 1) * PANEL + row;
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i, to += PANEL) {
        store(to, widen ? square[i] << 16 : square[i]);
        if (widen) store(to += PANEL, square[i] & ~0xffff);
      }
    }
}

}  // namespace FD_ISA
}  // namespace fdserve
