// A row of scores to the weights of a part's keys, for amx_attend.h: one pass for the largest, one for the exponentials.
//
// The arithmetic of a key does not depend on which others are seen. Floor: eight instructions for 16 exponentials.

namespace fdserve {
namespace FD_ISA {

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

// One row's scores to weights, zeros from the keys that it sees up to `end`; its peak and mass. Scales of bytes join both.
template <bool BYTES>
void row_weights(const float* scores, const KeyPart& part, int64_t head_dim, int64_t seen, int64_t end, float scale,
                 float* peak, float* mass, bf16* weights) {
  const int64_t whole = seen / VL * VL;
  const auto score = [&](int64_t key) {
    const vf x = load(scores + key);
    return BYTES ? x * load(scales_of_bytes(part.keys[key / KEY_GROUP], head_dim)) : x;
  };
  // A stale block's scores and scales may be NaNs.
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
  const auto weigh = [&](int64_t key, vf x) {
    const vf w = power_of_two((x - highest_score) * rate);
    total = total + w;
    return BYTES ? w * load(scales_of_bytes(part.values[key / KEY_GROUP], head_dim)) : w;
  };
  for (key = 0; key < whole; key += VL) store(weights + key, weigh(key, score(key)));
  if (key < seen) {
    store(weights + key, seen_or(key, weigh(key, seen_or(key, score(key), -__builtin_inff())), 0.0f));
    key += VL;
  }
  for (; key < end; key += VL) store(weights + key, vf{});
  *peak = top * scale;
  *mass = seen > 0 ? sum(total) : 0.0f;
}

}  // namespace FD_ISA
}  // namespace fdserve
