// The one pass over logits[R][stride] that every row needs: peaks and sums of exponentials, and the K largest.
//
// A block takes 8192 ids of a row, a warp 1024 of them, a thread 32 in registers. The sums are by 1024 ids, each relative
// to its own peak, and `total_of` adds them in one order: so a vocabulary that several ranks share out at multiples of
// 1024 has the sums of a whole one. The K-th largest of the threads' own peaks is a bar that at most 32 K of the block's
// elements clear, and those alone are sorted. Floor: the logits' bytes over the memory bandwidth.
#pragma once

#include "launchers.h"
#include "sample_row.cuh"

namespace fdserve::cuda {

constexpr int SCAN_THREADS = 256, SCAN_EACH = 32, SCAN_PART = SCAN_THREADS * SCAN_EACH;
constexpr int SUM_BLOCK = WARP * SCAN_EACH, BLOCKS_A_PART = SCAN_THREADS / WARP;
constexpr int MAX_TOP = 64;

// Of SUM_BLOCK ids; the peak is a NaN if any logit is.
struct Sum {
  float peak, mass;
};

// What the scan leaves.
struct Scan {
  Sum* sums;  // [R][num_parts * BLOCKS_A_PART]
  u64* keys;  // [R][num_parts][kept], in order within a part; 0 behind the last
  int num_parts, kept;
};

inline Scan scan_of(const FdserveSample& c) {
  return {nullptr, nullptr, static_cast<int>((c.vocab_size + SCAN_PART - 1) / SCAN_PART),
          c.num_top > 0 ? static_cast<int>(c.num_top) : 1};
}

__host__ __device__ inline int power_of_two(int x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

static __global__ void __launch_bounds__(SCAN_THREADS) scan_kernel(FdserveSample c, Scan scan) {
  __shared__ int count;
  u64* keys = reinterpret_cast<u64*>(dynamic_shared());
  const int size = static_cast<int>(c.vocab_size), lane = threadIdx.x % WARP;
  const int block = blockIdx.x * BLOCKS_A_PART + threadIdx.x / WARP, first = block * SUM_BLOCK + lane * 4;
  const int64_t row = blockIdx.y;
  const float* logits = c.logits + row * c.stride;
  const uint32_t first_id = static_cast<uint32_t>(c.first_id);
  float x[SCAN_EACH];
  float peak = -INFINITY;
  bool has_nan = false;
  u64 best = 0;
  const bool aligned = c.stride % 4 == 0;
#pragma unroll
  for (int i = 0; i < SCAN_EACH; i += 4) {
    const int at = first + i * WARP;
    if (aligned && at + 4 <= size) {
      const float4 four = *reinterpret_cast<const float4*>(logits + at);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = at + j < size ? logits[at + j] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      has_nan |= x[i + j] != x[i + j];
      peak = x[i + j] > peak ? x[i + j] : peak;
      const u64 key = at + j < size ? key_of(x[i + j], first_id + at + j) : 0;
      best = key > best ? key : best;
    }
  }
  keys[threadIdx.x] = best;
  if (threadIdx.x == 0) count = 0;
  peak = warp_max(peak);
  float mass = 0.0f;
#pragma unroll
  for (int i = 0; i < SCAN_EACH; ++i) mass = __fadd_rn(mass, peak == -INFINITY ? 0.0f : __expf(x[i] - peak));
  mass = warp_sum(mass);
  has_nan = __any_sync(ALL, has_nan);
  if (lane == 0) scan.sums[row * scan.num_parts * BLOCKS_A_PART + block] = {has_nan ? NAN : peak, mass};
  __syncthreads();
  sort_keys(keys, SCAN_THREADS);
  const u64 bar = keys[min(scan.kept, SCAN_THREADS) - 1];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < SCAN_EACH; ++i) {
    const int at = first + i / 4 * 4 * WARP + i % 4;
    const u64 key = at < size ? key_of(x[i], first_id + at) : 0;
    if (key != 0 && key >= bar) keys[atomicAdd(&count, 1)] = key;
  }
  __syncthreads();
  const int padded = power_of_two(count > scan.kept ? count : scan.kept);
  for (int i = count + threadIdx.x; i < padded; i += SCAN_THREADS) keys[i] = 0;
  __syncthreads();
  sort_keys(keys, padded);
  for (int i = threadIdx.x; i < scan.kept; i += SCAN_THREADS)
    scan.keys[(row * scan.num_parts + blockIdx.x) * scan.kept + i] = keys[i];
}

inline void launch_scan(const FdserveSample& c, const Scan& scan, cudaStream_t stream) {
  const int most = scan.kept * SCAN_EACH > SCAN_THREADS ? scan.kept * SCAN_EACH : SCAN_THREADS;
  launch(scan_kernel, dim3(scan.num_parts, static_cast<unsigned>(c.rows)), dim3(SCAN_THREADS),
         power_of_two(most) * sizeof(u64), stream, c, scan);
}

// Sorts the `count` keys at `from` into `keys`, of power_of_two(count) in shared memory. By the whole block.
__device__ inline void merge_keys(const u64* from, int count, u64* keys) {
  const int padded = power_of_two(count);
  for (int i = threadIdx.x; i < padded; i += blockDim.x) keys[i] = i < count ? from[i] : 0;
  __syncthreads();
  sort_keys(keys, padded);
}

// Of a whole row.
struct Total {
  float peak, log_mass;
  bool broken;  // a NaN, or nothing finite at the top
};

// From the sums of a row's `count` blocks, `sum_of(block)`. Every warp computes it.
template <class SumOf>
__device__ Total total_of(int count, SumOf sum_of) {
  const int lane = threadIdx.x % WARP;
  float peak = -INFINITY, mass = 0.0f;
  bool has_nan = false;
  for (int block = lane; block < count; block += WARP) {
    const float other = sum_of(block).peak;
    has_nan |= other != other;
    peak = other > peak ? other : peak;
  }
  peak = warp_max(peak);
  for (int block = lane; block < count; block += WARP) {
    const Sum sum = sum_of(block);
    if (sum.peak != -INFINITY) mass = __fadd_rn(mass, __fmul_rn(sum.mass, expf(__fadd_rn(sum.peak, -peak))));
  }
  mass = warp_sum(mass);
  return {peak, logf(mass), __any_sync(ALL, has_nan) || !(fabsf(peak) < INFINITY)};
}

}  // namespace fdserve::cuda
