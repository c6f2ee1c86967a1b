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

// Which lanes reach a threshold.
#if VL == 16
typedef __mmask16 Hits;
FD_INLINE Hits reach(vf x, vf threshold) { return _mm512_cmp_ps_mask((__m512)x, (__m512)threshold, _CMP_GE_OQ); }
FD_INLINE bool any(Hits hit) { return hit != 0; }
#else
typedef vi Hits;
FD_INLINE Hits reach(vf x, vf threshold) { return x >= threshold; }
#endif

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

// Lane i of (hit ? x : 0).
FD_INLINE vf where(vi hit, vf x) { return (vf)((vi)x & hit); }

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

// A row's sum is in four vectors, whatever the rows beside it.
template <int ROWS>
FD_INLINE void dots_of(const float* x, const float* y, int64_t size, float* out, int64_t stride) {
  const int64_t whole = size / VL * VL;
  vf total[ROWS][4] = {};
  int64_t i = 0;
  for (; i + 4 * VL <= whole; i += 4 * VL)
    for (int lane = 0; lane < 4; ++lane) {
      const vf v = load(x + i + lane * VL);
      for (int r = 0; r < ROWS; ++r) total[r][lane] = fma(v, load(y + r * size + i + lane * VL), total[r][lane]);
    }
  for (int lane = 0; lane < 3; ++lane)
    if (i + lane * VL < whole)
      for (int r = 0; r < ROWS; ++r)
        total[r][lane] = fma(load(x + i + lane * VL), load(y + r * size + i + lane * VL), total[r][lane]);
  for (int r = 0; r < ROWS; ++r) {
    float rest = sum((total[r][0] + total[r][1]) + (total[r][2] + total[r][3]));
    for (i = whole; i < size; ++i) rest += x[i] * y[r * size + i];
    out[r * stride] = rest;
  }
}

inline void dots(const float* x, const float* y, int64_t rows, int64_t size, float* out, int64_t stride) {
  static_assert(DOT_ROWS == 4, "a case for each number of rows");
  switch (rows) {
    case 1: return dots_of<1>(x, y, size, out, stride);
    case 2: return dots_of<2>(x, y, size, out, stride);
    case 3: return dots_of<3>(x, y, size, out, stride);
    default: return dots_of<4>(x, y, size, out, stride);
  }
}

inline void widen(const bf16* x, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    __builtin_memcpy(out + i, &bits, 4);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
