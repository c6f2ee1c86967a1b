// The all-reduce as a Paddle custom op: see bindings.cc for what such a file does.
#include "bindings_shared.h"

namespace {

using namespace fdserve::bindings;
using fdserve::Shared;

std::vector<Tensor> all_reduce(const Tensor& x, int64_t memory, int64_t slot_bytes, int rank, int ranks,
                               const std::vector<int>& peers, int64_t exchange) {
  const bool is_float = x.dtype() == DataType::FLOAT32;
  require(is_float || x.dtype() == DataType::BFLOAT16, "all_reduce: x must be bfloat16 or float32");
  const Shared shared = shared_of(memory, slot_bytes, rank, ranks, peers, exchange);
  Tensor out = paddle::empty(x.shape(), x.dtype(), paddle::CPUPlace());
  const Dtype dtype = is_float ? Dtype::kFloat32 : Dtype::kBfloat16;
  require_peers(fdserve::all_reduce(shared, x.data(), x.numel(), dtype, out.data()));
  return {out};
}

}  // namespace

PD_BUILD_OP(fdserve_all_reduce)
    .Inputs({"x"})
    .Outputs({"out"})
    .Attrs({FDSERVE_SHARED})
    .SetKernelFn(PD_KERNEL(Guarded<all_reduce>::call));
