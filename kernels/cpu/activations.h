// Rows of activations in the form that a product with packed weights takes them in.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "pool.h"

namespace fdserve {

constexpr int64_t TILE_ROWS = 16, TILE_LINE = 64;
constexpr int64_t TILED_ROWS = 32;        // up to which a copy into tiles costs more than it gains
constexpr int64_t TASK_BYTES = 16 << 10;  // of rows a task works at one by one

// Calls work(row) for each, some on each thread.
template <class Work>
void each_row(int64_t rows, int64_t row_bytes, Work&& work) {
  const int64_t chunk = std::max<int64_t>(1, TASK_BYTES / row_bytes);
  parallel((rows + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t r = c * chunk; r < std::min(rows, (c + 1) * chunk); ++r) work(r);
  });
}

// What becomes of a row x[k] for weights of a format: itself, itself and zeros, bytes or digits with scales.
class RowForm {
 public:
  RowForm(Dtype dtype, Format format, int64_t k);

  const RowKernels& kernels;
  const Format format;
  const int64_t k;
  const bool digits;           // or bytes where the format is kW8a8, else of dtype
  const int64_t source_bytes;  // of a row as it is
  const int64_t bytes;         // of a row in this form
  const int64_t scale_bytes;   // of its scales
  const bool plain;            // it is itself
  const bool fits_tiles;       // many rows are best in tiles

  void make(const void* x, char* row, char* scales) const;
};

// Memory for `rows` in a form, and for SPARE_ROWS; tiles of them begin at multiples of 16 rows.
class FormedRows {
 public:
  FormedRows(ScratchSlot slot, const RowForm& form, int64_t rows)
      : form_(form), data_(scratch<char>(slot, (rows + SPARE_ROWS) * (form.bytes + form.scale_bytes) + TILE_LINE)) {
    scales_ = data_ + ((rows + SPARE_ROWS) * form.bytes + TILE_LINE - 1) / TILE_LINE * TILE_LINE;
  }

  char* row(int64_t r) const { return data_ + r * form_.bytes; }
  char* scales(int64_t r) const { return scales_ + r * form_.scale_bytes; }

  // Up to 16 rows from `first` on, one after the other in the first-level cache before they become a tile:
  // make(i, row, scales) puts the i-th there.
  template <class Make>
  void put_tile(int64_t first, int64_t count, const Make& make) const {
    char* some = scratch<char>(kScratchTile, TILE_ROWS * form_.bytes);
    for (int64_t i = 0; i < count; ++i) make(i, some + i * form_.bytes, scales(first + i));
    form_.kernels.to_tiles(some, form_.bytes, count, form_.bytes, row(first));
  }

  Rows from(int64_t first, bool tiled) const;

 private:
  const RowForm& form_;
  char *data_, *scales_;
};

// x[rows][k] in a form: as it is, or in `kScratchCall`.
Rows formed_rows(const RowForm& form, const void* x, int64_t rows, bool tiled);

}  // namespace fdserve
