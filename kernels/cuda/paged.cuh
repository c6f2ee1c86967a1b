// The sequences of a step over a paged cache.
#pragma once

#include "device.cuh"
#include "launchers.h"

namespace fdserve::cuda {

// FdservePaged on the device.
struct Paged : FdservePaged {
  Paged() = default;
  explicit Paged(const FdservePaged& paged) : FdservePaged(paged) {}

  // The sequence of a token: the last whose tokens begin at or before it.
  __device__ int sequence_of(int token) const {
    int sequence = 0;
    for (int low = 1, high = sequences - 1; low <= high;) {
      const int middle = (low + high) / 2;
      if (query_starts[middle] <= token)
        sequence = middle, low = middle + 1;
      else
        high = middle - 1;
    }
    return sequence;
  }
};

// One head's keys or values of a sequence: element [key][head_dim].
template <class T>
struct PagedHead {
  const T* cache;  // [num_blocks][kv_heads][block_size][head_dim]
  const int* blocks;
  int block_size, kv_heads, head, head_dim;

  __device__ const T* row(int key) const {
    const int64_t block = blocks[key / block_size];
    return cache + ((block * kv_heads + head) * block_size + key % block_size) * head_dim;
  }
};

}  // namespace fdserve::cuda
