// Attention of a few query rows over one tile of 64 keys, with the softmax kept as (peak, mass, weighted values).
//
// Layout of 16 keys of one head: keys [head_dim][16] float or [head_dim/2][16][2] bf16, so that a vector holds one
// dimension of 16 keys and a score needs no horizontal sum; values [16][head_dim] float or [8][head_dim][2] bf16, so that
// a dot product takes a pair of keys. Tiling: 6 rows by 64 keys (scores), then 6 rows by 64 dimensions (values): the rows
// of a group of heads share every load. A row's arithmetic is the same in any company: each score is one chain over the
// dimensions, each value one chain over the keys, and keys a row may not see weigh exactly 0.
// While one tile is computed the next is fetched. Scales of a cache of bytes join the scores and the weights. Floor: memory
// for a decode (the cache is read once), dot products for a prefill.

namespace fdserve {
namespace FD_ISA {

// 64 keys of a part.
struct KeyTile {
  const void* keys[KEY_TILE / KEY_GROUP];  // null past the last key
  const void* values[KEY_TILE / KEY_GROUP];
  const float* key_scales[KEY_TILE / KEY_GROUP];  // of each of the 16; null where there are none
  const float* value_scales[KEY_TILE / KEY_GROUP];
  const void* next_keys[KEY_TILE / KEY_GROUP];  // what to fetch meanwhile: `next_lines` cache lines of each
  const void* next_values[KEY_TILE / KEY_GROUP];
  int64_t next_lines;
};

template <class E>
void rotate(const void* x_, int64_t heads, int64_t head_dim, const float* rope, void* out_) {
  const E* x = static_cast<const E*>(x_);
  E* out = static_cast<E*>(out_);
  const int64_t half = head_dim / 2;
  vi swap, twice;
  vf sign;
  for (int i = 0; i < VL; ++i) swap[i] = i ^ 1, twice[i] = i / 2, sign[i] = i % 2 == 0 ? -1.0f : 1.0f;
  float cosine[MAX_HEAD_DIM + VL], sine[MAX_HEAD_DIM + VL];  // each pair's cosine twice, and its sine with both signs
  for (int64_t i = 0; i < half; i += VL / 2) {
    const int n = static_cast<int>(half - i < VL / 2 ? half - i : VL / 2);
    store(cosine + 2 * i, __builtin_shuffle(load_some(rope + i, n), twice));
    store(sine + 2 * i, __builtin_shuffle(load_some(rope + half + i, n), twice) * sign);
  }
  for (int64_t h = 0; h < heads; ++h, x += head_dim, out += head_dim)
    for (int64_t i = 0; i < head_dim; i += VL) {
      const int n = static_cast<int>(head_dim - i < VL ? head_dim - i : VL);
      const vf v = n == VL ? load(x + i) : load_some(x + i, n);
      const vf c = n == VL ? load(cosine + i) : load_some(cosine + i, n);
      const vf s = n == VL ? load(sine + i) : load_some(sine + i, n);
      const vf turned = v * c + __builtin_shuffle(v, swap) * s;
      if (n == VL) store(out + i, turned);
      else store_some(out + i, turned, n);
    }
}

template <class E>
void store_key(const void* key_, int64_t head_dim, int64_t lane, void* group_) {
  constexpr int64_t PAIR = 4 / sizeof(E);  // elements in a 32-bit lane
  const E* key = static_cast<const E*>(key_);
  E* group = static_cast<E*>(group_);
  for (int64_t i = 0; i < head_dim; ++i) group[(i / PAIR * KEY_GROUP + lane) * PAIR + i % PAIR] = key[i];
}

template <class E>
void store_value(const void* value_, int64_t head_dim, int64_t lane, void* group_) {
  constexpr int64_t PAIR = 4 / sizeof(E);
  const E* value = static_cast<const E*>(value_);
  E* group = static_cast<E*>(group_) + lane / PAIR * head_dim * PAIR + lane % PAIR;
  for (int64_t i = 0; i < head_dim; ++i) group[i * PAIR] = value[i];
}

// Fetches the groups of the tile that follows one after the other, as one stream that the hardware recognizes, into the
// second level: the first is full of this tile. Two passes over a tile both ask for all of it: what was asked for too fast
// was dropped.
struct Fetch {
  const void* const* group;
  const char *at, *end;
  int64_t bytes, step_bytes = 4 * LINE;
  int left = KEY_TILE / KEY_GROUP;
  FD_MEMBER Fetch(const void* const* next, int64_t lines) : group(next), bytes(lines * LINE) {
    at = static_cast<const char*>(*group);
    end = at + bytes;
    if (lines == 0) step_bytes = 0;
  }
  FD_MEMBER void step() {
    for (int i = 0; i < 4; ++i) __builtin_prefetch(at + i * LINE, 0, 2);
    at += step_bytes;
    if (at >= end && step_bytes != 0) turn();
  }
  FD_MEMBER void turn() {
    if (--left == 0) return void(step_bytes = 0);
    at = static_cast<const char*>(*++group);
    end = at + bytes;
  }
};

constexpr int ATTEND_ROWS = 6;
constexpr int ATTEND_VECTORS = VL == 16 ? 4 : 2;

#ifdef FD_BF16

FD_INLINE vf multiply_add(int32_t x, __m512i y, vf sum) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)y);
}

template <int ROWS>
void score_rows(const bf16* q, int64_t head_dim, const KeyTile& tile, float* scores) {
  vf c[ROWS][4];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v) c[r][v] = vf{};
  const char* keys[4];
  for (int v = 0; v < 4; ++v) keys[v] = static_cast<const char*>(tile.keys[v] != nullptr ? tile.keys[v] : tile.keys[0]);
  Fetch next(tile.next_keys, tile.next_lines);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    next.step();
    __m512i k[4];
    for (int v = 0; v < 4; ++v) k[v] = _mm512_loadu_si512(keys[v] + i * 64);
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, q + r * head_dim + 2 * i, 4);
      for (int v = 0; v < 4; ++v) c[r][v] = multiply_add(pair, k[v], c[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v) store(scores + r * KEY_TILE + v * 16, c[r][v]);
}

template <int ROWS, bool LAST>
FD_INLINE void value_step(const bf16* weights, const bf16* pair, const __mmask16* lanes, vf (&c)[ROWS][4]) {
  __m512i y[4];
  for (int v = 0; v < 4; ++v) {
    y[v] = _mm512_maskz_loadu_epi32(lanes[v], pair + v * 32);
    if (LAST) y[v] = _mm512_and_si512(y[v], _mm512_set1_epi32(0xffff));
  }
  for (int r = 0; r < ROWS; ++r) {
    int32_t weight;
    __builtin_memcpy(&weight, weights + r * KEY_TILE, 4);
    for (int v = 0; v < 4; ++v) c[r][v] = multiply_add(weight, y[v], c[r][v]);
  }
}

// `keys` is how many keys any of the rows sees; weights past a row's own are 0. An unseen key of the last pair is masked,
// for a stale block may hold NaNs.
template <int ROWS>
void value_rows(const bf16* weights, int64_t head_dim, const KeyTile& tile, int keys, const float* decay, float* values,
                int64_t stride) {
  Fetch next(tile.next_values, tile.next_lines);
  for (int64_t column = 0; column < head_dim; column += 64) {
    __mmask16 lanes[4];
    for (int v = 0; v < 4; ++v) {
      const int64_t left = head_dim - column - v * 16;
      lanes[v] = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
    }
    vf c[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < 4; ++v) c[r][v] = load(values + r * stride + column + v * 16) * splat(decay[r]);
    for (int key = 0; key < keys; key += KEY_GROUP) {
      const bf16* group = static_cast<const bf16*>(tile.values[key / KEY_GROUP]) + column * 2;
      const int count = keys - key < KEY_GROUP ? keys - key : KEY_GROUP;
      for (int i = 0; i + 2 <= count; i += 2) {
        next.step();
        value_step<ROWS, false>(weights + key + i, group + i * head_dim, lanes, c);
      }
      if (count % 2 != 0) value_step<ROWS, true>(weights + key + count - 1, group + (count - 1) * head_dim, lanes, c);
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < 4; ++v) store(values + r * stride + column + v * 16, c[r][v]);
  }
}

#else

template <int ROWS>
void score_rows(const float* q, int64_t head_dim, const KeyTile& tile, float* scores) {
  for (int64_t first = 0; first < KEY_TILE; first += ATTEND_VECTORS * VL) {
    vf c[ROWS][ATTEND_VECTORS] = {};
    const float* keys[ATTEND_VECTORS];
    for (int v = 0; v < ATTEND_VECTORS; ++v) {
      const int64_t key = first + v * VL;
      const void* group = tile.keys[key / KEY_GROUP] != nullptr ? tile.keys[key / KEY_GROUP] : tile.keys[0];
      keys[v] = static_cast<const float*>(group) + key % KEY_GROUP;
    }
    for (int64_t i = 0; i < head_dim; ++i) {
      vf k[ATTEND_VECTORS];
      for (int v = 0; v < ATTEND_VECTORS; ++v) k[v] = load(keys[v] + i * KEY_GROUP);
      for (int r = 0; r < ROWS; ++r) {
        const vf x = splat(q[r * head_dim + i]);
        for (int v = 0; v < ATTEND_VECTORS; ++v) c[r][v] = fma(x, k[v], c[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < ATTEND_VECTORS; ++v) store(scores + r * KEY_TILE + first + v * VL, c[r][v]);
  }
}

// `keys` is how many keys any of the rows sees; weights past a row's own are 0.
template <int ROWS>
void value_rows(const float* weights, int64_t head_dim, const KeyTile& tile, int keys, const float* decay, float* values,
                int64_t stride) {
  for (int64_t column = 0; column < head_dim; column += ATTEND_VECTORS * VL) {
    vf c[ROWS][ATTEND_VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < ATTEND_VECTORS; ++v) c[r][v] = load(values + r * stride + column + v * VL) * splat(decay[r]);
    for (int key = 0; key < keys; ++key) {
      const float* value = static_cast<const float*>(tile.values[key / KEY_GROUP]) + key % KEY_GROUP * head_dim + column;
      vf y[ATTEND_VECTORS];
      for (int v = 0; v < ATTEND_VECTORS; ++v) {
        const int64_t left = head_dim - column - v * VL;
        y[v] = left >= VL ? load(value + v * VL) : load_some(value + v * VL, static_cast<int>(left > 0 ? left : 0));
      }
      for (int r = 0; r < ROWS; ++r) {
        const vf x = splat(weights[r * KEY_TILE + key]);
        for (int v = 0; v < ATTEND_VECTORS; ++v) c[r][v] = fma(x, y[v], c[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < ATTEND_VECTORS; ++v) store(values + r * stride + column + v * VL, c[r][v]);
  }
}

#endif

// x in the lanes of keys before `seen`, y in the others; the first lane is of `key`.
FD_INLINE vf before(int key, int seen, vf x, vf y) {
  if (key + VL <= seen) return x;
  vi lane;
  for (int i = 0; i < VL; ++i) lane[i] = key + i;
  return lane < seen ? x : y;
}

// Row's scores to what the exponential takes, in place; returns the largest of each lane.
FD_INLINE vf scaled(float* scores, const KeyTile& tile, int seen, float scale) {
  vf highest = splat(-__builtin_inff());
  for (int key = 0; key < KEY_TILE; key += VL) {
    vf x = load(scores + key) * splat(scale);
    const float* scales = tile.key_scales[key / KEY_GROUP];
    if (scales != nullptr) x = x * load(scales + key % KEY_GROUP);
    x = before(key, seen, x, splat(-__builtin_inff()));
    store(scores + key, x);
    highest = max(x, highest);
  }
  return highest;
}

// Scaled scores of one row to weights; returns their sum in each lane.
template <vf (*EXP)(vf), class E>
FD_INLINE vf weigh(const float* scores, const KeyTile& tile, int seen, float top, E* weights) {
  vf total = {};
  for (int key = 0; key < KEY_TILE; key += VL) {
    vf w = EXP(load(scores + key) - splat(top));
    total = total + w;
    const float* scales = tile.value_scales[key / KEY_GROUP];
    // A stale block's scales may be NaNs.
    if (scales != nullptr) w = before(key, seen, w * load(scales + key % KEY_GROUP), vf{});
    store(weights + key, w);
  }
  return total;
}

struct Largest {
  static FD_MEMBER vf join(vf a, vf b) { return max(a, b); }
  static FD_MEMBER float across(vf a) { return max_lane(a); }
};
struct Sum {
  static FD_MEMBER vf join(vf a, vf b) { return a + b; }
  static FD_MEMBER float across(vf a) { return sum(a); }
};

// out[i] = rows[i] joined across its lanes; whatever ROWS is, in the same order.
template <class Join, int ROWS>
FD_INLINE void join_lanes(const vf* rows, float* out) {
#if VL == 16
  // Four rows at a time, by turning them.
  for (int r = 0; r < ROWS; r += 4) {
    __m512 x[4];
    for (int i = 0; i < 4; ++i) x[i] = (__m512)rows[r + i < ROWS ? r + i : r];
    const auto pairs = [](__m512 a, __m512 b) {
      return (__m512)Join::join((vf)_mm512_unpacklo_ps(a, b), (vf)_mm512_unpackhi_ps(a, b));
    };
    const __m512d left = (__m512d)pairs(x[0], x[1]), right = (__m512d)pairs(x[2], x[3]);
    const vf quads = Join::join((vf)_mm512_unpacklo_pd(left, right), (vf)_mm512_unpackhi_pd(left, right));
    const vf half = Join::join(quads, (vf)_mm512_shuffle_f32x4((__m512)quads, (__m512)quads, 0x4e));
    const vf all = Join::join(half, (vf)_mm512_shuffle_f32x4((__m512)half, (__m512)half, 0xb1));
    for (int i = 0; i < 4 && r + i < ROWS; ++i) out[r + i] = all[i];
  }
#else
  for (int r = 0; r < ROWS; ++r) out[r] = Join::across(rows[r]);
#endif
}

// Rows whose scores and weights are computed together: their sums fill the registers.
constexpr int together(int rows) { return rows > ATTEND_ROWS ? rows / 2 : rows; }

template <class E, int ROWS>
void attend_rows(const E* q, int64_t head_dim, const KeyTile& tile, const int* seen, float scale, AttendState state,
                 int64_t stride) {
  constexpr int PART = together(ROWS), LANES = (ROWS + VL - 1) / VL * VL;
  alignas(64) float scores[ROWS * KEY_TILE];
  alignas(64) E weights[ROWS * KEY_TILE];
  alignas(64) float old[LANES] = {}, top[LANES] = {}, decay[LANES], mass[LANES];
  vf lanes[ROWS];
  for (int r = 0; r < ROWS; r += PART) score_rows<PART>(q + r * head_dim, head_dim, tile, scores + r * KEY_TILE);
  for (int r = 0; r < ROWS; ++r) lanes[r] = scaled(scores + r * KEY_TILE, tile, seen[r], scale);
  join_lanes<Largest, ROWS>(lanes, top);
  int keys = 0;
  for (int r = 0; r < ROWS; ++r) {
    old[r] = state.peak[r];
    state.peak[r] = top[r] = top[r] > old[r] ? top[r] : old[r];
    keys = seen[r] > keys ? seen[r] : keys;
  }
  for (int r = 0; r < LANES; r += VL) store(decay + r, exp(load(old + r) - load(top + r)));
  for (int r = 0; r < ROWS; ++r)
    lanes[r] = weigh<exp>(scores + r * KEY_TILE, tile, seen[r], top[r], weights + r * KEY_TILE);
  join_lanes<Sum, ROWS>(lanes, mass);
  for (int r = 0; r < ROWS; ++r) state.mass[r] = state.mass[r] * decay[r] + mass[r];
  for (int r = 0; r < ROWS; r += PART)
    value_rows<PART>(weights + r * KEY_TILE, head_dim, tile, keys, decay + r, state.values + r * stride, stride);
}

}  // namespace FD_ISA
}  // namespace fdserve
