// Kernels that are each wrong or slow in one way, and what is like them and right, for test_emulator.py.
#include "wgmma.cuh"

namespace fdserve::cuda {
namespace {

constexpr int THREADS = WARPGROUP;

// Every kernel has a block of THREADS and writes out[thread], of THREADS ints; `in` has as many.
using Kernel = void (*)(const int* in, int* out);

template <bool HAS_BARRIER>
__global__ void reads_a_neighbour(const int* in, int* out) {
  __shared__ int values[THREADS];
  values[threadIdx.x] = in[threadIdx.x];
  if (HAS_BARRIER) __syncthreads();
  out[threadIdx.x] = values[THREADS - 1 - threadIdx.x];
}

// A shuffle lets lanes see each other's registers, and orders nothing that they write.
template <bool HAS_BARRIER>
__global__ void trusts_a_shuffle(const int* in, int* out) {
  __shared__ int values[THREADS];
  const int other = threadIdx.x ^ 1;
  values[threadIdx.x] = in[threadIdx.x];
  const int shown = __shfl_xor_sync(ALL, in[threadIdx.x], 1);
  if (HAS_BARRIER) __syncwarp();
  out[threadIdx.x] = shown + values[other];
}

template <bool HAS_BARRIER>
__global__ void writes_what_is_read(const int* in, int* out) {
  __shared__ int values[THREADS];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const int sum = values[threadIdx.x] + values[(threadIdx.x + 32) % THREADS];
  if (HAS_BARRIER) __syncthreads();
  values[threadIdx.x] = sum;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void warps_trust_syncwarp(const int* in, int* out) {
  __shared__ int values[THREADS];
  values[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = values[(threadIdx.x + 32) % THREADS];
}

template <bool ATOMIC>
__global__ void adds_up(const int* in, int* out) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (ATOMIC)
    atomicAdd(&sum, in[threadIdx.x]);
  else
    sum += in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = sum;
}

template <bool WAITS, bool HAS_BARRIER>
__global__ void copies(const int* in, int* out) {
  int* const values = reinterpret_cast<int*>(dynamic_shared());
  if (threadIdx.x < THREADS / 4) copy_async_16(values + threadIdx.x * 4, in + threadIdx.x * 4, true);
  commit_copies();
  if (WAITS) wait_copies<0>();
  if (HAS_BARRIER) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void reads_past_the_end(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
__global__ void writes_past_the_end(const int*, int* out) { out[threadIdx.x + 1] = 0; }
__global__ void reads_what_is_not_written(const int*, int* out) {
  out[threadIdx.x] = reinterpret_cast<int*>(dynamic_shared())[threadIdx.x];
}
__global__ void loads_what_is_not_aligned(const int* in, int* out) {
  out[threadIdx.x] = load_vector(in + threadIdx.x % 32).values[0];
}

__global__ void writes_its_own(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x]; }

// A product of zeros: what counts is what it reads.
template <bool SHOWS, bool WAITS>
__global__ void multiplies(const int* in, int* out) {
  constexpr int WORDS = 64 * SWIZZLED_ROW / 2 / THREADS;
  int* const values = reinterpret_cast<int*>(dynamic_shared());
  for (int i = 0; i < WORDS; ++i) values[threadIdx.x * WORDS + i] = 0;
  if (SHOWS) show_to_products();
  __syncthreads();
  float sums[8][4];
  const uint32_t left[4] = {};
  begin_products();
  begin_product<bf16, 0>(sums, left, operand_at(shared_at(values), 16, 1024), false);
  commit_products();
  if (WAITS) wait_products<0>();
  __syncthreads();
  values[threadIdx.x * WORDS] = in[threadIdx.x];
  wait_products<0>();
  out[threadIdx.x] = static_cast<int>(sums[0][0]);
}

__global__ void lanes_part(const int* in, int* out) {
  int value = in[threadIdx.x];
  if (threadIdx.x % 2 == 0) value = __shfl_xor_sync(ALL, value, 2);
  else __syncwarp();
  out[threadIdx.x] = value;
}

// Right, but slow.
template <int STRIDE>
__global__ void loads_with_a_stride(const int* in, int* out) {
  const int value = in[threadIdx.x * STRIDE % THREADS];
  out[threadIdx.x] = value;
}

template <int STRIDE>
__global__ void has_rows_in_shared_memory(const int* in, int* out) {
  int* const rows = reinterpret_cast<int*>(dynamic_shared());
  rows[threadIdx.x * STRIDE] = in[threadIdx.x];
  out[threadIdx.x] = rows[threadIdx.x * STRIDE];
}

struct Named {
  const char* name;
  Kernel kernel;
  unsigned blocks;
};
constexpr Named KERNELS[] = {
    {"reads a neighbour", reads_a_neighbour<false>, 1},
    {"reads a neighbour after a barrier", reads_a_neighbour<true>, 1},
    {"trusts a shuffle", trusts_a_shuffle<false>, 1},
    {"trusts a warp's barrier", trusts_a_shuffle<true>, 1},
    {"writes what is read", writes_what_is_read<false>, 1},
    {"writes what was read before a barrier", writes_what_is_read<true>, 1},
    {"a warp trusts another's barrier", warps_trust_syncwarp, 1},
    {"adds up", adds_up<false>, 1},
    {"adds up atomically", adds_up<true>, 1},
    {"copies without waiting", copies<false, true>, 1},
    {"copies without a barrier", copies<true, false>, 1},
    {"copies", copies<true, true>, 1},
    {"reads past the end", reads_past_the_end, 1},
    {"writes past the end", writes_past_the_end, 1},
    {"reads what is not written", reads_what_is_not_written, 1},
    {"loads what is not aligned", loads_what_is_not_aligned, 1},
    {"is one block", writes_its_own, 1},
    {"writes what the other block does", writes_its_own, 2},
    {"multiplies what is not shown", multiplies<false, true>, 1},
    {"multiplies what changes", multiplies<true, false>, 1},
    {"multiplies", multiplies<true, true>, 1},
    {"lanes part", lanes_part, 1},
    {"loads a row", loads_with_a_stride<1>, 1},
    {"loads a column", loads_with_a_stride<8>, 1},
    {"has rows of 16", has_rows_in_shared_memory<16>, 1},
    {"has rows of 17", has_rows_in_shared_memory<17>, 1},
};

}  // namespace
}  // namespace fdserve::cuda

extern "C" __attribute__((visibility("default"))) int fdserve_wrong_kernel(const char* name, const int* in, int* out,
                                                                           cudaStream_t stream) {
  using namespace fdserve::cuda;
  for (const Named& each : KERNELS)
    if (std::strcmp(each.name, name) == 0) {
      launch(each.kernel, dim3(each.blocks), dim3(THREADS), THREADS * 17 * sizeof(int), stream, in, out);
      return cudaSuccess;
    }
  return cudaErrorInvalidValue;
}
