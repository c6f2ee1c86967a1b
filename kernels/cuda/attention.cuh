// The arithmetic of attention that all its kernels share, so that a token's result does not depend on which of them
// computed it, or with which other tokens.
//
// Rows are (query token, head of a key/value head's group). Keys are taken in tiles of 64 at absolute positions, tiles in
// parts of 1024. Inside a part the softmax runs online, tile by tile; parts are merged in order. A row's numbers never meet
// another row's: scores and weighted values come from mma instructions in order of the head dimension and of the keys, and
// a row's sum from the same lanes in the same order everywhere. Roundings are spelled out (__fmaf_rn, __fmul_rn), for the
// compiler fuses as it likes. Keys that a row must not see change nothing in its state, to the bit.
#pragma once

#include "paged.cuh"

namespace fdserve::cuda {

constexpr int KEY_TILE = 64;
constexpr int KEY_PART = 1024;
constexpr int ROW_TILE = 16;       // rows of an mma instruction
constexpr float NONE = -INFINITY;  // the peak of a row that has seen no key

// Shared tiles hold rows of HD elements in chunks of 16 bytes, permuted so that eight rows' equal chunks lie in eight
// different groups of banks.
template <int HD>
__device__ inline int chunk_at(int row, int chunk) { return row * HD + (chunk ^ row % 8) * 8; }

// Fragments come from where a lane's chunk of the first one lies; other chunks differ from it in bits of the address alone,
// so that a few registers and constants lead to all of them.
__device__ inline Shared chunk_from(Shared first, int step) { return (first ^ step % 4 * 32) + step / 4 * 128; }

template <int HD, class T>
__device__ Shared rows_at(const T* tile) {
  const int lane = threadIdx.x % WARP;
  return shared_at(tile + chunk_at<HD>(lane % 16, lane / 16));
}
template <int HD, class T>
__device__ Shared keys_at(const T* tile) {
  const int lane = threadIdx.x % WARP;
  return shared_at(tile + chunk_at<HD>(lane / 16 * 8 + lane % 8, lane / 8 % 2));
}
template <int HD, class T>
__device__ Shared values_at(const T* tile) {
  const int lane = threadIdx.x % WARP;
  return shared_at(tile + chunk_at<HD>(lane % 16, lane / 16));
}

// The fragment of 16 rows and elements [16 step, 16 step + 16).
template <int HD>
__device__ void load_rows(uint32_t (&a)[4], Shared rows, int step) { ldmatrix_x4(a, chunk_from(rows, step)); }

// The fragments of keys [16 pair, 16 pair + 16), elements [16 step, 16 step + 16): two registers for each 8 keys.
template <int HD>
__device__ void load_keys(uint32_t (&b)[4], Shared keys, int pair, int step) {
  ldmatrix_x4(b, chunk_from(keys, step) + pair * 16 * HD * 2);
}

// Those of values of keys [16 step, 16 step + 16), columns [16 pair, 16 pair + 16): two registers for each 8 columns.
template <int HD>
__device__ void load_values(uint32_t (&b)[4], Shared values, int pair, int step) {
  ldmatrix_x4_transposed(b, chunk_from(values, pair) + step * 16 * HD * 2);
}

// left += a x the first half of b, right += a x the second.
template <class T>
__device__ inline void multiply(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_16816<T>(left, a, {b[0], b[1]});
  mma_16816<T>(right, a, {b[2], b[3]});
}

// The fragment of a tile's weights of keys [16 step, 16 step + 16).
template <class T>
__device__ inline void weights_of(uint32_t (&a)[4], const float (&weights)[8][4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = pack<T>(weights[step * 2 + i / 2][i % 2 * 2], weights[step * 2 + i / 2][i % 2 * 2 + 1]);
}

// A lane's share of the softmax state of two rows (group and group + 8) in one part. Peaks count in powers of two.
struct Softmax {
  float peak[2] = {NONE, NONE};
  float mass[2] = {0.0f, 0.0f};  // of this lane's columns alone, until `total_mass`
};

// By what a state with peak `from` is multiplied to have the peak `to`, which is not lower.
__device__ inline float rescale(float from, float to) {
  return from == to ? 1.0f : exp2_approx(__fadd_rn(from, -to));
}

// Takes the keys that a row does not see out of a tile's scores, as a warp's fragments (8 tiles of 8 keys): row `half` of a
// lane sees those below `seen[half]`.
__device__ inline void hide(float (&scores)[8][4], const int (&seen)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (j * 8 + column + i % 2 >= seen[i / 2]) scores[j][i] = NONE;
}

// Turns a tile's scores into weights, in place; returns by what the values so far are to be multiplied. `scale` is positive.
__device__ inline void weigh(float (&scores)[8][4], Softmax& state, float scale, float (&factor)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float peak = NONE;
#pragma unroll
    for (int j = 0; j < 8; ++j) peak = fmaxf(peak, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
    for (int bits = 1; bits <= 2; bits *= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, bits));
    peak = fmaxf(state.peak[half], __fmul_rn(peak, scale));
    factor[half] = rescale(state.peak[half], peak);
    const float base = peak == NONE ? 0.0f : -peak;  // a row that has seen nothing has weights of 0
    float mass = __fmul_rn(state.mass[half], factor[half]);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[j][half * 2 + i];
        score = exp2_approx(__fmaf_rn(score, scale, base));
        mass = __fadd_rn(mass, score);
      }
    state.peak[half] = peak;
    state.mass[half] = mass;
  }
}

// Multiplies the values so far. Most tiles do not raise a peak, and to multiply by 1 changes nothing.
template <int N>
__device__ inline void scale_values(float (&sums)[N][4], const float (&factor)[2]) {
  if (__all_sync(ALL, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = __fmul_rn(sums[j][i], factor[i / 2]);
}

__device__ inline float total_mass(float mass) {
  for (int bits = 1; bits <= 2; bits *= 2) mass = __fadd_rn(mass, __shfl_xor_sync(ALL, mass, bits));
  return mass;
}

// Merging the state of a part into that of the parts before it.
struct Merge {
  float peak, before, part;  // the new peak, and the factors of the two

  __device__ Merge(float peak_before, float peak_part) {
    peak = fmaxf(peak_before, peak_part);
    before = peak == NONE ? 0.0f : rescale(peak_before, peak);
    part = peak == NONE ? 0.0f : rescale(peak_part, peak);
  }
  __device__ float operator()(float x_before, float x_part) const {
    return __fmaf_rn(x_part, part, __fmul_rn(x_before, before));
  }
};

}  // namespace fdserve::cuda
