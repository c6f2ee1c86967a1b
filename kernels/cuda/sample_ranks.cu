// Choosing tokens where ranks share the vocabulary out: each looks at its own columns of the logits alone. Four steps, and
// between them every rank gathers what all wrote, a few numbers a row:
//
// offer:  the sums of sample_scan.cuh, the largest logits, the best one after bias, penalties and mask.
// weigh:  now that the peak is known, the integer mass of the part, and its CANDIDATES largest for a row that top_k, top_p
//         or min_p cut down.
// settle: all ranks do the same with the same numbers: tokens that these decide are chosen. Where all that the temperature
//         leaves may be drawn, masses say whose part the token is in, and that rank finds it. Who has it tells its logit.
// finish: tokens and log-probabilities.
//
// Where all rows are greedy and tell no log-probabilities, finish follows offer.
//
// Results are those of sample.cu on the whole row, bit for bit: sums are by blocks that parts do not divide, mass is in
// integers, and order is of (logit, id). A row that its candidates do not settle (a nucleus wider than they are, a cut
// distribution's log-probabilities) gets UNSETTLED, and is for the caller to sample from whole logits.
//
// Floor: the part's bytes over the memory bandwidth, and three gatherings' latency, or one's.
#include "sample_ranks.cuh"

#include "sample_params.cuh"

namespace fdserve::cuda {
namespace {

constexpr int FINISH_THREADS = 256;

// The part's logits as they are drawn from.
__device__ const float* drawn_logits(const FdserveSample& c, const Params& params, const Room& room, int64_t row) {
  return (changes(c, params, row) ? room.changed.logits : c.logits) + row * c.stride;
}

__global__ void __launch_bounds__(DRAW_THREADS, 2) offer_kernel(FdserveSample c, Ranks ranks, Room room, char* out) {
  const int64_t row = blockIdx.x;
  const Params params(c, row);
  char* offered = out + row * ranks.offered_bytes();
  for (int i = threadIdx.x; i < ranks.blocks(ranks.c.rank); i += DRAW_THREADS)
    Ranks::sums_in(offered)[i] = room.scan.sums[row * room.scan.num_parts * BLOCKS_A_PART + i];
  const u64* keys = merge_keys(room.scan, row, reinterpret_cast<u64*>(dynamic_shared()), [] {});
  for (int i = threadIdx.x; i < room.scan.kept; i += DRAW_THREADS) ranks.keys_in(offered)[i] = keys[i];
  u64 best = keys[0];
  __syncthreads();  // the keys' place is taken by what follows
  if (changes(c, params, row)) {
    DrawScratch& scratch = *reinterpret_cast<DrawScratch*>(dynamic_shared());
    const float peak = change(c, params, room.changed, row, scratch);
    best = peak == -INFINITY ? NO_CHOICE : NO_NUMBER;
    if (fabsf(peak) < INFINITY) {
      const float* logits = room.changed.logits + row * c.stride;
      const int first = Row(logits, static_cast<int>(c.vocab_size), peak, 1.0f, scratch).first();
      best = key_of(peak, static_cast<uint32_t>(c.first_id) + first);
    }
  }
  if (threadIdx.x == 0) *ranks.best_in(offered) = best;
}

// The CANDIDATES largest of the part in order, zeros behind the last, into `out`.
__device__ void put_candidates(const Row& row, const float* logits, int size, uint32_t first_id, u64* keys, int* count, u64* out) {
  const Cut cut = row.reach(CANDIDATES, Cut{}, 0.0f, true);
  for (int i = threadIdx.x; i < CANDIDATES; i += DRAW_THREADS) keys[i] = 0;
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += DRAW_THREADS)
    if (cut.keeps(logits[i], i)) keys[atomicAdd(count, 1)] = key_of(logits[i], first_id + i);
  __syncthreads();
  sort_keys(keys, CANDIDATES);
  for (int i = threadIdx.x; i < CANDIDATES; i += DRAW_THREADS) out[i] = keys[i];
}

__global__ void __launch_bounds__(DRAW_THREADS, 2) weigh_kernel(FdserveSample c, Ranks ranks, Room room, char* out) {
  __shared__ u64 keys[CANDIDATES];
  __shared__ int count;
  DrawScratch& scratch = *reinterpret_cast<DrawScratch*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const Params params(c, row);
  const Known known(ranks, row, c.rows);
  const int size = static_cast<int>(c.vocab_size);
  u64* weighed = reinterpret_cast<u64*>(out + row * ranks.weighed_bytes());
  u64 mass = 0, told_mass = 0;
  if (known.draws(params)) {
    const float* logits = drawn_logits(c, params, room, row);
    const Row part(logits, size, logit_of(known.best), params.inverse(), scratch);
    mass = part.mass(Cut{}, 0.0f, false);
    if (!params.plain()) put_candidates(part, logits, size, static_cast<uint32_t>(c.first_id), keys, &count, weighed + 2);
  }
  if (params.mode > 0 && !known.total.broken) {
    const Row part(c.logits + row * c.stride, size, known.total.peak, params.told_inverse(), scratch);
    told_mass = part.mass(Cut{}, 0.0f, false);
  }
  if (threadIdx.x == 0) weighed[0] = mass, weighed[1] = told_mass;
}

// What all ranks sent of a row, in the order of ids: `count` of them, behind which no other id comes in the order of
// logits; `complete` if there is no other.
struct Gathered {
  float* logits;
  int* ids;
  int count;
  bool complete;
  float last;  // the smallest logit
};

__device__ Gathered gather_candidates(const Ranks& ranks, int64_t row, int64_t rows, u64* keys, float* logits, int* ids) {
  const int sent = ranks.c.ranks * CANDIDATES, padded = power_of_two(sent);
  u64 bar = 0;  // the first key that is a rank's last, where that rank has more
  bool complete = true;
  for (int rank = 0; rank < ranks.c.ranks; ++rank) {
    if (ranks.width(rank) <= CANDIDATES) continue;
    const u64 last = ranks.weighed(rank, row, rows)[2 + CANDIDATES - 1];
    bar = last > bar ? last : bar;
    complete = false;
  }
  for (int i = threadIdx.x; i < padded; i += DRAW_THREADS) {
    const u64 key = i < sent ? ranks.weighed(i / CANDIDATES, row, rows)[2 + i % CANDIDATES] : 0;
    // By id, lowest first; those that some unsent id may precede last.
    keys[i] = key == 0 || key < bar ? 0 : key << 32 | key >> 32;
  }
  __syncthreads();
  sort_keys(keys, padded);
  u64 own = 0, least = NO_NUMBER;
  for (int i = threadIdx.x; i < padded && keys[i] != 0; i += DRAW_THREADS) {
    const u64 key = keys[i] << 32 | keys[i] >> 32;
    logits[i] = logit_of(key), ids[i] = id_of(key);
    own += 1;
    least = key < least ? key : least;
  }
  for (int bits = WARP / 2; bits > 0; bits /= 2) {
    own += __shfl_xor_sync(ALL, own, bits);
    const u64 other = __shfl_xor_sync(ALL, least, bits);
    least = other < least ? other : least;
  }
  __syncthreads();
  if (threadIdx.x % WARP == 0) keys[threadIdx.x / WARP * 2] = own, keys[threadIdx.x / WARP * 2 + 1] = least;
  __syncthreads();
  u64 count = 0;
  for (int warp = 0; warp < DRAW_WARPS; ++warp) {
    count += keys[warp * 2];
    least = keys[warp * 2 + 1] < least ? keys[warp * 2 + 1] : least;
  }
  __syncthreads();
  return {logits, ids, static_cast<int>(count), complete, logit_of(least)};
}

// As sample.cu chooses from the whole row, of which `all` is the mass; UNSETTLED if more than the candidates may be in it.
__device__ int choose(const Gathered& from, const Params& params, float peak, u64 all, DrawScratch& scratch) {
  const Row row(from.logits, from.count, peak, params.inverse(), scratch);
  const float least = params.min_p;
  // Whether min_p leaves no other id; with room for an exponential that is not quite monotonic.
  const bool closed = from.complete || (least > 0.0f && row.weight(from.last) < 0.9999f * least);
  Cut cut;
  if (params.top_k > 0) {
    const u64 wanted = static_cast<u64>(params.top_k);
    if (!closed && row.mass(cut, least, true) < wanted) return UNSETTLED;
    cut = row.reach(wanted, cut, least, true);
    all = row.mass(cut, least, false);
  } else if (params.top_p < 1.0f) {
    if (!closed && row.mass(cut, least, false) < share(params.top_p, all)) return UNSETTLED;
  } else if (!closed) {
    return UNSETTLED;
  }
  if (params.top_p < 1.0f) cut = row.reach(share(params.top_p, all), cut, least, false);
  const int index = row.draw(philox53(params.seed, params.position), cut, least);
  return index < 0 ? BROKEN : from.ids[index];
}

__global__ void __launch_bounds__(DRAW_THREADS, 2) settle_kernel(FdserveSample c, Ranks ranks, Room room, char* out) {
  DrawScratch& scratch = *reinterpret_cast<DrawScratch*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const Params params(c, row);
  const Known known(ranks, row, c.rows);
  int token = known.token(params), answer = ELSEWHERE;
  if (!known.total.broken && params.told_cut()) {
    token = UNSETTLED;
  } else if (known.draws(params)) {
    const float peak = logit_of(known.best);
    u64 all = 0;
    for (int rank = 0; rank < ranks.c.ranks; ++rank) all += ranks.weighed(rank, row, c.rows)[0];
    if (params.plain()) {
      token = ELSEWHERE;
      u64 target = drawn(philox53(params.seed, params.position), all), before = 0;
      int rank = 0;
      for (; rank + 1 < ranks.c.ranks; ++rank) {
        const u64 mass = ranks.weighed(rank, row, c.rows)[0];
        if (before + mass >= target) break;
        before += mass;
      }
      if (rank == ranks.c.rank) {
        const Row part(drawn_logits(c, params, room, row), static_cast<int>(c.vocab_size), peak, params.inverse(), scratch);
        answer = static_cast<int>(c.first_id) + part.at(target - before, Cut{}, 0.0f);
      }
    } else {
      const int padded = power_of_two(ranks.c.ranks * CANDIDATES);
      u64* keys = reinterpret_cast<u64*>(&scratch + 1);
      float* logits = reinterpret_cast<float*>(keys + padded);
      const Gathered from =
          gather_candidates(ranks, row, c.rows, keys, logits, reinterpret_cast<int*>(logits + padded));
      token = choose(from, params, peak, all, scratch);
    }
  }
  if (token >= 0 && token < ranks.c.starts[ranks.c.ranks] && ranks.owner(token) == ranks.c.rank) answer = token;
  if (threadIdx.x != 0) return;
  room.tokens[row] = token;
  const float logit = answer >= 0 ? c.logits[row * c.stride + answer - c.first_id] : NAN;
  reinterpret_cast<Answer*>(out)[row] = {answer, logit};
}

// The tokens of rows of which nothing is known but the offers; a row that needs more is UNSETTLED.
__global__ void __launch_bounds__(FINISH_THREADS) finish_greedy_kernel(FdserveSample c, Ranks ranks) {
  const int64_t row = blockIdx.x;
  const Params params(c, row);
  const Known known(ranks, row, c.rows);
  const int num_top = static_cast<int>(c.num_top);
  for (int i = threadIdx.x; i < num_top; i += FINISH_THREADS)
    c.top_ids[row * num_top + i] = -1, c.top_logprobs[row * num_top + i] = NAN;
  if (threadIdx.x != 0) return;
  const bool told = !known.total.broken && params.mode >= 0;
  c.tokens[row] = told || known.draws(params) ? UNSETTLED : known.token(params);
  c.logprobs[row] = NAN;
}

__global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(FdserveSample c, Ranks ranks, Room room) {
  u64* keys = reinterpret_cast<u64*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const Params params(c, row);
  const Known known(ranks, row, c.rows);
  const int num_keys = ranks.c.ranks * ranks.kept, padded = power_of_two(num_keys), num_top = static_cast<int>(c.num_top);
  for (int i = threadIdx.x; i < padded; i += FINISH_THREADS)
    keys[i] = i < num_keys ? ranks.keys_in(ranks.offered(i / ranks.kept, row, c.rows))[i % ranks.kept] : 0;
  __syncthreads();
  sort_keys(keys, padded);
  float peak = known.total.peak, log_mass = known.total.log_mass;
  if (params.mode > 0) {
    u64 told = 0;
    for (int rank = 0; rank < ranks.c.ranks; ++rank) told += ranks.weighed(rank, row, c.rows)[1];
    log_mass = log_of_mass(told);
  }
  auto logprob = [&](float logit) {
    return params.mode > 0 ? told_logprob(logit, peak, params.told_inverse(), log_mass) : raw_logprob(logit, peak, log_mass);
  };
  const bool told = !known.total.broken && params.mode >= 0;
  for (int i = threadIdx.x; i < num_top; i += FINISH_THREADS) {
    const bool there = told && i < num_keys && keys[i] != 0;
    c.top_ids[row * num_top + i] = there ? id_of(keys[i]) : -1;
    c.top_logprobs[row * num_top + i] = there ? logprob(logit_of(keys[i])) : NAN;
  }
  if (threadIdx.x != 0) return;
  int token = room.tokens[row];
  float logit = NAN;
  for (int rank = 0; rank < ranks.c.ranks; ++rank) {
    const Answer answer = ranks.settled(rank, row, c.rows);
    if (answer.token != ELSEWHERE) token = answer.token, logit = answer.logit;
  }
  c.tokens[row] = token;
  c.logprobs[row] = told && logit == logit ? logprob(logit) : NAN;
}

// Launches a step on every row.
template <class Step>
cudaError_t run(const FdserveSample* call, const FdserveRanks* shares, Step step) {
  if (!is_possible(call, shares)) return cudaErrorInvalidValue;
  if (call->rows == 0) return cudaSuccess;
  FdserveSample part;
  Ranks ranks;
  Room room;
  lay_out(call, shares, part, ranks, room);
  step(part, ranks, room, dim3(static_cast<unsigned>(call->rows)));
  return cudaGetLastError();
}

}  // namespace
}  // namespace fdserve::cuda

using namespace fdserve::cuda;

void fdserve_cuda_sample_sizes(const FdserveSample* call, const FdserveRanks* shares, FdserveSampleSizes* sizes) {
  FdserveSample part;
  Ranks ranks;
  Room room;
  sizes->workspace = lay_out(call, shares, part, ranks, room);
  sizes->offered = ranks.offered_bytes(), sizes->weighed = ranks.weighed_bytes(), sizes->settled = ranks.settled_bytes();
}

cudaError_t fdserve_cuda_sample_offer(const FdserveSample* call, const FdserveRanks* shares, void* offered, cudaStream_t stream) {
  return run(call, shares, [&](const FdserveSample& c, const Ranks& ranks, const Room& room, dim3 rows) {
    const size_t keys = merge_bytes(room.scan);
    launch_scan(c, room.scan, stream);
    launch(offer_kernel, rows, dim3(DRAW_THREADS), keys > sizeof(DrawScratch) ? keys : sizeof(DrawScratch), stream, c, ranks,
           room, static_cast<char*>(offered));
  });
}

cudaError_t fdserve_cuda_sample_weigh(const FdserveSample* call, const FdserveRanks* shares, void* weighed, cudaStream_t stream) {
  return run(call, shares, [&](const FdserveSample& c, const Ranks& ranks, const Room& room, dim3 rows) {
    launch(weigh_kernel, rows, dim3(DRAW_THREADS), sizeof(DrawScratch), stream, c, ranks, room, static_cast<char*>(weighed));
  });
}

cudaError_t fdserve_cuda_sample_settle(const FdserveSample* call, const FdserveRanks* shares, void* settled, cudaStream_t stream) {
  return run(call, shares, [&](const FdserveSample& c, const Ranks& ranks, const Room& room, dim3 rows) {
    const size_t candidates = power_of_two(ranks.c.ranks * CANDIDATES) * (sizeof(u64) + sizeof(float) + sizeof(int));
    launch(settle_kernel, rows, dim3(DRAW_THREADS), sizeof(DrawScratch) + candidates, stream, c, ranks, room,
           static_cast<char*>(settled));
  });
}

cudaError_t fdserve_cuda_sample_finish(const FdserveSample* call, const FdserveRanks* shares, cudaStream_t stream) {
  return run(call, shares, [&](const FdserveSample& c, const Ranks& ranks, const Room& room, dim3 rows) {
    if (shares->settled == nullptr) return launch(finish_greedy_kernel, rows, dim3(FINISH_THREADS), 0, stream, c, ranks);
    launch(finish_kernel, rows, dim3(FINISH_THREADS), power_of_two(ranks.c.ranks * ranks.kept) * sizeof(u64), stream, c, ranks,
           room);
  });
}
