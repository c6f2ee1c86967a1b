// Rounding to few bits: weights of a group when they are loaded, activations of a row when they are multiplied.

namespace fdserve {
namespace FD_ISA {

FD_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

constexpr float MAGIC = 12582912.0f;  // added to an x far below 2^22, rounds it to an integer in the last bits, ties to even

// To the nearest integer in [-8, 7]. |x| may be less than 15.5, or infinite or NaN, which become any of these.
FD_INLINE vf nearest_nibble(vf x) {
  const vf whole = x + splat(MAGIC);
#if VL == 16
  // From the last five bits: cheaper than to compare with both bounds.
  const __m512 positive = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7);
  const __m512 negative = _mm512_setr_ps(-8, -8, -8, -8, -8, -8, -8, -8, -8, -7, -6, -5, -4, -3, -2, -1);
  return (vf)_mm512_permutex2var_ps(positive, (__m512i)whole, negative);
#else
  return min(max(whole - splat(MAGIC), splat(-8)), splat(7));
#endif
}

// Columns of a panel, in vectors, that are looked at side by side: one after the other, each step would wait for the last.
constexpr int SIDE = 4;
#define FD_SIDE _Pragma("GCC unroll 4") for (int v = 0; v < SIDE; ++v)

// For each column of w[inputs][64]: the weight with the largest magnitude, and NaN where a weight is a NaN or infinite,
// which must show in every product; else 0.
FD_INLINE void survey(const float* w, int64_t inputs, float* extremes, float* broken) {
  for (int64_t column = 0; column < PANEL; column += SIDE * VL) {
    vf extreme[SIDE] = {}, largest[SIDE] = {}, bad[SIDE] = {};
    for (int64_t k = 0; k < inputs; ++k) {
      FD_SIDE {
        const vf x = load(w + k * PANEL + column + v * VL), size = magnitude(x);
        extreme[v] = size > largest[v] ? x : extreme[v];
        largest[v] = max(size, largest[v]);
        bad[v] = fma(x, vf{}, bad[v]);
      }
    }
    FD_SIDE store(extremes + column + v * VL, extreme[v]);
    FD_SIDE store(broken + column + v * VL, bad[v]);
  }
}

struct BestScale {
  vf scale, error;
};

// Tries seven more scales, side by side as above, of which the first puts the extreme weight at -first.
FD_INLINE void try_scales(const float* w, int64_t inputs, vf extreme, float first, BestScale& best) {
  constexpr int TRIES = 7;
#define FD_TRY _Pragma("GCC unroll 7") for (int t = 0; t < TRIES; ++t)
  vf scale[TRIES], inverse[TRIES], error[TRIES] = {};
  FD_TRY scale[t] = to_bf16_and_back(extreme / splat(-first - 0.25f * t));
  FD_TRY inverse[t] = inverse_or_zero(scale[t]);
  for (int64_t k = 0; k < inputs; ++k) {
    const vf x = load(w + k * PANEL);
    FD_TRY {
      // A scale has 8 bits, so its product with a nibble is exact, fused or not.
      const vf off = fma(nearest_nibble(x * inverse[t]), -scale[t], x);
      error[t] = fma(off, off, error[t]);
    }
  }
  FD_TRY {
    best.scale = error[t] < best.error ? scale[t] : best.scale;
    best.error = error[t] < best.error ? error[t] : best.error;
  }
#undef FD_TRY
}

// The scale of 16 levels, -8 to 7, for VL columns of w[inputs][64] with the smallest squared error among some that put the
// extreme weight near -8: to clip it a little, or to leave some room, serves the others. Where weights are so small that
// the inverse of a scale is infinite, all errors are 0 whatever the nibbles, and the first scale is taken.
FD_INLINE vf scale_of_nibbles(const float* w, int64_t inputs, vf extreme) {
  BestScale best = {vf{}, splat(__builtin_inff())};
  try_scales(w, inputs, extreme, 6.75f, best);
  try_scales(w, inputs, extreme, 8.5f, best);
  return best.scale;
}

// Four inputs of VL columns, rounded to integers in [low, high], plus `zero` (which is even): a byte each. What is not a
// number becomes `low`.
FD_INLINE vi quad(const float* w, vf inverse, int low, int high, int zero) {
  vi bytes = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf whole = load(w + i * PANEL) * inverse + splat(MAGIC + zero);
    bytes |= ((vi)min(max(whole, splat(MAGIC + zero + low)), splat(MAGIC + zero + high)) & 255) << 8 * i;
  }
  return bytes;
}

inline void quantize_group(const float* w, Format format, int64_t inputs, char* group) {
  const bool nibbles = format == Format::kWint4;
  alignas(64) float extremes[PANEL], broken[PANEL], inverses[PANEL];
  survey(w, inputs, extremes, broken);
  for (int64_t column = 0; column < PANEL; column += VL) {
    const vf extreme = load(extremes + column);
    const vf found = nibbles ? scale_of_nibbles(w + column, inputs, extreme)
                             : to_bf16_and_back(magnitude(extreme) * splat(1.0f / 127));
    const vf scale = found + load(broken + column);
    store(inverses + column, inverse_or_zero(scale));
    for (int i = 0; i < VL; ++i) reinterpret_cast<bf16*>(group)[column + i] = static_cast<bf16>(((vi)scale)[i] >> 16);
  }
  group += PANEL * 2;
  for (int64_t k = 0; k < inputs; k += 4) {
    const float* row = w + k * PANEL;
    const auto bytes = [&](int64_t column, int low, int high) {
      return quad(row + column, load(inverses + column), low, high, high + 1);
    };
    for (int64_t column = 0; nibbles && column < PANEL / 2; column += VL)
      store(reinterpret_cast<int32_t*>(group + place_of_weight(Format::kWint4, k, column)),
            bytes(column, -8, 7) | bytes(column + PANEL / 2, -8, 7) << 4);
    for (int64_t column = 0; !nibbles && column < PANEL; column += VL)
      store(reinterpret_cast<int32_t*>(group + place_of_weight(Format::kWint8, k, column)), bytes(column, -127, 127));
  }
}

// A scale for each output; the sums make up for activations that are 128 too large.
inline void quantize_panel(const float* w, int64_t inputs, char* panel) {
  alignas(64) float extremes[PANEL], broken[PANEL];
  survey(w, inputs, extremes, broken);
  for (int64_t column = 0; column < PANEL; column += VL) {
    const vf largest = magnitude(load(extremes + column));
    const vf inverse = largest > vf{} ? splat(127.0f) / largest : vf{};
    vi sum = {};
    for (int64_t k = 0; k < inputs; k += 4) {
      vi bytes = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const vf whole = load(w + (k + i) * PANEL + column) * inverse + splat(MAGIC);
        const vi bits = (vi)max(min(whole, splat(MAGIC + 127)), splat(MAGIC - 127));
        sum += bits - (vi)splat(MAGIC);
        bytes |= (bits & 255) << 8 * i;
      }
      store(reinterpret_cast<int32_t*>(panel + W8A8_HEAD_BYTES + k * PANEL + column * 4), bytes);
    }
    store(reinterpret_cast<float*>(panel) + column, largest / splat(127.0f) + load(broken + column));
    store(reinterpret_cast<int32_t*>(panel) + PANEL + column, sum * 128);
  }
}

inline void quantize(const float* w, Format format, int64_t inputs, void* out) {
  if (format == Format::kW8a8) quantize_panel(w, inputs, static_cast<char*>(out));
  else quantize_group(w, format, inputs, static_cast<char*>(out));
}

// x rounded to the nearest integer in [-127, 127], ties to even, plus 128.
FD_INLINE void store_bytes(uint8_t* out, vf x, vf inverse, int n) {
  const vi integers = (vi)(x * inverse + splat(12582912.0f + 128));  // in the last bits
#if VL == 16
  if (n == VL) return _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)integers));
#endif
  for (int i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(integers[i]);
}

template <class E>
float to_bytes(const void* x_, int64_t size, uint8_t* out) {
  const E* x = static_cast<const E*>(x_);
  const int64_t whole = size / VL * VL;
  const int tail = static_cast<int>(size - whole);
  vi largest = {};  // magnitudes are in the same order as their bits, infinity and NaN above all others
  const auto look = [&](vf v) { largest = max(largest, (vi)v & 0x7fffffff); };
  for (int64_t i = 0; i < whole; i += VL) look(load(x + i));
  if (tail != 0) look(load_some(x + whole, tail));
  const int32_t bits = max_lane(largest);
  float top;
  __builtin_memcpy(&top, &bits, 4);
  const vf inverse = splat(top > 1e-36f ? 127.0f / top : 0.0f);
  for (int64_t i = 0; i < whole; i += VL) store_bytes(out + i, load(x + i), inverse, VL);
  if (tail != 0) store_bytes(out + whole, load_some(x + whole, tail), inverse, tail);
  return top / 127.0f + (top - top);  // a NaN or an infinity must show in the product
}

}  // namespace FD_ISA
}  // namespace fdserve
