// The CUDA kernels as functions: raw device pointers, sizes and a stream. They return at once with cudaSuccess or the
// launch's error. Nothing here knows a framework; tests/cuda/ calls them straight from a shared library.
//
// `Dtype` is that of all 16-bit tensors of a call. Every tensor is dense, row-major and 16-byte aligned. T, R and S may be 0.
#pragma once

#include <cstdint>

#ifdef FDSERVE_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

#define FDSERVE_EXPORT extern "C" __attribute__((visibility("default")))

enum FdserveDtype : int { FDSERVE_BF16 = 0, FDSERVE_FP16 = 1 };

// out[T][H] = rms_norm(total) * weight[H] with total = x (+ residual, which may be null); total is stored where `total` is
// not null. H is a multiple of 8.
FDSERVE_EXPORT cudaError_t fdserve_cuda_rms_norm(const void* x, const void* residual, const void* weight, float eps,
                                                 int64_t tokens, int64_t hidden, int dtype, void* out, void* total,
                                                 cudaStream_t stream);

// out[T][I] = silu(x[:, :I]) * x[:, I:] for x[T][2 I]; I is a multiple of 8.
FDSERVE_EXPORT cudaError_t fdserve_cuda_swiglu(const void* x, int64_t tokens, int64_t inner, int dtype, void* out,
                                               cudaStream_t stream);

// out[size] = the sum of parts[ranks][size], added in float32 in the order of ranks and rounded once; a multiple of 8.
FDSERVE_EXPORT cudaError_t fdserve_cuda_sum_ranks(const void* parts, int ranks, int64_t size, int dtype, void* out,
                                                  cudaStream_t stream);

// The sequences of a step in a paged cache; device pointers.
struct FdservePaged {
  const int* block_tables;  // [S][table_width]
  const int* query_starts;  // [S + 1]: the step's tokens of sequence s are query_starts[s] to query_starts[s + 1]
  const int* context_lens;  // [S]: tokens that the cache held before
  int sequences, table_width, block_size, kv_heads;
};

// qkv[T][heads + 2 kv_heads][head_dim]: queries and keys rotated in interleaved pairs by rope[T][head_dim] (cosines in the
// first half, sines in the second), queries into q[T][heads][head_dim], keys and values into the caches
// [num_blocks][kv_heads][block_size][head_dim].
FDSERVE_EXPORT cudaError_t fdserve_cuda_rope_and_store(const void* qkv, const float* rope, const FdservePaged* paged,
                                                       int64_t tokens, int64_t heads, int64_t head_dim, int dtype, void* q,
                                                       void* k_cache, void* v_cache, cudaStream_t stream);

// Bytes of the workspace that `fdserve_cuda_attention` should have on a device of so many multiprocessors; 0: none.
// `longest` bounds the sequences' tokens, the step's included, and `max_query_len` the step's tokens of one sequence.
FDSERVE_EXPORT int64_t fdserve_cuda_attention_workspace(int64_t sequences, int64_t tokens, int64_t max_query_len,
                                                        int64_t longest, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                                        int multiprocessors);

// out[T][heads][head_dim] = causal attention of q over the caches; head_dim is 64 or 128, heads a multiple of kv_heads.
// With a workspace of the size above for the same arguments, keys are shared out among blocks; the result is the same.
FDSERVE_EXPORT cudaError_t fdserve_cuda_attention(const void* q, const void* k_cache, const void* v_cache,
                                                  const FdservePaged* paged, int64_t tokens, int64_t max_query_len,
                                                  int64_t longest, int64_t heads, int64_t head_dim, float scale, int dtype,
                                                  void* out, float* workspace, int multiprocessors, cudaStream_t stream);

// out[T][N], 16-bit or float32, = x[T][K] times W[N][K]: signed 8-bit integers, or 4-bit ones, two in a byte with the lower
// half first and 8 for zero, times scales[N][K / group]. K is a multiple of `group`, and that of 64.
FDSERVE_EXPORT cudaError_t fdserve_cuda_quant_linear(const void* x, int64_t tokens, const void* weight, const float* scales,
                                                     int bits, int group, int64_t in_features, int64_t out_features,
                                                     int dtype, int to_float, void* out, cudaStream_t stream);

// A mixture-of-experts layer; at most 256 experts and 16 choices. `hidden` and `inner` are multiples of 8, and of `group`
// where the experts are integers.
struct FdserveMoe {
  const void* x;                 // [T][hidden]
  const float* gate;             // [experts][hidden]
  const float* correction_bias;  // [experts]
  const void* up_gate;           // [experts][2 inner][hidden], the gate's rows first
  const void* down;              // [experts][hidden][inner]
  const float* up_gate_scales;   // of `bits` 8 or 4, as for quant_linear; null with 16
  const float* down_scales;
  const void* shared;            // [T][hidden], added last; may be null
  void* out;                     // [T][hidden]
  int64_t tokens, hidden, inner, experts, top_k;
  int bits, group;
  float norm_min;
};
FDSERVE_EXPORT int64_t fdserve_cuda_moe_workspace(const FdserveMoe* call);
FDSERVE_EXPORT cudaError_t fdserve_cuda_moe(const FdserveMoe* call, int dtype, void* workspace, cudaStream_t stream);

// Choosing one token a row; the meaning of every field is that of fdserve.ops.sample. At most 64 top log-probabilities.
struct FdserveSample {
  const float* logits;            // [rows][stride], ids from vocab_size on left out
  const float* float_params;      // [rows][6]
  const int64_t* int_params;      // [rows][4]
  const int* history;             // with history_offsets [rows + 1] and prompt_lens [rows]
  const int *history_offsets, *prompt_lens;
  const int* bias_ids;            // with bias_values and bias_offsets [rows + 1]
  const float* bias_values;
  const int* bias_offsets;
  const int* masks;               // [..][mask_words], or null
  const int* mask_rows;           // [rows]
  const int* logprob_modes;       // [rows], or null
  int* tokens;                    // [rows]
  float* logprobs;                // [rows]
  int* top_ids;                   // [rows][num_top]
  float* top_logprobs;            // [rows][num_top]
  int64_t rows, stride, vocab_size, mask_words, num_top;
  int64_t first_id;               // of the logits; 0 where they are whole
};
FDSERVE_EXPORT int64_t fdserve_cuda_sample_workspace(const FdserveSample* call);
FDSERVE_EXPORT cudaError_t fdserve_cuda_sample(const FdserveSample* call, void* workspace, cudaStream_t stream);

// The same by ranks that share the vocabulary out: rank r has the columns starts[r] to starts[r + 1], starts being multiples
// of 1024 but for the last, and calls with its own logits and otherwise equal arguments. Four steps in order; what offer,
// weigh and settle write, [rows][bytes], is gathered, [ranks][rows][bytes], before the next. finish may follow offer at once,
// weighed and settled being null: rows that are greedy and tell no log-probabilities need no more. Token -3: the row is to be
// sampled from whole logits.
constexpr int FDSERVE_MAX_RANKS = 16;  // their candidates fill the shared memory of a block on every architecture
struct FdserveRanks {
  const void *offered, *weighed, *settled;  // as gathered
  void* workspace;                          // the same in all steps
  int rank, ranks;
  int starts[FDSERVE_MAX_RANKS + 1];
};
struct FdserveSampleSizes {
  int64_t workspace, offered, weighed, settled;  // bytes, the last three of a row
};
FDSERVE_EXPORT void fdserve_cuda_sample_sizes(const FdserveSample* call, const FdserveRanks* ranks, FdserveSampleSizes* sizes);
FDSERVE_EXPORT cudaError_t fdserve_cuda_sample_offer(const FdserveSample* call, const FdserveRanks* ranks, void* offered,
                                                     cudaStream_t stream);
FDSERVE_EXPORT cudaError_t fdserve_cuda_sample_weigh(const FdserveSample* call, const FdserveRanks* ranks, void* weighed,
                                                     cudaStream_t stream);
FDSERVE_EXPORT cudaError_t fdserve_cuda_sample_settle(const FdserveSample* call, const FdserveRanks* ranks, void* settled,
                                                      cudaStream_t stream);
FDSERVE_EXPORT cudaError_t fdserve_cuda_sample_finish(const FdserveSample* call, const FdserveRanks* ranks, cudaStream_t stream);
