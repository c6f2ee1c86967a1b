// One row of logits, whole or a part of the vocabulary: the passes over it that sampling is made of.
//
// Nothing of the vocabulary's size is written but a copy of the logits for a row with biases, penalties or a mask, and
// the weights of a row that top_p, min_p or a large top_k cut down: the cut is found by passes (select.h), never by
// sorting the row. Floor: reading the row once for the peak, and ~20 us for each pass with exp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "select.h"

namespace fdserve {

constexpr float GREEDY_TEMPERATURE = 1e-5f;
constexpr int64_t HEAP_LIMIT = 256;  // beyond so many of the largest, find where they end instead
constexpr int32_t BROKEN = -1, NOTHING_ALLOWED = -2;  // in place of a token
constexpr int32_t TEMPERATURE_SCALED = 1, TOP_P_NORMALIZED = 2;  // bits of a logprob mode
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

struct Candidate {
  float logit, weight;
  int32_t id;
};

// The order of candidates: (logit descending, id ascending).
inline bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

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

  // The logits after bias, penalties and mask, or null when none applies.
  const float* processed() {
    const float repetition = params[3], presence = params[4], frequency = params[5];
    const int64_t biases = c.bias_offsets[row + 1] - c.bias_offsets[row];
    const int64_t past = c.history_offsets[row + 1] - c.history_offsets[row];
    const bool penalised = past > 0 && (repetition != 1 || presence != 0 || frequency != 0);
    const int32_t mask = c.mask_rows == nullptr ? -1 : c.mask_rows[row];
    if (biases == 0 && !penalised && mask < 0) return nullptr;
    float* logits = scratch<float>(kScratchLogits, size);
    std::memcpy(logits, raw, static_cast<size_t>(size) * sizeof(float));
    for (int64_t i = c.bias_offsets[row]; i < c.bias_offsets[row + 1]; ++i)
      if (knows(c.bias_ids[i])) logits[c.bias_ids[i] - c.first_id] += c.bias_values[i];
    if (penalised) penalise(logits, c.history + c.history_offsets[row], past, c.prompt_lens[row]);
    const int64_t first_word = c.first_id / 32;
    if (mask >= 0)
      floats.allow(logits, reinterpret_cast<const uint32_t*>(c.masks + mask * c.mask_words + first_word), size);
    return logits;
  }

  // exp((logits - peak) * inverse) summed by blocks, and stored unless `weights` is null; returns the sum of all.
  double weigh(const float* logits, float peak, float inverse, float* weights) {
    sums.resize(static_cast<size_t>((size + SUM_BLOCK - 1) / SUM_BLOCK));
    floats.exp_sums(logits, size, peak, inverse, sums.data(), weights);
    return total_of_sums();
  }

  // As `weigh` left them.
  const std::vector<double>& block_sums() const { return sums; }

  // The `count` largest in order (weights unset): a heap whose smallest member is the bar the next must clear.
  std::vector<Candidate> largest(const float* logits, int64_t count) {
    std::vector<Candidate> best;
    if (count <= 0) return best;
    count = std::min(count, size);
    if (count > HEAP_LIMIT) {
      const Cut cut = selector(logits, nullptr).reach(static_cast<double>(count), static_cast<double>(size));
      for (int64_t i = 0; i < size; ++i)
        if (cut.keeps(logits[i], i)) best.push_back({logits[i], 0, static_cast<int32_t>(i)});
      std::sort(best.begin(), best.end(), before);
      return best;
    }
    int64_t next = 0;
    for (; next < count; ++next) best.push_back({logits[next], 0, static_cast<int32_t>(next)});
    std::make_heap(best.begin(), best.end(), before);
    // A few ids at a time: the bar rises while they are taken.
    constexpr int64_t TAKE = 16;
    int32_t found[TAKE];
    while (next < size) {
      const float bar = std::nextafter(best.front().logit, INF);  // of equals the first are in
      const int64_t n = floats.at_least(logits + next, size - next, bar, found, TAKE);
      for (int64_t i = 0; i < n; ++i) {
        const Candidate candidate{logits[next + found[i]], 0, static_cast<int32_t>(next + found[i])};
        if (!before(candidate, best.front())) continue;
        std::pop_heap(best.begin(), best.end(), before);
        best.back() = candidate;
        std::push_heap(best.begin(), best.end(), before);
      }
      if (n < TAKE) break;
      next += found[n - 1] + 1;
    }
    std::sort_heap(best.begin(), best.end(), before);
    return best;
  }

  // From candidates in order: what top_p and min_p leave of them, by id.
  int64_t draw_few(std::vector<Candidate> kept, float peak, float inverse, double u) const {
    const float top_p = params[1], min_p = std::min(params[2], 1.0f);
    std::vector<float> weights(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) weights[i] = kept[i].logit;
    floats.exps(weights.data(), static_cast<int64_t>(weights.size()), peak, inverse, weights.data());
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

  // As `pick`, from a block on; the running sum begins there.
  int64_t pick_from(int64_t block, const float* logits, float peak, float inverse, const float* weights, Cut cut,
                    double target) const {
    const float least = weights == nullptr ? 0 : std::min(params[2], 1.0f);
    float again[SUM_BLOCK];
    // Rounding may leave a little of the target past the block's last id that has any weight: that one is taken.
    int64_t chosen = -1;
    for (; chosen < 0 && block >= 0; --block, target = INF) {
      const int64_t first = block * SUM_BLOCK, count = std::min(SUM_BLOCK, size - first);
      if (weights == nullptr) floats.exps(logits + first, count, peak, inverse, again);
      const float* here = weights == nullptr ? again : weights + first;
      double reached = 0;
      for (int64_t i = 0; i < count && reached <= target; ++i) {
        if (!(here[i] > 0 && here[i] >= least && cut.keeps(logits[first + i], first + i))) continue;
        chosen = first + i;
        reached += double{here[i]};
      }
    }
    return chosen;
  }

 private:
  const SampleCall& c;
  const FloatKernels& floats;
  const int64_t size;
  const float* raw;
  const int64_t row;
  const float* params;
  const int64_t* ints;
  std::vector<double> sums;
  // The top_p set of the unchanged logits over a temperature and its weight, if the draw found it: `inverse` is not 0.
  struct {
    float inverse = 0;
    Cut cut;
    double total = 0;
  } nucleus;

  // The log-probabilities of the token and of the likeliest, as `mode` says.
  void report(float peak, int32_t mode) {
    const float inverse = (mode & TEMPERATURE_SCALED) != 0 && params[0] >= GREEDY_TEMPERATURE ? 1.0f / params[0] : 1.0f;
    const float top_p = params[1];
    Cut cut;
    double total;
    if ((mode & TOP_P_NORMALIZED) != 0 && top_p < 1 && nucleus.inverse == inverse) {
      cut = nucleus.cut, total = nucleus.total;
    } else if ((mode & TOP_P_NORMALIZED) != 0 && top_p < 1) {
      float* weights = weight_room();
      total = weigh(raw, peak, inverse, weights);
      cut = selector(raw, weights).reach(top_p * total, total);
      total = kept_mass(raw, weights, cut, 0);
    } else {
      total = weigh(raw, peak, inverse, nullptr);
    }
    const double log_total = std::log(total);
    const auto logprob = [&](int64_t id) {
      return cut.keeps(raw[id], id) ? static_cast<float>((double{raw[id]} - peak) * inverse - log_total) : -INF;
    };
    const std::vector<Candidate> top = largest(raw, c.num_top);
    for (size_t i = 0; i < top.size(); ++i) {
      c.top_ids[row * c.num_top + static_cast<int64_t>(i)] = top[i].id;
      c.top_logprobs[row * c.num_top + static_cast<int64_t>(i)] = logprob(top[i].id);
    }
    const int64_t token = c.tokens[row];
    if (token >= 0 && token < size) c.logprobs[row] = logprob(token);
  }

  bool knows(int64_t id) const { return id >= c.first_id && id < c.first_id + size; }

  double total_of_sums() const {
    double total = 0;
    for (double each : sums) total += each;
    return total;
  }

  // The weights of the row, and behind them the selector's room.
  float* weight_room() const { return scratch<float>(kScratchWeights, 3 * (size + 16)); }

  Selector selector(const float* logits, const float* weights) const {
    return {floats, logits, weights, size, weight_room() + size + 16};
  }

  // The weight of what `cut` and `least` leave, summed by blocks.
  double kept_mass(const float* logits, const float* weights, Cut cut, float least) {
    floats.kept_sums(logits, weights, size, cut.value, cut.last, least, sums.data());
    return total_of_sums();
  }

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

  void penalise(float* logits, const int32_t* history, int64_t past, int64_t prompt) const {
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
    const double u = number();
    const float top_p = params[1], min_p = std::min(params[2], 1.0f);
    const int64_t top_k = ints[0] <= 0 || ints[0] >= size ? 0 : ints[0];
    if (top_k > 0 && top_k <= HEAP_LIMIT) return draw_few(largest(logits, top_k), peak, inverse, u);
    if (top_k == 0 && !(top_p < 1) && !(min_p > 0))
      return pick(logits, peak, inverse, nullptr, {}, u * weigh(logits, peak, inverse, nullptr));
    float* weights = weight_room();
    double total = weigh(logits, peak, inverse, weights);
    Cut cut;
    if (top_k > 0) {
      cut = selector(logits, nullptr).reach(static_cast<double>(top_k), static_cast<double>(size));
      total = kept_mass(logits, weights, cut, min_p);
    }
    if (top_p < 1) cut = selector(logits, weights).reach(top_p * total, total);
    if (top_p < 1 || top_k == 0) total = kept_mass(logits, weights, cut, min_p);
    if (logits == raw && top_k == 0 && top_p < 1 && !(min_p > 0)) nucleus = {inverse, cut, total};
    return pick(logits, peak, inverse, weights, cut, u * total);
  }

  // The id in which the running sum by id of the weights that `cut` and min_p leave passes `target`: find the block by
  // `sums`, then the id within it. Where `weights` is null all are left, and computed again.
  int64_t pick(const float* logits, float peak, float inverse, const float* weights, Cut cut, double target) const {
    size_t block = 0;
    while (block + 1 < sums.size() && sums[block] <= target) target -= sums[block++];
    return pick_from(static_cast<int64_t>(block), logits, peak, inverse, weights, cut, target);
  }
};

}  // namespace fdserve
