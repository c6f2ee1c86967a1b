// What the bindings_*.cc and bindings.cc share. Only they include Paddle's headers.
#pragma once

#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "paddle/common/enforce.h"
#include "paddle/phi/api/all.h"

namespace fdserve::bindings {

using fdserve::Dtype;
using fdserve::Experts;
using fdserve::Format;
using fdserve::Matrix;
using paddle::DataType;
using paddle::Tensor;

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

inline Dtype dtype_of(const Tensor& x) {
  if (x.dtype() == DataType::BFLOAT16) return Dtype::kBfloat16;
  require(x.dtype() == DataType::FLOAT32, "expected a bfloat16 or float32 tensor");
  return Dtype::kFloat32;
}

template <class T>
const T* data_of(const Tensor& x, DataType dtype, const char* message) {
  require(x.dtype() == dtype, message);
  return static_cast<const T*>(x.numel() == 0 ? nullptr : x.data());
}

inline const void* data_of(const Tensor& x) { return x.numel() == 0 ? nullptr : x.data(); }

inline Tensor make(std::initializer_list<int64_t> shape, DataType dtype) {
  return paddle::empty(std::vector<int64_t>(shape), dtype, paddle::CPUPlace());
}

// The same for logits of many rows. From some size on malloc takes fresh memory each time, which would be a page fault
// every 4 KiB: huge pages are asked for.
inline Tensor make_large(std::initializer_list<int64_t> shape, DataType dtype) {
  constexpr int64_t FRESH_BYTES = 32 << 20;
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  Tensor out = make(shape, dtype);
  const int64_t bytes = out.numel() * static_cast<int64_t>(phi::SizeOf(dtype));
  if (bytes <= FRESH_BYTES) return out;
  const uintptr_t start = reinterpret_cast<uintptr_t>(out.data());
  const uintptr_t begin = (start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / HUGE_PAGE * HUGE_PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  return out;
}

// A packed matrix, or one for each of `count` experts, for activations of `dtype`.
inline Matrix matrix_of(const Tensor& panels, int64_t format_, int64_t n, int64_t k, DataType dtype, int64_t count = 1) {
  require(format_ >= 0 && format_ <= static_cast<int64_t>(Format::kW8a8), "a weight has an unknown format");
  const Format format = static_cast<Format>(format_);
  const DataType stored = format == Format::kFloat32    ? DataType::FLOAT32
                          : format == Format::kBfloat16 ? DataType::BFLOAT16
                                                        : DataType::UINT8;
  require(panels.dtype() == stored && (stored != DataType::FLOAT32 || stored == dtype),
          "x and the weight must have the same dtype");
  const int64_t bytes = fdserve::panel_bytes(format, k) * ((n + fdserve::PANEL - 1) / fdserve::PANEL);
  require(n > 0 && k > 0 && panels.numel() * static_cast<int64_t>(phi::SizeOf(stored)) == count * bytes,
          "a weight is not of this size");
  return {panels.data(), n, k, format};
}

// `top_k` of as many experts as the gate [E, hidden] has rows, all panels of one format.
inline Experts experts_of(const Tensor& gate, const Tensor& correction_bias, const Tensor& up_gate, const Tensor& down,
                          int64_t format, int64_t hidden, int64_t inner, int64_t top_k, float norm_min, DataType dtype) {
  require(gate.dims().size() == 2 && gate.dims()[1] == hidden, "moe: x must be [T, H] and gate [E, H]");
  const int64_t count = gate.dims()[0];
  require(correction_bias.numel() == count && up_gate.dims()[0] == count && down.dims()[0] == count,
          "moe: gate, correction_bias, up_gate and down must have as many experts");
  require(top_k > 0 && top_k <= count, "moe: top_k must be between 1 and the number of experts");
  return {count, top_k, norm_min, data_of<float>(gate, DataType::FLOAT32, "moe: gate must be float32"),
          data_of<float>(correction_bias, DataType::FLOAT32, "moe: correction_bias must be float32"),
          matrix_of(up_gate, format, 2 * inner, hidden, dtype, count), matrix_of(down, format, hidden, inner, dtype, count)};
}

// Paddle turns its own exceptions alone into Python's (this one into ValueError) and aborts on any other.
template <auto function>
struct Guarded;

template <class... Args, std::vector<Tensor> (*function)(Args...)>
struct Guarded<function> {
  static std::vector<Tensor> call(Args... args) {
    try {
      return function(args...);
    } catch (const std::invalid_argument& error) {
      PADDLE_THROW(common::errors::InvalidArgument("%s", error.what()));
    } catch (const std::bad_alloc&) {
      PADDLE_THROW(common::errors::ResourceExhausted("out of memory"));
    }
  }
};

}  // namespace fdserve::bindings
