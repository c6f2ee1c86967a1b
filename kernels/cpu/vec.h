// Vectors of VL floats, whatever the instruction set. Included by the isa_*.cc files, which define VL and FD_ISA (the
// namespace) and set the target before it. No standard header may be included after the target is set: an inline
// function of one compiled here could be the copy the linker keeps for the whole library.

namespace fdserve {
namespace FD_ISA {

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef int32_t viu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int16_t vs __attribute__((vector_size(VL * 4)));

#define FD_MEMBER inline __attribute__((always_inline))
#define FD_INLINE static FD_MEMBER

FD_INLINE vf splat(float x) { return x - vf{}; }
FD_INLINE vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
FD_INLINE void store(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
FD_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const viu*>(p); }
FD_INLINE void store(int32_t* p, vi x) { *reinterpret_cast<viu*>(p) = x; }

// The first n lanes (n < VL); the others are zero, or left alone in memory.
FD_INLINE vf load_some(const float* p, int n) {
#if VL == 16
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#endif
  vf x = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
FD_INLINE void store_some(float* p, vf x, int n) {
#if VL == 16
  return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
#endif
  for (int i = 0; i < n; ++i) p[i] = x[i];
}

// Contraction is off (-ffp-contract=off): a multiply-add is fused exactly where this is called.
FD_INLINE vf fma(vf a, vf b, vf c) {
#if VL == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VL == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The sums of two products each.
FD_INLINE vi multiply_pairs(vs a, vs b) {
#if VL == 16
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif VL == 8
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}

// b where either is NaN.
FD_INLINE vf max(vf a, vf b) {
#if VL == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VL == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#endif
}
FD_INLINE vf min(vf a, vf b) {
#if VL == 16
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif VL == 8
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return (vf)_mm_min_ps((__m128)a, (__m128)b);
#endif
}
FD_INLINE vi max(vi a, vi b) { return a > b ? a : b; }

// bf16 on any instruction set.
FD_INLINE vf widened(const bf16* p) {
  vi bits;
  for (int i = 0; i < VL; ++i) bits[i] = p[i];
  return (vf)(bits << 16);
}
FD_INLINE vf to_bf16_and_back(vf x) {
  const vi bits = (vi)x;
  return (vf)((bits + 0x7fff + (bits >> 16 & 1)) >> 16 << 16);
}
FD_INLINE vf inverse_or_zero(vf x) { return x == vf{} ? vf{} : splat(1.0f) / x; }

#ifdef FD_BF16
FD_INLINE vf load(const bf16* p) {
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
FD_INLINE vf load_some(const bf16* p, int n) {
  __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
FD_INLINE void store(bf16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
FD_INLINE void store_some(bf16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
FD_INLINE vf rounded(vf x, const bf16*) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}
#endif
FD_INLINE vf rounded(vf x, const float*) { return x; }

// Lanes are combined in halves, always in the same order.
FD_INLINE float sum(vf x) {
#if VL == 16
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float lane[VL];
  store(lane, x);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
FD_INLINE float max_lane(vf x) {
#if VL == 16
  return _mm512_reduce_max_ps((__m512)x);
#endif
  float lane[VL];
  store(lane, x);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

FD_INLINE int32_t max_lane(vi x) {
#if VL == 16
  return _mm512_reduce_max_epi32((__m512i)x);
#endif
  int32_t lane[VL];
  store(lane, x);
  for (int i = 1; i < VL; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
  return lane[0];
}

// e^x for x <= 88, within 2 units in the last place; 0 below -87.3 (so for -inf), NaN for NaN. A Taylor polynomial of
// degree 7 on [-ln2/2, ln2/2] after splitting off the power of two.
FD_INLINE vf exp(vf x) {
#if VL == 16
  const vf clamped = x;  // what is too low counts for nothing
#else
  const vf clamped = x < splat(-87.3f) ? splat(-87.3f) : x;
#endif
  vf shifted = fma(clamped, splat(1.44269504f), splat(12582912.0f));
  vf n = shifted - splat(12582912.0f);
  vf r = fma(n, splat(-0.693145752f), clamped);
  r = fma(n, splat(-1.42860677e-6f), r);
  vf y = splat(1.0f / 5040);
  y = fma(y, r, splat(1.0f / 720));
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
#if VL == 16
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(counts, (__m512)y, (__m512)n);
#endif
  vi power = ((vi)shifted << 23) + (127 << 23);
  return x < splat(-87.3f) ? vf{} : y * (vf)power;
}

// 1 / x for x far from 0 and infinity, within 2 units in the last place.
FD_INLINE vf inverse(vf x) {
#if VL == 16
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return fma(y, (vf)_mm512_fnmadd_ps((__m512)x, (__m512)y, _mm512_set1_ps(1.0f)), y);
#else
  return splat(1.0f) / x;
#endif
}

FD_INLINE float exp1(float x) { return exp(splat(x))[0]; }

}  // namespace FD_ISA
}  // namespace fdserve
