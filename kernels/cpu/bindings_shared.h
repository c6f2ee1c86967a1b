// How ops take what the ranks of a host share.
#pragma once

#include "bindings.h"
#include "collectives.h"

namespace fdserve::bindings {

// `memory` is an address in this process, `exchange` that of a function or 0.
inline Shared shared_of(int64_t memory, int64_t slot_bytes, int rank, int ranks, const std::vector<int>& peers,
                        int64_t exchange) {
  require(memory != 0 && ranks >= 1 && rank >= 0 && rank < ranks, "bad ranks");
  return {reinterpret_cast<void*>(memory), slot_bytes, rank, ranks, peers.data(), static_cast<int>(peers.size()),
          reinterpret_cast<bool (*)(char*, int64_t)>(exchange)};
}

inline void require_peers(bool all_there) {
  if (!all_there) PADDLE_THROW(common::errors::Unavailable("a rank that it computes with is gone"));
}

}  // namespace fdserve::bindings

#define FDSERVE_SHARED \
  "memory: int64_t", "slot_bytes: int64_t", "rank: int", "ranks: int", "peers: std::vector<int>", \
      "exchange: int64_t"
