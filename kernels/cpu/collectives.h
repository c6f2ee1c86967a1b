// Collectives between ranks: through memory that they share on one host, or by whatever else exchanges bytes.
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
  // Where ranks share no memory, and `memory` is this rank's own: brings the others' first `bytes` of their slots into
  // theirs of this set of slots. False if a peer is gone. Null: the memory is shared.
  bool (*exchange)(char* slots, int64_t bytes);
};

inline int64_t shared_bytes(int64_t ranks, int64_t slot_bytes) { return 64 * ranks + 2 * ranks * slot_bytes; }

// An exchange: each rank fills its `room` with at most `bytes`, the same number on all, `meet`s the others, and reads every
// `part` until it meets them again.
// `meet` returns false if a peer is gone, and so does `all_reduce`.
char* room(const Shared& shared);
bool meet(const Shared& shared, int64_t bytes);
const char* part(const Shared& shared, int rank);

// out[size] = the sum of the ranks' x[size], added in float32 in rank order and rounded once.
bool all_reduce(const Shared& shared, const void* x, int64_t size, Dtype dtype, void* out);

}  // namespace fdserve
