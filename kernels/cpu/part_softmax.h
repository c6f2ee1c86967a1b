// A row of scores to the weights of a part's keys, for attention that has a whole part's scores before it takes the values:
// one pass for the largest, one for the exponentials.
//
// The arithmetic of a key does not depend on which others are seen. Floor: eight instructions for 16 exponentials.

namespace fdserve {
namespace FD_ISA {

constexpr int64_t PART_GROUPS = KEY_PART / KEY_GROUP, TILE_GROUPS = KEY_TILE / KEY_GROUP;
// Of a row of scores, a line longer: rows a power of two apart take each other's place in the cache.
constexpr int64_t SCORES = KEY_PART + LINE / 4;
constexpr int64_t STRIP_ROWS = 64;  // whose scores and weights share the second-level cache with the part

// 2^x for x <= 0 within 3e-6, which disappears when weights are rounded to bf16: of what is above the integer below, the
// polynomial of degree 4 with 1 at 0 and the smallest error. 0 where that is under 2^-126, NaN for NaN.
FD_INLINE vf power_of_two(vf x) {
  const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p = splat(1.34267099e-2f);
  p = fma(p, r, splat(5.22424318e-2f));
  p = fma(p, r, splat(2.41280228e-1f));
  p = fma(p, r, splat(6.93044841e-1f));
  p = fma(p, r, splat(1.0f));
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)x);
}

// Weights in bf16.
struct FloatWeights {
  bf16* to;
  FD_MEMBER void put(int64_t key, vf w) { store(to + key, w); }
  FD_MEMBER void put_nothing(int64_t key) { store(to + key, vf{}); }
};

// One row's scores to `weights`, nothing from the keys that it sees up to `end`; its peak and mass.
template <class Weights>
void row_weights(const float* scores, int64_t seen, int64_t end, float scale, float* peak, float* mass, Weights& weights) {
  const int64_t whole = seen / VL * VL;
  const auto score = [&](int64_t key) { return load(scores + key); };
  // A stale block's scores may be NaNs.
  const auto seen_or = [&](int64_t key, vf x, float other) {
    return before(static_cast<int>(key), static_cast<int>(seen), x, splat(other));
  };
  vf highest = splat(-__builtin_inff()), higher = highest, total = {};
  int64_t key = 0;
  for (; key + VL < whole; key += 2 * VL) highest = max(score(key), highest), higher = max(score(key + VL), higher);
  if (key < whole) highest = max(score(key), highest);
  highest = max(higher, highest);
  if (whole < seen) highest = max(seen_or(whole, score(whole), -__builtin_inff()), highest);
  const float top = max_lane(highest);
  const vf highest_score = splat(top), rate = splat(scale * 1.44269504f);
  const auto weight = [&](int64_t key) { return power_of_two((score(key) - highest_score) * rate); };
  const auto put = [&](int64_t key, vf w) {
    total = total + w;
    weights.put(key, w);
  };
  for (key = 0; key < whole; key += VL) put(key, weight(key));
  if (key < seen) {
    put(key, seen_or(key, weight(key), 0.0f));
    key += VL;
  }
  for (; key < end; key += VL) weights.put_nothing(key);
  *peak = top * scale;
  *mass = seen > 0 ? sum(total) : 0.0f;
}

}  // namespace FD_ISA
}  // namespace fdserve
