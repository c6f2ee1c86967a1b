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

// One head of a sequence. Keys and values of its tokens lie in slots of the caches [num_blocks][kv_heads][block_size], of
// which there are fewer than 2^31.
struct PagedHead {
  const int* blocks;
  int block_size, kv_heads, head;

  __device__ int slot(int key) const {
    return (blocks[key / block_size] * kv_heads + head) * block_size + key % block_size;
  }
};

}  // namespace fdserve::cuda
