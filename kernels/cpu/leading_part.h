// A part of a row of logits (or all of it) in the search for a leading set (leading.h): the passes over it, and what they
// leave.
//
// The first pass that counts splits the row at a bracket that the set's end lies in: of the elements over it only the
// weight is kept, by blocks; those in it are copied together, and all further passes are over ever fewer of them.
// Floor: that one pass, which exp makes one of arithmetic: ~60 us for 100,000 elements.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace fdserve {

constexpr float INF = std::numeric_limits<float>::infinity();

// How elements are weighed: see FloatKernels.
struct Weighing {
  float peak = 0, inverse = 0;
};

// The elements over `value`, and the first `equals` of those that equal it: so much they weigh.
struct Leading {
  float value = -INF;
  int64_t equals = 0;
  double weight = 0;
};

// What a part tells of a split, or of itself. Behind it are elements of those between, in order: all if a report holds so
// many, else one of `stride_of(count)`.
struct Report {
  Split split;

  float* elements() { return reinterpret_cast<float*>(this + 1); }
  const float* elements() const { return reinterpret_cast<const float*>(this + 1); }
};

// Where so many parts make reports: what one holds, and of how many elements one in how many it has.
constexpr int64_t ELEMENTS = 1024, SAMPLES = 512;
inline int64_t report_bytes(int parts) { return static_cast<int64_t>(sizeof(Report)) + ELEMENTS / parts * 4; }
constexpr int64_t ROOM_OF_ONE = sizeof(Report) + ELEMENTS * 4;
inline bool tells_all(int64_t count, int parts) { return count <= ELEMENTS / parts; }
inline int64_t stride_of(int64_t count, int parts) {
  const int64_t samples = std::max<int64_t>(SAMPLES / parts, 1);
  return tells_all(count, parts) ? 1 : (count + samples - 1) / samples;
}

class Part {
 public:
  // The first report: of the row as it is.
  static void survey(const float* x, int64_t size, int parts, Report* report) {
    report->split = {0, 0, 0, size};
    put_elements(x, parts, report);
  }

  // Splits the row, or what was last accepted.
  void split(const float* x, int64_t size, Weighing how, float low, float high, int parts, Report* report) {
    const FloatKernels& kernels = float_kernels();
    if (narrowed) {
      tried = List(source.count + 16);
      report->split = kernels.split(source.x.get(), source.count, how.peak, how.inverse, low, high, nullptr, tried.x.get(),
                                    nullptr);
    } else {
      above.resize(static_cast<size_t>(blocks(size)));
      ends.resize(above.size());
      float* between = scratch<float>(kScratchWeights, size + 16);
      report->split = kernels.split(x, size, how.peak, how.inverse, low, high, above.data(), between, ends.data());
      tried = List(report->split.count);
      std::memcpy(tried.x.get(), between, static_cast<size_t>(report->split.count) * 4);
    }
    tried.count = report->split.count;
    put_elements(tried.x.get(), parts, report);
  }

  // Whether `split` looks at the row.
  bool needs_row() const { return !narrowed; }

  // What is between becomes what is split next.
  void accept() {
    if (narrowed)
      source = tried;
    else
      source = listed = tried, narrowed = true;
  }

  // Weighs the row for a draw from all of it; returns the weight.
  double weigh(const float* x, int64_t size, Weighing how) {
    above.resize(static_cast<size_t>(blocks(size)));
    float_kernels().exp_sums(x, size, how.peak, how.inverse, above.data());
    double total = 0;
    for (double each : above) total += each;
    return total;
  }

  // The index at which the weight of this part of the leading set, added up in their order, passes `target`, which is less
  // than `leading.weight`.
  int64_t pick(const float* x, int64_t size, Weighing how, const Leading& leading, double target) const {
    const FloatKernels& kernels = float_kernels();
    float each, weights[SUM_BLOCK];
    kernels.weights(&leading.value, 1, how.peak, how.inverse, &each);
    double reached = 0;
    int64_t equals = leading.equals;
    for (size_t block = 0; block < above.size(); ++block) {
      double here = above[block];
      int64_t same = 0;
      if (listed.count > 0) {
        const int64_t from = block == 0 ? 0 : ends[block - 1], count = ends[block] - from;
        const float* values = listed.x.get() + from;
        kernels.weights(values, count, how.peak, how.inverse, weights);
        const double over = kernels.mass_from(values, weights, count, std::nextafter(leading.value, INF));
        const double equal = kernels.mass_from(values, weights, count, leading.value) - over;
        if (equals > 0 && equal > 0) same = std::min(static_cast<int64_t>(equal / each), equals);
        here += over + static_cast<double>(same) * each;
      }
      if (reached + here > target) {
        const int64_t first = static_cast<int64_t>(block) * SUM_BLOCK;
        return first + pick_in(x + first, std::min(SUM_BLOCK, size - first), how, leading.value, equals, target - reached);
      }
      reached += here, equals -= same;
    }
    return -1;
  }

 private:
  struct List {
    std::shared_ptr<float[]> x;
    int64_t count = 0;

    List() = default;
    explicit List(int64_t room) : x(new float[static_cast<size_t>(room)]) {}
  };

  std::vector<double> above;  // the weight of each block over the bracket that the row was split at
  std::vector<int32_t> ends;  // where a block's elements end in `listed`
  List listed, source, tried;  // between at first; now; as last split
  bool narrowed = false;

  static int64_t blocks(int64_t size) { return (size + SUM_BLOCK - 1) / SUM_BLOCK; }

  static void put_elements(const float* x, int parts, Report* report) {
    const int64_t count = report->split.count, stride = stride_of(count, parts);
    float* to = report->elements();
    for (int64_t i = 0; i < count; i += stride) *to++ = x[i];
  }

  static int64_t pick_in(const float* x, int64_t count, Weighing how, float value, int64_t equals, double target) {
    float weights[SUM_BLOCK];
    float_kernels().weights(x, count, how.peak, how.inverse, weights);
    double reached = 0;
    for (int64_t i = 0; i < count; ++i)
      if ((x[i] > value || (x[i] == value && equals-- > 0)) && (reached += weights[i]) > target) return i;
    return -1;
  }
};

}  // namespace fdserve
