// Weights into panels, and rows of an embedding table out of them.
#include <algorithm>
#include <cmath>
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

// One panel: 64 columns of `out` (fewer at the end), k in steps of PAIR, from a matrix [K][N].
template <class From, class To>
void pack_in_out(const From* weight, int64_t n, int64_t k, int64_t columns, To* out) {
  constexpr int64_t PAIR = 4 / sizeof(To);
  for (int64_t i = 0; i < k; ++i) {
    To* to = out + i / PAIR * PAIR * PANEL + i % PAIR;
    for (int64_t c = 0; c < columns; ++c) convert(weight[i * n + c], to[c * PAIR]);
  }
}

// The same from a matrix [N][K]: blocks of 16 columns by 16 steps are turned within the first-level cache.
template <class From, class To>
void pack_out_in(const From* weight, int64_t k, int64_t columns, To* out) {
  constexpr int64_t PAIR = 4 / sizeof(To), BLOCK = 16;
  for (int64_t i = 0; i < k; i += BLOCK * PAIR)
    for (int64_t c = 0; c < columns; c += BLOCK) {
      const int64_t wide = std::min(BLOCK, columns - c), deep = std::min(BLOCK * PAIR, k - i);
      To block[BLOCK][BLOCK * PAIR] = {};
      for (int64_t cc = 0; cc < wide; ++cc)
        for (int64_t ii = 0; ii < deep; ++ii) convert(weight[(c + cc) * k + i + ii], block[cc][ii]);
      for (int64_t step = 0; step < (deep + PAIR - 1) / PAIR; ++step) {
        To* to = out + ((i / PAIR + step) * PANEL + c) * PAIR;
        for (int64_t cc = 0; cc < wide; ++cc) std::memcpy(to + cc * PAIR, &block[cc][step * PAIR], 4);
      }
    }
}

template <class From, class To>
void pack_panel(const From* weight, int64_t n, int64_t k, int64_t first, bool in_out, To* out, int64_t panel_size) {
  const int64_t columns = std::min(PANEL, n - first);
  if (columns < PANEL || panel_size != k * PANEL) std::memset(out, 0, static_cast<size_t>(panel_size) * sizeof(To));
  if (in_out) pack_in_out(weight + first, n, k, columns, out);
  else pack_out_in(weight + first * k, k, columns, out);
}

template <class From, class To>
void pack_all(To* panels, const From* weight, int64_t n, int64_t k, bool in_out, int64_t panel_size) {
  parallel((n + PANEL - 1) / PANEL, [&](int64_t p) {
    pack_panel(weight, n, k, p * PANEL, in_out, panels + p * panel_size, panel_size);
  });
}

// To the nearest integer, ties to even; x is far below 2^22.
inline int32_t nearest(float x) { return static_cast<int32_t>((x + 12582912.0f) - 12582912.0f); }

// A scale for each output; the sums make up for activations that are 128 too large.
void pack_bytes(const float* w, int64_t k, char* panel) {
  float* scales = reinterpret_cast<float*>(panel);
  int32_t* offsets = reinterpret_cast<int32_t*>(panel) + PANEL;
  float largest[PANEL] = {}, inverse[PANEL], broken[PANEL] = {};
  int32_t sums[PANEL] = {};
  for (int64_t i = 0; i < k; ++i)
    for (int64_t c = 0; c < PANEL; ++c) {
      const float size = std::fabs(w[i * PANEL + c]);
      largest[c] = size > largest[c] ? size : largest[c];
      broken[c] += 0.0f * w[i * PANEL + c];  // a NaN or an infinity must show in every product
    }
  for (int64_t c = 0; c < PANEL; ++c) {
    scales[c] = largest[c] / 127 + broken[c];
    inverse[c] = largest[c] > 0 ? 127 / largest[c] : 0;
  }
  for (int64_t i = 0; i < k; i += 4) {
    int32_t quads[PANEL] = {};
    for (int byte = 0; byte < 4; ++byte)
      for (int64_t c = 0; c < PANEL; ++c) {
        const float x = w[(i + byte) * PANEL + c] * inverse[c], high = x < 127.0f ? x : 127.0f;
        const int32_t value = nearest(high > -127.0f ? high : -127.0f);
        sums[c] += value;
        quads[c] |= (value & 255) << 8 * byte;
      }
    std::memcpy(panel + W8A8_HEAD_BYTES + i * PANEL, quads, sizeof(quads));
  }
  for (int64_t c = 0; c < PANEL; ++c) offsets[c] = 128 * sums[c];
}

// By way of a panel of floats, which stays in cache.
template <class From>
void pack_integers(char* panels, const From* weight, int64_t n, int64_t k, Format format, bool in_out) {
  const int64_t bytes = panel_bytes(format, k), padded = padded_inputs(format, k);
  const FloatKernels& kernels = float_kernels();
  parallel((n + PANEL - 1) / PANEL, [&](int64_t p) {
    float* wide = scratch<float>(kScratchTile, padded * PANEL);
    std::memset(wide + k * PANEL, 0, static_cast<size_t>((padded - k) * PANEL) * sizeof(float));
    pack_panel(weight, n, k, p * PANEL, in_out, wide, k * PANEL);
    char* panel = panels + p * bytes;
    if (format == Format::kW8a8) return pack_bytes(wide, padded, panel);
    const int64_t group = group_inputs(format);
    for (int64_t i = 0; i < padded; i += group, panel += group_bytes(format))
      kernels.quantize(wide + i * PANEL, format, std::min(group, padded - i), panel);
  });
}

template <class From>
void pack_from(void* panels, const From* weight, int64_t n, int64_t k, Format format, bool in_out) {
  const int64_t bytes = panel_bytes(format, k);
  if (format == Format::kBfloat16) pack_all(static_cast<bf16*>(panels), weight, n, k, in_out, bytes / 2);
  else if (format == Format::kFloat32) pack_all(static_cast<float*>(panels), weight, n, k, in_out, bytes / 4);
  else pack_integers(static_cast<char*>(panels), weight, n, k, format, in_out);
}

}  // namespace

void pack(void* panels, const void* weight, int64_t n, int64_t k, Dtype source, Format format, bool in_out) {
  if (source == Dtype::kBfloat16) pack_from(panels, static_cast<const bf16*>(weight), n, k, format, in_out);
  else pack_from(panels, static_cast<const float*>(weight), n, k, format, in_out);
}

namespace {

template <class E>
void gather(const E* panels, int64_t id, int64_t k, E* out) {
  constexpr int64_t PAIR = 4 / sizeof(E);
  const int64_t panel_size = (k + PAIR - 1) / PAIR * PAIR * PANEL;
  const E* from = panels + id / PANEL * panel_size + id % PANEL * PAIR;
  for (int64_t i = 0; i < k; ++i) out[i] = from[i / PAIR * PAIR * PANEL + i % PAIR];
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
void embed(const int32_t* ids, int64_t tokens, const Matrix& table, E* out) {
  parallel((tokens + 7) / 8, [&](int64_t chunk) {
    for (int64_t t = chunk * 8; t < std::min(tokens, chunk * 8 + 8); ++t) {
      if (is_weight_only(table.format)) gather_integers(table, ids[t], out + t * table.k);
      else gather(static_cast<const E*>(table.panels), ids[t], table.k, out + t * table.k);
    }
  });
}

}  // namespace

void embedding(const int32_t* ids, int64_t tokens, const Matrix& table, Dtype dtype, void* out) {
  if (dtype == Dtype::kBfloat16) embed(ids, tokens, table, static_cast<bf16*>(out));
  else embed(ids, tokens, table, static_cast<float*>(out));
}

}  // namespace fdserve
