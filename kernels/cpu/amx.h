// Products of rows and panels by AMX, whose registers are tiles of 16 rows by 64 bytes.
//
// Layout: that of gemm.h as it is: 16 steps of depth by 16 columns of a panel are a tile of weights (its rows 256 bytes
// apart), 16 rows of `a` by 64 bytes one of activations; many rows are copied into whole tiles first. Tiling: two tiles of
// rows by two of columns (4 sums, 2 + 2 factors), over all of the depth; up to 16 rows take one tile of rows by all four of
// columns, so that the panel is one stream. The last tile of rows that were not copied begins 16 rows before the end: what
// it shares with the tile before is computed twice, to the same bits. Every element is one chain over the depth in steps of
// 16 whatever the rows: within a step the instruction adds a chain over the first elements of the pairs and one over the
// second, then both to the sum. Floor: memory up to ~100 rows, then 512 multiply-adds of bf16 a cycle and core, or 1024 of
// bytes; on the way the second-level cache, which delivers half of the tiles that this would take. While rows pass over a
// panel the next one is fetched; the sums of every two tiles are handed on at once, while they are in the first-level cache.

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

// Between instructions of tiles where nothing else is to be done: next to each other they take up to twice as long.
FD_INLINE void tile_gap() { asm volatile("nop\n nop\n nop\n nop"); }

// Pairs of bf16; bytes that are 128 too large times signed ones; digits times weights that are too large; signed bytes.
struct TilePairs {
  using Sum = float;
};
struct TileQuads {
  using Sum = int32_t;
};
struct TileDigits {
  using Sum = int32_t;
};
struct TileSigned {
  using Sum = int32_t;
};
#define FD_TILE_DOT(sum, x, w)                                                 \
  if constexpr (__is_same(Math, TilePairs)) _tile_dpbf16ps(sum, x, w);        \
  else if constexpr (__is_same(Math, TileQuads)) _tile_dpbusd(sum, x, w);     \
  else if constexpr (__is_same(Math, TileDigits)) _tile_dpbsud(sum, x, w);    \
  else _tile_dpbssd(sum, x, w)

FD_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// What is done meanwhile comes in four parts a step, between tiles: this is nothing.
struct Nothing {
  FD_MEMBER void operator()(int) { tile_gap(); }
};

// Fetches what follows in memory, eight lines at a time: a line of each of eight pages by turns, as banks of memory
// take turns faster than one of them answers. One core reads a fifth to a third faster so than in order.
template <int HINT>
struct Ahead {
  static constexpr uintptr_t PAGE = 4096, PAGES = 8, WINDOW = PAGE * PAGES;
  const char* next;
  FD_MEMBER explicit Ahead(const char* from) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(from), begin = at / WINDOW * WINDOW;
    next = reinterpret_cast<const char*>(begin + (at - begin) / PAGES / LINE * LINE);
  }
  FD_MEMBER void unit() {
    for (uintptr_t page = 0; page < PAGES; ++page) __builtin_prefetch(next + page * PAGE, 0, HINT);
    next += LINE;
    if (reinterpret_cast<uintptr_t>(next) % PAGE == 0) next += WINDOW - PAGE;
  }
};

// Fetches `bytes` that follow in memory evenly over `steps`.
struct Paced : Ahead<2> {
  static constexpr int64_t ONE = 1 << 20;
  int64_t credit = 0, rate;
  FD_MEMBER Paced(const void* from, int64_t bytes, int64_t steps)
      : Ahead(static_cast<const char*>(from)), rate(ONE * (bytes / LINE / 8 + 1) / (4 * steps) + 1) {}
  FD_MEMBER void operator()(int) {
    for (credit += rate; credit >= ONE; credit -= ONE) unit();
  }
};

// While one tile of rows streams a panel by: into the first-level cache, 4 to 64 KiB before it is needed.
struct Streaming : Ahead<3> {
  FD_MEMBER explicit Streaming(const char* panel) : Ahead(panel + WINDOW) {}
  FD_MEMBER void operator()(int) {
    for (int64_t u = 0; u < WEIGHTS_BYTES / LINE / 8 / 4; ++u) unit();
  }
};

// 16 rows of activations, or fewer: a step of depth of them, and how far it is to the next.
struct Tile {
  const char* at;
  int64_t stride, step;
  FD_MEMBER Tile after(int64_t steps) const { return {at + steps * step, stride, step}; }
};

// One tile of rows by 64 columns, into sums 0 to 3.
template <class Math, class Meanwhile>
FD_INLINE void add_one(Tile rows, const char* weights, int64_t steps, Meanwhile& meanwhile) {
  for (int64_t k = 0; k < steps; ++k, rows.at += rows.step, weights += WEIGHTS_BYTES) {
    _tile_loadd(4, rows.at, rows.stride);
    tile_gap();
    _tile_loadd(5, weights, STEP_BYTES);
    tile_gap();
    FD_TILE_DOT(0, 4, 5);
    meanwhile(0);
    _tile_loadd(6, weights + TILE_LINE, STEP_BYTES);
    tile_gap();
    FD_TILE_DOT(1, 4, 6);
    meanwhile(1);
    _tile_loadd(7, weights + 2 * TILE_LINE, STEP_BYTES);
    tile_gap();
    FD_TILE_DOT(2, 4, 7);
    meanwhile(2);
    _tile_loadd(5, weights + 3 * TILE_LINE, STEP_BYTES);
    tile_gap();
    FD_TILE_DOT(3, 4, 5);
    meanwhile(3);
  }
}

// Half of a tile, into the first-level cache: its lines lie too far apart for the processor to guess that it is next.
template <int HALF_TILE>
FD_INLINE void fetch_half(const char* from, int64_t stride) {
  for (int64_t r = HALF_TILE * 8; r < HALF_TILE * 8 + 8; ++r) __builtin_prefetch(from + r * stride, 0, 3);
}

// Two tiles of rows by 32 columns. What is fetched stands between the instructions of tiles: see tile_gap.
template <class Math, class Meanwhile>
FD_INLINE void add_two(const Tile* rows, const char* weights, int64_t steps, Meanwhile& meanwhile) {
  const char *a = rows[0].at, *b = rows[1].at;
  const int64_t stride = rows[0].stride, step = rows[0].step;
  for (int64_t k = 0; k < steps; ++k, a += step, b += step, weights += WEIGHTS_BYTES) {
    const char *left = weights + WEIGHTS_BYTES, *right = left + TILE_LINE;
    _tile_loadd(4, a, stride);
    fetch_half<0>(left, STEP_BYTES);
    _tile_loadd(6, weights, STEP_BYTES);
    fetch_half<1>(left, STEP_BYTES);
    FD_TILE_DOT(0, 4, 6);
    meanwhile(0);
    fetch_half<0>(right, STEP_BYTES);
    _tile_loadd(5, b, stride);
    fetch_half<1>(right, STEP_BYTES);
    FD_TILE_DOT(2, 5, 6);
    meanwhile(1);
    fetch_half<0>(a + step, stride);
    _tile_loadd(7, weights + TILE_LINE, STEP_BYTES);
    fetch_half<1>(a + step, stride);
    FD_TILE_DOT(1, 4, 7);
    meanwhile(2);
    fetch_half<0>(b + step, stride);
    FD_TILE_DOT(3, 5, 7);
    meanwhile(3);
    fetch_half<1>(b + step, stride);
  }
}

template <class Sum>
FD_INLINE void store_one(Sum* acc) {
  _tile_stored(0, acc, ACC_BYTES);
  _tile_stored(1, acc + 16, ACC_BYTES);
  _tile_stored(2, acc + 32, ACC_BYTES);
  _tile_stored(3, acc + 48, ACC_BYTES);
}

template <class Sum>
FD_INLINE void store_two(Sum* first, Sum* second, int64_t stride) {
  _tile_stored(0, first, stride);
  _tile_stored(1, first + 16, stride);
  _tile_stored(2, second, stride);
  _tile_stored(3, second + 16, stride);
}

// What the steps leave of the depth, as one step more with zeros.
struct Rest {
  alignas(64) char rows[2][TILE_BYTES];
  alignas(64) char panel[WEIGHTS_BYTES];
  const Tile tiles[2] = {{rows[0], TILE_LINE, 0}, {rows[1], TILE_LINE, 0}};
  FD_MEMBER void take(const Tile* from, int64_t count, int64_t height, int64_t steps, const char* weights, int64_t depth) {
    __builtin_memset(rows, 0, sizeof(rows));
    __builtin_memset(panel, 0, sizeof(panel));
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < height; ++r)
        __builtin_memcpy(rows[t] + r * TILE_LINE, from[t].after(steps).at + r * from[t].stride, depth * 4);
    __builtin_memcpy(panel, weights, depth * STEP_BYTES);
  }
};

// The sums of one or two tiles of rows by a panel into acc[tile][..][64].
template <class Math, class Meanwhile>
void tile_pass(const Tile* rows, int64_t tiles, int64_t height, const char* panel, int64_t depth,
               typename Math::Sum* const* acc, Meanwhile& meanwhile) {
  const int64_t steps = depth / STEP_DEPTH, left = depth % STEP_DEPTH;
  Nothing nothing;
  Rest rest;
  if (left != 0) rest.take(rows, tiles, height, steps, panel + steps * WEIGHTS_BYTES, left);
  tile_fence();
  if (tiles == 1) {
    zero_sums();
    add_one<Math>(rows[0], panel, steps, meanwhile);
    if (left != 0) add_one<Math>(rest.tiles[0], rest.panel, 1, nothing);
    store_one(acc[0]);
  }
  for (int64_t half = 0; tiles == 2 && half < 2; ++half) {
    zero_sums();
    add_two<Math>(rows, panel + half * 128, steps, meanwhile);
    if (left != 0) add_two<Math>(rest.tiles, rest.panel + half * 128, 1, nothing);
    store_two(acc[0] + half * 32, acc[1] + half * 32, ACC_BYTES);
  }
  tile_fence();
}

// How rows are cut into tiles. Those that are not tiled already end with the last row: the last tile may begin within the
// one before.
struct RowTiles {
  Rows all;
  int64_t rows, count;
  FD_MEMBER RowTiles(Rows x, int64_t n) : all(x), rows(n), count((n + TILE_ROWS - 1) / TILE_ROWS) {}
  FD_MEMBER int64_t height() const { return rows < TILE_ROWS ? rows : TILE_ROWS; }
  FD_MEMBER int64_t start(int64_t t) const {
    return all.tiled || (t + 1) * TILE_ROWS <= rows ? t * TILE_ROWS : rows - height();
  }
  FD_MEMBER Tile tile(int64_t t) const {
    const char* at = all.data + start(t) * all.stride;
    return all.tiled ? Tile{at, TILE_LINE, TILE_BYTES} : Tile{at, all.stride, TILE_LINE};
  }
};

inline void to_tiles(const char* x, int64_t stride, int64_t rows, int64_t bytes, char* out) {
  for (int64_t at = 0; at < bytes; at += TILE_LINE)
    for (int64_t r = 0; r < TILE_ROWS; ++r, out += TILE_LINE)
      _mm512_store_si512(out, r < rows ? _mm512_loadu_si512(x + r * stride + at) : __m512i{});
}

template <class Math>
void tile_passes(const RowTiles& tiles, const char* panel, const void* next, int64_t depth, typename Math::Sum* acc, Sink sink) {
  Paced fetch(next, depth * STEP_BYTES, tiles.count * (depth / STEP_DEPTH + 1));
  for (int64_t t = 0; t < tiles.count; t += 2) {
    const int64_t last = t + 1 < tiles.count ? t + 1 : t, count = last - t + 1;
    const int64_t first = tiles.start(t), end = tiles.start(last) + TILE_ROWS;
    const Tile rows[2] = {tiles.tile(t), tiles.tile(last)};
    typename Math::Sum* sums[2] = {acc, acc + (tiles.start(last) - first) * PANEL};
    tile_pass<Math>(rows, count, tiles.height(), panel, depth, sums, fetch);
    sink.take(sink.with, {acc}, first, (end < tiles.rows ? end : tiles.rows) - first);
  }
}

template <class Math>
void tile_gemm(Rows a, int64_t rows, const void* panel_, const void* next, int64_t depth, typename Math::Sum* acc, Sink sink) {
  const char* panel = static_cast<const char*>(panel_);
  const RowTiles tiles(a, rows);
  shape_tiles(rows);
  if (tiles.count > 1) return tile_passes<Math>(tiles, panel, next, depth, acc, sink);
  Streaming fetch(panel);
  const Tile only = tiles.tile(0);
  tile_pass<Math>(&only, 1, tiles.height(), panel, depth, &acc, fetch);
  sink.take(sink.with, {acc}, 0, rows);
}

}  // namespace FD_ISA
}  // namespace fdserve
