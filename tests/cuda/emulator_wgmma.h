// A warpgroup's products (kernels/cuda/wgmma.cuh). One is multiplied when its threads wait for it, no sooner, from what its
// left operand's registers and shared memory hold then: a kernel that writes there too early gets other results.
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

// Where element `k` of 16 of a column is.
template <int TRANSPOSED>
Shared place_of(const emulator::Product& product, int column, int k) {
  Shared at = product.right;
  if (TRANSPOSED)
    at += column / 64 * product.leading + k / 8 * product.stride + k % 8 * 128 + column % 64 * 2;
  else
    at += column / 8 * product.stride + column % 8 * 128 + k * 2;
  return at ^ (at >> 7 & 7) << 4;
}

template <int N>
void hold(float (&)[N][4]) {}
inline void begin_products() {}
inline void show_to_products() { emulator::show_to_products(); }

// A warp reads all of the right operand, 16 bytes at a time: a column's 8 elements, or, TRANSPOSED, those of 8 columns.
template <int TRANSPOSED, int N>
void read_right(const emulator::Product& product) {
  for (int i = emulator::lane(); i < N * 16; i += emulator::WARP)
    emulator::read_by_product(TRANSPOSED ? place_of<1>(product, i / 16 * 8, i % 16)
                                         : place_of<0>(product, i / 2, i % 2 * 8));
}

template <class T, int TRANSPOSED, int N>
void multiply(const emulator::Product& product) {
  read_right<TRANSPOSED, N>(product);
  float(&d)[N][4] = *static_cast<float(*)[N][4]>(product.sums);
  const int lane = emulator::lane(), group = lane / 4, pair = lane % 4;
  std::memcpy(emulator::slot_of(lane), product.left, 16);
  emulator::meet_lanes(~0u, false);
  for (int half = 0; half < 2; ++half) {
    float left[16];
    for (int k = 0; k < 16; ++k) {
      uint32_t registers[4];
      std::memcpy(registers, emulator::slot_of(group * 4 + k % 8 / 2), sizeof(registers));
      left[k] = emulated_half_of<T>(registers[half + k / 8 * 2], k % 2);
    }
    for (int j = 0; j < N; ++j)
      for (int i = 0; i < 2; ++i) {
        float sum = product.add ? d[j][half * 2 + i] : 0.0f;
        for (int k = 0; k < 16; ++k) {
          T right;
          emulator::copy_for_product(&right, place_of<TRANSPOSED>(product, j * 8 + pair * 2 + i, k), sizeof(right));
          sum += left[k] * emulated_float(right);
        }
        d[j][half * 2 + i] = sum;
      }
  }
  emulator::meet_lanes(~0u, false);
}

template <class T, int TRANSPOSED, int N>
void begin_product(float (&d)[N][4], const uint32_t (&a)[4], Operand b, bool add) {
  const emulator::Product product{multiply<T, TRANSPOSED, N>, &d, a, b.place, b.leading, b.stride, add, 0};
  read_right<TRANSPOSED, N>(product);
  emulator::begin_product(product);
}
inline void commit_products() { emulator::commit_products(); }
template <int N>
void wait_products() {
  for (emulator::Product product; emulator::next_product(N, product);) product.multiply(product);
}

}  // namespace fdserve::cuda
