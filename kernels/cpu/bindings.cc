// The operators as Paddle custom ops: checks, output tensors, and a call of the framework-free functions in kernels.h.
// Only the bindings include Paddle's headers. Ops are called eagerly, so no shape inference is declared.
#include "bindings.h"

namespace {

using namespace fdserve::bindings;

std::vector<Tensor> linear(const Tensor& x, const Tensor& panels, int64_t format, int64_t n, int64_t k, bool to_float) {
  require(x.dims().size() == 2 && x.dims()[1] == k, "linear: x must be [T, in_features]");
  const Matrix weight = matrix_of(panels, format, n, k, x.dtype());
  Tensor out = make_large({x.dims()[0], n}, to_float ? DataType::FLOAT32 : x.dtype());
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
  if (out.numel() > 0) fdserve::embedding(id, ids.numel(), 0, table, dtype_of(out), out.data());
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
  require(x.dims().size() == 2, "moe: x must be [T, H] and gate [E, H]");
  require(!shared || (shared->dims() == x.dims() && shared->dtype() == x.dtype()), "moe: shared must be like x");
  const Experts experts =
      experts_of(gate, correction_bias, up_gate, down, format, x.dims()[1], inner, top_k, norm_min, x.dtype());
  Tensor out = make({x.dims()[0], x.dims()[1]}, x.dtype());
  if (x.numel() > 0)
    fdserve::moe({dtype_of(x), x.dims()[0], experts, x.data(), shared ? shared->data() : nullptr, out.data()});
  return {out};
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
