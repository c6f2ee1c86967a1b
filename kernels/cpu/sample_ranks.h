// Sampling by ranks that share the vocabulary.
#pragma once

#include "collectives.h"
#include "kernels.h"

namespace fdserve {

// As `sample`, called by all ranks with equal arguments but the logits, which are the columns starts[rank] to
// starts[rank + 1] of the vocabulary; all get the same results. False if a peer is gone. A slot must hold a rank's part of
// a row of logits, 16 KiB, and 16 bytes for each of `num_top`.
bool sample_ranks(const SampleCall& call, const Shared& shared, const int64_t* starts);

}  // namespace fdserve
