// Where an integer of a weight-only group stands; see weight_only.h.
#pragma once

#include "kernels.h"

namespace fdserve {

constexpr int64_t CHUNK_TILE = 16 * 64;  // bytes: CHUNK inputs of 16 outputs, four inputs together

// Byte of input k of a group and an output of the panel.
static inline int64_t place_of_weight(Format format, int64_t k, int64_t column) {
  if (format == Format::kWint8) return k / 4 * PANEL * 4 + column * 4 + k % 4;
  const int64_t tile = k / CHUNK * 2 + column % 32 / 16;
  return tile * CHUNK_TILE + k % CHUNK / 4 * 64 + column % 16 * 4 + k % 4;
}

static inline int weight_at(const char* packed, Format format, int64_t k, int64_t column) {
  const int byte = static_cast<unsigned char>(packed[place_of_weight(format, k, column)]);
  if (format == Format::kWint8) return byte - 128;
  return (column < 32 ? byte & 15 : byte >> 4) - 8;
}

}  // namespace fdserve
