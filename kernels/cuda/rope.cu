// Rotates a step's queries and keys, and writes its keys and values into the paged caches, from which attention.cu reads.
//
// A block has a token of qkv[T][heads + 2 kv_heads][head_dim], a thread 16 bytes at a time; pairs are interleaved. Floor: the
// bytes of qkv read and written over the copy bandwidth.
#include "launchers.h"
#include "paged.cuh"

namespace fdserve::cuda {
namespace {

template <class T>
__global__ void rope_and_store_kernel(const T* qkv, const float* rope, Paged paged, int heads, int head_dim,
                                      T* q, T* k_cache, T* v_cache) {
  using V = Vector<T>;
  const int token = blockIdx.x, chunks = head_dim / V::SIZE, all_heads = heads + 2 * paged.kv_heads;
  const int sequence = paged.sequence_of(token);
  const int position = paged.context_lens[sequence] + token - paged.query_starts[sequence];
  const int64_t block = paged.block_tables[static_cast<int64_t>(sequence) * paged.table_width + position / paged.block_size];
  const float* cosines = rope + static_cast<int64_t>(token) * head_dim;
  const float* sines = cosines + head_dim / 2;
  for (int i = threadIdx.x; i < all_heads * chunks; i += blockDim.x) {
    const int head = i / chunks, chunk = i % chunks;
    V value = load_vector(qkv + static_cast<int64_t>(token) * all_heads * head_dim + i * V::SIZE);
    if (head < heads + paged.kv_heads) {
      const Vector<float> four = load_vector(cosines + chunk * 4), other = load_vector(sines + chunk * 4);
#pragma unroll
      for (int pair = 0; pair < V::SIZE / 2; ++pair) {
        const float x = to_float(value.values[pair * 2]), y = to_float(value.values[pair * 2 + 1]);
        const float cosine = four.values[pair], sine = other.values[pair];
        value.values[pair * 2] = from_float<T>(__fadd_rn(__fmul_rn(x, cosine), -__fmul_rn(y, sine)));
        value.values[pair * 2 + 1] = from_float<T>(__fadd_rn(__fmul_rn(x, sine), __fmul_rn(y, cosine)));
      }
    }
    if (head < heads) {
      store_vector(q + (static_cast<int64_t>(token) * heads + head) * head_dim + chunk * V::SIZE, value);
    } else {
      const bool is_key = head < heads + paged.kv_heads;
      const int kv_head = (head - heads) % paged.kv_heads;
      T* row = (is_key ? k_cache : v_cache) +
               ((block * paged.kv_heads + kv_head) * paged.block_size + position % paged.block_size) * head_dim;
      store_vector(row + chunk * V::SIZE, value);
    }
  }
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

cudaError_t fdserve_cuda_rope_and_store(const void* qkv, const float* rope, const FdservePaged* paged, int64_t tokens,
                                        int64_t heads, int64_t head_dim, int dtype, void* q, void* k_cache, void* v_cache,
                                        cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(rope_and_store_kernel<T>, dim3(tokens), dim3(256), 0, stream, static_cast<const T*>(qkv), rope, Paged(*paged),
           static_cast<int>(heads), static_cast<int>(head_dim), static_cast<T*>(q),
           static_cast<T*>(k_cache), static_cast<T*>(v_cache));
  };
  dtype == FDSERVE_BF16 ? run(bf16{}) : run(fp16{});
  return cudaGetLastError();
}
