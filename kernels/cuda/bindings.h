// What the files that bind kernels to Paddle share; see bindings.cc.
#pragma once

#include <vector>

#include "launchers.h"
#include "paddle/common/enforce.h"
#include "paddle/phi/api/all.h"

namespace fdserve::cuda::bindings {

using paddle::DataType;
using paddle::Tensor;

inline void require(bool holds, const char* message) {
  if (!holds) PADDLE_THROW(common::errors::InvalidArgument("%s", message));
}

inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess)
    PADDLE_THROW(common::errors::External("%s: CUDA error %d, %s", op, static_cast<int>(status), cudaGetErrorString(status)));
}

#ifdef FDSERVE_EMULATED
inline cudaStream_t stream_of(const Tensor&) { return nullptr; }
inline int multiprocessors() { return 8; }
inline bool is_here(const Tensor& x) { return x.is_cpu(); }
#else
inline bool is_here(const Tensor& x) { return x.is_gpu(); }
inline cudaStream_t stream_of(const Tensor& x) { return x.stream(); }
inline int multiprocessors() {
  static const int count = [] {
    int device = 0, value = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    return value;
  }();
  return count;
}
#endif

// Its content, whatever its dtype. A kernel that is given a pointer to the host's memory would end all CUDA in the process.
inline const void* content_of(const Tensor& x) {
  require(x.numel() == 0 || is_here(x), "expected a tensor on the GPU");
  return x.numel() == 0 ? nullptr : x.data();
}

inline int dtype_of(const Tensor& x) {
  require(x.dtype() == DataType::BFLOAT16 || x.dtype() == DataType::FLOAT16, "expected a bfloat16 or float16 tensor");
  return x.dtype() == DataType::BFLOAT16 ? FDSERVE_BF16 : FDSERVE_FP16;
}

inline Tensor make(std::vector<int64_t> shape, DataType dtype, const Tensor& beside) {
  return paddle::empty(shape, dtype, beside.place());
}

template <class T>
const T* data_of(const Tensor& x, DataType dtype, const char* message) {
  require(x.dtype() == dtype, message);
  return static_cast<const T*>(content_of(x));
}

}  // namespace fdserve::cuda::bindings
