// What the CUDA kernels share: the 16-bit types as floats, sums over a warp or a block, and the single instructions that
// tensor cores and asynchronous copies need (sm_80 and later), each as a function.
//
// The kernels are framework-free: raw pointers, sizes and a stream. With FDSERVE_EMULATED defined they compile as C++ for a
// CPU and run under tests/cuda/emulator.h, which has its own versions of the instructions.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef FDSERVE_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fdserve::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int WARP = 32;
constexpr unsigned ALL = ~0u;
constexpr size_t MOST_DECLARED = 16 << 10;  // bytes of shared memory that a kernel has besides its dynamic ones

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(fp16 x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }
template <>
__device__ inline fp16 from_float<fp16>(float x) { return __float2half(x); }

// 16 bytes of elements: what one thread loads at a time.
template <class T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T values[SIZE];
};

#ifndef FDSERVE_EMULATED
__device__ inline void store_16(void* to, uint4 bits) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x), "r"(bits.y),
               "r"(bits.z), "r"(bits.w) : "memory");
}
#endif

// One access of 16 bytes of global memory: the compiler takes it apart where it sees elements alone.
template <class T>
__device__ Vector<T> load_vector(const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Vector<T> vector;
  memcpy(&vector, &bits, 16);
  return vector;
}
template <class T>
__device__ void store_vector(T* to, const Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, 16);
  store_16(to, bits);
}

// Places in a workspace, one after the other, each aligned to 256 bytes; with no base it only counts them.
class Places {
 public:
  explicit Places(void* base) : base(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* place = reinterpret_cast<T*>(base + size);
    size += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return place;
  }

  int64_t size = 0;

 private:
  char* base;
};

// Two numbers of 16 bits in a register, the first in the lower half.
template <class T>
__device__ uint32_t pack(float low, float high);

__device__ inline float warp_sum(float x) {
  for (int bits = WARP / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(ALL, x, bits);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int bits = WARP / 2; bits > 0; bits /= 2) {
    const float other = __shfl_xor_sync(ALL, x, bits);
    x = x > other ? x : other;
  }
  return x;
}

// The sum over a block of whole warps, 1024 threads at most, the same on every thread. `scratch` holds 32 floats, which
// nothing else uses.
__device__ inline float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

#ifndef FDSERVE_EMULATED

template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ inline uint32_t pack<fp16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// 2^x to 2 units in the last place; what would be denormal is 0. One instruction, where exp2f takes four.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d[16][8] += a[16][16] * b[16][8] by one warp; the fragments as PTX lays out mma.m16n8k16 for 16-bit types.
template <class T>
__device__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void mma_16816<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma_16816<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A place in shared memory, to calculate with.
using Shared = uint32_t;
__device__ inline Shared shared_at(const void* place) { return static_cast<Shared>(__cvta_generic_to_shared(place)); }

// Four 8x8 matrices of 16-bit elements from shared memory; lane i gives the place of row i % 8 of matrix i / 8.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row) : "memory");
}
__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row) : "memory");
}

// 16 bytes from global to shared memory, or zeros where there is nothing to read; complete after wait_copies.
__device__ inline void copy_async_16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_at(shared)), "l"(global),
               "r"(there ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most N groups of copies are under way.
template <int N>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Aligned so that no permutation of 16-byte chunks within 1024 bytes carries into the rest of an address.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(1024) char fdserve_shared[];
  return fdserve_shared;
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
  // Beyond 48 KiB a kernel must ask, and what it declares itself counts.
  if (shared_bytes > (48 << 10) - MOST_DECLARED)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
}

// The largest block that the code of a kernel for this device lets be launched.
template <class Kernel>
int most_threads(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? attributes.maxThreadsPerBlock : 0;
}

#endif

}  // namespace fdserve::cuda
