// The operations of device.cuh that are single instructions on a GPU. An asynchronous copy is done when its thread waits for
// it, no sooner.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator_cuda.h"

namespace fdserve::cuda {

inline float emulated_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float emulated_float(__half x) { return __half2float(x); }

template <class T>
float emulated_half_of(uint32_t pair, int which) {
  T value;
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  std::memcpy(&value, &bits, 2);
  return emulated_float(value);
}

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

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments { uint32_t a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  static_assert(sizeof(mine) <= sizeof(emulator::Slot), "the fragments must fit a slot");
  const int lane = emulator::lane(), group = lane / 4, pair = lane % 4;
  std::memcpy(emulator::slot_of(lane), &mine, sizeof(mine));
  emulator::meet_lanes(~0u, false);
  for (int half = 0; half < 2; ++half)
    for (int column = 0; column < 2; ++column) {
      float sum = d[half * 2 + column];
      for (int k = 0; k < 16; ++k) {
        Fragments left, right;
        std::memcpy(&left, emulator::slot_of(group * 4 + k % 8 / 2), sizeof(left));
        std::memcpy(&right, emulator::slot_of((pair * 2 + column) * 4 + k % 8 / 2), sizeof(right));
        sum += emulated_half_of<T>(left.a[half + k / 8 * 2], k % 2) * emulated_half_of<T>(right.b[k / 8], k % 2);
      }
      d[half * 2 + column] = sum;
    }
  emulator::meet_lanes(~0u, false);
}

using Shared = uintptr_t;
inline Shared shared_at(const void* place) { return reinterpret_cast<Shared>(place); }

__attribute__((always_inline)) inline void ldmatrix(uint32_t (&r)[4], Shared row, bool transposed) {
  const int lane = emulator::lane();
  if (row % 16 != 0) emulator::fail("ldmatrix of an unaligned row");
  emulator::slot_of(lane)[0] = row;
  emulator::count_row(row);
  emulator::meet_lanes(~0u, false);
  emulator::count(false);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t two[2];
    for (int i = 0; i < 2; ++i) {
      const int at = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
      two[i] = reinterpret_cast<const uint16_t*>(emulator::slot_of(matrix * 8 + at)[0])[column];
    }
    std::memcpy(&r[matrix], two, 4);
  }
  emulator::count(true);
  emulator::meet_lanes(~0u, false);
}
inline void ldmatrix_x4(uint32_t (&r)[4], Shared row) { ldmatrix(r, row, false); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared row) { ldmatrix(r, row, true); }

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
