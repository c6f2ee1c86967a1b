// A few rows times a panel: acc[rows][64] += a[rows][depth] . panel[depth][64].
//
// Layout: panel [K][64] float, or [K/2][64][2] bf16 (a dot-product instruction takes pairs of k). Tiling: up to 6 rows
// by 4 vectors of 16 (24 accumulators of 32 registers; 6 by 2 vectors where there are 16 registers); the panel slice is
// read once per 6 rows. Every output element is one chain of multiply-adds over k, so it does not depend on how many
// rows are computed together. Floor: memory up to ~6 rows (each weight is read once), then 2 dot products a cycle.

namespace fdserve {
namespace FD_ISA {

constexpr int GEMM_ROWS = 6;

#ifdef FD_BF16

template <int ROWS>
void gemm_rows(const bf16* a, int64_t stride, const bf16* panel, int64_t depth, float* acc, bool first) {
  __m512 c[ROWS][4];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v) c[r][v] = first ? _mm512_setzero_ps() : _mm512_load_ps(acc + r * PANEL + v * 16);
  const char* b = reinterpret_cast<const char*>(panel);
  for (int64_t k = 0; k < depth; ++k, b += 256) {
    _mm_prefetch(b + PREFETCH_BYTES, _MM_HINT_T0);
    _mm_prefetch(b + PREFETCH_BYTES + 64, _MM_HINT_T0);
    _mm_prefetch(b + PREFETCH_BYTES + 128, _MM_HINT_T0);
    _mm_prefetch(b + PREFETCH_BYTES + 192, _MM_HINT_T0);
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

template <int ROWS>
void gemm_rows(const float* a, int64_t stride, const float* panel, int64_t depth, float* acc, bool first) {
  for (int64_t column = 0; column < PANEL; column += GEMM_VECTORS * VL) {
    vf c[ROWS][GEMM_VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < GEMM_VECTORS; ++v)
        c[r][v] = first ? vf{} : load(acc + r * PANEL + column + v * VL);
    const float* b = panel + column;
    for (int64_t k = 0; k < depth; ++k, b += PANEL) {
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

template <class E>
void gemm(const void* a_, int64_t stride, int64_t rows, const void* panel_, int64_t depth, float* acc, bool first) {
  const E *a = static_cast<const E*>(a_), *panel = static_cast<const E*>(panel_);
  for (; rows >= GEMM_ROWS; rows -= GEMM_ROWS, a += GEMM_ROWS * stride, acc += GEMM_ROWS * PANEL)
    gemm_rows<GEMM_ROWS>(a, stride, panel, depth, acc, first);
  switch (rows) {
    case 5: return gemm_rows<5>(a, stride, panel, depth, acc, first);
    case 4: return gemm_rows<4>(a, stride, panel, depth, acc, first);
    case 3: return gemm_rows<3>(a, stride, panel, depth, acc, first);
    case 2: return gemm_rows<2>(a, stride, panel, depth, acc, first);
    case 1: return gemm_rows<1>(a, stride, panel, depth, acc, first);
    default: return;
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
