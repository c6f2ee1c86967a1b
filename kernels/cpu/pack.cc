// Weights into panels, and rows of an embedding table out of them.
#include <algorithm>
#include <cstring>

#include "layout.h"
#include "pool.h"

namespace fdserve {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline void convert(bf16 from, bf16& to) { to = from; }
inline void convert(float from, float& to) { to = from; }
inline void convert(bf16 from, float& to) {
  const uint32_t bits = static_cast<uint32_t>(from) << 16;
  std::memcpy(&to, &bits, 4);
}
inline void convert(float from, bf16& to) {
  const uint32_t bits = bits_of(from);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to = static_cast<bf16>(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A matrix [N][K], or [K][N] when in_out, whose rows are `stride` elements apart.
template <class From>
struct Source {
  const From* at;
  int64_t n, k, stride;
  bool in_out;
};

// Inputs [0, inputs) of some columns of a panel, in steps of PAIR, from rows that are inputs.
template <class From, class To>
void take_inputs(const From* rows, int64_t stride, int64_t columns, int64_t inputs, To* out) {
  constexpr int64_t PAIR = 4 / sizeof(To);
  const int64_t whole = inputs / PAIR * PAIR;
  if constexpr (sizeof(From) < sizeof(To)) {
    for (int64_t i = 0; i < inputs; ++i) float_kernels().widen(rows + i * stride, columns, out + i * PANEL);
    return;
  }
  for (int64_t i = 0; i < whole; i += PAIR, out += PANEL * PAIR)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t p = 0; p < PAIR; ++p) convert(rows[(i + p) * stride + c], out[c * PAIR + p]);
  for (int64_t c = 0; whole < inputs && c < columns; ++c) convert(rows[whole * stride + c], out[c * PAIR]);
}

// The same from rows that are outputs: blocks of 16 columns by 16 words are turned within the first-level cache.
template <class From, class To>
void take_outputs(const From* rows, int64_t stride, int64_t columns, int64_t inputs, To* out) {
  constexpr int64_t PAIR = 4 / sizeof(To), BLOCK = 16, DEEP = BLOCK * 4 / sizeof(From);
  const auto turn = sizeof(From) < sizeof(To) ? float_kernels().turn_wide : float_kernels().turn;
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(From));
  for (int64_t i = 0; i < inputs; i += DEEP)
    for (int64_t c = 0; c < columns; c += BLOCK) {
      const From* from = rows + c * stride + i;
      To* to = out + (i * PANEL + c * PAIR);
      const int64_t wide = std::min(BLOCK, columns - c), deep = std::min(DEEP, inputs - i);
      if (sizeof(From) <= sizeof(To) && wide == BLOCK && deep == DEEP) {
        turn(reinterpret_cast<const char*>(from), row_bytes, reinterpret_cast<int32_t*>(to));
        continue;
      }
      for (int64_t ii = 0; ii < deep; ++ii)
        for (int64_t cc = 0; cc < wide; ++cc)
          convert(from[cc * stride + ii], to[ii / PAIR * PAIR * PANEL + cc * PAIR + ii % PAIR]);
    }
}

// Inputs [begin, begin + inputs) of 64 columns from `first` on; zeros for what is beyond the matrix.
template <class From, class To>
void take(const Source<From>& source, int64_t first, int64_t begin, int64_t inputs, To* out) {
  const int64_t columns = std::min(PANEL, source.n - first), there = std::min(inputs, source.k - begin);
  if (columns < PANEL || there < inputs) std::memset(out, 0, static_cast<size_t>(inputs * PANEL) * sizeof(To));
  if (source.in_out) take_inputs(source.at + begin * source.stride + first, source.stride, columns, there, out);
  else take_outputs(source.at + first * source.stride + begin, source.stride, columns, there, out);
}

template <class From, class To>
void pack_floats(To* panels, const Source<From>& source, int64_t padded) {
  parallel((source.n + PANEL - 1) / PANEL,
           [&](int64_t p) { take(source, p * PANEL, 0, padded, panels + p * padded * PANEL); });
}

// By way of floats, a group of a panel at a time, which stays in cache.
template <class From>
void pack_integers(char* panels, const Source<From>& source, Format format, int64_t padded) {
  const int64_t bytes = panel_bytes(format, source.k);
  const int64_t group = is_weight_only(format) ? group_inputs(format) : padded;
  const FloatKernels& kernels = float_kernels();
  parallel((source.n + PANEL - 1) / PANEL, [&](int64_t p) {
    float* wide = scratch<float>(kScratchTile, std::min(group, padded) * PANEL);
    char* out = panels + p * bytes;
    for (int64_t i = 0; i < padded; i += group, out += group_bytes(format)) {
      const int64_t inputs = std::min(group, padded - i);
      take(source, p * PANEL, i, inputs, wide);
      kernels.quantize(wide, format, inputs, out);
    }
  });
}

template <class From>
void pack_from(void* panels, const Source<From>& source, Format format) {
  const int64_t padded = padded_inputs(format, source.k);
  if (format == Format::kBfloat16) pack_floats(static_cast<bf16*>(panels), source, padded);
  else if (format == Format::kFloat32) pack_floats(static_cast<float*>(panels), source, padded);
  else pack_integers(static_cast<char*>(panels), source, format, padded);
}

}  // namespace

void pack(void* panels, const void* weight, int64_t n, int64_t k, int64_t stride, Dtype source, Format format,
          bool in_out) {
  if (source == Dtype::kBfloat16)
    pack_from(panels, Source<bf16>{static_cast<const bf16*>(weight), n, k, stride, in_out}, format);
  else pack_from(panels, Source<float>{static_cast<const float*>(weight), n, k, stride, in_out}, format);
}

namespace {

template <class Stored, class E>
void gather(const Matrix& table, int64_t id, E* out) {
  constexpr int64_t PAIR = 4 / sizeof(Stored);
  const int64_t k = table.k, panel_size = (k + PAIR - 1) / PAIR * PAIR * PANEL;
  const Stored* from = static_cast<const Stored*>(table.panels) + id / PANEL * panel_size + id % PANEL * PAIR;
  for (int64_t i = 0; i < k; ++i) convert(from[i / PAIR * PAIR * PANEL + i % PAIR], out[i]);
}

template <class E>
void gather_integers(const Matrix& table, int64_t id, E* out) {
  const char* panel = static_cast<const char*>(table.panels) + id / PANEL * panel_bytes(table.format, table.k);
  const int64_t column = id % PANEL, group = group_inputs(table.format);
  const bool nibbles = table.format == Format::kWint4;
  // The format known where the loop is compiled: divisions become shifts.
  const auto place = [&](int64_t i) {
    return nibbles ? place_of_weight(Format::kWint4, i, column) : place_of_weight(Format::kWint8, i, column);
  };
  // A row is scattered over a panel: ask for all of it before waiting for any.
  for (int64_t first = 0, at = 0; first < table.k; first += group, at += group_bytes(table.format)) {
    __builtin_prefetch(panel + at + column * 2);
    for (int64_t i = 0; i < std::min(group, table.k - first); i += 4)
      __builtin_prefetch(panel + at + PANEL * 2 + place(i));
  }
  for (int64_t first = 0; first < table.k; first += group, panel += group_bytes(table.format)) {
    float scale;
    convert(reinterpret_cast<const bf16*>(panel)[column], scale);
    const char* packed = panel + PANEL * 2;
    for (int64_t i = 0; i < std::min(group, table.k - first); ++i) {
      const int value = nibbles ? weight_at(packed, Format::kWint4, i, column) : weight_at(packed, Format::kWint8, i, column);
      convert(static_cast<float>(value) * scale, out[first + i]);
    }
  }
}

template <class E>
void embed(const int32_t* ids, int64_t tokens, int64_t first_id, const Matrix& table, E* out) {
  parallel((tokens + 7) / 8, [&](int64_t chunk) {
    for (int64_t t = chunk * 8; t < std::min(tokens, chunk * 8 + 8); ++t) {
      const int64_t id = ids[t] - first_id;
      E* row = out + t * table.k;
      if (id < 0 || id >= table.n) std::fill_n(row, table.k, E{});
      else if (is_weight_only(table.format)) gather_integers(table, id, row);
      else if (table.format == Format::kBfloat16) gather<bf16>(table, id, row);
      else gather<float>(table, id, row);
    }
  });
}

}  // namespace

void embedding(const int32_t* ids, int64_t tokens, int64_t first_id, const Matrix& table, Dtype dtype, void* out) {
  if (dtype == Dtype::kBfloat16) embed(ids, tokens, first_id, table, static_cast<bf16*>(out));
  else embed(ids, tokens, first_id, table, static_cast<float*>(out));
}

}  // namespace fdserve
