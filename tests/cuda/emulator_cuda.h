// CUDA's own names, as far as the kernels use them, on the emulator's machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator_block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated one"; }

#define threadIdx (emulator::place.thread)
#define blockIdx (emulator::place.index)
#define blockDim (emulator::place.block)
#define gridDim (emulator::place.grid)

inline void __syncthreads() { emulator::meet_block(); }
inline int __syncthreads_count(int predicate) { return emulator::meet_block_and_count(predicate != 0); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::meet_lanes(mask); }
template <class T>
T __shfl_sync(unsigned mask, T value, int from) { return emulator::exchange(mask, value, from & 31); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) { return emulator::exchange(mask, value, emulator::lane() ^ bits); }
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  return emulator::exchange(mask, value, emulator::lane() + by < 32 ? emulator::lane() + by : emulator::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return emulator::exchange(mask, value, emulator::lane() >= by ? emulator::lane() - by : emulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return out;
}
template <class T>
T __ldg(const T* p) { return *p; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((uint64_t{x} * y) >> 32); }
#define FDSERVE_ATOMIC(name, change)          \
  template <class T>                          \
  UNCHECKED T name(T* p, T x) {               \
    emulator::touch_atomically(p, sizeof(T)); \
    const T old = *p;                         \
    *p = change;                              \
    return old;                               \
  }
FDSERVE_ATOMIC(atomicAdd, old + x)
FDSERVE_ATOMIC(atomicOr, old | x)
FDSERVE_ATOMIC(atomicMax, x > old ? x : old)
inline void __threadfence() {}

// The two 16-bit types, with CUDA's names and rounding.
struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {static_cast<uint16_t>(0x7FFF)};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
