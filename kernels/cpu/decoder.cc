// A whole model in one call: for a few tokens, calling an operator costs as much as some of them compute.
//
// The operators are those of the other files, in the same order and on the same bits; where ranks have a part of each
// matrix, their parts of a sum are added up between them. Floor: memory, the weights once.
#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "collectives.h"
#include "kernels.h"
#include "pool.h"

namespace fdserve {
namespace {

// Rows of each of `widths`, one buffer after the other.
class Buffers {
 public:
  Buffers(int64_t rows, Dtype dtype, std::initializer_list<int64_t> widths) {
    int64_t total = 0;
    for (int64_t width : widths) total += bytes(rows, width, dtype);
    char* at = scratch<char>(kScratchBlocks, total);
    for (int64_t width : widths) {
      *next_++ = at;
      at += bytes(rows, width, dtype);
    }
  }
  char* operator[](int i) const { return buffers_[i]; }

 private:
  static int64_t bytes(int64_t rows, int64_t width, Dtype dtype) { return (rows * width * size_of(dtype) + 63) / 64 * 64; }
  char* buffers_[8];
  char** next_ = buffers_;
};

// Rows `ids` of x, in place: ids ascend or not, so by way of `spare`.
void keep_rows(char* x, char* spare, const int32_t* ids, int64_t count, int64_t row) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(spare + i * row, x + ids[i] * row, static_cast<size_t>(row));
  std::memcpy(x, spare, static_cast<size_t>(count * row));
}

// The ranks' parts of x become their sum.
bool add_up(const Shared* shared, char* x, int64_t size, Dtype dtype) {
  return shared == nullptr || all_reduce(*shared, x, size, dtype, x);
}

AttentionCall layer_attention(const DecoderCall& call, const DecoderLayer& layer, const char* qkv, char* out) {
  AttentionCall attend = call.model->attention;
  attend.tokens = call.tokens, attend.sequences = call.sequences, attend.blocks_per_sequence = call.blocks_per_sequence;
  attend.qkv = qkv, attend.k_cache = layer.k_cache, attend.v_cache = layer.v_cache, attend.rope = call.rope;
  attend.block_tables = call.block_tables, attend.query_starts = call.query_starts, attend.context_lens = call.context_lens;
  attend.out = out;
  return attend;
}

// Where an MLP puts rows in between: both halves of its first product, what swiglu makes of them, an answer of its own.
struct MlpRoom {
  char *both, *activated, *shared;
};

// What a layer's experts answer, those that see every token among them, or its dense MLP.
void mlp(const DecoderLayer& layer, const char* x, int64_t rows, Dtype dtype, const MlpRoom& room, char* answer) {
  const bool dense = layer.down.panels != nullptr;
  if (dense) {
    linear_swiglu(x, rows, dtype, layer.gate_up, room.both, room.activated);
    linear(room.activated, rows, dtype, layer.down, layer.experts == nullptr ? answer : room.shared, dtype);
  }
  if (layer.experts != nullptr) moe({dtype, rows, *layer.experts, x, dense ? room.shared : nullptr, answer});
}

}  // namespace

bool decoder(const DecoderCall& call) {
  const DecoderModel& model = *call.model;
  const Dtype dtype = model.attention.dtype;
  const DecoderLayer* layers = model.layers;
  const int64_t hidden = model.hidden, row = hidden * size_of(dtype), heads = layers[0].o.k;
  int64_t rows = call.tokens, inner = 0;
  for (int64_t l = 0; l < model.count; ++l) inner = std::max(inner, layers[l].down.k);
  const Buffers buffers(rows, dtype, {hidden, hidden, hidden, layers[0].qkv.n, heads, 2 * inner, inner, hidden});
  char *residual = buffers[0], *x = buffers[1], *answer = buffers[2], *qkv = buffers[3], *attended = buffers[4];
  const MlpRoom room = {buffers[5], buffers[6], buffers[7]};
  embedding(call.ids, rows, model.first_id, model.table, dtype, residual);
  if (!add_up(call.shared, residual, rows * hidden, dtype)) return false;
  rms_norm(residual, nullptr, layers[0].input_norm, model.eps, rows, hidden, dtype, x, nullptr);
  for (int64_t l = 0; l < model.count; ++l) {
    const DecoderLayer& layer = layers[l];
    const bool last = l + 1 == model.count;
    linear(x, rows, dtype, layer.qkv, qkv, dtype);
    attention(layer_attention(call, layer, qkv, attended));
    if (last) {
      // No token looks at another any more: only the rows asked for go on.
      if (call.samples == 0) return true;
      keep_rows(attended, qkv, call.sample_rows, call.samples, heads * size_of(dtype));
      keep_rows(residual, answer, call.sample_rows, call.samples, row);
      rows = call.samples;
    }
    linear(attended, rows, dtype, layer.o, answer, dtype);
    if (!add_up(call.shared, answer, rows * hidden, dtype)) return false;
    rms_norm(answer, residual, layer.post_norm, model.eps, rows, hidden, dtype, x, residual);
    mlp(layer, x, rows, dtype, room, answer);
    if (!add_up(call.shared, answer, rows * hidden, dtype)) return false;
    rms_norm(answer, residual, last ? model.norm : layers[l + 1].input_norm, model.eps, rows, hidden, dtype,
             last && !call.logits ? static_cast<char*>(call.out) : x, residual);
  }
  if (call.logits) linear(x, rows, dtype, model.head, call.out, Dtype::kFloat32);
  return true;
}

}  // namespace fdserve
