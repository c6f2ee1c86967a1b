// A fork-join thread pool whose idle threads cost nothing.
//
// Paddle's wheel brings two OpenMP runtimes whose idle threads spin for up to 200 ms; with several ranks on a machine
// that starves the working ones. Here a worker spins for SPIN_MICROSECONDS (so that it is awake through a model step,
// where one region follows another) and then sleeps. A region costs about 1 us when the workers are awake.
#pragma once

#include <cstdint>

namespace fdserve {

// Computes body(arg, i) for every i in [0, n), in any order, on the calling thread and the workers; returns when all are
// done. A second caller at the same time (or a body that calls it) computes alone: results must never depend on it.
void parallel(int64_t n, void (*body)(void* arg, int64_t i), void* arg);

template <class Body>
void parallel(int64_t n, const Body& body) {
  parallel(n, [](void* arg, int64_t i) { (*static_cast<const Body*>(arg))(i); }, const_cast<Body*>(&body));
}

int num_threads();
void set_num_threads(int count);

// A buffer of this thread that lives until the next call with the same slot asks for more. 64-byte aligned.
enum ScratchSlot { kScratchTile, kScratchQuery, kScratchSeen, kScratchLogits, kScratchWeights, kScratchCall, kScratchMoe, kScratchBlocks, kScratchRows, kScratchSlots };
void* scratch_bytes(ScratchSlot slot, int64_t bytes);

template <class T>
T* scratch(ScratchSlot slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace fdserve
