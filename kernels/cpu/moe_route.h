// Which experts a token goes to, and with what weights.
#pragma once

#include <vector>

#include "kernels.h"

namespace fdserve {

struct Choice {
  int32_t expert;
  float weight;
};

// Of x[tokens][hidden]: [tokens][top_k], ascending experts.
std::vector<Choice> route(const Experts& experts, const void* x, int64_t tokens, Dtype dtype);

}  // namespace fdserve
