// Mixture of experts: route, group the tokens by expert, two products an expert, weighted sum.
//
// A slot is one (token, expert) pair; slots are ordered by expert, tokens in order within one. The products run over tiles
// of 16 or 64 slots of one expert, so the cost follows the experts touched: the weights of those are read once a tile.
// A token's answers are added in ascending order of its experts. Floor: the touched experts' bytes over the memory
// bandwidth for a few tokens, the tensor cores for many.
#include "gemm.cuh"
#include "launchers.h"
#include "moe_route.cuh"

namespace fdserve::cuda {
namespace {

// The expert and slots of tile number `tile`; false past the last. By the whole block.
__device__ inline bool find_tile(const int* first_slot, int experts, int tile, int rows, int& expert, int& first, int& end) {
  __shared__ int found[3];
  if (threadIdx.x == 0) found[0] = -1;
  __syncthreads();
  if (threadIdx.x < WARP) {
    const int lane = threadIdx.x;
    int tiles_before = 0;
    for (int base = 0; base < experts; base += WARP) {
      const int e = base + lane, begin = e < experts ? first_slot[e] : 0, stop = e < experts ? first_slot[e + 1] : 0;
      const int tiles = (stop - begin + rows - 1) / rows;
      int upto = tiles;
      for (int by = 1; by < WARP; by *= 2) {
        const int below = __shfl_up_sync(ALL, upto, by);
        if (lane >= by) upto += below;
      }
      const int mine = tile - tiles_before - (upto - tiles);
      if (mine >= 0 && mine < tiles) {
        found[0] = e;
        found[1] = begin + mine * rows;
        found[2] = min(begin + (mine + 1) * rows, stop);
      }
      tiles_before += __shfl_sync(ALL, upto, WARP - 1);
    }
  }
  __syncthreads();
  if (found[0] < 0) return false;
  expert = found[0], first = found[1], end = found[2];
  return true;
}

// inner[slot][I] = silu(gate) * up of the slot's token. A warp's 32 columns are 16 of the gate and the same 16 of up.
template <class T, int BM, int BITS>
__global__ void __launch_bounds__(GEMM_THREADS)
    up_gate_kernel(const T* x, Weights up_gate, const int* first_slot, const int* chosen_at, int experts, int top_k,
                   int64_t hidden, int64_t inner, T* out) {
  using Tile = GemmTile<T, BM, BITS>;
  int expert, first, end;
  if (!find_tile(first_slot, experts, blockIdx.y, BM, expert, first, end)) return;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * (GEMM_COLUMNS / 2);
  auto column_at = [&](int j) { return first_column + j / 32 * 16 + j % 16; };
  typename Tile::Sums sums = {};
  Tile::run([&](int i) { return first + i < end ? x + chosen_at[first + i] / top_k * hidden : nullptr; },
            [&](int j) {
              const int64_t column = column_at(j);
              return column < inner ? (static_cast<int64_t>(expert) * 2 + j % 32 / 16) * inner + column : int64_t{-1};
            },
            up_gate, sums);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
  for (int m = 0; m < BM / 16; ++m)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t slot = first + m * 16 + lane / 4 + half * 8;
        const int64_t column = column_at(warp * 32 + j * 8 + lane % 4 * 2);
        if (slot >= end || column >= inner) continue;
        float both[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float g = to_float(from_float<T>(sums[m][j][half * 2 + i]));
          both[i] = g / (1.0f + __expf(-g)) * to_float(from_float<T>(sums[m][j + 2][half * 2 + i]));
        }
        *reinterpret_cast<uint32_t*>(out + slot * inner + column) = pack<T>(both[0], both[1]);
      }
}

// answers[slot][H] = the slot's expert on inner[slot], float32.
template <class T, int BM, int BITS>
__global__ void __launch_bounds__(GEMM_THREADS)
    down_kernel(const T* inner_rows, Weights down, const int* first_slot, int experts, int64_t hidden, int64_t inner,
                float* answers) {
  using Tile = GemmTile<T, BM, BITS>;
  int expert, first, end;
  if (!find_tile(first_slot, experts, blockIdx.y, BM, expert, first, end)) return;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * GEMM_COLUMNS;
  typename Tile::Sums sums = {};
  Tile::run([&](int i) { return first + i < end ? inner_rows + (first + i) * inner : nullptr; },
            [&](int j) { return first_column + j < hidden ? expert * hidden + first_column + j : int64_t{-1}; },
            down, sums);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
  for (int m = 0; m < BM / 16; ++m)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t slot = first + m * 16 + lane / 4 + half * 8;
        const int64_t column = first_column + warp * 32 + j * 8 + lane % 4 * 2;
        if (slot < end && column < hidden)
          *reinterpret_cast<float2*>(answers + slot * hidden + column) =
              make_float2(sums[m][j][half * 2], sums[m][j][half * 2 + 1]);
      }
}

// A block a token, a thread eight elements of it. Floor: 4 bytes read for an element and choice, 2 to 4 more for each.
template <class T>
__global__ void combine_kernel(const float* answers, const int* slot_of, const float* weights, const T* shared, int top_k,
                               int64_t hidden, T* out) {
  const int64_t token = blockIdx.x;
  for (int64_t i = threadIdx.x * 8; i < hidden; i += blockDim.x * 8) {
    float sums[8] = {};
    for (int k = 0; k < top_k; ++k) {
      const int64_t choice = token * top_k + k;
      const float* from = answers + slot_of[choice] * hidden + i;
      const float weight = weights[choice];
      const Vector<float> parts[2] = {load_vector(from), load_vector(from + 4)};
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] = __fmaf_rn(weight, parts[j / 4].values[j % 4], sums[j]);
    }
    if (shared != nullptr) {
      const Vector<T> more = load_vector(shared + token * hidden + i);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += to_float(more.values[j]);
    }
    Vector<T> result;
#pragma unroll
    for (int j = 0; j < 8; ++j) result.values[j] = from_float<T>(sums[j]);
    store_vector(out + token * hidden + i, result);
  }
}

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// The workspace's parts, in this order.
struct Workspace {
  int64_t chosen, weights, first_slot, slot_of, chosen_at, inner, answers, bytes;

  Workspace(int64_t tokens, int64_t top_k, int64_t experts, int64_t hidden, int64_t inner_size) {
    const int64_t slots = tokens * top_k;
    chosen = 0;
    weights = chosen + aligned(slots * 4);
    first_slot = weights + aligned(slots * 4);
    slot_of = first_slot + aligned((experts + 1) * 4);
    chosen_at = slot_of + aligned(slots * 4);
    inner = chosen_at + aligned(slots * 4);
    answers = inner + aligned(slots * inner_size * 2);
    bytes = answers + aligned(slots * hidden * 4);
  }
};

template <class T, int BM, int BITS>
void products(const FdserveMoe& call, const Workspace& at, char* base, cudaStream_t stream) {
  const int64_t slots = call.tokens * call.top_k;
  const int64_t tiles = slots / BM + (slots < call.experts ? slots : call.experts);
  const int experts = static_cast<int>(call.experts);
  const int* first_slot = reinterpret_cast<const int*>(base + at.first_slot);
  T* inner = reinterpret_cast<T*>(base + at.inner);
  constexpr int HALF = GEMM_COLUMNS / 2, BYTES = GemmTile<T, BM, BITS>::SHARED_BYTES;
  const Weights up_gate = {call.up_gate, call.up_gate_scales, call.hidden, call.group};
  const Weights down = {call.down, call.down_scales, call.inner, call.group};
  launch(up_gate_kernel<T, BM, BITS>, dim3((call.inner + HALF - 1) / HALF, tiles), dim3(GEMM_THREADS), BYTES, stream,
         static_cast<const T*>(call.x), up_gate, first_slot,
         reinterpret_cast<const int*>(base + at.chosen_at), experts, static_cast<int>(call.top_k), call.hidden, call.inner,
         inner);
  launch(down_kernel<T, BM, BITS>, dim3((call.hidden + GEMM_COLUMNS - 1) / GEMM_COLUMNS, tiles), dim3(GEMM_THREADS), BYTES, stream,
         static_cast<const T*>(inner), down, first_slot, experts, call.hidden, call.inner,
         reinterpret_cast<float*>(base + at.answers));
}

template <class T>
void moe(const FdserveMoe& call, void* workspace, cudaStream_t stream) {
  const Workspace at(call.tokens, call.top_k, call.experts, call.hidden, call.inner);
  char* const base = static_cast<char*>(workspace);
  const int64_t slots = call.tokens * call.top_k;
  int *chosen = reinterpret_cast<int*>(base + at.chosen), *slot_of = reinterpret_cast<int*>(base + at.slot_of);
  float* weights = reinterpret_cast<float*>(base + at.weights);
  const int experts = static_cast<int>(call.experts), top_k = static_cast<int>(call.top_k);
  auto route = [&](auto kernel, int tokens_a_block) {
    launch(kernel, dim3((call.tokens + tokens_a_block - 1) / tokens_a_block), dim3(ROUTE_THREADS),
           tokens_a_block * call.hidden * sizeof(T), stream, static_cast<const T*>(call.x), call.tokens, call.gate,
           call.correction_bias, static_cast<int>(call.hidden), experts, top_k, call.norm_min, chosen, weights);
  };
  // Several tokens a block where one each would still be several blocks a multiprocessor.
  call.tokens >= 1024 ? route(route_kernel<T, 4>, 4) : route(route_kernel<T, 1>, 1);
  const int64_t group_threads = slots < GROUP_THREADS ? (slots + WARP - 1) / WARP * WARP : GROUP_THREADS;
  launch(group_kernel, dim3(experts), dim3(group_threads), 0, stream, static_cast<const int*>(chosen), static_cast<int>(slots),
         experts, reinterpret_cast<int*>(base + at.first_slot), slot_of, reinterpret_cast<int*>(base + at.chosen_at));
  const bool few = slots <= 16 * call.experts;
  if (call.bits == 16)
    (few ? products<T, 16, 16> : products<T, 64, 16>)(call, at, base, stream);
  else if (call.bits == 8)
    (few ? products<T, 16, 8> : products<T, 64, 8>)(call, at, base, stream);
  else
    (few ? products<T, 16, 4> : products<T, 64, 4>)(call, at, base, stream);
  const int64_t vectors = call.hidden / 8;
  launch(combine_kernel<T>, dim3(call.tokens), dim3(vectors < 512 ? (vectors + WARP - 1) / WARP * WARP : 512), 0, stream,
         reinterpret_cast<const float*>(base + at.answers), static_cast<const int*>(slot_of), static_cast<const float*>(weights),
         static_cast<const T*>(call.shared), top_k, call.hidden, static_cast<T*>(call.out));
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

int64_t fdserve_cuda_moe_workspace(const FdserveMoe* call) {
  return Workspace(call->tokens, call->top_k, call->experts, call->hidden, call->inner).bytes;
}

cudaError_t fdserve_cuda_moe(const FdserveMoe* call, int dtype, void* workspace, cudaStream_t stream) {
  if (call->experts > MAX_EXPERTS || call->top_k > MAX_CHOICES || call->top_k > call->experts) return cudaErrorInvalidValue;
  if (call->tokens > 0) (dtype == FDSERVE_BF16 ? moe<bf16> : moe<fp16>)(*call, workspace, stream);
  return cudaGetLastError();
}
