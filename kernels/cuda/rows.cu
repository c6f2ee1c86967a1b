// Row-wise operators: RMSNorm with the residual added, SwiGLU; and the sum of what ranks computed.
//
// A block has a row; a thread loads 16 bytes at a time and keeps what it loaded in registers between the two passes over a
// row, so that each byte is read once and written once. A block is no larger than its row needs, and registers are few
// enough for 1536 threads a multiprocessor: each has 32 bytes or more under way, where some 32 KiB in all are latency times
// bandwidth. Floor: the bytes over the copy bandwidth.
#include "device.cuh"
#include "launchers.h"

namespace fdserve::cuda {
namespace {

constexpr int MAX_THREADS = 512;
constexpr int MAX_KEPT = 4;  // vectors that a thread keeps: rows of up to 4 * 512 * 8 = 16384 elements are read once

template <class T>
__device__ Vector<T> add(const Vector<T>& x, const Vector<T>& y) {
  Vector<T> sum;
  for (int i = 0; i < Vector<T>::SIZE; ++i) sum.values[i] = from_float<T>(to_float(x.values[i]) + to_float(y.values[i]));
  return sum;
}

template <class T, int KEPT>
__global__ void __launch_bounds__(MAX_THREADS, KEPT == 1 ? 4 : KEPT < MAX_KEPT ? 3 : 2)
    rms_norm_kernel(const T* x, const T* residual, const T* weight, float eps, int hidden, T* out, T* total) {
  using V = Vector<T>;
  __shared__ float scratch[WARP];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden;
  const int vectors = hidden / V::SIZE;
  auto load = [&](int i) {
    V value = load_vector(x + row + i * V::SIZE);
    if (residual != nullptr) value = add(value, load_vector(residual + row + i * V::SIZE));
    return value;
  };
  // All loads of a thread are under way before the first is waited for.
  V kept[KEPT], others[KEPT];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= vectors) break;
    kept[k] = load_vector(x + row + i * V::SIZE);
    if (residual != nullptr) others[k] = load_vector(residual + row + i * V::SIZE);
  }
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= vectors) break;
    if (residual != nullptr) kept[k] = add(kept[k], others[k]);
    for (int j = 0; j < V::SIZE; ++j) sum += to_float(kept[k].values[j]) * to_float(kept[k].values[j]);
    if (total != nullptr) store_vector(total + row + i * V::SIZE, kept[k]);
  }
  // Only of the longest rows is there more than a thread keeps.
  const int rest = KEPT == MAX_KEPT ? vectors : 0;
  for (int i = threadIdx.x + KEPT * blockDim.x; i < rest; i += blockDim.x) {
    const V value = load(i);
    for (int j = 0; j < V::SIZE; ++j) sum += to_float(value.values[j]) * to_float(value.values[j]);
    if (total != nullptr) store_vector(total + row + i * V::SIZE, value);
  }
  const float scale = rsqrtf(block_sum(sum, scratch) / hidden + eps);
  V weights[KEPT];
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= vectors) break;
    weights[k] = load_vector(weight + i * V::SIZE);
  }
  auto store = [&](int i, const V& value, const V& w) {
    V result;
    // Rounded before the weight is applied, as Hugging Face's module does.
    for (int j = 0; j < V::SIZE; ++j) {
      const float normed = to_float(from_float<T>(to_float(value.values[j]) * scale));
      result.values[j] = from_float<T>(normed * to_float(w.values[j]));
    }
    store_vector(out + row + i * V::SIZE, result);
  };
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= vectors) break;
    store(i, kept[k], weights[k]);
  }
  for (int i = threadIdx.x + KEPT * blockDim.x; i < rest; i += blockDim.x)
    store(i, load(i), load_vector(weight + i * V::SIZE));
}

// A thread has 16 bytes of a row of the result. Grid: (rows, columns).
template <class T>
__global__ void swiglu_kernel(const T* x, int inner_vectors, T* out) {
  using V = Vector<T>;
  const int64_t row = blockIdx.x;
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= inner_vectors) return;
  const V gate = load_vector(x + (row * 2 * inner_vectors + column) * V::SIZE);
  const V up = load_vector(x + ((row * 2 + 1) * inner_vectors + column) * V::SIZE);
  V result;
  for (int j = 0; j < V::SIZE; ++j) {
    const float g = to_float(gate.values[j]);
    result.values[j] = from_float<T>(g / (1.0f + __expf(-g)) * to_float(up.values[j]));
  }
  store_vector(out + (row * inner_vectors + column) * V::SIZE, result);
}

// A thread has 16 bytes of the result. Floor: ranks + 1 times the result's bytes over the copy bandwidth.
template <class T>
__global__ void sum_ranks_kernel(const T* parts, int ranks, int64_t vectors, T* out) {
  using V = Vector<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  float sums[V::SIZE] = {};
  for (int rank = 0; rank < ranks; ++rank) {
    const V part = load_vector(parts + (rank * vectors + i) * V::SIZE);
    for (int j = 0; j < V::SIZE; ++j) sums[j] = __fadd_rn(sums[j], to_float(part.values[j]));
  }
  V result;
  for (int j = 0; j < V::SIZE; ++j) result.values[j] = from_float<T>(sums[j]);
  store_vector(out + i * V::SIZE, result);
}

template <class T>
void rms_norm(const void* x, const void* residual, const void* weight, float eps, int64_t tokens, int64_t hidden, void* out,
              void* total, cudaStream_t stream) {
  // As few vectors a thread as the largest block allows, and no thread without any but in the last warp.
  const int64_t vectors = hidden / Vector<T>::SIZE, each = (vectors + MAX_THREADS - 1) / MAX_THREADS;
  const int64_t threads = each <= MAX_KEPT ? ((vectors + each - 1) / each + WARP - 1) / WARP * WARP : MAX_THREADS;
  auto run = [&](auto kernel) {
    launch(kernel, dim3(tokens), dim3(threads), 0, stream, static_cast<const T*>(x), static_cast<const T*>(residual),
           static_cast<const T*>(weight), eps, static_cast<int>(hidden), static_cast<T*>(out), static_cast<T*>(total));
  };
  each <= 1 ? run(rms_norm_kernel<T, 1>) : each <= 2 ? run(rms_norm_kernel<T, 2>) : run(rms_norm_kernel<T, MAX_KEPT>);
}

template <class T>
void swiglu(const void* x, int64_t tokens, int64_t inner, void* out, cudaStream_t stream) {
  const int64_t vectors = inner / Vector<T>::SIZE;
  launch(swiglu_kernel<T>, dim3(tokens, (vectors + 255) / 256),
         dim3(vectors < 256 ? (vectors + WARP - 1) / WARP * WARP : 256), 0, stream, static_cast<const T*>(x), static_cast<int>(vectors), static_cast<T*>(out));
}

template <class T>
void sum_ranks(const void* parts, int ranks, int64_t size, void* out, cudaStream_t stream) {
  const int64_t vectors = size / Vector<T>::SIZE;
  launch(sum_ranks_kernel<T>, dim3((vectors + 255) / 256), dim3(256), 0, stream, static_cast<const T*>(parts), ranks, vectors,
         static_cast<T*>(out));
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

cudaError_t fdserve_cuda_rms_norm(const void* x, const void* residual, const void* weight, float eps, int64_t tokens,
                                  int64_t hidden, int dtype, void* out, void* total, cudaStream_t stream) {
  if (tokens > 0)
    (dtype == FDSERVE_BF16 ? rms_norm<bf16> : rms_norm<fp16>)(x, residual, weight, eps, tokens, hidden, out, total, stream);
  return cudaGetLastError();
}

cudaError_t fdserve_cuda_swiglu(const void* x, int64_t tokens, int64_t inner, int dtype, void* out, cudaStream_t stream) {
  if (tokens > 0) (dtype == FDSERVE_BF16 ? swiglu<bf16> : swiglu<fp16>)(x, tokens, inner, out, stream);
  return cudaGetLastError();
}

cudaError_t fdserve_cuda_sum_ranks(const void* parts, int ranks, int64_t size, int dtype, void* out, cudaStream_t stream) {
  if (size > 0) (dtype == FDSERVE_BF16 ? sum_ranks<bf16> : sum_ranks<fp16>)(parts, ranks, size, out, stream);
  return cudaGetLastError();
}
