// Rows times a packed matrix, and the other operators that work a row at a time.
//
// Work is cut into (block of rows, panel) tasks, of which a thread takes consecutive ones: a long stream for the hardware
// to fetch ahead. Every output element is one chain over k whatever the cut; which thread does what changes nothing.
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
constexpr int64_t BYTES_CHUNK = 32 << 10;  // of activations a task rounds

}  // namespace

Rows prepared_rows(const void* x_, int64_t rows, int64_t k, Dtype dtype, Format format, ScratchSlot slot) {
  const char* x = static_cast<const char*>(x_);
  const int64_t row = k * size_of(dtype), padded = padded_inputs(format, k);
  if (format != Format::kW8a8) {
    const int64_t stride = padded * size_of(dtype);
    if (padded == k) return {x, stride, nullptr};
    char* copy = scratch<char>(slot, rows * stride);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(copy + r * stride, x + r * row, static_cast<size_t>(row));
      std::memset(copy + r * stride + row, 0, static_cast<size_t>(stride - row));
    }
    return {copy, stride, nullptr};
  }
  const RowKernels& kernels = row_kernels(dtype);
  float* scales = scratch<float>(slot, rows + rows * padded / 4);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scales + rows);
  const int64_t chunk = std::max<int64_t>(1, BYTES_CHUNK / padded);
  parallel((rows + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t r = c * chunk; r < std::min(rows, (c + 1) * chunk); ++r) {
      std::memset(bytes + (r + 1) * padded - 4, 0, 4);
      scales[r] = kernels.to_bytes(x + r * row, k, bytes + r * padded);
    }
  });
  return {reinterpret_cast<char*>(bytes), padded, scales};
}

namespace {

// Many rows as tiles, where there is such a thing: then loads are one stream, and rows a power of two apart do not take
// each other's place in the first-level cache.
Rows tiled_rows(const RowKernels& kernels, Rows x, int64_t rows, int64_t bytes) {
  if (kernels.to_tiles == nullptr || rows <= TILED_ROWS || bytes % 64 != 0) return x;
  const int64_t strips = (rows + 15) / 16;
  char* tiles = scratch<char>(kScratchTiled, strips * 16 * bytes);
  parallel(strips, [&](int64_t s) {
    kernels.to_tiles(x.data + s * 16 * x.stride, x.stride, std::min<int64_t>(16, rows - s * 16), bytes, tiles + s * 16 * bytes);
  });
  return {tiles, bytes, x.scales, true};
}

// More rows share a panel where that cache is large.
int64_t row_block_of(int64_t row_bytes) {
  static const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return 2 * ROW_BLOCK * row_bytes <= cache / 2 ? 2 * ROW_BLOCK : ROW_BLOCK;
}

// Bytes times bytes: exact, then scaled once.
void byte_product(const RowKernels& kernels, Rows x, int64_t rows, int64_t k, const char* panel, float* acc) {
  const float* scales = reinterpret_cast<const float*>(panel);
  const int32_t* offsets = reinterpret_cast<const int32_t*>(panel) + PANEL;
  int32_t* sums = reinterpret_cast<int32_t*>(acc);
  kernels.gemm_bytes(x, rows, panel + W8A8_HEAD_BYTES, padded_inputs(Format::kW8a8, k) / 4, sums);
  kernels.scale_sums(sums, rows, offsets, scales, x.scales, acc);
}

}  // namespace

void panel_product(const RowKernels& kernels, Format format, Rows x, int64_t rows, int64_t k, const void* panel_,
                   float* acc) {
  const char* panel = static_cast<const char*>(panel_);
  if (format == Format::kW8a8) return byte_product(kernels, x, rows, k, panel, acc);
  const int64_t inputs = padded_inputs(format, k);
  if (is_weight_only(format)) return kernels.gemm_groups(x, rows, panel, format, inputs / GROUP, acc);
  kernels.gemm(x, rows, panel, format == Format::kBfloat16 ? inputs / 2 : inputs, acc);
}

void linear(const void* x, int64_t tokens, Dtype dtype, const Matrix& weight, void* out, Dtype out_dtype) {
  const RowKernels& kernels = row_kernels(dtype);
  const RowKernels& out_kernels = row_kernels(out_dtype);
  const int64_t n = weight.n, k = weight.k;
  const Rows plain = prepared_rows(x, tokens, k, dtype, weight.format, kScratchCall);
  const int64_t element = weight.format == Format::kW8a8 ? 1 : size_of(dtype);
  const Rows rows = tiled_rows(kernels, plain, tokens, padded_inputs(weight.format, k) * element);
  const int64_t bytes = panel_bytes(weight.format, k), count = (n + PANEL - 1) / PANEL;
  const int64_t most = row_block_of(rows.stride), row_blocks = (tokens + most - 1) / most;
  const int64_t out_size = size_of(out_dtype);
  // Blocks as even as can be, in whole passes of the panel product.
  const auto row_block = [&](int64_t block) {
    return block == row_blocks ? tokens : block * tokens / row_blocks / kernels.pass_rows * kernels.pass_rows;
  };
  parallel(row_blocks * count, [&](int64_t task) {
    const int64_t first = row_block(task / count), end = row_block(task / count + 1);
    const int64_t p = task % count, width = std::min(PANEL, n - p * PANEL);
    float* acc = scratch<float>(kScratchTile, (end - first + SPARE_ROWS) * PANEL);
    panel_product(kernels, weight.format, rows.from(first), end - first, k,
                  static_cast<const char*>(weight.panels) + p * bytes, acc);
    out_kernels.put(acc, end - first, width, static_cast<char*>(out) + (first * n + p * PANEL) * out_size, n * out_size);
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
