// Products with single panels, which linear layers and experts share.
#pragma once

#include "activations.h"
#include "kernels.h"

namespace fdserve {

// Columns of panel `p` of x[rows][k] times the matrix, into out[rows][n].
void linear_panel(const RowKernels& kernels, const Matrix& weight, int64_t p, Rows x, int64_t rows, void* out,
                  Dtype out_dtype);

// The same of swiglu into out[rows][n / 2], for n / 2 in whole panels: the product stays in the second-level cache.
void swiglu_panel(const RowKernels& kernels, Dtype dtype, const Matrix& weight, int64_t p, Rows x, int64_t rows, void* out);

// Rows whose sums and inputs, of `row_bytes`, share that cache with a panel.
int64_t rows_of_block(int64_t row_bytes);

// Where a block of rows begins: as even as can be, in whole passes of the panel product.
inline int64_t start_of_block(const RowKernels& kernels, int64_t rows, int64_t blocks, int64_t block) {
  return block == blocks ? rows : block * rows / blocks / kernels.pass_rows * kernels.pass_rows;
}

}  // namespace fdserve
