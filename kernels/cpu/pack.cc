// Weights into panels, and rows of an embedding table out of them.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"
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

// In memory not yet touched: they spare the streaming kernels a TLB miss every 4 KiB.
void ask_huge_pages(void* memory, int64_t bytes) {
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / HUGE_PAGE * HUGE_PAGE;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace

void pack(void* panels, const void* weight, int64_t n, int64_t k, Dtype source, Dtype dtype, bool in_out) {
  const int64_t bytes = panel_bytes(dtype, k), total = bytes * ((n + PANEL - 1) / PANEL);
  ask_huge_pages(panels, total);
  const int64_t panel_size = bytes / size_of(dtype);
  if (dtype == Dtype::kBfloat16) {
    auto* to = static_cast<bf16*>(panels);
    if (source == Dtype::kBfloat16) pack_all(to, static_cast<const bf16*>(weight), n, k, in_out, panel_size);
    else pack_all(to, static_cast<const float*>(weight), n, k, in_out, panel_size);
  } else {
    auto* to = static_cast<float*>(panels);
    if (source == Dtype::kBfloat16) pack_all(to, static_cast<const bf16*>(weight), n, k, in_out, panel_size);
    else pack_all(to, static_cast<const float*>(weight), n, k, in_out, panel_size);
  }
}

namespace {

template <class E>
void gather(const E* panels, int64_t id, int64_t k, E* out) {
  constexpr int64_t PAIR = 4 / sizeof(E);
  const int64_t panel_size = (k + PAIR - 1) / PAIR * PAIR * PANEL;
  const E* from = panels + id / PANEL * panel_size + id % PANEL * PAIR;
  for (int64_t i = 0; i < k; ++i) out[i] = from[i / PAIR * PAIR * PANEL + i % PAIR];
}

}  // namespace

void embedding(const int32_t* ids, int64_t tokens, const void* panels, int64_t k, Dtype dtype, void* out) {
  parallel((tokens + 7) / 8, [&](int64_t chunk) {
    for (int64_t t = chunk * 8; t < std::min(tokens, chunk * 8 + 8); ++t) {
      if (dtype == Dtype::kBfloat16) gather(static_cast<const bf16*>(panels), ids[t], k, static_cast<bf16*>(out) + t * k);
      else gather(static_cast<const float*>(panels), ids[t], k, static_cast<float*>(out) + t * k);
    }
  });
}

}  // namespace fdserve
