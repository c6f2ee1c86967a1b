// Sampling as Paddle custom ops, alone and step by step over ranks that share the vocabulary: see bindings.cc.
#include "bindings.h"

namespace {

using namespace fdserve::cuda::bindings;
using MaybeTensor = paddle::optional<Tensor>;

// What every op of this file takes, as parameters and as arguments.
#define FDSERVE_SAMPLED                                                                                              \
  const Tensor &logits, const Tensor &float_params, const Tensor &int_params, const Tensor &history,                 \
      const Tensor &history_offsets, const Tensor &prompt_lens, const Tensor &bias_ids, const Tensor &bias_values,   \
      const Tensor &bias_offsets, const MaybeTensor &masks, const MaybeTensor &mask_rows, const MaybeTensor &logprob_modes
#define FDSERVE_SAMPLED_NAMES                                                                                        \
  logits, float_params, int_params, history, history_offsets, prompt_lens, bias_ids, bias_values, bias_offsets, masks, \
      mask_rows, logprob_modes
#define FDSERVE_SAMPLED_INPUTS                                                                                       \
  "logits", "float_params", "int_params", "history", "history_offsets", "prompt_lens", "bias_ids", "bias_values",    \
      "bias_offsets", paddle::Optional("masks"), paddle::Optional("mask_rows"), paddle::Optional("logprob_modes")
#define FDSERVE_SHARES "vocab_size: int64_t", "num_top: int64_t", "rank: int", "starts: std::vector<int64_t>"

// The launchers' structure; its results are set by `with_results`.
FdserveSample call_of(FDSERVE_SAMPLED, int64_t vocab_size, int64_t num_top) {
  require(logits.shape().size() == 2 && vocab_size > 0, "sample: logits must be [R, V]");
  constexpr const char* KIND = "sample: ids, offsets and modes must be int32, int_params int64 and all else float32";
  const auto ints = [&](const Tensor& x) { return data_of<int>(x, DataType::INT32, KIND); };
  const auto floats = [&](const Tensor& x) { return data_of<float>(x, DataType::FLOAT32, KIND); };
  return {floats(logits), floats(float_params), data_of<int64_t>(int_params, DataType::INT64, KIND), ints(history),
          ints(history_offsets), ints(prompt_lens), ints(bias_ids), floats(bias_values), ints(bias_offsets),
          masks ? ints(*masks) : nullptr, mask_rows ? ints(*mask_rows) : nullptr,
          logprob_modes ? ints(*logprob_modes) : nullptr, nullptr, nullptr, nullptr, nullptr, logits.shape()[0],
          logits.shape()[1], vocab_size, masks ? masks->shape()[1] : 0, num_top, 0};
}

// Tensors for the results, which the call then points at: tokens, logprobs, top ids, top logprobs.
std::vector<Tensor> with_results(FdserveSample& call, const Tensor& beside) {
  const std::vector<int64_t> row = {call.rows}, top = {call.rows, call.num_top};
  std::vector<Tensor> out = {make(row, DataType::INT32, beside), make(row, DataType::FLOAT32, beside),
                             make(top, DataType::INT32, beside), make(top, DataType::FLOAT32, beside)};
  if (call.rows == 0) return out;
  call.tokens = out[0].data<int>(), call.logprobs = out[1].data<float>();
  if (call.num_top > 0) call.top_ids = out[2].data<int>(), call.top_logprobs = out[3].data<float>();
  return out;
}

std::vector<Tensor> sample(FDSERVE_SAMPLED, int64_t vocab_size, int64_t num_top) {
  FdserveSample call = call_of(FDSERVE_SAMPLED_NAMES, vocab_size, num_top);
  require(vocab_size <= call.stride, "sample: logits must be [R, V] with V at least vocab_size");
  std::vector<Tensor> out = with_results(call, logits);
  if (call.rows == 0) return out;
  Tensor workspace = make({fdserve_cuda_sample_workspace(&call)}, DataType::UINT8, logits);
  check(fdserve_cuda_sample(&call, workspace.data(), stream_of(logits)), "sample");
  return out;
}

FdserveRanks ranks_of(int rank, const std::vector<int64_t>& starts) {
  require(starts.size() >= 2 && starts.size() <= FDSERVE_MAX_RANKS + 1, "sample: there are 16 ranks at most");
  FdserveRanks ranks = {};
  ranks.rank = rank;
  ranks.ranks = static_cast<int>(starts.size()) - 1;
  for (size_t i = 0; i < starts.size(); ++i) ranks.starts[i] = static_cast<int>(starts[i]);
  return ranks;
}

FdserveSampleSizes sizes_of(const FdserveSample& call, const FdserveRanks& ranks) {
  require(call.stride >= ranks.starts[ranks.rank + 1] - ranks.starts[ranks.rank], "sample: logits must be this rank's columns");
  FdserveSampleSizes sizes;
  fdserve_cuda_sample_sizes(&call, &ranks, &sizes);
  return sizes;
}

// What all ranks have written, of so many bytes a row.
const void* gathered(const Tensor& x, const FdserveSample& call, const FdserveRanks& ranks, int64_t bytes) {
  require(x.dtype() == DataType::UINT8 && x.numel() == ranks.ranks * call.rows * bytes,
          "sample: what is gathered must be uint8 [ranks, R, bytes]");
  return content_of(x);
}

std::vector<Tensor> offer(FDSERVE_SAMPLED, int64_t vocab_size, int64_t num_top, int rank, const std::vector<int64_t>& starts) {
  const FdserveSample call = call_of(FDSERVE_SAMPLED_NAMES, vocab_size, num_top);
  FdserveRanks ranks = ranks_of(rank, starts);
  const FdserveSampleSizes sizes = sizes_of(call, ranks);
  Tensor offered = make({call.rows, sizes.offered}, DataType::UINT8, logits);
  Tensor workspace = make({sizes.workspace}, DataType::UINT8, logits);
  ranks.workspace = workspace.data();
  check(fdserve_cuda_sample_offer(&call, &ranks, offered.data(), stream_of(logits)), "sample_offer");
  return {offered, workspace};
}

std::vector<Tensor> weigh(FDSERVE_SAMPLED, const Tensor& workspace, const Tensor& offered, int64_t vocab_size, int64_t num_top,
                          int rank, const std::vector<int64_t>& starts) {
  const FdserveSample call = call_of(FDSERVE_SAMPLED_NAMES, vocab_size, num_top);
  FdserveRanks ranks = ranks_of(rank, starts);
  const FdserveSampleSizes sizes = sizes_of(call, ranks);
  ranks.workspace = const_cast<void*>(workspace.data());
  ranks.offered = gathered(offered, call, ranks, sizes.offered);
  Tensor weighed = make({call.rows, sizes.weighed}, DataType::UINT8, logits);
  check(fdserve_cuda_sample_weigh(&call, &ranks, weighed.data(), stream_of(logits)), "sample_weigh");
  return {weighed};
}

std::vector<Tensor> settle(FDSERVE_SAMPLED, const Tensor& workspace, const Tensor& offered, const Tensor& weighed,
                           int64_t vocab_size, int64_t num_top, int rank, const std::vector<int64_t>& starts) {
  const FdserveSample call = call_of(FDSERVE_SAMPLED_NAMES, vocab_size, num_top);
  FdserveRanks ranks = ranks_of(rank, starts);
  const FdserveSampleSizes sizes = sizes_of(call, ranks);
  ranks.workspace = const_cast<void*>(workspace.data());
  ranks.offered = gathered(offered, call, ranks, sizes.offered);
  ranks.weighed = gathered(weighed, call, ranks, sizes.weighed);
  Tensor settled = make({call.rows, sizes.settled}, DataType::UINT8, logits);
  check(fdserve_cuda_sample_settle(&call, &ranks, settled.data(), stream_of(logits)), "sample_settle");
  return {settled};
}

std::vector<Tensor> finish(FDSERVE_SAMPLED, const Tensor& workspace, const Tensor& offered, const MaybeTensor& weighed,
                           const MaybeTensor& settled, int64_t vocab_size, int64_t num_top, int rank,
                           const std::vector<int64_t>& starts) {
  require(!weighed == !settled, "sample: weighed and settled go together");
  FdserveSample call = call_of(FDSERVE_SAMPLED_NAMES, vocab_size, num_top);
  FdserveRanks ranks = ranks_of(rank, starts);
  const FdserveSampleSizes sizes = sizes_of(call, ranks);
  ranks.workspace = const_cast<void*>(workspace.data());
  ranks.offered = gathered(offered, call, ranks, sizes.offered);
  if (weighed) ranks.weighed = gathered(*weighed, call, ranks, sizes.weighed);
  if (settled) ranks.settled = gathered(*settled, call, ranks, sizes.settled);
  std::vector<Tensor> out = with_results(call, logits);
  check(fdserve_cuda_sample_finish(&call, &ranks, stream_of(logits)), "sample_finish");
  return out;
}

}  // namespace

PD_BUILD_OP(fdserve_sample)
    .Inputs({FDSERVE_SAMPLED_INPUTS})
    .Outputs({"tokens", "logprobs", "top_ids", "top_logprobs"})
    .Attrs({"vocab_size: int64_t", "num_top: int64_t"})
    .SetKernelFn(PD_KERNEL(sample));

PD_BUILD_OP(fdserve_sample_offer)
    .Inputs({FDSERVE_SAMPLED_INPUTS})
    .Outputs({"offered", "workspace"})
    .Attrs({FDSERVE_SHARES})
    .SetKernelFn(PD_KERNEL(offer));

PD_BUILD_OP(fdserve_sample_weigh)
    .Inputs({FDSERVE_SAMPLED_INPUTS, "workspace", "offered"})
    .Outputs({"weighed"})
    .Attrs({FDSERVE_SHARES})
    .SetKernelFn(PD_KERNEL(weigh));

PD_BUILD_OP(fdserve_sample_settle)
    .Inputs({FDSERVE_SAMPLED_INPUTS, "workspace", "offered", "weighed"})
    .Outputs({"settled"})
    .Attrs({FDSERVE_SHARES})
    .SetKernelFn(PD_KERNEL(settle));

PD_BUILD_OP(fdserve_sample_finish)
    .Inputs({FDSERVE_SAMPLED_INPUTS, "workspace", "offered", paddle::Optional("weighed"), paddle::Optional("settled")})
    .Outputs({"tokens", "logprobs", "top_ids", "top_logprobs"})
    .Attrs({FDSERVE_SHARES})
    .SetKernelFn(PD_KERNEL(finish));
