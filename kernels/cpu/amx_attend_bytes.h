// Attention over a part of a cache of bytes by AMX; see cache_bytes.h for the layout.
//
// Keys and values are multiplied as they lie in the cache, as integers: queries and weights become integers of 15 bits, two
// digits of a byte each (256 x first + second), whose sums are exact, so a row's arithmetic is the same in any company.
// Layout: a tile has the first digits of up to 8 rows and then the second ones, so that a decode's rows pass over the cache
// once; of more rows, 16 at a time, two tiles do. 16 keys are tiles of [head_dim/64] 16 quads of dimensions by 16 keys; 64
// values that lie one after the other, as in a block of 64, are tiles of 16 quads of keys by 16 dimensions, others are
// copied first. Tiling, fetching and what is shared with a cache of floats: amx_attend.h. Queries are rounded to 1 / 32512 of
// a row's largest, and so are weights, which a token's scale has been multiplied into.
// Floor: memory for a decode, half of that of bf16; the exponentials and their digits for a prefill.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t ONE_TILE_ROWS = TILE_ROWS / 2, QUAD = 4;
constexpr int64_t BYTE_STEP = KEY_TILE, BYTE_STEPS = KEY_PART / BYTE_STEP;  // keys in a tile of values
constexpr int64_t DIGITS = KEY_PART + LINE;  // bytes of a row of digits

// Where the first digits of a row are, and how far on its second ones.
FD_INLINE int64_t first_digits(int64_t row, int64_t rows) {
  return rows <= ONE_TILE_ROWS ? row : row + row / TILE_ROWS * TILE_ROWS;
}
FD_INLINE int64_t to_second_digits(int64_t rows) { return rows <= ONE_TILE_ROWS ? ONE_TILE_ROWS : TILE_ROWS; }

// Calls each(group, key, how many of its 16 are seen) for the groups from `first` on, up to `end`.
template <class Each>
FD_INLINE void each_seen(int64_t first, int64_t end, int64_t seen, const Each& each) {
  for (int64_t key = first; key < end && key < seen; key += KEY_GROUP)
    each(key / KEY_GROUP, key, static_cast<int>(seen - key < KEY_GROUP ? seen - key : KEY_GROUP));
}

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

// Weights as amx_softmax.h keeps them: floats times the scales of their values, and the bits of the largest, above all
// others where there is a NaN.
struct ByteWeights {
  float* to;
  const float* scales;
  vi largest = {};
  FD_MEMBER void put(int64_t key, vf w) {
    const vf scaled = w * load(scales + key);
    largest = max(largest, (vi)scaled & 0x7fffffff);
    store(to + key, scaled);
  }
  FD_MEMBER void put_nothing(int64_t key) { store(to + key, vf{}); }
};

// 64 integers of 15 bits and a sign as digits; packing takes turns between their 128-bit lanes.
FD_INLINE void split_integers(const vi (&whole)[4], char* first, char* second) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i high[2], low[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i pairs = _mm512_packs_epi32((__m512i)whole[2 * i], (__m512i)whole[2 * i + 1]);
    high[i] = _mm512_srai_epi16(_mm512_add_epi16(pairs, _mm512_set1_epi16(128)), 8);
    low[i] = _mm512_and_si512(pairs, _mm512_set1_epi16(255));  // what the first digit leaves
  }
  _mm512_storeu_si512(first, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(high[0], high[1])));
  _mm512_storeu_si512(second, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low[0], low[1])));
}

// The digits of a row, a multiple of 64 long, whose largest magnitude has these bits; returns what its integers are multiples
// of, NaN where one is none.
template <class T>
FD_INLINE float row_to_digits(const T* row, int64_t size, int32_t largest_bits, char* first, char* second) {
  constexpr float TOP_INTEGER = 127 * 256;
  const float largest = float_of(largest_bits);
  const vf inverse = splat(largest > 1e-33f ? TOP_INTEGER / largest : 0.0f);
  for (int64_t i = 0; i < size; i += 4 * VL) {
    vi whole[4];
    for (int v = 0; v < 4; ++v) whole[v] = nearest_integers(load(row + i + v * VL) * inverse);
    split_integers(whole, first + i, second + i);
  }
  return largest / TOP_INTEGER + (largest - largest);
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

inline void attend_strip_of_bytes(const bf16* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen,
                                  float scale, AttendState state, int64_t stride) {
  alignas(64) char query_digits[2 * STRIP_ROWS * MAX_HEAD_DIM];
  alignas(64) float scores[STRIP_ROWS * SCORES];
  alignas(64) char digits[2 * STRIP_ROWS * DIGITS];
  float query_scales[STRIP_ROWS], row_scales[STRIP_ROWS];
  const int64_t keys = seen[rows - 1], second = to_second_digits(rows);
  for (int64_t r = 0; r < rows; ++r) {
    char* first = query_digits + first_digits(r, rows) * head_dim;
    const bf16* row = q + r * head_dim;
    query_scales[r] = row_to_digits(row, head_dim, largest_bits(row, head_dim), first, first + second * head_dim);
  }
  byte_scores(query_digits, rows, head_dim, part, seen, keys, scores);
  alignas(64) float scales[KEY_PART];
  each_seen(0, keys, keys, [&](int64_t group, int64_t key, int n) {
    copy_value_scales(part.values[group], head_dim, scales + key);
    store(scales + key, load_some(scales + key, n));  // a stale block's may be NaNs
  });
  const int64_t end = (keys + BYTE_STEP - 1) / BYTE_STEP * BYTE_STEP;
  Following following(part, byte_group(head_dim));
  for (int64_t r = 0; r < rows; ++r) {
    ByteWeights weights = {scores + r * SCORES, scales};
    row_weights(scores + r * SCORES, seen[r], end, scale * query_scales[r], state.peak + r, state.mass + r, weights);
    char* first = digits + first_digits(r, rows) * DIGITS;
    row_scales[r] = row_to_digits(weights.to, end, max_lane(weights.largest), first, first + second * DIGITS);
    following.fetch(following.rounds() / 2 / rows + 1);
  }
  const bool few = rows <= ONE_TILE_ROWS;
  const ByteSteps values(part, head_dim, keys);
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const int64_t n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
    const int64_t steps = (seen[r + n - 1] + BYTE_STEP - 1) / BYTE_STEP;
    byte_values(digits + 2 * r * DIGITS, n, few, head_dim, values, steps, row_scales + r, state.values + r * stride, stride,
                following);
  }
}

// Over either cache.
inline void tile_attend(const void* q_, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
                        AttendState state, int64_t stride) {
  if (head_dim % 64 != 0) return attend<bf16>(q_, rows, head_dim, part, seen, scale, state, stride);
  const bf16* q = static_cast<const bf16*>(q_);
  shape_tiles(TILE_ROWS);
  for (int64_t r = 0; r < rows; r += STRIP_ROWS) {
    const int64_t n = rows - r < STRIP_ROWS ? rows - r : STRIP_ROWS;
    const auto strip = part.bytes ? attend_strip_of_bytes : attend_strip;
    strip(q + r * head_dim, n, head_dim, part, seen + r, scale, {state.peak + r, state.mass + r, state.values + r * stride},
          stride);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
