// The collectives as Paddle custom ops: see bindings.cc for what such a file does.
#include <stdexcept>
#include <string>
#include <vector>

#include "collectives.h"
#include "paddle/common/enforce.h"
#include "paddle/phi/api/all.h"

namespace {

using fdserve::Dtype;
using fdserve::Shared;
using paddle::Tensor;

// `memory` is an address in this process.
Shared shared_of(int64_t memory, int64_t slot_bytes, int rank, int ranks, const std::vector<int>& peers) {
  if (memory == 0 || ranks < 1 || rank < 0 || rank >= ranks) PADDLE_THROW(common::errors::InvalidArgument("bad ranks"));
  return {reinterpret_cast<void*>(memory), slot_bytes, rank, ranks, peers.data(), static_cast<int>(peers.size())};
}

// Runs a collective; the exceptions are of Paddle's kinds, others would abort.
template <class Run>
void guarded(Run run) {
  try {
    if (!run()) PADDLE_THROW(common::errors::Unavailable("a rank that it computes with is gone"));
  } catch (const std::invalid_argument& error) {
    PADDLE_THROW(common::errors::InvalidArgument("%s", error.what()));
  }
}

std::vector<Tensor> all_reduce(const Tensor& x, int64_t memory, int64_t slot_bytes, int rank, int ranks,
                               const std::vector<int>& peers, int64_t turn) {
  const bool is_float = x.dtype() == paddle::DataType::FLOAT32;
  if (!is_float && x.dtype() != paddle::DataType::BFLOAT16)
    PADDLE_THROW(common::errors::InvalidArgument("all_reduce: x must be bfloat16 or float32"));
  const Shared shared = shared_of(memory, slot_bytes, rank, ranks, peers);
  Tensor out = paddle::empty(x.shape(), x.dtype(), paddle::CPUPlace());
  guarded([&] {
    return fdserve::all_reduce(shared, static_cast<uint32_t>(turn), x.data(), x.numel(),
                               is_float ? Dtype::kFloat32 : Dtype::kBfloat16, out.data());
  });
  return {out};
}

std::vector<Tensor> all_gather(const Tensor& x, int64_t memory, int64_t slot_bytes, int rank, int ranks,
                               const std::vector<int>& peers, int64_t turn) {
  if (x.shape().size() != 2) PADDLE_THROW(common::errors::InvalidArgument("all_gather: x must be [rows, columns]"));
  const Shared shared = shared_of(memory, slot_bytes, rank, ranks, peers);
  const int64_t rows = x.shape()[0], columns = x.shape()[1];
  Tensor out = paddle::empty({rows, ranks * columns}, x.dtype(), paddle::CPUPlace());
  guarded([&] {
    return fdserve::all_gather(shared, static_cast<uint32_t>(turn), x.data(), rows,
                               columns * static_cast<int64_t>(phi::SizeOf(x.dtype())), out.data());
  });
  return {out};
}

}  // namespace

#define FDSERVE_SHARED \
  "memory: int64_t", "slot_bytes: int64_t", "rank: int", "ranks: int", "peers: std::vector<int>", "turn: int64_t"

PD_BUILD_OP(fdserve_all_reduce)
    .Inputs({"x"})
    .Outputs({"out"})
    .Attrs({FDSERVE_SHARED})
    .SetKernelFn(PD_KERNEL(all_reduce));

PD_BUILD_OP(fdserve_all_gather)
    .Inputs({"x"})
    .Outputs({"out"})
    .Attrs({FDSERVE_SHARED})
    .SetKernelFn(PD_KERNEL(all_gather));
