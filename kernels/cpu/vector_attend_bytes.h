// Products of vectors for attention over a cache of bytes (attend_bytes.h).
//
// Layout: a row's first digits and then its second ones. Tiling: 3 rows of either by 64 keys (scores), then by 64
// dimensions over all keys (values): 24 accumulators. The instruction takes unsigned bytes by signed ones: keys and values
// get 128 added by turning their highest bit, and 128 times the sum of a row's integers is taken off. While scores are
// computed their values are fetched, and the keys of the next tile; while values are, the keys that follow after the part.
// Floor: that of attend_bytes.h.

namespace fdserve {
namespace FD_ISA {

constexpr int VECTOR_ROWS = 3;

// 128 times the sum of a row's integers, whose digits are `size` bytes each; 512 of the largest fit.
FD_INLINE int32_t row_offset(const char* first, const char* second, int64_t size) {
  vi high = {}, low = {};
  const vi ones = (vi)_mm512_set1_epi8(1);
  for (int64_t i = 0; i < size; i += LINE) {
    high = DigitMath::dot(high, Bytes::weight(first + i), ones);
    low = DigitMath::dot(low, Bytes::weight(second + i), ones);
  }
  return 128 * (256 * total(high) + total(low));
}

// Fetches groups of a cache one after the other, while so many passes go over as much: what is asked for too fast is
// dropped.
struct GroupStream {
  const void* const* group;
  const char *at, *end;
  int64_t bytes, left = 0;
  int lines;  // at a time
  FD_MEMBER GroupStream(const void* const* groups, int64_t most, int64_t group_bytes, int64_t passes)
      : group(groups), bytes(group_bytes), lines(passes > 4 ? 1 : passes > 1 ? 2 : 4) {
    while (left < most && groups[left] != nullptr) ++left;
    at = left > 0 ? static_cast<const char*>(*group) : nullptr;
    end = at + bytes;
  }
  FD_MEMBER void step() {
    if (left == 0) return;
    for (int i = 0; i < lines; ++i, at += LINE) __builtin_prefetch(at, 0, 2);
    if (at < end) return;
    if (--left > 0) at = static_cast<const char*>(*++group), end = at + bytes;
  }
};

// sums[2 * ROWS][4] of rows' digits, `stride` bytes apart, and what four vectors of a cache have.
template <int ROWS>
FD_INLINE void multiply_quads(const char* digits, int64_t stride, const vi (&y)[4], vi (&sums)[2 * ROWS][4]) {
  for (int r = 0; r < 2 * ROWS; ++r) {
    const vi x = Bytes::input(digits + r * stride);
    for (int v = 0; v < 4; ++v) sums[r][v] = DigitMath::dot(sums[r][v], x, y[v]);
  }
}

FD_INLINE vi unsigned_bytes(const char* at) { return Bytes::weight(at) ^ (vi)_mm512_set1_epi8(-128); }

// What the digits' sums are of a row's integers, as floats. Only with the offset taken off they are sure to fit 32 bits.
FD_INLINE vf joined_sums(vi first, vi second, int32_t offset) {
  using Wrapping = uint32_t __attribute__((vector_size(64)));
  const Wrapping joined = ((Wrapping)first << 8) + (Wrapping)second - (Wrapping)(vi{} + offset);
  return __builtin_convertvector((vi)joined, vf);
}

template <int ROWS>
void vector_scores(const char* q, int64_t head_dim, const char* const* groups, const int32_t* offsets, const float* scales,
                   float* scores, GroupStream& next_keys, GroupStream& next_values) {
  vi c[2 * ROWS][4] = {};
  for (int64_t d = 0; d < head_dim; d += 4) {
    next_keys.step();
    next_values.step();
    vi k[4];
    for (int v = 0; v < 4; ++v) k[v] = unsigned_bytes(groups[v] + d * KEY_GROUP);
    multiply_quads<ROWS>(q + d, head_dim, k, c);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v)
      store(scores + r * SCORES + v * VL, joined_sums(c[2 * r][v], c[2 * r + 1][v], offsets[r]) * load(scales + v * VL));
}

// Over the first `keys` keys.
template <int ROWS>
void vector_values(const char* digits, int64_t keys, const void* const* groups, int64_t column, int64_t quad,
                   const int32_t* offsets, const float* row_scales, float* values, int64_t stride, GroupStream& next) {
  vi c[2 * ROWS][4] = {};
  for (int64_t key = 0; key < keys; key += 4) {
    next.step();
    const char* at = static_cast<const char*>(groups[key / KEY_GROUP]) + key % KEY_GROUP / 4 * quad + column * 4;
    vi y[4];
    for (int v = 0; v < 4; ++v) y[v] = unsigned_bytes(at + v * LINE);
    multiply_quads<ROWS>(digits + key, DIGITS, y, c);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v)
      store(values + r * stride + column + v * VL,
            joined_sums(c[2 * r][v], c[2 * r + 1][v], offsets[r]) * splat(row_scales[r]));
}

FD_INLINE int64_t passes_of(int64_t rows) { return (rows + VECTOR_ROWS - 1) / VECTOR_ROWS; }

template <int N>
struct Constant {
  constexpr operator int() const { return N; }
};

// Calls work(first row, how many, as a constant) for rows by threes, as even as can be.
template <class Work>
FD_INLINE void each_three(int64_t rows, const Work& work) {
  const int64_t passes = passes_of(rows);
  for (int64_t pass = 0, r = 0; pass < passes; ++pass) {
    const int64_t n = (rows - r + passes - pass - 1) / (passes - pass);
    if (n == 3) work(r, Constant<3>{});
    else if (n == 2) work(r, Constant<2>{});
    else work(r, Constant<1>{});
    r += n;
  }
}

struct VectorProducts {
  struct Following : GroupStream {
    FD_MEMBER Following(const KeyPart& part, int64_t bytes, int64_t rows)
        : GroupStream(part.following, PART_GROUPS, bytes, passes_of(rows)) {}
    // All of it is fetched beside products.
    FD_MEMBER int64_t rounds() const { return 0; }
    FD_MEMBER void fetch(int64_t) {}
  };
  static FD_MEMBER int64_t first_digits(int64_t row, int64_t) { return 2 * row; }
  static FD_MEMBER int64_t to_second_digits(int64_t) { return 1; }

  static void scores(const char* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, int64_t keys,
                     float* out) {
    int32_t offsets[STRIP_ROWS];
    for (int64_t r = 0; r < rows; ++r) offsets[r] = row_offset(q + 2 * r * head_dim, q + (2 * r + 1) * head_dim, head_dim);
    for (int64_t first = 0; first < keys; first += KEY_TILE) {
      const char* groups[TILE_GROUPS];
      alignas(64) float scales[KEY_TILE] = {};
      for (int64_t g = 0; g < TILE_GROUPS; ++g) {
        const int64_t at = first / KEY_GROUP + g;
        groups[g] = static_cast<const char*>(part.keys[part.keys[at] != nullptr ? at : first / KEY_GROUP]);
      }
      each_seen(first, first + KEY_TILE, keys, [&](int64_t group, int64_t key, int n) {
        store(scales + key - first, load_some(key_scales(part.keys[group], head_dim), n));
      });
      const int64_t now = first / KEY_GROUP, then = now + TILE_GROUPS, bytes = byte_group(head_dim);
      GroupStream next_values(part.values + now, TILE_GROUPS, bytes, passes_of(rows));
      const bool last = then == PART_GROUPS || part.keys[then] == nullptr;
      GroupStream next_keys(last ? part.following : part.keys + then, TILE_GROUPS, bytes, passes_of(rows));
      each_three(rows, [&](int64_t r, auto count) {
        if (seen[r + count - 1] > first)
          vector_scores<count>(q + 2 * r * head_dim, head_dim, groups, offsets + r, scales, out + r * SCORES + first,
                               next_keys, next_values);
      });
    }
  }

  static void values(const char* digits, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, int64_t keys,
                     const float* row_scales, float* out, int64_t stride, Following& following) {
    int32_t offsets[STRIP_ROWS];
    const int64_t end = (keys + KEY_TILE - 1) / KEY_TILE * KEY_TILE;
    for (int64_t r = 0; r < rows; ++r) offsets[r] = row_offset(digits + 2 * r * DIGITS, digits + (2 * r + 1) * DIGITS, end);
    for (int64_t column = 0; column < head_dim; column += 64)
      each_three(rows, [&](int64_t r, auto count) {
        vector_values<count>(digits + 2 * r * DIGITS, seen[r + count - 1], part.values, column, value_quad(head_dim),
                             offsets + r, row_scales + r, out + r * stride, stride, following);
      });
  }
};

// Over either cache.
inline void vector_attend(const void* q_, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
                          AttendState state, int64_t stride) {
  if (!part.bytes || head_dim % 64 != 0) return attend<bf16>(q_, rows, head_dim, part, seen, scale, state, stride);
  const bf16* q = static_cast<const bf16*>(q_);
  for (int64_t r = 0; r < rows; r += STRIP_ROWS) {
    const int64_t n = rows - r < STRIP_ROWS ? rows - r : STRIP_ROWS;
    attend_strip_of_bytes<VectorProducts>(q + r * head_dim, n, head_dim, part, seen + r, scale,
                                          {state.peak + r, state.mass + r, state.values + r * stride}, stride);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
