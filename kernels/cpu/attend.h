// Attention of a few query rows over one tile of 64 keys, with the softmax kept as (peak, mass, weighted values).
//
// Layout of 16 keys of one head: keys [head_dim][16] float or [head_dim/2][16][2] bf16, so that a vector holds one
// dimension of 16 keys and a score needs no horizontal sum; values [16][head_dim] float or [8][head_dim][2] bf16, so that
// a dot product takes a pair of keys. Tiling: 6 rows by 64 keys (scores), then 6 rows by 64 dimensions (values): the rows
// of a group of heads share every load. A row's arithmetic is the same in any company: each score is one chain over the
// dimensions, each value one chain over the keys, and keys a row may not see weigh exactly 0.
// Floor: memory for a decode (the cache is read once), dot products for a prefill.

namespace fdserve {
namespace FD_ISA {

template <class E>
void rotate(const void* x_, int64_t heads, int64_t head_dim, const float* rope, void* out_) {
  const E* x = static_cast<const E*>(x_);
  E* out = static_cast<E*>(out_);
  const int64_t half = head_dim / 2;
  float cosine[MAX_HEAD_DIM], sine[MAX_HEAD_DIM];  // each pair's cosine twice, and its sine with both signs
  for (int64_t i = 0; i < half; ++i) {
    cosine[2 * i] = cosine[2 * i + 1] = rope[i];
    sine[2 * i] = -rope[half + i];
    sine[2 * i + 1] = rope[half + i];
  }
  vi swap;
  for (int i = 0; i < VL; ++i) swap[i] = i ^ 1;
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

constexpr int ATTEND_ROWS = 6;
constexpr int ATTEND_VECTORS = VL == 16 ? 4 : 2;

#ifdef FD_BF16

FD_INLINE vf multiply_add(int32_t x, __m512i y, vf sum) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)y);
}

template <int ROWS>
void score_rows(const bf16* q, int64_t head_dim, const KeyTile& tile, float* scores) {
  vf c[ROWS][4] = {};
  const char* keys[4];
  for (int v = 0; v < 4; ++v) keys[v] = static_cast<const char*>(tile.keys[v] != nullptr ? tile.keys[v] : tile.keys[0]);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
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

// `keys` is how many keys any of the rows sees; weights past a row's own are 0. An unseen key of the last pair is masked,
// for a stale block may hold NaNs.
template <int ROWS>
void value_rows(const bf16* weights, int64_t head_dim, const KeyTile& tile, int keys, const float* decay, float* values,
                int64_t stride) {
  for (int64_t column = 0; column < head_dim; column += 64) {
    __mmask16 lanes[4];
    for (int v = 0; v < 4; ++v) {
      const int64_t left = head_dim - column - v * 16;
      lanes[v] = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
    }
    vf c[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < 4; ++v) c[r][v] = load(values + r * stride + column + v * 16) * splat(decay[r]);
    for (int key = 0; key < keys; key += 2) {
      const bf16* pair = static_cast<const bf16*>(tile.values[key / 16]) + (key % 16 * head_dim + column * 2);
      const __m512i seen = _mm512_set1_epi32(key + 1 < keys ? -1 : 0xffff);
      __m512i y[4];
      for (int v = 0; v < 4; ++v) y[v] = _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes[v], pair + v * 32), seen);
      for (int r = 0; r < ROWS; ++r) {
        int32_t weight;
        __builtin_memcpy(&weight, weights + r * KEY_TILE + key, 4);
        for (int v = 0; v < 4; ++v) c[r][v] = multiply_add(weight, y[v], c[r][v]);
      }
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

// scores[64] of one row to weights; returns what the old state decays by.
template <class E>
FD_INLINE float weigh(const float* scores, int seen, float scale, float* peak, float* mass, E* weights) {
  constexpr int VECTORS = KEY_TILE / VL;
  vf x[VECTORS], highest = splat(-__builtin_inff());
  for (int v = 0; v < VECTORS; ++v) x[v] = load(scores + v * VL) * splat(scale);
  if (seen < KEY_TILE) {
    vi lane;
    for (int i = 0; i < VL; ++i) lane[i] = i;
    for (int v = 0; v < VECTORS; ++v) x[v] = lane + v * VL < seen ? x[v] : splat(-__builtin_inff());
  }
  for (int v = 0; v < VECTORS; ++v) highest = max(x[v], highest);
  const float old = *peak, row = max_lane(highest);
  const float top = row > old ? row : old;
  vf total = {};
  for (int v = 0; v < VECTORS; ++v) {
    const vf w = exp(x[v] - splat(top));
    total = total + w;
    store(weights + v * VL, w);
  }
  const float decay = top == old ? 1.0f : exp1(old - top);
  *mass = *mass * decay + sum(total);
  *peak = top;
  return decay;
}

template <class E, int ROWS>
void attend_rows(const E* q, int64_t head_dim, const KeyTile& tile, const int* seen, float scale, AttendState state,
                 int64_t stride) {
  alignas(64) float scores[ROWS * KEY_TILE];
  alignas(64) E weights[ROWS * KEY_TILE];
  float decay[ROWS];
  score_rows<ROWS>(q, head_dim, tile, scores);
  int keys = 0;
  for (int r = 0; r < ROWS; ++r) {
    decay[r] = weigh(scores + r * KEY_TILE, seen[r], scale, state.peak + r, state.mass + r, weights + r * KEY_TILE);
    keys = seen[r] > keys ? seen[r] : keys;
  }
  value_rows<ROWS>(weights, head_dim, tile, keys, decay, state.values, stride);
}

template <class E>
void attend(const void* q_, int64_t rows, int64_t head_dim, const KeyTile& tile, const int* seen, float scale,
            AttendState state, int64_t stride) {
  const E* q = static_cast<const E*>(q_);
  while (rows > 0) {
    // 7 and 8 rows as two halves: heads come in groups of 4 to 8.
    const int n = static_cast<int>(rows > 6 && rows <= 8 ? 4 : rows < ATTEND_ROWS ? rows : ATTEND_ROWS);
    switch (n) {
      case 6: attend_rows<E, 6>(q, head_dim, tile, seen, scale, state, stride); break;
      case 5: attend_rows<E, 5>(q, head_dim, tile, seen, scale, state, stride); break;
      case 4: attend_rows<E, 4>(q, head_dim, tile, seen, scale, state, stride); break;
      case 3: attend_rows<E, 3>(q, head_dim, tile, seen, scale, state, stride); break;
      case 2: attend_rows<E, 2>(q, head_dim, tile, seen, scale, state, stride); break;
      default: attend_rows<E, 1>(q, head_dim, tile, seen, scale, state, stride); break;
    }
    rows -= n, q += n * head_dim, seen += n;
    state.peak += n, state.mass += n, state.values += n * stride;
  }
}

inline void merge(AttendState total, AttendState part, int64_t rows, int64_t head_dim, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.mass[r] == 0.0f) continue;  // this row sees no key of the part
    const float top = total.peak[r] > part.peak[r] ? total.peak[r] : part.peak[r];
    const float keep = exp1(total.peak[r] - top), take = exp1(part.peak[r] - top);
    total.peak[r] = top;
    total.mass[r] = total.mass[r] * keep + part.mass[r] * take;
    float *into = total.values + r * stride, *from = part.values + r * stride;
    for (int64_t i = 0; i < head_dim; i += VL) store(into + i, load(into + i) * splat(keep) + load(from + i) * splat(take));
  }
}

inline void finish(AttendState state, int64_t rows, int64_t head_dim, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const vf inverse = splat(1.0f / state.mass[r]);
    float* values = state.values + r * stride;
    for (int64_t i = 0; i < head_dim; i += VL) store(values + i, load(values + i) * inverse);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
