// Attention as a Paddle custom op: see bindings.cc for what such a file does.
#include "bindings_attention.h"

namespace {

using namespace fdserve::bindings;

std::vector<Tensor> attention(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& rope,
                              const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens,
                              int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size) {
  AttentionCall call = attention_of(qkv.dtype(), k_cache, v_cache, heads, kv_heads, head_dim, block_size);
  require(qkv.dims().size() == 2 && qkv.dims()[1] == (heads + 2 * kv_heads) * head_dim,
          "attention: qkv must be [T, (num_heads + 2 * num_kv_heads) * head_dim]");
  call.tokens = qkv.dims()[0], call.sequences = context_lens.numel();
  require(rope.numel() == call.tokens * head_dim, "attention: rope must be [T, head_dim]");
  require(block_tables.dims().size() == 2 && block_tables.dims()[0] == call.sequences &&
              query_starts.numel() == call.sequences + 1,
          "attention: block_tables must be [S, B], query_starts [S + 1] and context_lens [S]");
  call.blocks_per_sequence = block_tables.dims()[1];
  call.rope = data_of<float>(rope, DataType::FLOAT32, "attention: rope must be float32");
  call.block_tables = data_of<int32_t>(block_tables, DataType::INT32, "attention: block_tables must be int32");
  call.query_starts = data_of<int32_t>(query_starts, DataType::INT32, "attention: query_starts must be int32");
  call.context_lens = data_of<int32_t>(context_lens, DataType::INT32, "attention: context_lens must be int32");
  check_sequences(call, block_size, k_cache.dims()[0]);
  Tensor out = make({call.tokens, heads * head_dim}, qkv.dtype());
  call.qkv = data_of(qkv), call.out = const_cast<void*>(data_of(out));
  fdserve::attention(call);
  return {out};
}

}  // namespace

PD_BUILD_OP(fdserve_attention)
    .Inputs({"qkv", "k_cache", "v_cache", "rope", "block_tables", "query_starts", "context_lens"})
    .Outputs({"out"})
    .Attrs({"heads: int64_t", "kv_heads: int64_t", "head_dim: int64_t", "block_size: int64_t"})
    .SetKernelFn(PD_KERNEL(Guarded<attention>::call));
