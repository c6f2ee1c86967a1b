// What a row's parameters ask for: which logits they change and how, how tokens are drawn, which log-probabilities are told.
#pragma once

#include "launchers.h"
#include "sample_row.cuh"

namespace fdserve::cuda {

constexpr float GREEDY_TEMPERATURE = 1e-5f;
constexpr int BROKEN = -1, NOTHING_ALLOWED = -2;  // in place of a token
constexpr int TEMPERATURE_SCALED = 1, TOP_P_NORMALIZED = 2;

struct Params {
  float temperature, top_p, min_p, repetition, presence, frequency;
  int64_t top_k, seed, position, forced;
  int mode;

  __device__ Params(const FdserveSample& c, int64_t row) {
    const float* floats = c.float_params + row * 6;
    const int64_t* ints = c.int_params + row * 4;
    temperature = floats[0], top_p = floats[1], min_p = floats[2];
    repetition = floats[3], presence = floats[4], frequency = floats[5];
    top_k = ints[0], seed = ints[1], position = ints[2], forced = ints[3];
    mode = c.logprob_modes == nullptr ? 0 : c.logprob_modes[row];
  }

  __device__ bool greedy() const { return !(temperature >= GREEDY_TEMPERATURE); }
  __device__ float inverse() const { return __fdiv_rn(1.0f, temperature); }
  // Whether all that the temperature leaves may be drawn.
  __device__ bool plain() const { return top_k <= 0 && !(top_p < 1.0f) && !(min_p > 0.0f); }

  // Of a mode other than the raw one: by what logits are multiplied, and whether top_p cuts.
  __device__ float told_inverse() const { return (mode & TEMPERATURE_SCALED) != 0 && !greedy() ? inverse() : 1.0f; }
  __device__ bool told_cut() const { return mode > 0 && (mode & TOP_P_NORMALIZED) != 0 && top_p < 1.0f; }
};

// Whether bias, penalties or a mask may change the row's logits. What it reads comes at once, whichever of it decides.
__device__ inline bool changes(const FdserveSample& c, const Params& params, int64_t row) {
  const bool has_history = c.history_offsets[row + 1] > c.history_offsets[row];
  const bool is_biased = c.bias_offsets[row + 1] > c.bias_offsets[row];
  const bool is_masked = c.masks != nullptr && c.mask_rows[row] >= 0;
  const bool is_penalized = params.repetition != 1.0f || params.presence != 0.0f || params.frequency != 0.0f;
  return (is_penalized && has_history) || is_biased || is_masked;
}

// Room for the rows that something changes.
struct Changed {
  float* logits;  // [R][stride]
  int* seen;      // [R][stride]: twice how often an id is in the output, plus 1 if it is anywhere in the history
};

// The row after bias, penalties and mask, into `room`; by the whole block. Returns its peak; infinite if a NaN came up.
static __device__ float change(const FdserveSample& c, const Params& params, const Changed& room, int64_t row,
                               DrawScratch& scratch) {
  const int size = static_cast<int>(c.vocab_size), first_id = static_cast<int>(c.first_id);
  const float* raw = c.logits + row * c.stride;
  float* changed = room.logits + row * c.stride;
  int* seen = room.seen + row * c.stride;
  for (int i = threadIdx.x; i < size; i += DRAW_THREADS) changed[i] = raw[i], seen[i] = 0;
  __syncthreads();
  for (int i = c.bias_offsets[row] + threadIdx.x; i < c.bias_offsets[row + 1]; i += DRAW_THREADS) {
    const int id = c.bias_ids[i] - first_id;
    if (id >= 0 && id < size) atomicAdd(&changed[id], c.bias_values[i]);
  }
  const int begin = c.history_offsets[row], end = c.history_offsets[row + 1];
  for (int i = begin + threadIdx.x; i < end; i += DRAW_THREADS) {
    const int id = c.history[i] - first_id;
    if (id < 0 || id >= size) continue;
    atomicOr(&seen[id], 1);
    if (i - begin >= c.prompt_lens[row]) atomicAdd(&seen[id], 2);
  }
  __syncthreads();
  const int mask = c.masks == nullptr ? -1 : c.mask_rows[row];
  const uint32_t* allowed = reinterpret_cast<const uint32_t*>(c.masks) + static_cast<int64_t>(mask < 0 ? 0 : mask) * c.mask_words;
  float peak = -INFINITY;
  bool has_nan = false;
  for (int i = threadIdx.x; i < size; i += DRAW_THREADS) {
    float x = changed[i];
    if (seen[i] != 0) x = x < 0.0f ? __fmul_rn(x, params.repetition) : __fdiv_rn(x, params.repetition);
    if (seen[i] >= 2) x = __fadd_rn(x, -__fmaf_rn(static_cast<float>(seen[i] / 2), params.frequency, params.presence));
    if (mask >= 0 && !(allowed[(first_id + i) / 32] >> (first_id + i) % 32 & 1)) x = -INFINITY;
    changed[i] = x;
    has_nan |= x != x;
    peak = x > peak ? x : peak;
  }
  peak = warp_max(has_nan ? INFINITY : peak);  // either way no token can be chosen
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch.sums[threadIdx.x / WARP] = __float_as_uint(peak);
  __syncthreads();
  for (int warp = 0; warp < DRAW_WARPS; ++warp) {
    const float other = __uint_as_float(static_cast<uint32_t>(scratch.sums[warp]));
    peak = other > peak ? other : peak;
  }
  __syncthreads();
  return peak;
}

// So much of `all` as top_p asks for.
__device__ inline u64 share(float top_p, u64 all) {
  return static_cast<u64>(ceil(static_cast<double>(top_p) * static_cast<double>(all)));
}

// Log-probabilities: of the logits as they are, and over integer mass.
__device__ inline float raw_logprob(float logit, float peak, float log_mass) {
  return __fadd_rn(__fadd_rn(logit, -peak), -log_mass);
}
__device__ inline float log_of_mass(u64 mass) { return static_cast<float>(log(static_cast<double>(mass) / UNIT)); }
__device__ inline float told_logprob(float logit, float peak, float inverse, float log_mass) {
  return __fmaf_rn(__fadd_rn(logit, -peak), inverse, -log_mass);
}

}  // namespace fdserve::cuda
