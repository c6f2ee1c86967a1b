// One row of logits, whole or a part of the vocabulary: the passes over it that sampling is made of.
//
// Nothing of the vocabulary's size is written but a copy of the logits for a row with biases, penalties or a mask. What
// top_p, min_p or a large top_k leave is found as a leading set (leading.h), never by sorting the row. Weights are rounded
// so that their sums are exact, so a draw does not depend on how the row is shared out. Floor: reading the row once for the
// peak, and ~60 us for each pass with exp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "largest.h"
#include "pool.h"

namespace fdserve {

constexpr float GREEDY_TEMPERATURE = 1e-5f;
constexpr int32_t BROKEN = -1, NOTHING_ALLOWED = -2;  // in place of a token
constexpr int32_t TEMPERATURE_SCALED = 1, TOP_P_NORMALIZED = 2;  // bits of a logprob mode
constexpr float LEAST_LOG_WEIGHT = -26;  // weights below are rounded to nothing
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

inline double uniform(uint64_t seed, uint64_t position) {
  // Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
  uint32_t x[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53} * x[0], right = uint64_t{0xCD9E8D57} * x[2];
    const uint32_t next[4] = {static_cast<uint32_t>(right >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(right),
                              static_cast<uint32_t>(left >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(left)};
    std::memcpy(x, next, sizeof(x));
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{x[0]} << 32 | x[1]) >> 11) * 0x1p-53;
}

// The results of rows that are not run stay as they are.
class Row {
 public:
  Row(const SampleCall& call, int64_t row) : Row(call, row, call.logits + row * call.vocab_stride) {}

  // With the row's logits elsewhere than in the call.
  Row(const SampleCall& call, int64_t row, const float* logits)
      : c(call),
        floats(float_kernels()),
        size(call.vocab_size),
        raw(logits),
        row(row),
        params(call.float_params + row * 6),
        ints(call.int_params + row * 4) {}

  void run() {
    const int32_t mode = c.logprob_modes == nullptr ? 0 : c.logprob_modes[row];
    c.tokens[row] = BROKEN;
    c.logprobs[row] = NOT_A_NUMBER;
    std::fill(c.top_ids + row * c.num_top, c.top_ids + (row + 1) * c.num_top, -1);
    std::fill(c.top_logprobs + row * c.num_top, c.top_logprobs + (row + 1) * c.num_top, NOT_A_NUMBER);
    bool has_nan;
    const float peak = floats.peak(raw, size, &has_nan);
    if (has_nan || !std::isfinite(peak)) return;
    c.tokens[row] = static_cast<int32_t>(ints[3] >= 0 ? ints[3] : choose(peak));
    if (mode >= 0) report(peak, mode);
  }

  const float* logits() const { return raw; }

  // The number in [0, 1) that decides the draw.
  double number() const { return uniform(static_cast<uint64_t>(ints[1]), static_cast<uint64_t>(ints[2])); }

  // What the running weight must pass, of so much in all: less than that.
  double target(double total) const { return std::min(number() * total, std::nextafter(total, 0.0)); }

  // What top_p and min_p leave, one of which is on.
  Goal goal(Weighing how) const {
    const float least = least_of(how, log_min_p());
    return params[1] < 1 ? share_of(params[1], least) : Goal{0, INF, 0, least};
  }

  // Whether bias, penalties or a mask apply.
  bool is_changed() const { return c.bias_offsets[row + 1] > c.bias_offsets[row] || is_penalised() || mask_row() >= 0; }

  // The logits after bias, penalties and mask, or null when none applies.
  const float* processed() {
    if (!is_changed()) return nullptr;
    float* logits = scratch<float>(kScratchLogits, size);
    std::memcpy(logits, raw, static_cast<size_t>(size) * sizeof(float));
    for (int64_t i = c.bias_offsets[row]; i < c.bias_offsets[row + 1]; ++i)
      if (knows(c.bias_ids[i])) logits[c.bias_ids[i] - c.first_id] += c.bias_values[i];
    if (is_penalised()) penalise(logits);
    if (const int64_t mask = mask_row(); mask >= 0) apply(reinterpret_cast<const uint32_t*>(c.masks + mask * c.mask_words), logits);
    return logits;
  }

  // From candidates in order: what top_p and min_p leave of them, by id.
  int64_t draw_few(std::vector<Candidate> kept, Weighing how) const {
    const double u = number();
    const float top_p = params[1], min_p = std::min(params[2], 1.0f);
    std::vector<float> weights(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) weights[i] = kept[i].logit;
    floats.weights(weights.data(), static_cast<int64_t>(weights.size()), how.peak, how.inverse, weights.data());
    double total = 0, reached = 0;
    size_t count = 0;
    for (size_t i = 0; i < kept.size(); ++i)
      if ((kept[i].weight = weights[i]) >= min_p) total += weights[i], count = i + 1;
    if (top_p < 1)
      for (size_t i = 0; i < count; ++i)
        if ((reached += kept[i].weight) >= top_p * total) count = i + 1;
    kept.resize(count);
    std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
    total = reached = 0;
    for (const Candidate& candidate : kept) total += candidate.weight;
    for (const Candidate& candidate : kept)
      if ((reached += candidate.weight) > u * total) return candidate.id;
    return kept.back().id;
  }

 private:
  const SampleCall& c;
  const FloatKernels& floats;
  const int64_t size;
  const float* raw;
  const int64_t row;
  const float* params;
  const int64_t* ints;
  // What the draw found of the unchanged logits over a temperature: their weight, and the top_p set if there is nothing
  // else that cuts. `inverse` is 0 if it found neither.
  struct {
    float inverse = 0;
    double total = 0;
    Leading nucleus;
  } drawn;

  // The log-probabilities of the token and of the likeliest, as `mode` says.
  void report(float peak, int32_t mode) {
    const float inverse = (mode & TEMPERATURE_SCALED) != 0 && params[0] >= GREEDY_TEMPERATURE ? 1.0f / params[0] : 1.0f;
    const float top_p = params[1];
    const Weighing how = {peak, inverse};
    Leading told;
    if ((mode & TOP_P_NORMALIZED) != 0 && top_p < 1) {
      told = drawn.inverse == inverse ? drawn.nucleus : Leading{};
      Part part;
      if (told.weight == 0) told = lead(raw, size, how, share_of(top_p, least_of(how, LEAST_LOG_WEIGHT)), part).leading();
    } else {
      told.weight = drawn.inverse == inverse ? drawn.total : Part().weigh(raw, size, how);
    }
    const int64_t last = told.equals > 0 ? floats.nth_equal(raw, size, told.value, told.equals) : -1;
    const double log_total = std::log(told.weight);
    const auto logprob = [&](int64_t id) {
      const bool kept = raw[id] > told.value || told.value == -INF || (raw[id] == told.value && id <= last);
      return kept ? static_cast<float>((double{raw[id]} - peak) * inverse - log_total) : -INF;
    };
    const std::vector<Candidate> top = largest(raw, size, c.num_top);
    for (size_t i = 0; i < top.size(); ++i) {
      c.top_ids[row * c.num_top + static_cast<int64_t>(i)] = top[i].id;
      c.top_logprobs[row * c.num_top + static_cast<int64_t>(i)] = logprob(top[i].id);
    }
    const int64_t token = c.tokens[row];
    if (token >= 0 && token < size) c.logprobs[row] = logprob(token);
  }

  int64_t past() const { return c.history_offsets[row + 1] - c.history_offsets[row]; }
  bool is_penalised() const { return past() > 0 && (params[3] != 1 || params[4] != 0 || params[5] != 0); }
  int64_t mask_row() const { return c.mask_rows == nullptr ? -1 : c.mask_rows[row]; }
  bool knows(int64_t id) const { return id >= c.first_id && id < c.first_id + size; }

  float log_min_p() const {
    return params[2] > 0 ? std::max(std::log(std::min(params[2], 1.0f)), LEAST_LOG_WEIGHT) : LEAST_LOG_WEIGHT;
  }
  static Goal share_of(float top_p, float least) { return {top_p, 0, 0, least}; }

  int64_t choose(float raw_peak) {
    const float* logits = raw;
    float peak = raw_peak;
    if (const float* changed = processed()) {
      bool has_nan;
      logits = changed;
      peak = floats.peak(logits, size, &has_nan);
      if (peak == -INF && !has_nan) return NOTHING_ALLOWED;
      if (has_nan || !std::isfinite(peak)) return BROKEN;
    }
    if (!(params[0] >= GREEDY_TEMPERATURE)) {
      int32_t first;
      floats.at_least(logits, size, peak, &first, 1);
      return first;
    }
    return draw(logits, peak, 1.0f / params[0]);
  }

  void apply(const uint32_t* mask, float* logits) const {
    if (c.first_id % 32 == 0) return floats.allow(logits, mask + c.first_id / 32, size);
    for (int64_t i = 0, id = c.first_id; i < size; ++i, ++id)
      if ((mask[id / 32] >> id % 32 & 1) == 0) logits[i] = -INF;
  }

  void penalise(float* logits) const {
    const int32_t* history = c.history + c.history_offsets[row];
    const int64_t past = this->past(), prompt = c.prompt_lens[row];
    const float repetition = params[3], presence = params[4], frequency = params[5];
    // Twice the count in the output, plus one for an id of the prompt; zero between calls.
    static thread_local std::vector<int32_t> marks;
    if (static_cast<int64_t>(marks.size()) < size) marks.resize(static_cast<size_t>(size));
    const auto place = [&](int64_t i) { return static_cast<size_t>(history[i] - c.first_id); };
    for (int64_t i = 0; i < past; ++i)
      if (knows(history[i])) {
        int32_t& mark = marks[place(i)];
        mark = i < prompt ? 1 : mark + 2;
      }
    for (int64_t i = 0; i < past; ++i) {
      if (!knows(history[i])) continue;
      const int32_t mark = std::exchange(marks[place(i)], 0);
      if (mark == 0) continue;
      float& logit = logits[place(i)];
      logit = logit < 0 ? logit * repetition : logit / repetition;
      if (mark > 1) logit -= static_cast<float>(mark / 2) * frequency + presence;
    }
  }

  int64_t draw(const float* logits, float peak, float inverse) {
    const Weighing how = {peak, inverse};
    const int64_t top_k = ints[0] <= 0 || ints[0] >= size ? 0 : ints[0];
    if (top_k > 0 && top_k <= FEW) return draw_few(largest(logits, size, top_k), how);
    const float top_p = params[1];
    Part part;
    Leading leading;
    double total = 0;
    if (top_k > 0) {
      leading = largest_share(logits, how, top_k, part);
    } else if (top_p < 1 || params[2] > 0) {
      const LeadingSearch search = lead(logits, size, how, goal(how), part);
      leading = search.leading(), total = search.row_weight();
    } else {
      total = leading.weight = part.weigh(logits, size, how);
    }
    if (logits == raw && top_k == 0) drawn = {inverse, total, top_p < 1 && !(params[2] > 0) ? leading : Leading{}};
    return part.pick(logits, size, how, leading, target(leading.weight));
  }

  // What top_p and min_p leave of the `top_k` largest; top_p is a share of what min_p leaves of them.
  Leading largest_share(const float* logits, Weighing how, int64_t top_k, Part& part) const {
    const float least = least_of(how, log_min_p());
    Part counted;
    Leading first = lead(logits, size, {}, first_of(top_k, size), counted).leading();
    if (first.value < least) first = {std::nextafter(least, -INF), 0, 0};
    alignas(Report) char room[ROOM_OF_ONE];
    Report* report = reinterpret_cast<Report*>(room);
    part.split(logits, size, how, first.value, std::nextafter(first.value, INF), 1, report);
    part.accept();
    float each;
    floats.weights(&first.value, 1, how.peak, how.inverse, &each);
    first.weight = report->split.from_high + static_cast<double>(first.equals) * each;
    if (!(params[1] < 1)) return first;
    part = Part();
    return lead(logits, size, how, {0, params[1] * first.weight, report->split.all, least}, part).leading();
  }
};

}  // namespace fdserve
