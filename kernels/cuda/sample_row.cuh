// What one block does with one row of logits: sums, cuts and draws, all of them reproducible to the bit.
//
// Candidates are ordered by (logit descending, id ascending); `key_of` puts that order into 64 bits, so no two are equal.
// Probability mass is counted in integers (2^-40 of the likeliest token's): sums then do not depend on the order in which
// threads add, and what is below one unit cannot be drawn.
#pragma once

#include "device.cuh"

namespace fdserve::cuda {

using u64 = unsigned long long;

constexpr int DRAW_THREADS = 1024;
constexpr int DRAW_WARPS = DRAW_THREADS / WARP;
constexpr int BINS = 256;
constexpr float UNIT = 1099511627776.0f;  // 2^40

// Bits that compare as floats do; -0 is 0.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float unordered(uint32_t bits) {
  return __uint_as_float(bits >> 31 != 0 ? bits & 0x7fffffffu : ~bits);
}
__device__ inline u64 key_of(float logit, uint32_t id) { return static_cast<u64>(ordered(logit)) << 32 | ~id; }
__device__ inline int id_of(u64 key) { return static_cast<int>(~static_cast<uint32_t>(key)); }
__device__ inline float logit_of(u64 key) { return unordered(static_cast<uint32_t>(key >> 32)); }

// Sorts keys[size] in shared memory, descending; `size` is a power of two. By the whole block.
__device__ inline void sort_keys(u64* keys, int size) {
  for (int run = 2; run <= size; run *= 2)
    for (int gap = run / 2; gap > 0; gap /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = i / gap * gap * 2 + i % gap, high = low + gap;
        const bool descending = (low & run) == 0;
        const u64 a = keys[low], b = keys[high];
        if ((a < b) == descending) keys[low] = b, keys[high] = a;
      }
      __syncthreads();
    }
}

// The number in [0, 1) that decides the token at `position`: 53 bits of Philox4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", 2011), as 53 bits.
__device__ inline u64 philox53(u64 seed, u64 position) {
  uint32_t x[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const u64 left = static_cast<u64>(0xD2511F53u) * x[0], right = static_cast<u64>(0xCD9E8D57u) * x[2];
    const uint32_t next[4] = {static_cast<uint32_t>(right >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(right),
                              static_cast<uint32_t>(left >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(left)};
    for (int i = 0; i < 4; ++i) x[i] = next[i];
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return (static_cast<u64>(x[0]) << 32 | x[1]) >> 11;
}

// What the running mass must reach for the token that `number` (of 2^53) draws from `all`.
__device__ inline u64 drawn(u64 number, u64 all) {
  // all < 2^57 and number < 2^53: the product's upper part is what counts.
  return __umul64hi(all, number << 11) + 1;
}

// A leading set of the candidates: those over `value`, and of those that equal it the ids up to `last`.
struct Cut {
  float value = -INFINITY;
  int last = 0x7fffffff;

  __device__ bool keeps(float x, int id) const { return x > value || (x == value && id <= last); }
};

struct DrawScratch {
  u64 bins[DRAW_WARPS][BINS];
  u64 sums[DRAW_WARPS];
  u64 result, rest;
  int id;
};

// One row on the whole block: `logits` may lie in global memory, `size` of them, the largest of them `peak`.
class Row {
 public:
  __device__ Row(const float* logits, int size, float peak, float inverse, DrawScratch& scratch)
      : logits(logits), size(size), peak(peak), inverse(inverse), s(scratch) {}

  __device__ float weight(float x) const { return expf(__fmul_rn(__fadd_rn(x, -peak), inverse)); }
  __device__ u64 units(float x) const { return static_cast<u64>(__fmul_rn(weight(x), UNIT)); }

  // The mass, or with `count` the number, of what `cut` and `least` (a weight) leave.
  __device__ u64 mass(const Cut& cut, float least, bool count) const {
    u64 sum = 0;
    for (int i = threadIdx.x; i < size; i += DRAW_THREADS)
      if (kept(i, cut, least)) sum += count ? 1 : units(logits[i]);
    return total(sum);
  }

  // The shortest leading set within `cut` and `least` whose mass (or number) reaches `target`; all of it if none does.
  __device__ Cut reach(u64 target, const Cut& cut, float least, bool count) const {
    uint32_t prefix = 0, known = 0;  // the highest bits of the value that is looked for, and which these are
    for (int shift = 24; shift >= 0; shift -= 8) {
      const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
      for (int i = threadIdx.x; i < DRAW_WARPS * BINS; i += DRAW_THREADS) s.bins[i / BINS][i % BINS] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < size; i += DRAW_THREADS) {
        const uint32_t bits = ordered(logits[i]);
        if ((bits & known) == prefix && kept(i, cut, least))
          atomicAdd(&s.bins[warp][bits >> shift & (BINS - 1)], count ? u64{1} : units(logits[i]));
      }
      __syncthreads();
      if (threadIdx.x < BINS)
        for (int other = 1; other < DRAW_WARPS; ++other) s.bins[0][threadIdx.x] += s.bins[other][threadIdx.x];
      __syncthreads();
      if (threadIdx.x == 0) {
        int bin = BINS - 1;
        u64 rest = target;
        for (; bin > 0 && s.bins[0][bin] < rest; --bin) rest -= s.bins[0][bin];
        // Fewer in all than the target: everything is kept.
        s.id = s.bins[0][bin] < rest ? -1 : bin;
        s.rest = rest;
      }
      __syncthreads();
      const int bin = s.id;
      target = s.rest;
      __syncthreads();
      if (bin < 0) return cut;
      prefix |= static_cast<uint32_t>(bin) << shift;
      known |= 0xFFu << shift;
      (void)lane;
    }
    // Equal logits have equal mass: what is still to reach says how many of them are in, the lowest ids first.
    Cut found;
    found.value = unordered(prefix);
    const u64 each = count ? 1 : units(found.value);
    const u64 wanted = each == 0 ? 1 : (target + each - 1) / each;
    found.last = nth(wanted == 0 ? 1 : wanted, [&](int i) {
      return static_cast<u64>(logits[i] == found.value && kept(i, cut, least));
    });
    return found;
  }

  // The index at which the kept mass, added up in their order, reaches `target`.
  __device__ int at(u64 target, const Cut& cut, float least) const {
    return nth(target, [&](int i) { return kept(i, cut, least) ? units(logits[i]) : u64{0}; });
  }

 private:
  const float* logits;
  const int size;
  const float peak, inverse;
  DrawScratch& s;

  __device__ bool kept(int i, const Cut& cut, float least) const {
    return cut.keeps(logits[i], i) && (least <= 0.0f || weight(logits[i]) >= least);
  }

  __device__ u64 total(u64 sum) const {
    for (int bits = WARP / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(ALL, sum, bits);
    __syncthreads();
    if (threadIdx.x % WARP == 0) s.sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    u64 all = 0;
    for (int warp = 0; warp < DRAW_WARPS; ++warp) all += s.sums[warp];
    return all;
  }

  // The first index at which amount(0) + amount(1) + ... reaches `target`; the last with any amount if none does.
  template <class Amount>
  __device__ int nth(u64 target, Amount amount) const {
    const int each = (size + DRAW_THREADS - 1) / DRAW_THREADS;
    const int first = threadIdx.x * each, end = min(first + each, size);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u64 own = 0;
    for (int i = first; i < end; ++i) own += amount(i);
    u64 upto = own;
    for (int by = 1; by < WARP; by *= 2) {
      const u64 below = __shfl_up_sync(ALL, upto, by);
      if (lane >= by) upto += below;
    }
    __syncthreads();
    if (threadIdx.x == 0) s.id = -1;
    if (lane == WARP - 1) s.sums[warp] = upto;
    __syncthreads();
    u64 before = upto - own, all = 0;
    for (int other = 0; other < DRAW_WARPS; ++other) {
      if (other < warp) before += s.sums[other];
      all += s.sums[other];
    }
    if (target > all) target = all;
    if (own > 0 && before < target && target <= before + own)
      for (int i = first; i < end; ++i) {
        const u64 here = amount(i);
        if (here > 0 && before + here >= target) {
          s.id = i;
          break;
        }
        before += here;
      }
    __syncthreads();
    const int id = s.id;
    __syncthreads();
    return id;
  }
};

}  // namespace fdserve::cuda
