// Where an integer of a weight-only group stands; see weight_only.h.
#pragma once

#include "kernels.h"

namespace fdserve {

// Where the vector of 64 bytes begins that holds input k of an output.
static inline int64_t weight_vector(int64_t per_vector, int64_t k, int64_t column) {
  return (k / per_vector * 4 + column / 16) * 64;
}

// Byte of input k (of GROUP) and an output of the panel, at 8 bits.
static inline int64_t byte_of_weight(int64_t k, int64_t column) {
  // Unpacking takes bytes from halves of 128-bit lanes: four outputs, then their next pair of inputs.
  const int64_t lane = column % 16;
  return weight_vector(4, k, column) + lane / 4 * 16 + k % 4 / 2 * 8 + lane % 4 * 2 + k % 2;
}

// At 4 bits: the byte, and whether it is the upper half.
static inline int64_t nibble_of_weight(int64_t k, int64_t column, bool* upper) {
  *upper = k / 2 % 2 != 0;
  return weight_vector(8, k, column) + column % 16 * 4 + k % 2 * 2 + k % 8 / 4;
}

static inline int weight_at(const char* packed, Format format, int64_t k, int64_t column) {
  if (format == Format::kWint8) {
    const int byte = static_cast<unsigned char>(packed[byte_of_weight(k, column)]);
    return byte < 128 ? byte : 128 - byte;
  }
  bool upper;
  const int byte = static_cast<unsigned char>(packed[nibble_of_weight(k, column, &upper)]);
  return (upper ? byte >> 4 : byte & 15) - 8;
}

// Into a group of zeros.
static inline void put_weight(char* packed, Format format, int64_t k, int64_t column, int value) {
  if (format == Format::kWint8) {
    packed[byte_of_weight(k, column)] = static_cast<char>(value < 0 ? 128 - value : value);
    return;
  }
  bool upper;
  char& byte = packed[nibble_of_weight(k, column, &upper)];
  byte = static_cast<char>(byte | (value + 8) << (upper ? 4 : 0));
}

}  // namespace fdserve
