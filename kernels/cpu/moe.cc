// Mixture of experts: route, group the tokens by expert, two products an expert, weighted sum.
//
// A slot is one (token, expert) pair; slots are ordered by expert, so an expert's rows lie together and its weights are
// streamed once a chunk of tokens. Products are those of linear.cc; a token's sum runs over its experts in ascending id.
// Floor: memory for a few tokens (the experts touched are read once), dot products for many.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "pool.h"

namespace fdserve {
namespace {

constexpr int64_t CHUNK_TOKENS = 1024;  // bounds the memory for slots
constexpr int64_t RUN_PANELS = 4;
constexpr float LEAST_RANK = std::numeric_limits<float>::lowest();  // of an expert that is not chosen already

struct Choice {
  int32_t expert;
  float weight;
};

class Moe {
 public:
  explicit Moe(const MoeCall& call)
      : c(call), kernels(row_kernels(call.dtype)), floats(float_kernels()), element(size_of(call.dtype)) {}

  void run_chunk(int64_t first, int64_t tokens) {
    route(first, tokens);
    assign(tokens);
    const int64_t slots = tokens * c.top_k, hidden_bytes = c.hidden * element;
    const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t x_bytes = aligned(slots * hidden_bytes), inner_bytes = aligned(slots * c.inner * element);
    char* x = scratch<char>(kScratchMoe, x_bytes + 3 * inner_bytes + slots * c.hidden * 4);
    char *both = x + x_bytes, *inner = both + 2 * inner_bytes;
    float* answers = reinterpret_cast<float*>(inner + inner_bytes);
    const char* from = static_cast<const char*>(c.x) + first * hidden_bytes;
    for (int64_t i = 0; i < slots; ++i)
      std::memcpy(x + slot_of[static_cast<size_t>(i)] * hidden_bytes, from + i / c.top_k * hidden_bytes,
                  static_cast<size_t>(hidden_bytes));
    grouped_product(x, c.up_gate, both, c.dtype);
    swiglu(both, slots, c.inner, c.dtype, inner);
    grouped_product(inner, c.down, answers, Dtype::kFloat32);
    combine(first, tokens, answers);
  }

 private:
  const MoeCall& c;
  const RowKernels& kernels;
  const FloatKernels& floats;
  const int64_t element;
  std::vector<Choice> choices;     // [tokens][top_k], ascending expert
  std::vector<int64_t> slot_of;    // of each choice
  std::vector<int64_t> expert_at;  // [experts + 1], each expert's first slot

  void route(int64_t first, int64_t tokens) {
    choices.assign(static_cast<size_t>(tokens * c.top_k), {});
    parallel(tokens, [&](int64_t t) {
      float* probs = scratch<float>(kScratchTile, 2 * c.experts + c.hidden);
      float *ranked = probs + c.experts, *wide = ranked + c.experts;
      const char* x = static_cast<const char*>(c.x) + (first + t) * c.hidden * element;
      if (c.dtype == Dtype::kBfloat16) floats.widen(reinterpret_cast<const bf16*>(x), c.hidden, wide);
      else std::memcpy(wide, x, static_cast<size_t>(c.hidden) * sizeof(float));
      for (int64_t e = 0; e < c.experts; ++e) probs[e] = floats.dot(c.gate + e * c.hidden, wide, c.hidden);
      floats.softmax(probs, c.experts);
      for (int64_t e = 0; e < c.experts; ++e) ranked[e] = std::max(probs[e] + c.correction_bias[e], LEAST_RANK);
      choose(probs, ranked, choices.data() + t * c.top_k);
    });
  }

  // A NaN ranks last, so that a broken token still gets experts that exist.
  void choose(const float* probs, float* ranked, Choice* chosen) const {
    for (int64_t k = 0; k < c.top_k; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < c.experts; ++e)
        if (ranked[e] > -INFINITY && (best < 0 || ranked[e] > ranked[best])) best = e;
      if (best < 0)
        for (best = 0; ranked[best] == -INFINITY; ++best) {
        }
      chosen[k] = {static_cast<int32_t>(best), probs[best]};
      ranked[best] = -INFINITY;
    }
    std::sort(chosen, chosen + c.top_k, [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
    float total = 0;
    for (int64_t k = 0; k < c.top_k; ++k) total += chosen[k].weight;
    total = std::max(total, c.norm_min);
    for (int64_t k = 0; k < c.top_k; ++k) {
      float weight = chosen[k].weight / total;
      if (c.dtype == Dtype::kBfloat16) {
        bf16 narrow;
        kernels.add(&weight, nullptr, 1, &narrow);
        floats.widen(&narrow, 1, &weight);
      }
      chosen[k].weight = weight;
    }
  }

  void assign(int64_t tokens) {
    expert_at.assign(static_cast<size_t>(c.experts + 1), 0);
    for (const Choice& choice : choices) ++expert_at[static_cast<size_t>(choice.expert) + 1];
    for (size_t e = 1; e < expert_at.size(); ++e) expert_at[e] += expert_at[e - 1];
    std::vector<int64_t> next(expert_at.begin(), expert_at.end() - 1);
    slot_of.resize(static_cast<size_t>(tokens * c.top_k));
    for (size_t i = 0; i < choices.size(); ++i) slot_of[i] = next[static_cast<size_t>(choices[i].expert)]++;
  }

  // out[slots][n] = x[slots][k] times each slot's expert.
  void grouped_product(const void* x, const Matrix& experts, void* out, Dtype out_dtype) const {
    const int64_t k = experts.k, n = experts.n;
    const Rows rows = prepared_rows(x, static_cast<int64_t>(slot_of.size()), k, c.dtype, experts.format);
    const RowKernels& out_kernels = row_kernels(out_dtype);
    const int64_t bytes = panel_bytes(experts.format, k), panels = (n + PANEL - 1) / PANEL;
    const int64_t runs = (panels + RUN_PANELS - 1) / RUN_PANELS, out_size = size_of(out_dtype);
    std::vector<int64_t> touched;
    for (int64_t e = 0; e < c.experts; ++e)
      if (slots_of(e) > 0) touched.push_back(e);
    parallel(static_cast<int64_t>(touched.size()) * runs, [&](int64_t task) {
      const int64_t expert = touched[static_cast<size_t>(task / runs)], first = expert_at[static_cast<size_t>(expert)];
      const int64_t count = slots_of(expert);
      float* acc = scratch<float>(kScratchTile, count * PANEL);
      for (int64_t p = task % runs * RUN_PANELS; p < std::min(panels, (task % runs + 1) * RUN_PANELS); ++p) {
        const char* panel = static_cast<const char*>(experts.panels) + (expert * panels + p) * bytes;
        const auto put = [&](Sums sums, int64_t from, int64_t some) {
          char* to = static_cast<char*>(out) + ((first + from) * n + p * PANEL) * out_size;
          out_kernels.put(sums, some, std::min(PANEL, n - p * PANEL), to, n * out_size);
        };
        panel_product(kernels, experts.format, rows.from(first), count, k, panel, panel + bytes, acc, sink_of(put));
      }
    });
  }

  int64_t slots_of(int64_t expert) const {
    return expert_at[static_cast<size_t>(expert) + 1] - expert_at[static_cast<size_t>(expert)];
  }

  void combine(int64_t first, int64_t tokens, const float* answers) const {
    const int64_t row = c.hidden * element;
    parallel(tokens, [&](int64_t t) {
      float* total = scratch<float>(kScratchTile, c.hidden);
      std::fill(total, total + c.hidden, 0.0f);
      for (int64_t k = t * c.top_k; k < (t + 1) * c.top_k; ++k)
        floats.axpy(answers + slot_of[static_cast<size_t>(k)] * c.hidden, choices[static_cast<size_t>(k)].weight, c.hidden,
                    total);
      const char* shared = c.shared == nullptr ? nullptr : static_cast<const char*>(c.shared) + (first + t) * row;
      kernels.add(total, shared, c.hidden, static_cast<char*>(c.out) + (first + t) * row);
    });
  }
};

}  // namespace

void moe(const MoeCall& call) {
  Moe layer(call);
  for (int64_t first = 0; first < call.tokens; first += CHUNK_TOKENS)
    layer.run_chunk(first, std::min(CHUNK_TOKENS, call.tokens - first));
}

}  // namespace fdserve
