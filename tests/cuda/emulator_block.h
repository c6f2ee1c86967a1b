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

// A function of the emulator's own, whose loads and stores are not the kernel's.
#define UNCHECKED __attribute__((no_sanitize("thread")))

namespace emulator {

constexpr int WARP = 32;

struct Place {
  dim3 thread, index, block, grid;
};
// Of the thread that is running.
extern Place place;
int lane();

[[noreturn]] void fail(const char* what);

void meet_block();
// All threads of the block meet; returns how many of them came with a predicate that holds.
int meet_block_and_count(bool predicate);
// The lanes of a mask meet, and see afterwards what the others wrote before.
void meet_lanes(unsigned mask);

// Every lane of the mask shows `size` bytes of `value`; those of lane `from` come into `result`, if there is one.
void exchange(unsigned mask, const void* value, void* result, size_t size, int from);
// The lanes of the mask that come with a predicate that holds.
unsigned vote(unsigned mask, bool predicate);

template <class T>
UNCHECKED T exchange(unsigned mask, T value, int from) {
  T result = value;
  exchange(mask, &value, &result, sizeof(T), from);
  return result;
}

// An asynchronous copy of 16 bytes, or of zeros from null. It is complete when its group is waited for, no sooner.
void begin_copy(void* to, const void* from);
void commit_copies();
// Until at most so many groups are under way.
void wait_copies(int under_way);

// What tensor cores do (emulator_matrices.cc), with pairs of 16-bit floats in registers: of __half or, else, bfloat16.
void load_matrices(uint32_t (&registers)[4], uintptr_t row, bool is_transposed);
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_half);

// One thread's share in a warpgroup's product. It is multiplied when its threads wait for it, no sooner, from what its left
// operand's registers and shared memory hold then: a kernel that writes there too early gets other results.
struct Product {
  float* sums;
  const uint32_t* left;
  uintptr_t right;
  int leading, stride, columns;
  bool is_transposed, is_half, add;
  int group;
  const void* code;  // where it began
};
void begin_product(Product product);
void commit_products();
// Until at most so many groups are under way.
void wait_products(int under_way);
// Products that begin after the threads have met next see what this thread has written to shared memory.
void show_to_products();

// An atomic operation of this thread on these bytes.
void touch_atomically(const void* at, size_t size);

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
