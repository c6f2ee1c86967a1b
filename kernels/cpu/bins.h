// A few elements by value, so that where their weight reaches something is found without sorting them.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>
#include <vector>

#include "leading_part.h"

namespace fdserve {

// Elements by value: bins of equal width, the higher the larger.
class Bins {
 public:
  static constexpr int COUNT = 256;

  // What the elements weigh of a bin and of all higher ones; and the squares of what they weigh, about.
  double weight_from[COUNT + 1] = {}, squares_from[COUNT + 1] = {};

  // Of those in [low, high).
  Bins(const std::vector<float>& x, const std::vector<float>& w, float low, float high) {
    find_ends(x, low, high, 4);
    if (most > least) scale = std::min(COUNT / (most - least), std::numeric_limits<float>::max());
    float one[COUNT] = {};
    for (size_t i = 0; i < x.size(); ++i) {
      if (!(x[i] >= low && x[i] < high)) continue;
      const int bin = bin_of(x[i]);
      weight_from[bin] += w[i], one[bin] = w[i];
    }
    for (int bin = COUNT; bin-- > 0;) {
      squares_from[bin] = squares_from[bin + 1] + weight_from[bin] * one[bin];
      weight_from[bin] += weight_from[bin + 1];
    }
  }

  int bin_of(float x) const { return static_cast<int>(std::min(std::max((x - least) * scale, 0.0f), COUNT - 1.0f)); }
  // No larger than some element.
  float start_of(int bin) const { return std::min(least + static_cast<float>(bin) / scale, most); }
  float end_of(int bin, float high) const {
    return bin + 1 < COUNT ? std::min(least + static_cast<float>(bin + 1) / scale, high) : high;
  }

  // The highest bin from which on elements weigh `target`, or the lowest of all.
  int reaching(double target) const {
    const auto falls_short = [target](double weight) { return weight < target; };
    const auto top = std::make_reverse_iterator(weight_from + COUNT), bottom = std::make_reverse_iterator(weight_from);
    return std::max(static_cast<int>(std::find_if_not(top, bottom, falls_short).base() - weight_from) - 1, 0);
  }

 private:
  float least = INF, most = -INF, scale = 1;

  // Of about every `step`-th element; what is beyond the ends counts into the outermost bins.
  void find_ends(const std::vector<float>& x, float low, float high, size_t step) {
    for (size_t i = 0; i < x.size(); i += step) {
      if (!(x[i] >= low && x[i] < high)) continue;
      least = std::min(least, x[i]), most = std::max(most, x[i]);
    }
    if (most < least && step > 1) return find_ends(x, low, high, 1);
    least = std::max(least, -std::numeric_limits<float>::max() / 4);
  }
};

}  // namespace fdserve
