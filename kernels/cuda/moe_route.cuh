// Which experts a token takes and how much of each, and the slots in order of experts: see moe.cu.
#pragma once

#include "device.cuh"

namespace fdserve::cuda {
namespace {

constexpr int MAX_EXPERTS = 256, MAX_CHOICES = 16, ROUTE_THREADS = 512, GROUP_THREADS = 1024;

// Whether (value, id) comes before (other, other_id): larger first, then the lower id.
__device__ inline bool before(float value, int id, float other, int other_id) {
  return value > other || (value == other && id < other_id);
}

// A block has TOKENS tokens, in shared memory, and a warp two experts at a time: what it reads of the gate serves all of the
// block's tokens. Then a warp chooses for each token. Floor: the gate's bytes for each block over the cache's bandwidth.
template <class T, int TOKENS>
__global__ void __launch_bounds__(ROUTE_THREADS)
    route_kernel(const T* x, int64_t tokens, const float* gate, const float* bias, int hidden, int experts, int top_k,
                 float norm_min, int* chosen, float* weights) {
  __shared__ float scores[TOKENS][MAX_EXPERTS];
  static_assert(sizeof(scores) <= MOST_DECLARED, "the launch counts on it");
  T* rows = reinterpret_cast<T*>(dynamic_shared());  // [TOKENS][hidden]
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * TOKENS;
  const int count = tokens - first < TOKENS ? static_cast<int>(tokens - first) : TOKENS;
  for (int i = threadIdx.x * 8; i < TOKENS * hidden; i += ROUTE_THREADS * 8)
    *reinterpret_cast<uint4*>(rows + i) =
        i < count * hidden ? *reinterpret_cast<const uint4*>(x + first * hidden + i) : make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int expert = warp * 2; expert < experts; expert += ROUTE_THREADS / WARP * 2) {
    const float* gates[2] = {gate + static_cast<int64_t>(expert) * hidden,
                             gate + static_cast<int64_t>(min(expert + 1, experts - 1)) * hidden};
    float sums[2][TOKENS] = {};
#pragma unroll 4
    for (int i = lane * 4; i < hidden; i += WARP * 4) {
      const float4 g[2] = {*reinterpret_cast<const float4*>(gates[0] + i), *reinterpret_cast<const float4*>(gates[1] + i)};
#pragma unroll
      for (int token = 0; token < TOKENS; ++token) {
        const uint2 bits = *reinterpret_cast<const uint2*>(rows + token * hidden + i);
        T four[4];
        memcpy(four, &bits, 8);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& sum = sums[e][token];
          sum = __fmaf_rn(to_float(four[0]), g[e].x, sum), sum = __fmaf_rn(to_float(four[1]), g[e].y, sum);
          sum = __fmaf_rn(to_float(four[2]), g[e].z, sum), sum = __fmaf_rn(to_float(four[3]), g[e].w, sum);
        }
      }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float sum = warp_sum(sums[e][token]);
        if (lane == 0 && expert + e < experts) scores[token][expert + e] = sum;
      }
  }
  __syncthreads();
  if (warp >= count) return;
  float* const p = scores[warp];
  const int64_t token = first + warp;
  float peak = -INFINITY, mass = 0.0f;
  for (int expert = lane; expert < experts; expert += WARP) peak = p[expert] > peak ? p[expert] : peak;
  peak = warp_max(peak);
  for (int expert = lane; expert < experts; expert += WARP) mass += p[expert] = expf(p[expert] - peak);
  mass = warp_sum(mass);
  for (int expert = lane; expert < experts; expert += WARP) p[expert] /= mass;
  __syncwarp();
  int ids[MAX_CHOICES];
  unsigned taken[MAX_EXPERTS / WARP / 32 + 1] = {};  // bit i: this lane's i-th expert
  float total = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    float best = -INFINITY;
    int best_id = experts;
    for (int i = 0, expert = lane; expert < experts; ++i, expert += WARP)
      if (!(taken[i / 32] >> i % 32 & 1) && before(p[expert] + bias[expert], expert, best, best_id))
        best = p[expert] + bias[expert], best_id = expert;
    for (int bits = WARP / 2; bits > 0; bits /= 2) {
      const float other = __shfl_xor_sync(ALL, best, bits);
      const int other_id = __shfl_xor_sync(ALL, best_id, bits);
      if (before(other, other_id, best, best_id)) best = other, best_id = other_id;
    }
    if (best_id == experts) best_id = k;  // not a number anywhere: some expert must be named
    if (best_id % WARP == lane) taken[best_id / WARP / 32] |= 1u << best_id / WARP % 32;
    // Kept in ascending order.
    int at = k;
    for (; at > 0 && ids[at - 1] > best_id; --at) ids[at] = ids[at - 1];
    ids[at] = best_id;
    total += p[best_id];
  }
  total = total > norm_min ? total : norm_min;
  if (lane == 0)
    for (int k = 0; k < top_k; ++k) {
      chosen[token * top_k + k] = ids[k];
      weights[token * top_k + k] = to_float(from_float<T>(p[ids[k]] / total));
    }
}

// A block an expert: it counts the slots of the experts before it, then numbers its own; a thread has a stretch of them.
__global__ void __launch_bounds__(GROUP_THREADS)
    group_kernel(const int* chosen, int slots, int experts, int* first_slot, int* slot_of, int* chosen_at) {
  __shared__ int lesser[WARP], equals[WARP];
  const int expert = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  const int each = (slots + blockDim.x - 1) / blockDim.x;
  const int begin = min(static_cast<int>(threadIdx.x) * each, slots), end = min(begin + each, slots);
  int less = 0, equal = 0;
#pragma unroll 4
  for (int i = begin; i < end; ++i) less += chosen[i] < expert, equal += chosen[i] == expert;
  int upto = equal;
  for (int by = 1; by < WARP; by *= 2) {
    const int below = __shfl_up_sync(ALL, upto, by);
    if (lane >= by) upto += below;
    less += __shfl_xor_sync(ALL, less, by);
  }
  if (lane == WARP - 1) lesser[warp] = less, equals[warp] = upto;
  __syncthreads();
  int first = 0, before = 0, all = 0;
  for (int other = 0; other < warps; ++other) {
    first += lesser[other];
    if (other < warp) before += equals[other];
    all += equals[other];
  }
  if (threadIdx.x == 0) first_slot[expert] = first;
  if (threadIdx.x == 0 && expert == experts - 1) first_slot[experts] = first + all;
  int slot = first + before + upto - equal;
  for (int i = begin; i < end && equal > 0; ++i)
    if (chosen[i] == expert) {
      slot_of[i] = slot;
      chosen_at[slot++] = i;
    }
}

}  // namespace
}  // namespace fdserve::cuda
