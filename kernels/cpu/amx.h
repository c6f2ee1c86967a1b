// Products of rows and panels by AMX, whose registers are tiles of 16 rows by 64 bytes.
//
// Layout: that of gemm.h and weight_only.h as it is. 16 steps of depth by 16 columns of a panel are a tile of weights (its
// rows 256 bytes apart), 16 rows of `a` by 64 bytes one of activations. Tiling: two tiles of rows by two of columns (4 sums,
// 2 + 2 factors), over all of the depth; up to 16 rows take one tile of rows by all four of columns, so that the panel is
// one stream. The last tile of rows begins 16 rows before the end: what it shares with the tile before is computed twice,
// to the same bits. Every element is one chain over the depth in steps of 16 whatever the rows: within a step the
// instruction adds a chain over the first elements of the pairs and one over the second, then both to the sum.
// Floor: memory up to ~100 rows, then 1024 multiply-adds a cycle and core. While rows pass over a panel the next one is
// fetched.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t TILE_ROWS = 16, TILE_LINE = 64, TILE_BYTES = TILE_ROWS * TILE_LINE;
constexpr int64_t STEP_DEPTH = 16, WEIGHTS_BYTES = STEP_DEPTH * STEP_BYTES;  // of a step
constexpr int64_t ACC_BYTES = PANEL * 4;

// Tiles 0 to 4 hold sums and rows, 5 to 7 weights; with 16 rows any holds anything.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
  constexpr TileShapes(int few = 0) {
    for (int t = 0; t < 8; ++t) rows[t] = static_cast<uint8_t>(t < 5 ? few : TILE_ROWS);
  }
};

struct AllShapes {
  TileShapes of[TILE_ROWS + 1] = {};
  constexpr AllShapes() {
    for (int r = 1; r <= TILE_ROWS; ++r) of[r] = TileShapes(r);
  }
};
constexpr AllShapes ALL_SHAPES;

// Loading shapes takes 100 ns, looking at them 7; whatever else ran on this thread may have changed them.
FD_INLINE void shape_tiles(int64_t rows) {
  const TileShapes& wanted = ALL_SHAPES.of[rows < TILE_ROWS ? rows : TILE_ROWS];
  TileShapes now;
  asm volatile("sttilecfg %0" : "=m"(now));
  if (_mm512_cmpneq_epi64_mask(_mm512_load_si512(&now), _mm512_load_si512(&wanted)) != 0)
    asm volatile("ldtilecfg %0" : : "m"(wanted));
}

// The compiler does not know that tiles are loaded from memory and stored to it.
FD_INLINE void tile_fence() { asm volatile("" : : : "memory"); }

struct TilePairs {
  using Sum = float;
  static constexpr bool BYTES = false;
};
struct TileQuads {
  using Sum = int32_t;
  static constexpr bool BYTES = true;
};
#define FD_TILE_DOT(sum, x, w)                       \
  if constexpr (Math::BYTES) _tile_dpbusd(sum, x, w); \
  else _tile_dpbf16ps(sum, x, w)

FD_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int LINES>
FD_INLINE void fetch(const char* from) {
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(from + i * LINE, 0, 2);
}

// One tile of rows by the whole panel, into sums 0 to 3.
template <class Math, int LINES>
FD_INLINE void add_one(const char* a, int64_t stride, const char* panel, int64_t steps, const char* ahead) {
  for (int64_t k = 0; k < steps; ++k, a += TILE_LINE, panel += WEIGHTS_BYTES, ahead += LINES * LINE) {
    _tile_loadd(4, a, stride);
    fetch<LINES / 4>(ahead);
    _tile_loadd(5, panel, STEP_BYTES);
    FD_TILE_DOT(0, 4, 5);
    fetch<LINES / 4>(ahead + LINES / 4 * LINE);
    _tile_loadd(6, panel + 64, STEP_BYTES);
    FD_TILE_DOT(1, 4, 6);
    fetch<LINES / 4>(ahead + LINES / 2 * LINE);
    _tile_loadd(7, panel + 128, STEP_BYTES);
    FD_TILE_DOT(2, 4, 7);
    fetch<LINES / 4>(ahead + LINES / 4 * 3 * LINE);
    _tile_loadd(5, panel + 192, STEP_BYTES);
    FD_TILE_DOT(3, 4, 5);
  }
}

// Two tiles of rows by half of a panel.
template <class Math, int LINES>
FD_INLINE void add_two(const char* const* rows, int64_t stride, const char* panel, int64_t steps, const char* ahead) {
  const char *a = rows[0], *b = rows[1];
  for (int64_t k = 0; k < steps; ++k, a += TILE_LINE, b += TILE_LINE, panel += WEIGHTS_BYTES, ahead += LINES * LINE) {
    _tile_loadd(4, a, stride);
    _tile_loadd(6, panel, STEP_BYTES);
    FD_TILE_DOT(0, 4, 6);
    fetch<LINES / 2>(ahead);
    _tile_loadd(5, b, stride);
    FD_TILE_DOT(2, 5, 6);
    _tile_loadd(7, panel + 64, STEP_BYTES);
    FD_TILE_DOT(1, 4, 7);
    fetch<LINES / 2>(ahead + LINES / 2 * LINE);
    FD_TILE_DOT(3, 5, 7);
  }
}

// What the steps leave of the depth, as one step more with zeros.
struct Rest {
  alignas(64) char rows[2][TILE_BYTES];
  alignas(64) char panel[WEIGHTS_BYTES];
  const char* pointers[2] = {rows[0], rows[1]};
  FD_MEMBER void take(const char* const* a, int64_t tiles, int64_t tile_rows, int64_t stride, const char* from,
                      int64_t depth) {
    __builtin_memset(this, 0, sizeof(rows) + sizeof(panel));
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t r = 0; r < tile_rows; ++r) __builtin_memcpy(rows[t] + r * TILE_LINE, a[t] + r * stride, depth * 4);
    __builtin_memcpy(panel, from, depth * STEP_BYTES);
  }
};

// The sums of one or two tiles of rows by a panel into acc[tile][..][64]. `ahead` is fetched on the way: LINES cache lines
// a step and tile.
template <class Math, int LINES>
void tile_pass(const char* const* a, int64_t tiles, int64_t tile_rows, int64_t stride, const char* panel, int64_t depth,
               typename Math::Sum* const* acc, const char* ahead) {
  const int64_t steps = depth / STEP_DEPTH, left = depth % STEP_DEPTH;
  Rest rest;
  if (left != 0) {
    const char* ends[2] = {a[0] + steps * TILE_LINE, a[tiles - 1] + steps * TILE_LINE};
    rest.take(ends, tiles, tile_rows, stride, panel + steps * WEIGHTS_BYTES, left);
  }
  tile_fence();
  if (tiles == 1) {
    zero_sums();
    add_one<Math, LINES>(a[0], stride, panel, steps, ahead);
    if (left != 0) add_one<Math, 0>(rest.rows[0], TILE_LINE, rest.panel, 1, nullptr);
    _tile_stored(0, acc[0], ACC_BYTES);
    _tile_stored(1, acc[0] + 16, ACC_BYTES);
    _tile_stored(2, acc[0] + 32, ACC_BYTES);
    _tile_stored(3, acc[0] + 48, ACC_BYTES);
    return tile_fence();
  }
  for (int64_t half = 0; half < 2; ++half, ahead += steps * LINES * LINE) {
    zero_sums();
    add_two<Math, LINES>(a, stride, panel + half * 128, steps, ahead);
    if (left != 0) add_two<Math, 0>(rest.pointers, TILE_LINE, rest.panel + half * 128, 1, nullptr);
    _tile_stored(0, acc[0] + half * 32, ACC_BYTES);
    _tile_stored(1, acc[0] + half * 32 + 16, ACC_BYTES);
    _tile_stored(2, acc[1] + half * 32, ACC_BYTES);
    _tile_stored(3, acc[1] + half * 32 + 16, ACC_BYTES);
  }
  tile_fence();
}

// How rows are cut into tiles.
struct RowTiles {
  int64_t rows, count;
  FD_MEMBER explicit RowTiles(int64_t all) : rows(all), count((all + TILE_ROWS - 1) / TILE_ROWS) {}
  FD_MEMBER int64_t height() const { return rows < TILE_ROWS ? rows : TILE_ROWS; }
  FD_MEMBER int64_t start(int64_t t) const { return (t + 1) * TILE_ROWS <= rows ? t * TILE_ROWS : rows - height(); }
};

template <class Math, int LINES>
void tile_passes(const char* a, int64_t stride, RowTiles tiles, const char* panel, int64_t depth, typename Math::Sum* acc) {
  const char *next = panel + depth * STEP_BYTES, *end = next + depth * STEP_BYTES;
  for (int64_t t = 0; t < tiles.count; t += 2) {
    const int64_t first = tiles.start(t), second = tiles.start(t + 1 < tiles.count ? t + 1 : t);
    const int64_t count = t + 1 < tiles.count ? 2 : 1;
    const char* rows[2] = {a + first * stride, a + second * stride};
    typename Math::Sum* sums[2] = {acc + first * PANEL, acc + second * PANEL};
    // What is left to fetch; when nothing is, this panel, which costs nothing.
    tile_pass<Math, LINES>(rows, count, tiles.height(), stride, panel, depth, sums, next < end ? next : panel);
    next += count * (depth / STEP_DEPTH) * LINES * LINE;
  }
}

template <class Math>
void tile_gemm(const void* a_, int64_t stride, int64_t rows, const void* panel_, int64_t depth, typename Math::Sum* acc) {
  const char *a = static_cast<const char*>(a_), *panel = static_cast<const char*>(panel_);
  const RowTiles tiles(rows);
  shape_tiles(rows);
  if (tiles.count == 1) tile_pass<Math, 64>(&a, 1, tiles.height(), stride, panel, depth, &acc, panel + AHEAD_BYTES);
  else if (tiles.count <= 3) tile_passes<Math, 32>(a, stride, tiles, panel, depth, acc);
  else if (tiles.count < 8) tile_passes<Math, 16>(a, stride, tiles, panel, depth, acc);
  else tile_passes<Math, 8>(a, stride, tiles, panel, depth, acc);
}

// Sums of a group that wait to be scaled: reading them while the tiles of the next product compute costs nothing.
struct Unscaled {
  const float* sums;
  float* acc;
  int64_t rows;
  const bf16* scales;
  bool first;
  FD_MEMBER void add() const {
    if (rows == 0) return;
    for (int v = 0; v < 4; ++v) {
      const vf scale = widened(scales + v * VL);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = acc + r * PANEL + v * VL;
        store(to, fma(load(sums + r * PANEL + v * VL), scale, first ? vf{} : load(to)));
      }
    }
  }
};

// A weight-only panel: each group is unfolded into the first-level cache while the tiles of the one before compute.
template <int BITS>
void tile_groups(const char* a, int64_t stride, RowTiles tiles, const char* group, int64_t groups, float* acc) {
  constexpr int64_t DEPTH = GROUP / 2, BYTES = Unfold<BITS>::LINES * LINE;
  alignas(64) bf16 slices[2][GROUP * PANEL];
  alignas(64) float sums[2][2 * TILE_ROWS * PANEL];
  Unscaled waiting[2] = {};
  int64_t turn = 0;
  unfold_group<BITS, true>(group + PANEL * 2, slices[0]);
  for (int64_t g = 0; g < groups; ++g, group += BYTES, a += DEPTH * 4)
    for (int64_t t = 0; t < tiles.count; t += 2, turn ^= 1) {
      const int64_t first = tiles.start(t), last = t + 1 < tiles.count ? t + 1 : t;
      const char* rows[2] = {a + first * stride, a + tiles.start(last) * stride};
      float* to[2] = {sums[turn], sums[turn] + (tiles.start(last) - first) * PANEL};
      const char* slice = reinterpret_cast<const char*>(slices[g % 2]);
      tile_pass<TilePairs, 0>(rows, last - t + 1, tiles.height(), stride, slice, DEPTH, to, nullptr);
      if (t == 0 && g + 1 < groups) unfold_group<BITS, true>(group + BYTES + PANEL * 2, slices[(g + 1) % 2]);
      waiting[turn ^ 1].add();
      const int64_t done = t * TILE_ROWS - first, end = tiles.start(last) + tiles.height();
      waiting[turn] = {sums[turn] + done * PANEL, acc + (first + done) * PANEL, end - first - done, scales_of(group), g == 0};
    }
  waiting[turn ^ 1].add();
}

inline void tile_gemm_groups(const void* a_, int64_t stride, int64_t rows, const void* panel_, Format format,
                             int64_t groups, float* acc) {
  const char *a = static_cast<const char*>(a_), *panel = static_cast<const char*>(panel_);
  shape_tiles(rows);
  if (format == Format::kWint4) tile_groups<4>(a, stride, RowTiles(rows), panel, groups, acc);
  else tile_groups<8>(a, stride, RowTiles(rows), panel, groups, acc);
}

}  // namespace FD_ISA
}  // namespace fdserve
