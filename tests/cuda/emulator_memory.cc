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

#include "emulator_cells.h"
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

class Memory {
 public:
  bool is_on = false;
  char complaint[1024] = "";

  void lend(uintptr_t at, size_t size) { lent_[at] = Stretch(at, size, false); }
  void take_back(uintptr_t at) {
    lent_.erase(at);
    last_ = nullptr;
  }

  void touch(const void* pointer, size_t size, Access access, const void* code) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    if (is_own(at, size)) return;
    Stretch* const stretch = find(at, size);
    if (stretch == nullptr) {
      if (!is_constant(at, size)) return complain("outside of all buffers", at, access, code, nullptr);
      if (access != Access::READ) complain("in constants", at, access, code, nullptr);
      return;
    }
    if (access == Access::READ || access == Access::WRITE) note_access(pointer, size, !stretch->is_shared, code);
    for (size_t i = 0; i < size; i += CELL_BYTES) {
      Cell& cell = stretch->cell_at(at + i);
      if (cell.is_promised) return complain("while a copy to there is under way", at + i, access, code, cell.written_at);
      if (access == Access::READ || access == Access::PRODUCT)
        read(cell, at + i, stretch->is_shared, access, code);
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
  std::map<uintptr_t, Stretch> lent_;
  Stretch* last_ = nullptr;  // the one of these that was touched last
  Stretch dynamic_, declared_{reinterpret_cast<uintptr_t>(__bss_start), static_cast<size_t>(_end - __bss_start), true};

  static bool within(uintptr_t at, size_t size, const void* begin, size_t length) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(begin);
    return at >= from && at + size <= from + length;
  }

  // The thread's stack, and what the emulator itself keeps.
  static bool is_own(uintptr_t at, size_t size) {
    return within(at, size, machine.stack, STACK_BYTES) || within(at, size, &place, sizeof(place)) ||
           within(at, size, &machine, sizeof(machine));
  }

  static bool is_constant(uintptr_t at, size_t size) {
    return within(at, size, machine.call.closure, machine.call.size) ||
           within(at, size, __ehdr_start, static_cast<size_t>(__bss_start - __ehdr_start));
  }

  Stretch* find(uintptr_t at, size_t size) {
    if (last_ != nullptr && last_->holds(at, size)) return last_;
    if (within(at, size, machine.dynamic, machine.shared_bytes)) return &dynamic();
    if (declared_.holds(at, size)) return &declared_;
    const auto next = lent_.upper_bound(at);
    if (next == lent_.begin()) return nullptr;
    Stretch& stretch = std::prev(next)->second;
    return stretch.holds(at, size) ? last_ = &stretch : nullptr;
  }

  // Where it lies, and its size, are a launch's.
  Stretch& dynamic() {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(machine.dynamic);
    if (dynamic_.begin != begin || dynamic_.size != machine.shared_bytes)
      dynamic_ = Stretch(begin, machine.shared_bytes, true);
    return dynamic_;
  }

  void set_promise(const void* pointer, size_t size, bool is_promised) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    Stretch* const stretch = is_own(at, size) ? nullptr : find(at, size);
    if (stretch == nullptr || !stretch->is_shared) return;
    for (size_t i = 0; i < size; i += CELL_BYTES) stretch->cell_at(at + i).is_promised = is_promised;
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

  void read(Cell& cell, uintptr_t at, bool is_shared, Access access, const void* code) {
    if (cell.is_written && !is_write_ordered(cell))
      return complain("unordered with a write", at, access, code, cell.written_at);
    if (access == Access::PRODUCT) {
      if (cell.is_written && !is_shown(cell)) return complain("not shown to products", at, access, code, cell.written_at);
    } else if (is_shared && !cell.is_written) {
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
