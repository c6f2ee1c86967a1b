// Paged causal attention of a batch: store the new keys and values, then answer the queries.
//
// A work item is one key/value head of one sequence and a few of its new tokens: its rows are those tokens times the
// query heads of the group, so that all share each load of the cache. The softmax state starts anew at every KEY_PART
// keys and is folded into the total in order. Where one item is much of the work the parts themselves are shared out and
// folded afterwards: the same sums in the same order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace fdserve {
namespace {

constexpr int64_t ITEM_ROWS = 64;    // their queries, states and one tile of keys and values fit the L1/L2 caches
constexpr int64_t STORE_TOKENS = 16;

struct Item {
  int64_t sequence, kv_head, first_token, tokens;  // tokens as rows of the call
  int64_t position;                                // of the first
};

class Attention {
 public:
  explicit Attention(const AttentionCall& call)
      : c(call),
        kernels(row_kernels(call.dtype)),
        floats(float_kernels()),
        element(size_of(call.dtype)),
        group(call.heads / call.kv_heads),
        stride((call.head_dim + 63) / 64 * 64),
        group_bytes(call.byte_cache ? byte_group(call.head_dim) : KEY_GROUP * call.head_dim * size_of(call.dtype)),
        row_elements((call.heads + 2 * call.kv_heads) * call.head_dim) {}

  void run() {
    store_new();
    plan();
    int64_t longest = 0, total = 0;
    for (const Item& item : items) longest = std::max(longest, work_of(item)), total += work_of(item);
    if (longest * 2 * num_threads() > total && longest > KEY_PART) return run_parts();
    std::stable_sort(items.begin(), items.end(), [&](const Item& x, const Item& y) { return work_of(x) > work_of(y); });
    parallel(static_cast<int64_t>(items.size()), [&](int64_t i) { run_item(static_cast<size_t>(i)); });
  }

 private:
  const AttentionCall& c;
  const RowKernels& kernels;
  const FloatKernels& floats;
  const int64_t element, group, stride, group_bytes, row_elements;
  std::vector<Item> items;

  int64_t rows_of(const Item& item) const { return item.tokens * group; }
  int64_t keys_of(const Item& item) const { return item.position + item.tokens; }
  int64_t work_of(const Item& item) const { return item.tokens * keys_of(item); }
  int64_t parts_of(const Item& item) const { return (keys_of(item) + KEY_PART - 1) / KEY_PART; }

  const char* token(int64_t t, int64_t head) const {
    return static_cast<const char*>(c.qkv) + (t * row_elements + head * c.head_dim) * element;
  }

  // The 16 keys (or values) of a head that hold `position`.
  char* cache_group(void* cache, int64_t sequence, int64_t position, int64_t kv_head) const {
    const int64_t block = c.block_tables[sequence * c.blocks_per_sequence + position / c.block_size];
    const int64_t slot = (block * c.kv_heads + kv_head) * c.block_size + position % c.block_size;
    return static_cast<char*>(cache) + slot / KEY_GROUP * group_bytes;
  }

  void store_new() {
    std::vector<std::pair<int64_t, int64_t>> chunks;  // (sequence, first row of the call)
    for (int64_t s = 0; s < c.sequences; ++s)
      for (int64_t t = c.query_starts[s]; t < c.query_starts[s + 1]; t += STORE_TOKENS) chunks.emplace_back(s, t);
    const auto store_key = c.byte_cache ? kernels.store_key_bytes : kernels.store_key;
    const auto store_value = c.byte_cache ? kernels.store_value_bytes : kernels.store_value;
    parallel(static_cast<int64_t>(chunks.size()), [&](int64_t i) {
      const auto [sequence, first] = chunks[static_cast<size_t>(i)];
      const int64_t start = c.query_starts[sequence], end = c.query_starts[sequence + 1];
      char* rotated = scratch<char>(kScratchTile, c.kv_heads * c.head_dim * element);
      for (int64_t t = first; t < std::min(first + STORE_TOKENS, end); ++t) {
        const int64_t position = c.context_lens[sequence] + t - start, lane = position % KEY_GROUP;
        kernels.rotate(token(t, c.heads), c.kv_heads, c.head_dim, c.rope + t * c.head_dim, rotated);
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          store_key(rotated + h * c.head_dim * element, c.head_dim, lane,
                            cache_group(c.k_cache, sequence, position, h));
          store_value(token(t, c.heads + c.kv_heads + h), c.head_dim, lane,
                              cache_group(c.v_cache, sequence, position, h));
        }
      }
    });
  }

  void plan() {
    const int64_t per_item = std::max<int64_t>(1, ITEM_ROWS / group);
    for (int64_t s = 0; s < c.sequences; ++s)
      for (int64_t t = c.query_starts[s]; t < c.query_starts[s + 1]; t += per_item)
        for (int64_t h = 0; h < c.kv_heads; ++h)
          items.push_back({s, h, t, std::min<int64_t>(per_item, c.query_starts[s + 1] - t),
                           c.context_lens[s] + t - c.query_starts[s]});
  }

  char* rotated_queries(const Item& item) const {
    char* q = scratch<char>(kScratchQuery, (rows_of(item) + SPARE_ROWS) * c.head_dim * element);
    for (int64_t t = 0; t < item.tokens; ++t)
      kernels.rotate(token(item.first_token + t, item.kv_head * group), group, c.head_dim,
                     c.rope + (item.first_token + t) * c.head_dim, q + t * group * c.head_dim * element);
    return q;
  }

  struct Part {
    const Item* item;
    int64_t number;
  };

  // found(g, slot) for each group of 16 keys of the part and the slot of the first.
  template <class Found>
  void each_group(Part part, const Found& found) const {
    const Item& item = *part.item;
    const int64_t first = part.number * KEY_PART, count = std::min(KEY_PART, keys_of(item) - first);
    const int32_t* block = c.block_tables + item.sequence * c.blocks_per_sequence + first / c.block_size;
    int64_t offset = first % c.block_size;
    for (int64_t g = 0; g * KEY_GROUP < count; ++g, offset += KEY_GROUP) {
      if (offset == c.block_size) offset = 0, ++block;
      found(g, (*block * c.kv_heads + item.kv_head) * c.block_size + offset);
    }
  }

  KeyPart keys_at(Part part, Part following) const {
    KeyPart found = {};
    found.bytes = c.byte_cache;
    const auto group_at = [&](void* cache, int64_t slot) { return static_cast<char*>(cache) + slot / KEY_GROUP * group_bytes; };
    each_group(part, [&](int64_t g, int64_t slot) {
      found.keys[g] = group_at(c.k_cache, slot);
      found.values[g] = group_at(c.v_cache, slot);
    });
    if (following.item != nullptr)
      each_group(following, [&](int64_t g, int64_t slot) {
        found.following[g] = group_at(c.k_cache, slot);
        found.following_values[g] = group_at(c.v_cache, slot);
      });
    return found;
  }

  // The state of the item's rows over the keys of one part alone, before this thread is likely to take `following`.
  void run_part(Part part, Part following, const char* q, AttendState state) const {
    const Item& item = *part.item;
    const int64_t rows = rows_of(item), first = part.number * KEY_PART;
    int* seen = scratch<int>(kScratchSeen, rows);
    for (int64_t r = 0; r < rows; ++r)
      seen[r] = static_cast<int>(std::clamp<int64_t>(item.position + r / group + 1 - first, 0, KEY_PART));
    const float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    kernels.attend(q, rows, c.head_dim, keys_at(part, following), seen, scale, state, stride);
  }

  int64_t state_floats(int64_t rows) const { return ((rows + SPARE_ROWS) * stride + 2 * rows + 15) / 16 * 16; }

  AttendState state_at(float* memory, int64_t rows) const {
    float* peak = memory + (rows + SPARE_ROWS) * stride;
    return {peak, peak + rows, memory};
  }

  void write(const Item& item, AttendState state) const {
    const int64_t rows = rows_of(item);
    floats.finish(state, rows, c.head_dim, stride);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = item.kv_head * group + r % group, t = item.first_token + r / group;
      kernels.add(state.values + r * stride, nullptr, c.head_dim,
                  static_cast<char*>(c.out) + (t * c.heads + head) * c.head_dim * element);
    }
  }

  // Folds the parts in order; `part_of(p)` is the state of part p.
  template <class PartOf>
  void fold(const Item& item, const PartOf& part_of) const {
    const int64_t rows = rows_of(item);
    const AttendState total = part_of(0);
    for (int64_t p = 1; p < parts_of(item); ++p) floats.merge(total, part_of(p), rows, c.head_dim, stride);
    write(item, total);
  }

  void run_item(size_t number) const {
    const Item& item = items[number];
    const Part after = {number + 1 < items.size() ? &items[number + 1] : nullptr, 0};
    const int64_t rows = rows_of(item);
    const char* q = rotated_queries(item);
    float* memory = scratch<float>(kScratchTile, 2 * state_floats(rows));
    fold(item, [&](int64_t p) {
      const AttendState state = state_at(memory + (p == 0 ? 0 : state_floats(rows)), rows);
      run_part({&item, p}, p + 1 < parts_of(item) ? Part{&item, p + 1} : after, q, state);
      return state;
    });
  }

  void run_parts() const {
    std::vector<Part> parts;
    std::vector<int64_t> places, begins;  // in the memory: of a part, and of an item's first
    int64_t floats_needed = 0;
    for (const Item& item : items) {
      begins.push_back(floats_needed);
      for (int64_t p = 0; p < parts_of(item); ++p, floats_needed += state_floats(rows_of(item))) {
        parts.push_back({&item, p});
        places.push_back(floats_needed);
      }
    }
    float* memory = scratch<float>(kScratchCall, floats_needed);
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t task) {
      const auto i = static_cast<size_t>(task);
      const Item& item = *parts[i].item;
      const Part following = i + 1 < parts.size() ? parts[i + 1] : Part{nullptr, 0};
      run_part(parts[i], following, rotated_queries(item), state_at(memory + places[i], rows_of(item)));
    });
    parallel(static_cast<int64_t>(items.size()), [&](int64_t i) {
      const Item& item = items[static_cast<size_t>(i)];
      fold(item, [&](int64_t p) {
        return state_at(memory + begins[static_cast<size_t>(i)] + p * state_floats(rows_of(item)), rows_of(item));
      });
    });
  }
};

}  // namespace

void attention(const AttentionCall& call) {
  if (call.tokens > 0) Attention(call).run();
}

}  // namespace fdserve
