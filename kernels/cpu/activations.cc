#include "activations.h"

namespace fdserve {

RowForm::RowForm(Dtype dtype, Format format_, int64_t k_)
    : kernels(row_kernels(dtype)),
      format(format_),
      k(k_),
      digits(is_weight_only(format) && kernels.to_digits != nullptr),
      source_bytes(k * size_of(dtype)),
      bytes(padded_inputs(format, k) * (digits ? 2 : format == Format::kW8a8 ? 1 : size_of(dtype))),
      scale_bytes(digits                     ? sum_scales_of(format, k) * static_cast<int64_t>(sizeof(SumScale))
                  : format == Format::kW8a8 ? static_cast<int64_t>(sizeof(float))
                                            : 0),
      plain(scale_bytes == 0 && bytes == source_bytes),
      fits_tiles(kernels.to_tiles != nullptr && bytes % TILE_LINE == 0) {}

void RowForm::make(const void* x, char* row, char* scales) const {
  if (digits) return kernels.to_digits(x, k, format, row, reinterpret_cast<SumScale*>(scales));
  const int64_t made = format == Format::kW8a8 ? k : source_bytes;
  std::memset(row + made, 0, static_cast<size_t>(bytes - made));
  if (format != Format::kW8a8) {
    std::memcpy(row, x, static_cast<size_t>(source_bytes));
    return;
  }
  const float scale = kernels.to_bytes(x, k, reinterpret_cast<uint8_t*>(row));
  std::memcpy(scales, &scale, sizeof(scale));
}

Rows FormedRows::from(int64_t first, bool tiled) const {
  Rows rows = {row(first), form_.bytes};
  rows.tiled = tiled;
  if (form_.digits) {
    rows.sum_scales = reinterpret_cast<const SumScale*>(scales(first));
    rows.groups = sum_scales_of(form_.format, form_.k);
  } else if (form_.scale_bytes != 0) {
    rows.scales = reinterpret_cast<const float*>(scales(first));
  }
  return rows;
}

Rows formed_rows(const RowForm& form, const void* x, int64_t rows, bool tiled) {
  const char* from = static_cast<const char*>(x);
  if (form.plain && !tiled) return {from, form.bytes};
  const FormedRows formed(kScratchCall, form, rows);
  const auto source = [&](int64_t r) { return from + r * form.source_bytes; };
  if (!tiled) {
    each_row(rows, form.bytes, [&](int64_t r) { form.make(source(r), formed.row(r), formed.scales(r)); });
    return formed.from(0, false);
  }
  parallel((rows + TILE_ROWS - 1) / TILE_ROWS, [&](int64_t t) {
    const int64_t first = t * TILE_ROWS, count = std::min(TILE_ROWS, rows - first);
    if (form.plain) return form.kernels.to_tiles(source(first), form.bytes, count, form.bytes, formed.row(first));
    formed.put_tile(first, count, [&](int64_t i, char* row, char* scales) { form.make(source(first + i), row, scales); });
  });
  return formed.from(0, true);
}

}  // namespace fdserve
