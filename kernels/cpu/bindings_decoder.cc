// A whole model as two Paddle custom ops: see bindings.cc for what such a file does. One checks the weights and notes where
// they are; the other computes a step by that note, and looks at what is new in a step alone. Handing Paddle more than a
// hundred tensors takes longer than some steps compute for a layer.
#include <type_traits>
#include <utility>

#include "bindings_attention.h"
#include "bindings_shared.h"

namespace {

using namespace fdserve::bindings;
using fdserve::DecoderCall;
using fdserve::DecoderLayer;
using fdserve::DecoderModel;
using fdserve::Shared;
using Tensors = std::vector<Tensor>;

// The note: this, then the layers, then their experts. It lies in a tensor, and points into itself and to the weights.
struct Note {
  const void* self;  // where it lies: a copy is none
  int64_t blocks;    // of the caches
  DecoderModel model;
};
static_assert(std::is_trivially_copyable_v<Note> && std::is_trivially_copyable_v<DecoderLayer> &&
              std::is_trivially_copyable_v<Experts>);

const void* norm_of(const Tensor& weight, int64_t hidden, DataType dtype) {
  require(weight.numel() == hidden && weight.dtype() == dtype, "decoder: a norm's weight must be [H] of the same dtype");
  return weight.data();
}

// The tensors of MLPs, one after the other.
class Mlps {
 public:
  Mlps(const Tensors& tensors, int64_t format, int64_t hidden, DataType dtype)
      : left_(tensors.begin()), end_(tensors.end()), format_(format), hidden_(hidden), dtype_(dtype) {}

  Experts experts(int64_t inner, int64_t top_k, float norm_min) {
    const Tensor &gate = next(), &bias = next(), &up_gate = next(), &down = next();
    return experts_of(gate, bias, up_gate, down, format_, hidden_, inner, top_k, norm_min, dtype_);
  }
  Matrix gate_up(int64_t inner) { return matrix_of(next(), format_, 2 * inner, hidden_, dtype_); }
  Matrix down(int64_t inner) { return matrix_of(next(), format_, hidden_, inner, dtype_); }
  void require_none() const { require(left_ == end_, "decoder: there are more weights than layers have"); }

 private:
  const Tensor& next() {
    require(left_ != end_, "decoder: there are fewer weights than layers have");
    return *left_++;
  }
  Tensors::const_iterator left_, end_;
  int64_t format_, hidden_;
  DataType dtype_;
};

std::vector<Tensor> note(const Tensor& table, const Tensor& head, const Tensor& norm, const Tensors& input_norms,
                         const Tensors& qkv, const Tensors& o, const Tensors& k_caches, const Tensors& v_caches,
                         const Tensors& post_norms, const Tensors& mlps, int64_t table_format, int64_t head_format,
                         int64_t ids, int64_t first_id, int64_t vocab_size, int64_t format, int64_t heads,
                         int64_t kv_heads, int64_t head_dim, int64_t block_size, const std::vector<int64_t>& inner,
                         const std::vector<int64_t>& experts_inner, int64_t top_k, float norm_min, float eps) {
  const size_t count = input_norms.size();
  require(count > 0, "decoder: there must be layers");
  for (const Tensors* each : {&qkv, &o, &k_caches, &v_caches, &post_norms})
    require(each->size() == count, "decoder: every list must have one tensor a layer");
  require(inner.size() == count && experts_inner.size() == count, "decoder: every list must have one size a layer");
  require(table_format != static_cast<int64_t>(Format::kW8a8), "decoder: a table cannot be w8a8");
  require(first_id >= 0 && first_id + ids <= vocab_size, "decoder: the ids are not of the vocabulary");
  const DataType dtype = norm.dtype();
  const int64_t hidden = norm.numel();
  Tensor out = make({static_cast<int64_t>(sizeof(Note) + count * (sizeof(DecoderLayer) + sizeof(Experts)))}, DataType::UINT8);
  auto* self = static_cast<Note*>(out.data());
  auto* layers = reinterpret_cast<DecoderLayer*>(self + 1);
  auto* experts = reinterpret_cast<Experts*>(layers + count);
  *self = {self, k_caches[0].dims()[0],
           {attention_of(dtype, k_caches[0], v_caches[0], heads, kv_heads, head_dim, block_size),
            static_cast<int64_t>(count), hidden, vocab_size, layers, matrix_of(table, table_format, ids, hidden, dtype),
            matrix_of(head, head_format, ids, hidden, dtype), first_id, norm_of(norm, hidden, dtype), eps}};
  Mlps weights(mlps, format, hidden, dtype);
  for (size_t l = 0; l < count; ++l) {
    for (const Tensor* cache : {&k_caches[l], &v_caches[l]})
      require(cache->dims() == k_caches[0].dims() && cache->dtype() == k_caches[0].dtype(),
              "decoder: the caches must be alike");
    layers[l] = {norm_of(input_norms[l], hidden, dtype),
                 matrix_of(qkv[l], format, (heads + 2 * kv_heads) * head_dim, hidden, dtype),
                 matrix_of(o[l], format, hidden, heads * head_dim, dtype),
                 const_cast<void*>(data_of(k_caches[l])), const_cast<void*>(data_of(v_caches[l])),
                 norm_of(post_norms[l], hidden, dtype), {}, {}, nullptr};
    require(inner[l] > 0 || experts_inner[l] > 0, "decoder: a layer has no MLP");
    if (experts_inner[l] > 0) {
      experts[l] = weights.experts(experts_inner[l], top_k, norm_min);
      layers[l].experts = &experts[l];
    }
    if (inner[l] > 0) layers[l].gate_up = weights.gate_up(inner[l]), layers[l].down = weights.down(inner[l]);
  }
  weights.require_none();
  return {out};
}

const Note& note_of(const Tensor& tensor) {
  require(tensor.dtype() == DataType::UINT8 && tensor.numel() >= static_cast<int64_t>(sizeof(Note)),
          "decoder: this is no note of a model");
  const auto& note = *static_cast<const Note*>(tensor.data());
  require(note.self == &note, "decoder: this is no note of a model");
  return note;
}

std::vector<Tensor> decoder(const Tensor& model, const Tensor& inputs, int64_t tokens, int64_t sequences, int64_t width,
                            int64_t samples, bool logits, int64_t memory, int64_t slot_bytes, int rank, int ranks,
                            const std::vector<int>& peers, int64_t exchange) {
  const Note& note = note_of(model);
  const int64_t turns = tokens * note.model.attention.head_dim;
  require(tokens >= 0 && sequences >= 0 && width >= 0 && samples >= 0 && samples <= tokens, "decoder: a size is out of range");
  const auto* at = data_of<int32_t>(inputs, DataType::INT32, "decoder: the inputs must be int32");
  require(inputs.numel() >= turns + tokens + 2 * sequences + 1 + samples + sequences * width,
          "decoder: there are fewer inputs than that");
  const bool bfloat16 = note.model.attention.dtype == Dtype::kBfloat16;
  Tensor out = logits     ? make_large({samples, note.model.head.n}, DataType::FLOAT32)
               : bfloat16 ? make({samples, note.model.hidden}, DataType::BFLOAT16)
                          : make({samples, note.model.hidden}, DataType::FLOAT32);
  if (tokens == 0) return {out};
  // In the order in which ops/decoder.py puts them.
  const auto next = [&at](int64_t count) { return std::exchange(at, at + count); };
  const auto* rope = reinterpret_cast<const float*>(next(turns));
  const int32_t *ids = next(tokens), *query_starts = next(sequences + 1), *context_lens = next(sequences);
  const int32_t *rows = next(samples), *block_tables = next(sequences * width);
  for (int64_t t = 0; t < tokens; ++t)
    require(ids[t] >= 0 && ids[t] < note.model.vocab_size, "decoder: an id is out of range");
  for (int64_t i = 0; i < samples; ++i) require(rows[i] >= 0 && rows[i] < tokens, "decoder: a row is out of range");
  Shared shared = {};
  if (ranks > 1) shared = shared_of(memory, slot_bytes, rank, ranks, peers, exchange);
  const DecoderCall call = {&note.model, ids, tokens, sequences, width, samples, rope, block_tables, query_starts, context_lens,
                            rows, logits, samples > 0 ? out.data() : nullptr, ranks > 1 ? &shared : nullptr};
  check_sequences(call, note.model.attention.block_size, note.blocks);
  require_peers(fdserve::decoder(call));
  return {out};
}

}  // namespace

PD_BUILD_OP(fdserve_decoder_note)
    .Inputs({"table", "head", "norm", paddle::Vec("input_norms"), paddle::Vec("qkv"), paddle::Vec("o"),
             paddle::Vec("k_caches"), paddle::Vec("v_caches"), paddle::Vec("post_norms"), paddle::Vec("mlps")})
    .Outputs({"note"})
    .Attrs({"table_format: int64_t", "head_format: int64_t", "ids: int64_t", "first_id: int64_t", "vocab_size: int64_t",
            "format: int64_t", "heads: int64_t", "kv_heads: int64_t", "head_dim: int64_t", "block_size: int64_t",
            "inner: std::vector<int64_t>", "experts_inner: std::vector<int64_t>", "top_k: int64_t", "norm_min: float",
            "eps: float"})
    .SetKernelFn(PD_KERNEL(Guarded<note>::call));

PD_BUILD_OP(fdserve_decoder)
    .Inputs({"model", "inputs"})
    .Outputs({"out"})
    .Attrs({"tokens: int64_t", "sequences: int64_t", "width: int64_t", "samples: int64_t", "logits: bool", FDSERVE_SHARED})
    .SetKernelFn(PD_KERNEL(Guarded<decoder>::call));
