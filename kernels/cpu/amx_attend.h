// Attention of query rows over a part of up to 512 keys by AMX; see attend.h for the caches' layout.
//
// Layout: 16 keys of a head are already tiles of weights, [head_dim/32] of 16 pairs of dimensions by 16 keys; two groups
// of 16 values are, too, 16 pairs of keys by 16 dimensions each, where they lie one after the other, as in a block of 32
// keys or more; others, and keys that no row sees, are copied first. A cache of bytes: amx_attend_bytes.h. Tiling: all
// scores of up to 64 rows, 32 rows by 32 keys at a time, or 16 by 64 where there are no more rows; then the softmax, once;
// then 32 rows by 32 dimensions, or 16 by 64, over all keys, whose sums stay in the tiles. Rows past the last are computed
// and thrown away, so that tiles keep their shape. A row's arithmetic is the same in any company: scores and values are
// chains of steps as in amx.h, and a key that a row does not see weighs exactly 0. While scores are computed, their values
// and the keys that follow are fetched. Floor: memory for a decode; for a prefill the products, whose tiles take longer to
// load than to multiply, and half as long again the exponentials, one for each score.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t VALUE_STEP = 32;  // keys in a tile of values
constexpr int64_t VALUE_STEPS = KEY_PART / VALUE_STEP;
constexpr int64_t WEIGHTS = KEY_PART + LINE / 2;  // of a row, a line longer, as of scores
static_assert(STRIP_ROWS % (2 * TILE_ROWS) == 0);

// Nothing else is to be done between tiles that are in the cache, and these take 5 % longer with a single gap.
FD_INLINE void gap() {
  tile_gap();
  tile_gap();
}

// Fetches 8 groups of a cache, a line of each by turns as in amx.h: `rounds` lines between tiles.
struct Groups {
  const char* of[2 * TILE_GROUPS];
  int64_t at = 0, end;
  FD_MEMBER Groups(const KeyPart& part, int64_t first, int64_t bytes) : end(bytes / LINE * LINE) {
    for (int64_t g = 0; g < TILE_GROUPS; ++g) {
      const int64_t next = first + TILE_GROUPS + g, now = first + g;
      const bool more = next < PART_GROUPS && part.keys[next] != nullptr;
      const void* values = part.values[part.values[now] != nullptr ? now : first];
      of[g] = static_cast<const char*>(more ? part.keys[next] : values);
      of[TILE_GROUPS + g] = static_cast<const char*>(values);
    }
  }
  FD_MEMBER void fetch(int64_t rounds) {
    if (at >= end) return gap();
    for (int64_t round = 0; round < rounds && at < end; ++round, at += LINE)
      for (int g = 0; g < 2 * TILE_GROUPS; ++g) __builtin_prefetch(of[g] + at, 0, 3);
  }
};

// Fetches the keys that follow after a part in the same way, into the second-level cache.
struct Following {
  const KeyPart& part;
  int64_t group = 0, at = 0, end;
  FD_MEMBER Following(const KeyPart& whole, int64_t bytes) : part(whole), end(bytes / LINE * LINE) {}
  FD_MEMBER int64_t rounds() const { return PART_GROUPS / 8 * end / LINE; }
  FD_MEMBER void fetch(int64_t count) {
    if (group >= PART_GROUPS) return gap();
    for (int64_t round = 0; round < count && group < PART_GROUPS; ++round) {
      for (int g = 0; g < 8; ++g) __builtin_prefetch(static_cast<const char*>(part.following[group + g]) + at, 0, 2);
      at += LINE;
      if (at == end) at = 0, group += 8;
    }
  }
};

// One tile of rows by four of columns, into sums 0 to 3.
template <class Math, class Fetch>
FD_INLINE void attend_one(const void* rows, int64_t row_bytes, const char* const* columns, int64_t stride,
                          const Fetch& fetch) {
  _tile_loadd(4, rows, row_bytes);
  gap();
  _tile_loadd(5, columns[0], stride);
  gap();
  FD_TILE_DOT(0, 4, 5);
  fetch();
  _tile_loadd(6, columns[1], stride);
  gap();
  FD_TILE_DOT(1, 4, 6);
  fetch();
  _tile_loadd(7, columns[2], stride);
  gap();
  FD_TILE_DOT(2, 4, 7);
  fetch();
  _tile_loadd(5, columns[3], stride);
  gap();
  FD_TILE_DOT(3, 4, 5);
  fetch();
}

// Two tiles of rows, `next` bytes apart, by two of columns; sums 0 and 1 are the first rows'.
template <class Math, class Fetch>
FD_INLINE void attend_two(const void* rows, int64_t next, int64_t row_bytes, const char* const* columns, int64_t stride,
                          const Fetch& fetch) {
  _tile_loadd(4, rows, row_bytes);
  gap();
  _tile_loadd(6, columns[0], stride);
  gap();
  FD_TILE_DOT(0, 4, 6);
  fetch();
  _tile_loadd(5, static_cast<const char*>(rows) + next, row_bytes);
  gap();
  FD_TILE_DOT(2, 5, 6);
  fetch();
  _tile_loadd(7, columns[1], stride);
  gap();
  FD_TILE_DOT(1, 4, 7);
  fetch();
  FD_TILE_DOT(3, 5, 7);
  fetch();
}

// scores[16][SCORES] of a tile of rows and a tile of keys, or of two tiles of rows.
FD_INLINE void tile_scores(const bf16* q, int64_t tiles, int64_t head_dim, const char* const* keys, float* scores,
                           Groups& next, int64_t rounds) {
  const auto fetch = [&] { next.fetch(rounds); };
  const int64_t steps = head_dim / 32, row_bytes = head_dim * 2;
  if (tiles == 1) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t at = s * TILE_BYTES;
      const char* columns[4] = {keys[0] + at, keys[1] + at, keys[2] + at, keys[3] + at};
      attend_one<TilePairs>(q + s * 32, row_bytes, columns, TILE_LINE, fetch);
    }
    return store_two(scores, scores + 32, SCORES * 4);
  }
  for (int64_t half = 0; half < 4; half += 2) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s) {
      const char* columns[2] = {keys[half] + s * TILE_BYTES, keys[half + 1] + s * TILE_BYTES};
      attend_two<TilePairs>(q + s * 32, TILE_ROWS * row_bytes, row_bytes, columns, TILE_LINE, fetch);
    }
    store_two(scores + half * 16, scores + half * 16 + TILE_ROWS * SCORES, SCORES * 4);
  }
}

// Calls work(first row, tiles, keys that one of them sees) for each two tiles of rows, or one that is left.
template <class Work>
FD_INLINE void each_pair(int64_t rows, const int* seen, const Work& work) {
  for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS) {
    const int64_t last = r + 2 * TILE_ROWS < rows ? r + 2 * TILE_ROWS : rows;
    work(r, last - r > TILE_ROWS ? 2 : 1, static_cast<int64_t>(seen[last - 1]));
  }
}

// The groups of a tile of keys from number `first` on; those past the last are the first again.
FD_INLINE void groups_of_keys(const KeyPart& part, int64_t first, const char** groups) {
  for (int64_t g = 0; g < TILE_GROUPS; ++g)
    groups[g] = static_cast<const char*>(part.keys[part.keys[first + g] != nullptr ? first + g : first]);
}

// Scores of a strip of rows over the first `keys` keys, tile after tile.
inline void strip_scores(const bf16* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, int64_t keys,
                         float* scores) {
  const int64_t bytes = KEY_GROUP * head_dim * 2, rounds = (bytes / LINE + head_dim / 8 - 1) / (head_dim / 8);
  for (int64_t first = 0; first < keys; first += KEY_TILE) {
    const char* groups[TILE_GROUPS];
    groups_of_keys(part, first / KEY_GROUP, groups);
    Groups next(part, first / KEY_GROUP, bytes);
    tile_fence();
    each_pair(rows, seen, [&](int64_t r, int64_t tiles, int64_t most) {
      if (most > first) tile_scores(q + r * head_dim, tiles, head_dim, groups, scores + r * SCORES + first, next, rounds);
    });
    tile_fence();
  }
}

// The values of the first `keys` keys as matrices of 16 pairs of keys by head_dim. What is not so in the cache is copied.
struct ValueSteps {
  const char* at[VALUE_STEPS];
  alignas(64) bf16 copies[VALUE_STEPS][VALUE_STEP * MAX_HEAD_DIM];

  FD_MEMBER ValueSteps(const KeyPart& part, int64_t head_dim, int64_t keys) {
    for (int64_t s = 0; s * VALUE_STEP < keys; ++s) {
      const void* const* groups = part.values + 2 * s;
      const bool joined = groups[1] == static_cast<const char*>(groups[0]) + KEY_GROUP * head_dim * 2;
      const int64_t left = keys - s * VALUE_STEP;
      at[s] = reinterpret_cast<const char*>(copies[s]);
      if (joined && left >= VALUE_STEP) at[s] = static_cast<const char*>(groups[0]);
      else copy(groups, head_dim, left, copies[s]);
    }
  }

  // A value that no row sees is zeros, for a stale block may hold NaNs.
  FD_MEMBER static void copy(const void* const* groups, int64_t head_dim, int64_t keys, bf16* out) {
    for (int64_t pair = 0; pair < VALUE_STEP / 2; ++pair) {
      const bf16* group = static_cast<const bf16*>(groups[pair / 8]);
      const int64_t left = keys - 2 * pair;
      const auto lanes = static_cast<__mmask32>(left > 1 ? ~0u : left == 1 ? 0x55555555u : 0);
      for (int64_t d = 0; d < 2 * head_dim; d += 32) {
        const __m512i x = left > 0 ? _mm512_maskz_loadu_epi16(lanes, group + pair % 8 * 2 * head_dim + d) : __m512i{};
        _mm512_store_si512(out + pair * 2 * head_dim + d, x);
      }
    }
  }
};

// values[16][stride] = weights[16][WEIGHTS] times the values of `steps` steps, of one or two tiles of rows.
inline void tile_values(const bf16* weights, int64_t tiles, int64_t head_dim, const ValueSteps& rows, int64_t steps,
                        float* values, int64_t stride, Following& following) {
  const auto fetch = [&] { following.fetch(1); };
  const int64_t row_bytes = WEIGHTS * 2, value_bytes = head_dim * 4;
  for (int64_t column = 0; column < head_dim; column += tiles == 1 ? 64 : 32) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s) {
      const char* at = rows.at[s] + column * 4;
      const char* columns[4] = {at, at + 64, at + 128, at + 192};
      if (tiles == 1) attend_one<TilePairs>(weights + s * VALUE_STEP, row_bytes, columns, value_bytes, fetch);
      else attend_two<TilePairs>(weights + s * VALUE_STEP, TILE_ROWS * row_bytes, row_bytes, columns, value_bytes, fetch);
    }
    store_two(values + column, values + column + (tiles == 1 ? 32 : TILE_ROWS * stride), stride * 4);
  }
}

inline void attend_strip(const bf16* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
                         AttendState state, int64_t stride) {
  alignas(64) float scores[STRIP_ROWS * SCORES];
  alignas(64) bf16 weights[STRIP_ROWS * WEIGHTS];
  const int64_t keys = seen[rows - 1];
  strip_scores(q, rows, head_dim, part, seen, keys, scores);
  const int64_t end = (keys + VALUE_STEP - 1) / VALUE_STEP * VALUE_STEP;
  Following following(part, KEY_GROUP * head_dim * 2);
  for (int64_t r = 0; r < rows; ++r) {
    FloatWeights row = {weights + r * WEIGHTS};
    row_weights(scores + r * SCORES, seen[r], end, scale, state.peak + r, state.mass + r, row);
    following.fetch(following.rounds() / 2 / rows + 1);
  }
  const ValueSteps values(part, head_dim, keys);
  tile_fence();
  each_pair(rows, seen, [&](int64_t r, int64_t tiles, int64_t most) {
    const int64_t steps = (most + VALUE_STEP - 1) / VALUE_STEP;
    tile_values(weights + r * WEIGHTS, tiles, head_dim, values, steps, state.values + r * stride, stride, following);
  });
  tile_fence();
}

}  // namespace FD_ISA
}  // namespace fdserve
