// The one pass over logits[R][stride] that every row needs: peaks and sums of exponentials, and the K largest.
//
// A block takes 8192 ids of a row, a warp 1024 of them, a thread 32 in registers. The sums are by 1024 ids, each relative
// to its own peak, and `total_of` adds them in one order: so a vocabulary that several ranks share out at multiples of
// 1024 has the sums of a whole one. What K of the threads' own peaks reach is a bar that few of the block's elements clear,
// and those alone are put in order. Floor: the logits' bytes over the memory bandwidth. Some 10 instructions an element
// leave the loads the time they need: four blocks of a multiprocessor have 128 KiB under way, where 32 would do.
#pragma once

#include "launchers.h"
#include "sample_row.cuh"

namespace fdserve::cuda {

constexpr int SCAN_THREADS = 256, SCAN_EACH = 32, SCAN_PART = SCAN_THREADS * SCAN_EACH;
constexpr int SUM_BLOCK = WARP * SCAN_EACH, BLOCKS_A_PART = SCAN_THREADS / WARP;
constexpr int MAX_TOP = 64;
constexpr float LOG2_E = 1.4426950408889634f;

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

// The keys' room in shared memory, and where more than that clear the bar, more than enough for those that clear a sharper one.
inline __host__ __device__ int scan_room(int kept) {
  return power_of_two(kept * SCAN_EACH > SCAN_THREADS ? kept * SCAN_EACH : SCAN_THREADS);
}

// The block's keys that clear a bar no two elements of a thread can share: the K-th largest of the threads' largest keys. At
// most 32 K do. For rows in which too many logits are equal.
template <class KeyOf>
__device__ void put_few(KeyOf key_of_element, int kept, u64* keys, int& count) {
  u64 best = 0;
#pragma unroll
  for (int i = 0; i < SCAN_EACH; ++i) best = key_of_element(i) > best ? key_of_element(i) : best;
  __syncthreads();
  keys[threadIdx.x] = best;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  sort_keys(keys, SCAN_THREADS);
  const u64 bar = keys[kept - 1];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < SCAN_EACH; ++i)
    if (const u64 key = key_of_element(i); key != 0 && key >= bar) keys[atomicAdd(&count, 1)] = key;
  __syncthreads();
}

static __global__ void __launch_bounds__(SCAN_THREADS, 4) scan_kernel(FdserveSample c, Scan scan) {
  __shared__ int count;
  u64* keys = reinterpret_cast<u64*>(dynamic_shared());
  const int size = static_cast<int>(c.vocab_size), lane = threadIdx.x % WARP;
  const int block = blockIdx.x * BLOCKS_A_PART + threadIdx.x / WARP, first = block * SUM_BLOCK + lane * 4;
  const int64_t row = blockIdx.y;
  const float* logits = c.logits + row * c.stride;
  const uint32_t first_id = static_cast<uint32_t>(c.first_id);
  float x[SCAN_EACH];
  if (c.stride % 4 == 0 && (block + 1) * SUM_BLOCK <= size) {
#pragma unroll
    for (int i = 0; i < SCAN_EACH; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(logits + first + i * WARP);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < SCAN_EACH; ++i) {
      const int at = first + i / 4 * 4 * WARP + i % 4;
      x[i] = at < size ? logits[at] : -INFINITY;
    }
  }
  if (threadIdx.x == 0) count = 0;
  float own = -INFINITY;  // of this thread; NaNs count as nothing here
#pragma unroll
  for (int i = 0; i < SCAN_EACH; ++i) own = fmaxf(own, x[i]);
  const float peak = warp_max(own), base = peak == -INFINITY ? 0.0f : peak;
  float mass = 0.0f;  // a NaN if there is one, or an infinity
#pragma unroll
  for (int i = 0; i < SCAN_EACH; ++i) mass = __fadd_rn(mass, exp2_approx(__fmul_rn(x[i] - base, LOG2_E)));
  mass = warp_sum(mass);
  if (lane == 0) scan.sums[row * scan.num_parts * BLOCKS_A_PART + block] = {mass == mass ? peak : NAN, mass};

  // The bar, bit by bit, as sharp as bfloat16.
  uint32_t bits = 0;
  for (uint32_t bit = 1u << 31; bit >= 1u << 16; bit >>= 1)
    if (__syncthreads_count(ordered(own) >= (bits | bit)) >= scan.kept) bits |= bit;
  const float bar = bits <= ordered(-INFINITY) ? -INFINITY : unordered(bits);
  const int room = scan_room(scan.kept);
  if (own >= bar) {
#pragma unroll
    for (int i = 0; i < SCAN_EACH; i += 4) {
      if (fmaxf(fmaxf(x[i], x[i + 1]), fmaxf(x[i + 2], x[i + 3])) < bar) continue;  // of most, at one look
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (x[i + j] >= bar) {
          const int at = first + i * WARP + j;
          const int place = at < size ? atomicAdd(&count, 1) : room;
          if (place < room) keys[place] = key_of(x[i + j], first_id + at);
        }
    }
  }
  __syncthreads();
  if (count > room) {
    auto key_of_element = [&](int i) {
      const int at = first + i / 4 * 4 * WARP + i % 4;
      return at < size && x[i] == x[i] ? key_of(x[i], first_id + at) : u64{0};
    };
    put_few(key_of_element, scan.kept, keys, count);
  }
  const int found = count;
  u64* out = scan.keys + (row * scan.num_parts + blockIdx.x) * scan.kept;
  for (int i = found + threadIdx.x; i < scan.kept; i += SCAN_THREADS) out[i] = 0;
  if (found <= SCAN_THREADS) {
    // Its place is how many are before it: no two keys are equal.
    if (threadIdx.x >= found) return;
    const u64 key = keys[threadIdx.x];
    int place = 0;
#pragma unroll 4
    for (int i = 0; i < found; ++i) place += keys[i] > key;
    if (place < scan.kept) out[place] = key;
    return;
  }
  const int padded = power_of_two(found);
  for (int i = found + threadIdx.x; i < padded; i += SCAN_THREADS) keys[i] = 0;
  __syncthreads();
  sort_keys(keys, padded);
  for (int i = threadIdx.x; i < scan.kept; i += SCAN_THREADS) out[i] = keys[i];
}

inline void launch_scan(const FdserveSample& c, const Scan& scan, cudaStream_t stream) {
  launch(scan_kernel, dim3(scan.num_parts, static_cast<unsigned>(c.rows)), dim3(SCAN_THREADS), scan_room(scan.kept) * sizeof(u64),
         stream, c, scan);
}

// Bytes of shared memory that `merge_keys` needs.
inline size_t merge_bytes(const Scan& scan) { return (scan.num_parts + 1) * scan.kept * sizeof(u64); }

// The `kept` largest of a row's keys in order, in shared memory, zeros behind the last. By the whole block, of which the last
// warp calls `beside` meanwhile.
template <class Beside>
__device__ const u64* merge_keys(const Scan& scan, int64_t row, u64* keys, Beside beside) {
  constexpr int AT_A_TIME = 4;
  const int kept = scan.kept, parts = scan.num_parts, count = parts * kept;
  u64* merged = keys + count;
  for (int i = threadIdx.x; i < count; i += blockDim.x) keys[i] = scan.keys[row * count + i];
  for (int i = threadIdx.x; i < kept; i += blockDim.x) merged[i] = 0;
  __syncthreads();
  if (threadIdx.x / WARP == blockDim.x / WARP - 1) beside();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const u64 key = keys[i];
    if (key == 0) continue;
    // Its place is how many are before it: in each part what a search says, in a few parts at a time. Most keys are soon
    // known to have none.
    int place = 0;
    for (int part = 0; part < parts && place < kept; part += AT_A_TIME) {
      int before[AT_A_TIME] = {};
      for (int step = power_of_two(kept + 1) / 2; step > 0; step /= 2)
#pragma unroll
        for (int j = 0; j < AT_A_TIME; ++j) {
          const int next = before[j] + step;
          if (part + j < parts && next <= kept && keys[(part + j) * kept + next - 1] > key) before[j] = next;
        }
#pragma unroll
      for (int j = 0; j < AT_A_TIME; ++j) place += before[j];
    }
    if (place < kept) merged[place] = key;
  }
  __syncthreads();
  return merged;
}

// Of a whole row.
struct Total {
  float peak, log_mass;
  bool broken;  // a NaN, or nothing finite at the top
};

// From the sums of a row's `count` blocks, `sum_of(block)`. By a whole warp, or every one.
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
