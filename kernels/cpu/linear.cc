// Rows times a packed matrix, and the other operators that work a row at a time.
//
// Work is cut into (block of rows, run of panels) tasks. Within one, k is cut into slices of a panel that stay in cache
// while the rows pass over it; the float sums are stored and loaded back exactly between slices, so every output element
// is one chain over k whatever the cut. Which thread does what changes nothing.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "linear.h"
#include "pool.h"

namespace fdserve {
namespace {

// Of a panel: short slices overlap memory and arithmetic best while memory is the bound, long ones spare stores after.
constexpr int64_t FEW_ROWS = 18, FEW_SLICE_BYTES = 16 << 10, SLICE_BYTES = 64 << 10;
constexpr int64_t ROW_BLOCK = 192;         // rows whose sums and inputs share L2 with a slice
constexpr int64_t TASK_BYTES = 1 << 20;    // of panels a task streams: long runs suit the hardware's prefetch

}  // namespace

Rows padded_rows(const void* x, int64_t rows, int64_t k, Dtype dtype, ScratchSlot slot) {
  if (dtype == Dtype::kFloat32 || k % 2 == 0) return {x, k};
  bf16* copy = scratch<bf16>(slot, rows * (k + 1));
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(copy + r * (k + 1), static_cast<const bf16*>(x) + r * k, static_cast<size_t>(k) * 2);
    copy[r * (k + 1) + k] = 0;
  }
  return {copy, k + 1};
}

void panel_product(const RowKernels& kernels, Dtype dtype, Rows x, int64_t rows, int64_t k, const void* panel,
                   float* acc) {
  const bool pairs = dtype == Dtype::kBfloat16;
  const int64_t depth = pairs ? (k + 1) / 2 : k;
  const int64_t slice = (rows <= FEW_ROWS ? FEW_SLICE_BYTES : SLICE_BYTES) / (PANEL * 4);
  const int64_t a_step = slice * 4, panel_step = slice * PANEL * 4;  // both dtypes: 4 bytes a row and step of depth
  const char *a = static_cast<const char*>(x.data), *b = static_cast<const char*>(panel);
  for (int64_t done = 0; done < depth; done += slice, a += a_step, b += panel_step)
    kernels.gemm(a, x.stride, rows, b, std::min(slice, depth - done), acc, done == 0);
}

void linear(const void* x, int64_t tokens, int64_t k, const void* panels, int64_t n, Dtype dtype, void* out,
            Dtype out_dtype) {
  const RowKernels& kernels = row_kernels(dtype);
  const RowKernels& out_kernels = row_kernels(out_dtype);
  const Rows rows = padded_rows(x, tokens, k, dtype, kScratchCall);
  const int64_t bytes = panel_bytes(dtype, k), count = (n + PANEL - 1) / PANEL;
  const int64_t row_blocks = (tokens + ROW_BLOCK - 1) / ROW_BLOCK;
  // Enough tasks to share out evenly, long enough to stream.
  const int64_t share = std::max<int64_t>(1, count * row_blocks / (4 * num_threads()));
  const int64_t run = std::min(share, std::max<int64_t>(1, TASK_BYTES / bytes));
  const int64_t runs = (count + run - 1) / run;
  const int64_t out_size = size_of(out_dtype), x_row = rows.stride * size_of(dtype);
  parallel(row_blocks * runs, [&](int64_t task) {
    const int64_t first = task / runs * ROW_BLOCK, block = std::min(ROW_BLOCK, tokens - first);
    float* acc = scratch<float>(kScratchTile, block * PANEL);
    const Rows part{static_cast<const char*>(rows.data) + first * x_row, rows.stride};
    for (int64_t p = task % runs * run; p < std::min(count, (task % runs + 1) * run); ++p) {
      panel_product(kernels, dtype, part, block, k, static_cast<const char*>(panels) + p * bytes, acc);
      const int64_t width = std::min(PANEL, n - p * PANEL);
      char* to = static_cast<char*>(out) + (first * n + p * PANEL) * out_size;
      for (int64_t r = 0; r < block; ++r) out_kernels.add(acc + r * PANEL, nullptr, width, to + r * n * out_size);
    }
  });
}

void rms_norm(const void* x, const void* residual, const void* weight, float eps, int64_t tokens, int64_t size,
              Dtype dtype, void* out, void* total) {
  const RowKernels& kernels = row_kernels(dtype);
  const int64_t row = size * size_of(dtype);
  const auto at = [&](const void* base, int64_t t) {
    return base == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(base)) + t * row;
  };
  const int64_t chunk = std::max<int64_t>(1, (16 << 10) / row);
  parallel((tokens + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t t = c * chunk; t < std::min(tokens, (c + 1) * chunk); ++t)
      kernels.rms_norm(at(x, t), at(residual, t), weight, eps, size, at(out, t), at(total, t));
  });
}

void swiglu(const void* x, int64_t tokens, int64_t size, Dtype dtype, void* out) {
  const RowKernels& kernels = row_kernels(dtype);
  const int64_t row = size * size_of(dtype), chunk = std::max<int64_t>(1, (16 << 10) / row);
  parallel((tokens + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t t = c * chunk; t < std::min(tokens, (c + 1) * chunk); ++t)
      kernels.swiglu(static_cast<const char*>(x) + 2 * t * row, size, static_cast<char*>(out) + t * row);
  });
}

}  // namespace fdserve
