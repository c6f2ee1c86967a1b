// The emulator's machine: blocks of threads as fibers, barriers between them, and what a warp's lanes show each other.
//
// Every thread of a block is a fiber of one operating-system thread; a block runs to its end before the next begins. A
// fiber runs until it meets a barrier or a warp-wide operation and then lets the others run, so shared memory and shuffles
// behave as on a GPU where all code between two barriers is free of races; whether it is, emulator_memory.cc tells. Of one
// block the first fiber goes first, of the next the last. A barrier that not all threads reach, and a write past the
// dynamic shared memory, end the process with a message.
#include "emulator_machine.h"

#include <cstdio>
#include <cstdlib>

namespace emulator {

Place place;
Machine machine;

namespace {

// One of the architectures that have least shared memory (sm_86, sm_89, sm_120), or Hopper.
constexpr Architecture SMALLEST{99 << 10, false}, HOPPER{227 << 10, true};
Architecture chosen = SMALLEST;

void fiber_main() {
  machine.call.run(machine.call.closure);
  machine.fiber().done = true;
  --machine.alive;
  ++machine.progress;
  _longjmp(machine.scheduler, 1);
}

void resume(size_t number) {
  machine.current = number;
  Fiber& fiber = machine.fiber();
  machine.stack = fiber.stack.get();
  place.thread = fiber.thread;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.state, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

void begin_fiber(Fiber& fiber, dim3 thread) {
  fiber.begun = fiber.done = false;
  fiber.waits_at = nullptr;
  fiber.copies.clear();
  fiber.products.clear();
  fiber.group = fiber.product_group = 0;
  fiber.meetings = fiber.barriers = fiber.warp_barriers = 0;
  fiber.shown_after.clear();
  fiber.thread = thread;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, STACK_BYTES};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void run_block() {
  Machine& m = machine;
  m.block = ++m.numbers;
  m.alive = m.threads;
  m.barrier = {};
  for (Warp& warp : m.warps) warp.barrier = {};
  for (size_t i = 0; i < m.threads; ++i) {
    const unsigned x = place.block.x, y = place.block.y;
    begin_fiber(m.fibers[i], dim3(i % x, i / x % y, i / x / y));
  }
  while (m.alive > 0) {
    const uint64_t before = m.progress;
    for (size_t i = 0; i < m.threads; ++i)
      if (const size_t number = m.backwards ? m.threads - 1 - i : i; m.fibers[number].can_go_on()) resume(number);
    if (m.progress == before && m.alive > 0) fail("a barrier that not all threads reach");
  }
  if (m.barrier.arrived != 0) fail("threads ended inside of a barrier");
  m.backwards = !m.backwards;
  count_block();
}

// Runs a block on fresh garbage: a kernel that reads what it did not write gives NaNs.
void run_block_at(dim3 index) {
  place.index = index;
  Machine& m = machine;
  m.shared.assign(m.shared_bytes + GUARD_BYTES + SHARED_ALIGNMENT, static_cast<char>(0xFF));
  m.dynamic = m.shared.data() + -reinterpret_cast<uintptr_t>(m.shared.data()) % SHARED_ALIGNMENT;
  std::memset(m.dynamic + m.shared_bytes, GUARD, GUARD_BYTES);
  run_block();
  for (size_t i = 0; i < GUARD_BYTES; ++i)
    if (static_cast<unsigned char>(m.dynamic[m.shared_bytes + i]) != GUARD) fail("a write past the dynamic shared memory");
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

void wait_at(const Barrier& barrier) {
  Fiber& fiber = machine.fiber();
  fiber.waits_at = &barrier;
  fiber.waits_since = barrier.generation;
  if (_setjmp(fiber.state) == 0) _longjmp(machine.scheduler, 1);
}

void meet_block() { meet_block_and_count(false); }

int meet_block_and_count(bool predicate) {
  Machine& m = machine;
  m.votes += predicate;
  meet(m.barrier, static_cast<int>(m.alive), [&] {
    m.last_votes = m.votes;
    m.votes = 0;
  });
  ++m.fiber().barriers;
  return m.last_votes;
}

void meet_lanes(unsigned mask) {
  meet_with(mask, mask, [](const auto&) {});
  ++machine.fiber().warp_barriers;
}

int lane() { return static_cast<int>(machine.current % WARP); }

void exchange(unsigned mask, const void* value, void* result, size_t size, int from) {
  struct { const void* value; void* result; int from; } mine = {value, result, from};
  meet_with(mask, mine, [&](const auto& of) {
    for (int to = 0; to < WARP; ++to)
      if (mask >> to & 1 && of(to).from >= 0 && of(to).from < WARP) {
        if (!(mask >> of(to).from & 1)) fail("a lane that is asked for what it does not show");
        std::memcpy(of(to).result, of(of(to).from).value, size);
      }
  });
}

unsigned vote(unsigned mask, bool predicate) {
  struct { bool predicate; unsigned votes; } mine = {predicate, 0};
  meet_with(mask, mine, [&](const auto& of) {
    unsigned votes = 0;
    for (int lane = 0; lane < WARP; ++lane)
      if (mask >> lane & 1 && of(lane).predicate) votes |= 1u << lane;
    for (int lane = 0; lane < WARP; ++lane)
      if (mask >> lane & 1) of(lane).votes = votes;
  });
  return mine.votes;
}

void begin_copy(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("an unaligned asynchronous copy");
  Fiber& fiber = machine.fiber();
  if (from != nullptr) touch(from, 16, Access::READ, __builtin_return_address(0));
  promise(to, 16, __builtin_return_address(0));
  fiber.copies.push_back({to, from, fiber.group});
}

void commit_copies() { ++machine.fiber().group; }

void wait_copies(int under_way) {
  Fiber& fiber = machine.fiber();
  std::vector<Copy> rest;
  for (const Copy& copy : fiber.copies) {
    if (copy.group >= fiber.group - under_way) {
      rest.push_back(copy);
      continue;
    }
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
    machine.is_uncounted = true;  // it was when it began
    keep_promise(copy.to, 16, __builtin_return_address(0));
    machine.is_uncounted = false;
  }
  fiber.copies.swap(rest);
}

void touch_atomically(const void* at, size_t size) { touch(at, size, Access::ATOMIC, __builtin_return_address(0)); }

char* dynamic_shared() { return machine.dynamic; }

const Architecture& architecture() { return chosen; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const Call& call) {
  Machine& m = machine;
  if (shared_bytes > architecture().shared_bytes) fail("more shared memory than a block can have");
  place.grid = grid;
  place.block = block;
  m.threads = size_t{block.x} * block.y * block.z;
  if (m.threads == 0 || m.threads > MOST_THREADS) fail("a block of no or more than 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("a grid out of range");
  if (m.fibers.size() < m.threads) m.fibers.resize(m.threads);
  m.shared_bytes = shared_bytes;
  m.call = call;
  m.launch = ++m.numbers;
  m.is_running = true;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_block_at(dim3(x, y, z));
  m.is_running = false;
}

}  // namespace emulator

// Called from Python: be Hopper from now on, or one of the others.
extern "C" __attribute__((visibility("default"))) void emulator_be_hopper(int is_hopper) {
  emulator::chosen = is_hopper ? emulator::HOPPER : emulator::SMALLEST;
}
