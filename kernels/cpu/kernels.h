// What the drivers (linear.cc, attention.cc, ...) need of each instruction set, and what the bindings need of the drivers.
// Raw pointers and sizes only: nothing here knows a framework.
//
// "E" is the element type: float, or bf16 (uint16_t holding the upper half of a float).
#pragma once

#include <cstdint>

namespace fdserve {

using bf16 = uint16_t;

enum class Dtype { kFloat32, kBfloat16 };
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kBfloat16 ? 2 : 4; }

// How a packed matrix is stored; the layouts are in gemm.h and weight_only.h. kWint8 and kWint4 are integers with a scale
// for each group of inputs of an output, multiplied with activations as they are or as integers of 15 or 8 bits; kW8a8
// has a scale for each output and is multiplied with activations rounded to bytes.
enum class Format { kFloat32, kBfloat16, kWint8, kWint4, kW8a8 };
inline bool is_weight_only(Format format) { return format == Format::kWint8 || format == Format::kWint4; }
inline Format format_of(Dtype dtype) { return dtype == Dtype::kBfloat16 ? Format::kBfloat16 : Format::kFloat32; }

constexpr int64_t PANEL = 64;      // output features in a packed panel
constexpr int64_t CHUNK = 64;      // inputs that integers of a weight-only format are stored by; groups consist of these
constexpr int64_t KEY_GROUP = 16;  // keys stored together
constexpr int64_t KEY_TILE = 64;   // keys scored together, at absolute positions
constexpr int64_t KEY_PART = 512;  // keys between two merges of the softmax state, at absolute positions
constexpr int64_t SPARE_ROWS = 15;  // that a kernel may compute, or read, to fill a tile
constexpr int64_t DOT_ROWS = 4;
constexpr int MAX_HEAD_DIM = 256;

// Inputs that share a scale; the last group of a panel may have fewer. At 4 bits the scale matters more, at 8 the time that
// many rows take to scale the sums of a group.
constexpr int64_t group_inputs(Format format) { return format == Format::kWint4 ? 128 : 512; }

// Bytes of a group of a panel: the scales in bf16, then the integers.
constexpr int64_t group_bytes(Format format) {
  return PANEL * 2 + group_inputs(format) * PANEL / (format == Format::kWint4 ? 2 : 1);
}
inline int64_t groups_of(Format format, int64_t k) { return (k + group_inputs(format) - 1) / group_inputs(format); }
// Of a row as digits: for nibbles second ones have scales of their own, after those of the first.
inline int64_t sum_scales_of(Format format, int64_t k) {
  return groups_of(format, k) * (format == Format::kWint4 ? 2 : 1);
}

// Of a kW8a8 panel, before its integers: the scales in float, then 128 times the sum of each output's integers.
constexpr int64_t W8A8_HEAD_BYTES = PANEL * 8;

// Inputs as the panels hold them: K rounded up, the rest zeros.
inline int64_t padded_inputs(Format format, int64_t k) {
  const int64_t step = format == Format::kFloat32 ? 1 : format == Format::kBfloat16 ? 2 : format == Format::kW8a8 ? 4 : CHUNK;
  return (k + step - 1) / step * step;
}

inline int64_t panel_bytes(Format format, int64_t k) {
  k = padded_inputs(format, k);
  switch (format) {
    case Format::kFloat32: return k * PANEL * 4;
    case Format::kBfloat16: return k * PANEL * 2;
    case Format::kW8a8: return W8A8_HEAD_BYTES + k * PANEL;
    case Format::kWint8: return groups_of(format, k) * PANEL * 2 + k * PANEL;
    default: return groups_of(format, k) * PANEL * 2 + k * PANEL / 2;
  }
}

// A packed matrix [N][K], or several of them one after the other.
struct Matrix {
  const void* panels;
  int64_t n, k;
  Format format;
};

// Of a cache of bytes: dimensions as stored, and the bytes of 16 keys or values of a head.
inline int64_t padded_head(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
inline int64_t byte_group(int64_t head_dim) { return KEY_GROUP * (padded_head(head_dim) + 4); }

// Up to KEY_PART keys of one head, and their values.
struct KeyPart {
  const void* keys[KEY_PART / KEY_GROUP];    // each 16 keys, see attend.h; null past the last key
  const void* values[KEY_PART / KEY_GROUP];
  const void* following[KEY_PART / KEY_GROUP];  // keys that are likely to be wanted next; null past the last
  const void* following_values[KEY_PART / KEY_GROUP];
  bool bytes;  // see cache_bytes.h
};

// The softmax state of `rows` query rows: running maximum, sum of weights, and weighted values [rows][stride].
struct AttendState {
  float *peak, *mass, *values;
};

// What makes a sum over a group out of one of integers: `offset` off, then times `scale`.
struct SumScale {
  float scale;
  int32_t offset;
};

// Rows of activations as the panels of one format want them, `stride` bytes apart; or `tiled`, which is 16 rows by 64 bytes
// one after the other, so that 16 rows take 16 strides. `scales` are of bytes alone, `sum_scales` [rows][groups] of digits (sum_scales_of).
struct Rows {
  const char* data;
  int64_t stride;
  const float* scales = nullptr;
  const SumScale* sum_scales = nullptr;
  int64_t groups = 0;
  bool tiled = false;

  // Those from `row` on; of tiled rows a multiple of 16.
  Rows from(int64_t row) const {
    Rows rest = *this;
    rest.data += row * stride;
    if (scales != nullptr) rest.scales += row;
    if (sum_scales != nullptr) rest.sum_scales += row * groups;
    return rest;
  }
};

// Sums of rows by a panel, [rows][64]: floats, or where there are scales integers, which become
// (sum - offsets[64]) * (row_scales[rows] * scales[64]).
struct Sums {
  const void* at;
  const int32_t* offsets = nullptr;
  const float *scales = nullptr, *row_scales = nullptr;
};

// Takes the sums of the rows from `first` on as soon as they are whole and while they are in the cache; rows may come twice,
// with the same sums.
struct Sink {
  void (*take)(const void* with, Sums sums, int64_t first, int64_t rows);
  const void* with;
};

// The functions of one instruction set for one element type.
struct RowKernels {
  // Rows that one pass of a product takes: cut work at multiples of it.
  int64_t pass_rows;
  // The next 16 rows of x, or `rows` and zeros, as tiles; `bytes` of each, a multiple of 64. Null where rows are best left
  // as they are.
  void (*to_tiles)(const char* x, int64_t stride, int64_t rows, int64_t bytes, char* out);
  // a[rows][depth] x panel of floats, in order of depth, into the sink. `acc` has room for the rows, and for whole tiles
  // where `a` is tiled. `next` is the panel that will be wanted after this one. Null for rows of bf16.
  void (*gemm_floats)(Rows a, int64_t rows, const void* panel, const void* next, int64_t depth, float* acc, Sink sink);
  // The same of a panel of bf16; depth counts pairs, zero-padded. Floats are multiplied by the floats that bf16 are.
  void (*gemm_pairs)(Rows a, int64_t rows, const void* panel, const void* next, int64_t depth, float* acc, Sink sink);
  // acc[rows][64] = a[rows][inputs] x panel, of a weight-only format. After digits there may be read SPARE_ROWS more.
  void (*gemm_groups)(Rows a, int64_t rows, const void* panel, const void* next, Format format, int64_t inputs, float* acc);
  // x[size] as two rows of digits for the above, the larger ones first, each of `size` rounded up to CHUNKs; and
  // sum_scales_of scales. Null where it takes activations as they are.
  void (*to_digits)(const void* x, int64_t size, Format format, char* digits, SumScale* scales);
  // The same of a[rows][4 depth], bytes that are 128 too large times signed ones.
  void (*gemm_bytes)(Rows a, int64_t rows, const void* panel, const void* next, int64_t depth, int32_t* acc, Sink sink);
  // x[size] / scale + 128 rounded into bytes; returns the scale, which makes the largest magnitude 127.
  float (*to_bytes)(const void* x, int64_t size, uint8_t* out);
  void (*rms_norm)(const void* x, const void* residual, const void* weight, float eps, int64_t size, void* out,
                   void* total);
  // x[rows][2 size] into rows of `size`, `stride` bytes apart.
  void (*swiglu)(const void* x, int64_t rows, int64_t size, void* out, int64_t stride);
  // The first `width` columns into rows `stride` bytes apart.
  void (*put)(Sums sums, int64_t rows, int64_t width, void* out, int64_t stride);
  void (*add)(const float* total, const void* shared, int64_t size, void* out);
  // x[heads][head_dim] rotated by rope[head_dim] into out.
  void (*rotate)(const void* x, int64_t heads, int64_t head_dim, const float* rope, void* out);
  // One token's key and value of one head, into lane position % 16 of its group.
  void (*store_key)(const void* key, int64_t head_dim, int64_t lane, void* group);
  void (*store_value)(const void* value, int64_t head_dim, int64_t lane, void* group);
  // The same into a cache of bytes.
  void (*store_key_bytes)(const void* key, int64_t head_dim, int64_t lane, void* group);
  void (*store_value_bytes)(const void* value, int64_t head_dim, int64_t lane, void* group);
  // The state of rows whose query is q[rows][head_dim] over one part alone; row r sees the first `seen[r]` keys of it (none:
  // its mass is 0), no fewer than the row before. After the last row q and the state's values have room for SPARE_ROWS more.
  void (*attend)(const void* q, int64_t rows, int64_t head_dim, const KeyPart& part, const int* seen, float scale,
                 AttendState state, int64_t stride);
};

// Of some elements: the weight of all, from `low` on and from `high` on, and how many are between.
struct Split {
  double all, from_low, from_high;
  int64_t count;
};

// The functions of one instruction set on floats, whatever the element type.
struct FloatKernels {
  void (*axpy)(const float* x, float weight, int64_t size, float* total);
  void (*softmax)(float* x, int64_t size);
  // out[r stride] = x[size] times y[r][size], for up to DOT_ROWS rows.
  void (*dots)(const float* x, const float* y, int64_t rows, int64_t size, float* out, int64_t stride);
  void (*widen)(const bf16* x, int64_t size, float* out);
  // Fold the state `part` into `total`, row by row.
  void (*merge)(AttendState total, AttendState part, int64_t rows, int64_t head_dim, int64_t stride);
  // Divide by the mass: values[rows][stride] becomes the answer.
  void (*finish)(AttendState state, int64_t rows, int64_t head_dim, int64_t stride);
  // A group of a panel, or a whole panel of kW8a8, out of w[inputs][64].
  void (*quantize)(const float* w, Format format, int64_t inputs, void* out);
  // 16 rows of 16 words, `stride` bytes apart, into 16 columns of a panel of words; or of 32 bf16 into those of floats.
  void (*turn)(const char* rows, int64_t stride, int32_t* panel);
  void (*turn_wide)(const char* rows, int64_t stride, int32_t* panel);
  // Largest element and whether there is a NaN.
  float (*peak)(const float* x, int64_t size, bool* has_nan);
  // A weight is exp((x - peak) * inverse), x <= peak, rounded to a multiple of 2^-36, or 1 where `inverse` is 0: its sums
  // over a vocabulary fit a double's 53 bits, so they are exact, and equal in any order and however it is shared out.
  // sums[b] = the weight of the b-th block of SUM_BLOCK elements; `inverse` is not 0.
  void (*exp_sums)(const float* x, int64_t size, float peak, float inverse, double* sums);
  void (*weights)(const float* x, int64_t size, float peak, float inverse, float* out);
  // Elements in [low, high) in order, with room for 16 more; unless null, above[b] is the weight from `high` on of a block
  // and ends[b] where its elements end in `out`.
  Split (*split)(const float* x, int64_t size, float peak, float inverse, float low, float high, double* above, float* out,
                 int32_t* ends);
  // Ids of elements >= threshold, ascending; stops at `capacity`.
  int64_t (*at_least)(const float* x, int64_t size, float threshold, int32_t* ids, int64_t capacity);
  // Sum of the weights (multiples of 2^-36) of the elements >= threshold.
  double (*mass_from)(const float* x, const float* weights, int64_t size, float threshold);
  // Index of the n-th element (from 1) that equals `value`, or `size` if there are fewer.
  int64_t (*nth_equal)(const float* x, int64_t size, float value, int64_t n);
  // -inf where the element's bit (from the lowest of the first word on) is not set.
  void (*allow)(float* x, const uint32_t* bits, int64_t size);
};

constexpr int64_t SUM_BLOCK = 1024;

// Instruction sets, weakest first.
enum Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };
Isa isa();
Isa force_isa(int level);
// Throws std::invalid_argument for bf16 on a CPU without AVX512-BF16.
const RowKernels& row_kernels(Dtype dtype);
const FloatKernels& float_kernels();

// weight[N][K], or [K][N] when in_out, whose rows are `stride` elements apart, into panels.
void pack(void* panels, const void* weight, int64_t n, int64_t k, int64_t stride, Dtype source, Format format,
          bool in_out);

// out[T][N] (out_dtype) = x[T][K] (dtype) times the packed matrix.
void linear(const void* x, int64_t tokens, Dtype dtype, const Matrix& weight, void* out, Dtype out_dtype);
// out[T][K] (dtype) = rows ids[T] - first_id of the packed matrix [N][K], zeros where it has no such row.
void embedding(const int32_t* ids, int64_t tokens, int64_t first_id, const Matrix& table, Dtype dtype, void* out);
void rms_norm(const void* x, const void* residual, const void* weight, float eps, int64_t tokens, int64_t size,
              Dtype dtype, void* out, void* total);
void swiglu(const void* x, int64_t tokens, int64_t size, Dtype dtype, void* out);
// Both of these at once: out[T][N / 2] = swiglu(x[T][K] times the packed matrix), `both` has room for the product.
void linear_swiglu(const void* x, int64_t tokens, Dtype dtype, const Matrix& weight, void* both, void* out);

struct AttentionCall {
  Dtype dtype;
  bool byte_cache;  // the caches are of bytes, see cache_bytes.h, and not of dtype
  int64_t tokens, sequences, blocks_per_sequence;
  int64_t heads, kv_heads, head_dim, block_size;
  const void* qkv;
  void *k_cache, *v_cache;
  const float* rope;
  const int32_t *block_tables, *query_starts, *context_lens;
  void* out;
};
void attention(const AttentionCall& call);

struct Experts {
  int64_t count, top_k;
  float norm_min;
  const float *gate, *correction_bias;  // [count][hidden], [count]
  Matrix up_gate, down;                 // each of all experts
};

struct MoeCall {
  Dtype dtype;
  int64_t tokens;
  Experts experts;
  const void *x, *shared;  // null: nothing is to be added
  void* out;
};
void moe(const MoeCall& call);

struct DecoderLayer {
  const void* input_norm;
  Matrix qkv, o;
  void *k_cache, *v_cache;
  const void* post_norm;
  Matrix gate_up, down;  // with experts the shared ones', and without panels where there are none
  const Experts* experts;  // null: a dense layer
};

struct Shared;

// A model, or a rank's part of it.
struct DecoderModel {
  AttentionCall attention;  // what is the same in every call and layer; the caches are the first layer's
  int64_t count, hidden, vocab_size;
  const DecoderLayer* layers;
  Matrix table, head;  // the embedding and the output head of ids from first_id on
  int64_t first_id;
  const void* norm;
  float eps;
};

struct DecoderCall {
  const DecoderModel* model;
  const int32_t* ids;  // [T]
  int64_t tokens, sequences, blocks_per_sequence, samples;
  const float* rope;
  const int32_t *block_tables, *query_starts, *context_lens, *sample_rows;
  bool logits;           // whether to multiply by the head
  void* out;             // [samples][hidden], or in float [samples][head.n]
  const Shared* shared;  // of ranks that have a part of each matrix, see collectives.h; null: all of it is here
};
// False if a peer is gone.
bool decoder(const DecoderCall& call);

struct SampleCall {
  int64_t rows, vocab_stride, vocab_size, num_top;
  const float *logits, *float_params;
  const int64_t* int_params;
  const int32_t *history, *history_offsets, *prompt_lens, *bias_ids;
  const float* bias_values;
  const int32_t* bias_offsets;
  const int32_t* masks;  // [..][mask_words]; null without
  int64_t mask_words;
  const int32_t* mask_rows;      // null: no row has a mask
  const int32_t* logprob_modes;  // null: all raw
  int64_t first_id;              // of the logits, which may be a part of the vocabulary; ids are of the whole
  int32_t* tokens;
  float* logprobs;
  int32_t* top_ids;
  float* top_logprobs;
};
void sample(const SampleCall& call);

}  // namespace fdserve
