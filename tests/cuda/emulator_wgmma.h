// A warpgroup's products (kernels/cuda/wgmma.cuh). One is multiplied when its threads wait for it, no sooner, from what its
// left operand's registers and shared memory hold then: a kernel that writes there too early gets other results.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator_device.h"

#define FDSERVE_WGMMA 1

namespace fdserve::cuda {

struct Operand {
  Shared place;
  int leading, stride;
};
inline Operand operand_at(Shared place, int leading, int stride) {
  if (place % 1024 != 0) emulator::fail("an operand whose permutation does not begin where the tile does");
  return {place, leading, stride};
}
inline Operand operand_after(Operand operand, int bytes) {
  if (bytes % 16 != 0) emulator::fail("an operand that is not at a multiple of 16 bytes");
  return {operand.place + bytes, operand.leading, operand.stride};
}

// Element `k` of 16 of a column.
template <class T, int TRANSPOSED>
float element_of(const Operand& operand, int column, int k) {
  Shared at = operand.place;
  if (TRANSPOSED)
    at += column / 64 * operand.leading + k / 8 * operand.stride + k % 8 * 128 + column % 64 * 2;
  else
    at += column / 8 * operand.stride + column % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  return emulated_float(*reinterpret_cast<const T*>(at));
}

template <int N>
void hold(float (&)[N][4]) {}
inline void begin_products() {}
inline void show_to_products() {}

template <class T, int TRANSPOSED, int N>
void multiply_now(float (&d)[N][4], const uint32_t (&a)[4], const Operand& b, bool add) {
  emulator::Warp& warp = emulator::block().warp();
  const int lane = emulator::lane(), group = lane / 4, pair = lane % 4;
  std::memcpy(warp.slots[lane], a, sizeof(a));
  __syncwarp();
  for (int half = 0; half < 2; ++half) {
    float left[16];
    for (int k = 0; k < 16; ++k) {
      uint32_t registers[4];
      std::memcpy(registers, warp.slots[group * 4 + k % 8 / 2], sizeof(registers));
      left[k] = emulated_half_of<T>(registers[half + k / 8 * 2], k % 2);
    }
    for (int j = 0; j < N; ++j)
      for (int i = 0; i < 2; ++i) {
        float sum = add ? d[j][half * 2 + i] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[k] * element_of<T, TRANSPOSED>(b, j * 8 + pair * 2 + i, k);
        d[j][half * 2 + i] = sum;
      }
  }
  __syncwarp();
}

template <class T, int TRANSPOSED, int N>
void begin_product(float (&d)[N][4], const uint32_t (&a)[4], Operand b, bool add) {
  emulator::Fiber& fiber = emulator::block().fiber();
  fiber.products.push_back({[&d, &a, b, add] { multiply_now<T, TRANSPOSED>(d, a, b, add); }, fiber.product_group});
}
inline void commit_products() { ++emulator::block().fiber().product_group; }
template <int N>
void wait_products() {
  emulator::Fiber& fiber = emulator::block().fiber();
  while (!fiber.products.empty() && fiber.products.front().group < fiber.product_group - N) {
    const emulator::Product product = fiber.products.front();
    fiber.products.pop_front();
    product.multiply();
  }
}

}  // namespace fdserve::cuda
