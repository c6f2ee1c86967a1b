// Passes over a row of floats (logits, router scores). Each has one order of its own, whatever else is computed.
// Floor: reading the row from cache; exp costs about 12 cycles a vector.

namespace fdserve {
namespace FD_ISA {

// Whether a lane is set.
FD_INLINE bool any(vi hit) {
#if VL == 16
  return _mm512_movepi32_mask((__m512i)hit) != 0;
#else
  int32_t all = 0;
  for (int lane = 0; lane < VL; ++lane) all |= hit[lane];
  return all != 0;
#endif
}

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

inline void exp_sums(const float* x, int64_t size, float peak, float inverse, double* sums, float* out) {
  for (int64_t start = 0; start < size; start += SUM_BLOCK, ++sums) {
    const int64_t count = size - start < SUM_BLOCK ? size - start : SUM_BLOCK;
    const int64_t whole = count / VL * VL;
    vf total[4] = {};
    for (int64_t i = 0; i < whole; i += VL) {
      const vf weight = exp((load(x + start + i) - splat(peak)) * splat(inverse));
      if (out != nullptr) store(out + start + i, weight);
      total[i / VL % 4] = total[i / VL % 4] + weight;
    }
    float rest = sum((total[0] + total[1]) + (total[2] + total[3]));
    for (int64_t i = whole; i < count; ++i) {
      const float weight = exp1((x[start + i] - peak) * inverse);
      if (out != nullptr) out[start + i] = weight;
      rest += weight;
    }
    *sums = rest;
  }
}

// Lane i of (hit ? x : 0).
FD_INLINE vf where(vi hit, vf x) { return (vf)((vi)x & hit); }

inline double mass_from(const float* x, const float* weights, int64_t size, float threshold) {
  double all = 0;
  for (int64_t start = 0; start < size; start += SUM_BLOCK) {
    const int64_t end = size - start < SUM_BLOCK ? size : start + SUM_BLOCK;
    const int64_t whole = start + (end - start) / VL * VL;
    vf total[2] = {};
    for (int64_t i = start; i < whole; i += VL) {
      const vf each = weights == nullptr ? splat(1.0f) : load(weights + i);
      total[i / VL % 2] = total[i / VL % 2] + where(load(x + i) >= splat(threshold), each);
    }
    float rest = sum(total[0] + total[1]);
    for (int64_t i = whole; i < end; ++i) rest += x[i] >= threshold ? (weights == nullptr ? 1.0f : weights[i]) : 0.0f;
    all += rest;
  }
  return all;
}

inline int64_t between(const float* x, const float* weights, int64_t size, float low, float high, float* out_x,
                       float* out_weights, double* above) {
  int64_t count = 0, i = 0;
  double total = 0;
#if VL == 16
  const __m512 one = _mm512_set1_ps(1.0f), from = _mm512_set1_ps(low), to = _mm512_set1_ps(high);
  while (i + 4 * VL <= size) {
    // Partial sums are as long as the blocks of other sums, so that none loses small weights.
    const int64_t end = i + SUM_BLOCK < size ? i + SUM_BLOCK : size;
    vf part = {};
    for (; i + 4 * VL <= end; i += 4 * VL) {
      const vf a = max(load(x + i), load(x + i + VL)), b = max(load(x + i + 2 * VL), load(x + i + 3 * VL));
      if (!any(max(a, b) >= splat(low))) continue;
      for (int64_t j = i; j < i + 4 * VL; j += VL) {
        const __m512 each = (__m512)load(x + j), weight = weights == nullptr ? one : (__m512)load(weights + j);
        const __mmask16 over = _mm512_cmp_ps_mask(each, to, _CMP_GE_OQ);
        const __mmask16 hit = _mm512_cmp_ps_mask(each, from, _CMP_GE_OQ) & ~over;
        part = (vf)_mm512_mask_add_ps((__m512)part, over, (__m512)part, weight);
        store(out_x + count, (vf)_mm512_maskz_compress_ps(hit, each));
        if (weights != nullptr) store(out_weights + count, (vf)_mm512_maskz_compress_ps(hit, weight));
        count += __builtin_popcount(hit);
      }
    }
    total += sum(part);
  }
#endif
  for (; i < size; ++i) {
    const float each = x[i], weight = weights == nullptr ? 1.0f : weights[i];
    if (each >= high) total += weight;
    out_x[count] = each;
    if (weights != nullptr) out_weights[count] = weight;
    count += (each >= low) & (each < high);
  }
  *above = total;
  return count;
}

inline void kept_sums(const float* x, const float* weights, int64_t size, float cut, int64_t last, float least,
                      double* sums) {
  vi lanes;
  for (int lane = 0; lane < VL; ++lane) lanes[lane] = lane;
  for (int64_t start = 0; start < size; start += SUM_BLOCK, ++sums) {
    const int64_t end = size - start < SUM_BLOCK ? size : start + SUM_BLOCK;
    const int64_t whole = start + (end - start) / VL * VL;
    vf total[2] = {};
    for (int64_t i = start; i < whole; i += VL) {
      const vf each = load(x + i), weight = load(weights + i);
      const vi early = lanes + static_cast<int32_t>(i) <= static_cast<int32_t>(last);
      const vi kept = ((each > splat(cut)) | ((each == splat(cut)) & early)) & (weight >= splat(least));
      total[i / VL % 2] = total[i / VL % 2] + where(kept, weight);
    }
    float rest = sum(total[0] + total[1]);
    for (int64_t i = whole; i < end; ++i)
      if ((x[i] > cut || (x[i] == cut && i <= last)) && weights[i] >= least) rest += weights[i];
    *sums = rest;
  }
}

inline int64_t nth_equal(const float* x, int64_t size, float value, int64_t n) {
  for (int64_t start = 0; start < size; start += SUM_BLOCK) {
    const int64_t end = size - start < SUM_BLOCK ? size : start + SUM_BLOCK;
    const int64_t whole = start + (end - start) / VL * VL;
    vf counts = {};
    for (int64_t i = start; i < whole; i += VL) counts = counts + where(load(x + i) == splat(value), splat(1.0f));
    int64_t count = static_cast<int64_t>(sum(counts));
    for (int64_t i = whole; i < end; ++i) count += x[i] == value;
    if (count < n) {
      n -= count;
      continue;
    }
    for (int64_t i = start; i < end; ++i)
      if (x[i] == value && --n <= 0) return i;
  }
  return size;
}

inline void allow(float* x, const uint32_t* bits, int64_t size) {
  for (int64_t start = 0; start < size; start += 32) {
    const uint32_t word = bits[start / 32];
    if (word == 0xFFFFFFFFu) continue;
    const int64_t count = size - start < 32 ? size - start : 32;
    for (int64_t i = 0; i < count; ++i) x[start + i] = (word >> i & 1) != 0 ? x[start + i] : -__builtin_inff();
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
    if (!any(max(a, b) >= splat(threshold))) continue;
#if VL == 16
    for (int v = 0; v < 4; ++v) {
      const vi reached = load(x + i + v * VL) >= splat(threshold);
      for (unsigned mask = _mm512_movepi32_mask((__m512i)reached); mask != 0; mask &= mask - 1) {
        if (count == capacity) return count;
        ids[count++] = static_cast<int32_t>(i + v * VL + __builtin_ctz(mask));
      }
    }
#else
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
