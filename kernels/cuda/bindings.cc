// The CUDA kernels as Paddle custom ops: the names, inputs and outputs of kernels/cpu/bindings.cc, on tensors of the GPU.
//
// What the CPU's kernels read from index tensors, the host must say here (max_query_len, longest): to look would wait for
// the device. For the same reason indices are not checked; the worker builds them. Linear layers and the embedding are
// Paddle's own on a GPU. With FDSERVE_EMULATED everything lies on the CPU and runs under tests/cuda/emulator.h.
#include <cmath>

#include "bindings.h"

namespace {

using namespace fdserve::cuda::bindings;

std::vector<Tensor> norm(const Tensor& x, const Tensor* residual, const Tensor& weight, float eps) {
  require(x.shape().size() == 2 && weight.numel() == x.shape()[1] && x.shape()[1] % 8 == 0,
          "rms_norm: x must be [T, H], H a multiple of 8, and weight [H]");
  require(x.dtype() == weight.dtype(), "rms_norm: x and weight must have the same dtype");
  require(residual == nullptr || (residual->shape() == x.shape() && residual->dtype() == x.dtype()),
          "add_rms_norm: the residual must be like x");
  std::vector<Tensor> out = {make(x.shape(), x.dtype(), x)};
  if (residual != nullptr) out.push_back(make(x.shape(), x.dtype(), x));
  check(fdserve_cuda_rms_norm(content_of(x), residual != nullptr ? content_of(*residual) : nullptr, content_of(weight), eps,
                              x.shape()[0], x.shape()[1], dtype_of(x), out[0].data(), residual != nullptr ? out[1].data() : nullptr,
                              stream_of(x)),
        "rms_norm");
  return out;
}

std::vector<Tensor> rms_norm(const Tensor& x, const Tensor& weight, float eps) { return norm(x, nullptr, weight, eps); }

std::vector<Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps) {
  return norm(x, &residual, weight, eps);
}

std::vector<Tensor> swiglu(const Tensor& x) {
  require(x.shape().size() == 2 && x.shape()[1] % 16 == 0, "swiglu: x must be [T, 2I], I a multiple of 8");
  Tensor out = make({x.shape()[0], x.shape()[1] / 2}, x.dtype(), x);
  check(fdserve_cuda_swiglu(content_of(x), x.shape()[0], x.shape()[1] / 2, dtype_of(x), out.data(), stream_of(x)), "swiglu");
  return {out};
}

std::vector<Tensor> sum_ranks(const Tensor& parts) {
  std::vector<int64_t> shape = parts.shape();
  require(shape.size() >= 2 && shape[0] > 0 && parts.numel() / shape[0] % 8 == 0,
          "sum_ranks: parts must be [ranks, ...], each part a multiple of 8 elements");
  const int ranks = static_cast<int>(shape[0]);
  shape.erase(shape.begin());
  Tensor out = make(shape, parts.dtype(), parts);
  check(fdserve_cuda_sum_ranks(content_of(parts), ranks, out.numel(), dtype_of(parts), out.data(), stream_of(parts)),
        "sum_ranks");
  return {out};
}

std::vector<Tensor> quant_linear(const Tensor& x, const Tensor& weight, const Tensor& scales, int bits, bool to_float) {
  require(x.shape().size() == 2 && weight.shape().size() == 2 && phi::SizeOf(weight.dtype()) == 1 &&
              (bits == 8 || bits == 4) && weight.shape()[1] * 8 == x.shape()[1] * bits,
          "quant_linear: x must be [T, K] and the weight [N, K] integers of 8 or 4 bits");
  const int64_t depth = x.shape()[1], columns = weight.shape()[0];
  require(scales.shape().size() == 2 && scales.shape()[0] == columns && depth % scales.shape()[1] == 0 &&
              depth / scales.shape()[1] % 64 == 0,
          "quant_linear: scales must be [N, K / group], the group a multiple of 64");
  Tensor out = make({x.shape()[0], columns}, to_float ? DataType::FLOAT32 : x.dtype(), x);
  check(fdserve_cuda_quant_linear(content_of(x), x.shape()[0], content_of(weight),
                                  data_of<float>(scales, DataType::FLOAT32, "quant_linear: scales must be float32"), bits,
                                  static_cast<int>(depth / scales.shape()[1]), depth, columns, dtype_of(x), to_float,
                                  out.data(), stream_of(x)),
        "quant_linear");
  return {out};
}

std::vector<Tensor> attention(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& rope,
                              const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens,
                              int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size,
                              int64_t max_query_len, int64_t longest) {
  const int64_t tokens = qkv.shape()[0], sequences = context_lens.numel();
  require(qkv.shape().size() == 2 && qkv.shape()[1] == (heads + 2 * kv_heads) * head_dim && heads % kv_heads == 0,
          "attention: qkv must be [T, (num_heads + 2 * num_kv_heads) * head_dim]");
  require(k_cache.shape() == v_cache.shape() && k_cache.shape().size() == 4 && k_cache.shape()[1] == kv_heads &&
              k_cache.shape()[2] == block_size && k_cache.shape()[3] == head_dim && k_cache.dtype() == qkv.dtype() &&
              v_cache.dtype() == qkv.dtype(),
          "attention: the caches are not of this shape and dtype");
  require(rope.numel() == tokens * head_dim && block_tables.shape().size() == 2 && block_tables.shape()[0] == sequences &&
              query_starts.numel() == sequences + 1,
          "attention: rope must be [T, head_dim], block_tables [S, B], query_starts [S + 1] and context_lens [S]");
  const FdservePaged paged = {data_of<int>(block_tables, DataType::INT32, "attention: block_tables must be int32"),
                              data_of<int>(query_starts, DataType::INT32, "attention: query_starts must be int32"),
                              data_of<int>(context_lens, DataType::INT32, "attention: context_lens must be int32"),
                              static_cast<int>(sequences), static_cast<int>(block_tables.shape()[1]),
                              static_cast<int>(block_size), static_cast<int>(kv_heads)};
  const int dtype = dtype_of(qkv);
  Tensor queries = make({tokens, heads * head_dim}, qkv.dtype(), qkv), out = make({tokens, heads * head_dim}, qkv.dtype(), qkv);
  check(fdserve_cuda_rope_and_store(content_of(qkv), data_of<float>(rope, DataType::FLOAT32, "attention: rope must be float32"),
                                    &paged, tokens, heads, head_dim, dtype, queries.data(),
                                    const_cast<void*>(content_of(k_cache)), const_cast<void*>(content_of(v_cache)),
                                    stream_of(qkv)),
        "attention");
  const int64_t bytes = fdserve_cuda_attention_workspace(sequences, tokens, max_query_len, longest, heads, kv_heads,
                                                         head_dim, multiprocessors());
  Tensor workspace = make({bytes / 4}, DataType::FLOAT32, qkv);
  check(fdserve_cuda_attention(queries.data(), content_of(k_cache), content_of(v_cache), &paged, tokens, max_query_len, longest,
                               heads, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim)), dtype, out.data(),
                               bytes > 0 ? workspace.data<float>() : nullptr, multiprocessors(), stream_of(qkv)),
        "attention");
  return {out};
}

std::vector<Tensor> moe(const Tensor& x, const Tensor& gate, const Tensor& correction_bias, const Tensor& up_gate,
                        const Tensor& down, const paddle::optional<Tensor>& up_gate_scales,
                        const paddle::optional<Tensor>& down_scales, const paddle::optional<Tensor>& shared, int bits,
                        int64_t inner, int64_t top_k, float norm_min) {
  require(x.shape().size() == 2 && gate.shape().size() == 2 && gate.shape()[1] == x.shape()[1] &&
              correction_bias.numel() == gate.shape()[0],
          "moe: x must be [T, H], gate [E, H] and correction_bias [E]");
  const int64_t experts = gate.shape()[0], hidden = x.shape()[1];
  const int64_t bytes = bits == 16 ? 2 : 1, packed = bits == 4 ? 2 : 1;
  require(up_gate.numel() * packed == experts * 2 * inner * hidden && down.numel() * packed == experts * hidden * inner &&
              static_cast<int64_t>(phi::SizeOf(up_gate.dtype())) == bytes &&
              static_cast<int64_t>(phi::SizeOf(down.dtype())) == bytes,
          "moe: up_gate must be [E, 2I, H] and down [E, H, I], of that many bits");
  int group = 0;
  if (bits != 16) {
    require(up_gate_scales && down_scales && up_gate_scales->shape().size() == 3 && down_scales->shape().size() == 3,
            "moe: integers need scales");
    group = static_cast<int>(hidden / up_gate_scales->shape()[2]);
    require(group % 64 == 0 && hidden % group == 0 && down_scales->shape()[2] * group == inner,
            "moe: the scales' groups must be the same multiple of 64");
  }
  Tensor out = make(x.shape(), x.dtype(), x);
  constexpr const char* KIND = "moe: gate, correction_bias and scales must be float32";
  const auto floats = [&](const Tensor& each) { return data_of<float>(each, DataType::FLOAT32, KIND); };
  const FdserveMoe call = {content_of(x), floats(gate), floats(correction_bias), content_of(up_gate), content_of(down),
                           bits != 16 ? floats(*up_gate_scales) : nullptr, bits != 16 ? floats(*down_scales) : nullptr,
                           shared ? content_of(*shared) : nullptr, out.data(), x.shape()[0], hidden, inner, experts, top_k,
                           bits, group, norm_min};
  Tensor workspace = make({fdserve_cuda_moe_workspace(&call)}, DataType::UINT8, x);
  check(fdserve_cuda_moe(&call, dtype_of(x), workspace.data(), stream_of(x)), "moe");
  return {out};
}

}  // namespace

PD_BUILD_OP(fdserve_rms_norm).Inputs({"x", "weight"}).Outputs({"out"}).Attrs({"eps: float"}).SetKernelFn(PD_KERNEL(rms_norm));

PD_BUILD_OP(fdserve_add_rms_norm)
    .Inputs({"x", "residual", "weight"})
    .Outputs({"out", "total"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(add_rms_norm));

PD_BUILD_OP(fdserve_swiglu).Inputs({"x"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(swiglu));

PD_BUILD_OP(fdserve_sum_ranks).Inputs({"parts"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(sum_ranks));

PD_BUILD_OP(fdserve_quant_linear)
    .Inputs({"x", "weight", "scales"})
    .Outputs({"out"})
    .Attrs({"bits: int", "to_float: bool"})
    .SetKernelFn(PD_KERNEL(quant_linear));

PD_BUILD_OP(fdserve_attention)
    .Inputs({"qkv", "k_cache", "v_cache", "rope", "block_tables", "query_starts", "context_lens"})
    .Outputs({"out"})
    .Attrs({"heads: int64_t", "kv_heads: int64_t", "head_dim: int64_t", "block_size: int64_t", "max_query_len: int64_t",
            "longest: int64_t"})
    .SetKernelFn(PD_KERNEL(attention));

PD_BUILD_OP(fdserve_moe)
    .Inputs({"x", "gate", "correction_bias", "up_gate", "down", paddle::Optional("up_gate_scales"),
             paddle::Optional("down_scales"), paddle::Optional("shared")})
    .Outputs({"out"})
    .Attrs({"bits: int", "inner: int64_t", "top_k: int64_t", "norm_min: float"})
    .SetKernelFn(PD_KERNEL(moe));
