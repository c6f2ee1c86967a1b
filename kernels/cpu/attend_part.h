// Attention over the keys of a part, a tile at a time, and what becomes of the parts' states.
//
// A cache of bytes is unfolded into tiles of elements first, once for all rows. Tiles and parts begin at absolute positions,
// so that what a row computes does not depend on where its prompt was cut. Floor: that of attend.h.

namespace fdserve {
namespace FD_ISA {

template <class E>
void attend_tile(const E* q, int64_t rows, int64_t head_dim, KeyTile tile, const int* seen, float scale, AttendState state,
                 int64_t stride) {
  while (rows > 0) {
    // 8 rows and a rest as two halves: heads come in groups of 4 to 8.
    const int n = static_cast<int>(rows == 7 ? 4 : rows < ATTEND_ROWS || rows == 8 ? rows : ATTEND_ROWS);
    switch (n) {
      case 8: attend_rows<E, 8>(q, head_dim, tile, seen, scale, state, stride); break;
      case 6: attend_rows<E, 6>(q, head_dim, tile, seen, scale, state, stride); break;
      case 5: attend_rows<E, 5>(q, head_dim, tile, seen, scale, state, stride); break;
      case 4: attend_rows<E, 4>(q, head_dim, tile, seen, scale, state, stride); break;
      case 3: attend_rows<E, 3>(q, head_dim, tile, seen, scale, state, stride); break;
      case 2: attend_rows<E, 2>(q, head_dim, tile, seen, scale, state, stride); break;
      default: attend_rows<E, 1>(q, head_dim, tile, seen, scale, state, stride); break;
    }
    rows -= n, q += n * head_dim, seen += n;
    state.peak += n, state.mass += n, state.values += n * stride;
    tile.next_lines = 0;  // all is fetched
  }
}

// What a tile of a cache of bytes unfolds to.
template <class E>
struct Unfolded {
  alignas(64) E keys[KEY_TILE * MAX_HEAD_DIM];
  alignas(64) E values[KEY_TILE * MAX_HEAD_DIM];
  alignas(64) float value_scales[KEY_TILE];
};

// The tile of a part that begins with group `first`, and the tile after it to fetch; `room` is for bytes.
template <class E>
FD_INLINE KeyTile tile_of(const KeyPart& part, int64_t first, int64_t head_dim, Unfolded<E>& room) {
  constexpr int64_t GROUPS = KEY_TILE / KEY_GROUP;
  const int64_t size = KEY_GROUP * padded_head(head_dim);
  KeyTile tile = {};
  const bool last = first + GROUPS >= KEY_PART / KEY_GROUP || part.keys[first + GROUPS] == nullptr;
  const void *const* next_keys = last ? part.following : part.keys + first + GROUPS;
  const void *const* next_values = last ? part.following_values : part.values + first + GROUPS;
  for (int64_t g = 0; g < GROUPS; ++g) {
    // Where nothing follows, what is at hand costs nothing to fetch.
    tile.next_keys[g] = next_keys[g] != nullptr ? next_keys[g] : part.keys[first];
    tile.next_values[g] = next_values[g] != nullptr ? next_values[g] : part.values[first];
    const void *keys = part.keys[first + g], *values = part.values[first + g];
    tile.keys[g] = keys, tile.values[g] = values;
    if (!part.bytes || keys == nullptr) continue;
    E *wide_keys = room.keys + g * size, *wide_values = room.values + g * size;
    unfold_keys(keys, head_dim, wide_keys);
    unfold_values(values, head_dim, wide_values);
    copy_value_scales(values, head_dim, room.value_scales + g * KEY_GROUP);
    tile.key_scales[g] = key_scales(keys, head_dim), tile.value_scales[g] = room.value_scales + g * KEY_GROUP;
    tile.keys[g] = wide_keys, tile.values[g] = wide_values;
  }
  tile.next_lines = (part.bytes ? byte_group(head_dim) : KEY_GROUP * head_dim * static_cast<int64_t>(sizeof(E))) / LINE;
  return tile;
}

FD_INLINE void reset(AttendState state, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) state.peak[r] = -__builtin_inff(), state.mass[r] = 0;
  __builtin_memset(state.values, 0, static_cast<size_t>(rows * stride) * sizeof(float));
}

template <class E>
void attend(const void* q_, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
            AttendState state, int64_t stride) {
  const E* q = static_cast<const E*>(q_);
  Unfolded<E> room;
  constexpr int64_t AT_ONCE = 64;
  int of_tile[AT_ONCE];
  reset(state, rows, stride);
  for (int64_t first = 0; first < KEY_PART && part.keys[first / KEY_GROUP] != nullptr; first += KEY_TILE) {
    const KeyTile tile = tile_of(part, first / KEY_GROUP, head_dim, room);
    int64_t r = 0;
    while (r < rows && seen[r] <= first) ++r;  // rows that see none of this tile
    for (int64_t n; r < rows; r += n) {
      n = rows - r < AT_ONCE ? rows - r : AT_ONCE;
      for (int64_t i = 0; i < n; ++i)
        of_tile[i] = static_cast<int>(seen[r + i] - first < KEY_TILE ? seen[r + i] - first : KEY_TILE);
      attend_tile(q + r * head_dim, n, head_dim, tile, of_tile, scale,
                  {state.peak + r, state.mass + r, state.values + r * stride}, stride);
    }
  }
}

inline void merge(AttendState total, AttendState part, int64_t rows, int64_t head_dim, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.mass[r] == 0.0f) continue;  // this row sees no key of the part
    const float top = total.peak[r] > part.peak[r] ? total.peak[r] : part.peak[r];
    const float keep = exp1(total.peak[r] - top), take = exp1(part.peak[r] - top);
    total.peak[r] = top;
    total.mass[r] = total.mass[r] * keep + part.mass[r] * take;
    float *into = total.values + r * stride, *from = part.values + r * stride;
    for (int64_t i = 0; i < head_dim; i += VL) store(into + i, load(into + i) * splat(keep) + load(from + i) * splat(take));
  }
}

inline void finish(AttendState state, int64_t rows, int64_t head_dim, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const vf inverse = splat(1.0f / state.mass[r]);
    float* values = state.values + r * stride;
    for (int64_t i = 0; i < head_dim; i += VL) store(values + i, load(values + i) * inverse);
  }
}

}  // namespace FD_ISA
}  // namespace fdserve
