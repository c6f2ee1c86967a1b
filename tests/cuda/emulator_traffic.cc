// Counts how a kernel's accesses to memory would be served: the sectors of 32 bytes that global memory moves for a warp's
// load or store, and the turns that shared memory takes for one, since 32 banks of 4 bytes answer at a time.
//
// Lanes are run one after the other here, so what is one instruction of a warp has to be found out: it is the same place in
// the code, met by each lane for the same time since the warp met last. What a compiler for GPUs would merge or split is not
// known; caches are not looked at.
#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "emulator_machine.h"

namespace emulator {
namespace {

constexpr uintptr_t SECTOR = 32, WORD = 4, BANKS = 32;

struct Event {
  uint32_t warp, meetings;
  const void* code;
  uint32_t lane;
  bool is_global;
  uint32_t size;
  uintptr_t at;
};

// Of one place in the code.
struct Count {
  uint64_t wanted_bytes = 0, moved_bytes = 0;  // global
  uint64_t least_turns = 0, turns = 0;         // shared
};

bool is_on = false;
std::vector<Event> events;
std::map<const void*, Count> counts;

template <class T>
size_t distinct(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  return static_cast<size_t>(std::unique(values.begin(), values.end()) - values.begin());
}

void count_global(const std::vector<Event>& lanes, Count& count) {
  std::vector<uintptr_t> pairs, sectors;
  for (const Event& each : lanes)
    for (uintptr_t at = each.at; at < each.at + each.size; at += 2) pairs.push_back(at / 2), sectors.push_back(at / SECTOR);
  count.wanted_bytes += distinct(pairs) * 2;
  count.moved_bytes += distinct(sectors) * SECTOR;
}

// As many lanes as ask for 128 bytes are served together.
void count_shared(const std::vector<Event>& lanes, Count& count) {
  const uint32_t together = WARP * WORD / std::max<uint32_t>(lanes[0].size, WORD);
  for (uint32_t first = 0; first < WARP; first += together) {
    std::vector<uintptr_t> words;
    for (const Event& each : lanes)
      if (each.lane >= first && each.lane < first + together)
        for (uintptr_t at = each.at / WORD; at * WORD < each.at + each.size; ++at) words.push_back(at);
    words.resize(distinct(words));
    if (words.empty()) continue;
    uint64_t of_bank[BANKS] = {};
    for (uintptr_t word : words) ++of_bank[word % BANKS];
    count.least_turns += (words.size() + BANKS - 1) / BANKS;
    count.turns += *std::max_element(of_bank, of_bank + BANKS);
  }
}

}  // namespace

void note_access(const void* at, size_t size, bool is_global, const void* code) {
  if (!is_on || machine.is_uncounted) return;
  events.push_back({static_cast<uint32_t>(machine.current / WARP), machine.fiber().meetings, code,
                    static_cast<uint32_t>(machine.current % WARP), is_global, static_cast<uint32_t>(size),
                    reinterpret_cast<uintptr_t>(at)});
}

void count_block() {
  const auto key = [](const Event& e) { return std::tie(e.warp, e.meetings, e.code); };
  std::stable_sort(events.begin(), events.end(), [&](const Event& x, const Event& y) {
    return std::tie(x.warp, x.meetings, x.code, x.lane) < std::tie(y.warp, y.meetings, y.code, y.lane);
  });
  for (auto begin = events.begin(); begin != events.end();) {
    auto end = begin;
    std::vector<std::vector<Event>> times;  // of each time, what the lanes ask for
    for (size_t time = 0; end != events.end() && key(*end) == key(*begin); ++end) {
      time = end == begin || end->lane != (end - 1)->lane ? 0 : time + 1;
      if (time == times.size()) times.emplace_back();
      times[time].push_back(*end);
    }
    Count& count = counts[begin->code];
    for (const std::vector<Event>& lanes : times)
      lanes[0].is_global ? count_global(lanes, count) : count_shared(lanes, count);
    begin = end;
  }
  events.clear();
}

}  // namespace emulator

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Called from Python: count from now on or no more; and the next place's count, false after the last. What was told is gone.
EXPORTED void emulator_count_traffic(int on) { emulator::is_on = on; }
EXPORTED int emulator_traffic(uint64_t* code, uint64_t* out) {
  using emulator::counts;
  if (counts.empty()) return 0;
  const auto [at, count] = *counts.begin();
  *code = emulator::place_in_library(at);
  out[0] = count.wanted_bytes, out[1] = count.moved_bytes, out[2] = count.least_turns, out[3] = count.turns;
  counts.erase(counts.begin());
  return 1;
}
