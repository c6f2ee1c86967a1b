// The emulator's machine: blocks of threads as fibers, barriers between them, and what a warp's lanes show each other.
//
// Every thread of a block is a fiber of one operating-system thread; a block runs to its end before the next begins. A
// fiber runs until it meets a barrier or a warp-wide operation and then lets the others run, so shared memory and shuffles
// behave as on a GPU where all code between two barriers is free of races. Of one block the first fiber goes first, of the
// next the last, which shows many races. A barrier that not all threads reach, and a write past the dynamic shared memory,
// end the process with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 64, SHARED_ALIGNMENT = 1024;
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

// A warpgroup's product, as far as one thread has a share in it; multiplied once its group is waited for.
struct Product {
  std::function<void()> multiply;
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
  std::deque<Product> products;
  int product_group = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[WARP][4];  // what the lanes show each other
};

// What the kernels are to run on: one of the architectures that have least shared memory (sm_86, sm_89, sm_120), or Hopper.
struct Architecture {
  size_t shared_bytes = 99 << 10;
  bool is_hopper = false;
};

inline Architecture& architecture() {
  static Architecture instance;
  return instance;
}

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
    fiber.group = fiber.product_group = 0;
    fiber.products.clear();
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
  if (shared_bytes > architecture().shared_bytes) fail("more shared memory than a block can have");
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

// Called from Python: be Hopper from now on, or one of the others.
extern "C" __attribute__((used, visibility("default"))) inline void emulator_be_hopper(int is_hopper) {
  architecture() = is_hopper ? Architecture{227 << 10, true} : Architecture{};
}

inline int lane() { return static_cast<int>(block().current % WARP); }

}  // namespace emulator
