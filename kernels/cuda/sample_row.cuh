// What one block does with one row of logits: sums, cuts and draws, all of them reproducible to the bit.
//
// Candidates are ordered by (logit descending, id ascending); `key_of` puts that order into 64 bits, so no two are equal.
// Probability mass is counted in integers (2^-40 of the likeliest token's): sums then do not depend on the order in which
// threads add, and what is below one unit cannot be drawn.
//
// Every pass has a row's logits from the cache, 16 bytes a thread at a time where they are aligned. A cut takes two or three:
// histograms over 13 bits of the logits that may matter, which a bound tells beforehand: most are far below it, and those
// that are not would otherwise meet in a few bins, one after the other.
#pragma once

#include "device.cuh"

namespace fdserve::cuda {

using u64 = unsigned long long;

constexpr int DRAW_THREADS = 512;  // of 64 registers, so that two rows share a multiprocessor
constexpr int DRAW_WARPS = DRAW_THREADS / WARP;
constexpr int BATCH = 16;  // logits that a thread has under way
constexpr int BIN_BITS = 13, BINS = 1 << BIN_BITS;
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
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2)
#pragma unroll 1
    for (int gap = run / 2; gap > 0; gap /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = i * 2 - (i & (gap - 1)), high = low + gap;
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
  uint32_t low[BINS], high[BINS];  // halves of the bins' amounts: shared memory adds 32 bits at a time
  u64 sums[DRAW_WARPS];
};

// Where a running sum reaches its target: the index, -1 if there is nothing at all; the sum before it; the sum of all.
struct Reached {
  int index;
  u64 before, all;
};

// One row on the whole block: `logits` may lie in global memory, `size` of them, the largest of them `peak`.
class Row {
 public:
  __device__ Row(const float* logits, int size, float peak, float inverse, DrawScratch& scratch)
      : logits(logits), size(size), peak(peak), inverse(inverse), s(scratch) {}

  __device__ float weight(float x) const { return expf(__fmul_rn(__fadd_rn(x, -peak), inverse)); }
  __device__ u64 units(float x) const { return static_cast<u64>(__fmul_rn(weight(x), UNIT)); }

  // The lowest id of the likeliest.
  __device__ int first() const {
    return nth(size, logit_at(), [&](int, float x) { return static_cast<u64>(x == peak); }, [](u64) { return u64{1}; }).index;
  }

  // The mass, or with `count` the number, of what `cut` and `least` (a weight) leave.
  __device__ u64 mass(const Cut& cut, float least, bool count) const {
    u64 sum = 0;
    each_logit([&](int i, float x) {
      if (kept(i, x, cut, least)) sum += count ? 1 : units(x);
    });
    sum = warp_total(sum);
    __syncthreads();
    if (threadIdx.x % WARP == 0) s.sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    u64 all = 0;
    for (int warp = 0; warp < DRAW_WARPS; ++warp) all += s.sums[warp];
    return all;
  }

  // The shortest leading set within `cut` and `least` whose mass (or number) reaches `target`; all of it if none does. `all`:
  // the mass within them where the caller knows it.
  __device__ Cut reach(u64 target, const Cut& cut, float least, bool count, u64 all = 0) const {
    const uint32_t top = ordered(peak), bar = lowest(target, cut, least, count, all);
    int shift = bar < top ? 32 - __clz(top ^ bar) : 0;
    uint32_t prefix = shift < 32 ? top >> shift << shift : 0;  // the highest bits of the value that is looked for
    u64 equal = 0;                                             // the amount of the logits that begin with the prefix
    while (shift > 0) {
      const int width = shift < BIN_BITS ? shift : BIN_BITS, bins = 1 << width, known = shift;
      shift -= width;
      for (int i = threadIdx.x; i < bins; i += DRAW_THREADS) s.low[i] = s.high[i] = 0;
      __syncthreads();
      each_logit([&](int i, float x) {
        const uint32_t bits = ordered(x);
        if (bits >= bar && (known == 32 || bits >> known == prefix >> known) && kept(i, x, cut, least))
          add(bits >> shift & (bins - 1), count ? u64{1} : units(x));
      });
      __syncthreads();
      auto amount = [&](int i) { return static_cast<u64>(s.high[bins - 1 - i]) << 32 | s.low[bins - 1 - i]; };
      const Reached found = nth(bins, amount, [](int, u64 x) { return x; }, [&](u64) { return target; });
      if (found.all < target) return cut;
      target -= found.before;
      equal = amount(found.index);
      prefix |= static_cast<uint32_t>(bins - 1 - found.index) << shift;
      __syncthreads();
    }
    // Equal logits have equal mass: what is still to reach says how many of them are in, the lowest ids first.
    Cut found;
    found.value = unordered(prefix);
    const u64 each = count ? 1 : units(found.value);
    const u64 wanted = each == 0 ? 1 : (target + each - 1) / each;
    if (each > 0 && equal > 0 && wanted * each >= equal) {
      if (found.value == cut.value) found.last = cut.last;
      return found;
    }
    auto is_equal = [&](int i, float x) { return static_cast<u64>(x == found.value && kept(i, x, cut, least)); };
    found.last = nth(size, logit_at(), is_equal, [&](u64) { return wanted; }).index;
    return found;
  }

  // The index at which the kept mass, added up in the order of ids, reaches `target`.
  __device__ int at(u64 target, const Cut& cut, float least) const {
    auto mass = [&](int i, float x) { return kept(i, x, cut, least) ? units(x) : 0; };
    return nth(size, logit_at(), mass, [&](u64) { return target; }).index;
  }

  // The index that `number` (of 2^53) draws from the kept mass.
  __device__ int draw(u64 number, const Cut& cut, float least) const {
    auto mass = [&](int i, float x) { return kept(i, x, cut, least) ? units(x) : 0; };
    return nth(size, logit_at(), mass, [&](u64 all) { return drawn(number, all); }).index;
  }

 private:
  const float* logits;
  const int size;
  const float peak, inverse;
  DrawScratch& s;

  struct LogitAt {
    const float* logits;
    __device__ float operator()(int i) const { return logits[i]; }
  };
  __device__ LogitAt logit_at() const { return {logits}; }

  __device__ bool kept(int i, float x, const Cut& cut, float least) const {
    return cut.keeps(x, i) && (least <= 0.0f || weight(x) >= least);
  }

  // Calls use(index, logit) for every logit, on some thread.
  template <class Use>
  __device__ void each_logit(Use use) const {
    const int fours = reinterpret_cast<uintptr_t>(logits) % 16 == 0 ? size / 4 : 0;
    for (int base = threadIdx.x; base < fours; base += DRAW_THREADS * BATCH / 4) {
      float4 four[BATCH / 4];
#pragma unroll
      for (int i = 0; i < BATCH / 4; ++i)
        four[i] = reinterpret_cast<const float4*>(logits)[min(base + i * DRAW_THREADS, fours - 1)];
#pragma unroll
      for (int i = 0; i < BATCH / 4; ++i)
        if (const int at = (base + i * DRAW_THREADS) * 4; at < fours * 4)
          use(at, four[i].x), use(at + 1, four[i].y), use(at + 2, four[i].z), use(at + 3, four[i].w);
    }
    for (int i = fours * 4 + threadIdx.x; i < size; i += DRAW_THREADS) use(i, logits[i]);
  }

  // Bits of a logit below which none matters to `reach`.
  __device__ uint32_t lowest(u64 target, const Cut& cut, float least, bool count, u64 all) const {
    float bar = -INFINITY;
    // What min_p leaves out, and what could be left out of a mass altogether, were every logit's as large: with room for the
    // roundings of logarithm and exponential, and of the logits' own.
    const u64 spare = !count && all > target ? (all - target) / static_cast<u64>(size) : 0;
    float weight = spare > 0 ? static_cast<float>(spare) / UNIT : 0.0f;
    weight = least > weight ? least : weight;
    if (weight > 0.0f) {
      const float below = (logf(weight) - 0.01f) / inverse;
      bar = peak + below - 1e-6f * (fabsf(peak) + fabsf(below));
    }
    uint32_t bits = bar > -INFINITY ? ordered(bar) : ordered(-INFINITY);
    if (count && target <= DRAW_THREADS) {
      // What as many threads' own largest reach.
      float own = -INFINITY;
      each_logit([&](int i, float x) {
        if (x > own && kept(i, x, cut, least)) own = x;
      });
      uint32_t reached = 0;
      for (uint32_t bit = 1u << 31; bit >= 1u << 16; bit >>= 1)
        if (static_cast<u64>(__syncthreads_count(ordered(own) >= (reached | bit))) >= target) reached |= bit;
      bits = reached > bits ? reached : bits;
    }
    return bits;
  }

  __device__ void add(uint32_t bin, u64 amount) const {
    const uint32_t low = static_cast<uint32_t>(amount), old = atomicAdd(&s.low[bin], low);
    const uint32_t high = static_cast<uint32_t>(amount >> 32) + (old + low < old);
    if (high != 0) atomicAdd(&s.high[bin], high);
  }

  __device__ static u64 warp_total(u64 sum) {
    for (int bits = WARP / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(ALL, sum, bits);
    return sum;
  }

  // The first of `count` indices at which amount(0, load(0)) + amount(1, load(1)) + ... reaches target_of(all); the last with
  // any amount if none does. Warps add up stretches, then stretches of the one that holds it, down to 32 numbers.
  template <class Load, class Amount, class TargetOf>
  __device__ Reached nth(int count, Load load, Amount amount, TargetOf target_of) const {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = 0, end = count;
    u64 before = 0, all = 0, target = 0;
    do {
      const int stretch = (end - first + DRAW_THREADS - 1) / DRAW_THREADS * WARP;
      const int begin = min(first + warp * stretch, end), stop = min(begin + stretch, end);
      u64 own = 0;
      for (int base = begin + lane; base < stop; base += BATCH * WARP) {
        decltype(load(0)) x[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) x[i] = load(min(base + i * WARP, stop - 1));
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
          if (base + i * WARP < stop) own += amount(base + i * WARP, x[i]);
      }
      own = warp_total(own);
      __syncthreads();
      if (lane == 0) s.sums[warp] = own;
      __syncthreads();
      if (target == 0) {
        for (int other = 0; other < DRAW_WARPS; ++other) all += s.sums[other];
        if (all == 0) return {-1, 0, 0};
        target = target_of(all);
        target = target < 1 ? 1 : target > all ? all : target;
      }
      int holder = 0;
      for (; before + s.sums[holder] < target; ++holder) before += s.sums[holder];
      first += holder * stretch;
      end = min(first + stretch, end);
    } while (end - first > WARP);
    const int index = first + lane;
    const u64 own = index < end ? amount(index, load(index)) : 0;
    u64 upto = own;
    for (int by = 1; by < WARP; by *= 2) {
      const u64 below = __shfl_up_sync(ALL, upto, by);
      if (lane >= by) upto += below;
    }
    const int holder = __ffs(__ballot_sync(ALL, before + upto >= target)) - 1;
    return {first + holder, before + __shfl_sync(ALL, upto - own, holder), all};
  }
};

}  // namespace fdserve::cuda
