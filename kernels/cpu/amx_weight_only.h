// Weight-only panels by AMX.
//
// Layout: that of weight_only.h, activations as digits. Tiling: that of amx.h, a group of inputs at a time, whose sums are
// then scaled and added up by vectors, while the tiles of the next are under way: reading them at once would wait for
// their stores. Weights are bytes of the panel as they are, and low nibbles, which are unfolded some chunks ahead. Up to 8
// rows of bytes are one tile of both digits, each 16 of up to 32 rows of nibbles one of a digit. Of more rows each digit
// takes a tile of its own, two of which share loading weights. Storing a tile takes as long as a product, and holds
// products up: hence the sizes of groups. Floor: memory for few rows; for many the products of bf16 (bytes, which have two
// digits) or of bytes (nibbles).

namespace fdserve {
namespace FD_ISA {

constexpr int64_t BLOCK_ROWS = TILE_ROWS / 2;    // whose digits are one tile
constexpr int64_t FEW_NIBBLE_ROWS = 32;          // up to which two tiles of rows that share weights gain nothing
constexpr int64_t HALF = PANEL / 2;              // outputs that two tiles of columns take
constexpr int64_t HALF_SUMS = TILE_ROWS * HALF;  // of 16 rows

// Rows of digits in tiles: those of the last one that are past the end are spare rows, whose sums are left.
struct DigitTiles {
  Rows all;
  int64_t rows, count;
  FD_MEMBER DigitTiles(Rows x, int64_t n) : all(x), rows(n), count((n + TILE_ROWS - 1) / TILE_ROWS) {}
  // Of first digits, or of second ones.
  FD_MEMBER Tile tile(int64_t t, int digit) const {
    const char* at = all.data + t * TILE_ROWS * all.stride;
    const int64_t half = digit * all.stride / 2;
    return all.tiled ? Tile{at + TILE_ROWS * half, TILE_LINE, TILE_BYTES} : Tile{at + half, all.stride, TILE_LINE};
  }
  // Both of up to 8 rows, which are not tiled.
  FD_MEMBER Tile both() const { return {all.data, all.stride / 2, TILE_LINE}; }
  // Rows of some tiles from `t` on.
  FD_MEMBER int64_t rows_of(int64_t t, int64_t tiles) const {
    const int64_t left = rows - t * TILE_ROWS, most = tiles * TILE_ROWS;
    return left < most ? left : most;
  }
  FD_MEMBER const SumScale* scales(int64_t t, int64_t group) const {
    return all.sum_scales + t * TILE_ROWS * all.groups + group;
  }
  // Of nibbles: how many digits the rows of some tiles have.
  FD_MEMBER int digits(int64_t t, int64_t tiles, int64_t group) const {
    return have_second_digits(scales(t, group), rows_of(t, tiles), all.groups) ? 2 : 1;
  }
};

// Sums over a group of a tile of rows, until they are added: of both digits of bytes, or of one digit of nibbles.
template <int BITS>
struct WaitingSums {
  alignas(64) int32_t sums[TILE_ROWS * PANEL];
  int64_t rows = 0, groups;
  const SumScale* row_scales;
  const bf16* scales;
  float* acc;
  FD_MEMBER WaitingSums() {}
  FD_MEMBER void of(const DigitTiles& tiles, int64_t t, int64_t g, const char* group, float* to) {
    rows = tiles.rows_of(t, 1), groups = tiles.all.groups;
    row_scales = tiles.scales(t, g), scales = scales_of(group), acc = to + t * TILE_ROWS * PANEL;
  }
  FD_MEMBER void add() const {
    if (rows == 0) return;
    if constexpr (BITS == 8) add_byte_sums<4>(sums, 2 * PANEL, PANEL, rows, row_scales, groups, scales, acc);
    else add_nibble_sums<2>(sums, PANEL, HALF, rows, row_scales, groups, scales, acc);
  }
};

inline void few_bytes(const DigitTiles& tiles, const char* group, int64_t inputs, float* acc) {
  constexpr int64_t INPUTS = GroupOf<8>::INPUTS;
  WaitingSums<8> both[2];
  Streaming fetch(group);
  Tile a = tiles.both();
  int64_t g = 0;
  for (int64_t steps; inputs > 0; ++g, inputs -= INPUTS, group += GroupOf<8>::BYTES, a = a.after(steps)) {
    steps = (inputs < INPUTS ? inputs : INPUTS) / CHUNK;
    WaitingSums<8>& now = both[g % 2];
    tile_fence();
    zero_sums();
    add_one<TileDigits>(a, group + PANEL * 2, steps, fetch);
    store_one(now.sums);
    tile_fence();
    both[(g + 1) % 2].add();
    now.of(tiles, 0, g, group, acc);
  }
  both[(g + 1) % 2].add();
}

constexpr int64_t LOW_BYTES = 2 * TILE_BYTES;  // low nibbles of a chunk

FD_INLINE void low_nibbles(const char* packed, char* tile) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < TILE_BYTES; i += TILE_LINE)
    _mm512_store_si512(tile + i, _mm512_and_si512(_mm512_loadu_si512(packed + i), low));
}

// A chunk into sums 0 and 1 by its low nibbles, which are unfolded already, and 2 and 3 by its bytes.
template <class Meanwhile>
FD_INLINE void add_nibbles(Tile a, const char* packed, const char* low, Meanwhile& meanwhile) {
  _tile_loadd(4, a.at, a.stride);
  tile_gap();
  _tile_loadd(5, packed, TILE_LINE);
  tile_gap();
  _tile_dpbsud(2, 4, 5);
  meanwhile(0);
  _tile_loadd(6, packed + TILE_BYTES, TILE_LINE);
  tile_gap();
  _tile_dpbsud(3, 4, 6);
  tile_gap();
  _tile_loadd(7, low, TILE_LINE);
  tile_gap();
  _tile_dpbsud(0, 4, 7);
  meanwhile(1);
  _tile_loadd(5, low + TILE_BYTES, TILE_LINE);
  tile_gap();
  _tile_dpbsud(1, 4, 5);
}

// Unfolds the low nibbles of a chunk and fetches what follows.
struct LowNibbles {
  Ahead<3> fetch;
  const char* packed;
  char* out;
  FD_MEMBER explicit LowNibbles(const char* panel) : fetch(panel + Ahead<3>::WINDOW) {}
  FD_MEMBER void operator()(int part) {
    low_nibbles(packed + part * TILE_BYTES, out + part * TILE_BYTES);
    fetch.unit();
    fetch.unit();
  }
};

constexpr int64_t NIBBLE_STEPS = GroupOf<4>::INPUTS / CHUNK;

FD_INLINE const char* nibble_chunk(const char* panel, int64_t c) {
  return panel + c / NIBBLE_STEPS * GroupOf<4>::BYTES + PANEL * 2 + c % NIBBLE_STEPS * GroupOf<4>::CHUNK_BYTES;
}

inline void few_nibbles(const DigitTiles& tiles, const char* panel, int64_t inputs, float* acc) {
  constexpr int64_t LEAD = NIBBLE_STEPS;
  WaitingSums<4> both[2];
  alignas(64) char low[2 * LEAD][LOW_BYTES];
  LowNibbles meanwhile(panel);
  Nothing nothing;
  const int64_t chunks = inputs / CHUNK;
  int64_t turn = 0;
  // The first to pass over a group unfolds ahead.
  const auto pass = [&](int64_t g, int64_t t, int digit, bool first) {
    const int64_t begin = g * NIBBLE_STEPS, end = begin + NIBBLE_STEPS < chunks ? begin + NIBBLE_STEPS : chunks;
    Tile a = tiles.tile(t, digit).after(begin);
    tile_fence();
    zero_sums();
    for (int64_t c = begin; c < end; ++c, a = a.after(1)) {
      meanwhile.packed = nibble_chunk(panel, c + LEAD < chunks ? c + LEAD : c);  // past the last any will do
      meanwhile.out = low[(c + LEAD) % (2 * LEAD)];
      if (first) add_nibbles(a, nibble_chunk(panel, c), low[c % (2 * LEAD)], meanwhile);
      else add_nibbles(a, nibble_chunk(panel, c), low[c % (2 * LEAD)], nothing);
    }
    store_one(both[turn].sums);
    tile_fence();
    both[turn ^ 1].add();
    both[turn].of(tiles, t, g + digit * tiles.all.groups / 2, panel + g * GroupOf<4>::BYTES, acc);
    turn ^= 1;
  };
  for (int64_t c = 0; c < LEAD && c < chunks; ++c)
    for (int64_t i = 0; i < 2; ++i) low_nibbles(nibble_chunk(panel, c) + i * TILE_BYTES, low[c] + i * TILE_BYTES);
  for (int64_t g = 0; g * NIBBLE_STEPS < chunks; ++g) {
    if (g % 4 == 0) meanwhile.fetch.unit();  // the scales of four groups
    for (int64_t t = 0; t < tiles.count; ++t)
      for (int digit = 0; digit < tiles.digits(t, 1, g); ++digit) pass(g, t, digit, t == 0 && digit == 0);
  }
  both[turn ^ 1].add();
}

// A tile of rows of both digits by 32 columns of a panel of bytes.
template <class Meanwhile>
FD_INLINE void strip_of_bytes(const DigitTiles& tiles, int64_t t, int64_t half, const char* group, int64_t inputs, float* acc,
                              Meanwhile& meanwhile) {
  constexpr int64_t INPUTS = GroupOf<8>::INPUTS;
  alignas(64) int32_t sums[2][2 * HALF_SUMS];
  Tile a[2] = {tiles.tile(t, 0), tiles.tile(t, 1)};
  const auto add = [&](int64_t g, const char* of) {
    add_byte_sums<2>(sums[g % 2], HALF, HALF_SUMS, tiles.rows_of(t, 1), tiles.scales(t, g), tiles.all.groups,
                     scales_of(of) + half * HALF, acc + t * TILE_ROWS * PANEL + half * HALF);
  };
  int64_t g = 0;
  for (; inputs > 0; ++g, inputs -= INPUTS, group += GroupOf<8>::BYTES) {
    const int64_t steps = (inputs < INPUTS ? inputs : INPUTS) / CHUNK;
    tile_fence();
    zero_sums();
    add_two<TileDigits>(a, group + PANEL * 2 + half * HALF * 4, steps, meanwhile);
    store_two(sums[g % 2], sums[g % 2] + HALF_SUMS, HALF * 4);
    tile_fence();
    if (g > 0) add(g - 1, group - GroupOf<8>::BYTES);
    a[0] = a[0].after(steps), a[1] = a[1].after(steps);
  }
  add(g - 1, group - GroupOf<8>::BYTES);
}

inline void many_bytes(const DigitTiles& tiles, const char* panel, const void* next, int64_t inputs, float* acc) {
  Paced fetch(next, panel_bytes(Format::kWint8, inputs), tiles.count * 2 * (inputs / CHUNK));
  for (int64_t t = 0; t < tiles.count; ++t)
    for (int64_t half = 0; half < 2; ++half) strip_of_bytes(tiles, t, half, panel, inputs, acc, fetch);
}

constexpr int64_t UNFOLDED_CHUNKS = 4;  // whose weights share the first-level cache with rows

// A chunk of two tiles of rows by a quarter of the outputs by its low nibbles (sums 0 and 2), and by its bytes (1 and 3).
FD_INLINE void add_nibble_pair(const Tile* a, const char* packed, const char* low, Paced& fetch) {
  _tile_loadd(4, a[0].at, a[0].stride);
  fetch_half<0>(a[0].at + a[0].step, a[0].stride);
  _tile_loadd(6, low, TILE_LINE);
  fetch_half<1>(a[0].at + a[0].step, a[0].stride);
  _tile_dpbsud(0, 4, 6);
  fetch(0);
  _tile_loadd(5, a[1].at, a[1].stride);
  fetch_half<0>(a[1].at + a[1].step, a[1].stride);
  _tile_dpbsud(2, 5, 6);
  fetch(1);
  _tile_loadd(7, packed, TILE_LINE);
  fetch_half<1>(a[1].at + a[1].step, a[1].stride);
  _tile_dpbsud(1, 4, 7);
  fetch(2);
  tile_gap();
  _tile_dpbsud(3, 5, 7);
  fetch(3);
}

// One digit by some chunks, which begin with group `first`: two tiles of rows by a tile of bytes and its low nibbles, or
// one by both tiles.
template <bool TWO>
FD_INLINE void strips_of_nibbles(const DigitTiles& tiles, int64_t t, int digit, int64_t half, const char* low,
                                 const char* panel, int64_t chunks, int64_t first, float* acc, Paced& fetch) {
  constexpr int64_t STRIPS = TWO ? 2 : 1, COLUMNS = TWO ? HALF : PANEL;
  alignas(64) int32_t sums[2][STRIPS * TILE_ROWS * COLUMNS];
  Tile a[2];
  for (int64_t i = 0; i < STRIPS; ++i) a[i] = tiles.tile(t + i, digit).after(first * NIBBLE_STEPS);
  const auto add = [&](int64_t g) {
    add_nibble_sums<STRIPS == 2 ? 1 : 2>(
        sums[g % 2], COLUMNS, COLUMNS / 2, tiles.rows_of(t, STRIPS),
        tiles.scales(t, first + g + digit * tiles.all.groups / 2), tiles.all.groups,
        scales_of(panel + (first + g) * GroupOf<4>::BYTES) + half * VL, acc + t * TILE_ROWS * PANEL + half * VL);
  };
  int64_t g = 0;
  for (int64_t c = 0; c < chunks; ++g) {
    tile_fence();
    zero_sums();
    for (const int64_t end = c + NIBBLE_STEPS < chunks ? c + NIBBLE_STEPS : chunks; c < end; ++c) {
      const char* packed = nibble_chunk(panel, first * NIBBLE_STEPS + c) + half * TILE_BYTES;
      if constexpr (TWO) add_nibble_pair(a, packed, low + c * LOW_BYTES + half * TILE_BYTES, fetch);
      else add_nibbles(a[0], packed, low + c * LOW_BYTES, fetch);
      for (int64_t i = 0; i < STRIPS; ++i) a[i] = a[i].after(1);
    }
    if constexpr (TWO) store_two(sums[g % 2], sums[g % 2] + HALF_SUMS, COLUMNS * 4);
    else store_one(sums[g % 2]);
    tile_fence();
    if (g > 0) add(g - 1);
  }
  add(g - 1);
}

inline void many_nibbles(const DigitTiles& tiles, const char* panel, const void* next, int64_t inputs, float* acc) {
  alignas(64) char low[UNFOLDED_CHUNKS][LOW_BYTES];
  const int64_t all = inputs / CHUNK, pairs = tiles.count / 2;
  // A pair goes on with fetching eight times a chunk, a single tile twice.
  Paced fetch(next, panel_bytes(Format::kWint4, inputs), all * (pairs * 8 + tiles.count % 2 * 2) / 4);
  for (int64_t done = 0; done < all; done += UNFOLDED_CHUNKS) {
    const int64_t chunks = all - done < UNFOLDED_CHUNKS ? all - done : UNFOLDED_CHUNKS, g = done / NIBBLE_STEPS;
    for (int64_t s = 0; s < chunks; ++s)
      for (int64_t i = 0; i < 2; ++i) low_nibbles(nibble_chunk(panel, done + s) + i * TILE_BYTES, low[s] + i * TILE_BYTES);
    const auto strips = [&](int64_t t, int64_t pair, int digit, int64_t from, int64_t count) {
      const int64_t first = g + from / NIBBLE_STEPS;
      for (int64_t half = 0; half < pair; ++half)
        if (pair == 2) strips_of_nibbles<true>(tiles, t, digit, half, low[from], panel, count, first, acc, fetch);
        else strips_of_nibbles<false>(tiles, t, digit, 0, low[from], panel, count, first, acc, fetch);
    };
    for (int64_t t = 0; t < tiles.count; t += 2) {
      const int64_t pair = tiles.count - t > 1 ? 2 : 1;
      bool second = false;
      for (int64_t c = 0; c < chunks; c += NIBBLE_STEPS) second |= tiles.digits(t, pair, g + c / NIBBLE_STEPS) == 2;
      if (!second) strips(t, pair, 0, 0, chunks);
      // In the order of few rows, to the same bits: both digits of a group before the next.
      for (int64_t c = 0; second && c < chunks; c += NIBBLE_STEPS)
        for (int digit = 0; digit < tiles.digits(t, pair, g + c / NIBBLE_STEPS); ++digit)
          strips(t, pair, digit, c, chunks - c < NIBBLE_STEPS ? chunks - c : NIBBLE_STEPS);
    }
  }
}

inline void tile_gemm_groups(Rows a, int64_t rows, const void* panel_, const void* next, Format format, int64_t inputs,
                             float* acc) {
  const char* panel = static_cast<const char*>(panel_);
  const DigitTiles tiles(a, rows);
  const bool nibbles = format == Format::kWint4, few = !a.tiled && rows <= (nibbles ? FEW_NIBBLE_ROWS : BLOCK_ROWS);
  __builtin_memset(acc, 0, static_cast<size_t>(rows * PANEL) * sizeof(float));
  shape_tiles(few ? nibbles ? rows : 2 * rows : TILE_ROWS);
  if (few && nibbles) few_nibbles(tiles, panel, inputs, acc);
  else if (few) few_bytes(tiles, panel, inputs, acc);
  else if (nibbles) many_nibbles(tiles, panel, next, inputs, acc);
  else many_bytes(tiles, panel, next, inputs, acc);
}

}  // namespace FD_ISA
}  // namespace fdserve
