// Paged attention over sequences of any lengths, prefill and decode alike; causal.
//
// It reads the caches alone, [num_blocks][kv_heads][block_size][head_dim], into which rope.cu has written the step's keys
// and values before. See attention.cuh for the arithmetic.
//
// Wide kernel: 64 rows (4 warps of 16) of one key/value head and one sequence; tiles of keys and values come by
// asynchronous copies into two buffers while the last are computed on. Its rows share every tile, so for many rows it is
// bound by the tensor cores: 4 * rows * keys * head_dim FLOP over the matmul rate.
// Narrow kernel: up to 16 rows, a decode's; all 4 warps work on the same rows, a quarter of the tile's keys each for the
// scores and a quarter of the head dimension each for the values. It is bound by reading keys and values once:
// 4 * keys * head_dim bytes a key/value head over the memory bandwidth.
// Either can give a block one part of the keys, where whole sequences would leave processors idle; `merge_kernel` then
// puts the parts together. Floor of that: 4 bytes written and read an element and part.
#include "attention.cuh"
#include "launchers.h"

namespace fdserve::cuda {
namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int WIDE_ROWS = WARPS * ROW_TILE;
constexpr int SCORE_STRIDE = KEY_TILE + 8;
constexpr int64_t MAX_WORKSPACE_BYTES = 256 << 20;

struct Call {
  Paged paged;
  int heads, group, head_dim, max_parts;
  float scale;       // of the scores, times log2(e)
  bool split;        // a block a part, into the workspace
  float* workspace;  // [tokens * heads][max_parts] of (values[head_dim], peak, mass)
};

// What a block works on: rows [first_row, first_row + ...) of one sequence and key/value head.
struct Task {
  int sequence, head, first_row, rows, token, context, end, first_part, parts;

  // `rows_a_block` rows; false if there is nothing to do.
  __device__ bool find(const Call& call, int rows_a_block, bool narrow) {
    sequence = blockIdx.z;
    head = blockIdx.y;
    const int tile = call.split ? blockIdx.x / call.max_parts : blockIdx.x;
    token = call.paged.query_starts[sequence];
    const int tokens = call.paged.query_starts[sequence + 1] - token;
    rows = tokens * call.group;
    if (narrow != (rows <= ROW_TILE)) return false;
    first_row = tile * rows_a_block;
    if (first_row >= rows) return false;
    context = call.paged.context_lens[sequence];
    // No row of the block sees a key from here on.
    const int last = min(first_row + rows_a_block, rows) - 1;
    end = context + last / call.group + 1;
    parts = (end + KEY_PART - 1) / KEY_PART;
    first_part = 0;
    if (call.split) {
      first_part = blockIdx.x % call.max_parts;
      if (first_part >= parts) return false;
      parts = first_part + 1;
    }
    return true;
  }

  // How many keys of the tile at `first_key` a row sees; none for rows past the last.
  __device__ int seen(int row, int group, int first_key) const {
    return row < rows ? context + row / group + 1 - first_key : 0;
  }

  // Where a row's result goes: its place among [tokens][heads].
  __device__ int64_t place(int row, const Call& call) const {
    return static_cast<int64_t>(token + row / call.group) * call.heads + head * call.group + row % call.group;
  }
};

template <class T, int HD>
__device__ void load_queries(const T* q, const Task& task, const Call& call, int rows, T* tile) {
  constexpr int CHUNKS = HD / 8;
  for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const bool there = task.first_row + row < task.rows;
    const T* from = there ? q + task.place(task.first_row + row, call) * HD + chunk * 8 : q;
    copy_async_16(tile + chunk_at<HD>(row, chunk), from, there);
  }
}

template <class T>
__device__ PagedHead<T> head_of(const T* cache, const Task& task, const Call& call) {
  return {cache, call.paged.block_tables + static_cast<int64_t>(task.sequence) * call.paged.table_width,
          call.paged.block_size, call.paged.kv_heads, task.head, call.head_dim};
}

// Calls body(first key of the tile, its keys, its values) for every tile of a part, while the next one is on its way.
// All of the block's earlier copies are complete at the first call.
template <class T, int HD, class Body>
__device__ void for_each_tile(const PagedHead<T>& keys, const PagedHead<T>& values, int part, int end, T* buffers, Body body) {
  constexpr int TILE = KEY_TILE * HD;
  const int first = part * KEY_PART, last = min(first + KEY_PART, end);
  copy_tile<T, HD, THREADS>(keys, first, end, buffers);
  copy_tile<T, HD, THREADS>(values, first, end, buffers + TILE);
  commit_copies();
  int turn = 0;
  for (int key = first; key < last; key += KEY_TILE, turn ^= 1) {
    if (key + KEY_TILE < last) {
      T* next = buffers + (turn ^ 1) * 2 * TILE;
      copy_tile<T, HD, THREADS>(keys, key + KEY_TILE, end, next);
      copy_tile<T, HD, THREADS>(values, key + KEY_TILE, end, next + TILE);
    }
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    body(key, buffers + turn * 2 * TILE, buffers + turn * 2 * TILE + TILE);
    __syncthreads();  // before the buffer is written again
  }
}

// Part `part` of a row: its state into the workspace.
__device__ inline float* part_of(const Call& call, int64_t place, int part) {
  return call.workspace + (place * call.max_parts + part) * (call.head_dim + 2);
}

template <class T, int HD>
__global__ void __launch_bounds__(THREADS) wide_kernel(const T* q, const T* k_cache, const T* v_cache, T* out, Call call) {
  Task task;
  if (!task.find(call, WIDE_ROWS, false)) return;
  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* buffers = queries + WIDE_ROWS * HD;
  float* totals = reinterpret_cast<float*>(buffers + 4 * KEY_TILE * HD);  // [64][HD], in the order of a lane's own values
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int rows[2] = {task.first_row + warp * ROW_TILE + lane / 4, task.first_row + warp * ROW_TILE + lane / 4 + 8};
  load_queries<T, HD>(q, task, call, WIDE_ROWS, queries);
  const PagedHead<T> keys = head_of(k_cache, task, call), values = head_of(v_cache, task, call);
  float total_peak[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f};
  for (int part = task.first_part; part < task.parts; ++part) {
    Softmax state;
    float sums[HD / 8][4] = {};
    for_each_tile<T, HD>(keys, values, part, task.end, buffers, [&](int key, const T* key_tile, const T* value_tile) {
      float scores[8][4] = {}, factor[2];
#pragma unroll
      for (int step = 0; step < HD / 16; ++step) {
        uint32_t a[4];
        load_rows<HD>(a, queries, warp * ROW_TILE, step);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) score_keys<HD>(scores[pair * 2], scores[pair * 2 + 1], a, key_tile, pair, step);
      }
      const int seen[2] = {task.seen(rows[0], call.group, key), task.seen(rows[1], call.group, key)};
      weigh(scores, state, seen, call.scale, factor);
#pragma unroll
      for (int j = 0; j < HD / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] = __fmul_rn(sums[j][i], factor[i / 2]);
#pragma unroll
      for (int step = 0; step < KEY_TILE / 16; ++step) {
        uint32_t a[4];
        weights_of<T>(a, scores, step);
#pragma unroll
        for (int pair = 0; pair < HD / 16; ++pair)
          weigh_values<HD>(sums[pair * 2], sums[pair * 2 + 1], a, value_tile, pair, step);
      }
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mass = total_mass(state.mass[half]);
      if (call.split) {
        if (rows[half] < task.rows) {
          float* to = part_of(call, task.place(rows[half], call), part);
#pragma unroll
          for (int j = 0; j < HD / 8; ++j) {
            to[j * 8 + lane % 4 * 2] = sums[j][half * 2];
            to[j * 8 + lane % 4 * 2 + 1] = sums[j][half * 2 + 1];
          }
          if (lane % 4 == 0) to[HD] = state.peak[half], to[HD + 1] = mass;
        }
        continue;
      }
      const Merge merge(total_peak[half], state.peak[half], call.scale);
      total_peak[half] = merge.peak;
      total[half] = merge(total[half], mass);
      // The totals pass through shared memory: there are not enough registers for them.
#pragma unroll
      for (int j = 0; j < HD / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& sum = totals[(j * 4 + half * 2 + i) * THREADS + threadIdx.x];
          sum = merge(part == 0 ? 0.0f : sum, sums[j][half * 2 + i]);
        }
    }
  }
  if (call.split) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (rows[half] >= task.rows) continue;
    T* to = out + task.place(rows[half], call) * HD;
#pragma unroll
    for (int j = 0; j < HD / 8; ++j) {
      const float* sums = totals + (j * 4 + half * 2) * THREADS + threadIdx.x;
      const float low = __fdiv_rn(sums[0], total[half]), high = __fdiv_rn(sums[THREADS], total[half]);
      *reinterpret_cast<uint32_t*>(to + j * 8 + lane % 4 * 2) = pack<T>(low, high);
    }
  }
}

template <class T, int HD>
__global__ void __launch_bounds__(THREADS) narrow_kernel(const T* q, const T* k_cache, const T* v_cache, T* out, Call call) {
  constexpr int PAIRS = HD / 16 / WARPS;  // of 8 columns, for each warp
  Task task;
  if (!task.find(call, ROW_TILE, true)) return;
  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* buffers = queries + ROW_TILE * HD;
  float* shown = reinterpret_cast<float*>(buffers + 4 * KEY_TILE * HD);  // [16][SCORE_STRIDE]
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int rows[2] = {lane / 4, lane / 4 + 8};
  load_queries<T, HD>(q, task, call, ROW_TILE, queries);
  const PagedHead<T> keys = head_of(k_cache, task, call), values = head_of(v_cache, task, call);
  float total_peak[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f}, totals[PAIRS * 2][4] = {};
  for (int part = task.first_part; part < task.parts; ++part) {
    Softmax state;
    float sums[PAIRS * 2][4] = {};
    for_each_tile<T, HD>(keys, values, part, task.end, buffers, [&](int key, const T* key_tile, const T* value_tile) {
      float mine[2][4] = {}, scores[8][4], factor[2];
#pragma unroll
      for (int step = 0; step < HD / 16; ++step) {
        uint32_t a[4];
        load_rows<HD>(a, queries, 0, step);
        score_keys<HD>(mine[0], mine[1], a, key_tile, warp, step);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shown[rows[i / 2] * SCORE_STRIDE + warp * 16 + j * 8 + lane % 4 * 2 + i % 2] = mine[j][i];
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[j][i] = shown[rows[i / 2] * SCORE_STRIDE + j * 8 + lane % 4 * 2 + i % 2];
      const int seen[2] = {task.seen(rows[0], call.group, key), task.seen(rows[1], call.group, key)};
      weigh(scores, state, seen, call.scale, factor);
#pragma unroll
      for (int j = 0; j < PAIRS * 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] = __fmul_rn(sums[j][i], factor[i / 2]);
#pragma unroll
      for (int step = 0; step < KEY_TILE / 16; ++step) {
        uint32_t a[4];
        weights_of<T>(a, scores, step);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair)
          weigh_values<HD>(sums[pair * 2], sums[pair * 2 + 1], a, value_tile, warp * PAIRS + pair, step);
      }
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mass = total_mass(state.mass[half]);
      if (call.split) {
        if (rows[half] < task.rows) {
          float* to = part_of(call, task.place(rows[half], call), part);
#pragma unroll
          for (int j = 0; j < PAIRS * 2; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) to[(warp * PAIRS * 2 + j) * 8 + lane % 4 * 2 + i] = sums[j][half * 2 + i];
          if (warp == 0 && lane % 4 == 0) to[HD] = state.peak[half], to[HD + 1] = mass;
        }
        continue;
      }
      const Merge merge(total_peak[half], state.peak[half], call.scale);
      total_peak[half] = merge.peak;
      total[half] = merge(total[half], mass);
#pragma unroll
      for (int j = 0; j < PAIRS * 2; ++j)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) totals[j][i] = merge(totals[j][i], sums[j][i]);
    }
  }
  if (call.split) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (rows[half] >= task.rows) continue;
    T* to = out + task.place(rows[half], call) * HD + warp * PAIRS * 16;
#pragma unroll
    for (int j = 0; j < PAIRS * 2; ++j) {
      const float low = __fdiv_rn(totals[j][half * 2], total[half]);
      const float high = __fdiv_rn(totals[j][half * 2 + 1], total[half]);
      *reinterpret_cast<uint32_t*>(to + j * 8 + lane % 4 * 2) = pack<T>(low, high);
    }
  }
}

// A block a (token, head): a thread merges the parts of its own element.
template <class T>
__global__ void merge_kernel(T* out, Call call) {
  const int token = blockIdx.x, head = blockIdx.y, element = threadIdx.x;
  const int sequence = call.paged.sequence_of(token);
  const int end = call.paged.context_lens[sequence] + token - call.paged.query_starts[sequence] + 1;
  const int64_t place = static_cast<int64_t>(token) * call.heads + head;
  float peak = NONE, mass = 0.0f, sum = 0.0f;
  for (int part = 0; part * KEY_PART < end; ++part) {
    const float* from = part_of(call, place, part);
    const Merge merge(peak, from[call.head_dim], call.scale);
    peak = merge.peak;
    mass = merge(mass, from[call.head_dim + 1]);
    sum = merge(sum, from[element]);
  }
  out[place * call.head_dim + element] = from_float<T>(__fdiv_rn(sum, mass));
}

template <class T, int HD>
void attention(const void* q, const void* k_cache, const void* v_cache, int64_t tokens, int64_t max_query_len, Call call,
               void* out, cudaStream_t stream) {
  const T *queries = static_cast<const T*>(q), *keys = static_cast<const T*>(k_cache), *values = static_cast<const T*>(v_cache);
  const int64_t most_rows = max_query_len * call.group;
  const int64_t wide_tiles = (most_rows + WIDE_ROWS - 1) / WIDE_ROWS;
  const int parts = call.split ? call.max_parts : 1;
  const size_t tiles = 4 * KEY_TILE * HD * sizeof(T);
  launch(narrow_kernel<T, HD>, dim3(parts, call.paged.kv_heads, call.paged.sequences), dim3(THREADS),
         ROW_TILE * HD * sizeof(T) + tiles + ROW_TILE * SCORE_STRIDE * sizeof(float), stream, queries, keys, values,
         static_cast<T*>(out), call);
  if (most_rows > ROW_TILE)
    launch(wide_kernel<T, HD>, dim3(wide_tiles * parts, call.paged.kv_heads, call.paged.sequences), dim3(THREADS),
           WIDE_ROWS * HD * (sizeof(T) + sizeof(float)) + tiles, stream, queries, keys, values, static_cast<T*>(out), call);
  if (call.split)
    launch(merge_kernel<T>, dim3(tokens, call.heads), dim3(HD), 0, stream, static_cast<T*>(out), call);
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

int64_t fdserve_cuda_attention_workspace(int64_t sequences, int64_t tokens, int64_t max_query_len, int64_t longest,
                                         int64_t heads, int64_t kv_heads, int64_t head_dim, int multiprocessors) {
  const int64_t parts = (longest + KEY_PART - 1) / KEY_PART, rows = max_query_len * (heads / kv_heads);
  // Whole sequences where they fill the processors twice: the parts then need no merging.
  const int64_t blocks = sequences * kv_heads * ((rows + WIDE_ROWS - 1) / WIDE_ROWS);
  if (parts < 2 || blocks >= 2 * multiprocessors) return 0;
  const int64_t bytes = tokens * heads * parts * (head_dim + 2) * static_cast<int64_t>(sizeof(float));
  return bytes <= MAX_WORKSPACE_BYTES ? bytes : 0;
}

cudaError_t fdserve_cuda_attention(const void* q, const void* k_cache, const void* v_cache, const FdservePaged* paged,
                                   int64_t tokens, int64_t max_query_len, int64_t longest, int64_t heads, int64_t head_dim,
                                   float scale, int dtype, void* out, float* workspace, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (head_dim != 64 && head_dim != 128) return cudaErrorInvalidValue;
  Call call;
  call.paged = Paged(*paged);
  call.heads = static_cast<int>(heads);
  call.group = call.heads / paged->kv_heads;
  call.head_dim = static_cast<int>(head_dim);
  call.max_parts = static_cast<int>((longest + KEY_PART - 1) / KEY_PART);
  call.scale = scale * 1.4426950408889634f;
  call.split = workspace != nullptr;
  call.workspace = workspace;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    (head_dim == 128 ? attention<T, 128> : attention<T, 64>)(q, k_cache, v_cache, tokens, max_query_len, call, out, stream);
  };
  dtype == FDSERVE_BF16 ? run(bf16{}) : run(fp16{});
  return cudaGetLastError();
}
