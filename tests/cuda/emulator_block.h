// What a kernel's code sees of the emulator's machine (emulator_machine.cc): where it stands, and how threads meet.
//
// Everything here is called by code that g++ instruments (harness.py), so that emulator_memory.cc learns of its loads and
// stores; the machine itself is compiled without.
#pragma once

#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int WARP = 32;

struct Place {
  dim3 thread, index, block, grid;
};
// Of the thread that is running.
extern Place place;
inline int lane() {
  const unsigned row = place.thread.y + place.block.y * place.thread.z;
  return static_cast<int>((place.thread.x + place.block.x * row) % WARP);
}

[[noreturn]] void fail(const char* what);

void meet_block();
// All threads of the block meet; returns how many of them came with a predicate that holds.
int meet_block_and_count(bool predicate);
// The lanes of a mask meet. Only where `orders_memory` do they see afterwards what the others wrote before.
void meet_lanes(unsigned mask, bool orders_memory);

// Where a lane of this warp shows the others something, 32 bytes.
using Slot = uint64_t[4];
Slot& slot_of(int lane);
// Every lane of the mask shows `size` bytes of `value`; those of lane `from` come into `result`, if there is one.
void exchange(unsigned mask, const void* value, void* result, size_t size, int from);

template <class T>
T exchange(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(Slot), "too large to be shown");
  T result = value;
  exchange(mask, &value, &result, sizeof(T), from);
  return result;
}

// An asynchronous copy of 16 bytes, or of zeros from null. It is complete when its group is waited for, no sooner.
void begin_copy(void* to, const void* from);
void commit_copies();
// Until at most so many groups are under way.
void wait_copies(int under_way);

// One thread's share in a warpgroup's product, with what `multiply` needs.
struct Product {
  void (*multiply)(const Product&);
  void* sums;
  const uint32_t* left;
  uintptr_t right;
  int leading, stride;
  bool add;
  int group;
};
void begin_product(Product product);
void commit_products();
// The oldest product that has to be complete for at most so many groups to be under way.
bool next_product(int under_way, Product& product);
// Products that begin after the threads have met next see what this thread has written to shared memory.
void show_to_products();
// A product reads these 16 bytes of shared memory; what a thread needs of them, without a look at whether it may.
void read_by_product(uintptr_t at);
void copy_for_product(void* to, uintptr_t at, size_t size);

// An atomic operation of this thread on these bytes.
void touch_atomically(const void* at, size_t size);

// A row of a matrix that a warp loads as a whole; what its lanes do to get there does not count.
void count_row(uintptr_t at);
void count(bool on);

char* dynamic_shared();

struct Architecture {
  size_t shared_bytes;
  bool is_hopper;
};
const Architecture& architecture();

// A kernel with its arguments, which lie at `closure`.
struct Call {
  void (*run)(const void* closure);
  const void* closure;
  size_t size;
};
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const Call& call);

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  const auto closure = [=] { kernel(args...); };
  run_grid(grid, block, shared_bytes,
           {[](const void* at) { (*static_cast<decltype(&closure)>(at))(); }, &closure, sizeof(closure)});
}

}  // namespace emulator
