// The panel product that linear layers and experts share.
#pragma once

#include "kernels.h"

namespace fdserve {

// x[rows][k] (dtype) for a product with panels of `format`: as it is, or copied into `kScratchCall`.
Rows prepared_rows(const void* x, int64_t rows, int64_t k, Dtype dtype, Format format);

// x[rows][k] times one panel into the sink; `next` is the one that will be wanted after it, and `acc` has room for the sums,
// and SPARE_ROWS where rows are many.
void panel_product(const RowKernels& kernels, Format format, Rows x, int64_t rows, int64_t k, const void* panel,
                   const void* next, float* acc, Sink sink);

// Has `take(sums, first row, rows)` called; lives no longer than it.
template <class Take>
Sink sink_of(const Take& take) {
  return {[](const void* with, Sums sums, int64_t first, int64_t rows) {
            (*static_cast<const Take*>(with))(sums, first, rows);
          },
          &take};
}

}  // namespace fdserve
