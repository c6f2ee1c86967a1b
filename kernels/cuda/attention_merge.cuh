// Puts the parts of a row's keys together, where attention has shared them out among blocks. Floor: 4 bytes written and read
// an element and part.
#pragma once

#include "attention_tasks.cuh"

namespace fdserve::cuda {

// Merges a row's parts, element by element: `part_of` points at one. `end` keys were seen.
template <class T, class PartOf>
__device__ void merge_parts(int end, int head_dim, PartOf part_of, T* out) {
  const int parts = (end + KEY_PART - 1) / KEY_PART, element = threadIdx.x;
  float peak = NONE, mass = 0.0f, sum = 0.0f;
#pragma unroll 4
  for (int part = 0; part < parts; ++part) {
    const float* from = part_of(part);
    const Merge merge(peak, from[head_dim]);
    peak = merge.peak;
    mass = merge(mass, from[head_dim + 1]);
    sum = merge(sum, from[element]);
  }
  out[element] = from_float<T>(__fmul_rn(sum, __fdiv_rn(1.0f, mass)));
}

// A block a (sequence, row of a key/value head), a thread an element.
template <class T>
__global__ void merge_narrow_kernel(T* out, Call call) {
  const int sequence = blockIdx.x / call.plan.narrow_rows, row = blockIdx.x % call.plan.narrow_rows, head = blockIdx.y;
  const int token = call.paged.query_starts[sequence];
  const int rows = (call.paged.query_starts[sequence + 1] - token) * call.group;
  const int end = call.paged.context_lens[sequence] + row / call.group + 1;
  if (row >= rows || rows > ROW_TILE) return;
  const int64_t place = static_cast<int64_t>(token + row / call.group) * call.heads + head * call.group + row % call.group;
  merge_parts(end, call.head_dim,
              [&](int part) { return narrow_part(call, sequence, head, row, part); }, out + place * call.head_dim);
}

// A block a (token, head).
template <class T>
__global__ void merge_wide_kernel(T* out, Call call) {
  const int token = blockIdx.x, sequence = call.paged.sequence_of(token), first = call.paged.query_starts[sequence];
  if ((call.paged.query_starts[sequence + 1] - first) * call.group <= ROW_TILE) return;
  const int64_t place = static_cast<int64_t>(token) * call.heads + blockIdx.y;
  merge_parts(call.paged.context_lens[sequence] + token - first + 1, call.head_dim,
              [&](int part) { return wide_part(call, place, part); }, out + place * call.head_dim);
}

}  // namespace fdserve::cuda
