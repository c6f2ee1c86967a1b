// Products of tiles for attention over a cache of bytes (attend_bytes.h).
//
// Layout: a tile has the first digits of up to 8 rows and then the second ones, so that a decode's rows pass over the cache
// once; of more rows, 16 at a time, two tiles do. 16 keys are tiles of [head_dim/64] 16 quads of dimensions by 16 keys; 64
// values that lie one after the other, as in a block of 64, are tiles of 16 quads of keys by 16 dimensions, others are
// copied first. Tiling, fetching and what is shared with a cache of floats: amx_attend.h. Floor: that of attend_bytes.h.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t ONE_TILE_ROWS = TILE_ROWS / 2, QUAD = 4;
constexpr int64_t BYTE_STEP = KEY_TILE, BYTE_STEPS = KEY_PART / BYTE_STEP;  // keys in a tile of values

// Where the first digits of a row are, and how far on its second ones.
FD_INLINE int64_t first_digits(int64_t row, int64_t rows) {
  return rows <= ONE_TILE_ROWS ? row : row + row / TILE_ROWS * TILE_ROWS;
}
FD_INLINE int64_t to_second_digits(int64_t rows) { return rows <= ONE_TILE_ROWS ? ONE_TILE_ROWS : TILE_ROWS; }

// out[16][..] = (256 x first + second) x scales, of VECTORS of 16 columns; a scale a column, or one for each row.
template <int VECTORS, bool A_ROW>
FD_INLINE void join_digits(const int32_t* first, const int32_t* second, int64_t rows, const float* scales, float* out,
                           int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = r * VECTORS * VL + v * VL;
      const vf x = __builtin_convertvector((load(first + at) << 8) + load(second + at), vf);
      store(out + r * stride + v * VL, x * (A_ROW ? splat(scales[r]) : load(scales + v * VL)));
    }
}

// Scores of a strip of rows over the first `keys` keys, tile after tile; but for the scales of the queries.
inline void byte_scores(const char* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, int64_t keys,
                        float* scores) {
  const int64_t steps = head_dim / TILE_LINE, bytes = byte_group(head_dim), calls = 4 * steps;
  const int64_t rounds = (bytes / LINE + calls - 1) / calls;
  alignas(64) int32_t sums[2 * TILE_ROWS * 32];
  alignas(64) float scales[KEY_TILE] = {};
  for (int64_t first = 0; first < keys; first += KEY_TILE) {
    const char* groups[TILE_GROUPS];
    groups_of_keys(part, first / KEY_GROUP, groups);
    each_seen(first, first + KEY_TILE, keys, [&](int64_t group, int64_t key, int n) {
      store(scales + key - first, load_some(key_scales(part.keys[group], head_dim), n));
    });
    Groups next(part, first / KEY_GROUP, bytes);
    const auto fetch = [&] { next.fetch(rounds); };
    if (rows <= ONE_TILE_ROWS) {
      tile_fence();
      zero_sums();
      for (int64_t s = 0; s < steps; ++s) {
        const char* columns[4];
        for (int64_t g = 0; g < TILE_GROUPS; ++g) columns[g] = groups[g] + s * TILE_BYTES;
        attend_one<TileSigned>(q + s * TILE_LINE, head_dim, columns, TILE_LINE, fetch);
      }
      store_two(sums, sums + 32, 4 * TILE_LINE);
      tile_fence();
      join_digits<4, false>(sums, sums + ONE_TILE_ROWS * 64, rows, scales, scores + first, SCORES);
      continue;
    }
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
      for (int64_t half = 0; half < 4 && seen[r + n - 1] > first; half += 2) {
        tile_fence();
        zero_sums();
        for (int64_t s = 0; s < steps; ++s) {
          const char* columns[2] = {groups[half] + s * TILE_BYTES, groups[half + 1] + s * TILE_BYTES};
          const char* digits = q + 2 * r * head_dim + s * TILE_LINE;
          attend_two<TileSigned>(digits, TILE_ROWS * head_dim, head_dim, columns, TILE_LINE, fetch);
        }
        store_two(sums, sums + TILE_ROWS * 32, 2 * TILE_LINE);
        tile_fence();
        const int64_t column = half * KEY_GROUP;
        join_digits<2, false>(sums, sums + TILE_ROWS * 32, n, scales + column, scores + r * SCORES + first + column, SCORES);
      }
    }
  }
}

// The values of the first `keys` keys as matrices of 16 quads of keys, `value_quad` bytes apart. Those that do not lie so are
// copied; what is missing of the last weighs 0.
struct ByteSteps {
  const char* at[BYTE_STEPS];
  alignas(64) char copies[BYTE_STEPS][BYTE_STEP * (MAX_HEAD_DIM + 4)];

  FD_MEMBER ByteSteps(const KeyPart& part, int64_t head_dim, int64_t keys) {
    const int64_t size = byte_group(head_dim);
    for (int64_t s = 0; s * BYTE_STEP < keys; ++s) {
      const void* const* groups = part.values + s * TILE_GROUPS;
      bool joined = true;
      for (int64_t g = 1; g < TILE_GROUPS; ++g) joined &= groups[g] == static_cast<const char*>(groups[0]) + g * size;
      at[s] = joined ? static_cast<const char*>(groups[0]) : copies[s];
      for (int64_t g = 0; g < TILE_GROUPS && !joined; ++g)
        if (groups[g] != nullptr) __builtin_memcpy(copies[s] + g * size, groups[g], static_cast<size_t>(size));
    }
  }
};

// values[..][stride] of `rows` rows, of one tile or two, over `steps` steps.
inline void byte_values(const char* digits, int64_t rows, bool few, int64_t head_dim, const ByteSteps& steps, int64_t count,
                        const float* row_scales, float* values, int64_t stride, Following& following) {
  const auto fetch = [&] { following.fetch(1); };
  const int64_t quad = value_quad(head_dim);
  alignas(64) int32_t sums[2 * TILE_ROWS * 32];
  for (int64_t column = 0; column < head_dim; column += few ? 64 : 32) {
    tile_fence();
    zero_sums();
    for (int64_t s = 0; s < count; ++s) {
      const char* at = steps.at[s] + column * QUAD;
      const char* columns[4] = {at, at + 64, at + 128, at + 192};
      if (few) attend_one<TileSigned>(digits + s * BYTE_STEP, DIGITS, columns, quad, fetch);
      else attend_two<TileSigned>(digits + s * BYTE_STEP, TILE_ROWS * DIGITS, DIGITS, columns, quad, fetch);
    }
    if (few) store_two(sums, sums + 32, 4 * TILE_LINE);
    else store_two(sums, sums + TILE_ROWS * 32, 2 * TILE_LINE);
    tile_fence();
    if (few) join_digits<4, true>(sums, sums + ONE_TILE_ROWS * 64, rows, row_scales, values + column, stride);
    else join_digits<2, true>(sums, sums + TILE_ROWS * 32, rows, row_scales, values + column, stride);
  }
}

struct TileProducts {
  struct Following : FD_ISA::Following {
    FD_MEMBER Following(const KeyPart& part, int64_t bytes, int64_t) : FD_ISA::Following(part, bytes) {}
  };
  static FD_MEMBER int64_t first_digits(int64_t row, int64_t rows) { return FD_ISA::first_digits(row, rows); }
  static FD_MEMBER int64_t to_second_digits(int64_t rows) { return FD_ISA::to_second_digits(rows); }
  static void scores(const char* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, int64_t keys,
                     float* out) {
    byte_scores(q, rows, head_dim, part, seen, keys, out);
  }
  static void values(const char* digits, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, int64_t keys,
                     const float* row_scales, float* out, int64_t stride, Following& following) {
    const bool few = rows <= ONE_TILE_ROWS;
    const ByteSteps values(part, head_dim, keys);
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
      const int64_t steps = (seen[r + n - 1] + BYTE_STEP - 1) / BYTE_STEP;
      byte_values(digits + 2 * r * DIGITS, n, few, head_dim, values, steps, row_scales + r, out + r * stride, stride, following);
    }
  }
};

// Over either cache.
inline void tile_attend(const void* q_, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
                        AttendState state, int64_t stride) {
  if (head_dim % 64 != 0) return attend<bf16>(q_, rows, head_dim, part, seen, scale, state, stride);
  const bf16* q = static_cast<const bf16*>(q_);
  shape_tiles(TILE_ROWS);
  for (int64_t r = 0; r < rows; r += STRIP_ROWS) {
    const int64_t n = rows - r < STRIP_ROWS ? rows - r : STRIP_ROWS;
    const auto strip = part.bytes ? attend_strip_of_bytes<TileProducts> : attend_strip;
    strip(q + r * head_dim, n, head_dim, part, seen + r, scale, {state.peak + r, state.mass + r, state.values + r * stride},
          stride);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
