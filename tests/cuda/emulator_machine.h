// The emulator's machine, for its own sources: fibers, barriers, and what is asked of them about memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <vector>

#include "emulator_block.h"

namespace emulator {

constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 64, SHARED_ALIGNMENT = 1024;
constexpr unsigned char GUARD = 0xA5;
constexpr size_t MOST_THREADS = 1024;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};
// The current thread lets the others run until all have arrived.
void wait_at(const Barrier& barrier);

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
  const Barrier* waits_at = nullptr;
  unsigned waits_since = 0;
  std::vector<Copy> copies;
  int group = 0;
  std::deque<Product> products;
  int product_group = 0;
  uint32_t meetings = 0;  // of any kind
  // How often the thread has met its block, and its warp so that memory was ordered; and after how many barriers of the
  // block it showed what it had written to products.
  uint32_t barriers = 0, warp_barriers = 0;
  std::vector<uint32_t> shown_after;

  bool can_go_on() const { return !done && (waits_at == nullptr || waits_at->generation != waits_since); }
};

struct Warp {
  Barrier barrier;
  const void* kind;         // of work that they meet for
  const void* shown[WARP];  // by each lane, where they meet
};

// The block that is running.
struct Machine {
  bool is_running = false, is_uncounted = false;
  uint32_t launch = 0, block = 0, numbers = 0;  // no launch and no block ever has the number of another of either
  Call call;
  std::vector<Fiber> fibers;
  Warp warps[MOST_THREADS / WARP];
  std::vector<char> shared;
  char* dynamic = nullptr;  // where the block's share of it begins, aligned as device.cuh has it
  size_t shared_bytes = 0;
  Barrier barrier;
  jmp_buf scheduler;
  size_t current = 0, threads = 0, alive = 0;
  const char* stack = nullptr;  // of the current thread
  bool backwards = false;
  uint64_t progress = 0;
  int votes = 0, last_votes = 0;

  Fiber& fiber() { return fibers[current]; }
  Warp& warp() { return warps[current / WARP]; }
};
extern Machine machine;

// The current thread waits until so many have come; the last one does the work before anybody goes on.
template <class Work>
void meet(Barrier& barrier, int expected, const Work& work) {
  ++machine.progress;
  ++machine.fiber().meetings;
  if (++barrier.arrived != expected) return wait_at(barrier);
  work();
  barrier.arrived = 0;
  ++barrier.generation;
}

// The lanes of a mask meet, each with something of its own, and the last one works with all of it: `of(lane)`.
template <class T, class Work>
void meet_with(unsigned mask, T& mine, const Work& work) {
  if (!(mask >> lane() & 1)) fail("a lane outside of its own mask");
  Warp& warp = machine.warp();
  static constexpr char KIND = 0;  // whose address is that of no other work
  if (warp.barrier.arrived == 0) warp.kind = &KIND;
  if (warp.kind != &KIND) fail("lanes that meet for different operations");
  warp.shown[lane()] = &mine;
  meet(warp.barrier, __builtin_popcount(mask), [&] {
    work([&](int lane) -> T& { return *static_cast<T*>(const_cast<void*>(warp.shown[lane])); });
  });
}

// In emulator_memory.cc: the current thread's accesses that the instrumentation does not see.
enum class Access { READ, WRITE, ATOMIC, PRODUCT };
void touch(const void* at, size_t size, Access access, const void* code);
// An asynchronous copy will write here: until it has, nobody may touch it.
void promise(const void* at, size_t size, const void* code);
void keep_promise(const void* at, size_t size, const void* code);

// Where in this library, for addr2line.
uint64_t place_in_library(const void* code);

// In emulator_traffic.cc: an access of the current thread, if it is counted; and the end of a block.
void note_access(const void* at, size_t size, bool is_global, const void* code);
void count_block();

}  // namespace emulator
