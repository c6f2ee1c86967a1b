// Rows that ranks do not sample by parts: a cut distribution's log-probabilities, or more than FEW of the largest.
// The ranks exchange their columns of such a row, and take them in turns.
#pragma once

#include <stdexcept>

#include "sample_shares.h"

namespace fdserve {

// Samples the rows that are `whole`, each on the rank that becomes its owner. False if a peer is gone.
inline bool sample_whole(Shares& shares) {
  const Shared& shared = shares.shared;
  std::vector<int64_t> taken;
  for (int64_t i = 0; i < shares.rows; ++i)
    if (shares.work[i].whole) shares.work[i].owner = static_cast<int>(taken.size()) % shared.ranks, taken.push_back(i);
  int64_t widest = 0;
  for (int rank = 0; rank < shared.ranks; ++rank) widest = std::max(widest, shares.width(rank));
  const int64_t count = static_cast<int64_t>(taken.size()), fits = shared.slot_bytes / (widest * 4);
  if (count > 0 && fits == 0) throw std::invalid_argument("a slot must hold a rank's part of a row of logits");
  for (int64_t from = 0; from < count; from += fits) {
    const int64_t to = std::min(count, from + fits);
    for (int64_t k = from; k < to; ++k)
      std::memcpy(room(shared) + (k - from) * widest * 4, shares.part_of(taken[k]).logits(),
                  static_cast<size_t>(shares.mine.vocab_size) * 4);
    if (!meet(shared, (to - from) * widest * 4)) return false;
    parallel(to - from, [&](int64_t k) {
      const int64_t i = taken[from + k];
      if (shares.work[i].owner != shared.rank) return;
      float* logits = scratch<float>(kScratchCall, shares.whole.vocab_size);
      for (int rank = 0; rank < shared.ranks; ++rank)
        std::memcpy(logits + shares.starts[rank], part(shared, rank) + k * widest * 4, static_cast<size_t>(shares.width(rank)) * 4);
      Row(shares.whole, shares.begin + i, logits).run();
    });
  }
  return true;
}

}  // namespace fdserve
