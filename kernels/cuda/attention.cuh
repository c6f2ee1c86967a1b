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
constexpr int ROW_TILE = 16;       // rows of a warp
constexpr float NONE = -INFINITY;  // the peak of a row that has seen no key

// Shared tiles hold rows of HD elements in chunks of 16 bytes, permuted so that eight rows' equal chunks lie in eight
// different groups of banks.
template <int HD>
__device__ inline int chunk_at(int row, int chunk) { return row * HD + (chunk ^ row % 8) * 8; }

// Starts the copy of keys [first, first + 64) into `tile`; zeros from `end` on.
template <class T, int HD, int THREADS>
__device__ void copy_tile(const PagedHead<T>& from, int first, int end, T* tile) {
  constexpr int CHUNKS = HD / 8;
  for (int i = threadIdx.x; i < KEY_TILE * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS, key = first + row;
    const bool there = key < end;
    copy_async_16(tile + chunk_at<HD>(row, chunk), (there ? from.row(key) : from.cache) + chunk * 8, there);
  }
}

// The fragment of 16 rows of `tile` and elements [16 step, 16 step + 16).
template <int HD, class T>
__device__ void load_rows(uint32_t (&a)[4], const T* tile, int first_row, int step) {
  const int lane = threadIdx.x % WARP;
  ldmatrix_x4(a, tile + chunk_at<HD>(first_row + lane % 16, step * 2 + lane / 16));
}

// scores += rows x keys [16 pair, 16 pair + 16) of the tile, over elements [16 step, 16 step + 16); two tiles of 8 keys.
template <int HD, class T>
__device__ void score_keys(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const T* keys, int pair, int step) {
  const int lane = threadIdx.x % WARP, matrix = lane / 8;
  uint32_t b[4];
  ldmatrix_x4(b, keys + chunk_at<HD>(pair * 16 + matrix / 2 * 8 + lane % 8, step * 2 + matrix % 2));
  mma_16816<T>(left, a, {b[0], b[1]});
  mma_16816<T>(right, a, {b[2], b[3]});
}

// values += weights of keys [16 step, 16 step + 16) x their columns [16 pair, 16 pair + 16).
template <int HD, class T>
__device__ void weigh_values(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const T* values, int pair, int step) {
  const int lane = threadIdx.x % WARP, matrix = lane / 8;
  uint32_t b[4];
  ldmatrix_x4_transposed(b, values + chunk_at<HD>(step * 16 + matrix % 2 * 8 + lane % 8, pair * 2 + matrix / 2));
  mma_16816<T>(left, a, {b[0], b[1]});
  mma_16816<T>(right, a, {b[2], b[3]});
}

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  union { T halves[2]; uint32_t pair; } both;
  both.halves[0] = from_float<T>(low);
  both.halves[1] = from_float<T>(high);
  return both.pair;
}

// The fragment of a tile's weights of keys [16 step, 16 step + 16).
template <class T>
__device__ inline void weights_of(uint32_t (&a)[4], const float (&weights)[8][4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = pack<T>(weights[step * 2 + i / 2][i % 2 * 2], weights[step * 2 + i / 2][i % 2 * 2 + 1]);
}

// A lane's share of the softmax state of two rows (group and group + 8) in one part.
struct Softmax {
  float peak[2] = {NONE, NONE};
  float mass[2] = {0.0f, 0.0f};  // of this lane's columns alone, until `total_mass`
};

// The power of two by which a state with peak `from` is scaled to one with peak `to`; scores count in powers of two.
__device__ inline float rescale(float from, float to, float scale) {
  return from == NONE ? 0.0f : exp2f(__fmul_rn(__fadd_rn(from, -to), scale));
}

// Turns a tile's scores, as a warp's fragments (8 tiles of 8 keys), into weights, in place; returns by what the values so
// far are to be multiplied. Row `half` of a lane sees keys below `seen[half]` of this tile.
__device__ inline void weigh(float (&scores)[8][4], Softmax& state, const int (&seen)[2], float scale, float (&factor)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float peak = state.peak[half];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[j][half * 2 + i];
        if (j * 8 + column + i >= seen[half]) score = NONE;
        peak = score > peak ? score : peak;
      }
    for (int bits = 1; bits <= 2; bits *= 2) {
      const float other = __shfl_xor_sync(ALL, peak, bits);
      peak = other > peak ? other : peak;
    }
    factor[half] = peak == NONE ? 1.0f : rescale(state.peak[half], peak, scale);
    if (peak == state.peak[half]) factor[half] = 1.0f;
    float mass = __fmul_rn(state.mass[half], factor[half]);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[j][half * 2 + i];
        score = rescale(score, peak, scale);
        mass = __fadd_rn(mass, score);
      }
    state.peak[half] = peak;
    state.mass[half] = mass;
  }
}

__device__ inline float total_mass(float mass) {
  for (int bits = 1; bits <= 2; bits *= 2) mass = __fadd_rn(mass, __shfl_xor_sync(ALL, mass, bits));
  return mass;
}

// Merging the state of a part into that of the parts before it.
struct Merge {
  float peak, before, part;  // the new peak, and the factors of the two

  __device__ Merge(float peak_before, float peak_part, float scale) {
    peak = peak_part > peak_before ? peak_part : peak_before;
    before = peak == NONE ? 0.0f : rescale(peak_before, peak, scale);
    part = peak == NONE ? 0.0f : rescale(peak_part, peak, scale);
  }
  __device__ float operator()(float x_before, float x_part) const {
    return __fmaf_rn(x_part, part, __fmul_rn(x_before, before));
  }
};

}  // namespace fdserve::cuda
