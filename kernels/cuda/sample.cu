// Choosing tokens, and the log-probabilities of the likeliest: rows of logits[R][stride], independent of each other.
//
// scan_kernel reads the logits once: a block takes 8192 of a row and leaves their peak, the sum of their exponentials and
// the K largest. A thread holds its 32 in registers; the K-th largest of the threads' own peaks is a bar that at most 32 K
// of the elements clear, and those alone are sorted. merge_kernel puts a row's parts together; greedy rows that nothing
// changes are done then. draw_kernel does the others, a block a row, in passes over a row that is in the cache by now.
// Floor: the logits' bytes over the memory bandwidth.
#include "launchers.h"
#include "sample_row.cuh"

namespace fdserve::cuda {
namespace {

constexpr int SCAN_THREADS = 256, SCAN_EACH = 32, SCAN_PART = SCAN_THREADS * SCAN_EACH, MERGE_THREADS = 256;
constexpr int MAX_TOP = 64;
constexpr float GREEDY_TEMPERATURE = 1e-5f;
constexpr int BROKEN = -1, NOTHING_ALLOWED = -2, TEMPERATURE_SCALED = 1, TOP_P_NORMALIZED = 2;

struct Part {
  float peak, mass;
  int has_nan, unused;
};

struct RowState {
  float peak, log_mass;
  int broken, unused;
};

struct Room {
  Part* parts;       // [R][num_parts]
  u64* keys;         // [R][num_parts][kept]
  RowState* states;  // [R]
  float* changed;    // [R][stride], of the rows that something changes
  int* seen;         // [R][stride]: twice how often an id is in the output, plus 1 if it is anywhere in the history
  int num_parts, kept;
};

__host__ __device__ inline int power_of_two(int x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

__global__ void __launch_bounds__(SCAN_THREADS) scan_kernel(FdserveSample c, Room room) {
  __shared__ float scratch[WARP];
  __shared__ int count;
  u64* keys = reinterpret_cast<u64*>(dynamic_shared());
  const int part = blockIdx.x, first = part * SCAN_PART, size = static_cast<int>(c.vocab_size);
  const int64_t row = blockIdx.y;
  const float* logits = c.logits + row * c.stride;
  float x[SCAN_EACH];
  float peak = -INFINITY;
  bool has_nan = false;
  u64 best = 0;
  const bool aligned = c.stride % 4 == 0;
#pragma unroll
  for (int i = 0; i < SCAN_EACH; i += 4) {
    const int at = first + i * SCAN_THREADS + threadIdx.x * 4;
    if (aligned && at + 4 <= size) {
      const float4 four = *reinterpret_cast<const float4*>(logits + at);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = at + j < size ? logits[at + j] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      has_nan |= x[i + j] != x[i + j];
      peak = x[i + j] > peak ? x[i + j] : peak;
      const u64 key = at + j < size ? key_of(x[i + j], at + j) : 0;
      best = key > best ? key : best;
    }
  }
  keys[threadIdx.x] = best;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  sort_keys(keys, SCAN_THREADS);
  const float block_peak = logit_of(keys[0]);
  const u64 bar = keys[min(room.kept, SCAN_THREADS) - 1];
  float mass = 0.0f;
#pragma unroll
  for (int i = 0; i < SCAN_EACH; ++i) mass += block_peak == -INFINITY ? 0.0f : __expf(x[i] - block_peak);
  mass = block_sum(mass, scratch);
  const float nans = block_sum(has_nan ? 1.0f : 0.0f, scratch);
  // All threads have read the bar: block_sum waits for them.
#pragma unroll
  for (int i = 0; i < SCAN_EACH; ++i) {
    const int at = first + i / 4 * 4 * SCAN_THREADS + threadIdx.x * 4 + i % 4;
    const u64 key = at < size ? key_of(x[i], at) : 0;
    if (key != 0 && key >= bar) keys[atomicAdd(&count, 1)] = key;
  }
  __syncthreads();
  const int padded = power_of_two(count > room.kept ? count : room.kept);
  for (int i = count + threadIdx.x; i < padded; i += SCAN_THREADS) keys[i] = 0;
  __syncthreads();
  sort_keys(keys, padded);
  const int64_t place = row * room.num_parts + part;
  for (int i = threadIdx.x; i < room.kept; i += SCAN_THREADS) room.keys[place * room.kept + i] = keys[i];
  if (threadIdx.x == 0) room.parts[place] = {block_peak, mass, nans > 0.0f ? 1 : 0, 0};
}

__device__ inline bool greedy(const FdserveSample& c, int64_t row) { return !(c.float_params[row * 6] >= GREEDY_TEMPERATURE); }
__device__ inline int mode_of(const FdserveSample& c, int64_t row) { return c.logprob_modes == nullptr ? 0 : c.logprob_modes[row]; }

// Whether bias, penalties or a mask may change the row's logits.
__device__ inline bool changes(const FdserveSample& c, int64_t row) {
  const float* params = c.float_params + row * 6;
  const bool penalized = (params[3] != 1.0f || params[4] != 0.0f || params[5] != 0.0f) &&
                         c.history_offsets[row + 1] > c.history_offsets[row];
  return penalized || c.bias_offsets[row + 1] > c.bias_offsets[row] || (c.masks != nullptr && c.mask_rows[row] >= 0);
}

// Whether merge_kernel finishes the row.
__device__ inline bool is_simple(const FdserveSample& c, int64_t row) {
  if (mode_of(c, row) > 0) return false;
  return c.int_params[row * 4 + 3] >= 0 || (greedy(c, row) && !changes(c, row));
}

__global__ void __launch_bounds__(MERGE_THREADS) merge_parts_kernel(FdserveSample c, Room room) {
  u64* keys = reinterpret_cast<u64*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const int num_keys = room.num_parts * room.kept, padded = power_of_two(num_keys), num_top = static_cast<int>(c.num_top);
  const Part* parts = room.parts + row * room.num_parts;
  for (int i = threadIdx.x; i < padded; i += MERGE_THREADS) keys[i] = i < num_keys ? room.keys[row * num_keys + i] : 0;
  __syncthreads();
  sort_keys(keys, padded);
  float peak = -INFINITY, mass = 0.0f;
  bool has_nan = false;
  for (int part = 0; part < room.num_parts; ++part) {
    peak = parts[part].peak > peak ? parts[part].peak : peak;
    has_nan |= parts[part].has_nan != 0;
  }
  for (int part = 0; part < room.num_parts; ++part)
    mass = __fadd_rn(mass, parts[part].peak == -INFINITY ? 0.0f : __fmul_rn(parts[part].mass, expf(parts[part].peak - peak)));
  const bool broken = has_nan || !(fabsf(peak) < INFINITY);
  const float log_mass = logf(mass);
  const int mode = mode_of(c, row);
  const bool told = !broken && mode == 0;
  for (int i = threadIdx.x; i < num_top; i += MERGE_THREADS) {
    const bool there = i < padded && keys[i] != 0;
    c.top_ids[row * num_top + i] = there && !broken && mode >= 0 ? id_of(keys[i]) : -1;
    c.top_logprobs[row * num_top + i] = there && told ? logit_of(keys[i]) - peak - log_mass : NAN;
  }
  if (threadIdx.x != 0) return;
  room.states[row] = {peak, log_mass, broken ? 1 : 0, 0};
  c.logprobs[row] = NAN;
  c.tokens[row] = BROKEN;
  if (broken || !is_simple(c, row)) return;
  const int64_t forced = c.int_params[row * 4 + 3];
  const int token = forced >= 0 ? static_cast<int>(forced) : id_of(keys[0]);
  c.tokens[row] = token;
  if (told && token < c.vocab_size) c.logprobs[row] = c.logits[row * c.stride + token] - peak - log_mass;
}

// The row after bias, penalties and mask, into `changed`; by the whole block. Returns its peak; NaN if one came up.
__device__ float change(const FdserveSample& c, const Room& room, int64_t row, DrawScratch& scratch) {
  const int size = static_cast<int>(c.vocab_size);
  const float* raw = c.logits + row * c.stride;
  const float* params = c.float_params + row * 6;
  float* changed = room.changed + row * c.stride;
  int* seen = room.seen + row * c.stride;
  for (int i = threadIdx.x; i < size; i += DRAW_THREADS) changed[i] = raw[i], seen[i] = 0;
  __syncthreads();
  for (int i = c.bias_offsets[row] + threadIdx.x; i < c.bias_offsets[row + 1]; i += DRAW_THREADS)
    if (c.bias_ids[i] >= 0 && c.bias_ids[i] < size) atomicAdd(&changed[c.bias_ids[i]], c.bias_values[i]);
  const int begin = c.history_offsets[row], end = c.history_offsets[row + 1];
  for (int i = begin + threadIdx.x; i < end; i += DRAW_THREADS) {
    const int id = c.history[i];
    if (id < 0 || id >= size) continue;
    atomicOr(&seen[id], 1);
    if (i - begin >= c.prompt_lens[row]) atomicAdd(&seen[id], 2);
  }
  __syncthreads();
  const int mask = c.masks == nullptr ? -1 : c.mask_rows[row];
  const uint32_t* allowed = reinterpret_cast<const uint32_t*>(c.masks) + static_cast<int64_t>(mask < 0 ? 0 : mask) * c.mask_words;
  float peak = -INFINITY;
  bool has_nan = false;
  for (int i = threadIdx.x; i < size; i += DRAW_THREADS) {
    float x = changed[i];
    if (seen[i] != 0) x = x < 0.0f ? __fmul_rn(x, params[3]) : __fdiv_rn(x, params[3]);
    if (seen[i] >= 2) x = __fadd_rn(x, -__fmaf_rn(static_cast<float>(seen[i] / 2), params[5], params[4]));
    if (mask >= 0 && !(allowed[i / 32] >> i % 32 & 1)) x = -INFINITY;
    changed[i] = x;
    has_nan |= x != x;
    peak = x > peak ? x : peak;
  }
  peak = warp_max(has_nan ? INFINITY : peak);  // either way no token can be chosen
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch.sums[threadIdx.x / WARP] = __float_as_uint(peak);
  __syncthreads();
  for (int warp = 0; warp < DRAW_WARPS; ++warp) {
    const float other = __uint_as_float(static_cast<uint32_t>(scratch.sums[warp]));
    peak = other > peak ? other : peak;
  }
  __syncthreads();
  return peak;
}

__device__ inline u64 share(float part, u64 all) { return static_cast<u64>(ceil(static_cast<double>(part) * static_cast<double>(all))); }

__device__ int choose(const FdserveSample& c, const Room& room, int64_t row, DrawScratch& scratch) {
  const float* params = c.float_params + row * 6;
  const int64_t* ints = c.int_params + row * 4;
  const int size = static_cast<int>(c.vocab_size);
  if (ints[3] >= 0) return static_cast<int>(ints[3]);
  const float* logits = c.logits + row * c.stride;
  float peak = room.states[row].peak;
  if (changes(c, row)) {
    peak = change(c, room, row, scratch);
    logits = room.changed + row * c.stride;
    if (peak == -INFINITY) return NOTHING_ALLOWED;
    if (peak == INFINITY) return BROKEN;
  }
  if (greedy(c, row)) return Row(logits, size, peak, 1.0f, scratch).reach(1, Cut{}, 0.0f, true).last;
  const Row weighed(logits, size, peak, 1.0f / params[0], scratch);
  const float top_p = params[1], least = params[2];
  Cut cut;
  u64 all = 0;
  if (ints[0] > 0) {
    cut = weighed.reach(static_cast<u64>(ints[0]), cut, least, true);
    all = weighed.mass(cut, least, false);
  } else if (top_p < 1.0f) {
    all = weighed.mass(cut, 0.0f, false);
  }
  if (top_p < 1.0f) cut = weighed.reach(share(top_p, all), cut, least, false);
  return weighed.draw(philox53(ints[1], ints[2]), weighed.mass(cut, least, false), cut, least);
}

// Log-probabilities of a mode other than the raw one.
__device__ void tell(const FdserveSample& c, const Room& room, int64_t row, int mode, DrawScratch& scratch) {
  const float* params = c.float_params + row * 6;
  const float* raw = c.logits + row * c.stride;
  const float peak = room.states[row].peak;
  const float inverse = mode & TEMPERATURE_SCALED && !greedy(c, row) ? 1.0f / params[0] : 1.0f;
  const Row weighed(raw, static_cast<int>(c.vocab_size), peak, inverse, scratch);
  Cut cut;
  u64 all = weighed.mass(cut, 0.0f, false);
  if (mode & TOP_P_NORMALIZED && params[1] < 1.0f) {
    cut = weighed.reach(share(params[1], all), cut, 0.0f, false);
    all = weighed.mass(cut, 0.0f, false);
  }
  const float log_mass = static_cast<float>(log(static_cast<double>(all) / UNIT));
  auto logprob = [&](int id) { return cut.keeps(raw[id], id) ? (raw[id] - peak) * inverse - log_mass : -INFINITY; };
  const int num_top = static_cast<int>(c.num_top), token = c.tokens[row];
  for (int i = threadIdx.x; i < num_top; i += DRAW_THREADS) {
    const int id = c.top_ids[row * num_top + i];
    if (id >= 0) c.top_logprobs[row * num_top + i] = logprob(id);
  }
  if (threadIdx.x == 0 && token >= 0 && token < c.vocab_size) c.logprobs[row] = logprob(token);
}

__global__ void __launch_bounds__(DRAW_THREADS) draw_kernel(FdserveSample c, Room room) {
  DrawScratch& scratch = *reinterpret_cast<DrawScratch*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const RowState state = room.states[row];
  if (state.broken != 0 || is_simple(c, row)) return;
  const int token = choose(c, room, row, scratch), mode = mode_of(c, row);
  __syncthreads();
  if (threadIdx.x == 0) c.tokens[row] = token;
  __syncthreads();
  if (mode > 0)
    tell(c, room, row, mode, scratch);
  else if (mode == 0 && threadIdx.x == 0 && token >= 0 && token < c.vocab_size)
    c.logprobs[row] = c.logits[row * c.stride + token] - state.peak - state.log_mass;
}

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// The room's parts in a workspace; returns its size.
int64_t lay_out(const FdserveSample& c, char* base, Room& room) {
  room.num_parts = static_cast<int>((c.vocab_size + SCAN_PART - 1) / SCAN_PART);
  room.kept = c.num_top > 0 ? static_cast<int>(c.num_top) : 1;
  int64_t at = 0;
  auto take = [&](int64_t bytes) {
    char* place = base + at;
    at += aligned(bytes);
    return place;
  };
  const int64_t parts = c.rows * room.num_parts;
  room.parts = reinterpret_cast<Part*>(take(parts * static_cast<int64_t>(sizeof(Part))));
  room.keys = reinterpret_cast<u64*>(take(parts * room.kept * 8));
  room.states = reinterpret_cast<RowState*>(take(c.rows * static_cast<int64_t>(sizeof(RowState))));
  room.changed = reinterpret_cast<float*>(take(c.rows * c.stride * 4));
  room.seen = reinterpret_cast<int*>(take(c.rows * c.stride * 4));
  return at;
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

int64_t fdserve_cuda_sample_workspace(const FdserveSample* call) {
  Room room;
  return lay_out(*call, nullptr, room);
}

cudaError_t fdserve_cuda_sample(const FdserveSample* call, void* workspace, cudaStream_t stream) {
  if (call->num_top > MAX_TOP || call->vocab_size < 1) return cudaErrorInvalidValue;
  if (call->rows == 0) return cudaSuccess;
  Room room;
  lay_out(*call, static_cast<char*>(workspace), room);
  const unsigned rows = static_cast<unsigned>(call->rows);
  const size_t scanned = power_of_two(room.kept * SCAN_EACH > SCAN_THREADS ? room.kept * SCAN_EACH : SCAN_THREADS);
  launch(scan_kernel, dim3(room.num_parts, rows), dim3(SCAN_THREADS), scanned * sizeof(u64), stream, *call, room);
  launch(merge_parts_kernel, dim3(rows), dim3(MERGE_THREADS), power_of_two(room.num_parts * room.kept) * sizeof(u64), stream,
         *call, room);
  launch(draw_kernel, dim3(rows), dim3(DRAW_THREADS), sizeof(DrawScratch), stream, *call, room);
  return cudaGetLastError();
}
