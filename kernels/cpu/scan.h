// Passes over a row of floats (logits, router scores). Each has one order of its own, whatever else is computed.
// Floor: reading the row from cache; exp costs about 12 cycles a vector.

namespace fdserve {
namespace FD_ISA {

inline float peak(const float* x, int64_t size, bool* has_nan) {
  const int64_t whole = size / (4 * VL) * (4 * VL);
  vf top[4], bad = {};
  for (int v = 0; v < 4; ++v) top[v] = splat(-__builtin_inff());
  for (int64_t i = 0; i < whole; i += 4 * VL)
    for (int v = 0; v < 4; ++v) {
      const vf y = load(x + i + v * VL);
      top[v] = max(y, top[v]);
      bad = y == y ? bad : splat(1.0f);
    }
  float result = max_lane(max(max(top[0], top[1]), max(top[2], top[3])));
  bool nan = max_lane(bad) > 0;
  for (int64_t i = whole; i < size; ++i) {
    nan |= x[i] != x[i];
    result = x[i] > result ? x[i] : result;
  }
  *has_nan = nan;
  return result;
}

inline void exp_sums(const float* x, int64_t size, float peak, float inverse, double* sums) {
  for (int64_t start = 0; start < size; start += SUM_BLOCK, ++sums) {
    const int64_t count = size - start < SUM_BLOCK ? size - start : SUM_BLOCK;
    const int64_t whole = count / VL * VL;
    vf total[4] = {};
    for (int64_t i = 0; i < whole; i += VL)
      total[i / VL % 4] = total[i / VL % 4] + exp((load(x + start + i) - splat(peak)) * splat(inverse));
    float rest = sum((total[0] + total[1]) + (total[2] + total[3]));
    for (int64_t i = whole; i < count; ++i) rest += exp1((x[start + i] - peak) * inverse);
    *sums = rest;
  }
}

inline void exps(const float* x, int64_t size, float peak, float inverse, float* out) {
  const int64_t whole = size / VL * VL;
  for (int64_t i = 0; i < whole; i += VL) store(out + i, exp((load(x + i) - splat(peak)) * splat(inverse)));
  for (int64_t i = whole; i < size; ++i) out[i] = exp1((x[i] - peak) * inverse);
}

inline int64_t at_least(const float* x, int64_t size, float threshold, int32_t* ids, int64_t capacity) {
  int64_t count = 0;
  const int64_t whole = size / (4 * VL) * (4 * VL);
  for (int64_t i = 0; i < whole; i += 4 * VL) {
    const vf a = max(load(x + i), load(x + i + VL)), b = max(load(x + i + 2 * VL), load(x + i + 3 * VL));
    const vi hit = max(a, b) >= splat(threshold);
#if VL == 16
    if (_mm512_movepi32_mask((__m512i)hit) == 0) continue;
    for (int v = 0; v < 4; ++v) {
      const vi reached = load(x + i + v * VL) >= splat(threshold);
      for (unsigned mask = _mm512_movepi32_mask((__m512i)reached); mask != 0; mask &= mask - 1) {
        if (count == capacity) return count;
        ids[count++] = static_cast<int32_t>(i + v * VL + __builtin_ctz(mask));
      }
    }
#else
    int32_t any = 0;
    for (int lane = 0; lane < VL; ++lane) any |= hit[lane];
    if (any == 0) continue;
    for (int64_t j = i; j < i + 4 * VL; ++j)
      if (x[j] >= threshold) {
        if (count == capacity) return count;
        ids[count++] = static_cast<int32_t>(j);
      }
#endif
  }
  for (int64_t i = whole; i < size && count < capacity; ++i)
    if (x[i] >= threshold) ids[count++] = static_cast<int32_t>(i);
  return count;
}

inline void softmax(float* x, int64_t size) {
  bool has_nan;
  const float top = peak(x, size, &has_nan);
  exps(x, size, top, 1.0f, x);
  float total = 0;
  for (int64_t i = 0; i < size; ++i) total += x[i];
  for (int64_t i = 0; i < size; ++i) x[i] /= total;
}

inline float dot(const float* x, const float* y, int64_t size) {
  const int64_t whole = size / VL * VL;
  vf total[4] = {};
  for (int64_t i = 0; i < whole; i += VL) total[i / VL % 4] = fma(load(x + i), load(y + i), total[i / VL % 4]);
  float rest = sum((total[0] + total[1]) + (total[2] + total[3]));
  for (int64_t i = whole; i < size; ++i) rest += x[i] * y[i];
  return rest;
}

inline void widen(const bf16* x, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    __builtin_memcpy(out + i, &bits, 4);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
