// Attention of query rows over a part of up to 512 keys by AMX; see attend.h for the caches' layout.
//
// Layout: 16 keys of a head are already tiles of weights, [head_dim/32] of 16 pairs of dimensions by 16 keys; two groups
// of 16 values are, too, 16 pairs of keys by 16 dimensions each, where they lie one after the other, as in a block of 32
// keys or more; others, keys that no row sees, and bytes are copied first. Tiling: all scores of up to 48 rows, 16 rows by
// 64 keys at a time; then the softmax, once; then 16 rows by 64 dimensions over all keys, whose sums stay in the tiles. Rows
// past the last are computed and thrown away, so that tiles keep their shape. A row's arithmetic is the same in any company:
// scores and values are chains of steps as in amx.h, and a key that a row does not see weighs exactly 0. While scores are
// computed, their values and the keys that follow are fetched. Floor: memory for a decode; for a prefill the exponentials,
// one for each score, which take longer than the products around it.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t VALUE_STEP = 32;  // keys in a tile of values
constexpr int64_t VALUE_STEPS = KEY_PART / VALUE_STEP, PART_GROUPS = KEY_PART / KEY_GROUP, TILE_GROUPS = KEY_TILE / KEY_GROUP;
constexpr int64_t STRIP_ROWS = 3 * TILE_ROWS;  // whose scores and weights share the second-level cache with the part

// e^x for x <= 0 within 4e-6, which disappears when weights are rounded to bf16: 2^x by a Taylor polynomial of degree 5 on
// [-1/2, 1/2]. 0 where that is under 2^-126, NaN for NaN.
FD_INLINE vf exp_of_score(vf x) {
  const __m512 y = (__m512)(x * splat(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf r = (vf)_mm512_sub_ps(y, n);
  vf p = splat(1.33335581e-3f);
  p = fma(p, r, splat(9.61812911e-3f));
  p = fma(p, r, splat(5.55041087e-2f));
  p = fma(p, r, splat(2.40226507e-1f));
  p = fma(p, r, splat(6.93147181e-1f));
  p = fma(p, r, splat(1.0f));
  return (vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), (__m512)p, n);
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
    for (int64_t round = 0; round < count && group < PART_GROUPS; ++round) {
      for (int g = 0; g < 8; ++g) __builtin_prefetch(static_cast<const char*>(part.following[group + g]) + at, 0, 2);
      at += LINE;
      if (at == end) at = 0, group += 8;
    }
  }
};

// scores[16][KEY_PART] of 16 rows and a tile of keys.
FD_INLINE void tile_scores(const bf16* q, int64_t head_dim, const char* const* keys, float* scores, Groups& next,
                           int64_t rounds) {
  zero_sums();
  for (int64_t step = 0; step < head_dim / 32; ++step) {
    _tile_loadd(4, q + step * 32, head_dim * 2);
    tile_gap();
    _tile_loadd(5, keys[0] + step * TILE_BYTES, TILE_LINE);
    tile_gap();
    _tile_dpbf16ps(0, 4, 5);
    next.fetch(rounds);
    _tile_loadd(6, keys[1] + step * TILE_BYTES, TILE_LINE);
    tile_gap();
    _tile_dpbf16ps(1, 4, 6);
    next.fetch(rounds);
    _tile_loadd(7, keys[2] + step * TILE_BYTES, TILE_LINE);
    tile_gap();
    _tile_dpbf16ps(2, 4, 7);
    next.fetch(rounds);
    _tile_loadd(5, keys[3] + step * TILE_BYTES, TILE_LINE);
    tile_gap();
    _tile_dpbf16ps(3, 4, 5);
    next.fetch(rounds);
  }
  _tile_stored(0, scores, KEY_PART * 4);
  _tile_stored(1, scores + 16, KEY_PART * 4);
  _tile_stored(2, scores + 32, KEY_PART * 4);
  _tile_stored(3, scores + 48, KEY_PART * 4);
}

// Scores of a strip of rows over the first `keys` keys, tile after tile.
inline void strip_scores(const bf16* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, int64_t keys,
                         float* scores) {
  const int64_t size = KEY_GROUP * head_dim;
  const int64_t bytes = part.bytes ? byte_group(head_dim) : size * 2, rounds = (bytes / LINE + head_dim / 8 - 1) / (head_dim / 8);
  alignas(64) bf16 room[KEY_TILE * MAX_HEAD_DIM];
  for (int64_t first = 0; first < keys; first += KEY_TILE) {
    const char* groups[TILE_GROUPS];
    for (int64_t g = 0; g < TILE_GROUPS; ++g) {
      const int64_t number = first / KEY_GROUP + g;
      const void* group = part.keys[part.keys[number] != nullptr ? number : first / KEY_GROUP];
      if (part.bytes) unfold_keys(group, head_dim, room + g * size);
      groups[g] = part.bytes ? reinterpret_cast<const char*>(room + g * size) : static_cast<const char*>(group);
    }
    Groups next(part, first / KEY_GROUP, bytes);
    tile_fence();
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t last = r + TILE_ROWS < rows ? r + TILE_ROWS : rows;
      if (seen[last - 1] > first) tile_scores(q + r * head_dim, head_dim, groups, scores + r * KEY_PART + first, next, rounds);
    }
    tile_fence();
  }
}

// One row's scores to weights, zeros from the keys that it sees up to `end`; its peak and mass.
FD_INLINE void row_weights(float* scores, const KeyPart& part, int64_t head_dim, int64_t seen, int64_t end, float scale,
                           float* peak, float* mass, bf16* weights) {
  vf highest = splat(-__builtin_inff()), total = {};
  for (int64_t key = 0; key < seen; key += VL) {
    vf x = load(scores + key) * splat(scale);
    if (part.bytes) x = x * load(scales_of_bytes(part.keys[key / KEY_GROUP], head_dim));
    x = before(static_cast<int>(key), static_cast<int>(seen), x, splat(-__builtin_inff()));
    store(scores + key, x);
    highest = max(x, highest);
  }
  const float top = max_lane(highest);
  int64_t key = 0;
  for (; key < seen; key += VL) {
    vf w = exp_of_score(load(scores + key) - splat(top));
    total = total + w;
    // A stale block's scales may be NaNs.
    if (part.bytes)
      w = before(static_cast<int>(key), static_cast<int>(seen),
                 w * load(scales_of_bytes(part.values[key / KEY_GROUP], head_dim)), vf{});
    store(weights + key, w);
  }
  for (; key < end; key += VL) store(weights + key, vf{});
  *peak = top;
  *mass = seen > 0 ? sum(total) : 0.0f;
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
      if (part.bytes) unfold(groups, head_dim, left, copies[s]);
      else if (joined && left >= VALUE_STEP) at[s] = static_cast<const char*>(groups[0]);
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

  FD_MEMBER static void unfold(const void* const* groups, int64_t head_dim, int64_t keys, bf16* out) {
    for (int64_t g = 0; g < 2; ++g) {
      if (g * KEY_GROUP < keys) unfold_values(groups[g], head_dim, out + g * KEY_GROUP * head_dim);
      else __builtin_memset(out + g * KEY_GROUP * head_dim, 0, static_cast<size_t>(KEY_GROUP * head_dim) * 2);
    }
  }
};

// values[16][stride] = weights[16][KEY_PART] times the values of `steps` steps.
inline void tile_values(const bf16* weights, int64_t head_dim, const ValueSteps& rows, int64_t steps, float* values,
                        int64_t stride, Following& following) {
  for (int64_t column = 0; column < head_dim; column += 64, values += 64) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s) {
      const char* at = rows.at[s] + column * 4;
      _tile_loadd(4, weights + s * VALUE_STEP, KEY_PART * 2);
      tile_gap();
      _tile_loadd(5, at, head_dim * 4);
      tile_gap();
      _tile_dpbf16ps(0, 4, 5);
      following.fetch(1);
      _tile_loadd(6, at + 64, head_dim * 4);
      tile_gap();
      _tile_dpbf16ps(1, 4, 6);
      following.fetch(1);
      _tile_loadd(7, at + 128, head_dim * 4);
      tile_gap();
      _tile_dpbf16ps(2, 4, 7);
      following.fetch(1);
      _tile_loadd(5, at + 192, head_dim * 4);
      tile_gap();
      _tile_dpbf16ps(3, 4, 5);
      following.fetch(1);
    }
    _tile_stored(0, values, stride * 4);
    _tile_stored(1, values + 16, stride * 4);
    _tile_stored(2, values + 32, stride * 4);
    _tile_stored(3, values + 48, stride * 4);
  }
}

inline void attend_strip(const bf16* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
                         AttendState state, int64_t stride) {
  alignas(64) float scores[STRIP_ROWS * KEY_PART];
  alignas(64) bf16 weights[STRIP_ROWS * KEY_PART];
  const int64_t keys = seen[rows - 1];
  strip_scores(q, rows, head_dim, part, seen, keys, scores);
  const int64_t end = (keys + VALUE_STEP - 1) / VALUE_STEP * VALUE_STEP;
  Following following(part, part.bytes ? byte_group(head_dim) : KEY_GROUP * head_dim * 2);
  for (int64_t r = 0; r < rows; ++r) {
    row_weights(scores + r * KEY_PART, part, head_dim, seen[r], end, scale, state.peak + r, state.mass + r,
                weights + r * KEY_PART);
    following.fetch(following.rounds() / 2 / rows + 1);
  }
  const ValueSteps values(part, head_dim, keys);
  tile_fence();
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const int64_t last = r + TILE_ROWS < rows ? r + TILE_ROWS : rows;
    const int64_t steps = (seen[last - 1] + VALUE_STEP - 1) / VALUE_STEP;
    tile_values(weights + r * KEY_PART, head_dim, values, steps, state.values + r * stride, stride, following);
  }
  tile_fence();
}

inline void tile_attend(const void* q_, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
                        AttendState state, int64_t stride) {
  if (head_dim % 64 != 0) return attend<bf16>(q_, rows, head_dim, part, seen, scale, state, stride);
  const bf16* q = static_cast<const bf16*>(q_);
  shape_tiles(TILE_ROWS);
  for (int64_t r = 0; r < rows; r += STRIP_ROWS) {
    const int64_t n = rows - r < STRIP_ROWS ? rows - r : STRIP_ROWS;
    attend_strip(q + r * head_dim, n, head_dim, part, seen + r, scale,
                 {state.peak + r, state.mass + r, state.values + r * stride}, stride);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
