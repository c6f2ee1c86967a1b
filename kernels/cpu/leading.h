// A row's leading set: its elements in order (value descending, index ascending), as many as are needed to reach a given
// weight.
//
// Nothing is sorted. Samples say about where the set ends; every part of the row is split at a bracket around that, and
// tells the weights and new samples of what lies in it; and so on, until the few that are left are known to all. The parts
// may be on several ranks: each decides the same from the same reports, and since weights add up exactly (kernels.h), what
// is found does not depend on the parts nor on the brackets.
//
// Floor: the passes of leading_part.h; three to five reports.
#pragma once

#include <utility>

#include "bins.h"
#include "leading_part.h"

namespace fdserve {

using Reports = std::vector<const Report*>;  // of the parts in their order

// How much of a row its leading set is: what reaches `needed` of `total`, or `share` of the total where that is not known yet
// (both 0); but only elements from `least` on, all of them if they do not reach it.
struct Goal {
  double share = 0, needed = 0, total = 0;
  float least = -INF;
};

class LeadingSearch {
 public:
  // From the parts' surveys, which are not looked at for all elements.
  LeadingSearch(Weighing how, const Goal& goal, const Reports& reports)
      : how(how),
        share(goal.share),
        needed(goal.needed),
        total(goal.total),
        low(goal.least),
        from_low(goal.total),
        bases(reports.size()),
        found(reports.size()) {
    if (needed == INF)
      from = until = low;
    else
      take_samples(reports), aim();
  }

  // Where to split next: those in [from, until) are copied together.
  float from = 0, until = 0;

  bool done() const { return is_done; }

  // The weight of the row, once a split was reported.
  double row_weight() const { return total; }

  // Of the whole row, and of one part; once it is done.
  const Leading& leading() const { return all; }
  const Leading& leading(size_t part) const { return found[part]; }

  // Takes the reports of a split; returns whether the parts shall accept it.
  bool take(const Reports& reports) {
    double above = base, reached = base, everything = 0;
    for (const Report* report : reports) {
      above += report->split.from_high, reached += report->split.from_low, everything += report->split.all;
    }
    if (total == 0) total = from_low = everything;
    if (needed == 0) needed = std::max(share * total, std::numeric_limits<double>::min());
    if (above >= needed) {
      low = until, from_low = above, is_reached = true;
      aim();
      return false;
    }
    if (reached < needed && (is_reached || from > low)) {
      high = from, from_high = reached;
      aim();
      return false;
    }
    for (size_t part = 0; part < bases.size(); ++part) bases[part] += reports[part]->split.from_high;
    base = from_high = above, from_low = reached, low = from, high = until;
    if (reached < needed)
      finish_with_all(reports);
    else if (std::nextafter(low, INF) == high)
      finish_at(low, base, reports);
    else if (all_are_told(reports))
      finish_among(reports);
    else
      take_samples(reports), is_narrowed = is_reached = true, source_low = low, source_high = high, aim();
    return true;
  }

 private:
  static constexpr double DEVIATIONS = 3;  // of the samples' guess, to either side
  static constexpr double ENOUGH = 6;      // that so many samples weigh as much as all makes them worth a guess of the head

  const Weighing how;
  const double share;
  double needed, total;
  float low, high = INF;           // the end is in [low, high)
  double from_low, from_high = 0;  // the weight of all elements from there on
  bool is_reached = false;         // whether it is known that `low` is low enough
  bool is_narrowed = false, is_done = false;
  float source_low = 0, source_high = 0;  // what is split is between these, once it is narrowed
  double base = 0;                        // the weight over it
  std::vector<double> bases;              // of each part
  Leading all;
  std::vector<Leading> found;
  std::vector<float> samples, masses;  // each with the weight that it stands for, relative to the others

  int parts() const { return static_cast<int>(bases.size()); }
  int64_t elements_of(const Report& report) const {
    const int64_t stride = stride_of(report.split.count, parts());
    return (report.split.count + stride - 1) / stride;
  }

  bool all_are_told(const Reports& reports) const {
    for (const Report* report : reports)
      if (!tells_all(report->split.count, parts())) return false;
    return true;
  }

  void take_samples(const Reports& reports) {
    int64_t longest = 1;
    for (const Report* report : reports) longest = std::max(longest, stride_of(report->split.count, parts()));
    samples.clear();
    for (const Report* report : reports)
      samples.insert(samples.end(), report->elements(), report->elements() + elements_of(*report));
    masses.resize(samples.size());
    float_kernels().weights(samples.data(), static_cast<int64_t>(samples.size()), how.peak, how.inverse, masses.data());
    float* mass = masses.data();
    for (const Report* report : reports) {
      const float each = static_cast<float>(stride_of(report->split.count, parts())) / static_cast<float>(longest);
      const int64_t count = elements_of(*report);
      if (each != 1)
        for (int64_t i = 0; i < count; ++i) mass[i] *= each;
      mass += count;
    }
  }

  // A bracket around where the end likely is, within [low, high).
  void aim() {
    from = low, until = high;
    guess(Bins(samples, masses, low, high));
    if (is_narrowed && from == source_low && until == source_high) {
      // The samples are too much alike: try the value of one alone.
      std::vector<float> x = samples;
      std::nth_element(x.begin(), x.begin() + static_cast<int64_t>(x.size()) / 2, x.end());
      from = until = x[x.size() / 2];
    }
    if (!(until > from)) until = std::nextafter(from, INF);
  }

  // By samples: what is to be left below the end is a part of what they weigh, give or take deviations of such a part.
  void guess(const Bins& bins) {
    const double sum = bins.weight_from[0], squares = bins.squares_from[0];
    if (!(sum > 0)) return;
    double rest = 1 - (needed - from_high) / (from_low - from_high);
    if (needed == 0) rest = 1 - share * weight_from(samples, masses, -INF) / sum;
    rest = std::min(std::max(rest, 0.0), 1.0);
    const double head = bins.squares_from[bins.reaching((1 - rest) * sum)];
    const double margin = DEVIATIONS * std::sqrt((1 - rest) * (1 - rest) * (squares - head) + rest * rest * head) / sum;
    // Before the row's weight is known it is likely more than samples say, if few weigh most: there is less to be left.
    double bottom = rest - margin;
    if (needed == 0) bottom = std::max(bottom, rest / 3);
    if (bottom > 0) from = std::max(low, bins.start_of(bins.reaching((1 - bottom) * sum)));
    if (rest + margin < 1 && sum * sum > ENOUGH * squares)
      until = bins.end_of(bins.reaching((1 - rest - margin) * sum), high);
  }

  static double weight_from(const std::vector<float>& x, const std::vector<float>& w, float threshold) {
    return float_kernels().mass_from(x.data(), w.data(), static_cast<int64_t>(x.size()), threshold);
  }

  void finish_with_all(const Reports& reports) {
    all = {std::nextafter(low, -INF), 0, from_low};
    for (size_t part = 0; part < found.size(); ++part)
      found[part] = {all.value, 0, bases[part] - reports[part]->split.from_high + reports[part]->split.from_low};
    is_done = true;
  }

  void finish_among(const Reports& reports) {
    take_samples(reports);
    const Bins bins(samples, masses, low, high);
    const int bin = bins.reaching(needed - base);
    double above = base + bins.weight_from[bin + 1];
    std::vector<std::pair<float, float>> last;
    for (size_t i = 0; i < samples.size(); ++i)
      if (bins.bin_of(samples[i]) == bin) last.push_back({samples[i], masses[i]});
    std::sort(last.begin(), last.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    size_t taken = 0;
    for (double reached = above; taken + 1 < last.size() && (reached += last[taken].second) < needed;) ++taken;
    const float end = last[taken].first, over = std::nextafter(end, INF);
    for (size_t i = 0; i < taken && last[i].first > end; ++i) above += last[i].second;
    for (size_t part = 0, first = 0; part < found.size(); ++part) {
      const int64_t own = elements_of(*reports[part]);
      bases[part] += float_kernels().mass_from(samples.data() + first, masses.data() + first, own, over);
      first += static_cast<size_t>(own);
    }
    finish_at(end, above, reports);
  }

  // With as many of those that equal `end` as are needed beyond what is over it: the first ones.
  void finish_at(float end, double above, const Reports& reports) {
    float each;
    float_kernels().weights(&end, 1, how.peak, how.inverse, &each);
    const double wanted = std::max(each > 0 ? std::ceil((needed - above) / each) : 1.0, 1.0);
    int64_t left = wanted < 1e9 ? static_cast<int64_t>(wanted) : 1'000'000'000;
    const bool one_value = std::nextafter(low, INF) == high;
    all = {end, 0, above};
    for (size_t part = 0; part < found.size(); ++part) {
      const float* elements = reports[part]->elements();
      int64_t own = reports[part]->split.count;
      if (!one_value) own = std::count(elements, elements + own, end);
      own = std::min(own, left);
      left -= own;
      found[part] = {end, own, bases[part] + static_cast<double>(own) * each};
      all.equals += own;
    }
    all.weight += static_cast<double>(all.equals) * each;
    is_done = true;
  }
};

// The smallest element that weighs e^`log_weight` or more, or would.
inline float least_of(Weighing how, float log_weight) {
  if (how.inverse == 0) return -INF;
  float low = -std::numeric_limits<float>::max(), high = how.peak;
  const auto weighs = [&](float x) { return (x - how.peak) * how.inverse >= log_weight; };
  if (weighs(low)) return low;
  while (true) {
    const float middle = low / 2 + high / 2;
    if (!(middle > low && middle < high)) break;
    (weighs(middle) ? high : low) = middle;
  }
  while (weighs(std::nextafter(high, -INF))) high = std::nextafter(high, -INF);
  return high;
}

// The leading set of a row that is one part.
inline LeadingSearch lead(const float* x, int64_t size, Weighing how, const Goal& goal, Part& part) {
  alignas(Report) char room[ROOM_OF_ONE];
  Report* report = reinterpret_cast<Report*>(room);
  const Reports reports = {report};
  Part::survey(x, size, 1, report);
  LeadingSearch search(how, goal, reports);
  while (!search.done()) {
    part.split(x, size, how, search.from, search.until, 1, report);
    if (search.take(reports)) part.accept();
  }
  return search;
}

}  // namespace fdserve
