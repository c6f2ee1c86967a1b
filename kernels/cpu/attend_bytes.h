// Attention over a part of a cache of bytes, multiplied as it lies there; see cache_bytes.h for the layout.
//
// Queries and weights become integers of 15 bits, two digits of a byte each (256 x first + second), whose sums are exact,
// so a row's arithmetic is the same in any company. Queries are rounded to 1 / 32512 of a row's largest, and so are
// weights, which a token's scale has been multiplied into. All scores of up to 64 rows come first, then the softmax, once,
// then the values. How digits lie and are multiplied differs: Products is that of tiles (amx_attend_bytes.h) or of vectors
// (vector_attend_bytes.h).
// Floor: memory for a decode, half of that of bf16; for a prefill the products of digits, twice as many as of bytes, and
// the exponentials and their digits.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t DIGITS = KEY_PART + LINE;  // bytes of a row of digits of weights

// Calls each(group, key, how many of its 16 are seen) for the groups from `first` on, up to `end`.
template <class Each>
FD_INLINE void each_seen(int64_t first, int64_t end, int64_t seen, const Each& each) {
  for (int64_t key = first; key < end && key < seen; key += KEY_GROUP)
    each(key / KEY_GROUP, key, static_cast<int>(seen - key < KEY_GROUP ? seen - key : KEY_GROUP));
}

// Weights as part_softmax.h keeps them: floats times the scales of their values, and the bits of the largest, above all
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

template <class Products>
void attend_strip_of_bytes(const bf16* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
                           AttendState state, int64_t stride) {
  alignas(64) char query_digits[2 * STRIP_ROWS * MAX_HEAD_DIM];
  alignas(64) float scores[STRIP_ROWS * SCORES];
  alignas(64) char digits[2 * STRIP_ROWS * DIGITS];
  float query_scales[STRIP_ROWS], row_scales[STRIP_ROWS];
  const int64_t keys = seen[rows - 1], second = Products::to_second_digits(rows);
  for (int64_t r = 0; r < rows; ++r) {
    char* first = query_digits + Products::first_digits(r, rows) * head_dim;
    const bf16* row = q + r * head_dim;
    query_scales[r] = row_to_digits(row, head_dim, largest_bits(row, head_dim), first, first + second * head_dim);
  }
  Products::scores(query_digits, rows, head_dim, part, seen, keys, scores);
  alignas(64) float scales[KEY_PART];
  each_seen(0, keys, keys, [&](int64_t group, int64_t key, int n) {
    copy_value_scales(part.values[group], head_dim, scales + key);
    store(scales + key, load_some(scales + key, n));  // a stale block's may be NaNs
  });
  const int64_t end = (keys + KEY_TILE - 1) / KEY_TILE * KEY_TILE;
  typename Products::Following following(part, byte_group(head_dim), rows);
  for (int64_t r = 0; r < rows; ++r) {
    ByteWeights weights = {scores + r * SCORES, scales};
    row_weights(scores + r * SCORES, seen[r], end, scale * query_scales[r], state.peak + r, state.mass + r, weights);
    char* first = digits + Products::first_digits(r, rows) * DIGITS;
    row_scales[r] = row_to_digits(weights.to, end, max_lane(weights.largest), first, first + second * DIGITS);
    following.fetch(following.rounds() / 2 / rows + 1);
  }
  Products::values(digits, rows, head_dim, part, seen, keys, row_scales, state.values, stride, following);
}

}  // namespace FD_ISA
}  // namespace fdserve
