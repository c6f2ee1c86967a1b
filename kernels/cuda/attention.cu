// Paged attention over sequences of any lengths, prefill and decode alike; causal.
//
// It reads the caches alone, [num_blocks][kv_heads][block_size][head_dim], into which rope.cu has written the step's keys
// and values before. See attention.cuh for the arithmetic.
//
// Wide kernel: 128 rows (4 warps of 32) of one key/value head and one sequence; tiles of keys and values come by
// asynchronous copies into two buffers while the last are computed on. Its rows share every tile, so for many rows it is
// bound by the tensor cores: 4 * rows * keys * head_dim FLOP over the matmul rate. A warp has 32 rows because every
// fragment of keys or values that it reads then feeds two mma instructions: with one, shared memory (512 bytes a fragment
// at 128 a cycle, for 4 warps) would take longer than the tensor cores. Two blocks share a multiprocessor, so that one's
// softmax runs beside the other's products. Hopper has a kernel of its own in its place: attention_hopper.cuh.
// Narrow kernel: up to 16 rows, a decode's; all 4 warps work on the same rows, a quarter of the tile's keys each for the
// scores and a quarter of the head dimension each for the values. It is bound by reading keys and values once:
// 4 * keys * head_dim bytes a key/value head over the memory bandwidth. Three blocks share a multiprocessor, with 32 to 64
// KiB under way each; what is under way must be latency times bandwidth, some 32 KiB.
// Either can share the parts of the keys out among blocks, where whole sequences would leave processors idle: see
// attention_merge.cuh.
#include "attention_hopper.cuh"
#include "attention_merge.cuh"

namespace fdserve::cuda {
namespace {

constexpr int SCORE_STRIDE = KEY_TILE + 8;

template <class T, int HD>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    wide_kernel(const T* q, const T* k_cache, const T* v_cache, T* out, Call call, int slots) {
  Task task;
  if (!task.find_wide(call, slots)) return;
  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* buffers = queries + WIDE_ROWS * HD;
  const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * WARP_ROWS;
  const int first_row = task.first_row + warp_row;
  // All rows of the warp see the keys before `all_see`, and none those from `warp_end` on: no key where it has no row.
  const int all_see = task.context + first_row / call.group + 1;
  const int warp_end =
      first_row < task.rows ? task.context + (min(first_row + WARP_ROWS, task.rows) - 1) / call.group + 1 : 0;
  auto row_of = [&](int m, int half) { return first_row + m * ROW_TILE + half * 8 + lane / 4; };
  load_queries<T, HD>(q, task, call, WIDE_ROWS, queries);
  const Shared queries_at = rows_at<HD>(queries + warp_row * HD);
  const Tiles<T, HD> tiles(k_cache, v_cache, task, call);
  Totals<T, HD> totals[WIDE_TILES];
  for (int part = task.first_part; part * KEY_PART < task.end; part += task.stride) {
    Softmax state[WIDE_TILES];
    float sums[WIDE_TILES][HD / 8][4] = {};
    tiles.for_each(part, buffers, [&](int key, const T* keys, const T* values) {
      if (key >= warp_end) return;
      const Shared at_keys = keys_at<HD>(keys), at_values = values_at<HD>(values);
      float scores[WIDE_TILES][8][4] = {};
#pragma unroll
      for (int step = 0; step < HD / 16; ++step) {
        uint32_t a[WIDE_TILES][4], b[4];
#pragma unroll
        for (int m = 0; m < WIDE_TILES; ++m) load_rows<HD>(a[m], queries_at + m * ROW_TILE * HD * 2, step);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          load_keys<HD>(b, at_keys, pair, step);
#pragma unroll
          for (int m = 0; m < WIDE_TILES; ++m) multiply<T>(scores[m][pair * 2], scores[m][pair * 2 + 1], a[m], b);
        }
      }
      if (key + KEY_TILE > all_see) {
#pragma unroll
        for (int m = 0; m < WIDE_TILES; ++m)
          hide(scores[m], {task.seen(row_of(m, 0), call.group, key), task.seen(row_of(m, 1), call.group, key)});
      }
#pragma unroll
      for (int m = 0; m < WIDE_TILES; ++m) {
        float factor[2];
        weigh(scores[m], state[m], call.scale, factor);
        scale_values(sums[m], factor);
      }
#pragma unroll
      for (int step = 0; step < KEY_TILE / 16; ++step) {
        uint32_t a[WIDE_TILES][4], b[4];
#pragma unroll
        for (int m = 0; m < WIDE_TILES; ++m) weights_of<T>(a[m], scores[m], step);
#pragma unroll
        for (int pair = 0; pair < HD / 16; ++pair) {
          load_values<HD>(b, at_values, pair, step);
#pragma unroll
          for (int m = 0; m < WIDE_TILES; ++m) multiply<T>(sums[m][pair * 2], sums[m][pair * 2 + 1], a[m], b);
        }
      }
    });
#pragma unroll
    for (int m = 0; m < WIDE_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        totals[m].end_part(task, call, part, row_of(m, half), half, state[m], sums[m], out);
  }
}

template <class T, int HD>
__global__ void __launch_bounds__(ATTENTION_THREADS, 3)
    narrow_kernel(const T* q, const T* k_cache, const T* v_cache, T* out, Call call) {
  constexpr int PAIRS = HD / 16 / ATTENTION_WARPS;  // of 8 columns, for each warp
  Task task;
  if (!task.find_narrow(call)) return;
  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* buffers = queries + ROW_TILE * HD;
  float* shown = reinterpret_cast<float*>(buffers + 4 * KEY_TILE * HD);  // [16][SCORE_STRIDE]
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int rows[2] = {lane / 4, lane / 4 + 8};
  load_queries<T, HD>(q, task, call, ROW_TILE, queries);
  const Shared queries_at = rows_at<HD>(queries);
  const Tiles<T, HD> tiles(k_cache, v_cache, task, call);
  float total_peak[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f}, totals[PAIRS * 2][4] = {};
  for (int part = task.first_part; part * KEY_PART < task.end; part += task.stride) {
    Softmax state;
    float sums[PAIRS * 2][4] = {};
    tiles.for_each(part, buffers, [&](int key, const T* keys, const T* values) {
      const Shared at_keys = keys_at<HD>(keys), at_values = values_at<HD>(values);
      float mine[2][4] = {}, scores[8][4], factor[2];
#pragma unroll
      for (int step = 0; step < HD / 16; ++step) {
        uint32_t a[4], b[4];
        load_rows<HD>(a, queries_at, step);
        load_keys<HD>(b, at_keys, warp, step);
        multiply<T>(mine[0], mine[1], a, b);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(shown + rows[half] * SCORE_STRIDE + warp * 16 + j * 8 + lane % 4 * 2) =
              make_float2(mine[j][half * 2], mine[j][half * 2 + 1]);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 both = *reinterpret_cast<const float2*>(shown + rows[half] * SCORE_STRIDE + j * 8 + lane % 4 * 2);
          scores[j][half * 2] = both.x, scores[j][half * 2 + 1] = both.y;
        }
      // The first row sees the fewest keys.
      if (key + KEY_TILE > task.context + 1)
        hide(scores, {task.seen(rows[0], call.group, key), task.seen(rows[1], call.group, key)});
      weigh(scores, state, call.scale, factor);
      scale_values(sums, factor);
#pragma unroll
      for (int step = 0; step < KEY_TILE / 16; ++step) {
        uint32_t a[4], b[4];
        weights_of<T>(a, scores, step);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
          load_values<HD>(b, at_values, warp * PAIRS + pair, step);
          multiply<T>(sums[pair * 2], sums[pair * 2 + 1], a, b);
        }
      }
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mass = total_mass(state.mass[half]);
      if (call.plan.narrow > 1) {
        if (rows[half] < task.rows) {
          float* to = narrow_part(call, task.sequence, task.head, rows[half], part);
#pragma unroll
          for (int j = 0; j < PAIRS * 2; ++j)
            *reinterpret_cast<float2*>(to + (warp * PAIRS * 2 + j) * 8 + lane % 4 * 2) =
                make_float2(sums[j][half * 2], sums[j][half * 2 + 1]);
          if (warp == 0 && lane % 4 == 0) *reinterpret_cast<float2*>(to + HD) = make_float2(state.peak[half], mass);
        }
        continue;
      }
      const Merge merge(total_peak[half], state.peak[half]);
      total_peak[half] = merge.peak;
      total[half] = merge(total[half], mass);
#pragma unroll
      for (int j = 0; j < PAIRS * 2; ++j)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) totals[j][i] = merge(totals[j][i], sums[j][i]);
    }
  }
  if (call.plan.narrow > 1) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (rows[half] >= task.rows) continue;
    T* to = out + task.place(rows[half], call) * HD + warp * PAIRS * 16;
    const float inverse = __fdiv_rn(1.0f, total[half]);
#pragma unroll
    for (int j = 0; j < PAIRS * 2; ++j)
      *reinterpret_cast<uint32_t*>(to + j * 8 + lane % 4 * 2) =
          pack<T>(__fmul_rn(totals[j][half * 2], inverse), __fmul_rn(totals[j][half * 2 + 1], inverse));
  }
}

template <class T, int HD>
void attention(const void* q, const void* k_cache, const void* v_cache, int64_t tokens, int64_t max_query_len,
               const Call& call, void* to, cudaStream_t stream) {
  const T *queries = static_cast<const T*>(q), *keys = static_cast<const T*>(k_cache), *values = static_cast<const T*>(v_cache);
  T* out = static_cast<T*>(to);
  const Plan& plan = call.plan;
  const unsigned kv_heads = call.paged.kv_heads, sequences = call.paged.sequences;
  const bool any_wide = max_query_len * call.group > ROW_TILE, all_wide = any_wide && tokens == max_query_len * sequences;
  const size_t tiles = 4 * KEY_TILE * HD * sizeof(T);
  if (!all_wide) {
    launch(narrow_kernel<T, HD>, dim3(plan.narrow, kv_heads, sequences), dim3(ATTENTION_THREADS),
           ROW_TILE * HD * sizeof(T) + tiles + ROW_TILE * SCORE_STRIDE * sizeof(float), stream, queries, keys, values, out,
           call);
    if (plan.narrow > 1)
      launch(merge_narrow_kernel<T>, dim3(sequences * plan.narrow_rows, kv_heads), dim3(HD), 0, stream, out, call);
  }
  if (any_wide) {
    const int slots = static_cast<int>(call.slots(tokens));
    const dim3 grid(slots * plan.wide, kv_heads);
    if (has_hopper_kernel<T, HD>())
      launch(hopper_kernel<T, HD>, grid, dim3(HOPPER_THREADS), hopper_shared<T, HD>(), stream, queries, keys, values, out,
             call, slots);
    else
      launch(wide_kernel<T, HD>, grid, dim3(ATTENTION_THREADS), WIDE_ROWS * HD * sizeof(T) + tiles, stream, queries, keys,
             values, out, call, slots);
    if (plan.wide > 1) launch(merge_wide_kernel<T>, dim3(tokens, call.heads), dim3(HD), 0, stream, out, call);
  }
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

int64_t fdserve_cuda_attention_workspace(int64_t sequences, int64_t tokens, int64_t max_query_len, int64_t longest,
                                         int64_t heads, int64_t kv_heads, int64_t head_dim, int multiprocessors) {
  const Plan plan = plan_of(sequences, tokens, max_query_len, longest, heads, kv_heads, head_dim, multiprocessors);
  return (plan.narrow_floats + plan.wide_floats) * static_cast<int64_t>(sizeof(float));
}

cudaError_t fdserve_cuda_attention(const void* q, const void* k_cache, const void* v_cache, const FdservePaged* paged,
                                   int64_t tokens, int64_t max_query_len, int64_t longest, int64_t heads, int64_t head_dim,
                                   float scale, int dtype, void* out, float* workspace, int multiprocessors,
                                   cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if ((head_dim != 64 && head_dim != 128) || !(scale > 0.0f)) return cudaErrorInvalidValue;
  Call call;
  call.paged = Paged(*paged);
  call.heads = static_cast<int>(heads);
  call.group = call.heads / paged->kv_heads;
  call.head_dim = static_cast<int>(head_dim);
  call.scale = scale * 1.4426950408889634f;
  call.plan = plan_of(paged->sequences, tokens, max_query_len, longest, heads, paged->kv_heads, head_dim,
                      workspace != nullptr ? multiprocessors : 0);
  call.workspace = workspace;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    (head_dim == 128 ? attention<T, 128> : attention<T, 64>)(q, k_cache, v_cache, tokens, max_query_len, call, out, stream);
  };
  dtype == FDSERVE_BF16 ? run(bf16{}) : run(fp16{});
  return cudaGetLastError();
}
