// Sampling, a row a task: raw log-probabilities from two passes over the logits, then the token.
//
// Nothing of the vocabulary's size is written, except a copy of the logits for a row with biases or penalties. Candidates
// under top_k, top_p or min_p are found by passes that skip 64 logits at a time, never by sorting the row: the top_p set
// is cut by a quickselect on probability mass. Floor: two or three passes over the row, ~25 us each with exp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace fdserve {
namespace {

constexpr float GREEDY_TEMPERATURE = 1e-5f;
constexpr int64_t HEAP_LIMIT = 256;  // beyond so many of the largest, partition instead
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

double uniform(uint64_t seed, uint64_t position) {
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

class Row {
 public:
  Row(const SampleCall& call, int64_t row)
      : c(call),
        floats(float_kernels()),
        size(call.vocab_size),
        raw(call.logits + row * call.vocab_stride),
        row(row),
        params(call.float_params + row * 6),
        ints(call.int_params + row * 4) {}

  void run() {
    c.tokens[row] = -1;
    c.logprobs[row] = NOT_A_NUMBER;
    std::fill(c.top_ids + row * c.num_top, c.top_ids + (row + 1) * c.num_top, -1);
    std::fill(c.top_logprobs + row * c.num_top, c.top_logprobs + (row + 1) * c.num_top, NOT_A_NUMBER);
    bool has_nan;
    const float peak = floats.peak(raw, size, &has_nan);
    if (has_nan || !std::isfinite(peak)) return;
    const double log_total = std::log(mass(raw, peak, 1.0f));
    const auto logprob = [&](int64_t id) { return static_cast<float>(double{raw[id]} - peak - log_total); };
    std::vector<Candidate> top = largest(raw, c.num_top);
    for (size_t i = 0; i < top.size(); ++i) {
      c.top_ids[row * c.num_top + static_cast<int64_t>(i)] = top[i].id;
      c.top_logprobs[row * c.num_top + static_cast<int64_t>(i)] = logprob(top[i].id);
    }
    const int64_t token = ints[3] >= 0 ? ints[3] : choose(peak);
    c.tokens[row] = static_cast<int32_t>(token);
    if (token >= 0 && token < size) c.logprobs[row] = logprob(token);
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

  double mass(const float* logits, float peak, float inverse) {
    sums.resize(static_cast<size_t>((size + SUM_BLOCK - 1) / SUM_BLOCK));
    floats.exp_sums(logits, size, peak, inverse, sums.data());
    double total = 0;
    for (double each : sums) total += each;
    return total;
  }

  // The `count` largest in order (weights unset): a heap whose smallest member is the bar the next must clear.
  std::vector<Candidate> largest(const float* logits, int64_t count) {
    std::vector<Candidate> best;
    if (count <= 0) return best;
    if (count > HEAP_LIMIT) {
      for (int64_t i = 0; i < size; ++i) best.push_back({logits[i], 0, static_cast<int32_t>(i)});
      if (count < size) std::nth_element(best.begin(), best.begin() + count, best.end(), before);
      best.resize(static_cast<size_t>(std::min(count, size)));
      std::sort(best.begin(), best.end(), before);
      return best;
    }
    int64_t next = 0;
    for (; next < std::min(count, size); ++next) best.push_back({logits[next], 0, static_cast<int32_t>(next)});
    std::make_heap(best.begin(), best.end(), before);
    // A few ids at a time: the bar rises while they are taken.
    constexpr int64_t TAKE = 16;
    int32_t found[TAKE];
    while (next < size) {
      const int64_t n = floats.at_least(logits + next, size - next, best.front().logit, found, TAKE);
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

  int64_t choose(float raw_peak) {
    const float* logits = raw;
    float peak = raw_peak;
    if (const float* changed = processed()) {
      bool has_nan;
      logits = changed;
      peak = floats.peak(logits, size, &has_nan);
      if (has_nan || !std::isfinite(peak)) return -1;
    }
    if (!(params[0] >= GREEDY_TEMPERATURE)) {
      int32_t first;
      floats.at_least(logits, size, peak, &first, 1);
      return first;
    }
    return draw(logits, peak, 1.0f / params[0]);
  }

  // The logits after bias and penalties, or null when neither applies.
  const float* processed() {
    const float repetition = params[3], presence = params[4], frequency = params[5];
    const int64_t biases = c.bias_offsets[row + 1] - c.bias_offsets[row];
    const int64_t past = c.history_offsets[row + 1] - c.history_offsets[row];
    const bool penalised = past > 0 && (repetition != 1 || presence != 0 || frequency != 0);
    if (biases == 0 && !penalised) return nullptr;
    float* logits = scratch<float>(kScratchLogits, size);
    std::memcpy(logits, raw, static_cast<size_t>(size) * sizeof(float));
    for (int64_t i = c.bias_offsets[row]; i < c.bias_offsets[row + 1]; ++i)
      if (c.bias_ids[i] >= 0 && c.bias_ids[i] < size) logits[c.bias_ids[i]] += c.bias_values[i];
    if (penalised) penalise(logits, c.history + c.history_offsets[row], past, c.prompt_lens[row]);
    return logits;
  }

  void penalise(float* logits, const int32_t* history, int64_t past, int64_t prompt) const {
    const float repetition = params[3], presence = params[4], frequency = params[5];
    // Twice the count in the output, plus one for an id of the prompt; zero between calls.
    static thread_local std::vector<int32_t> marks;
    if (static_cast<int64_t>(marks.size()) < size) marks.resize(static_cast<size_t>(size));
    const auto known = [&](int64_t i) { return history[i] >= 0 && history[i] < size; };
    for (int64_t i = 0; i < past; ++i)
      if (known(i)) {
        int32_t& mark = marks[static_cast<size_t>(history[i])];
        mark = i < prompt ? 1 : mark + 2;
      }
    for (int64_t i = 0; i < past; ++i) {
      if (!known(i)) continue;
      const int32_t mark = std::exchange(marks[static_cast<size_t>(history[i])], 0);
      if (mark == 0) continue;
      float& logit = logits[history[i]];
      logit = logit < 0 ? logit * repetition : logit / repetition;
      if (mark > 1) logit -= static_cast<float>(mark / 2) * frequency + presence;
    }
  }

  int64_t draw(const float* logits, float peak, float inverse) {
    const double u = uniform(static_cast<uint64_t>(ints[1]), static_cast<uint64_t>(ints[2]));
    const float top_p = params[1], min_p = std::min(params[2], 1.0f);
    const int64_t top_k = ints[0] <= 0 || ints[0] >= size ? 0 : ints[0];
    if (top_k == 0 && !(top_p < 1) && !(min_p > 0)) return draw_any(logits, peak, inverse, u);
    std::vector<Candidate> kept;
    double total = 0;
    if (top_k > 0) {
      kept = largest(logits, top_k);
      std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
      weigh(kept, peak, inverse);
    } else {
      total = top_p < 1 ? mass(logits, peak, inverse) : 0;
      kept = within(logits, peak, inverse, min_p, top_p < 1 ? top_p * total : INF);
    }
    if (min_p > 0)
      kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Candidate& x) { return x.weight < min_p; }), kept.end());
    if (top_k > 0) total = mass_of(kept);
    if (top_p < 1) cut(kept, top_p * total);
    double target = u * mass_of(kept), reached = 0;
    for (const Candidate& candidate : kept)
      if ((reached += candidate.weight) > target) return candidate.id;
    return kept.back().id;
  }

  // The whole row by id: find the block the target falls in, then the id within it.
  int64_t draw_any(const float* logits, float peak, float inverse, double u) {
    double target = u * mass(logits, peak, inverse);
    size_t block = 0;
    while (block + 1 < sums.size() && sums[block] <= target) target -= sums[block++];
    float weights[SUM_BLOCK];
    // Rounding may leave a little of the target past the block's last id that has any weight: that one is taken.
    int64_t chosen = -1;
    for (; chosen < 0 && block < sums.size(); --block, target = INF) {
      const int64_t first = static_cast<int64_t>(block) * SUM_BLOCK, count = std::min(SUM_BLOCK, size - first);
      floats.exps(logits + first, count, peak, inverse, weights);
      double reached = 0;
      for (int64_t i = 0; i < count && reached <= target; ++i) {
        if (weights[i] > 0) chosen = first + i;
        reached += double{weights[i]};
      }
    }
    return chosen;
  }

  void weigh(std::vector<Candidate>& list, float peak, float inverse) const {
    std::vector<float> values(list.size());
    for (size_t i = 0; i < list.size(); ++i) values[i] = list[i].logit;
    floats.exps(values.data(), static_cast<int64_t>(values.size()), peak, inverse, values.data());
    for (size_t i = 0; i < list.size(); ++i) list[i].weight = values[i];
  }

  static double mass_of(const std::vector<Candidate>& list) {
    double total = 0;
    for (const Candidate& candidate : list) total += candidate.weight;
    return total;
  }

  // Candidates by id, from a window below the peak that widens until it holds `needed` mass or all that min_p keeps.
  std::vector<Candidate> within(const float* logits, float peak, float inverse, float min_p, double needed) {
    const float floor = min_p > 0 ? std::log(min_p) - 1e-3f : -INF;  // a little wide: weights decide
    for (float window = 4;; window *= 2) {
      const float lowest = std::max(needed < INF ? -window : -INF, floor);
      const float threshold = lowest < -100 ? -INF : peak + lowest / inverse;
      int32_t* ids = scratch<int32_t>(kScratchIds, size);
      const int64_t count = floats.at_least(logits, size, threshold, ids, size);
      std::vector<Candidate> list(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) {
        list[static_cast<size_t>(i)] = {logits[ids[i]], 0, ids[i]};
      }
      weigh(list, peak, inverse);
      if (count == size || threshold == -INF || lowest == floor || mass_of(list) >= needed) return list;
    }
  }

  // Drop what is past the smallest leading set that reaches `needed`, keeping the order by id.
  static void cut(std::vector<Candidate>& list, double needed) {
    std::vector<Candidate> work = list;
    auto low = work.begin(), high = work.end();
    double above = 0;  // mass of everything before `low`, which is known to be kept
    while (high - low > 16) {
      auto middle = low + (high - low) / 2;
      const Candidate pivot = std::max(std::min(*low, *middle, before), std::min(std::max(*low, *middle, before), high[-1], before), before);
      const auto split = std::partition(low, high, [&](const Candidate& x) { return !before(pivot, x); });
      double part = 0;
      for (auto each = low; each != split; ++each) part += each->weight;
      if (above + part >= needed) {
        if (split == high) break;
        high = split;
      } else {
        above += part;
        low = split;
      }
    }
    std::sort(low, high, before);
    while (low != high && above < needed) above += (low++)->weight;
    if (low == work.begin()) ++low;
    const Candidate last = low[-1];
    list.erase(std::remove_if(list.begin(), list.end(), [&](const Candidate& x) { return before(last, x); }), list.end());
  }
};

}  // namespace

void sample(const SampleCall& call) {
  parallel(call.rows, [&](int64_t row) { Row(call, row).run(); });
}

}  // namespace fdserve
