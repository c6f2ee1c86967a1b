// A key/value cache of bytes: each token's key and value of a head as signed bytes with a scale of its own.
//
// Layout of 16 keys of one head, with head_dim rounded up to H, a multiple of 16: [H/4][16 keys][4 dimensions], then the 16
// scales in float. Of 16 values: 4 quads of keys, each [H][4 keys] and then its 4 scales, so that quads are equally far
// apart from one group to the next. Both are what products of bytes take in (attend_bytes.h). Where there are none, or
// head_dim is no multiple of 64, they unfold to what attend.h multiplies, bf16 (byte_pairs.h) or float. Integers of this
// size are exact in either, and only the rounding when a token is stored loses anything there: scores and weights are
// multiplied by the scales in float.
// Floor: memory; a tile is unfolded once for all rows that see it.

namespace fdserve {
namespace FD_ISA {

// The bytes of a quad of values.
FD_INLINE int64_t value_quad(int64_t head_dim) { return padded_head(head_dim) * 4 + 16; }

// Byte of dimension d of a key in a lane, and of a value.
FD_INLINE int64_t key_byte(int64_t lane, int64_t d) { return d / 4 * 64 + lane * 4 + d % 4; }
FD_INLINE int64_t value_byte(int64_t lane, int64_t d, int64_t quad) { return lane / 4 * quad + d * 4 + lane % 4; }

// Where the scale of a key is, and of a value.
FD_INLINE int64_t key_scale(int64_t lane, int64_t head_dim) { return KEY_GROUP * padded_head(head_dim) + lane * 4; }
FD_INLINE int64_t value_scale(int64_t lane, int64_t head_dim) {
  return (lane / 4 + 1) * value_quad(head_dim) - 16 + lane % 4 * 4;
}

FD_INLINE const float* key_scales(const void* group, int64_t head_dim) {
  return reinterpret_cast<const float*>(static_cast<const char*>(group) + key_scale(0, head_dim));
}
FD_INLINE void copy_value_scales(const void* group, int64_t head_dim, float* out) {
  for (int64_t lane = 0; lane < KEY_GROUP; lane += 4)
    __builtin_memcpy(out + lane, static_cast<const char*>(group) + value_scale(lane, head_dim), 16);
}

template <class E, bool VALUE>
void store_bytes_of(const void* x, int64_t head_dim, int64_t lane, void* group_) {
  uint8_t* group = static_cast<uint8_t*>(group_);
  const int64_t quad = value_quad(head_dim);
  uint8_t bytes[MAX_HEAD_DIM];
  const float scale = to_bytes<E>(x, head_dim, bytes);
  for (int64_t d = 0; d < head_dim; ++d)
    group[VALUE ? value_byte(lane, d, quad) : key_byte(lane, d)] = static_cast<uint8_t>(bytes[d] - 128);
  __builtin_memcpy(group + (VALUE ? value_scale(lane, head_dim) : key_scale(lane, head_dim)), &scale, 4);
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
    for (int64_t d = 0; d < head_dim; d += 16) {
      const auto lanes = static_cast<__mmask16>(head_dim - d >= 16 ? 0xffff : (1 << (head_dim - d)) - 1);
      __m512i pairs[2];
      tables.unfold(_mm512_loadu_si512(group + quad * value_quad(head_dim) + d * 4), pairs);
      for (int p = 0; p < 2; ++p) _mm512_mask_storeu_epi32(out + ((2 * quad + p) * head_dim + d) * 2, lanes, pairs[p]);
    }
}

#else

inline void unfold_keys(const void* group_, int64_t head_dim, void* out_) {
  const int8_t* group = static_cast<const int8_t*>(group_);
  float* out = static_cast<float*>(out_);
  for (int64_t d = 0; d < head_dim; ++d)
    for (int64_t lane = 0; lane < KEY_GROUP; ++lane) out[d * KEY_GROUP + lane] = group[key_byte(lane, d)];
}

inline void unfold_values(const void* group_, int64_t head_dim, void* out_) {
  const int8_t* group = static_cast<const int8_t*>(group_);
  float* out = static_cast<float*>(out_);
  const int64_t quad = value_quad(head_dim);
  for (int64_t lane = 0; lane < KEY_GROUP; ++lane)
    for (int64_t d = 0; d < head_dim; ++d) out[lane * head_dim + d] = group[value_byte(lane, d, quad)];
}

#endif

}  // namespace FD_ISA
}  // namespace fdserve
