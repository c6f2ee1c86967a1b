// The operations of device.cuh that are single instructions on a GPU. An asynchronous copy is done when its thread waits for
// it, no sooner.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator_cuda.h"

namespace fdserve::cuda {

template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16(low).bits | static_cast<uint32_t>(__float2bfloat16(high).bits) << 16;
}
template <>
inline uint32_t pack<__half>(float low, float high) {
  const __half both[2] = {__float2half(low), __float2half(high)};
  uint32_t bits;
  std::memcpy(&bits, both, 4);
  return bits;
}

inline void store_16(void* to, uint4 bits) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("an unaligned store");
  std::memcpy(to, &bits, 16);
}

inline float exp2_approx(float x) { return std::exp2(x); }

// Like everything here that asks where in a kernel it is, these have to be inlined into it.
template <class T>
__attribute__((always_inline)) inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply_fragments(d, a, b, std::is_same_v<T, __half>);
}

using Shared = uintptr_t;
inline Shared shared_at(const void* place) { return reinterpret_cast<Shared>(place); }

__attribute__((always_inline)) inline void ldmatrix_x4(uint32_t (&r)[4], Shared row) {
  emulator::load_matrices(r, row, false);
}
__attribute__((always_inline)) inline void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared row) {
  emulator::load_matrices(r, row, true);
}

__attribute__((always_inline)) inline void copy_async_16(void* shared, const void* global, bool there) {
  emulator::begin_copy(shared, there ? global : nullptr);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int N>
void wait_copies() { emulator::wait_copies(N); }

inline char* dynamic_shared() { return emulator::dynamic_shared(); }

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Args... args) {
  emulator::launch(kernel, grid, block, shared_bytes, args...);
}

// Asked of kernels for Hopper.
template <class Kernel>
int most_threads(Kernel) { return emulator::architecture().is_hopper ? 1024 : 32; }

}  // namespace fdserve::cuda
