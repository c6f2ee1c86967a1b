// Sampling as a Paddle custom op, alone and over ranks that share the vocabulary: see bindings.cc for what such a file does.
#include "bindings_shared.h"
#include "sample_ranks.h"

namespace {

using namespace fdserve::bindings;
using fdserve::Shared;

void check_offsets(const int32_t* offsets, int64_t rows, int64_t total) {
  require(offsets[0] == 0 && offsets[rows] == total, "sample: offsets must run from 0 to the length of the list");
  for (int64_t r = 0; r < rows; ++r) require(offsets[r] <= offsets[r + 1], "sample: offsets must ascend");
}

std::vector<Tensor> sample(const Tensor& logits, const Tensor& float_params, const Tensor& int_params,
                           const Tensor& history, const Tensor& history_offsets, const Tensor& prompt_lens,
                           const Tensor& bias_ids, const Tensor& bias_values, const Tensor& bias_offsets,
                           const paddle::optional<Tensor>& masks, const paddle::optional<Tensor>& mask_rows,
                           const paddle::optional<Tensor>& logprob_modes, int64_t vocab_size, int64_t num_top,
                           int64_t memory, int64_t slot_bytes, int rank, int ranks, const std::vector<int>& peers,
                           int64_t exchange, const std::vector<int64_t>& starts) {
  const bool alone = ranks == 1;
  require(logits.dims().size() == 2 && vocab_size > 0 && (!alone || vocab_size <= logits.dims()[1]),
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
      0,
      out[0].data<int32_t>(), out[1].data<float>(),
      num_top > 0 ? out[2].data<int32_t>() : nullptr, num_top > 0 ? out[3].data<float>() : nullptr};
  check_offsets(call.history_offsets, rows, history.numel());
  check_offsets(call.bias_offsets, rows, bias_ids.numel());
  if (alone) {
    fdserve::sample(call);
    return out;
  }
  const Shared shared = shared_of(memory, slot_bytes, rank, ranks, peers, exchange);
  require(static_cast<int>(starts.size()) == ranks + 1 && starts[0] == 0 && starts.back() == vocab_size,
          "sample: starts must run from 0 to vocab_size");
  for (int each = 0; each < ranks; ++each) require(starts[each] <= starts[each + 1], "sample: starts must ascend");
  require(starts[rank + 1] - starts[rank] == logits.dims()[1], "sample: logits must be this rank's columns");
  require_peers(fdserve::sample_ranks(call, shared, starts.data()));
  return out;
}

}  // namespace

PD_BUILD_OP(fdserve_sample)
    .Inputs({"logits", "float_params", "int_params", "history", "history_offsets", "prompt_lens", "bias_ids",
             "bias_values", "bias_offsets", paddle::Optional("masks"), paddle::Optional("mask_rows"),
             paddle::Optional("logprob_modes")})
    .Outputs({"tokens", "logprobs", "top_ids", "top_logprobs"})
    .Attrs({"vocab_size: int64_t", "num_top: int64_t", FDSERVE_SHARED, "starts: std::vector<int64_t>"})
    .SetKernelFn(PD_KERNEL(Guarded<sample>::call));
