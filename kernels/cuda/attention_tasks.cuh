// How attention deals its work to blocks, what one works on, and how its tiles of keys and values come.
#pragma once

#include "attention.cuh"
#include "launchers.h"

namespace fdserve::cuda {

constexpr int ATTENTION_WARPS = 4;
constexpr int ATTENTION_THREADS = ATTENTION_WARPS * WARP;
constexpr int WIDE_TILES = 2;                        // of 16 rows, for each warp
constexpr int WARP_ROWS = WIDE_TILES * ROW_TILE;     // of a wide block
constexpr int WIDE_ROWS = ATTENTION_WARPS * WARP_ROWS;

constexpr int64_t MAX_WORKSPACE_BYTES = 512 << 20;

// How parts are dealt to blocks: part p to block p % narrow of a sequence with few rows, p % wide of a tile of rows of
// another; 1: all parts to one block, which merges them itself. The states of parts go through the workspace otherwise.
struct Plan {
  int narrow, wide, parts, narrow_rows;
  int64_t narrow_floats, wide_floats;
};

// Shares of parts that make `wanted` blocks of `blocks`.
inline int shares(int64_t blocks, int64_t wanted, int parts) {
  const int64_t share = (wanted + blocks - 1) / blocks;
  return static_cast<int>(share < parts ? share : parts);
}

// On so many multiprocessors; with none nothing is shared out.
inline Plan plan_of(int64_t sequences, int64_t tokens, int64_t max_query_len, int64_t longest, int64_t heads,
                    int64_t kv_heads, int64_t head_dim, int multiprocessors) {
  const int64_t group = heads / kv_heads, rows = max_query_len * group, state = head_dim + 2;
  Plan plan = {1, 1, static_cast<int>((longest + KEY_PART - 1) / KEY_PART), 0, 0, 0};
  if (plan.parts < 2 || multiprocessors == 0) return plan;
  constexpr int64_t MOST = MAX_WORKSPACE_BYTES / static_cast<int64_t>(sizeof(float));
  plan.narrow_rows = static_cast<int>(rows < ROW_TILE ? rows : ROW_TILE);
  const int64_t narrow_floats = sequences * kv_heads * plan.narrow_rows * plan.parts * state;
  // Several rounds of blocks, for the last round leaves processors idle; and however many sequences there are, no block
  // walks more than a quarter of a long one while all others wait.
  int narrow = shares(sequences * kv_heads, 16 * multiprocessors, plan.parts);
  if (plan.parts >= 8 && narrow < 4) narrow = 4;
  if (narrow > 1 && narrow_floats <= MOST) plan.narrow = narrow, plan.narrow_floats = narrow_floats;
  // Whole tiles of rows where they fill the processors: the states would be more than is read otherwise.
  const int64_t wide_floats = tokens * heads * plan.parts * state;
  const int64_t blocks = (tokens * group / WIDE_ROWS + 1) * kv_heads;
  if (rows > ROW_TILE && blocks < 2 * multiprocessors && wide_floats <= MOST)
    plan.wide = shares(blocks, 4 * multiprocessors, plan.parts), plan.wide_floats = wide_floats;
  return plan;
}

struct Call {
  Paged paged;
  int heads, group, head_dim;
  float scale;  // of the scores, times log2(e)
  Plan plan;
  float* workspace;  // narrow [sequences][kv_heads][narrow_rows], then wide [tokens][heads], of [parts] states of parts

  // How many tiles of rows there may be: the upper bound that `Task::find_wide` numbers them by.
  __host__ __device__ int64_t slots(int64_t tokens) const { return tokens * group / WIDE_ROWS + paged.sequences; }
};

// Rows [first_row, first_row + ...) of one sequence and key/value head.
struct Task {
  int sequence, head, first_row, rows, token, context, end, first_part, stride;

  // Of a sequence of at most 16 rows; false if there is nothing to do. Grid: (plan.narrow, kv_heads, sequences).
  __device__ bool find_narrow(const Call& call) {
    sequence = blockIdx.z;
    first_row = 0;
    return find(call, ROW_TILE, blockIdx.x, call.plan.narrow) && rows <= ROW_TILE;
  }

  // Of a longer one. Grid: (slots * plan.wide, kv_heads). Sequence s has the slots from starts[s] * group / 128 + s on:
  // always enough, without a look at the sequences between. The last come first: they have the most keys.
  __device__ bool find_wide(const Call& call, int slots) {
    const int slot = slots - 1 - static_cast<int>(blockIdx.x) / call.plan.wide;
    auto first_slot = [&](int s) { return call.paged.query_starts[s] * call.group / WIDE_ROWS + s; };
    sequence = 0;
    for (int low = 1, high = call.paged.sequences - 1; low <= high;) {
      const int middle = (low + high) / 2;
      if (first_slot(middle) <= slot)
        sequence = middle, low = middle + 1;
      else
        high = middle - 1;
    }
    first_row = (slot - first_slot(sequence)) * WIDE_ROWS;
    return find(call, WIDE_ROWS, blockIdx.x % call.plan.wide, call.plan.wide) && rows > ROW_TILE;
  }

  // How many keys of the tile at `first_key` a row sees; none for rows past the last.
  __device__ int seen(int row, int group, int first_key) const {
    return row < rows ? context + row / group + 1 - first_key : 0;
  }

  // Where a row's result goes: its place among [tokens][heads].
  __device__ int64_t place(int row, const Call& call) const {
    return static_cast<int64_t>(token + row / call.group) * call.heads + head * call.group + row % call.group;
  }

 private:
  __device__ bool find(const Call& call, int rows_a_block, int share, int shares) {
    head = blockIdx.y;
    token = call.paged.query_starts[sequence];
    rows = (call.paged.query_starts[sequence + 1] - token) * call.group;
    context = call.paged.context_lens[sequence];
    // No row of the block sees a key from here on.
    end = context + (min(first_row + rows_a_block, rows) - 1) / call.group + 1;
    first_part = share, stride = shares;
    return first_row < rows && first_part * KEY_PART < end;
  }
};

// The state of part `part` of a row in the workspace: values[head_dim], peak, mass.
__device__ inline float* narrow_part(const Call& call, int sequence, int head, int row, int part) {
  const int64_t place = (static_cast<int64_t>(sequence) * call.paged.kv_heads + head) * call.plan.narrow_rows + row;
  return call.workspace + (place * call.plan.parts + part) * (call.head_dim + 2);
}
__device__ inline float* wide_part(const Call& call, int64_t place, int part) {
  return call.workspace + call.plan.narrow_floats + (place * call.plan.parts + part) * (call.head_dim + 2);
}

template <class T, int HD, int THREADS = ATTENTION_THREADS>
__device__ void load_queries(const T* q, const Task& task, const Call& call, int rows, T* tile) {
  constexpr int CHUNKS = HD / 8;
  for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const bool there = task.first_row + row < task.rows;
    const T* from = there ? q + task.place(task.first_row + row, call) * HD + chunk * 8 : q;
    copy_async_16(tile + chunk_at<HD>(row, chunk), from, there);
  }
}

// A sequence's keys and values of one head, in tiles. A warp copies 16 rows of each tile; its lanes look up where those
// lie, a tile ahead, for the table's entry must have come before a copy can start.
template <class T, int HD>
class Tiles {
 public:
  __device__ Tiles(const T* keys, const T* values, const Task& task, const Call& call)
      : keys(keys), values(values), end(task.end),
        head{call.paged.block_tables + static_cast<int64_t>(task.sequence) * call.paged.table_width, call.paged.block_size,
             call.paged.kv_heads, task.head} {}

  // Calls body(first key of the tile, its keys, its values) for every tile of a part, while the next one is on its way.
  // All of the block's earlier copies are complete at the first call.
  template <class Body>
  __device__ void for_each(int part, T* buffers, Body body) const {
    const int first = part * KEY_PART, last = min(first + KEY_PART, end);
    copy(slot_at(first), buffers);
    int slot = slot_at(first + KEY_TILE), turn = 0;
    commit_copies();
    for (int key = first; key < last; key += KEY_TILE, turn ^= 1) {
      if (key + KEY_TILE < last) {
        copy(slot, buffers + (turn ^ 1) * 2 * SIZE);
        slot = slot_at(key + 2 * KEY_TILE);
      }
      commit_copies();
      wait_copies<1>();
      __syncthreads();
      body(key, buffers + turn * 2 * SIZE, buffers + turn * 2 * SIZE + SIZE);
      __syncthreads();  // before the buffer is written again
    }
  }

 private:
  static constexpr int SIZE = KEY_TILE * HD, WARP_KEYS = KEY_TILE / ATTENTION_WARPS;

  const T *keys, *values;
  const int end;
  const PagedHead head;

  // That of row lane % 16 of this warp's 16 in the tile; negative from `end` on.
  __device__ int slot_at(int first) const {
    const int key = first + threadIdx.x / WARP * WARP_KEYS + threadIdx.x % WARP_KEYS;
    return key < end ? head.slot(key) : -1;
  }

  // Starts the copies of a tile's keys and values, behind each other in `tile`; zeros from `end` on.
  __device__ void copy(int slot, T* tile) const {
    constexpr int CHUNKS = HD / 8, ROWS = WARP / CHUNKS;
    const int lane = threadIdx.x % WARP, chunk = lane % CHUNKS;
#pragma unroll
    for (int i = 0; i < WARP_KEYS; i += ROWS) {
      const int from = __shfl_sync(ALL, slot, i + lane / CHUNKS);
      const int64_t at = from >= 0 ? static_cast<int64_t>(from) * HD + chunk * 8 : 0;
      T* to = tile + chunk_at<HD>(threadIdx.x / WARP * WARP_KEYS + i + lane / CHUNKS, chunk);
      copy_async_16(to, keys + at, from >= 0);
      copy_async_16(to + SIZE, values + at, from >= 0);
    }
  }
};

}  // namespace fdserve::cuda
