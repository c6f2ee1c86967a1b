// Where a leading set ends: the elements of a row in order (value descending, index ascending), as many as are needed to
// reach a given weight.
//
// Nothing is sorted but a few samples. They say about where the end is; passes over the row make the bracket certain,
// what lies in it is copied together, and bisection over ever fewer values finds the exact one. Floor: the passes, about
// 4 us each for 100,000 elements in the second-level cache; two to five of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace fdserve {

// The last element of a leading set: its value, and its index among those of the same value.
struct Cut {
  float value = -std::numeric_limits<float>::infinity();
  int64_t last = std::numeric_limits<int32_t>::max();

  bool keeps(float x, int64_t i) const { return x > value || (x == value && i <= last); }
};

class Selector {
 public:
  // `weights` null: every element weighs 1. `room` holds 2 * (size + 16) floats.
  Selector(const FloatKernels& kernels, const float* x, const float* weights, int64_t size, float* room)
      : k(kernels), x(x), weights(weights), size(size), values(room), masses(weights ? room + size + 16 : nullptr) {}

  // The smallest leading set that reaches `needed` of about `total`, or everything; never nothing.
  Cut reach(double needed, double total) {
    needed = std::max(needed, std::numeric_limits<double>::min());
    int64_t count = bracket(needed, total);
    // Values as integers in the same order: halving the distance ends. `reached` is the weight from `top` on, `above`
    // that of what is no longer among the values copied together.
    int64_t bottom = key(low), top = key(high);
    double reached = above;
    for (int turn = level ? 3 : 1; top - bottom > 1; ++turn) {
      int64_t middle = bottom + (top - bottom) / 2;
      const bool tidy = turn % 4 == 3;
      if (tidy) {
        double past;
        count = k.between(values, masses, count, value(bottom), value(top), values, masses, &past);
        if (count == 0) break;
        above = reached;
        // Many may be equal: the largest value may be the one.
        bool has_nan;
        middle = key(k.peak(values, count, &has_nan));
      }
      const double from_middle = above + k.mass_from(values, masses, count, value(middle));
      if (from_middle < needed) {
        top = middle, reached = from_middle;
      } else {
        bottom = middle;
        if (tidy) break;
      }
    }
    const float end = value(bottom);
    if (end == -INF) return {};
    const int64_t first = k.nth_equal(x, size, end, 1);
    if (first == size) return {end};
    const double each = weights ? weights[first] : 1.0;
    const double equals = each > 0 ? std::ceil((needed - reached) / each) : 1;
    if (equals <= 1) return {end, first};
    return {end, k.nth_equal(x, size, end, equals < static_cast<double>(size) ? static_cast<int64_t>(equals) : size)};
  }

 private:
  static constexpr int64_t SAMPLES = 256, MARGIN = 24, HEAD = 1, SMALL = 4096;
  static constexpr float INF = std::numeric_limits<float>::infinity();

  struct Sample {
    float value, weight;
  };

  const FloatKernels& k;
  const float *x, *weights;
  const int64_t size;
  float *values, *masses;
  float low = -INF, high = INF;  // the cut's value is in [low, high)
  double above = 0;              // the weight from `high` on
  bool level = false;            // many of the values in [low, high) are likely equal

  // Narrow [low, high) down by samples and copy what lies in it together: the head of the row if that will do, or
  // what is around where the samples put the end. Returns how many.
  int64_t bracket(double needed, double total) {
    Sample samples[SAMPLES];
    if (size <= SMALL) return k.between(x, weights, size, low, high, values, masses, &above);
    const int64_t stride = size / SAMPLES;
    for (int64_t i = 0; i < SAMPLES; ++i) samples[i] = {x[i * stride], weights ? weights[i * stride] : 1.0f};
    std::sort(samples, samples + SAMPLES, [](const Sample& a, const Sample& b) { return a.value > b.value; });
    // The bracket is from sample `last` to sample `first`; the row's ends are beyond. Where the samples stand for the
    // whole weight they can say where the end is; otherwise a few elements, in the head most likely, weigh much.
    int64_t first = -1, last = -1;
    double sampled = 0, reached = 0;
    for (const Sample& each : samples) sampled += each.weight * static_cast<double>(stride);
    if (std::abs(sampled - total) > total / 4) {
      last = HEAD;
    } else {
      aim(samples, needed, total, reached, &first, &last);
    }
    bool enough = false;  // what is from `last` on is known to do
    while (true) {
      low = last < SAMPLES ? samples[last].value : -INF;
      while (first >= 0 && samples[first].value == low) --first;
      high = first >= 0 ? samples[first].value : INF;
      level = last < SAMPLES && samples[first + 1].value == low;
      const int64_t count = k.between(x, weights, size, low, high, values, masses, &above);
      reached = above + k.mass_from(values, masses, count, low);
      if (above < needed && (enough || reached >= needed || last == SAMPLES)) return count;
      if (above >= needed) {
        enough = true, last = first, first = std::max<int64_t>(first - 2 * MARGIN, -1);
      } else {
        aim(samples, needed, total, reached, &first, &last);
      }
    }
  }

  // The bracket around where `needed` is likely reached, after the samples up to `last`, which stand for `reached`.
  static void aim(const Sample* samples, double needed, double total, double reached, int64_t* first, int64_t* last) {
    double rest = 0;
    for (int64_t i = *last + 1; i < SAMPLES; ++i) rest += samples[i].weight;
    const double scale = (total - reached) / rest;
    int64_t guess = *last + 1;
    while (guess < SAMPLES && (reached += samples[guess].weight * scale) < needed) ++guess;
    *first = std::max(guess - MARGIN, *last), *last = std::min(guess + MARGIN, SAMPLES);
  }

  static int64_t key(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
  }
  static float value(int64_t key) {
    const int32_t bits = static_cast<int32_t>(key >= 0 ? key : key ^ 0x7FFFFFFF);
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
};

}  // namespace fdserve
