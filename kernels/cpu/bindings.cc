// The operators as Paddle custom ops: checks, output tensors, and a call of the framework-free functions in kernels.h.
// Only the bindings include Paddle's headers. Ops are called eagerly, so no shape inference is declared.
#include "bindings.h"

namespace {

using namespace fdserve::bindings;

std::vector<Tensor> linear(const Tensor& x, const Tensor& panels, int64_t format, int64_t n, int64_t k, bool to_float) {
  require(x.dims().size() == 2 && x.dims()[1] == k, "linear: x must be [T, in_features]");
  const Matrix weight = matrix_of(panels, format, n, k, x.dtype());
  Tensor out = make({x.dims()[0], n}, to_float ? DataType::FLOAT32 : x.dtype());
  if (out.numel() > 0) fdserve::linear(x.data(), x.dims()[0], dtype_of(x), weight, out.data(), dtype_of(out));
  return {out};
}

std::vector<Tensor> embedding(const Tensor& ids, const Tensor& panels, int64_t format, int64_t vocab, int64_t hidden,
                              bool to_bfloat16) {
  const auto* id = data_of<int32_t>(ids, DataType::INT32, "embedding: ids must be int32");
  for (int64_t t = 0; t < ids.numel(); ++t) require(id[t] >= 0 && id[t] < vocab, "embedding: an id is out of range");
  require(format != static_cast<int64_t>(Format::kW8a8), "embedding: a table cannot be w8a8");
  Tensor out = make({ids.numel(), hidden}, to_bfloat16 ? DataType::BFLOAT16 : DataType::FLOAT32);
  const Matrix table = matrix_of(panels, format, vocab, hidden, out.dtype());
  if (out.numel() > 0) fdserve::embedding(id, ids.numel(), table, dtype_of(out), out.data());
  return {out};
}

std::vector<Tensor> norm(const Tensor& x, const Tensor* residual, const Tensor& weight, float eps) {
  require(x.dims().size() == 2 && weight.numel() == x.dims()[1], "rms_norm: x must be [T, H] and weight [H]");
  require(x.dtype() == weight.dtype(), "rms_norm: x and weight must have the same dtype");
  require(residual == nullptr || (residual->dims() == x.dims() && residual->dtype() == x.dtype()),
          "add_rms_norm: the residual must be like x");
  std::vector<Tensor> out = {make({x.dims()[0], x.dims()[1]}, x.dtype())};
  if (residual != nullptr) out.push_back(make({x.dims()[0], x.dims()[1]}, x.dtype()));
  if (x.numel() > 0)
    fdserve::rms_norm(x.data(), residual != nullptr ? residual->data() : nullptr, weight.data(), eps, x.dims()[0],
                      x.dims()[1], dtype_of(x), out[0].data(), residual != nullptr ? out[1].data() : nullptr);
  return out;
}

std::vector<Tensor> rms_norm(const Tensor& x, const Tensor& weight, float eps) { return norm(x, nullptr, weight, eps); }

std::vector<Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps) {
  return norm(x, &residual, weight, eps);
}

std::vector<Tensor> swiglu(const Tensor& x) {
  require(x.dims().size() == 2 && x.dims()[1] % 2 == 0, "swiglu: x must be [T, 2I]");
  Tensor out = make({x.dims()[0], x.dims()[1] / 2}, x.dtype());
  if (out.numel() > 0) fdserve::swiglu(x.data(), x.dims()[0], x.dims()[1] / 2, dtype_of(x), out.data());
  return {out};
}

std::vector<Tensor> moe(const Tensor& x, const Tensor& gate, const Tensor& correction_bias, const Tensor& up_gate,
                        const Tensor& down, const paddle::optional<Tensor>& shared, int64_t format, int64_t inner,
                        int64_t top_k, float norm_min) {
  require(x.dims().size() == 2 && gate.dims().size() == 2 && gate.dims()[1] == x.dims()[1],
          "moe: x must be [T, H] and gate [E, H]");
  const int64_t experts = gate.dims()[0];
  require(correction_bias.numel() == experts && up_gate.dims()[0] == experts && down.dims()[0] == experts,
          "moe: gate, correction_bias, up_gate and down must have as many experts");
  require(top_k > 0 && top_k <= experts, "moe: top_k must be between 1 and the number of experts");
  const int64_t hidden = x.dims()[1];
  require(!shared || (shared->dims() == x.dims() && shared->dtype() == x.dtype()), "moe: shared must be like x");
  Tensor out = make({x.dims()[0], x.dims()[1]}, x.dtype());
  if (x.numel() > 0)
    fdserve::moe({dtype_of(x), x.dims()[0], x.dims()[1], inner, experts, top_k, norm_min, x.data(),
                  data_of<float>(gate, DataType::FLOAT32, "moe: gate must be float32"),
                  data_of<float>(correction_bias, DataType::FLOAT32, "moe: correction_bias must be float32"),
                  matrix_of(up_gate, format, 2 * inner, hidden, x.dtype()),
                  matrix_of(down, format, hidden, inner, x.dtype()), shared ? shared->data() : nullptr, out.data()});
  return {out};
}

void check_offsets(const int32_t* offsets, int64_t rows, int64_t total) {
  require(offsets[0] == 0 && offsets[rows] == total, "sample: offsets must run from 0 to the length of the list");
  for (int64_t r = 0; r < rows; ++r) require(offsets[r] <= offsets[r + 1], "sample: offsets must ascend");
}

std::vector<Tensor> sample(const Tensor& logits, const Tensor& float_params, const Tensor& int_params,
                           const Tensor& history, const Tensor& history_offsets, const Tensor& prompt_lens,
                           const Tensor& bias_ids, const Tensor& bias_values, const Tensor& bias_offsets,
                           const paddle::optional<Tensor>& masks, const paddle::optional<Tensor>& mask_rows,
                           const paddle::optional<Tensor>& logprob_modes, int64_t vocab_size, int64_t num_top) {
  require(logits.dims().size() == 2 && vocab_size > 0 && vocab_size <= logits.dims()[1],
          "sample: logits must be [R, V] with V at least vocab_size");
  const int64_t rows = logits.dims()[0];
  require(float_params.numel() == rows * 6 && int_params.numel() == rows * 4, "sample: params must be [R, 6] and [R, 4]");
  require(history_offsets.numel() == rows + 1 && prompt_lens.numel() == rows && bias_offsets.numel() == rows + 1,
          "sample: offsets must be [R + 1] and prompt_lens [R]");
  require(bias_ids.numel() == bias_values.numel(), "sample: bias_ids and bias_values must be as long");
  require(num_top >= 0 && num_top <= vocab_size, "sample: num_top must be between 0 and vocab_size");
  require(!masks == !mask_rows, "sample: masks and mask_rows go together");
  if (masks) {
    require(masks->dims().size() == 2 && masks->dims()[1] >= (vocab_size + 31) / 32 && mask_rows->numel() == rows,
            "sample: masks must be [M, at least vocab_size / 32] and mask_rows [R]");
    const int32_t* each = data_of<int32_t>(*mask_rows, DataType::INT32, "sample: mask_rows must be int32");
    for (int64_t r = 0; r < rows; ++r) require(each[r] < masks->dims()[0], "sample: mask_rows must be rows of masks");
  }
  require(!logprob_modes || logprob_modes->numel() == rows, "sample: logprob_modes must be [R]");
  std::vector<Tensor> out = {make({rows}, DataType::INT32), make({rows}, DataType::FLOAT32),
                             make({rows, num_top}, DataType::INT32), make({rows, num_top}, DataType::FLOAT32)};
  if (rows == 0) return out;
  const fdserve::SampleCall call = {
      rows, logits.dims()[1], vocab_size, num_top,
      data_of<float>(logits, DataType::FLOAT32, "sample: logits must be float32"),
      data_of<float>(float_params, DataType::FLOAT32, "sample: float_params must be float32"),
      data_of<int64_t>(int_params, DataType::INT64, "sample: int_params must be int64"),
      data_of<int32_t>(history, DataType::INT32, "sample: history must be int32"),
      data_of<int32_t>(history_offsets, DataType::INT32, "sample: history_offsets must be int32"),
      data_of<int32_t>(prompt_lens, DataType::INT32, "sample: prompt_lens must be int32"),
      data_of<int32_t>(bias_ids, DataType::INT32, "sample: bias_ids must be int32"),
      data_of<float>(bias_values, DataType::FLOAT32, "sample: bias_values must be float32"),
      data_of<int32_t>(bias_offsets, DataType::INT32, "sample: bias_offsets must be int32"),
      masks ? data_of<int32_t>(*masks, DataType::INT32, "sample: masks must be int32") : nullptr,
      masks ? masks->dims()[1] : 0,
      masks ? data_of<int32_t>(*mask_rows, DataType::INT32, "sample: mask_rows must be int32") : nullptr,
      logprob_modes ? data_of<int32_t>(*logprob_modes, DataType::INT32, "sample: logprob_modes must be int32") : nullptr,
      out[0].data<int32_t>(), out[1].data<float>(),
      num_top > 0 ? out[2].data<int32_t>() : nullptr, num_top > 0 ? out[3].data<float>() : nullptr};
  check_offsets(call.history_offsets, rows, history.numel());
  check_offsets(call.bias_offsets, rows, bias_ids.numel());
  fdserve::sample(call);
  return out;
}

}  // namespace

PD_BUILD_OP(fdserve_linear)
    .Inputs({"x", "panels"})
    .Outputs({"out"})
    .Attrs({"format: int64_t", "n: int64_t", "k: int64_t", "to_float: bool"})
    .SetKernelFn(PD_KERNEL(Guarded<linear>::call));

PD_BUILD_OP(fdserve_embedding)
    .Inputs({"ids", "panels"})
    .Outputs({"out"})
    .Attrs({"format: int64_t", "vocab: int64_t", "hidden: int64_t", "to_bfloat16: bool"})
    .SetKernelFn(PD_KERNEL(Guarded<embedding>::call));

PD_BUILD_OP(fdserve_rms_norm)
    .Inputs({"x", "weight"})
    .Outputs({"out"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(Guarded<rms_norm>::call));

PD_BUILD_OP(fdserve_add_rms_norm)
    .Inputs({"x", "residual", "weight"})
    .Outputs({"out", "total"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(Guarded<add_rms_norm>::call));

PD_BUILD_OP(fdserve_swiglu).Inputs({"x"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(Guarded<swiglu>::call));

PD_BUILD_OP(fdserve_moe)
    .Inputs({"x", "gate", "correction_bias", "up_gate", "down", paddle::Optional("shared")})
    .Outputs({"out"})
    .Attrs({"format: int64_t", "inner: int64_t", "top_k: int64_t", "norm_min: float"})
    .SetKernelFn(PD_KERNEL(Guarded<moe>::call));

PD_BUILD_OP(fdserve_sample)
    .Inputs({"logits", "float_params", "int_params", "history", "history_offsets", "prompt_lens", "bias_ids",
             "bias_values", "bias_offsets", paddle::Optional("masks"), paddle::Optional("mask_rows"),
             paddle::Optional("logprob_modes")})
    .Outputs({"tokens", "logprobs", "top_ids", "top_logprobs"})
    .Attrs({"vocab_size: int64_t", "num_top: int64_t"})
    .SetKernelFn(PD_KERNEL(Guarded<sample>::call));
