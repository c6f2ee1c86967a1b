// Choosing tokens, and the log-probabilities of the likeliest: rows of logits[R][stride], independent of each other.
//
// scan_kernel reads the logits once (see sample_scan.cuh). draw_kernel, a block a row, puts a row's parts together; greedy
// rows that nothing changes are done then. The others take more passes over the row: one for the temperature alone, four for
// top_p. Floor: the logits' bytes over the memory bandwidth.
#include "launchers.h"
#include "sample_params.cuh"
#include "sample_row.cuh"
#include "sample_scan.cuh"

namespace fdserve::cuda {
namespace {

struct Room {
  Scan scan;
  Changed changed;
};

// Whether nothing is to be drawn, changed, or told otherwise than raw.
__device__ inline bool is_simple(const FdserveSample& c, const Params& params, int64_t row) {
  const bool is_changed = changes(c, params, row);
  return params.mode <= 0 && (params.forced >= 0 || (params.greedy() && !is_changed));
}

__device__ int choose(const FdserveSample& c, const Params& params, const Room& room, float peak, int64_t row,
                      DrawScratch& scratch) {
  const int size = static_cast<int>(c.vocab_size);
  if (params.forced >= 0) return static_cast<int>(params.forced);
  const float* logits = c.logits + row * c.stride;
  if (changes(c, params, row)) {
    peak = change(c, params, room.changed, row, scratch);
    logits = room.changed.logits + row * c.stride;
    if (peak == -INFINITY) return NOTHING_ALLOWED;
    if (peak == INFINITY) return BROKEN;
  }
  if (params.greedy()) return Row(logits, size, peak, 1.0f, scratch).first();
  const Row weighed(logits, size, peak, params.inverse(), scratch);
  const float least = params.min_p;
  Cut cut;
  if (params.top_k > 0) cut = weighed.reach(static_cast<u64>(params.top_k), cut, least, true);
  if (params.top_p < 1.0f) {
    // Of what top_k and min_p leave, or of everything.
    const u64 all = weighed.mass(cut, params.top_k > 0 ? least : 0.0f, false);
    cut = weighed.reach(share(params.top_p, all), cut, least, false, params.top_k > 0 || least <= 0.0f ? all : 0);
  }
  return weighed.draw(philox53(params.seed, params.position), cut, least);
}

// Log-probabilities of a mode other than the raw one.
__device__ void tell(const FdserveSample& c, const Params& params, float peak, int64_t row, DrawScratch& scratch) {
  const float* raw = c.logits + row * c.stride;
  const float inverse = params.told_inverse();
  const Row weighed(raw, static_cast<int>(c.vocab_size), peak, inverse, scratch);
  Cut cut;
  u64 all = weighed.mass(cut, 0.0f, false);
  if (params.told_cut()) {
    cut = weighed.reach(share(params.top_p, all), cut, 0.0f, false, all);
    all = weighed.mass(cut, 0.0f, false);
  }
  const float log_mass = log_of_mass(all);
  auto logprob = [&](int id) { return cut.keeps(raw[id], id) ? told_logprob(raw[id], peak, inverse, log_mass) : -INFINITY; };
  const int num_top = static_cast<int>(c.num_top), token = c.tokens[row];
  for (int i = threadIdx.x; i < num_top; i += DRAW_THREADS) {
    const int id = c.top_ids[row * num_top + i];
    if (id >= 0) c.top_logprobs[row * num_top + i] = logprob(id);
  }
  if (threadIdx.x == 0 && token >= 0 && token < c.vocab_size) c.logprobs[row] = logprob(token);
}

__global__ void __launch_bounds__(DRAW_THREADS, 2) draw_kernel(FdserveSample c, Room room) {
  const int64_t row = blockIdx.x;
  const Params params(c, row);
  const bool is_plain = is_simple(c, params, row);  // here, so that what it reads comes beside the parameters
  __shared__ Total shown;
  const u64* keys = merge_keys(room.scan, row, reinterpret_cast<u64*>(dynamic_shared()), [&] {
    const Sum* sums = room.scan.sums + row * room.scan.num_parts * BLOCKS_A_PART;
    const int blocks = static_cast<int>((c.vocab_size + SUM_BLOCK - 1) / SUM_BLOCK);
    const Total total = total_of(blocks, [&](int block) { return sums[block]; });
    if (threadIdx.x % WARP == 0) shown = total;
  });
  const Total total = shown;
  const int num_top = static_cast<int>(c.num_top);
  const bool told = !total.broken && params.mode == 0;
  for (int i = threadIdx.x; i < num_top; i += DRAW_THREADS) {
    const bool there = keys[i] != 0;
    c.top_ids[row * num_top + i] = there && !total.broken && params.mode >= 0 ? id_of(keys[i]) : -1;
    c.top_logprobs[row * num_top + i] = there && told ? raw_logprob(logit_of(keys[i]), total.peak, total.log_mass) : NAN;
  }
  const u64 best = keys[0];
  int token = total.broken ? BROKEN : params.forced >= 0 ? static_cast<int>(params.forced) : id_of(best);
  const bool simple = total.broken || is_plain;
  if (!simple) {
    DrawScratch& scratch = *reinterpret_cast<DrawScratch*>(dynamic_shared());
    __syncthreads();  // the keys' place is taken by the scratch
    token = choose(c, params, room, total.peak, row, scratch);
  }
  if (threadIdx.x == 0) {
    c.tokens[row] = token;
    float logprob = NAN;
    if (told && token >= 0 && token < c.vocab_size) {
      // The likeliest token's logit is at hand.
      const float logit = token == id_of(best) ? logit_of(best) : c.logits[row * c.stride + token];
      logprob = raw_logprob(logit, total.peak, total.log_mass);
    }
    c.logprobs[row] = logprob;
  }
  if (simple || params.mode <= 0) return;
  __syncthreads();
  tell(c, params, total.peak, row, *reinterpret_cast<DrawScratch*>(dynamic_shared()));
}

// The room's parts in a workspace; returns its size.
int64_t lay_out(const FdserveSample& c, char* base, Room& room) {
  Places places(base);
  room.scan = scan_of(c);
  room.scan.sums = places.take<Sum>(c.rows * room.scan.num_parts * BLOCKS_A_PART);
  room.scan.keys = places.take<u64>(c.rows * room.scan.num_parts * room.scan.kept);
  room.changed.logits = places.take<float>(c.rows * c.stride);
  room.changed.seen = places.take<int>(c.rows * c.stride);
  return places.size;
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

int64_t fdserve_cuda_sample_workspace(const FdserveSample* call) {
  Room room;
  return lay_out(*call, nullptr, room);
}

cudaError_t fdserve_cuda_sample(const FdserveSample* call, void* workspace, cudaStream_t stream) {
  if (call->num_top > MAX_TOP || call->vocab_size < 1 || call->first_id != 0) return cudaErrorInvalidValue;
  if (call->rows == 0) return cudaSuccess;
  Room room;
  lay_out(*call, static_cast<char*>(workspace), room);
  const unsigned rows = static_cast<unsigned>(call->rows);
  launch_scan(*call, room.scan, stream);
  const size_t merging = merge_bytes(room.scan);
  launch(draw_kernel, dim3(rows), dim3(DRAW_THREADS), merging > sizeof(DrawScratch) ? merging : sizeof(DrawScratch), stream,
         *call, room);
  return cudaGetLastError();
}
