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

constexpr int64_t ROW_BLOCK = 192;         // rows whose sums and inputs share the second-level cache with a slice
constexpr int64_t TILED_ROWS = 32;         // up to which a copy costs more than it gains
constexpr int64_t TILE_ROWS = 16, TILE_LINE = 64;
constexpr int64_t TASK_BYTES = 16 << 10;   // of rows a task works at one by one

// Calls work(row) for each, some on each thread.
template <class Work>
void each_row(int64_t rows, int64_t row_bytes, Work&& work) {
  const int64_t chunk = std::max<int64_t>(1, TASK_BYTES / row_bytes);
  parallel((rows + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t r = c * chunk; r < std::min(rows, (c + 1) * chunk); ++r) work(r);
  });
}

Rows rows_of_bytes(const RowKernels& kernels, const char* x, int64_t rows, int64_t row, int64_t k) {
  const int64_t padded = padded_inputs(Format::kW8a8, k);
  float* scales = scratch<float>(kScratchCall, rows + rows * padded / 4);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scales + rows);
  each_row(rows, padded, [&](int64_t r) {
    std::memset(bytes + (r + 1) * padded - 4, 0, 4);
    scales[r] = kernels.to_bytes(x + r * row, k, bytes + r * padded);
  });
  return {reinterpret_cast<char*>(bytes), padded, scales};
}

// Rows of `bytes` as tiles, a few at a time, which stay in the first-level cache: make(row, bytes) writes one.
template <class Make>
char* made_tiles(const RowKernels& kernels, int64_t rows, int64_t bytes, Make&& make) {
  const int64_t strips = (rows + TILE_ROWS - 1) / TILE_ROWS;
  char* tiles = scratch<char>(kScratchTiled, strips * TILE_ROWS * bytes);
  parallel(strips, [&](int64_t s) {
    const int64_t first = s * TILE_ROWS, count = std::min(TILE_ROWS, rows - first);
    char* some = scratch<char>(kScratchTile, TILE_ROWS * bytes);
    for (int64_t r = 0; r < count; ++r) make(first + r, some + r * bytes);
    kernels.to_tiles(some, bytes, count, bytes, tiles + first * bytes);
  });
  return tiles;
}

Rows tiles_of_bytes(const RowKernels& kernels, const char* x, int64_t rows, int64_t row, int64_t k) {
  float* scales = scratch<float>(kScratchCall, rows);
  const char* tiles = made_tiles(kernels, rows, padded_inputs(Format::kW8a8, k), [&](int64_t r, char* bytes) {
    scales[r] = kernels.to_bytes(x + r * row, k, reinterpret_cast<uint8_t*>(bytes));
  });
  return {tiles, padded_inputs(Format::kW8a8, k), scales, nullptr, 0, true};
}

Rows tiles_of_digits(const RowKernels& kernels, const char* x, int64_t rows, int64_t row, int64_t k, Format format) {
  const int64_t stride = 2 * padded_inputs(format, k), groups = sum_scales_of(format, k);
  SumScale* scales = scratch<SumScale>(kScratchCall, rows * groups);
  const char* tiles = made_tiles(kernels, rows, stride, [&](int64_t r, char* digits) {
    kernels.to_digits(x + r * row, k, format, digits, scales + r * groups);
  });
  return {tiles, stride, nullptr, scales, groups, true};
}

Rows rows_of_digits(const RowKernels& kernels, const char* x, int64_t rows, int64_t row, int64_t k, Format format) {
  const int64_t stride = 2 * padded_inputs(format, k), groups = sum_scales_of(format, k);
  const int64_t scale_bytes = rows * groups * static_cast<int64_t>(sizeof(SumScale));
  char* digits = scratch<char>(kScratchCall, (rows + SPARE_ROWS) * stride + scale_bytes);
  SumScale* scales = reinterpret_cast<SumScale*>(digits + (rows + SPARE_ROWS) * stride);
  each_row(rows, stride, [&](int64_t r) {
    kernels.to_digits(x + r * row, k, format, digits + r * stride, scales + r * groups);
  });
  return {digits, stride, nullptr, scales, groups};
}

}  // namespace

Rows prepared_rows(const void* x_, int64_t rows, int64_t k, Dtype dtype, Format format) {
  const char* x = static_cast<const char*>(x_);
  const RowKernels& kernels = row_kernels(dtype);
  const int64_t row = k * size_of(dtype), stride = padded_inputs(format, k) * size_of(dtype);
  if (format == Format::kW8a8) return rows_of_bytes(kernels, x, rows, row, k);
  if (is_weight_only(format) && kernels.to_digits != nullptr) return rows_of_digits(kernels, x, rows, row, k, format);
  if (stride == row) return {x, stride};
  char* copy = scratch<char>(kScratchCall, rows * stride);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(copy + r * stride, x + r * row, static_cast<size_t>(row));
    std::memset(copy + r * stride + row, 0, static_cast<size_t>(stride - row));
  }
  return {copy, stride};
}

namespace {

// Prepared rows; many as tiles, where there is such a thing: then loads are one stream, and rows a power of two apart do not
// take each other's place in the first-level cache.
Rows tiled_rows(const RowKernels& kernels, const void* x_, int64_t rows, int64_t k, Dtype dtype, Format format) {
  if (kernels.to_tiles == nullptr || rows <= TILED_ROWS) return prepared_rows(x_, rows, k, dtype, format);
  const char* from = static_cast<const char*>(x_);
  const int64_t row = k * size_of(dtype);
  if (is_weight_only(format)) return tiles_of_digits(kernels, from, rows, row, k, format);
  if (format == Format::kW8a8 && k % TILE_LINE == 0) return tiles_of_bytes(kernels, from, rows, row, k);
  Rows x = prepared_rows(x_, rows, k, dtype, format);
  const int64_t bytes = x.stride, strips = (rows + TILE_ROWS - 1) / TILE_ROWS;
  if (bytes % TILE_LINE != 0) return x;
  char* tiles = scratch<char>(kScratchTiled, strips * TILE_ROWS * bytes);
  parallel(strips, [&](int64_t s) {
    const int64_t first = s * TILE_ROWS;
    kernels.to_tiles(x.data + first * bytes, bytes, std::min(TILE_ROWS, rows - first), bytes, tiles + first * bytes);
  });
  x.data = tiles, x.tiled = true;
  return x;
}

// More rows share a panel where that cache is large.
int64_t row_block_of(int64_t row_bytes) {
  static const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return 2 * ROW_BLOCK * row_bytes <= cache / 2 ? 2 * ROW_BLOCK : ROW_BLOCK;
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

// Calls work(first row, rows, task) for `tasks` of each block of rows.
template <class Work>
void each_block(int64_t tokens, int64_t row_bytes, int64_t pass_rows, int64_t tasks, Work&& work) {
  const int64_t most = row_block_of(row_bytes), blocks = (tokens + most - 1) / most;
  // As even as can be, in whole passes of the panel product.
  const auto start = [&](int64_t block) {
    return block == blocks ? tokens : block * tokens / blocks / pass_rows * pass_rows;
  };
  parallel(blocks * tasks, [&](int64_t task) {
    const int64_t first = start(task / tasks);
    work(first, start(task / tasks + 1) - first, task % tasks);
  });
}

}  // namespace

void panel_product(const RowKernels& kernels, Format format, Rows x, int64_t rows, int64_t k, const void* panel_,
                   const void* next, float* acc, Sink sink) {
  const char* panel = static_cast<const char*>(panel_);
  if (format == Format::kW8a8) return byte_product(kernels, x, rows, k, panel, next, acc, sink);
  const int64_t inputs = padded_inputs(format, k);
  if (!is_weight_only(format))
    return kernels.gemm(x, rows, panel, next, format == Format::kBfloat16 ? inputs / 2 : inputs, acc, sink);
  kernels.gemm_groups(x, rows, panel, next, format, inputs, acc);
  sink.take(sink.with, {acc}, 0, rows);
}

void linear(const void* x, int64_t tokens, Dtype dtype, const Matrix& weight, void* out, Dtype out_dtype) {
  const RowKernels &kernels = row_kernels(dtype), &out_kernels = row_kernels(out_dtype);
  const int64_t n = weight.n, k = weight.k, out_size = size_of(out_dtype);
  const Rows rows = tiled_rows(kernels, x, tokens, k, dtype, weight.format);
  const int64_t bytes = panel_bytes(weight.format, k);
  each_block(tokens, rows.stride, kernels.pass_rows, (n + PANEL - 1) / PANEL, [&](int64_t first, int64_t count, int64_t p) {
    float* acc = scratch<float>(kScratchTile, (count + SPARE_ROWS) * PANEL);
    const char* panel = static_cast<const char*>(weight.panels) + p * bytes;
    const auto put = [&](Sums sums, int64_t from, int64_t some) {
      char* to = static_cast<char*>(out) + ((first + from) * n + p * PANEL) * out_size;
      out_kernels.put(sums, some, std::min(PANEL, n - p * PANEL), to, n * out_size);
    };
    panel_product(kernels, weight.format, rows.from(first), count, k, panel, panel + bytes, acc, sink_of(put));
  });
}

// Many rows: both products stay in the second-level cache. Few are bound by memory, which reads one long stream faster.
void linear_swiglu(const void* x, int64_t tokens, Dtype dtype, const Matrix& weight, void* both, void* out) {
  const RowKernels& kernels = row_kernels(dtype);
  const int64_t inner = weight.n / 2, k = weight.k, element = size_of(dtype);
  if (tokens <= TILED_ROWS || inner % PANEL != 0) {
    linear(x, tokens, dtype, weight, both, dtype);
    return swiglu(both, tokens, inner, dtype, out);
  }
  const Rows rows = tiled_rows(kernels, x, tokens, k, dtype, weight.format);
  const int64_t bytes = panel_bytes(weight.format, k), panels = inner / PANEL, width = PANEL * element;
  each_block(tokens, rows.stride, kernels.pass_rows, panels, [&](int64_t first, int64_t count, int64_t p) {
    float* acc = scratch<float>(kScratchTile, (count + SPARE_ROWS) * PANEL + count * 2 * width / 4);
    char* pair = reinterpret_cast<char*>(acc + (count + SPARE_ROWS) * PANEL);
    const char *gate = static_cast<const char*>(weight.panels) + p * bytes, *up = gate + panels * bytes;
    const auto put_gate = [&](Sums sums, int64_t from, int64_t some) {
      kernels.put(sums, some, PANEL, pair + from * 2 * width, 2 * width);
    };
    const auto put_both = [&](Sums sums, int64_t from, int64_t some) {
      char* to = static_cast<char*>(out) + ((first + from) * inner + p * PANEL) * element;
      kernels.put(sums, some, PANEL, pair + from * 2 * width + width, 2 * width);
      kernels.swiglu(pair + from * 2 * width, some, PANEL, to, inner * element);
    };
    panel_product(kernels, weight.format, rows.from(first), count, k, gate, up, acc, sink_of(put_gate));
    panel_product(kernels, weight.format, rows.from(first), count, k, up, gate + bytes, acc, sink_of(put_both));
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
