// What the bindings check of attention.
#pragma once

#include "bindings.h"

namespace fdserve::bindings {

using fdserve::AttentionCall;

// What is the same in every call, and the caches, whose number of blocks is the first of their dimensions.
inline AttentionCall attention_of(DataType dtype, const Tensor& k_cache, const Tensor& v_cache, int64_t heads,
                                  int64_t kv_heads, int64_t head_dim, int64_t block_size) {
  require(dtype == DataType::BFLOAT16 || dtype == DataType::FLOAT32, "expected a bfloat16 or float32 tensor");
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
  AttentionCall call = {};
  call.dtype = dtype == DataType::BFLOAT16 ? Dtype::kBfloat16 : Dtype::kFloat32, call.byte_cache = bytes;
  call.heads = heads, call.kv_heads = kv_heads, call.head_dim = head_dim, call.block_size = block_size;
  call.k_cache = const_cast<void*>(data_of(k_cache)), call.v_cache = const_cast<void*>(data_of(v_cache));
  return call;
}

// What the kernel reads through: a wrong index would be a wild access. `Call` is an AttentionCall or a DecoderCall.
template <class Call>
void check_sequences(const Call& call, int64_t block_size, int64_t blocks) {
  int64_t previous = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t end = call.query_starts[s + 1], length = call.context_lens[s] + end - previous;
    require(call.query_starts[s] == previous && end >= previous && end <= call.tokens && call.context_lens[s] >= 0,
            "attention: query_starts must ascend from 0 to T, and context_lens be at least 0");
    const int64_t used = end == previous ? 0 : (length + block_size - 1) / block_size;
    require(used <= call.blocks_per_sequence, "attention: a block table is too short");
    for (int64_t b = 0; b < used; ++b) {
      const int64_t block = call.block_tables[s * call.blocks_per_sequence + b];
      require(block >= 0 && block < blocks, "attention: a block is out of range");
    }
    previous = end;
  }
  require(previous == call.tokens, "attention: query_starts must end at T");
}

}  // namespace fdserve::bindings
