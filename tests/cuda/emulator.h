// Runs CUDA kernels on the CPU, for tests on machines without a GPU: g++ compiles the same sources with this header in
// place of CUDA's. It is about results, not speed: what it checks is indexing, barriers, masks and arithmetic.
//
// Every thread of a block is a fiber of one operating-system thread; a block runs to its end before the next begins. A
// fiber runs until it meets a barrier or a warp-wide operation and then lets the others run, so shared memory and shuffles
// behave as on a GPU where all code between two barriers is free of races. Of one block the first fiber goes first, of the
// next the last, which shows many races. An asynchronous copy is done when its thread waits for it, no sooner. A barrier that
// not all threads reach, and a write past the dynamic shared memory, end the process with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated one"; }

namespace emulator {

constexpr int WARP = 32;
// The shared memory is that of the architectures that have least (sm_86, sm_89, sm_120).
constexpr size_t STACK_BYTES = 256 << 10, MAX_SHARED_BYTES = 99 << 10, GUARD_BYTES = 64, SHARED_ALIGNMENT = 128;
constexpr unsigned char GUARD = 0xA5;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

// An asynchronous copy of 16 bytes, or of zeros from null; complete once its group is waited for.
struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  ucontext_t context;
  jmp_buf state;
  dim3 thread;
  bool begun = false, done = false;
  std::vector<Copy> copies;
  int group = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[WARP][4];  // what the lanes show each other
};

// The block that is running.
struct Block {
  dim3 grid, block, index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::function<void()> body;
  Barrier barrier;
  ucontext_t home;
  jmp_buf scheduler;
  size_t current = 0, threads = 0, alive = 0;
  bool backwards = false;
  uint64_t progress = 0;
  int votes = 0;

  // As device.cuh aligns it.
  char* dynamic() { return shared.data() + -reinterpret_cast<uintptr_t>(shared.data()) % SHARED_ALIGNMENT; }
  Fiber& fiber() { return fibers[current]; }
  Warp& warp() { return warps[current / WARP]; }
};

inline Block& block() {
  static Block instance;
  return instance;
}

inline void yield() {
  Block& b = block();
  if (_setjmp(b.fiber().state) == 0) _longjmp(b.scheduler, 1);
}

inline void meet(Barrier& barrier, int expected) {
  Block& b = block();
  ++b.progress;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const unsigned generation = barrier.generation;
  while (barrier.generation == generation) yield();
}

inline void fiber_main() {
  Block& b = block();
  b.body();
  Fiber& fiber = b.fiber();
  fiber.done = true;
  --b.alive;
  ++b.progress;
  _longjmp(b.scheduler, 1);
}

inline void resume(size_t number) {
  Block& b = block();
  b.current = number;
  if (_setjmp(b.scheduler) != 0) return;
  Fiber& fiber = b.fiber();
  if (fiber.begun) _longjmp(fiber.state, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

inline void run_block() {
  Block& b = block();
  b.alive = b.threads;
  b.barrier = {};
  b.warps.assign((b.threads + WARP - 1) / WARP, Warp{});
  for (size_t i = 0; i < b.threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.begun = fiber.done = false;
    fiber.copies.clear();
    fiber.group = 0;
    fiber.thread = dim3(i % b.block.x, i / b.block.x % b.block.y, i / b.block.x / b.block.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, STACK_BYTES};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  while (b.alive > 0) {
    const uint64_t before = b.progress;
    for (size_t i = 0; i < b.threads; ++i)
      if (const size_t number = b.backwards ? b.threads - 1 - i : i; !b.fibers[number].done) resume(number);
    if (b.progress == before && b.alive > 0) fail("a barrier that not all threads reach");
  }
  if (b.barrier.arrived != 0) fail("threads ended inside of a barrier");
  b.backwards = !b.backwards;
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 threads, size_t shared_bytes, Args... args) {
  Block& b = block();
  if (shared_bytes > MAX_SHARED_BYTES) fail("more shared memory than a block can have");
  b.grid = grid;
  b.block = threads;
  b.threads = size_t{threads.x} * threads.y * threads.z;
  if (b.threads == 0 || b.threads > 1024) fail("a block of no or more than 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("a grid out of range");
  if (b.fibers.size() < b.threads) b.fibers.resize(b.threads);
  b.body = [=] { kernel(args...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = dim3(x, y, z);
        // Fresh garbage: a kernel that reads what it did not write gives NaNs.
        b.shared.assign(shared_bytes + GUARD_BYTES + SHARED_ALIGNMENT, static_cast<char>(0xFF));
        std::memset(b.dynamic() + shared_bytes, GUARD, GUARD_BYTES);
        run_block();
        for (size_t i = 0; i < GUARD_BYTES; ++i)
          if (static_cast<unsigned char>(b.dynamic()[shared_bytes + i]) != GUARD)
            fail("a write past the dynamic shared memory");
      }
}

// Every lane shows `value`; returns the one of lane `from`.
template <class T>
T exchange(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]), "too large to be shown");
  Block& b = block();
  Warp& warp = b.warp();
  const int expected = __builtin_popcount(mask);
  if (!(mask >> b.current % WARP & 1)) fail("a lane outside of its own mask");
  std::memcpy(warp.slots[b.current % WARP], &value, sizeof(T));
  meet(warp.barrier, expected);
  T result = value;
  if (from >= 0 && from < WARP) std::memcpy(&result, warp.slots[from], sizeof(T));
  meet(warp.barrier, expected);
  return result;
}

inline int lane() { return static_cast<int>(block().current % WARP); }

}  // namespace emulator

#define threadIdx (emulator::block().fiber().thread)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::block().block)
#define gridDim (emulator::block().grid)

inline void __syncthreads() { emulator::meet(emulator::block().barrier, static_cast<int>(emulator::block().alive)); }
inline int __syncthreads_count(int predicate) {
  emulator::Block& b = emulator::block();
  b.votes += predicate != 0;
  __syncthreads();
  const int votes = b.votes;
  if (b.barrier.arrived + 1 == static_cast<int>(b.alive)) b.votes = 0;  // all have read it
  __syncthreads();
  return votes;
}
inline void __syncwarp(unsigned mask = ~0u) { emulator::meet(emulator::block().warp().barrier, __builtin_popcount(mask)); }
template <class T>
T __shfl_sync(unsigned mask, T value, int from) { return emulator::exchange(mask, value, from & 31); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) { return emulator::exchange(mask, value, emulator::lane() ^ bits); }
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  return emulator::exchange(mask, value, emulator::lane() + by < 32 ? emulator::lane() + by : emulator::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return emulator::exchange(mask, value, emulator::lane() >= by ? emulator::lane() - by : emulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulator::Warp& warp = emulator::block().warp();
  warp.slots[emulator::lane()][0] = predicate != 0;
  __syncwarp(mask);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= static_cast<unsigned>(warp.slots[lane][0]) << lane;
  __syncwarp(mask);
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return out;
}
template <class T>
T __ldg(const T* p) { return *p; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((uint64_t{x} * y) >> 32); }
template <class T>
T atomicAdd(T* p, T x) { T old = *p; *p += x; return old; }
template <class T>
T atomicOr(T* p, T x) { T old = *p; *p |= x; return old; }
template <class T>
T atomicMax(T* p, T x) { T old = *p; if (x > old) *p = x; return old; }
inline void __threadfence() {}

// The two 16-bit types, with CUDA's names and rounding.
struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {static_cast<uint16_t>(0x7FFF)};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }

// The operations of device.cuh that are single instructions on a GPU.
namespace fdserve::cuda {

inline float emulated_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float emulated_float(__half x) { return __half2float(x); }

template <class T>
float emulated_half_of(uint32_t pair, int which) {
  T value;
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  std::memcpy(&value, &bits, 2);
  return emulated_float(value);
}

template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16(low).bits | static_cast<uint32_t>(__float2bfloat16(high).bits) << 16;
}
template <>
inline uint32_t pack<__half>(float low, float high) {
  const __half both[2] = {__float2half(low), __float2half(high)};
  uint32_t bits;
  std::memcpy(&bits, both, 4);
  return bits;
}

inline void store_16(void* to, uint4 bits) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("an unaligned store");
  std::memcpy(to, &bits, 16);
}

inline float exp2_approx(float x) { return std::exp2(x); }

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments { uint32_t a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulator::Warp& warp = emulator::block().warp();
  static_assert(sizeof(mine) <= sizeof(warp.slots[0]), "the fragments must fit a slot");
  const int lane = emulator::lane(), group = lane / 4, pair = lane % 4;
  std::memcpy(warp.slots[lane], &mine, sizeof(mine));
  __syncwarp();
  for (int half = 0; half < 2; ++half)
    for (int column = 0; column < 2; ++column) {
      float sum = d[half * 2 + column];
      for (int k = 0; k < 16; ++k) {
        Fragments left, right;
        std::memcpy(&left, warp.slots[group * 4 + k % 8 / 2], sizeof(left));
        std::memcpy(&right, warp.slots[(pair * 2 + column) * 4 + k % 8 / 2], sizeof(right));
        sum += emulated_half_of<T>(left.a[half + k / 8 * 2], k % 2) * emulated_half_of<T>(right.b[k / 8], k % 2);
      }
      d[half * 2 + column] = sum;
    }
  __syncwarp();
}

using Shared = uintptr_t;
inline Shared shared_at(const void* place) { return reinterpret_cast<Shared>(place); }

inline void ldmatrix(uint32_t (&r)[4], Shared row, bool transposed) {
  emulator::Warp& warp = emulator::block().warp();
  const int lane = emulator::lane();
  if (row % 16 != 0) emulator::fail("ldmatrix of an unaligned row");
  warp.slots[lane][0] = row;
  __syncwarp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t two[2];
    for (int i = 0; i < 2; ++i) {
      const int at = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
      two[i] = reinterpret_cast<const uint16_t*>(warp.slots[matrix * 8 + at][0])[column];
    }
    std::memcpy(&r[matrix], two, 4);
  }
  __syncwarp();
}
inline void ldmatrix_x4(uint32_t (&r)[4], Shared row) { ldmatrix(r, row, false); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared row) { ldmatrix(r, row, true); }

inline void copy_async_16(void* shared, const void* global, bool there) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulator::fail("an unaligned asynchronous copy");
  if (there && reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("an unaligned asynchronous copy");
  emulator::Fiber& fiber = emulator::block().fiber();
  fiber.copies.push_back({shared, there ? global : nullptr, fiber.group});
}
inline void commit_copies() { ++emulator::block().fiber().group; }
template <int N>
void wait_copies() {
  emulator::Fiber& fiber = emulator::block().fiber();
  std::vector<emulator::Copy> rest;
  for (const emulator::Copy& copy : fiber.copies) {
    if (copy.group >= fiber.group - N)
      rest.push_back(copy);
    else if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  fiber.copies.swap(rest);
}

inline char* dynamic_shared() { return emulator::block().dynamic(); }

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Args... args) {
  emulator::launch(kernel, grid, block, shared_bytes, args...);
}

}  // namespace fdserve::cuda
