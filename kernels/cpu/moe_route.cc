// Tiling: a gate's row by 4 tokens, which share loading it; few tokens cut the experts into parts, so that every thread has
// some. Floor: memory for a few tokens (the gates), multiply-adds of floats for many.
#include "moe_route.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "activations.h"
#include "pool.h"

namespace fdserve {
namespace {

constexpr int64_t PART = 16;  // experts of a task
constexpr float LEAST_RANK = std::numeric_limits<float>::lowest();  // of an expert that is not chosen already

// probs[tokens][experts] = x times the gates.
void gate_products(const Experts& experts, const void* x, int64_t tokens, Dtype dtype, float* probs) {
  const FloatKernels& floats = float_kernels();
  const int64_t hidden = experts.up_gate.k;
  const int64_t parts = (experts.count + PART - 1) / PART, blocks = (tokens + DOT_ROWS - 1) / DOT_ROWS;
  parallel(blocks * parts, [&](int64_t task) {
    const int64_t first = task / parts * DOT_ROWS, rows = std::min(DOT_ROWS, tokens - first);
    float* wide = scratch<float>(kScratchTile, DOT_ROWS * hidden);
    const char* from = static_cast<const char*>(x) + first * hidden * size_of(dtype);
    if (dtype == Dtype::kBfloat16) floats.widen(reinterpret_cast<const bf16*>(from), rows * hidden, wide);
    else std::memcpy(wide, from, static_cast<size_t>(rows * hidden) * sizeof(float));
    const int64_t begin = task % parts * PART;
    for (int64_t e = begin; e < std::min(begin + PART, experts.count); ++e)
      floats.dots(experts.gate + e * hidden, wide, rows, hidden, probs + first * experts.count + e, experts.count);
  });
}

// A NaN ranks last, so that a broken token still gets experts that exist.
void choose(const Experts& experts, const float* probs, float* ranked, Choice* chosen) {
  for (int64_t e = 0; e < experts.count; ++e) ranked[e] = std::max(probs[e] + experts.correction_bias[e], LEAST_RANK);
  for (int64_t k = 0; k < experts.top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts.count; ++e)
      if (ranked[e] > -INFINITY && (best < 0 || ranked[e] > ranked[best])) best = e;
    if (best < 0)
      for (best = 0; ranked[best] == -INFINITY; ++best) {
      }
    chosen[k] = {static_cast<int32_t>(best), probs[best]};
    ranked[best] = -INFINITY;
  }
  std::sort(chosen, chosen + experts.top_k, [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
}

// The chosen experts' weights, which are so far their probabilities.
void weigh(const Experts& experts, Dtype dtype, Choice* chosen) {
  float total = 0;
  for (int64_t k = 0; k < experts.top_k; ++k) total += chosen[k].weight;
  total = std::max(total, experts.norm_min);
  for (int64_t k = 0; k < experts.top_k; ++k) {
    float& weight = chosen[k].weight;
    weight /= total;
    if (dtype == Dtype::kFloat32) continue;
    bf16 narrow;
    row_kernels(dtype).add(&weight, nullptr, 1, &narrow);
    float_kernels().widen(&narrow, 1, &weight);
  }
}

}  // namespace

std::vector<Choice> route(const Experts& experts, const void* x, int64_t tokens, Dtype dtype) {
  std::vector<Choice> choices(static_cast<size_t>(tokens * experts.top_k));
  float* probs = scratch<float>(kScratchCall, tokens * experts.count);
  gate_products(experts, x, tokens, dtype, probs);
  each_row(tokens, experts.count * static_cast<int64_t>(sizeof(float)), [&](int64_t t) {
    float* of_token = probs + t * experts.count;
    Choice* chosen = choices.data() + t * experts.top_k;
    float_kernels().softmax(of_token, experts.count);
    choose(experts, of_token, scratch<float>(kScratchTile, experts.count), chosen);
    weigh(experts, dtype, chosen);
  });
  return choices;
}

}  // namespace fdserve
