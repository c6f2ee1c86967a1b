// A few rows times a panel: acc[rows][64] += a[rows][depth] . panel[depth][64].
//
// Layout: panel [K][64] float, or [K/2][64][2] bf16 (a dot-product instruction takes pairs of k); 256 bytes a step of
// depth. Tiling: up to 6 rows by 4 vectors of 16 (24 accumulators of 32 registers; 6 by 2 vectors where there are 16
// registers); the panel slice is read once per 6 rows. Every output element is one chain of multiply-adds over k, so it
// does not depend on how many rows are computed together.
// Floor: memory up to ~24 rows, then 2 multiply-adds a cycle. To reach both, all passes over a slice share out the
// fetching of the slice that follows it in memory; a single pass fetches a little ahead of itself.

namespace fdserve {
namespace FD_ISA {

constexpr int GEMM_ROWS = 6;
constexpr int64_t STEP_BYTES = PANEL * 4, AHEAD_BYTES = 4096, LINE = 64;

template <int LINES>
FD_INLINE void prefetch(const char* from) {
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(from + i * LINE, 0, LINES == 4 ? 3 : 2);
}

#ifdef FD_BF16

template <int ROWS, int LINES>
void gemm_rows(const bf16* a, int64_t stride, const bf16* panel, int64_t depth, float* acc, bool first,
               const char* ahead) {
  __m512 c[ROWS][4];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v) c[r][v] = first ? _mm512_setzero_ps() : _mm512_load_ps(acc + r * PANEL + v * 16);
  const char* b = reinterpret_cast<const char*>(panel);
  for (int64_t k = 0; k < depth; ++k, b += STEP_BYTES, ahead += LINES * LINE) {
    prefetch<LINES>(ahead);
    __m512bh w[4];
    for (int v = 0; v < 4; ++v) w[v] = (__m512bh)_mm512_loadu_si512(b + v * 64);
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, a + r * stride + 2 * k, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < 4; ++v) c[r][v] = _mm512_dpbf16_ps(c[r][v], x, w[v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v) _mm512_store_ps(acc + r * PANEL + v * 16, c[r][v]);
}

#else

constexpr int GEMM_VECTORS = VL == 16 ? 4 : 2;

template <int ROWS, int LINES>
void gemm_rows(const float* a, int64_t stride, const float* panel, int64_t depth, float* acc, bool first,
               const char* ahead) {
  for (int64_t column = 0; column < PANEL; column += GEMM_VECTORS * VL) {
    vf c[ROWS][GEMM_VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < GEMM_VECTORS; ++v)
        c[r][v] = first ? vf{} : load(acc + r * PANEL + column + v * VL);
    const float* b = panel + column;
    for (int64_t k = 0; k < depth; ++k, b += PANEL) {
      if (GEMM_VECTORS * VL == PANEL) prefetch<LINES>(ahead + k * LINES * LINE);
      vf w[GEMM_VECTORS];
      for (int v = 0; v < GEMM_VECTORS; ++v) w[v] = load(b + v * VL);
      for (int r = 0; r < ROWS; ++r) {
        const vf x = splat(a[r * stride + k]);
        for (int v = 0; v < GEMM_VECTORS; ++v) c[r][v] = fma(x, w[v], c[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < GEMM_VECTORS; ++v) store(acc + r * PANEL + column + v * VL, c[r][v]);
  }
}

#endif

template <class E, int LINES>
void gemm_passes(const E* a, int64_t stride, int64_t rows, const E* panel, int64_t depth, float* acc, bool first) {
  const char* const begin = reinterpret_cast<const char*>(panel);
  const char* const end = begin + depth * STEP_BYTES;
  const int64_t passes = (rows + GEMM_ROWS - 1) / GEMM_ROWS;
  for (int64_t pass = 0; pass < passes; ++pass) {
    // What is left to fetch of the next slice; when nothing is, this one, which costs nothing.
    const char* ahead = LINES == 4 ? begin + AHEAD_BYTES : pass * LINES < 4 ? end + pass * LINES * LINE * depth : begin;
    const int64_t n = (rows + passes - pass - 1) / (passes - pass);  // passes as even as can be
    switch (n) {
      case 1: gemm_rows<1, LINES>(a, stride, panel, depth, acc, first, ahead); break;
      case 2: gemm_rows<2, LINES>(a, stride, panel, depth, acc, first, ahead); break;
      case 3: gemm_rows<3, LINES>(a, stride, panel, depth, acc, first, ahead); break;
      case 4: gemm_rows<4, LINES>(a, stride, panel, depth, acc, first, ahead); break;
      case 5: gemm_rows<5, LINES>(a, stride, panel, depth, acc, first, ahead); break;
      default: gemm_rows<6, LINES>(a, stride, panel, depth, acc, first, ahead);
    }
    rows -= n, a += n * stride, acc += n * PANEL;
  }
}

template <class E>
void gemm(const void* a_, int64_t stride, int64_t rows, const void* panel_, int64_t depth, float* acc, bool first) {
  const E *a = static_cast<const E*>(a_), *panel = static_cast<const E*>(panel_);
  if (rows <= GEMM_ROWS) gemm_passes<E, 4>(a, stride, rows, panel, depth, acc, first);
  else if (rows <= 3 * GEMM_ROWS) gemm_passes<E, 2>(a, stride, rows, panel, depth, acc, first);
  else gemm_passes<E, 1>(a, stride, rows, panel, depth, acc, first);
}

}  // namespace FD_ISA
}  // namespace fdserve
