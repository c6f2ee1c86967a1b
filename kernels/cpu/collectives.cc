// Exchanges between processes: each rank copies its part into a slot of its own, says so, waits until all have said so, and
// reads all slots in rank order. The order of a sum never changes, and all ranks compute the same bits.
//
// Two sets of slots alternate, so nobody overwrites what another still reads: a rank that writes collective t + 2 has seen
// every other arrive at t + 1, which each did only after reading t. `t`, the turn, counts from 1.
//
// A rank says that it has arrived by storing the turn in its line of the shared memory. Whoever waits spins for a moment,
// for the ranks finish almost together, then sleeps on that line by futex, because there may be more ranks than cores. It
// looks now and then whether a peer is gone.
//
// Floor: one write and `ranks` reads of the data at the speed of the cache that the cores share, and one cache line's
// way from core to core: 10 to 20 us for [32, 1024] float32 between two ranks.
#include "collectives.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace fdserve {
namespace {

constexpr int64_t SPIN_MICROSECONDS = 100;
constexpr long LOOK_AFTER_PEERS_NANOSECONDS = 100'000'000;

struct alignas(64) Line {
  std::atomic<uint32_t> turn;      // the last collective that the rank has arrived at
  std::atomic<uint32_t> sleepers;  // how many wait for the next; too many, harmlessly, once one was killed
};
static_assert(sizeof(Line) == 64 && std::atomic<uint32_t>::is_always_lock_free, "the memory's layout");

Line& line(const Shared& shared, int rank) { return static_cast<Line*>(shared.memory)[rank]; }

char* slot(const Shared& shared, uint32_t turn, int rank) {
  return static_cast<char*>(shared.memory) + 64 * shared.ranks +
         ((turn & 1) * shared.ranks + rank) * shared.slot_bytes;
}

bool peers_are_there(const Shared& shared) {
  for (int i = 0; i < shared.num_peers; ++i) {
    pollfd peer = {shared.peers[i], POLLRDHUP, 0};
    if (poll(&peer, 1, 0) > 0) return false;
  }
  return true;
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}

// Serial-number order: turns may wrap.
bool reached(const Line& other, uint32_t turn) {
  return static_cast<int32_t>(other.turn.load(std::memory_order_acquire) - turn) >= 0;
}

// Where ranks share cores, to spin would only keep the awaited one from running.
bool cores_for(int ranks) {
  static const int cores = [] {
    cpu_set_t set;
    CPU_ZERO(&set);
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  }();
  return ranks <= cores;
}

bool wait(const Shared& shared, Line& other, uint32_t turn) {
  const auto spin = std::chrono::microseconds(cores_for(shared.ranks) ? SPIN_MICROSECONDS : 0);
  const auto until = std::chrono::steady_clock::now() + spin;
  for (int round = 0; round == 0 || std::chrono::steady_clock::now() < until; ++round) {
    for (int i = 0; i < 32; ++i) {
      if (reached(other, turn)) return true;
      __builtin_ia32_pause();
    }
    // The system may have put both ranks on one core, and leave them there.
    if (round >= 4) sched_yield();
  }
  const timespec timeout = {0, LOOK_AFTER_PEERS_NANOSECONDS};
  other.sleepers.fetch_add(1);
  while (!reached(other, turn)) {
    const uint32_t seen = other.turn.load();
    if (static_cast<int32_t>(seen - turn) >= 0) break;
    if (futex(other.turn, FUTEX_WAIT, seen, &timeout) != 0 && !reached(other, turn) && !peers_are_there(shared)) {
      other.sleepers.fetch_sub(1);
      return false;
    }
  }
  other.sleepers.fetch_sub(1);
  return true;
}

uint32_t turn_of(const Shared& shared) { return line(shared, shared.rank).turn.load(std::memory_order_relaxed); }

bool put(const Shared& shared, const void* x, int64_t bytes) {
  if (bytes > shared.slot_bytes) throw std::invalid_argument("a collective's data does not fit its slot");
  std::memcpy(room(shared), x, bytes);
  return meet(shared, bytes);
}

// Plain loops, compiled for each instruction set: additions alone, so all of them give the same bits.
#define FDSERVE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))

FDSERVE_CLONES void add_floats(const float* x, int64_t size, float* total) {
  for (int64_t i = 0; i < size; ++i) total[i] += x[i];
}

FDSERVE_CLONES void widen(const bf16* x, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

FDSERVE_CLONES void add_widened(const bf16* x, int64_t size, float* total) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    total[i] += value;
  }
}

// To the nearest, ties to even; a NaN stays one.
FDSERVE_CLONES void narrow(const float* x, int64_t size, bf16* out) {
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out[i] = static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
  }
}

}  // namespace

char* room(const Shared& shared) { return slot(shared, turn_of(shared) + 1, shared.rank); }

const char* part(const Shared& shared, int rank) { return slot(shared, turn_of(shared), rank); }

bool meet(const Shared& shared, int64_t bytes) {
  if (bytes > shared.slot_bytes) throw std::invalid_argument("what is exchanged does not fit its slot");
  const uint32_t turn = turn_of(shared) + 1;
  Line& mine = line(shared, shared.rank);
  if (shared.exchange != nullptr) {
    mine.turn.store(turn);
    return shared.exchange(slot(shared, turn, 0), bytes);
  }
  // Sequentially consistent with the sleeper's count and its look at the turn: one of the two sees the other.
  mine.turn.store(turn);
  if (mine.sleepers.load() > 0) futex(mine.turn, FUTEX_WAKE, INT32_MAX, nullptr);
  for (int rank = 0; rank < shared.ranks; ++rank)
    if (rank != shared.rank && !wait(shared, line(shared, rank), turn)) return false;
  return true;
}

bool all_reduce(const Shared& shared, const void* x, int64_t size, Dtype dtype, void* out) {
  if (!put(shared, x, size * size_of(dtype))) return false;
  constexpr int64_t PART = 1024;  // sums stay in the innermost cache
  alignas(64) float total[PART];
  for (int64_t start = 0; start < size; start += PART) {
    const int64_t count = std::min(PART, size - start);
    for (int rank = 0; rank < shared.ranks; ++rank) {
      const char* data = part(shared, rank) + start * size_of(dtype);
      if (dtype == Dtype::kFloat32) {
        if (rank == 0)
          std::memcpy(total, data, count * 4);
        else
          add_floats(reinterpret_cast<const float*>(data), count, total);
      } else if (rank == 0) {
        widen(reinterpret_cast<const bf16*>(data), count, total);
      } else {
        add_widened(reinterpret_cast<const bf16*>(data), count, total);
      }
    }
    if (dtype == Dtype::kFloat32)
      std::memcpy(static_cast<float*>(out) + start, total, count * 4);
    else
      narrow(total, count, static_cast<bf16*>(out) + start);
  }
  return true;
}

}  // namespace fdserve
