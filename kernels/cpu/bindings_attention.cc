// Attention and whole decoders as Paddle custom ops: see bindings.cc for what such a file does.
#include "bindings_shared.h"

namespace {

using namespace fdserve::bindings;
using fdserve::AttentionCall;
using fdserve::Shared;

// What the kernel reads through: a wrong index would be a wild access.
void check_sequences(const fdserve::AttentionCall& call, int64_t blocks) {
  int64_t previous = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t end = call.query_starts[s + 1], length = call.context_lens[s] + end - previous;
    require(call.query_starts[s] == previous && end >= previous && end <= call.tokens && call.context_lens[s] >= 0,
            "attention: query_starts must ascend from 0 to T, and context_lens be at least 0");
    const int64_t used = end == previous ? 0 : (length + call.block_size - 1) / call.block_size;
    require(used <= call.blocks_per_sequence, "attention: a block table is too short");
    for (int64_t b = 0; b < used; ++b) {
      const int64_t block = call.block_tables[s * call.blocks_per_sequence + b];
      require(block >= 0 && block < blocks, "attention: a block is out of range");
    }
    previous = end;
  }
  require(previous == call.tokens, "attention: query_starts must end at T");
}

// The call but for qkv and the answer, with one layer's caches, of which all others must be like it.
AttentionCall attention_call(DataType dtype, int64_t tokens, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& rope, const Tensor& block_tables, const Tensor& query_starts,
                             const Tensor& context_lens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                             int64_t block_size) {
  const int64_t sequences = context_lens.numel();
  const bool bytes = k_cache.dtype() == DataType::UINT8;
  require(head_dim > 0 && head_dim % 2 == 0 && head_dim <= fdserve::MAX_HEAD_DIM,
          "attention: head_dim must be even and at most 256");
  require(kv_heads > 0 && heads % kv_heads == 0, "attention: num_heads must be a multiple of num_kv_heads");
  require(block_size > 0 && block_size % fdserve::KEY_GROUP == 0, "attention: block_size must be a multiple of 16");
  require(k_cache.dims() == v_cache.dims() && k_cache.dims().size() == 4 && k_cache.dims()[1] == kv_heads &&
              k_cache.dims()[2] == block_size && k_cache.dims()[3] == (bytes ? fdserve::padded_head(head_dim) + 4 : head_dim),
          "attention: the caches are not of this shape");
  require((bytes || k_cache.dtype() == dtype) && v_cache.dtype() == k_cache.dtype(),
          "attention: the caches and qkv must have the same dtype");
  require(rope.numel() == tokens * head_dim, "attention: rope must be [T, head_dim]");
  require(block_tables.dims().size() == 2 && block_tables.dims()[0] == sequences && query_starts.numel() == sequences + 1,
          "attention: block_tables must be [S, B], query_starts [S + 1] and context_lens [S]");
  const AttentionCall call = {
      dtype == DataType::BFLOAT16 ? Dtype::kBfloat16 : Dtype::kFloat32, bytes, tokens, sequences, block_tables.dims()[1], heads,
      kv_heads, head_dim, block_size, nullptr,
      const_cast<void*>(data_of(k_cache)), const_cast<void*>(data_of(v_cache)),
      data_of<float>(rope, DataType::FLOAT32, "attention: rope must be float32"),
      data_of<int32_t>(block_tables, DataType::INT32, "attention: block_tables must be int32"),
      data_of<int32_t>(query_starts, DataType::INT32, "attention: query_starts must be int32"),
      data_of<int32_t>(context_lens, DataType::INT32, "attention: context_lens must be int32"), nullptr};
  check_sequences(call, k_cache.dims()[0]);
  return call;
}

std::vector<Tensor> attention(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& rope,
                              const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens,
                              int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size) {
  dtype_of(qkv);
  AttentionCall call = attention_call(qkv.dtype(), qkv.dims()[0], k_cache, v_cache, rope, block_tables, query_starts,
                                      context_lens, heads, kv_heads, head_dim, block_size);
  require(qkv.dims().size() == 2 && qkv.dims()[1] == (heads + 2 * kv_heads) * head_dim,
          "attention: qkv must be [T, (num_heads + 2 * num_kv_heads) * head_dim]");
  Tensor out = make({call.tokens, heads * head_dim}, qkv.dtype());
  call.qkv = data_of(qkv), call.out = const_cast<void*>(data_of(out));
  fdserve::attention(call);
  return {out};
}

using Tensors = std::vector<Tensor>;

const void* norm_of(const Tensor& weight, const Tensor& x) {
  require(weight.numel() == x.dims()[1] && weight.dtype() == x.dtype(), "decoder: a norm's weight must be [H] like x");
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

std::vector<Tensor> decoder(const Tensor& x, const Tensor& rope, const Tensor& block_tables, const Tensor& query_starts,
                            const Tensor& context_lens, const Tensor& sample_rows, const Tensor& norm,
                            const Tensors& input_norms, const Tensors& qkv, const Tensors& o, const Tensors& k_caches,
                            const Tensors& v_caches, const Tensors& post_norms, const Tensors& mlps, int64_t format,
                            int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size,
                            const std::vector<int64_t>& inner, const std::vector<int64_t>& experts_inner, int64_t top_k,
                            float norm_min, float eps, int64_t memory, int64_t slot_bytes, int rank, int ranks,
                            const std::vector<int>& peers, int64_t exchange) {
  const size_t count = input_norms.size();
  require(x.dims().size() == 2 && count > 0, "decoder: x must be [T, H], and there must be layers");
  for (const Tensors* each : {&qkv, &o, &k_caches, &v_caches, &post_norms})
    require(each->size() == count, "decoder: every list must have one tensor a layer");
  require(inner.size() == count && experts_inner.size() == count, "decoder: every list must have one size a layer");
  const int64_t tokens = x.dims()[0], hidden = x.dims()[1], samples = sample_rows.numel();
  const auto* rows = data_of<int32_t>(sample_rows, DataType::INT32, "decoder: sample_rows must be int32");
  require(samples <= tokens, "decoder: there are more sample_rows than tokens");
  for (int64_t i = 0; i < samples; ++i) require(rows[i] >= 0 && rows[i] < tokens, "decoder: a row is out of range");
  dtype_of(x);
  const AttentionCall call = attention_call(x.dtype(), tokens, k_caches[0], v_caches[0], rope, block_tables, query_starts,
                                            context_lens, heads, kv_heads, head_dim, block_size);
  Mlps weights(mlps, format, hidden, x.dtype());
  std::vector<fdserve::DecoderLayer> layers;
  std::vector<Experts> experts(count);
  for (size_t l = 0; l < count; ++l) {
    for (const Tensor* cache : {&k_caches[l], &v_caches[l]})
      require(cache->dims() == k_caches[0].dims() && cache->dtype() == k_caches[0].dtype(),
              "decoder: the caches must be alike");
    layers.push_back({norm_of(input_norms[l], x),
                      matrix_of(qkv[l], format, (heads + 2 * kv_heads) * head_dim, hidden, x.dtype()),
                      matrix_of(o[l], format, hidden, heads * head_dim, x.dtype()),
                      const_cast<void*>(data_of(k_caches[l])), const_cast<void*>(data_of(v_caches[l])),
                      norm_of(post_norms[l], x), {}, {}, nullptr});
    require(inner[l] > 0 || experts_inner[l] > 0, "decoder: a layer has no MLP");
    if (experts_inner[l] > 0) {
      experts[l] = weights.experts(experts_inner[l], top_k, norm_min);
      layers[l].experts = &experts[l];
    }
    if (inner[l] > 0) layers[l].gate_up = weights.gate_up(inner[l]), layers[l].down = weights.down(inner[l]);
  }
  weights.require_none();
  Tensor out = make({samples, hidden}, x.dtype());
  if (tokens == 0) return {out};
  Shared shared = {};
  if (ranks > 1) shared = shared_of(memory, slot_bytes, rank, ranks, peers, exchange);
  require_peers(fdserve::decoder({call, layers.data(), static_cast<int64_t>(count), hidden, norm_of(norm, x), eps, x.data(),
                                  rows, samples, samples > 0 ? out.data() : nullptr, ranks > 1 ? &shared : nullptr}));
  return {out};
}

}  // namespace

PD_BUILD_OP(fdserve_attention)
    .Inputs({"qkv", "k_cache", "v_cache", "rope", "block_tables", "query_starts", "context_lens"})
    .Outputs({"out"})
    .Attrs({"heads: int64_t", "kv_heads: int64_t", "head_dim: int64_t", "block_size: int64_t"})
    .SetKernelFn(PD_KERNEL(Guarded<attention>::call));

PD_BUILD_OP(fdserve_decoder)
    .Inputs({"x", "rope", "block_tables", "query_starts", "context_lens", "sample_rows", "norm", paddle::Vec("input_norms"),
             paddle::Vec("qkv"), paddle::Vec("o"), paddle::Vec("k_caches"), paddle::Vec("v_caches"),
             paddle::Vec("post_norms"), paddle::Vec("mlps")})
    .Outputs({"out"})
    .Attrs({"format: int64_t", "heads: int64_t", "kv_heads: int64_t", "head_dim: int64_t", "block_size: int64_t",
            "inner: std::vector<int64_t>", "experts_inner: std::vector<int64_t>", "top_k: int64_t", "norm_min: float",
            "eps: float", FDSERVE_SHARED})
    .SetKernelFn(PD_KERNEL(Guarded<decoder>::call));
