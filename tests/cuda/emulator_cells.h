// What emulator_memory.cc knows of memory's past: a cell for every two bytes of what lies side by side.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "emulator_machine.h"

namespace emulator {

// The history of two bytes (no kernel has two threads write one each), as far as what comes next must be ordered with it.
// It is void once the scope (the block for shared memory, the launch for global) is another. Zeros are a void one.
struct Cell {
  uint32_t scope;
  bool is_promised, is_written, is_atomic;
  uint16_t writer;
  uint32_t writer_block, writer_barriers, writer_warp_barriers, writer_shows;
  const void* written_at;
  // Of the threads that read since the last barrier: their block, their warps, and the lanes where it is one warp.
  uint32_t reader_block, reader_barriers, reader_warps, reader_lanes, reader_warp_barriers;
  const void* read_at;
};
constexpr size_t CELL_BYTES = 2;

// Shared or global memory that lies side by side.
class Stretch {
 public:
  Stretch() = default;
  Stretch(uintptr_t begin, size_t size, bool is_shared)
      : begin(begin), size(size), is_shared(is_shared),
        // The system gives what is touched of so much memory, zeroed, when it is.
        cells_(static_cast<Cell*>(std::calloc(size / CELL_BYTES + 1, sizeof(Cell)))) {}

  uintptr_t begin = 0;
  size_t size = 0;
  bool is_shared = false;

  bool holds(uintptr_t at, size_t bytes) const { return at >= begin && at + bytes <= begin + size; }
  uint32_t scope() const { return is_shared ? machine.block : machine.launch; }
  Cell& cell_at(uintptr_t at) {
    Cell& cell = cells_.get()[(at - begin) / CELL_BYTES];
    if (cell.scope != scope()) {
      cell = Cell{};
      cell.scope = scope();
    }
    return cell;
  }

 private:
  struct Free {
    void operator()(Cell* cells) const { std::free(cells); }
  };
  std::unique_ptr<Cell, Free> cells_;
};

}  // namespace emulator
