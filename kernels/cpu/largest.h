// The largest elements of a row, in order.
//
// Floor: one pass over the row, for those that reach what samples say few do. If that fails they are a leading set.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "leading.h"

namespace fdserve {

constexpr int64_t FEW = 256;  // no more of the largest are drawn from, or exchanged, one by one

struct Candidate {
  float logit, weight;
  int32_t id;
};

// The order of candidates: (logit descending, id ascending).
inline bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

inline Goal first_of(int64_t count, int64_t size) {
  return {0, static_cast<double>(count), static_cast<double>(size), -INF};
}

// What somewhat more than `count` elements likely reach, by samples; -INF if these say nothing.
inline float likely_bar(const float* x, int64_t size, int64_t count) {
  constexpr int64_t SAMPLES = 256;
  const double expected = static_cast<double>(count) * SAMPLES / static_cast<double>(size);
  const int64_t rank = static_cast<int64_t>(expected + 3 * std::sqrt(expected)) + 3;
  if (size < 16 * SAMPLES || rank >= SAMPLES / 8) return -INF;
  float samples[SAMPLES];
  for (int64_t i = 0; i < SAMPLES; ++i) samples[i] = x[i * (size / SAMPLES)];
  std::nth_element(samples, samples + rank, samples + SAMPLES, [](float a, float b) { return a > b; });
  return samples[rank];
}

// The `count` largest in order (weights unset).
inline std::vector<Candidate> largest(const float* logits, int64_t size, int64_t count) {
  std::vector<Candidate> best;
  count = std::min(count, size);
  if (count <= 0) return best;
  constexpr int64_t ROOM = 4096;
  int32_t ids[ROOM];
  const float bar = likely_bar(logits, size, count);
  const int64_t found = bar > -INF ? float_kernels().at_least(logits, size, bar, ids, ROOM) : 0;
  if (found >= count && found < ROOM) {
    for (int64_t i = 0; i < found; ++i) best.push_back({logits[ids[i]], 0, ids[i]});
    std::nth_element(best.begin(), best.begin() + (count - 1), best.end(), before);
    best.resize(static_cast<size_t>(count));
  } else {
    Part part;
    Leading leading = lead(logits, size, {}, first_of(count, size), part).leading();
    for (int64_t i = 0; i < size; ++i)
      if (logits[i] > leading.value || (logits[i] == leading.value && leading.equals-- > 0))
        best.push_back({logits[i], 0, static_cast<int32_t>(i)});
  }
  std::sort(best.begin(), best.end(), before);
  return best;
}

}  // namespace fdserve
