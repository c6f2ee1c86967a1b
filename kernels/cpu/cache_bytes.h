// A key/value cache of bytes: each token's key and value of a head as signed bytes with a scale of its own.
//
// Layout of 16 keys of one head, with head_dim rounded up to H, a multiple of 16: vectors of 64 bytes (sign and magnitude)
// that unfold to the bf16 pairs of attend.h (byte_pairs.h), 16 keys by 4 dimensions, or 16 dimensions by 4 keys for values;
// then the 16 scales in float. Integers of this size are exact in bf16, so only the rounding when a token is stored loses
// anything: scores and weights are multiplied by the scales in float.
// Floor: memory; a tile is unfolded once for all rows that see it.

namespace fdserve {
namespace FD_ISA {

// Byte of dimension d of a key in a lane, and of a value.
FD_INLINE int64_t key_byte(int64_t lane, int64_t d) {
  return d / 4 * 64 + lane / 4 * 16 + d % 4 / 2 * 8 + lane % 4 * 2 + d % 2;
}
FD_INLINE int64_t value_byte(int64_t lane, int64_t d, int64_t padded) {
  return (lane / 4 * (padded / 16) + d / 16) * 64 + d % 16 / 4 * 16 + lane % 4 / 2 * 8 + d % 4 * 2 + lane % 2;
}

template <class E, bool VALUE>
void store_bytes_of(const void* x, int64_t head_dim, int64_t lane, void* group_) {
  uint8_t* group = static_cast<uint8_t*>(group_);
  const int64_t padded = padded_head(head_dim);
  uint8_t bytes[MAX_HEAD_DIM];
  const float scale = to_bytes<E>(x, head_dim, bytes);
  for (int64_t d = 0; d < head_dim; ++d) {
    const int value = bytes[d] - 128;
    group[VALUE ? value_byte(lane, d, padded) : key_byte(lane, d)] = static_cast<uint8_t>(value < 0 ? 128 - value : value);
  }
  __builtin_memcpy(group + KEY_GROUP * padded + lane * 4, &scale, 4);
}

#ifdef FD_BF16

inline void unfold_keys(const void* group_, int64_t head_dim, void* out_) {
  const char* group = static_cast<const char*>(group_);
  bf16* out = static_cast<bf16*>(out_);
  const BytePairs tables;
  for (int64_t i = 0; i < padded_head(head_dim) / 4; ++i) {
    __m512i pairs[2];
    tables.unfold(_mm512_loadu_si512(group + 64 * i), pairs);
    for (int p = 0; p < 2; ++p) _mm512_storeu_si512(out + (2 * i + p) * 32, pairs[p]);
  }
}

inline void unfold_values(const void* group_, int64_t head_dim, void* out_) {
  const char* group = static_cast<const char*>(group_);
  bf16* out = static_cast<bf16*>(out_);
  const BytePairs tables;
  for (int64_t quad = 0; quad < KEY_GROUP / 4; ++quad)
    for (int64_t d = 0; d < head_dim; d += 16, group += 64) {
      const auto lanes = static_cast<__mmask16>(head_dim - d >= 16 ? 0xffff : (1 << (head_dim - d)) - 1);
      __m512i pairs[2];
      tables.unfold(_mm512_loadu_si512(group), pairs);
      for (int p = 0; p < 2; ++p) _mm512_mask_storeu_epi32(out + ((2 * quad + p) * head_dim + d) * 2, lanes, pairs[p]);
    }
}

#else

FD_INLINE float signed_byte(uint8_t byte) { return static_cast<float>(byte < 128 ? byte : 128 - byte); }

inline void unfold_keys(const void* group_, int64_t head_dim, void* out_) {
  const uint8_t* group = static_cast<const uint8_t*>(group_);
  float* out = static_cast<float*>(out_);
  for (int64_t d = 0; d < head_dim; ++d)
    for (int64_t lane = 0; lane < KEY_GROUP; ++lane) out[d * KEY_GROUP + lane] = signed_byte(group[key_byte(lane, d)]);
}

inline void unfold_values(const void* group_, int64_t head_dim, void* out_) {
  const uint8_t* group = static_cast<const uint8_t*>(group_);
  float* out = static_cast<float*>(out_);
  const int64_t padded = padded_head(head_dim);
  for (int64_t lane = 0; lane < KEY_GROUP; ++lane)
    for (int64_t d = 0; d < head_dim; ++d) out[lane * head_dim + d] = signed_byte(group[value_byte(lane, d, padded)]);
}

#endif

}  // namespace FD_ISA
}  // namespace fdserve
