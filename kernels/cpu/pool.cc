#include "pool.h"

#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace fdserve {
namespace {

constexpr int64_t SPIN_MICROSECONDS = 50;
constexpr uint64_t ACTIVE = (1u << 15) - 1, OPEN = 1u << 15, EPOCH = 1u << 16;

inline void pause() { __builtin_ia32_pause(); }

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
}

// A thread's share of the tasks: consecutive, so that it streams through what they read. It takes them from the front, and
// when none is left takes from the shares of others.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// `state` is (epoch | open | number of workers inside). A worker may enter only while the epoch is open; the caller closes
// it when no task is left, then waits for those inside. So a worker that is late or asleep is never waited for.
struct Pool {
  void (*body)(void*, int64_t) = nullptr;
  void* arg = nullptr;
  std::vector<Share> shares;
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<bool> stopping{false};
  std::mutex sleep_mutex, call_mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  int threads = available_cores();
  bool started = false;

  void run_tasks(size_t thread) {
    for (size_t s = 0; s < shares.size(); ++s) {
      Share& share = shares[(thread + s) % shares.size()];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body(arg, i);
    }
  }

  bool fresh(uint64_t seen) const {
    return stopping.load(std::memory_order_relaxed) || state.load(std::memory_order_acquire) / EPOCH != seen;
  }

  void wait_past(uint64_t seen) {
    auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(SPIN_MICROSECONDS);
    do {
      for (int i = 0; i < 64; ++i) {
        if (fresh(seen)) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(sleep_mutex);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    wake.wait(lock, [&] { return fresh(seen); });
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }

  void work(size_t thread) {
    uint64_t seen = 0;
    while (true) {
      wait_past(seen);
      if (stopping.load(std::memory_order_relaxed)) return;
      uint64_t now = state.load(std::memory_order_acquire);
      seen = now / EPOCH;
      while ((now & OPEN) != 0 && now / EPOCH == seen) {
        if (!state.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
        run_tasks(thread);
        state.fetch_sub(1, std::memory_order_release);
        break;
      }
    }
  }

  void start() {
    started = true;
    shares = std::vector<Share>(static_cast<size_t>(threads));
    for (size_t i = 1; i < shares.size(); ++i) workers.emplace_back([this, i] { work(i); });
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex);
      stopping.store(true);
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
    workers.clear();
    stopping.store(false);
    started = false;
  }

  void call(int64_t n, void (*fn)(void*, int64_t), void* argument) {
    if (!started) start();
    body = fn, arg = argument;
    const int64_t count = static_cast<int64_t>(shares.size());
    for (int64_t s = 0; s < count; ++s) {
      shares[static_cast<size_t>(s)].next.store(n * s / count, std::memory_order_relaxed);
      shares[static_cast<size_t>(s)].end = n * (s + 1) / count;
    }
    uint64_t epoch = (state.load(std::memory_order_relaxed) / EPOCH + 1) * EPOCH;
    state.store(epoch | OPEN, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex);
      wake.notify_all();
    }
    run_tasks(0);
    state.fetch_and(~OPEN, std::memory_order_acq_rel);
    for (int spins = 0; (state.load(std::memory_order_acquire) & ACTIVE) != 0; ++spins) {
      if (spins < 10000) pause(); else std::this_thread::yield();
    }
  }
};

// Never destroyed: workers may outlive static destructors.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

struct Buffers {
  void* data[kScratchSlots] = {};
  int64_t bytes[kScratchSlots] = {};
  ~Buffers() {
    for (void* each : data) std::free(each);
  }
};

}  // namespace

void parallel(int64_t n, void (*body)(void*, int64_t), void* arg) {
  Pool& p = pool();
  std::unique_lock<std::mutex> lock(p.call_mutex, std::defer_lock);
  static thread_local bool inside = false;
  if (n <= 1 || inside || p.threads == 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < n; ++i) body(arg, i);
    return;
  }
  inside = true;
  p.call(n, body, arg);
  inside = false;
}

int num_threads() { return pool().threads; }

void set_num_threads(int count) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.call_mutex);
  if (p.started) p.stop();
  p.threads = count;
}

// What a prompt's step keeps between its layers is some tens of MB: looking up small pages took 2 % of such a step.
constexpr int64_t SMALL_PAGE = 4096, HUGE_PAGE = 2 << 20;

void* scratch_bytes(ScratchSlot slot, int64_t bytes) {
  static thread_local Buffers buffers;
  if (buffers.bytes[slot] < bytes) {
    std::free(buffers.data[slot]);
    const int64_t page = bytes < HUGE_PAGE ? SMALL_PAGE : HUGE_PAGE;
    const int64_t rounded = (bytes + bytes / 4 + page - 1) / page * page;
    buffers.data[slot] = std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(rounded));
    buffers.bytes[slot] = buffers.data[slot] == nullptr ? 0 : rounded;
    if (buffers.data[slot] == nullptr) throw std::bad_alloc();
    if (page == HUGE_PAGE) madvise(buffers.data[slot], static_cast<size_t>(rounded), MADV_HUGEPAGE);
  }
  return buffers.data[slot];
}

}  // namespace fdserve
