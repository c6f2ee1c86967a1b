// Norms, activation and the way out of a product: every row for itself, so its arithmetic never depends on the others.
// Floor: memory.

namespace fdserve {
namespace FD_ISA {

// out = x / sqrt(mean(x^2) + eps), rounded to E, times weight, rounded to E. With a residual, x is first replaced by
// residual + x rounded to E, which is stored in `total`. Squares are summed in four vectors, then across lanes.
template <class E>
void rms_norm_row(const void* x_, const void* residual_, const void* weight_, float eps, int64_t size, void* out_,
                  void* total_) {
  const E *x = static_cast<const E*>(x_), *residual = static_cast<const E*>(residual_);
  const E* weight = static_cast<const E*>(weight_);
  E *out = static_cast<E*>(out_), *total = static_cast<E*>(total_);
  const int64_t whole = size / VL * VL;
  const int tail = static_cast<int>(size - whole);
  vf squares[4] = {};
  int lane = 0;
  for (int64_t i = 0; i < whole; i += VL) {
    vf v = load(x + i);
    if (residual != nullptr) {
      v = rounded(load(residual + i) + v, x);
      store(total + i, v);
    }
    squares[lane] = fma(v, v, squares[lane]);
    lane = (lane + 1) & 3;
  }
  if (tail != 0) {
    vf v = load_some(x + whole, tail);
    if (residual != nullptr) {
      v = rounded(load_some(residual + whole, tail) + v, x);
      store_some(total + whole, v, tail);
    }
    squares[lane] = fma(v, v, squares[lane]);
  }
  float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(size);
  vf scale = splat(1.0f / __builtin_sqrtf(mean + eps));
  const E* from = residual != nullptr ? total : x;
  for (int64_t i = 0; i < whole; i += VL) store(out + i, rounded(load(from + i) * scale, x) * load(weight + i));
  if (tail != 0)
    store_some(out + whole, rounded(load_some(from + whole, tail) * scale, x) * load_some(weight + whole, tail), tail);
}

FD_INLINE vf silu_times(vf gate, vf up) {
  // silu(g) = g / (1 + e^-g), which is 0 for all purposes long before the exponential is too large.
  const vf least = gate > splat(-80.0f) ? gate : splat(-80.0f);
  return gate * inverse(splat(1.0f) + exp(-least)) * up;
}

// Where the next rows go is fetched long before they are stored: a store to memory holds up those behind it.
FD_INLINE void fetch_place(const char* next, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(next + at, 1);
}

template <class E>
void swiglu_rows(const void* x, int64_t rows, int64_t size, void* out_, int64_t stride) {
  const int64_t whole = size / VL * VL;
  const int tail = static_cast<int>(size - whole);
  for (int64_t r = 0; r < rows; ++r) {
    const E *gate = static_cast<const E*>(x) + r * 2 * size, *up = gate + size;
    E* out = reinterpret_cast<E*>(static_cast<char*>(out_) + r * stride);
    fetch_place(reinterpret_cast<char*>(out) + rows * stride, size * static_cast<int64_t>(sizeof(E)));
    for (int64_t i = 0; i < whole; i += VL) store(out + i, silu_times(load(gate + i), load(up + i)));
    if (tail != 0) store_some(out + whole, silu_times(load_some(gate + whole, tail), load_some(up + whole, tail)), tail);
  }
}

// total += weight * x
inline void axpy_row(const float* x, float weight, int64_t size, float* total) {
  for (int64_t i = 0; i + VL <= size; i += VL) store(total + i, fma(load(x + i), splat(weight), load(total + i)));
  const int64_t whole = size / VL * VL;
  const int tail = static_cast<int>(size - whole);
  if (tail != 0)
    store_some(total + whole, fma(load_some(x + whole, tail), splat(weight), load_some(total + whole, tail)), tail);
}

// sums_at(row, column) is VL of the sums.
template <class E, class SumsAt>
FD_INLINE void put_each(int64_t rows, int64_t width, void* out_, int64_t stride, const SumsAt& sums_at) {
  char* out = static_cast<char*>(out_);
  for (int64_t r = 0; r < rows; ++r, out += stride) {
    E* to = reinterpret_cast<E*>(out);
    fetch_place(out + rows * stride, width * static_cast<int64_t>(sizeof(E)));
    int64_t i = 0;
    for (; i + VL <= width; i += VL) store(to + i, sums_at(r, i));
    if (i < width) store_some(to + i, sums_at(r, i), static_cast<int>(width - i));
  }
}

template <class E>
void put_rows(Sums sums, int64_t rows, int64_t width, void* out, int64_t stride) {
  if (sums.scales == nullptr) {
    const float* acc = static_cast<const float*>(sums.at);
    return put_each<E>(rows, width, out, stride, [&](int64_t r, int64_t i) { return load(acc + r * PANEL + i); });
  }
  const int32_t* acc = static_cast<const int32_t*>(sums.at);
  put_each<E>(rows, width, out, stride, [&](int64_t r, int64_t i) {
    const vi exact = load(acc + r * PANEL + i) - load(sums.offsets + i);
    return __builtin_convertvector(exact, vf) * (splat(sums.row_scales[r]) * load(sums.scales + i));
  });
}

// total (float32) + shared (when there is one), rounded to E.
template <class E>
void add_row(const float* total, const void* shared_, int64_t size, void* out_) {
  const E* shared = static_cast<const E*>(shared_);
  E* out = static_cast<E*>(out_);
  const int64_t whole = size / VL * VL;
  const int tail = static_cast<int>(size - whole);
  for (int64_t i = 0; i < whole; i += VL)
    store(out + i, shared != nullptr ? load(total + i) + load(shared + i) : load(total + i));
  if (tail != 0) {
    vf v = load_some(total + whole, tail);
    store_some(out + whole, shared != nullptr ? v + load_some(shared + whole, tail) : v, tail);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
