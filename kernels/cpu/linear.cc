// Rows times a packed matrix, and the other operators that work a row at a time.
//
// Work is cut into (block of rows, panel) tasks, of which a thread takes consecutive ones: a long stream for the hardware
// to fetch ahead. Sums go on out of the first-level cache, a pass of the product at a time. Every output element is one
// chain over k whatever the cut; which thread does what changes nothing.
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "linear.h"
#include "pool.h"

namespace fdserve {
namespace {

constexpr int64_t ROW_BLOCK = 192;  // or twice as many, where the second-level cache is large

// Has `take(sums, first row, rows)` called; lives no longer than it.
template <class Take>
Sink sink_of(const Take& take) {
  return {[](const void* with, Sums sums, int64_t first, int64_t rows) {
            (*static_cast<const Take*>(with))(sums, first, rows);
          },
          &take};
}

// Bytes times bytes: exact, then scaled once.
void byte_product(const RowKernels& kernels, Rows x, int64_t rows, int64_t k, const char* panel, const void* next, float* acc,
                  Sink sink) {
  const float* scales = reinterpret_cast<const float*>(panel);
  const int32_t* offsets = reinterpret_cast<const int32_t*>(panel) + PANEL;
  const auto with_scales = [&](Sums sums, int64_t first, int64_t some) {
    sink.take(sink.with, {sums.at, offsets, scales, x.scales + first}, first, some);
  };
  kernels.gemm_bytes(x, rows, panel + W8A8_HEAD_BYTES, next, padded_inputs(Format::kW8a8, k) / 4,
                     reinterpret_cast<int32_t*>(acc), sink_of(with_scales));
}

// x[rows][k] times one panel into the sink; `next` is the one that will be wanted after it, and `acc` has room for the sums
// and SPARE_ROWS.
void panel_product(const RowKernels& kernels, Format format, Rows x, int64_t rows, int64_t k, const char* panel,
                   const void* next, float* acc, Sink sink) {
  if (format == Format::kW8a8) return byte_product(kernels, x, rows, k, panel, next, acc, sink);
  const int64_t inputs = padded_inputs(format, k);
  if (format == Format::kFloat32) return kernels.gemm_floats(x, rows, panel, next, inputs, acc, sink);
  if (format == Format::kBfloat16) return kernels.gemm_pairs(x, rows, panel, next, inputs / 2, acc, sink);
  kernels.gemm_groups(x, rows, panel, next, format, inputs, acc);
  sink.take(sink.with, {acc}, 0, rows);
}

// Calls work(first row, rows, task) for `tasks` of each block of rows.
template <class Work>
void each_block(const RowKernels& kernels, int64_t rows, int64_t row_bytes, int64_t tasks, Work&& work) {
  const int64_t most = rows_of_block(row_bytes), blocks = (rows + most - 1) / most;
  const auto start = [&](int64_t block) { return start_of_block(kernels, rows, blocks, block); };
  parallel(blocks * tasks, [&](int64_t task) {
    const int64_t first = start(task / tasks);
    work(first, start(task / tasks + 1) - first, task % tasks);
  });
}

}  // namespace

int64_t rows_of_block(int64_t row_bytes) {
  static const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return 2 * ROW_BLOCK * row_bytes <= cache / 2 ? 2 * ROW_BLOCK : ROW_BLOCK;
}

void linear_panel(const RowKernels& kernels, const Matrix& weight, int64_t p, Rows x, int64_t rows, void* out,
                  Dtype out_dtype) {
  const RowKernels& out_kernels = row_kernels(out_dtype);
  const int64_t n = weight.n, out_size = size_of(out_dtype), bytes = panel_bytes(weight.format, weight.k);
  const char* panel = static_cast<const char*>(weight.panels) + p * bytes;
  float* acc = scratch<float>(kScratchTile, (rows + SPARE_ROWS) * PANEL);
  const auto put = [&](Sums sums, int64_t first, int64_t some) {
    char* to = static_cast<char*>(out) + (first * n + p * PANEL) * out_size;
    out_kernels.put(sums, some, std::min(PANEL, n - p * PANEL), to, n * out_size);
  };
  panel_product(kernels, weight.format, x, rows, weight.k, panel, panel + bytes, acc, sink_of(put));
}

void swiglu_panel(const RowKernels& kernels, Dtype dtype, const Matrix& weight, int64_t p, Rows x, int64_t rows, void* out) {
  const int64_t inner = weight.n / 2, element = size_of(dtype), width = PANEL * element;
  const int64_t bytes = panel_bytes(weight.format, weight.k);
  const char* gate = static_cast<const char*>(weight.panels) + p * bytes;
  const char* up = gate + inner / PANEL * bytes;
  float* acc = scratch<float>(kScratchTile, (rows + SPARE_ROWS) * PANEL + rows * 2 * width / 4);
  char* pair = reinterpret_cast<char*>(acc + (rows + SPARE_ROWS) * PANEL);
  const auto put_gate = [&](Sums sums, int64_t first, int64_t some) {
    kernels.put(sums, some, PANEL, pair + first * 2 * width, 2 * width);
  };
  const auto put_both = [&](Sums sums, int64_t first, int64_t some) {
    char* to = static_cast<char*>(out) + (first * inner + p * PANEL) * element;
    kernels.put(sums, some, PANEL, pair + first * 2 * width + width, 2 * width);
    kernels.swiglu(pair + first * 2 * width, some, PANEL, to, inner * element);
  };
  panel_product(kernels, weight.format, x, rows, weight.k, gate, up, acc, sink_of(put_gate));
  panel_product(kernels, weight.format, x, rows, weight.k, up, gate + bytes, acc, sink_of(put_both));
}

void linear(const void* x, int64_t tokens, Dtype dtype, const Matrix& weight, void* out, Dtype out_dtype) {
  const RowForm form(dtype, weight.format, weight.k);
  const Rows rows = formed_rows(form, x, tokens, form.fits_tiles && tokens > TILED_ROWS);
  const int64_t panels = (weight.n + PANEL - 1) / PANEL, out_row = weight.n * size_of(out_dtype);
  each_block(form.kernels, tokens, form.bytes, panels, [&](int64_t first, int64_t count, int64_t p) {
    linear_panel(form.kernels, weight, p, rows.from(first), count, static_cast<char*>(out) + first * out_row, out_dtype);
  });
}

// Few rows are bound by memory, which reads one long stream faster than gates and their ups by turns.
void linear_swiglu(const void* x, int64_t tokens, Dtype dtype, const Matrix& weight, void* both, void* out) {
  const int64_t inner = weight.n / 2, row = inner * size_of(dtype);
  if (tokens <= TILED_ROWS || inner % PANEL != 0) {
    linear(x, tokens, dtype, weight, both, dtype);
    return swiglu(both, tokens, inner, dtype, out);
  }
  const RowForm form(dtype, weight.format, weight.k);
  const Rows rows = formed_rows(form, x, tokens, form.fits_tiles);
  each_block(form.kernels, tokens, form.bytes, inner / PANEL, [&](int64_t first, int64_t count, int64_t p) {
    swiglu_panel(form.kernels, dtype, weight, p, rows.from(first), count, static_cast<char*>(out) + first * row);
  });
}

void rms_norm(const void* x, const void* residual, const void* weight, float eps, int64_t tokens, int64_t size,
              Dtype dtype, void* out, void* total) {
  const RowKernels& kernels = row_kernels(dtype);
  const int64_t row = size * size_of(dtype);
  const auto at = [&](const void* base, int64_t t) {
    return base == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(base)) + t * row;
  };
  each_row(tokens, row, [&](int64_t t) {
    kernels.rms_norm(at(x, t), at(residual, t), weight, eps, size, at(out, t), at(total, t));
  });
}

void swiglu(const void* x, int64_t tokens, int64_t size, Dtype dtype, void* out) {
  const RowKernels& kernels = row_kernels(dtype);
  const int64_t row = size * size_of(dtype);
  each_row(tokens, row, [&](int64_t t) {
    kernels.swiglu(static_cast<const char*>(x) + 2 * t * row, 1, size, static_cast<char*>(out) + t * row, row);
  });
}

}  // namespace fdserve
