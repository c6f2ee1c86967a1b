// Attention of query rows over one tile of 64 keys by AMX; see attend.h for the caches' layout and the softmax's state.
//
// Layout: 16 keys of a head are already tiles of weights, [head_dim/32] of 16 pairs of dimensions by 16 keys; two groups
// of 16 values are, too, 16 pairs of keys by 16 dimensions each, where they lie one after the other, as in a block of 32
// keys or more; others, and keys that no row sees, are copied first. Tiling: 16 rows by 64 keys (scores), then 16 rows by
// 64 dimensions (values), over all keys of the tile. Rows past the last are computed and thrown away, so that tiles keep
// their shape. A row's arithmetic is the same in any company: scores and values are chains of steps as in amx.h, and a key
// that a row does not see weighs exactly 0. Floor: memory for a decode; for a prefill the exponentials, one for each
// score, which take longer than the products around it.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t VALUE_STEP = 32;  // keys in a tile of values
constexpr int VALUE_STEPS = KEY_TILE / VALUE_STEP;

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

// Fetches the tile that follows, a line of each of its groups by turns as in amx.h: two rounds between tiles, which is all
// of it where head_dim is 128.
struct NextTile {
  static constexpr int GROUPS = KEY_TILE / KEY_GROUP;
  const char *keys[GROUPS], *values[GROUPS];
  int64_t at = 0, end;
  FD_MEMBER explicit NextTile(const KeyTile& tile) : end(tile.next_lines * LINE) {
    for (int g = 0; g < GROUPS; ++g) {
      keys[g] = static_cast<const char*>(tile.next_keys[g]);
      values[g] = static_cast<const char*>(tile.next_values[g]);
    }
  }
  FD_MEMBER void round() {
    if (at == end) return;
    for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(keys[g] + at, 0, 3);
    for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(values[g] + at, 0, 3);
    at += LINE;
  }
  FD_MEMBER void operator()() {
    round();
    round();
  }
};

// scores[16][64] of 16 rows.
inline void tile_scores(const bf16* q, int64_t head_dim, const KeyTile& tile, float* scores, NextTile& next) {
  const char* keys[4];
  for (int g = 0; g < 4; ++g) keys[g] = static_cast<const char*>(tile.keys[tile.keys[g] != nullptr ? g : 0]);
  zero_sums();
  for (int64_t step = 0; step < head_dim / 32; ++step) {
    _tile_loadd(4, q + step * 32, head_dim * 2);
    _tile_loadd(5, keys[0] + step * TILE_BYTES, TILE_LINE);
    _tile_dpbf16ps(0, 4, 5);
    next();
    _tile_loadd(6, keys[1] + step * TILE_BYTES, TILE_LINE);
    _tile_dpbf16ps(1, 4, 6);
    next();
    _tile_loadd(7, keys[2] + step * TILE_BYTES, TILE_LINE);
    _tile_dpbf16ps(2, 4, 7);
    next();
    _tile_loadd(5, keys[3] + step * TILE_BYTES, TILE_LINE);
    _tile_dpbf16ps(3, 4, 5);
    next();
  }
  _tile_stored(0, scores, ACC_BYTES);
  _tile_stored(1, scores + 16, ACC_BYTES);
  _tile_stored(2, scores + 32, ACC_BYTES);
  _tile_stored(3, scores + 48, ACC_BYTES);
  tile_fence();
}

// A tile's values as VALUE_STEPS matrices of 16 pairs of keys by head_dim, of which `keys` keys are seen by any row.
struct ValueRows {
  const char* steps[VALUE_STEPS];
  int count;
  alignas(64) bf16 copies[VALUE_STEPS][VALUE_STEP * MAX_HEAD_DIM];

  FD_MEMBER ValueRows(const KeyTile& tile, int64_t head_dim, int keys)
      : count(static_cast<int>((keys + VALUE_STEP - 1) / VALUE_STEP)) {
    for (int s = 0; s < count; ++s) {
      const char* first = static_cast<const char*>(tile.values[2 * s]);
      const bool joined = tile.values[2 * s + 1] == first + KEY_GROUP * head_dim * 2;
      const bool seen = keys >= (s + 1) * VALUE_STEP;
      steps[s] = joined && seen ? first : reinterpret_cast<const char*>(copies[s]);
      if (!joined || !seen) copy(tile, head_dim, s, keys - static_cast<int>(s * VALUE_STEP));
    }
  }

  // An unseen key's values are zeros, for a stale block may hold NaNs.
  FD_MEMBER void copy(const KeyTile& tile, int64_t head_dim, int step, int keys) {
    for (int pair = 0; pair < VALUE_STEP / 2; ++pair) {
      const bf16* group = static_cast<const bf16*>(tile.values[2 * step + pair / 8]);
      const int left = keys - 2 * pair;
      const auto lanes = static_cast<__mmask32>(left > 1 ? ~0u : left == 1 ? 0x55555555u : 0);
      for (int64_t d = 0; d < 2 * head_dim; d += 32) {
        const __m512i x = left > 0 ? _mm512_maskz_loadu_epi16(lanes, group + pair % 8 * 2 * head_dim + d) : __m512i{};
        _mm512_store_si512(copies[step] + pair * 2 * head_dim + d, x);
      }
    }
  }
};

// values[16][stride] += weights[16][64] times the tile's values.
inline void tile_values(const bf16* weights, int64_t head_dim, const ValueRows& rows, float* values, int64_t stride,
                           NextTile& next) {
  for (int64_t column = 0; column < head_dim; column += 64, values += 64) {
    _tile_loadd(0, values, stride * 4);
    _tile_loadd(1, values + 16, stride * 4);
    _tile_loadd(2, values + 32, stride * 4);
    _tile_loadd(3, values + 48, stride * 4);
    for (int s = 0; s < rows.count; ++s) {
      const char* at = rows.steps[s] + column * 4;
      _tile_loadd(4, weights + s * VALUE_STEP, KEY_TILE * 2);
      _tile_loadd(5, at, head_dim * 4);
      _tile_dpbf16ps(0, 4, 5);
      next();
      _tile_loadd(6, at + 64, head_dim * 4);
      _tile_dpbf16ps(1, 4, 6);
      next();
      _tile_loadd(7, at + 128, head_dim * 4);
      _tile_dpbf16ps(2, 4, 7);
      next();
      _tile_loadd(5, at + 192, head_dim * 4);
      _tile_dpbf16ps(3, 4, 5);
      next();
    }
    _tile_stored(0, values, stride * 4);
    _tile_stored(1, values + 16, stride * 4);
    _tile_stored(2, values + 32, stride * 4);
    _tile_stored(3, values + 48, stride * 4);
  }
  tile_fence();
}

// Scores of up to 16 rows to weights, and the state's peaks and masses; decay[r] is what the values so far are worth.
// Returns whether all are worth what they were.
FD_INLINE bool tile_softmax(float* scores, int rows, const KeyTile& tile, const int* seen, float scale, AttendState state,
                            bf16* weights, float* decay) {
  alignas(64) float old[TILE_ROWS] = {}, top[TILE_ROWS] = {}, mass[TILE_ROWS];
  vf lanes[TILE_ROWS];
  for (int r = 0; r < TILE_ROWS; ++r) lanes[r] = r < rows ? scaled(scores + r * KEY_TILE, tile, seen[r], scale) : vf{};
  join_lanes<Largest, TILE_ROWS>(lanes, top);
  bool same = true;
  for (int r = 0; r < rows; ++r) {
    old[r] = state.peak[r];
    same = same && !(top[r] > old[r]);
    state.peak[r] = top[r] = top[r] > old[r] ? top[r] : old[r];
  }
  store(decay, exp(load(old) - load(top)));
  for (int r = 0; r < rows; ++r)
    lanes[r] = weigh<exp_of_score>(scores + r * KEY_TILE, tile, seen[r], top[r], weights + r * KEY_TILE);
  join_lanes<Sum, TILE_ROWS>(lanes, mass);
  for (int r = 0; r < rows; ++r) state.mass[r] = state.mass[r] * decay[r] + mass[r];
  return same;
}

inline void tile_attend(const void* q_, int64_t rows, int64_t head_dim, const KeyTile& tile, const int* seen, float scale,
                        AttendState state, int64_t stride) {
  if (head_dim % 64 != 0) return attend<bf16>(q_, rows, head_dim, tile, seen, scale, state, stride);
  const bf16* q = static_cast<const bf16*>(q_);
  alignas(64) float scores[TILE_ROWS * KEY_TILE], decay[TILE_ROWS];
  alignas(64) bf16 weights[TILE_ROWS * KEY_TILE] = {};
  int keys = 0;
  for (int64_t r = 0; r < rows; ++r) keys = seen[r] > keys ? seen[r] : keys;
  const ValueRows values(tile, head_dim, keys);
  NextTile next(tile);
  shape_tiles(TILE_ROWS);
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const int n = static_cast<int>(rows - r < TILE_ROWS ? rows - r : TILE_ROWS);
    const AttendState part = {state.peak + r, state.mass + r, state.values + r * stride};
    tile_scores(q + r * head_dim, head_dim, tile, scores, next);
    if (!tile_softmax(scores, n, tile, seen + r, scale, part, weights, decay))
      for (int i = 0; i < n; ++i)
        for (int64_t d = 0; d < head_dim; d += VL) {
          float* value = part.values + i * stride + d;
          store(value, load(value) * splat(decay[i]));
        }
    tile_fence();
    tile_values(weights, head_dim, values, part.values, stride, next);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
