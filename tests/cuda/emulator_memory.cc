// Checks every load and store that a kernel makes in shared and global memory: that it is inside of a buffer, and that it
// races with no other thread's.
//
// g++ -fsanitize=thread puts a call before each of them; the functions it calls are these instead of its own runtime's.
// Two accesses of the same bytes, one of which writes, must be ordered:
//   - by a barrier of the block, or within a warp by __syncwarp. Shuffles, votes and products of matrices order nothing;
//   - not at all between two blocks of a launch;
//   - but atomic ones need not be ordered with each other.
// While an asynchronous copy is under way its target is nobody's. What a warpgroup's product reads must have been shown to
// products by whoever wrote it, and then have passed a barrier. What a block reads of shared memory it must have written.
#include <dlfcn.h>

#include <cinttypes>
#include <cstdio>
#include <map>
#include <unordered_map>

#include "emulator_machine.h"

// Of this library, by the linker: where it begins, and its variables that are not initialized (kernels' shared arrays too).
extern "C" {
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
}

namespace emulator {
namespace {

constexpr uint32_t MANY_BLOCKS = ~0u;

// The history of two bytes (no kernel has two threads write one each), as far as what comes next must be ordered with it.
// It is void once the scope (the block for shared memory, the launch for global) is another.
struct Cell {
  uint32_t scope = 0;
  bool is_promised = false, is_written = false, is_atomic = false;
  uint16_t writer = 0;
  uint32_t writer_block, writer_barriers, writer_warp_barriers, writer_shows;
  const void* written_at;
  // Of the threads that read since the last barrier: their block, their warps, and the lanes where it is one warp.
  uint32_t reader_block = 0, reader_barriers, reader_warps, reader_lanes, reader_warp_barriers;
  const void* read_at;
};

constexpr size_t CELL_BYTES = 2, PAGE = 4096;
struct Page {
  Cell cells[PAGE / CELL_BYTES];
};

enum class Region { OWN, SHARED, GLOBAL, CONSTANT, NOWHERE };

class Memory {
 public:
  bool is_on = false;
  char complaint[1024] = "";

  void lend(uintptr_t at, size_t size) { lent_[at] = size; }
  void take_back(uintptr_t at) {
    lent_.erase(at);
    last_end_ = 0;
  }

  void touch(const void* pointer, size_t size, Access access, const void* code) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    const Region region = region_of(at, size);
    if (region == Region::OWN) return;
    if (region == Region::NOWHERE) return complain("outside of all buffers", at, access, code, nullptr);
    if (region == Region::CONSTANT) {
      if (access != Access::READ) complain("in constants", at, access, code, nullptr);
      return;
    }
    if (access == Access::READ || access == Access::WRITE) note_access(pointer, size, region == Region::GLOBAL, code);
    const uint32_t scope = scope_of(region);
    for (size_t i = 0; i < size; i += CELL_BYTES) {
      Cell& cell = cell_at(at + i, scope);
      if (cell.is_promised) return complain("while a copy to there is under way", at + i, access, code, cell.written_at);
      if (access == Access::READ || access == Access::PRODUCT)
        read(cell, at + i, region, access, code);
      else
        write(cell, at + i, access, code);
    }
  }

  void touch_aligned(const void* pointer, size_t size, Access access, const void* code) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    if (at % size != 0) return complain("at no multiple of its size", at, access, code, nullptr);
    touch(pointer, size, access, code);
  }

  void promise(const void* pointer, size_t size, const void* code) {
    touch(pointer, size, Access::WRITE, code);
    set_promise(pointer, size, true);
  }
  void keep_promise(const void* pointer, size_t size, const void* code) {
    set_promise(pointer, size, false);
    touch(pointer, size, Access::WRITE, code);
  }

 private:
  std::map<uintptr_t, size_t> lent_;
  uintptr_t last_begin_ = 0, last_end_ = 0;  // of the buffer that was touched last
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_page_ = nullptr;

  static bool within(uintptr_t at, size_t size, const void* begin, size_t length) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(begin);
    return at >= from && at + size <= from + length;
  }

  Region region_of(uintptr_t at, size_t size) {
    if (at >= last_begin_ && at + size <= last_end_) return Region::GLOBAL;
    const Fiber& fiber = machine.fibers[machine.current];
    if (within(at, size, fiber.stack.get(), STACK_BYTES) || within(at, size, &machine, sizeof(machine)) ||
        within(at, size, &place, sizeof(place)))
      return Region::OWN;
    if (within(at, size, machine.dynamic, machine.shared_bytes)) return Region::SHARED;
    if (within(at, size, __bss_start, static_cast<size_t>(_end - __bss_start))) return Region::SHARED;
    if (within(at, size, machine.call.closure, machine.call.size)) return Region::CONSTANT;
    if (within(at, size, __ehdr_start, static_cast<size_t>(__bss_start - __ehdr_start))) return Region::CONSTANT;
    const auto next = lent_.upper_bound(at);
    if (next == lent_.begin()) return Region::NOWHERE;
    const auto& [begin, length] = *std::prev(next);
    if (at + size > begin + length) return Region::NOWHERE;
    last_begin_ = begin, last_end_ = begin + length;
    return Region::GLOBAL;
  }

  static uint32_t scope_of(Region region) { return region == Region::SHARED ? machine.block : machine.launch; }

  Cell& cell_at(uintptr_t at, uint32_t scope) {
    if (at / PAGE != last_number_) {
      std::unique_ptr<Page>& page = pages_[at / PAGE];
      if (!page) page.reset(new Page);
      last_number_ = at / PAGE, last_page_ = page.get();
    }
    Cell& cell = last_page_->cells[at % PAGE / CELL_BYTES];
    if (cell.scope != scope) {
      cell = Cell{};
      cell.scope = scope;
    }
    return cell;
  }

  void set_promise(const void* pointer, size_t size, bool is_promised) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    const Region region = region_of(at, size);
    if (region != Region::SHARED) return;
    for (size_t i = 0; i < size; i += CELL_BYTES) cell_at(at + i, scope_of(region)).is_promised = is_promised;
  }

  // Whether the last write is ordered before what the current thread does now.
  static bool is_write_ordered(const Cell& cell) {
    const Fiber& now = machine.fiber();
    if (cell.writer_block != machine.block) return false;
    if (cell.writer == machine.current || cell.writer_barriers < now.barriers) return true;
    return cell.writer / WARP == machine.current / WARP && cell.writer_warp_barriers < now.warp_barriers;
  }

  static bool are_reads_ordered(const Cell& cell) {
    const Fiber& now = machine.fiber();
    if (cell.reader_block == 0) return true;
    if (cell.reader_block != machine.block) return false;
    if (cell.reader_barriers < now.barriers) return true;
    if (cell.reader_warps != 1u << machine.current / WARP) return false;
    return cell.reader_warp_barriers < now.warp_barriers || cell.reader_lanes == 1u << machine.current % WARP;
  }

  // Whether the last writer has shown it to products, before a barrier that is past.
  static bool is_shown(const Cell& cell) {
    const Fiber& writer = machine.fibers[cell.writer];
    if (cell.writer_shows >= writer.shown_after.size()) return false;
    return cell.writer == machine.current || writer.shown_after[cell.writer_shows] < machine.fiber().barriers;
  }

  void read(Cell& cell, uintptr_t at, Region region, Access access, const void* code) {
    if (cell.is_written && !is_write_ordered(cell))
      return complain("unordered with a write", at, access, code, cell.written_at);
    if (access == Access::PRODUCT) {
      if (cell.is_written && !is_shown(cell)) return complain("not shown to products", at, access, code, cell.written_at);
    } else if (region == Region::SHARED && !cell.is_written) {
      return complain("of what the block has not written", at, access, code, nullptr);
    }
    note_reader(cell, code);
  }

  static void note_reader(Cell& cell, const void* code) {
    const Fiber& now = machine.fiber();
    const uint32_t warp = 1u << machine.current / WARP, lane = 1u << machine.current % WARP;
    cell.read_at = code;
    if (cell.reader_block != 0 && cell.reader_block != machine.block) {
      cell.reader_block = MANY_BLOCKS;
    } else if (cell.reader_block == 0 || cell.reader_barriers < now.barriers) {
      cell.reader_block = machine.block, cell.reader_barriers = now.barriers;
      cell.reader_warps = warp, cell.reader_lanes = lane, cell.reader_warp_barriers = now.warp_barriers;
    } else if (cell.reader_warps == warp && cell.reader_warp_barriers == now.warp_barriers) {
      cell.reader_lanes |= lane;
    } else {
      cell.reader_warps |= warp;
      cell.reader_lanes = lane, cell.reader_warp_barriers = now.warp_barriers;
    }
  }

  void write(Cell& cell, uintptr_t at, Access access, const void* code) {
    const bool both_atomic = access == Access::ATOMIC && cell.is_atomic;
    if (cell.is_written && !both_atomic && !is_write_ordered(cell))
      return complain("unordered with a write", at, access, code, cell.written_at);
    if (!are_reads_ordered(cell)) return complain("unordered with a read", at, access, code, cell.read_at);
    const Fiber& now = machine.fiber();
    cell.is_written = true, cell.is_atomic = access == Access::ATOMIC;
    cell.writer = static_cast<uint16_t>(machine.current), cell.writer_block = machine.block;
    cell.writer_barriers = now.barriers, cell.writer_warp_barriers = now.warp_barriers;
    cell.writer_shows = static_cast<uint32_t>(now.shown_after.size());
    cell.written_at = code;
  }

  // Keeps the first complaint, with both places in the code as addresses in this library.
  void complain(const char* what, uintptr_t at, Access access, const void* code, const void* other) {
    if (complaint[0] != 0) return;
    const char* names[] = {"a read", "a write", "an atomic access", "a product's read"};
    std::snprintf(complaint, sizeof(complaint),
                  "%s at %#" PRIxPTR " %s: block (%u,%u,%u), thread %zu, code %#" PRIx64 ", other %#" PRIx64,
                  names[static_cast<int>(access)], at, what, place.index.x, place.index.y, place.index.z, machine.current,
                  place_in_library(code), place_in_library(other));
  }
};

Memory memory;

}  // namespace

uint64_t place_in_library(const void* code) {
  return code == nullptr ? 0 : static_cast<uint64_t>(static_cast<const char*>(code) - __ehdr_start);
}

void touch(const void* at, size_t size, Access access, const void* code) {
  if (memory.is_on && machine.is_running) memory.touch(at, size, access, code);
}
void touch_aligned(const void* at, size_t size, Access access, const void* code) {
  if (memory.is_on && machine.is_running) memory.touch_aligned(at, size, access, code);
}
void promise(const void* at, size_t size, const void* code) {
  if (memory.is_on && machine.is_running) memory.promise(at, size, code);
}
void keep_promise(const void* at, size_t size, const void* code) {
  if (memory.is_on && machine.is_running) memory.keep_promise(at, size, code);
}

}  // namespace emulator

using emulator::Access;
using emulator::memory;
#define EXPORTED extern "C" __attribute__((visibility("default")))

// Called from Python: check from now on, what buffers there are, and the first complaint since the last time.
EXPORTED void emulator_check_memory() { memory.is_on = true; }
EXPORTED void emulator_lend(uintptr_t at, size_t size) { memory.lend(at, size); }
EXPORTED void emulator_take_back(uintptr_t at) { memory.take_back(at); }
EXPORTED void emulator_complaint(char* out, size_t size) {
  std::snprintf(out, size, "%s", memory.complaint);
  memory.complaint[0] = 0;
}

// The compiler calls the "unaligned" ones where it does not promise that an address is a multiple of the size. The others
// would not work on a GPU if it were not.
#define ACCESSES(size)                                                                                                \
  extern "C" void __tsan_read##size(const void* at) {                                                                 \
    emulator::touch_aligned(at, size, Access::READ, __builtin_return_address(0));                                     \
  }                                                                                                                   \
  extern "C" void __tsan_write##size(const void* at) {                                                                \
    emulator::touch_aligned(at, size, Access::WRITE, __builtin_return_address(0));                                    \
  }                                                                                                                   \
  extern "C" void __tsan_unaligned_read##size(const void* at) {                                                       \
    emulator::touch(at, size, Access::READ, __builtin_return_address(0));                                             \
  }                                                                                                                   \
  extern "C" void __tsan_unaligned_write##size(const void* at) {                                                      \
    emulator::touch(at, size, Access::WRITE, __builtin_return_address(0));                                            \
  }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(const void* at, size_t size) {
  emulator::touch(at, size, Access::READ, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(const void* at, size_t size) {
  emulator::touch(at, size, Access::WRITE, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
