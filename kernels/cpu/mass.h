// How much of a row's probability lies where: its weights e^((x - peak) * inverse), and sums of them that are exact in any
// order, because weights are rounded to multiples of 2^-36 first.
// Floor: as of scan.h.

namespace fdserve {
namespace FD_ISA {

// A weight in [0, 1] rounded to a multiple of 2^-36, as the sum of a multiple of 2^-17 and a smaller rest.
struct Grains {
  vf high, low;
};

FD_INLINE Grains grains(vf weight) {
  const vf high = (weight + splat(64.0f)) - splat(64.0f);
  return {high, ((weight - high) + splat(1.5f / 8192)) - splat(1.5f / 8192)};
}

// The exact sum of up to SUM_BLOCK weights as `grains` rounds them: a lane takes 64 of each half, which 24 bits hold.
struct Exact {
  static constexpr int PARTS = 16 / VL;
  vf high[PARTS] = {}, low[PARTS] = {};
  double rest = 0;

  FD_MEMBER void add(int part, Grains each) { high[part] = high[part] + each.high, low[part] = low[part] + each.low; }

  FD_MEMBER void add(int part, Hits hit, Grains each) {
#if VL == 16
    high[part] = (vf)_mm512_mask_add_ps((__m512)high[part], hit, (__m512)high[part], (__m512)each.high);
    low[part] = (vf)_mm512_mask_add_ps((__m512)low[part], hit, (__m512)low[part], (__m512)each.low);
#else
    add(part, {(vf)((vi)each.high & hit), (vf)((vi)each.low & hit)});
#endif
  }

  FD_MEMBER void add(float weight) {
    const Grains each = grains(splat(weight));
    rest += static_cast<double>(each.high[0]) + each.low[0];
  }

  FD_MEMBER double total() const {
#if VL == 16
    const __m512 x = (__m512)high[0], y = (__m512)low[0];
    const __m512d upper = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    const __m512d lower = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(y)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)));
    return rest + _mm512_reduce_add_pd(_mm512_add_pd(upper, lower));
#else
    double all = rest;
    for (int part = 0; part < PARTS; ++part)
      for (int lane = 0; lane < VL; ++lane) all += static_cast<double>(high[part][lane]) + low[part][lane];
    return all;
#endif
  }
};

// How many vectors are weighed side by side: one after the other, each step would wait for the one before.
constexpr int ABREAST = VL == 16 ? 8 : 4;
#define FD_ABREAST _Pragma("GCC unroll 8") for (int v = 0; v < ABREAST; ++v)

// x becomes e^((x - peak) * inverse), x <= peak: as `exp`, but what rounds to nothing may be anything so small.
FD_INLINE void weigh(vf (&x)[ABREAST], float peak, float inverse) {
  vf shifted[ABREAST], n[ABREAST], y[ABREAST];
  FD_ABREAST x[v] = (x[v] - splat(peak)) * splat(inverse);
  FD_ABREAST x[v] = max(x[v], splat(-87.0f));
  FD_ABREAST shifted[v] = fma(x[v], splat(1.44269504f), splat(12582912.0f));
  FD_ABREAST n[v] = shifted[v] - splat(12582912.0f);
  FD_ABREAST x[v] = fma(n[v], splat(-0.693145752f), x[v]);
  FD_ABREAST x[v] = fma(n[v], splat(-1.42860677e-6f), x[v]);
  FD_ABREAST y[v] = fma(splat(1.0f / 5040), x[v], splat(1.0f / 720));
  FD_ABREAST y[v] = fma(y[v], x[v], splat(1.0f / 120));
  FD_ABREAST y[v] = fma(y[v], x[v], splat(1.0f / 24));
  FD_ABREAST y[v] = fma(y[v], x[v], splat(1.0f / 6));
  FD_ABREAST y[v] = fma(y[v], x[v], splat(0.5f));
  FD_ABREAST y[v] = fma(y[v], x[v], splat(1.0f));
  FD_ABREAST y[v] = fma(y[v], x[v], splat(1.0f));
  FD_ABREAST x[v] = (vf)((vi)y[v] + ((vi)shifted[v] << 23));
}

FD_INLINE float weight_of_one(float x, float peak, float inverse) {
  vf all[ABREAST];
  FD_ABREAST all[v] = splat(x);
  weigh(all, peak, inverse);
  return all[0][0];
}

inline void exp_sums(const float* x, int64_t size, float peak, float inverse, double* sums) {
  for (int64_t start = 0; start < size; start += SUM_BLOCK, ++sums) {
    const int64_t end = size - start < SUM_BLOCK ? size : start + SUM_BLOCK;
    const int64_t whole = start + (end - start) / (ABREAST * VL) * (ABREAST * VL);
    Exact sum;
    for (int64_t i = start; i < whole; i += ABREAST * VL) {
      vf weight[ABREAST];
      FD_ABREAST weight[v] = load(x + i + v * VL);
      weigh(weight, peak, inverse);
      FD_ABREAST sum.add(v % Exact::PARTS, grains(weight[v]));
    }
    for (int64_t i = whole; i < end; ++i) sum.add(weight_of_one(x[i], peak, inverse));
    *sums = sum.total();
  }
}

// Appends the lanes of x that are set.
FD_INLINE int64_t append(vf x, Hits hit, float* out, int64_t count) {
#if VL == 16
  store(out + count, (vf)_mm512_maskz_compress_ps(hit, (__m512)x));
  return count + __builtin_popcount(hit);
#else
  for (int lane = 0; lane < VL; ++lane) {
    out[count] = x[lane];
    count -= hit[lane];
  }
  return count;
#endif
}

template <bool COUNTS>
FD_INLINE Split split_as(const float* x, int64_t size, float peak, float inverse, float low, float high, double* above,
                         float* out, int32_t* ends) {
  Split result = {};
  for (int64_t start = 0; start < size; start += SUM_BLOCK) {
    const int64_t end = size - start < SUM_BLOCK ? size : start + SUM_BLOCK;
    const int64_t whole = start + (end - start) / (ABREAST * VL) * (ABREAST * VL);
    Exact all, from_low, from_high;
    for (int64_t i = start; i < whole; i += ABREAST * VL) {
      vf weight[ABREAST];
      Hits between[ABREAST], some = {};
      FD_ABREAST weight[v] = load(x + i + v * VL);
      if (!COUNTS) weigh(weight, peak, inverse);
      FD_ABREAST {
        const vf each = load(x + i + v * VL);
        const Grains grain = grains(COUNTS ? splat(1.0f) : weight[v]);
        const Hits in = reach(each, splat(low)), over = reach(each, splat(high));
        all.add(v % Exact::PARTS, grain);
        from_low.add(v % Exact::PARTS, in, grain);
        from_high.add(v % Exact::PARTS, over, grain);
        between[v] = in & ~over, some |= between[v];
      }
      if (any(some)) FD_ABREAST result.count = append(load(x + i + v * VL), between[v], out, result.count);
    }
    for (int64_t i = whole; i < end; ++i) {
      const float weight = COUNTS ? 1.0f : weight_of_one(x[i], peak, inverse);
      all.add(weight);
      if (x[i] >= low) from_low.add(weight);
      if (x[i] >= high) from_high.add(weight);
      out[result.count] = x[i];
      result.count += x[i] >= low && !(x[i] >= high);
    }
    result.all += all.total();
    result.from_low += from_low.total();
    const double block = from_high.total();
    result.from_high += block;
    if (above != nullptr) above[start / SUM_BLOCK] = block, ends[start / SUM_BLOCK] = static_cast<int32_t>(result.count);
  }
  return result;
}

inline Split split(const float* x, int64_t size, float peak, float inverse, float low, float high, double* above,
                   float* out, int32_t* ends) {
  if (inverse == 0) return split_as<true>(x, size, peak, inverse, low, high, above, out, ends);
  return split_as<false>(x, size, peak, inverse, low, high, above, out, ends);
}

inline double mass_from(const float* x, const float* weights, int64_t size, float threshold) {
  double all = 0;
  for (int64_t start = 0; start < size; start += SUM_BLOCK) {
    const int64_t end = size - start < SUM_BLOCK ? size : start + SUM_BLOCK;
    const int64_t whole = start + (end - start) / VL * VL;
    Exact sum;
    for (int64_t i = start; i < whole; i += VL)
      sum.add(i / VL % Exact::PARTS, reach(load(x + i), splat(threshold)), grains(load(weights + i)));
    for (int64_t i = whole; i < end; ++i)
      if (x[i] >= threshold) sum.rest += weights[i];
    all += sum.total();
  }
  return all;
}

inline void weights(const float* x, int64_t size, float peak, float inverse, float* out) {
  for (int64_t i = 0; i < size; i += ABREAST * VL) {
    const int64_t count = size - i < ABREAST * VL ? size - i : ABREAST * VL;
    float some[ABREAST * VL] = {};
    const float* from = x + i;
    if (count < ABREAST * VL) {
      __builtin_memcpy(some, x + i, static_cast<unsigned long>(count) * 4);
      from = some;
    }
    vf weight[ABREAST];
    FD_ABREAST weight[v] = load(from + v * VL);
    weigh(weight, peak, inverse);
    FD_ABREAST {
      const Grains each = grains(inverse == 0 ? splat(1.0f) : weight[v]);
      store(some + v * VL, each.high + each.low);
    }
    __builtin_memcpy(out + i, some, static_cast<unsigned long>(count) * 4);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
