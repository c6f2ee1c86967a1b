// Rounding to few bits: weights of a group when they are loaded, activations of a row when they are multiplied.

namespace fdserve {
namespace FD_ISA {

FD_INLINE vf magnitude(vf x) { return x < vf{} ? -x : x; }

// To the nearest integer in [-limit, limit], ties to even; x is far below 2^22.
FD_INLINE vf nearest(vf x, float low, float high) {
  const vf magic = splat(12582912.0f), whole = (x + magic) - magic;
  const vf floor = whole > splat(low) ? whole : splat(low);
  return floor < splat(high) ? floor : splat(high);
}

// The scale of 16 levels, -8 to 7, for VL columns of w[inputs][64] with the smallest squared error among some that put the
// largest weight near -8: to clip it a little, or to leave some room, serves the others.
FD_INLINE vf scale_of_nibbles(const float* w, int64_t inputs) {
  vf extreme = {};
  for (int64_t k = 0; k < inputs; ++k) {
    const vf x = load(w + k * PANEL);
    extreme = magnitude(x) > magnitude(extreme) ? x : extreme;
  }
  vf best = {}, least = splat(__builtin_inff());
  for (float steps = 6.75f; steps <= 10.0f; steps += 0.25f) {
    const vf scale = to_bf16_and_back(extreme / splat(-steps)), inverse = inverse_or_zero(scale);
    vf error = {};
    for (int64_t k = 0; k < inputs; ++k) {
      const vf x = load(w + k * PANEL), off = x - nearest(x * inverse, -8, 7) * scale;
      error = fma(off, off, error);
    }
    best = error < least ? scale : best;
    least = error < least ? error : least;
  }
  return best;
}

FD_INLINE vf scale_of_bytes(const float* w, int64_t inputs) {
  vf largest = {};
  for (int64_t k = 0; k < inputs; ++k) largest = max(magnitude(load(w + k * PANEL)), largest);
  return to_bf16_and_back(largest * splat(1.0f / 127));
}

// NaN where a weight is a NaN or infinite, which must show in every product; else 0.
FD_INLINE vf broken_weights(const float* w, int64_t inputs) {
  vf broken = {};
  for (int64_t k = 0; k < inputs; ++k) broken = fma(load(w + k * PANEL), vf{}, broken);
  return broken;
}

inline void quantize(const float* w, Format format, int64_t inputs, void* group_) {
  char* group = static_cast<char*>(group_);
  const bool nibbles = format == Format::kWint4;
  alignas(64) float codes[PANEL];
  alignas(64) float scales[PANEL];
  for (int64_t column = 0; column < PANEL; column += VL) {
    const vf scale = nibbles ? scale_of_nibbles(w + column, inputs) : scale_of_bytes(w + column, inputs);
    store(scales + column, scale + broken_weights(w + column, inputs));
  }
  for (int64_t column = 0; column < PANEL; ++column) {
    uint32_t bits;
    __builtin_memcpy(&bits, scales + column, 4);
    reinterpret_cast<bf16*>(group)[column] = static_cast<bf16>(bits >> 16);
  }
  __builtin_memset(group + PANEL * 2, 0, static_cast<size_t>(panel_bytes(format, inputs) - PANEL * 2));
  for (int64_t k = 0; k < inputs; ++k) {
    for (int64_t column = 0; column < PANEL; column += VL) {
      const vf x = load(w + k * PANEL + column) * inverse_or_zero(load(scales + column));
      store(codes + column, nearest(x, nibbles ? -8 : -127, nibbles ? 7 : 127));
    }
    for (int64_t column = 0; column < PANEL; ++column)
      put_weight(group + PANEL * 2, format, k, column, static_cast<int>(codes[column]));
  }
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
