// Linear layers with 8- or 4-bit weights: y[T][N] = x[T][K] times dequantized W[N][K].
//
// A block has 128 columns and 16 or 64 rows; see gemm.cuh. Floor: the weights' bytes over the memory bandwidth for a few
// rows, the tensor cores' 16-bit rate for many. 16-bit linear layers go to cuBLAS and have no kernel here.
#include "gemm.cuh"
#include "launchers.h"

namespace fdserve::cuda {
namespace {

template <class T, int BM, int BITS, class Out>
__global__ void __launch_bounds__(GEMM_THREADS)
    quant_linear_kernel(const T* x, int64_t tokens, Weights w, int64_t columns, Out* out) {
  using Tile = GemmTile<T, BM, BITS>;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * BM, first_column = static_cast<int64_t>(blockIdx.x) * GEMM_COLUMNS;
  typename Tile::Sums sums = {};
  Tile::run([&](int i) { return first_row + i < tokens ? x + (first_row + i) * w.depth : nullptr; },
            [&](int j) { return first_column + j < columns ? first_column + j : -1; }, w, sums);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
  for (int m = 0; m < BM / 16; ++m)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + m * 16 + lane / 4 + i / 2 * 8;
        const int64_t column = first_column + warp * 32 + j * 8 + lane % 4 * 2 + i % 2;
        if (row < tokens && column < columns) out[row * columns + column] = from_float<Out>(sums[m][j][i]);
      }
}

template <class T, int BM, int BITS, class Out>
void quant_linear(const void* x, int64_t tokens, const Weights& w, int64_t columns, void* out, cudaStream_t stream) {
  const dim3 grid((columns + GEMM_COLUMNS - 1) / GEMM_COLUMNS, (tokens + BM - 1) / BM);
  launch(quant_linear_kernel<T, BM, BITS, Out>, grid, dim3(GEMM_THREADS), GemmTile<T, BM, BITS>::SHARED_BYTES, stream,
         static_cast<const T*>(x), tokens, w, columns, static_cast<Out*>(out));
}

template <class T, class Out>
void any_quant_linear(const void* x, int64_t tokens, const Weights& w, int64_t columns, int bits, void* out,
                      cudaStream_t stream) {
  if (tokens <= 16)
    (bits == 8 ? quant_linear<T, 16, 8, Out> : quant_linear<T, 16, 4, Out>)(x, tokens, w, columns, out, stream);
  else
    (bits == 8 ? quant_linear<T, 64, 8, Out> : quant_linear<T, 64, 4, Out>)(x, tokens, w, columns, out, stream);
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

cudaError_t fdserve_cuda_quant_linear(const void* x, int64_t tokens, const void* weight, const float* scales, int bits,
                                      int group, int64_t in_features, int64_t out_features, int dtype, int to_float,
                                      void* out, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const Weights w = {weight, scales, in_features, group};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    (to_float ? any_quant_linear<T, float> : any_quant_linear<T, T>)(x, tokens, w, out_features, bits, out, stream);
  };
  dtype == FDSERVE_BF16 ? run(bf16{}) : run(fp16{});
  return cudaGetLastError();
}
