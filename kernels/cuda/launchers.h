// The CUDA kernels as functions: raw device pointers, sizes and a stream. They return at once with cudaSuccess or the
// launch's error. Nothing here knows a framework; tests/cuda/ calls them straight from a shared library.
//
// `Dtype` is that of all 16-bit tensors of a call. Every tensor is dense, row-major and 16-byte aligned. T, R and S may be 0.
#pragma once

#include <cstdint>

#ifdef FDSERVE_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

#define FDSERVE_EXPORT extern "C" __attribute__((visibility("default")))

enum FdserveDtype : int { FDSERVE_BF16 = 0, FDSERVE_FP16 = 1 };

// out[T][H] = rms_norm(total) * weight[H] with total = x (+ residual, which may be null); total is stored where `total` is
// not null. H is a multiple of 8.
FDSERVE_EXPORT cudaError_t fdserve_cuda_rms_norm(const void* x, const void* residual, const void* weight, float eps,
                                                 int64_t tokens, int64_t hidden, int dtype, void* out, void* total,
                                                 cudaStream_t stream);

// out[T][I] = silu(x[:, :I]) * x[:, I:] for x[T][2 I]; I is a multiple of 8.
FDSERVE_EXPORT cudaError_t fdserve_cuda_swiglu(const void* x, int64_t tokens, int64_t inner, int dtype, void* out,
                                               cudaStream_t stream);
