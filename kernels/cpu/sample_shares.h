// Rows that ranks sample together: what is to be done for each, and which part of it is whose.
#pragma once

#include <memory>
#include <vector>

#include "collectives.h"
#include "sample_row.h"

namespace fdserve {

struct Peaks {
  float raw, processed;
  int32_t first;  // id of the processed logits' peak, where that is the token
  bool raw_nan, processed_nan;
};

enum class Draw { kNone, kFew, kPlain, kNucleus };

// What is to be done for a row and what is known of it; the same on every rank, but for the last.
struct Work {
  Peaks peaks = {-INF, -INF, -1, false, false};
  Draw draw = Draw::kNone;
  bool logprobs = false;
  bool whole = false;  // on the gathered row
  int32_t token = BROKEN;
  int owner = -1;         // the rank that answers for the row, -1 if none needs to
  double target = 0;      // what the running weight of the owner's part must pass
  double log_total = 0;
  std::unique_ptr<LeadingSearch> search;
  Part part;  // of this rank
};

// Rows [begin, end) of a call.
struct Shares {
  const SampleCall& whole;  // its logits are the rank's part
  SampleCall mine;          // of the part alone
  const Shared& shared;
  const int64_t* starts;
  const int64_t begin, rows;
  std::vector<Work> work;

  Shares(const SampleCall& call, const Shared& shared, const int64_t* starts, int64_t begin, int64_t end)
      : whole(call), mine(call), shared(shared), starts(starts), begin(begin), rows(end - begin), work(rows) {
    mine.first_id = starts[shared.rank];
    mine.vocab_size = width(shared.rank);
  }

  const float* params(int64_t i) const { return whole.float_params + (begin + i) * 6; }
  const int64_t* ints(int64_t i) const { return whole.int_params + (begin + i) * 4; }
  int32_t mode(int64_t i) const { return whole.logprob_modes == nullptr ? 0 : whole.logprob_modes[begin + i]; }
  int64_t width(int rank) const { return starts[rank + 1] - starts[rank]; }
  int owner_of(int64_t id) const {
    int rank = 0;
    while (id >= starts[rank + 1]) ++rank;
    return rank;
  }

  // A row of the rank's part; and of the whole call, whose logits are not there.
  Row part_of(int64_t i) const { return Row(mine, begin + i); }
  Row row_of(int64_t i) const { return Row(whole, begin + i); }

  Weighing drawn(int64_t i) const { return {work[i].peaks.processed, 1.0f / params(i)[0]}; }
  Weighing told(int64_t i) const {
    const bool scaled = (mode(i) & TEMPERATURE_SCALED) != 0 && params(i)[0] >= GREEDY_TEMPERATURE;
    return {work[i].peaks.raw, scaled ? 1.0f / params(i)[0] : 1.0f};
  }
  float logprob(int64_t i, float logit) const {
    return static_cast<float>((double{logit} - told(i).peak) * told(i).inverse - work[i].log_total);
  }

  // How a token is drawn, unless the peaks leave nothing to draw.
  Draw draw_of(int64_t i) const {
    if (ints(i)[3] >= 0 || !(params(i)[0] >= GREEDY_TEMPERATURE)) return Draw::kNone;
    if (ints(i)[0] > 0 && ints(i)[0] < whole.vocab_size) return Draw::kFew;
    return params(i)[1] < 1 || params(i)[2] > 0 ? Draw::kNucleus : Draw::kPlain;
  }

  // How many of a row's largest it is drawn from, if they are exchanged one by one.
  int64_t candidates(int64_t i) const { return draw_of(i) == Draw::kFew && ints(i)[0] <= FEW ? ints(i)[0] : 0; }

  // Of the rank's part; `changed` is null where no bias, penalty or mask applies.
  Peaks peaks_of(int64_t i, const float* raw, const float* changed) const {
    const FloatKernels& floats = float_kernels();
    Peaks peaks = {};
    peaks.first = static_cast<int32_t>(mine.first_id);
    peaks.raw = floats.peak(raw, mine.vocab_size, &peaks.raw_nan);
    peaks.processed = peaks.raw, peaks.processed_nan = peaks.raw_nan;
    if (changed) peaks.processed = floats.peak(changed, mine.vocab_size, &peaks.processed_nan);
    if (draw_of(i) == Draw::kNone) {
      int32_t at = 0;
      floats.at_least(changed ? changed : raw, mine.vocab_size, peaks.processed, &at, 1);
      peaks.first += at;
    }
    return peaks;
  }

  static void add_peaks(const Peaks& theirs, Peaks& all) {
    all.raw = std::max(all.raw, theirs.raw);
    all.raw_nan |= theirs.raw_nan;
    all.processed_nan |= theirs.processed_nan;
    if (theirs.processed > all.processed || all.first < 0) all.processed = theirs.processed, all.first = theirs.first;
  }

  // What there is to do, the peaks being known.
  void decide(int64_t i) {
    Work& row = work[i];
    const Peaks& peaks = row.peaks;
    if (peaks.raw_nan || !std::isfinite(peaks.raw)) return;
    row.logprobs = mode(i) >= 0;
    row.whole = row.logprobs && (((mode(i) & TOP_P_NORMALIZED) != 0 && params(i)[1] < 1) || whole.num_top > FEW);
    if (ints(i)[3] >= 0) {
      row.token = static_cast<int32_t>(ints(i)[3]);
    } else if (peaks.processed == -INF && !peaks.processed_nan) {
      row.token = NOTHING_ALLOWED;
    } else if (peaks.processed_nan || !std::isfinite(peaks.processed)) {
      row.token = BROKEN;
    } else if (!(params(i)[0] >= GREEDY_TEMPERATURE)) {
      row.token = peaks.first;
    } else {
      row.draw = draw_of(i);
      row.whole |= row.draw == Draw::kFew && candidates(i) == 0;
    }
    if (row.whole) row.draw = Draw::kNone;
  }
};

}  // namespace fdserve
