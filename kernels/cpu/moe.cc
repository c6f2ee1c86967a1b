// Mixture of experts: route, group the tokens by expert, two products an expert, weighted sum.
//
// A slot is one (token, expert) pair; slots are ordered by expert, so an expert's rows lie together and its weights are
// streamed once a chunk of tokens. Products are those of linear.cc, in groups of no more rows than one of its blocks has:
// what a token becomes for them is computed once, and copied to each of its slots. A token's sum runs over its experts in
// ascending id. Floor: memory for a few tokens (the experts touched are read once), dot products for many.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "moe_route.h"
#include "pool.h"

namespace fdserve {
namespace {

constexpr int64_t CHUNK_TOKENS = 1024;  // bounds the memory for slots
constexpr int64_t RUN_PANELS = 4;       // of a task

// Slots of one expert from `first` on that are multiplied together.
struct Group {
  int64_t expert, first, rows;
  int64_t at;  // of its rows among formed ones: a multiple of 16
};

// Up to 16 rows of a group from `first` on.
struct Strip {
  const Group* group;
  int64_t first, rows;
};

class Moe {
 public:
  explicit Moe(const MoeCall& call)
      : c(call),
        kernels(row_kernels(call.dtype)),
        floats(float_kernels()),
        element(size_of(call.dtype)),
        hidden(call.experts.up_gate.k),
        inner(call.experts.down.k),
        top_k(call.experts.top_k),
        form(call.dtype, call.experts.up_gate.format, hidden),
        inner_form(call.dtype, call.experts.down.format, inner) {}

  void run_chunk(int64_t first, int64_t tokens) {
    const char* x = static_cast<const char*>(c.x) + first * hidden * element;
    choices = route(c.experts, x, tokens, c.dtype);
    const int64_t slots = tokens * top_k, rows = order(tokens);
    float* answers = scratch<float>(kScratchMoe, slots * hidden + slots * inner * 3);
    char* both = reinterpret_cast<char*>(answers + slots * hidden);
    char* activated = both + 2 * slots * inner * element;
    const FormedRows of_slots(kScratchRows, form, rows);
    copy_to_slots(x, tokens, of_slots);
    up(of_slots, both, activated);
    const FormedRows between(kScratchCall, inner_form, rows);
    activate(both, activated, between);
    down(between, answers);
    combine(first, tokens, answers);
  }

 private:
  const MoeCall& c;
  const RowKernels& kernels;
  const FloatKernels& floats;
  const int64_t element, hidden, inner, top_k;
  const RowForm form, inner_form;  // of tokens, and of what the first product becomes
  std::vector<Choice> choices;     // [tokens][top_k], ascending expert
  std::vector<int64_t> slot_of;    // of each choice
  std::vector<int64_t> token_of;   // of each slot
  std::vector<Group> groups;
  std::vector<Strip> strips;

  // Gives each choice its slot, and groups these; returns how many rows there are with what fills their tiles.
  int64_t order(int64_t tokens) {
    std::vector<int64_t> at(static_cast<size_t>(c.experts.count + 1), 0);  // each expert's first slot
    for (const Choice& choice : choices) ++at[static_cast<size_t>(choice.expert) + 1];
    for (size_t e = 1; e < at.size(); ++e) at[e] += at[e - 1];
    const int64_t rows = make_groups(at);
    slot_of.resize(static_cast<size_t>(tokens * top_k)), token_of.resize(slot_of.size());
    for (size_t i = 0; i < choices.size(); ++i) {
      slot_of[i] = at[static_cast<size_t>(choices[i].expert)]++;
      token_of[static_cast<size_t>(slot_of[i])] = static_cast<int64_t>(i) / top_k;
    }
    return rows;
  }

  int64_t make_groups(const std::vector<int64_t>& slot_at) {
    const int64_t most = rows_of_block(form.bytes);
    int64_t at = 0;
    groups.clear(), strips.clear();
    for (int64_t e = 0; e < c.experts.count; ++e) {
      const int64_t first = slot_at[static_cast<size_t>(e)], rows = slot_at[static_cast<size_t>(e) + 1] - first;
      const int64_t blocks = (rows + most - 1) / most;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = start_of_block(kernels, rows, blocks, b);
        groups.push_back({e, first + begin, start_of_block(kernels, rows, blocks, b + 1) - begin, at});
        at += (groups.back().rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
      }
    }
    for (const Group& group : groups)
      for (int64_t r = 0; r < group.rows; r += TILE_ROWS)
        strips.push_back({&group, r, std::min(TILE_ROWS, group.rows - r)});
    return at;
  }

  // As in linear.cc, for each group.
  static bool tiled(const RowForm& of, const Group& group) { return of.fits_tiles && group.rows > TILED_ROWS; }
  bool fused(const Group& group) const { return group.rows > TILED_ROWS && inner % PANEL == 0; }

  // Calls make(group, slot, row, scales) for each row of the groups.
  template <class Make>
  void form_slots(const RowForm& of, const FormedRows& out, const Make& make) const {
    parallel(static_cast<int64_t>(strips.size()), [&](int64_t s) {
      const Strip& strip = strips[static_cast<size_t>(s)];
      const Group& group = *strip.group;
      const int64_t slot = group.first + strip.first, at = group.at + strip.first;
      const auto put = [&](int64_t i, char* row, char* scales) { make(group, slot + i, row, scales); };
      if (tiled(of, group)) return out.put_tile(at, strip.rows, put);
      for (int64_t i = 0; i < strip.rows; ++i) put(i, out.row(at + i), out.scales(at + i));
    });
  }

  void copy_to_slots(const char* x, int64_t tokens, const FormedRows& out) const {
    const Rows formed = formed_rows(form, x, tokens, false);
    form_slots(form, out, [&](const Group&, int64_t slot, char* row, char* scales) {
      const Rows token = formed.from(token_of[static_cast<size_t>(slot)]);
      std::memcpy(row, token.data, static_cast<size_t>(form.bytes));
      if (form.digits) std::memcpy(scales, token.sum_scales, static_cast<size_t>(form.scale_bytes));
      else if (form.scale_bytes != 0) std::memcpy(scales, token.scales, static_cast<size_t>(form.scale_bytes));
    });
  }

  // Calls work(group, its expert's matrix, panel) for each of these panels.
  template <class Work>
  void each_panel(const Matrix& experts, const Work& work) const {
    const int64_t panels = (experts.n + PANEL - 1) / PANEL, runs = (panels + RUN_PANELS - 1) / RUN_PANELS;
    const int64_t bytes = panels * panel_bytes(experts.format, experts.k);
    parallel(static_cast<int64_t>(groups.size()) * runs, [&](int64_t task) {
      const Group& group = groups[static_cast<size_t>(task / runs)];
      Matrix expert = experts;
      expert.panels = static_cast<const char*>(experts.panels) + group.expert * bytes;
      for (int64_t p = task % runs * RUN_PANELS; p < std::min(panels, (task % runs + 1) * RUN_PANELS); ++p)
        work(group, expert, p);
    });
  }

  // Into `both`, of fused groups swiglu of it into `activated`.
  void up(const FormedRows& x, char* both, char* activated) const {
    const int64_t row = inner * element;
    each_panel(c.experts.up_gate, [&](const Group& group, const Matrix& expert, int64_t p) {
      const Rows rows = x.from(group.at, tiled(form, group));
      char* to = fused(group) ? activated + group.first * row : both + group.first * 2 * row;
      if (!fused(group)) linear_panel(kernels, expert, p, rows, group.rows, to, c.dtype);
      else if (p % 2 == 0) swiglu_panel(kernels, c.dtype, expert, p / 2, rows, group.rows, to);
    });
  }

  void activate(const char* both, char* activated, const FormedRows& out) const {
    const int64_t row = inner * element;
    form_slots(inner_form, out, [&](const Group& group, int64_t slot, char* formed, char* scales) {
      char* x = activated + slot * row;
      if (!fused(group)) kernels.swiglu(both + slot * 2 * row, 1, inner, x, row);
      inner_form.make(x, formed, scales);
    });
  }

  void down(const FormedRows& x, float* answers) const {
    each_panel(c.experts.down, [&](const Group& group, const Matrix& expert, int64_t p) {
      const Rows rows = x.from(group.at, tiled(inner_form, group));
      linear_panel(kernels, expert, p, rows, group.rows, answers + group.first * hidden, Dtype::kFloat32);
    });
  }

  void combine(int64_t first, int64_t tokens, const float* answers) const {
    const int64_t row = hidden * element;
    parallel(tokens, [&](int64_t t) {
      float* total = scratch<float>(kScratchTile, hidden);
      std::fill(total, total + hidden, 0.0f);
      for (int64_t k = t * top_k; k < (t + 1) * top_k; ++k)
        floats.axpy(answers + slot_of[static_cast<size_t>(k)] * hidden, choices[static_cast<size_t>(k)].weight, hidden,
                    total);
      const char* shared = c.shared == nullptr ? nullptr : static_cast<const char*>(c.shared) + (first + t) * row;
      kernels.add(total, shared, hidden, static_cast<char*>(c.out) + (first + t) * row);
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
