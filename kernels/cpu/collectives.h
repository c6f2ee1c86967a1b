// Collectives between the ranks of one host, through memory that they share.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fdserve {

// The shared memory: a line of 64 bytes for each rank, then two sets of `ranks` slots of `slot_bytes` each.
struct Shared {
  void* memory;
  int64_t slot_bytes;
  int rank, ranks;
  const int* peers;  // descriptors that hang up when a peer is gone
  int num_peers;
};

inline int64_t shared_bytes(int64_t ranks, int64_t slot_bytes) { return 64 * ranks + 2 * ranks * slot_bytes; }

// Both return false if a peer is gone. `turn` counts the collectives, from 1, and is the same on every rank.

// out[size] = the sum of the ranks' x[size], added in float32 in rank order and rounded once.
bool all_reduce(const Shared& shared, uint32_t turn, const void* x, int64_t size, Dtype dtype, void* out);

// out[rows][ranks * width]: each rank's x[rows][width], side by side in rank order; `width` in bytes.
bool all_gather(const Shared& shared, uint32_t turn, const void* x, int64_t rows, int64_t width, void* out);

}  // namespace fdserve
