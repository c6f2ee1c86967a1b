// Weight-only panels by AMX.
//
// Layout: that of weight_only.h; integers unfold to tiles of bf16. Tiling: that of amx.h, a group of inputs at a time,
// whose sums are then scaled and added up by vectors. Up to 16 rows take the tiles as they unfold, two steps behind; for
// more some groups are unfolded, and all rows pass over them. What vectors do (unfold, scale) stands between the tiles.
// Floor: memory for few rows where unfolding keeps up, the products of bf16 for many.

namespace fdserve {
namespace FD_ISA {

// 16 columns of a step of a group into a tile.
template <int BITS>
FD_INLINE void unfold_tile(const Tables<BITS>& tables, const char* packed, int64_t column, char* tile) {
  constexpr int PAIRS = Unfold<BITS>::PAIRS;
  for (int i = 0; i < STEP_DEPTH / PAIRS; ++i) {
    __m512i pairs[PAIRS];
    tables.unfold(_mm512_loadu_si512(packed + (i * 4 + column) * 64), pairs);
    for (int p = 0; p < PAIRS; ++p) _mm512_store_si512(tile + (i * PAIRS + p) * TILE_LINE, pairs[p]);
  }
}

template <int BITS>
struct GroupOf {
  static constexpr int64_t BYTES = Unfold<BITS>::LINES * LINE, STEP = Unfold<BITS>::VECTORS * 32;
};
static_assert(GROUP / 2 == 2 * STEP_DEPTH);

// Sums of one or two groups that wait to be scaled and added to `acc` in turn. They wait until the tiles of the next are
// under way: reading them at once would wait for their stores, and between tiles vectors hold up more than they gain.
template <int VECTORS, int GROUPS>
struct Waiting {
  static constexpr int64_t COLUMNS = VECTORS * VL, APART = 2 * TILE_ROWS * COLUMNS;  // of two groups' sums
  const float* sums = nullptr;
  float* acc = nullptr;
  int64_t rows = 0;
  int groups = 0;
  const bf16* scales[2] = {};
  FD_MEMBER Waiting() {}
  template <int COUNT>
  FD_MEMBER void add_groups() const {
    for (int v = 0; v < VECTORS; ++v) {
      const vf one = load(scales[0] + v * VL), two = COUNT == 2 ? load(scales[1] + v * VL) : vf{};
      for (int64_t r = 0; r < rows; ++r) {
        const float* sum = sums + r * COLUMNS + v * VL;
        float* to = acc + r * PANEL + v * VL;
        const vf x = fma(load(sum), one, load(to));
        store(to, COUNT == 2 ? fma(load(sum + APART), two, x) : x);
      }
    }
  }
  FD_MEMBER void add() const {
    if (GROUPS == 2 && groups == 2) add_groups<GROUPS>();
    else if (groups == 1) add_groups<1>();
  }
};

constexpr int64_t UNFOLDED_GROUPS = 16;  // whose weights share the second-level cache with rows and sums

// Unfolded groups times two tiles of rows, which begin `apart` from another and of which `known` rows are done; or one tile.
template <bool TWO, int64_t BYTES>
FD_INLINE void multiply_slices(const Tile* tiles, int64_t apart, int64_t known, const char* slices, const char* panel,
                               int64_t groups, float* acc) {
  constexpr int VECTORS = TWO ? 2 : 4;
  using Pair = Waiting<VECTORS, 2>;
  alignas(64) float sums[2][2 * Pair::APART];
  Nothing nothing;
  const int64_t rows = (TWO ? apart + TILE_ROWS : TILE_ROWS) - known;
  for (int half = 0; half < 4 / VECTORS; ++half) {
    Pair waiting;
    for (int64_t g = 0; g < groups; g += 2) {
      float* to = sums[g / 2 % 2];
      const int count = g + 1 < groups ? 2 : 1;
      for (int64_t i = g; i < g + count; ++i) {
        const Tile from[2] = {tiles[0].after(2 * i), tiles[1].after(2 * i)};
        const char* slice = slices + i * 2 * WEIGHTS_BYTES + half * 2 * TILE_BYTES;
        tile_fence();
        zero_sums();
        if (TWO) add_two<TilePairs, WholeTiles>(from, slice, 2, nothing);
        else add_one<TilePairs, WholeTiles>(from[0], slice, 2, nothing);
        float* sum = to + (i - g) * Pair::APART;
        if (TWO) store_two(sum, sum + apart * Pair::COLUMNS, Pair::COLUMNS * 4);
        else store_one(sum);
        tile_fence();
      }
      waiting.add();
      waiting.sums = to + known * Pair::COLUMNS, waiting.acc = acc + half * 32, waiting.rows = rows;
      waiting.groups = count;
      for (int i = 0; i < count; ++i) waiting.scales[i] = scales_of(panel + (g + i) * BYTES) + half * 32;
    }
    waiting.add();
  }
}

template <int BITS>
void many_groups(RowTiles tiles, const char* panel, int64_t groups, float* acc) {
  constexpr int64_t BYTES = GroupOf<BITS>::BYTES, STEP = GroupOf<BITS>::STEP;
  alignas(64) char slices[UNFOLDED_GROUPS][2 * WEIGHTS_BYTES];
  const Tables<BITS> tables;
  Ahead<0, 2> fetch(panel + Ahead<0, 2>::WINDOW);
  for (int64_t left, done = 0; groups > 0; groups -= left, panel += left * BYTES, done += 2 * left) {
    left = groups < UNFOLDED_GROUPS ? groups : UNFOLDED_GROUPS;
    for (int64_t g = 0; g < left; ++g)
      for (int64_t t = 0; t < 8; ++t) {
        unfold_tile<BITS>(tables, panel + g * BYTES + PANEL * 2 + t / 4 * STEP, t % 4, slices[g] + t * TILE_BYTES);
        if (BITS == 8 || t % 2 == 0) fetch.unit();
      }
    for (int64_t t = 0; t < tiles.count; t += 2) {
      const int64_t first = tiles.start(t), last = t + 1 < tiles.count ? t + 1 : t;
      const int64_t apart = tiles.start(last) - first, known = t * TILE_ROWS - first;  // rows of the tile before
      const Tile from[2] = {tiles.tile(t).after(done), tiles.tile(last).after(done)};
      float* to = acc + t * TILE_ROWS * PANEL;
      if (last != t) multiply_slices<true, BYTES>(from, apart, known, slices[0], panel, left, to);
      else multiply_slices<false, BYTES>(from, 0, known, slices[0], panel, left, to);
    }
  }
}

// Unfolds the step after next and fetches what follows.
template <int BITS>
struct Unfolding {
  const Tables<BITS> tables;
  Ahead<0, 2> fetch;
  const char* packed;
  char* out;
  FD_MEMBER explicit Unfolding(const char* panel) : fetch(panel + Ahead<0, 2>::WINDOW) {}
  FD_MEMBER void operator()(int part) {
    const int column = part ^ 2;  // no tile waits for stores that are under way
    unfold_tile<BITS>(tables, packed, column, out + column * TILE_BYTES);
    if (BITS == 8 || part % 2 == 0) fetch.unit();
  }
};

template <int BITS>
void few_groups(Tile a, int64_t rows, const char* panel, int64_t groups, float* acc) {
  constexpr int64_t BYTES = GroupOf<BITS>::BYTES, STEP = GroupOf<BITS>::STEP;
  alignas(64) char slices[3][WEIGHTS_BYTES];
  alignas(64) float sums[2][TILE_ROWS * PANEL];
  Unfolding<BITS> meanwhile(panel);
  Waiting<4, 1> waiting;
  waiting.acc = acc, waiting.rows = rows;
  const auto packed = [&](int64_t g) { return panel + (g < groups ? g : groups - 1) * BYTES + PANEL * 2; };
  char *now = slices[0], *next = slices[1], *later = slices[2];
  for (int t = 0; t < 4; ++t) {
    unfold_tile<BITS>(meanwhile.tables, packed(0), t, now + t * TILE_BYTES);
    unfold_tile<BITS>(meanwhile.tables, packed(0) + STEP, t, next + t * TILE_BYTES);
  }
  for (int64_t g = 0; g < groups; ++g, a = a.after(2)) {
    float* to = sums[g % 2];
    if (g % 4 == 3) meanwhile.fetch.unit();  // the scales of four groups
    tile_fence();
    zero_sums();
    meanwhile.packed = packed(g + 1), meanwhile.out = later;
    add_one<TilePairs, WholeTiles>(a, now, 1, meanwhile);
    meanwhile.packed += STEP, meanwhile.out = now;
    add_one<TilePairs, WholeTiles>(a.after(1), next, 1, meanwhile);
    store_one(to);
    tile_fence();
    waiting.add();
    waiting.sums = to, waiting.scales[0] = scales_of(panel + g * BYTES), waiting.groups = 1;
    char* old = next;
    next = now, now = later, later = old;
  }
  waiting.add();
}

template <int BITS>
FD_INLINE void multiply_group_tiles(const RowTiles& tiles, const char* panel, int64_t groups, float* acc) {
  if (tiles.count == 1) few_groups<BITS>(tiles.tile(0), tiles.rows, panel, groups, acc);
  else many_groups<BITS>(tiles, panel, groups, acc);
}

inline void tile_gemm_groups(Rows a, int64_t rows, const void* panel_, Format format, int64_t groups, float* acc) {
  const char* panel = static_cast<const char*>(panel_);
  const RowTiles tiles(a, rows);
  shape_tiles(rows);
  __builtin_memset(acc, 0, static_cast<size_t>(tiles.start(tiles.count - 1) + tiles.height()) * PANEL * sizeof(float));
  if (format == Format::kWint4) multiply_group_tiles<4>(tiles, panel, groups, acc);
  else multiply_group_tiles<8>(tiles, panel, groups, acc);
}

}  // namespace FD_ISA
}  // namespace fdserve
