// Weight-only panels by AMX.
//
// Layout: that of weight_only.h, activations as digits. Tiling: that of amx.h, a group of inputs at a time, whose sums are
// then scaled and added up by vectors, while the tiles of the next are under way: reading them at once would wait for
// their stores. Up to 8 rows of bytes, and each 8 of up to 32 rows of nibbles, are one tile of both digits and take weights
// from the panel: bytes as they are, nibbles with their low halves unfolded a group ahead. More rows take a tile for each
// digit: of bytes the sums of both are stored; nibbles are unfolded for some chunks, to signed bytes and to 16 times them,
// for both digits to have one sum. Floor: memory for few rows, the products of bf16 for many.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t BLOCK_ROWS = TILE_ROWS / 2;    // whose digits are one tile
constexpr int64_t FEW_NIBBLE_ROWS = 32;          // up to which unfolding for several tiles takes longer than more sums
constexpr int64_t HALF = PANEL / 2;              // outputs that two tiles of columns take
constexpr int64_t HALF_SUMS = TILE_ROWS * HALF;  // of 16 rows

// Rows of digits in tiles.
struct DigitTiles {
  Rows all;
  RowTiles rows;
  FD_MEMBER DigitTiles(Rows x, int64_t n) : all(x), rows(x, n) {}
  // Both digits of up to 8 rows, which are not tiled.
  FD_MEMBER int64_t blocks() const { return (rows.rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
  FD_MEMBER Tile block(int64_t b) const { return {all.data + b * BLOCK_ROWS * all.stride, all.stride / 2, TILE_LINE}; }
  FD_MEMBER Tile first(int64_t t) const { return rows.tile(t); }
  FD_MEMBER Tile second(int64_t t) const {
    Tile tile = rows.tile(t);
    tile.at += all.tiled ? TILE_ROWS * all.stride / 2 : all.stride / 2;
    return tile;
  }
};

// 16 rows or fewer of a tile that the tile before has not done, and where their sums go.
struct Strip {
  int64_t skipped, rows;
  const SumScale* row_scales;
  float* acc;
  FD_MEMBER Strip(const DigitTiles& tiles, int64_t t, int64_t group, float* to) {
    const int64_t begin = t * TILE_ROWS, end = begin + TILE_ROWS < tiles.rows.rows ? begin + TILE_ROWS : tiles.rows.rows;
    skipped = begin - tiles.rows.start(t), rows = end - begin;
    row_scales = tiles.all.sum_scales + begin * tiles.all.groups + group, acc = to + begin * PANEL;
  }
};

// Sums of both digits of up to 8 rows over a group, until they are added.
template <int BITS>
struct BlockSums {
  alignas(64) int32_t sums[TILE_ROWS * PANEL];
  int64_t rows = 0, groups;
  const SumScale* row_scales;
  const bf16* scales;
  float* acc;
  FD_MEMBER BlockSums() {}
  FD_MEMBER void of(const DigitTiles& tiles, int64_t block, int64_t g, const char* group, float* to) {
    const int64_t first = block * BLOCK_ROWS, left = tiles.rows.rows - first;
    rows = left < BLOCK_ROWS ? left : BLOCK_ROWS, groups = tiles.all.groups;
    row_scales = tiles.all.sum_scales + first * groups + g, scales = scales_of(group), acc = to + first * PANEL;
  }
  FD_MEMBER void add() const {
    if (rows != 0) add_digit_sums<BITS, BITS / 2>(sums, 2 * PANEL, PANEL, rows, row_scales, groups, scales, acc);
  }
};

inline void few_bytes(const DigitTiles& tiles, const char* group, int64_t inputs, float* acc) {
  constexpr int64_t INPUTS = GroupOf<8>::INPUTS;
  BlockSums<8> both[2];
  Streaming fetch(group);
  Tile a = tiles.block(0);
  int64_t g = 0;
  for (int64_t steps; inputs > 0; ++g, inputs -= INPUTS, group += GroupOf<8>::BYTES, a = a.after(steps)) {
    steps = (inputs < INPUTS ? inputs : INPUTS) / CHUNK;
    BlockSums<8>& now = both[g % 2];
    tile_fence();
    zero_sums();
    add_one<TileDigits, PanelTiles>(a, group + PANEL * 2, steps, fetch);
    store_one(now.sums);
    tile_fence();
    both[(g + 1) % 2].add();
    now.of(tiles, 0, g, group, acc);
  }
  both[(g + 1) % 2].add();
}

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

inline void few_nibbles(const DigitTiles& tiles, const char* panel, int64_t inputs, float* acc) {
  constexpr int64_t STEPS = GroupOf<4>::INPUTS / CHUNK, LOW_BYTES = 2 * TILE_BYTES;
  BlockSums<4> both[2];
  alignas(64) char low[2][STEPS * LOW_BYTES];
  LowNibbles meanwhile(panel);
  Nothing nothing;
  const int64_t chunks = inputs / CHUNK;
  const auto chunk_at = [&](int64_t c) {
    return panel + c / STEPS * GroupOf<4>::BYTES + PANEL * 2 + c % STEPS * GroupOf<4>::CHUNK_BYTES;
  };
  for (int64_t c = 0; c < STEPS && c < chunks; ++c)
    for (int64_t i = 0; i < 2; ++i) low_nibbles(chunk_at(c) + i * TILE_BYTES, low[0] + c * LOW_BYTES + i * TILE_BYTES);
  int64_t turn = 0;
  for (int64_t g = 0, c = 0; c < chunks; ++g, c += STEPS) {
    const int64_t steps = chunks - c < STEPS ? chunks - c : STEPS;
    if (g % 4 == 0) meanwhile.fetch.unit();  // the scales of four groups
    for (int64_t b = 0; b < tiles.blocks(); ++b, turn ^= 1) {
      Tile a = tiles.block(b).after(c);
      tile_fence();
      zero_sums();
      for (int64_t s = 0; s < steps; ++s, a = a.after(1)) {
        const char* unfolded = low[g % 2] + s * LOW_BYTES;
        meanwhile.packed = chunk_at(c + STEPS + s < chunks ? c + STEPS + s : c);  // past the last group any will do
        meanwhile.out = low[(g + 1) % 2] + s * LOW_BYTES;
        if (b == 0) add_nibbles(a, chunk_at(c + s), unfolded, meanwhile);
        else add_nibbles(a, chunk_at(c + s), unfolded, nothing);
      }
      store_one(both[turn].sums);
      tile_fence();
      both[turn ^ 1].add();
      both[turn].of(tiles, b, g, chunk_at(c) - PANEL * 2, acc);
    }
  }
  both[turn ^ 1].add();
}

// A tile of rows of both digits by 32 columns of a panel of bytes.
template <class Meanwhile>
FD_INLINE void strip_of_bytes(const DigitTiles& tiles, int64_t t, int64_t half, const char* group, int64_t inputs, float* acc,
                              Meanwhile& meanwhile) {
  constexpr int64_t INPUTS = GroupOf<8>::INPUTS;
  alignas(64) int32_t sums[2][2 * HALF_SUMS];
  Tile a[2] = {tiles.first(t), tiles.second(t)};
  const auto add = [&](int64_t g, const char* of) {
    const Strip to(tiles, t, g, acc + half * HALF);
    add_digit_sums<8, 2>(sums[g % 2] + to.skipped * HALF, HALF, HALF_SUMS, to.rows, to.row_scales, tiles.all.groups,
                         scales_of(of) + half * HALF, to.acc);
  };
  int64_t g = 0;
  for (; inputs > 0; ++g, inputs -= INPUTS, group += GroupOf<8>::BYTES) {
    const int64_t steps = (inputs < INPUTS ? inputs : INPUTS) / CHUNK;
    tile_fence();
    zero_sums();
    add_two<TileDigits, PanelTiles>(a, group + PANEL * 2 + half * HALF * 4, steps, meanwhile);
    store_two(sums[g % 2], sums[g % 2] + HALF_SUMS, HALF * 4);
    tile_fence();
    if (g > 0) add(g - 1, group - GroupOf<8>::BYTES);
    a[0] = a[0].after(steps), a[1] = a[1].after(steps);
  }
  add(g - 1, group - GroupOf<8>::BYTES);
}

inline void many_bytes(const DigitTiles& tiles, const char* panel, const void* next, int64_t inputs, float* acc) {
  Paced fetch(next, panel_bytes(Format::kWint8, inputs), tiles.rows.count * 2 * (inputs / CHUNK));
  for (int64_t t = 0; t < tiles.rows.count; ++t)
    for (int64_t half = 0; half < 2; ++half) strip_of_bytes(tiles, t, half, panel, inputs, acc, fetch);
}

constexpr int64_t UNFOLDED_CHUNKS = 4;  // whose weights share the first-level cache with rows

// A chunk into tiles of signed bytes, 16 times the weights and then the weights.
FD_INLINE void unfold_chunk(const char* packed, char* tiles) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(-16), sign = _mm512_set1_epi8(-128);
  const __m512i zero = _mm512_set1_epi8(8);
  // x & high ^ sign: the zero is 8, and 16 times that the sign of a byte.
  const auto signed_high = [&](__m512i x) { return _mm512_ternarylogic_epi32(x, high, sign, 0x6a); };
  for (int64_t i = 0; i < 2 * TILE_BYTES; i += TILE_LINE) {
    const __m512i bytes = _mm512_loadu_si512(packed + i);
    char* to = tiles + i;
    _mm512_store_si512(to, signed_high(_mm512_slli_epi16(bytes, 4)));
    _mm512_store_si512(to + 2 * TILE_BYTES, signed_high(bytes));
    _mm512_store_si512(to + 4 * TILE_BYTES, _mm512_sub_epi8(_mm512_and_si512(bytes, low), zero));
    _mm512_store_si512(to + 6 * TILE_BYTES, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), zero));
  }
}

// Unfolded chunks, which begin with a group, by two tiles of rows and half of the columns; or by one and all columns.
template <bool TWO>
FD_INLINE void strips_of_nibbles(const DigitTiles& tiles, int64_t t, int64_t half, const char* slices, int64_t chunks,
                                 int64_t done, const char* group, float* acc) {
  constexpr int64_t STEPS = GroupOf<4>::INPUTS / CHUNK, COLUMNS = TWO ? HALF : PANEL, STRIPS = TWO ? 2 : 1;
  constexpr int64_t SUMS = TILE_ROWS * COLUMNS;
  alignas(64) int32_t sums[2][STRIPS * SUMS];
  Tile first[2], second[2];
  for (int64_t i = 0; i < STRIPS; ++i) first[i] = tiles.first(t + i).after(done), second[i] = tiles.second(t + i).after(done);
  Nothing nothing;
  const auto add = [&](int64_t g) {
    for (int64_t i = 0; i < STRIPS; ++i) {
      const Strip to(tiles, t + i, done / STEPS + g, acc + half * HALF);
      const int32_t* from = sums[g % 2] + i * SUMS + to.skipped * COLUMNS;
      add_sums<COLUMNS / VL, false>(from, COLUMNS, to.rows, to.row_scales, tiles.all.groups,
                                    scales_of(group + g * GroupOf<4>::BYTES) + half * HALF, to.acc);
    }
  };
  for (int64_t s = 0; s < chunks;) {
    const int64_t g = s / STEPS;
    tile_fence();
    zero_sums();
    for (const int64_t end = s + STEPS < chunks ? s + STEPS : chunks; s < end; ++s) {
      const char* weights = slices + s * 2 * WEIGHTS_BYTES + half * 2 * TILE_BYTES;
      if constexpr (TWO) {
        add_two<TileSigned, WholeTiles>(first, weights, 1, nothing);
        add_two<TileSigned, WholeTiles>(second, weights + WEIGHTS_BYTES, 1, nothing);
      } else {
        add_one<TileSigned, WholeTiles>(first[0], weights, 1, nothing);
        add_one<TileSigned, WholeTiles>(second[0], weights + WEIGHTS_BYTES, 1, nothing);
      }
      for (int64_t i = 0; i < STRIPS; ++i) first[i] = first[i].after(1), second[i] = second[i].after(1);
    }
    if constexpr (TWO) store_two(sums[g % 2], sums[g % 2] + SUMS, COLUMNS * 4);
    else store_one(sums[g % 2]);
    tile_fence();
    if (g > 0) add(g - 1);
  }
  add((chunks - 1) / STEPS);
}

inline void many_nibbles(const DigitTiles& tiles, const char* group, int64_t inputs, float* acc) {
  constexpr int64_t STEPS = GroupOf<4>::INPUTS / CHUNK;
  alignas(64) char slices[UNFOLDED_CHUNKS][2 * WEIGHTS_BYTES];
  Ahead<2> fetch(group + Ahead<2>::WINDOW);
  for (int64_t chunks, left = inputs / CHUNK, done = 0; left > 0; left -= chunks, done += chunks) {
    chunks = left < UNFOLDED_CHUNKS ? left : UNFOLDED_CHUNKS;
    for (int64_t s = 0; s < chunks; ++s) {
      unfold_chunk(group + s / STEPS * GroupOf<4>::BYTES + PANEL * 2 + s % STEPS * GroupOf<4>::CHUNK_BYTES, slices[s]);
      for (int i = 0; i < 4; ++i) fetch.unit();
    }
    int64_t t = 0;
    for (; t + 1 < tiles.rows.count; t += 2)
      for (int64_t half = 0; half < 2; ++half) strips_of_nibbles<true>(tiles, t, half, slices[0], chunks, done, group, acc);
    if (t < tiles.rows.count) strips_of_nibbles<false>(tiles, t, 0, slices[0], chunks, done, group, acc);
    group += UNFOLDED_CHUNKS / STEPS * GroupOf<4>::BYTES;
  }
}

inline void tile_gemm_groups(Rows a, int64_t rows, const void* panel_, const void* next, Format format, int64_t inputs,
                             float* acc) {
  const char* panel = static_cast<const char*>(panel_);
  const DigitTiles tiles(a, rows);
  const bool nibbles = format == Format::kWint4, few = !a.tiled && rows <= (nibbles ? FEW_NIBBLE_ROWS : BLOCK_ROWS);
  __builtin_memset(acc, 0, static_cast<size_t>(rows * PANEL) * sizeof(float));
  shape_tiles(few ? 2 * rows : TILE_ROWS);
  if (few && nibbles) few_nibbles(tiles, panel, inputs, acc);
  else if (few) few_bytes(tiles, panel, inputs, acc);
  else if (nibbles) many_nibbles(tiles, panel, inputs, acc);
  else many_bytes(tiles, panel, next, inputs, acc);
}

}  // namespace FD_ISA
}  // namespace fdserve
