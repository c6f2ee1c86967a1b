// The wide kernel of attention for Hopper (sm_90a): 128 rows of one key/value head and one sequence, 64 for each of two
// warpgroups, whose results have the bits of the other kernels'. See attention.cuh for the arithmetic.
//
// Bound by the tensor cores: 4 * rows * keys * head_dim FLOP over the matmul rate. Queries and weights are left operands, in
// registers; tiles of keys and values, right operands, come by asynchronous copies into a ring of five, of which two are
// under way. A tile's scores are multiplied while the softmax of the tile before runs, and its values while that of the next
// does, so that the tensor cores have work in line all the time; one barrier a tile is all that the warpgroups share.
// Registers: 32 for queries, 2 * 32 for scores, 16 for weights, 64 for values; the sum of parts waits in memory. Shared
// memory: 160 KiB, so that a multiprocessor has one block.
#pragma once

#include "attention_totals.cuh"
#include "wgmma.cuh"

namespace fdserve::cuda {

constexpr int HOPPER_THREADS = 2 * WARPGROUP;
constexpr int HOPPER_TILES = 5;  // of keys and of values in the ring
static_assert(WIDE_ROWS == HOPPER_THREADS / WARP * ROW_TILE, "tasks deal as many rows to either kernel");

template <class T, int HD>
constexpr size_t hopper_shared() { return HOPPER_TILES * 2 * KEY_TILE * HD * sizeof(T); }

// A tile of keys or values: its columns' halves (of 64) behind each other, as products want right operands.
__device__ inline int ring_chunk_at(int row, int chunk) {
  return chunk / 8 * KEY_TILE * SWIZZLED_ROW + swizzled_at(row, chunk % 8);
}

// A block's tiles of keys and values, numbered through its parts. Each of 8 warps copies 8 keys and values of a tile; lanes
// look up where those lie a tile ahead, for the table's entry must have come before a copy can start.
template <class T, int HD>
class Ring {
 public:
  static constexpr int SIZE = KEY_TILE * HD, PART_TILES = KEY_PART / KEY_TILE;
  static_assert(WIDE_ROWS <= 2 * KEY_TILE, "the queries fit the place of a tile's keys and values");

  __device__ Ring(const T* keys, const T* values, const Task& task, const Call& call, T* tiles)
      : keys(keys), values(values), tiles(tiles), task(task),
        head{call.paged.block_tables + static_cast<int64_t>(task.sequence) * call.paged.table_width, call.paged.block_size,
             call.paged.kv_heads, task.head} {}

  // The first key of a tile; `task.end` or more: there is no such tile.
  __device__ int key(int tile) const {
    return (task.first_part + tile / PART_TILES * task.stride) * KEY_PART + tile % PART_TILES * KEY_TILE;
  }

  // Starts the first copies.
  __device__ void begin() {
    slot = slot_at(0);
    for (int tile = 0; tile < HOPPER_TILES - 2; ++tile) copy(tile);
  }
  // Returns when tile 0 is there for all.
  __device__ void wait_first() const { wait<HOPPER_TILES - 3>(); }
  // Returns when the tile after `tile` is there for all, and no thread has products of tiles before `tile - 1` under way if
  // none had when it called.
  __device__ void wait_after() const { wait<HOPPER_TILES - 4>(); }
  // After that wait: starts another copy, in place of the tile two before `tile`.
  __device__ void advance(int tile) { copy(tile + HOPPER_TILES - 2); }

  __device__ Shared keys_at(int tile) const { return shared_at(tiles + tile % HOPPER_TILES * 2 * SIZE); }
  __device__ Shared values_at(int tile) const { return shared_at(tiles + tile % HOPPER_TILES * 2 * SIZE + SIZE); }

 private:
  static constexpr int WARP_KEYS = KEY_TILE / (HOPPER_THREADS / WARP);

  const T *keys, *values;
  T* tiles;
  const Task& task;
  const PagedHead head;
  int slot;

  // Of row lane % 8 of this warp's in a tile; negative from the end on.
  __device__ int slot_at(int tile) const {
    const int at = key(tile) + threadIdx.x / WARP * WARP_KEYS + threadIdx.x % WARP_KEYS;
    return at < task.end ? head.slot(at) : -1;
  }

  template <int UNDER_WAY>
  __device__ void wait() const {
    wait_copies<UNDER_WAY>();
    show_to_products();
    __syncthreads();
  }

  // A group of copies, which is empty past the last tile: what the ring holds there is multiplied but not used.
  __device__ void copy(int tile) {
    constexpr int CHUNKS = HD / 8, ROWS = WARP / CHUNKS;
    if (key(tile) < task.end) {
      T* const to = tiles + tile % HOPPER_TILES * 2 * SIZE;
      const int lane = threadIdx.x % WARP, chunk = lane % CHUNKS;
#pragma unroll
      for (int i = 0; i < WARP_KEYS; i += ROWS) {
        const int from = __shfl_sync(ALL, slot, i + lane / CHUNKS);
        const int64_t at = from >= 0 ? static_cast<int64_t>(from) * HD + chunk * 8 : 0;
        const int place = ring_chunk_at(threadIdx.x / WARP * WARP_KEYS + i + lane / CHUNKS, chunk);
        copy_async_16(to + place, keys + at, from >= 0);
        copy_async_16(to + SIZE + place, values + at, from >= 0);
      }
      slot = slot_at(tile + 1);
    }
    commit_copies();
  }
};

// Begins scores[64][64] = queries times keys.
template <class T, int HD>
__device__ inline void begin_scores(float (&scores)[8][4], const uint32_t (&queries)[HD / 16][4], Shared keys) {
  const Operand operand = operand_at(keys, 16, 8 * SWIZZLED_ROW * sizeof(T));
#pragma unroll
  for (int step = 0; step < HD / 16; ++step)
    begin_product<T, 0>(scores, queries[step],
                        operand_after(operand, step / 4 * KEY_TILE * SWIZZLED_ROW * sizeof(T) + step % 4 * 32), step > 0);
}

// Begins sums[64][HD] (+)= weights times values.
template <class T, int HD>
__device__ inline void begin_values(float (&sums)[HD / 8][4], const uint32_t (&weights)[KEY_TILE / 16][4], Shared values,
                                    bool add) {
  const Operand operand =
      operand_at(values, KEY_TILE * SWIZZLED_ROW * sizeof(T), 8 * SWIZZLED_ROW * sizeof(T));
#pragma unroll
  for (int step = 0; step < KEY_TILE / 16; ++step)
    begin_product<T, 1>(sums, weights[step], operand_after(operand, step * 16 * SWIZZLED_ROW * sizeof(T)),
                        add || step > 0);
}

template <class T, int HD>
__device__ void attend_wide(const T* q, const T* k_cache, const T* v_cache, T* out, const Call& call, int slots) {
  Task task;
  if (!task.find_wide(call, slots)) return;
  T* const shared = reinterpret_cast<T*>(dynamic_shared());
  const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * ROW_TILE;
  const int first_row = task.first_row + warp_row;
  const int rows[2] = {first_row + lane / 4, first_row + lane / 4 + 8};
  const int all_see = task.context + first_row / call.group + 1;  // all rows of the warp see the keys before it

  // The queries come beside the first tiles, in the place of one that is copied when all have read them.
  Ring<T, HD> ring(k_cache, v_cache, task, call, shared);
  T* const place = shared + (HOPPER_TILES - 2) * 2 * ring.SIZE;
  load_queries<T, HD, HOPPER_THREADS>(q, task, call, WIDE_ROWS, place);
  commit_copies();
  ring.begin();
  wait_copies<HOPPER_TILES - 2>();
  __syncthreads();
  uint32_t queries[HD / 16][4];
  const Shared queries_at = rows_at<HD>(place + warp_row * HD);
#pragma unroll
  for (int step = 0; step < HD / 16; ++step) load_rows<HD>(queries[step], queries_at, step);

  Totals<T, HD> totals;
  Softmax state;
  float scores[8][4], next[8][4], sums[HD / 8][4];
  uint32_t weights[KEY_TILE / 16][4];
  ring.wait_first();
  begin_products();
  begin_scores<T, HD>(next, queries, ring.keys_at(0));
  commit_products();
  wait_products<0>();
  hold(next);
  for (int tile = 0; ring.key(tile) < task.end; ++tile) {
    const int key = ring.key(tile), part = key / KEY_PART;
    ring.wait_after();
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[j][i] = next[j][i];
    hold(next);
    begin_products();
    begin_scores<T, HD>(next, queries, ring.keys_at(tile + 1));
    commit_products();
    ring.advance(tile);
    if (key + KEY_TILE > all_see)
      hide(scores, {task.seen(rows[0], call.group, key), task.seen(rows[1], call.group, key)});
    float factor[2];
    weigh(scores, state, call.scale, factor);
    compute_before_wait(state.mass[0] + state.mass[1]);
    wait_products<1>();  // for the values of the tile before: only the scores just begun are under way
    hold(sums);
    const bool is_first = key % KEY_PART == 0;
    if (!is_first) scale_values(sums, factor);
#pragma unroll
    for (int step = 0; step < KEY_TILE / 16; ++step) weights_of<T>(weights[step], scores, step);
    hold(sums);
    begin_products();
    begin_values<T, HD>(sums, weights, ring.values_at(tile), !is_first);
    commit_products();
    wait_products<1>();
    hold(next);
    if (key % KEY_PART + KEY_TILE < KEY_PART && key + KEY_TILE < task.end) continue;

    wait_products<0>();
    hold(sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) totals.end_part(task, call, part, rows[half], half, state, sums, out);
    state = Softmax();
  }
}

// Compiled for anything but sm_90a it is a stub, which no block of its size can be launched of: `has_hopper_kernel` asks.
#ifdef FDSERVE_WGMMA
template <class T, int HD>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    hopper_kernel(const T* q, const T* k_cache, const T* v_cache, T* out, Call call, int slots) {
  attend_wide<T, HD>(q, k_cache, v_cache, out, call, slots);
}
#else
template <class T, int HD>
__global__ void __launch_bounds__(WARP, 1) hopper_kernel(const T*, const T*, const T*, T*, Call, int) {}
#endif

// Whether the device has it.
template <class T, int HD>
bool has_hopper_kernel() { return most_threads(hopper_kernel<T, HD>) >= HOPPER_THREADS; }

}  // namespace fdserve::cuda
