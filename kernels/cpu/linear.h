// The panel product that linear layers and experts share.
#pragma once

#include "kernels.h"
#include "pool.h"

namespace fdserve {

// Rows of activations; `stride` in elements.
struct Rows {
  const void* data;
  int64_t stride;
};

// x as the panel product wants it: bf16 rows of an odd length are copied with a zero after each.
Rows padded_rows(const void* x, int64_t rows, int64_t k, Dtype dtype, ScratchSlot slot);

// acc[rows][64] = x[rows][k] times one panel.
void panel_product(const RowKernels& kernels, Dtype dtype, Rows x, int64_t rows, int64_t k, const void* panel, float* acc);

}  // namespace fdserve
