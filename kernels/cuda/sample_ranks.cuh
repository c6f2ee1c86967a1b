// What ranks that share the vocabulary write for each other, and where; see sample_ranks.cu.
#pragma once

#include "launchers.h"
#include "sample_params.cuh"
#include "sample_row.cuh"
#include "sample_scan.cuh"

namespace fdserve::cuda {

constexpr int CANDIDATES = 128;  // of each rank
constexpr int UNSETTLED = -3, ELSEWHERE = -4;  // in place of a token
constexpr u64 NO_CHOICE = 0, NO_NUMBER = ~u64{0};  // in place of a best key: everything is banned; a NaN or infinity came up

struct Answer {
  int token;  // ELSEWHERE: another rank has it
  float logit;
};

// What the ranks write for a row, one behind the other in bytes; and how they share the vocabulary.
struct Ranks {
  FdserveRanks c;
  int max_blocks, kept;

  __host__ __device__ int64_t offered_bytes() const { return max_blocks * 8 + kept * 8 + 8; }
  __host__ __device__ int64_t weighed_bytes() const { return (2 + CANDIDATES) * 8; }
  __host__ __device__ int64_t settled_bytes() const { return sizeof(Answer); }

  __host__ __device__ int width(int rank) const { return c.starts[rank + 1] - c.starts[rank]; }
  __host__ __device__ int blocks(int rank) const { return (width(rank) + SUM_BLOCK - 1) / SUM_BLOCK; }

  __device__ int owner(int token) const {
    int rank = 0;
    while (rank < c.ranks && token >= c.starts[rank + 1]) ++rank;
    return rank;
  }

  __device__ static Sum* sums_in(char* offered) { return reinterpret_cast<Sum*>(offered); }
  __device__ u64* keys_in(char* offered) const { return reinterpret_cast<u64*>(offered + max_blocks * 8); }
  __device__ u64* best_in(char* offered) const { return keys_in(offered) + kept; }

  // A rank's bytes of a row among all that were gathered.
  __device__ char* offered(int rank, int64_t row, int64_t rows) const { return of(c.offered, offered_bytes(), rank, row, rows); }
  __device__ const u64* weighed(int rank, int64_t row, int64_t rows) const {
    return reinterpret_cast<const u64*>(of(c.weighed, weighed_bytes(), rank, row, rows));
  }
  __device__ Answer settled(int rank, int64_t row, int64_t rows) const {
    return *reinterpret_cast<const Answer*>(of(c.settled, settled_bytes(), rank, row, rows));
  }
  __device__ static char* of(const void* all, int64_t bytes, int rank, int64_t row, int64_t rows) {
    return static_cast<char*>(const_cast<void*>(all)) + (rank * rows + row) * bytes;
  }
};

struct Room {
  Scan scan;
  Changed changed;
  int* tokens;  // [R], from settle to finish
};

// What all ranks know of a row once they have gathered the offers.
struct Known {
  Total total;
  u64 best = 0;

  __device__ Known(const Ranks& ranks, int64_t row, int64_t rows) {
    int count = 0;
    for (int rank = 0; rank < ranks.c.ranks; ++rank) {
      const u64 other = *ranks.best_in(ranks.offered(rank, row, rows));
      best = other > best ? other : best;
      count += ranks.blocks(rank);
    }
    total = total_of(count, [&](int block) {
      int rank = 0;
      for (; block >= ranks.blocks(rank); ++rank) block -= ranks.blocks(rank);
      return Ranks::sums_in(ranks.offered(rank, row, rows))[block];
    });
  }

  // Whether the row's token is drawn.
  __device__ bool draws(const Params& params) const {
    return !total.broken && params.forced < 0 && !params.greedy() && best != NO_CHOICE && best != NO_NUMBER;
  }

  // The token where it is not.
  __device__ int token(const Params& params) const {
    if (total.broken) return BROKEN;
    if (params.forced >= 0) return static_cast<int>(params.forced);
    return best == NO_CHOICE ? NOTHING_ALLOWED : best == NO_NUMBER ? BROKEN : id_of(best);
  }
};

// The kernels' arguments: the call on this rank's columns alone, and its room; returns the room's size.
inline int64_t lay_out(const FdserveSample* call, const FdserveRanks* shares, FdserveSample& part, Ranks& ranks, Room& room) {
  part = *call;
  ranks.c = *shares;
  ranks.max_blocks = 0;
  for (int rank = 0; rank < shares->ranks; ++rank)
    ranks.max_blocks = ranks.blocks(rank) > ranks.max_blocks ? ranks.blocks(rank) : ranks.max_blocks;
  part.first_id = shares->starts[shares->rank];
  part.vocab_size = ranks.width(shares->rank);
  room.scan = scan_of(part);
  ranks.kept = room.scan.kept;
  Places places(shares->workspace);
  room.scan.sums = places.take<Sum>(part.rows * room.scan.num_parts * BLOCKS_A_PART);
  room.scan.keys = places.take<u64>(part.rows * room.scan.num_parts * room.scan.kept);
  room.changed.logits = places.take<float>(part.rows * part.stride);
  room.changed.seen = places.take<int>(part.rows * part.stride);
  room.tokens = places.take<int>(part.rows);
  return places.size;
}

// Whether the kernels can do it: parts are whole blocks of sums, and none is empty.
inline bool is_possible(const FdserveSample* call, const FdserveRanks* ranks) {
  bool possible = call->num_top <= MAX_TOP && ranks->ranks >= 1 && ranks->ranks <= FDSERVE_MAX_RANKS;
  for (int rank = 0; possible && rank < ranks->ranks; ++rank)
    possible = ranks->starts[rank] % SUM_BLOCK == 0 && ranks->starts[rank + 1] > ranks->starts[rank];
  return possible && ranks->starts[0] == 0 && ranks->starts[ranks->ranks] == call->vocab_size;
}

}  // namespace fdserve::cuda
