// A warpgroup's products (kernels/cuda/wgmma.cuh).
#pragma once

#include <cstdint>

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

template <int N>
void hold(float (&)[N][4]) {}
inline void begin_products() {}
inline void show_to_products() { emulator::show_to_products(); }

template <class T, int TRANSPOSED, int N>
__attribute__((always_inline)) inline void begin_product(float (&d)[N][4], const uint32_t (&a)[4], Operand b, bool add) {
  emulator::begin_product({&d[0][0], a, b.place, b.leading, b.stride, N * 8, TRANSPOSED != 0, std::is_same_v<T, __half>, add,
                           0, nullptr});
}
inline void commit_products() { emulator::commit_products(); }
template <int N>
void wait_products() {
  emulator::wait_products(N);
}

}  // namespace fdserve::cuda
