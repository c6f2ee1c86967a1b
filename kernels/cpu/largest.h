// The largest elements of a row, in order.
//
// Floor: two passes over the row, for the peaks of its blocks and for what reaches the bar that these set. Where there are
// too many equals, or too few blocks, they are a leading set.
#pragma once

#include <algorithm>
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

// What at least `count` elements reach, and hardly more: so many blocks' peaks do. -INF if there are too few blocks.
inline float bar_of(const float* x, int64_t size, int64_t count) {
  const int64_t block = size / 256 >= 4 * count ? 256 : 64, blocks = size / block;
  if (blocks < 2 * count) return -INF;
  std::vector<float> peaks(static_cast<size_t>(blocks));
  bool has_nan;
  for (int64_t i = 0; i < blocks; ++i) peaks[static_cast<size_t>(i)] = float_kernels().peak(x + i * block, block, &has_nan);
  std::nth_element(peaks.begin(), peaks.begin() + (count - 1), peaks.end(), [](float a, float b) { return a > b; });
  return peaks[static_cast<size_t>(count - 1)];
}

// The `count` largest in order (weights unset).
inline std::vector<Candidate> largest(const float* logits, int64_t size, int64_t count) {
  std::vector<Candidate> best;
  count = std::min(count, size);
  if (count <= 0) return best;
  constexpr int64_t ROOM = 4096;
  int32_t ids[ROOM];
  const float bar = bar_of(logits, size, count);
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
