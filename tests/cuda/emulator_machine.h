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
  std::deque<Product> products;
  int product_group = 0;
  uint32_t meetings = 0;  // of any kind
  // How often the thread has met its block, and its warp so that memory was ordered; and after how many barriers of the
  // block it showed what it had written to products.
  uint32_t barriers = 0, warp_barriers = 0;
  std::vector<uint32_t> shown_after;
};

struct Warp {
  Barrier barrier;
  Slot slots[WARP];
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
  bool backwards = false;
  uint64_t progress = 0;
  int votes = 0;

  Fiber& fiber() { return fibers[current]; }
  Warp& warp() { return warps[current / WARP]; }
};
extern Machine machine;

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
