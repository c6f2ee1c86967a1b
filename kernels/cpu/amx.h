// Products of rows and panels by AMX, whose registers are tiles of 16 rows by 64 bytes.
//
// Layout: that of gemm.h and weight_only.h as it is. 16 steps of depth by 16 columns of a panel are a tile of weights
// (its rows 256 bytes apart), 16 rows of `a` by 64 bytes one of activations. Tiling: two tiles of rows by two of columns
// (4 sums, 2 + 2 factors), over all of the depth; up to 16 rows take one tile of rows by all four of columns, so that the
// panel is one stream. The last tile of rows begins 16 rows before the end: what it shares with the tile before is
// computed twice, to the same bits. Every element is one chain over the depth in steps of 16 whatever the rows: within a
// step the instruction adds a chain over the first elements of the pairs and one over the second, then both to the sum.
// Floor: memory up to ~100 rows, then 512 multiply-adds of bf16 a cycle and core, or 1024 of bytes. While rows pass over a
// panel the next one is fetched.

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

constexpr int STREAM_LINES = WEIGHTS_BYTES / LINE;  // all of a step: the panel that is being read

// Into the first-level cache what is wanted at once, into the second what is wanted after this panel.
template <int LINES, bool SOON>
FD_INLINE void fetch(const char* from) {
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(from + i * LINE, 0, SOON ? 3 : 2);
}

// One tile of rows by the whole panel, into sums 0 to 3.
template <class Math, int LINES>
FD_INLINE void add_one(const char* a, int64_t stride, const char* panel, int64_t steps, const char* ahead) {
  constexpr bool SOON = LINES == STREAM_LINES;
  for (int64_t k = 0; k < steps; ++k, a += TILE_LINE, panel += WEIGHTS_BYTES, ahead += LINES * LINE) {
    _tile_loadd(4, a, stride);
    fetch<LINES / 4, SOON>(ahead);
    _tile_loadd(5, panel, STEP_BYTES);
    FD_TILE_DOT(0, 4, 5);
    fetch<LINES / 4, SOON>(ahead + LINES / 4 * LINE);
    _tile_loadd(6, panel + 64, STEP_BYTES);
    FD_TILE_DOT(1, 4, 6);
    fetch<LINES / 4, SOON>(ahead + LINES / 2 * LINE);
    _tile_loadd(7, panel + 128, STEP_BYTES);
    FD_TILE_DOT(2, 4, 7);
    fetch<LINES / 4, SOON>(ahead + LINES / 4 * 3 * LINE);
    _tile_loadd(5, panel + 192, STEP_BYTES);
    FD_TILE_DOT(3, 4, 5);
  }
}

// A tile, into the first-level cache: its lines lie too far apart for the processor to guess that it is next.
FD_INLINE void fetch_tile(const char* from, int64_t stride) {
  for (int64_t r = 0; r < TILE_ROWS; ++r) __builtin_prefetch(from + r * stride, 0, 3);
}

// Two tiles of rows by half of a panel.
template <class Math, int LINES>
FD_INLINE void add_two(const char* const* rows, int64_t stride, const char* panel, int64_t steps, const char* ahead) {
  const char *a = rows[0], *b = rows[1];
  for (int64_t k = 0; k < steps; ++k, a += TILE_LINE, b += TILE_LINE, panel += WEIGHTS_BYTES, ahead += LINES * LINE) {
    _tile_loadd(4, a, stride);
    _tile_loadd(6, panel, STEP_BYTES);
    FD_TILE_DOT(0, 4, 6);
    fetch<LINES / 2, false>(ahead);
    fetch_tile(panel + WEIGHTS_BYTES, STEP_BYTES);
    _tile_loadd(5, b, stride);
    FD_TILE_DOT(2, 5, 6);
    fetch_tile(panel + WEIGHTS_BYTES + 64, STEP_BYTES);
    _tile_loadd(7, panel + 64, STEP_BYTES);
    FD_TILE_DOT(1, 4, 7);
    fetch<LINES / 2, false>(ahead + LINES / 2 * LINE);
    fetch_tile(a + TILE_LINE, stride);
    FD_TILE_DOT(3, 5, 7);
    fetch_tile(b + TILE_LINE, stride);
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

// The sums of one or two tiles of rows by a panel into acc[tile][..][64]. `ahead` is fetched on the way: LINES cache
// lines a step and tile.
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
void tile_passes(const char* a, int64_t stride, RowTiles tiles, const char* panel, int64_t depth,
                 typename Math::Sum* acc) {
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
void tile_gemm(const void* a_, int64_t stride, int64_t rows, const void* panel_, int64_t depth,
               typename Math::Sum* acc) {
  const char *a = static_cast<const char*>(a_), *panel = static_cast<const char*>(panel_);
  const RowTiles tiles(rows);
  shape_tiles(rows);
  if (tiles.count == 1) tile_pass<Math, STREAM_LINES>(&a, 1, tiles.height(), stride, panel, depth, &acc, panel + AHEAD_BYTES);
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

constexpr int64_t UNFOLDED_GROUPS = 16;  // whose weights share the second-level cache with rows and sums

// A weight-only panel for many rows: some groups are unfolded, then tiles of rows pass over them, whose sums stay in
// the first-level cache meanwhile.
template <int BITS>
void tile_groups(const char* a, int64_t stride, RowTiles tiles, const char* panel, int64_t groups, float* acc) {
  constexpr int64_t DEPTH = GROUP / 2, BYTES = Unfold<BITS>::LINES * LINE;
  alignas(64) bf16 slices[UNFOLDED_GROUPS][GROUP * PANEL];
  alignas(64) float sums[2][2 * TILE_ROWS * PANEL];
  Unscaled waiting[2] = {};
  int64_t turn = 0;
  const Tables<BITS> tables;
  for (int64_t begin = 0; begin < groups; begin += UNFOLDED_GROUPS) {
    const int64_t end = begin + UNFOLDED_GROUPS < groups ? begin + UNFOLDED_GROUPS : groups;
    for (int64_t g = begin; g < end; ++g)
      unfold_part<BITS, Unfold<BITS>::VECTORS, true>(tables, panel + g * BYTES + PANEL * 2, 0, slices[g - begin]);
    for (int64_t t = 0; t < tiles.count; t += 2) {
      const int64_t first = tiles.start(t), last = t + 1 < tiles.count ? t + 1 : t;
      const int64_t apart = tiles.start(last) - first, known = t * TILE_ROWS - first;  // rows of the tile before
      for (int64_t g = begin; g < end; ++g, turn ^= 1) {
        const char* from = a + first * stride + g * DEPTH * 4;
        const char* rows[2] = {from, from + apart * stride};
        float* to[2] = {sums[turn], sums[turn] + apart * PANEL};
        tile_pass<TilePairs, 0>(rows, last - t + 1, TILE_ROWS, stride, reinterpret_cast<const char*>(slices[g - begin]),
                                DEPTH, to, nullptr);
        waiting[turn ^ 1].add();
        waiting[turn] = {sums[turn] + known * PANEL, acc + t * TILE_ROWS * PANEL, apart + TILE_ROWS - known,
                         scales_of(panel + g * BYTES), g == 0};
      }
    }
  }
  waiting[turn ^ 1].add();
}

// A step of a group for one tile of rows. Between its tiles the group after next is unfolded a little: the instructions
// that a core looks ahead reach from one to the other, and no tile waits for stores that are still under way.
template <int BITS, int STEP>
FD_INLINE void step_unfolding(const char* a, int64_t stride, const bf16* slice, const Tables<BITS>& tables,
                              const char* packed, bf16* unfolded) {
  constexpr int64_t COUNT = Unfold<BITS>::VECTORS / 8, FIRST = STEP * 4 * COUNT;
  const bf16* weights = slice + STEP * WEIGHTS_BYTES / 2;
  _tile_loadd(4, a + STEP * TILE_LINE, stride);
  _tile_loadd(5, weights, STEP_BYTES);
  _tile_dpbf16ps(0, 4, 5);
  unfold_part<BITS, COUNT, true>(tables, packed, FIRST, unfolded);
  _tile_loadd(6, weights + 32, STEP_BYTES);
  _tile_dpbf16ps(1, 4, 6);
  unfold_part<BITS, COUNT, true>(tables, packed, FIRST + COUNT, unfolded);
  _tile_loadd(7, weights + 64, STEP_BYTES);
  _tile_dpbf16ps(2, 4, 7);
  unfold_part<BITS, COUNT, true>(tables, packed, FIRST + 2 * COUNT, unfolded);
  _tile_loadd(5, weights + 96, STEP_BYTES);
  _tile_dpbf16ps(3, 4, 5);
  unfold_part<BITS, COUNT, true>(tables, packed, FIRST + 3 * COUNT, unfolded);
}

// A weight-only panel for up to 16 rows.
template <int BITS>
void few_groups(const char* a, int64_t stride, int64_t rows, const char* panel, int64_t groups, float* acc) {
  constexpr int64_t BYTES = Unfold<BITS>::LINES * LINE;
  alignas(64) bf16 slices[3][GROUP * PANEL];
  alignas(64) float sums[2][TILE_ROWS * PANEL];
  Unscaled waiting = {};
  const Tables<BITS> tables;
  const auto packed = [&](int64_t g) { return panel + (g < groups ? g : groups - 1) * BYTES + PANEL * 2; };
  unfold_group<BITS>(tables, packed(0), slices[0]);
  unfold_group<BITS>(tables, packed(1), slices[1]);
  for (int64_t g = 0; g < groups; ++g, a += GROUP * 2) {
    float* to = sums[g % 2];
    tile_fence();
    zero_sums();
    step_unfolding<BITS, 0>(a, stride, slices[g % 3], tables, packed(g + 2), slices[(g + 2) % 3]);
    step_unfolding<BITS, 1>(a, stride, slices[g % 3], tables, packed(g + 2), slices[(g + 2) % 3]);
    waiting.add();
    _tile_stored(0, to, ACC_BYTES);
    _tile_stored(1, to + 16, ACC_BYTES);
    _tile_stored(2, to + 32, ACC_BYTES);
    _tile_stored(3, to + 48, ACC_BYTES);
    tile_fence();
    waiting = {to, acc, rows, scales_of(panel + g * BYTES), g == 0};
  }
  waiting.add();
}

template <int BITS>
FD_INLINE void multiply_group_tiles(const char* a, int64_t stride, int64_t rows, const char* panel, int64_t groups,
                                    float* acc) {
  if (rows <= TILE_ROWS) few_groups<BITS>(a, stride, rows, panel, groups, acc);
  else tile_groups<BITS>(a, stride, RowTiles(rows), panel, groups, acc);
}

inline void tile_gemm_groups(const void* a_, int64_t stride, int64_t rows, const void* panel_, Format format,
                             int64_t groups, float* acc) {
  const char *a = static_cast<const char*>(a_), *panel = static_cast<const char*>(panel_);
  shape_tiles(rows);
  if (format == Format::kWint4) multiply_group_tiles<4>(a, stride, rows, panel, groups, acc);
  else multiply_group_tiles<8>(a, stride, rows, panel, groups, acc);
}

}  // namespace FD_ISA
}  // namespace fdserve
