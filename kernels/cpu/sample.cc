// Sampling, a row a task: the token, then log-probabilities from two more passes over the logits where they are asked for.
#include "sample_row.h"

namespace fdserve {

void sample(const SampleCall& call) {
  parallel(call.rows, [&](int64_t row) { Row(call, row).run(); });
}

}  // namespace fdserve
