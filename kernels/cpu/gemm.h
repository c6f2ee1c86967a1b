// A few rows times a panel: acc[rows][64] += a[rows][depth] . panel[depth][64].
//
// Layout: panel [K][64] float, [K/2][64][2] bf16 or [K/4][64][4] bytes (a dot-product instruction takes 4 bytes of k); 256
// bytes a step of depth, and a word of a row of `a`, or two where floats are multiplied by bf16. Tiling: up to 6 rows by 4
// vectors of 16 (24 accumulators of 32 registers; 6 by 2 vectors where there are 16 registers); the panel slice is read once
// per 6 rows. Every output element is one chain of multiply-adds over k, so it does not depend on how many rows are computed
// together.
// k is cut into slices of a panel that stay in cache while the rows pass over it; the sums are stored and loaded back
// exactly between slices. Floor: memory up to ~24 rows, then 2 multiply-adds a cycle. To reach both, all passes over a
// slice share out the fetching of what follows in memory; a single pass fetches a little ahead of itself, or the next slice
// where short vectors pass over this one several times.

namespace fdserve {
namespace FD_ISA {

constexpr int GEMM_ROWS = 6;
constexpr int GEMM_VECTORS = VL == 16 ? 4 : 2, COLUMNS = GEMM_VECTORS * VL;
constexpr int64_t STEP_BYTES = PANEL * 4, AHEAD_BYTES = 4096, LINE = 64;
// Of a panel: short slices overlap memory and arithmetic best while memory is the bound, long ones spare stores after.
constexpr int64_t FEW_ROWS = 3 * GEMM_ROWS, FEW_SLICE_BYTES = 16 << 10, SLICE_BYTES = 64 << 10;

template <int LINES>
FD_INLINE void prefetch(const char* from) {
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(from + i * LINE, 0, LINES == 4 ? 3 : 2);
}

FD_INLINE int32_t word_at(const char* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

// WORDS of a row are multiplied one by one with what `weight` makes of a vector of the panel for each.
struct Floats {
  using Sum = float;
  using Vector = vf;
  static constexpr int WORDS = 1;
  FD_INLINE vf input(const char* p) { return (vf)(vi{} + word_at(p)); }
  FD_INLINE vf weight(const char* p, int) { return load(reinterpret_cast<const float*>(p)); }
  FD_INLINE vf dot(vf sum, vf x, vf w) { return fma(x, w, sum); }
};

// Floats times bf16, which are the upper halves of floats: the same chain as over the floats that they are.
struct WidePairs : Floats {
  static constexpr int WORDS = 2;
  FD_INLINE vf weight(const char* p, int word) {
    const vi pairs = *reinterpret_cast<const viu*>(p);
    return (vf)(word == 0 ? pairs << 16 : pairs & ~0xffff);
  }
};

struct Bytes {
  using Sum = int32_t;
  using Vector = vi;
  static constexpr int WORDS = 1;
  FD_INLINE vi input(const char* p) { return vi{} + word_at(p); }
  FD_INLINE vi weight(const char* p, int = 0) { return *reinterpret_cast<const viu*>(p); }
  FD_INLINE vi dot(vi sum, vi x, vi w) {
#ifdef FD_BF16
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    // As two of four pairs each; the compiler splits a vector once for all that it is multiplied by.
    const vs even = (vs)w << 8 >> 8, odd = (vs)w >> 8;
    return sum + multiply_pairs((vs)(x & 0xff00ff), even) + multiply_pairs((vs)(x >> 8 & 0xff00ff), odd);
#endif
  }
};

#ifdef FD_BF16
struct Pairs {
  using Sum = float;
  using Vector = vf;
  static constexpr int WORDS = 1;
  FD_INLINE vi input(const char* p) { return vi{} + word_at(p); }
  FD_INLINE vi weight(const char* p, int) { return *reinterpret_cast<const viu*>(p); }
  FD_INLINE vf dot(vf sum, vi x, vi w) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
};
#endif

// With scales the sums are of this slice alone, and are added to `acc` times the scales. Not inlined: several in one function
// share its registers out among them.
template <class Math, int ROWS, int LINES, bool SCALED>
__attribute__((noinline)) void gemm_rows(const char* a, int64_t stride, const char* panel, int64_t depth,
                                         typename Math::Sum* acc, bool first, const char* ahead, const bf16* scales) {
  for (int64_t column = 0; column < PANEL; column += COLUMNS) {
    typename Math::Vector c[ROWS][GEMM_VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < GEMM_VECTORS; ++v)
        c[r][v] = first || SCALED ? typename Math::Vector{} : load(acc + r * PANEL + column + v * VL);
    const char* b = panel + column * 4;
    for (int64_t k = 0; k < depth; ++k, b += STEP_BYTES) {
      if (COLUMNS < PANEL && LINES == 4) prefetch<1>(ahead + (column / COLUMNS * depth + k) * LINE);
      else if (column == 0) prefetch<LINES>(ahead + k * LINES * LINE);
      for (int word = 0; word < Math::WORDS; ++word) {
        decltype(Math::weight(b, word)) w[GEMM_VECTORS];
        for (int v = 0; v < GEMM_VECTORS; ++v) w[v] = Math::weight(b + v * VL * 4, word);
        for (int r = 0; r < ROWS; ++r) {
          const auto x = Math::input(a + r * stride + 4 * (k * Math::WORDS + word));
          for (int v = 0; v < GEMM_VECTORS; ++v) c[r][v] = Math::dot(c[r][v], x, w[v]);
        }
      }
    }
    for (int v = 0; v < GEMM_VECTORS; ++v) {
      const int64_t at = column + v * VL;
      if constexpr (SCALED) {
        const vf scale = widened(scales + at);
        for (int r = 0; r < ROWS; ++r)
          store(acc + r * PANEL + at, fma(c[r][v], scale, first ? vf{} : load(acc + r * PANEL + at)));
      } else {
        for (int r = 0; r < ROWS; ++r) store(acc + r * PANEL + at, c[r][v]);
      }
    }
  }
}

// `next` is `lines` cache lines that will be wanted after this slice.
template <class Math, int LINES, bool SCALED>
void gemm_passes(const char* a, int64_t stride, int64_t rows, const char* panel, int64_t depth, typename Math::Sum* acc,
                 bool first, const char* next, int64_t lines, const bf16* scales) {
  const int64_t passes = (rows + GEMM_ROWS - 1) / GEMM_ROWS;
  for (int64_t pass = 0; pass < passes; ++pass) {
    // What is left to fetch; when nothing is, this slice, which costs nothing.
    const int64_t fetched = pass * LINES * depth;
    const char* ahead = fetched < lines ? next + fetched * LINE : panel;
    if (LINES == 4) ahead = panel + (COLUMNS < PANEL ? depth * STEP_BYTES : AHEAD_BYTES);
    const int64_t n = (rows + passes - pass - 1) / (passes - pass);  // passes as even as can be
    switch (n) {
      case 1: gemm_rows<Math, 1, LINES, SCALED>(a, stride, panel, depth, acc, first, ahead, scales); break;
      case 2: gemm_rows<Math, 2, LINES, SCALED>(a, stride, panel, depth, acc, first, ahead, scales); break;
      case 3: gemm_rows<Math, 3, LINES, SCALED>(a, stride, panel, depth, acc, first, ahead, scales); break;
      case 4: gemm_rows<Math, 4, LINES, SCALED>(a, stride, panel, depth, acc, first, ahead, scales); break;
      case 5: gemm_rows<Math, 5, LINES, SCALED>(a, stride, panel, depth, acc, first, ahead, scales); break;
      default: gemm_rows<Math, 6, LINES, SCALED>(a, stride, panel, depth, acc, first, ahead, scales);
    }
    rows -= n, a += n * stride, acc += n * PANEL;
  }
}

template <class Math>
void gemm_slice(const char* a, int64_t stride, int64_t rows, const char* slice, int64_t depth, typename Math::Sum* acc,
                bool first, const char* next, int64_t lines) {
  if (rows <= GEMM_ROWS) gemm_passes<Math, 4, false>(a, stride, rows, slice, depth, acc, first, next, lines, nullptr);
  else if (rows <= FEW_ROWS) gemm_passes<Math, 2, false>(a, stride, rows, slice, depth, acc, first, next, lines, nullptr);
  else gemm_passes<Math, 1, false>(a, stride, rows, slice, depth, acc, first, next, lines, nullptr);
}

template <class Math>
void gemm_slices(Rows x, int64_t rows, const void* panel_, const void* next, int64_t depth, typename Math::Sum* acc) {
  const char *a = x.data, *panel = static_cast<const char*>(panel_);
  const int64_t slice = (rows <= FEW_ROWS ? FEW_SLICE_BYTES : SLICE_BYTES) / STEP_BYTES;
  for (int64_t done = 0; done < depth; done += slice, a += slice * 4 * Math::WORDS, panel += slice * STEP_BYTES) {
    const int64_t count = depth - done < slice ? depth - done : slice;
    const char* then = done + count == depth ? static_cast<const char*>(next) : panel + count * STEP_BYTES;
    gemm_slice<Math>(a, x.stride, rows, panel, count, acc, done == 0, then, 4 * count);
  }
}

template <class Math>
void gemm(Rows a, int64_t rows, const void* panel, const void* next, int64_t depth, float* acc, Sink sink) {
  gemm_slices<Math>(a, rows, panel, next, depth, acc);
  sink.take(sink.with, {acc}, 0, rows);
}

inline void gemm_bytes(Rows a, int64_t rows, const void* panel, const void* next, int64_t depth, int32_t* acc, Sink sink) {
  gemm_slices<Bytes>(a, rows, panel, next, depth, acc);
  sink.take(sink.with, {acc}, 0, rows);
}

}  // namespace FD_ISA
}  // namespace fdserve
