// The panel product that linear layers and experts share.
#pragma once

#include "kernels.h"

namespace fdserve {

// x[rows][k] (dtype) for a product with panels of `format`: as it is, or copied into `kScratchCall`.
Rows prepared_rows(const void* x, int64_t rows, int64_t k, Dtype dtype, Format format);

// acc[rows][64] = x[rows][k] times one panel; `next` is the one that will be wanted after it.
void panel_product(const RowKernels& kernels, Format format, Rows x, int64_t rows, int64_t k, const void* panel,
                   const void* next, float* acc);

}  // namespace fdserve
