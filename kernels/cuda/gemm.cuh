// One block's tile of a matrix product: BM rows times 128 columns, by 4 warps of 32 columns each, on tensor cores.
//
// The weights are [N][K] row-major, in 16 bits or as 8- or 4-bit integers with a float32 scale for each row and group of
// `group` elements (a multiple of 64). Integers become 16-bit numbers exactly; a group's products are summed before the
// scale is applied, so quantized weights lose nothing on the way. Tiles of 64 along K come by asynchronous copies into three
// buffers; into five where rows are few, for then the time is that of reading weights, often by fewer blocks than there are
// multiprocessors, and four tiles under way are 32 KiB of 8-bit weights. Every element accumulates along K in one order,
// whatever BM and whichever rows are beside it.
#pragma once

#include "device.cuh"

namespace fdserve::cuda {

constexpr int GEMM_WARPS = 4;
constexpr int GEMM_THREADS = GEMM_WARPS * WARP;
constexpr int GEMM_COLUMNS = 128;
constexpr int GEMM_DEPTH = 64;

// The place of a 16-byte chunk in a shared tile whose rows have 64 elements of 16 bits.
__device__ inline int chunk64_at(int row, int chunk) { return row * GEMM_DEPTH + (chunk ^ row % 8) * 8; }

struct Weights {
  const void* data;     // [N][K * BITS / 8] bytes; of 4 bits, the lower half of a byte is the first, 8 stands for 0
  const float* scales;  // [N][K / group], of integers only
  int64_t depth;        // K
  int group;
};

// Four bytes as floats, less what stands for 0. A byte in the last place of 2^23 makes a float of it, which the units that
// convert integers would take four times as long for.
__device__ inline void floats_of(uint32_t bytes, float zero, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(__byte_perm(bytes, 0x4B000000, 0x7440 + i)) - (8388608.0f + zero);
}

// Eight weights as numbers of 16 bits, exactly.
template <class T, int BITS>
__device__ inline uint4 eight_weights(const char* from) {
  float x[8];
  if constexpr (BITS == 8) {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    floats_of(raw.x ^ 0x80808080u, 128.0f, x);
    floats_of(raw.y ^ 0x80808080u, 128.0f, x + 4);
  } else {
    const uint32_t raw = *reinterpret_cast<const uint32_t*>(from);
    float low[4], high[4];
    floats_of(raw & 0x0F0F0F0Fu, 8.0f, low);
    floats_of(raw >> 4 & 0x0F0F0F0Fu, 8.0f, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i * 2] = low[i], x[i * 2 + 1] = high[i];
  }
  return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
}

template <class T, int BM, int BITS>
struct GemmTile {
  static constexpr int ROW_BYTES = GEMM_DEPTH * BITS / 8;  // of a weight row in a stage
  static constexpr int A_BYTES = BM * GEMM_DEPTH * 2, B_BYTES = GEMM_COLUMNS * ROW_BYTES;
  static constexpr int STAGES = BM == 16 ? 5 : 3, STAGE_BYTES = A_BYTES + B_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + (BITS == 16 ? 0 : GEMM_COLUMNS * GEMM_DEPTH * 2);
  // A lane's sums: of rows m * 16 + lane / 4 (+ 8) and columns 32 warp + 8 j + lane % 4 * 2 (+ 1), as of mma's fragments.
  using Sums = float[BM / 16][4][4];

  // sums = rows x columns. `row_of(i)` points at row i of the left side (null: zeros), `column_of(j)` is the weight row of
  // the tile's column j (negative: zeros).
  template <class RowOf, class ColumnOf>
  static __device__ void run(RowOf row_of, ColumnOf column_of, const Weights& w, Sums& sums) {
    char* const shared = dynamic_shared();
    const int steps = static_cast<int>((w.depth + GEMM_DEPTH - 1) / GEMM_DEPTH);
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      if (stage < steps) copy(row_of, column_of, w, stage, shared + stage * STAGE_BYTES);
      commit_copies();
    }
    Sums part = {};
    for (int step = 0; step < steps; ++step) {
      wait_copies<STAGES - 2>();
      __syncthreads();  // the stage has come, and all are done with the one before
      const int ahead = step + STAGES - 1;
      if (ahead < steps) copy(row_of, column_of, w, ahead, shared + ahead % STAGES * STAGE_BYTES);
      commit_copies();
      char* const stage = shared + step % STAGES * STAGE_BYTES;
      const T* a = reinterpret_cast<const T*>(stage);
      if constexpr (BITS == 16) {
        multiply(a, reinterpret_cast<const T*>(stage + A_BYTES), sums);
      } else {
        T* const converted = reinterpret_cast<T*>(shared + STAGES * STAGE_BYTES);
#pragma unroll
        for (int i = threadIdx.x; i < GEMM_COLUMNS * 8; i += GEMM_THREADS) {
          const int row = i / 8, chunk = i % 8;
          *reinterpret_cast<uint4*>(converted + chunk64_at(row, chunk)) =
              eight_weights<T, BITS>(stage + A_BYTES + row * ROW_BYTES + chunk * BITS);
        }
        __syncthreads();
        multiply(a, converted, part);
        if ((step + 1) * GEMM_DEPTH % w.group == 0 || step + 1 == steps)
          scale_into(column_of, w, step * GEMM_DEPTH / w.group, part, sums);
      }
    }
  }

 private:
  template <class RowOf, class ColumnOf>
  static __device__ void copy(RowOf row_of, ColumnOf column_of, const Weights& w, int step, char* stage) {
    const int64_t first = static_cast<int64_t>(step) * GEMM_DEPTH;
    T* const a = reinterpret_cast<T*>(stage);
    for (int i = threadIdx.x; i < BM * 8; i += GEMM_THREADS) {
      const int row = i / 8, chunk = i % 8;
      const T* from = row_of(row);
      const bool there = from != nullptr && first + chunk * 8 < w.depth;
      copy_async_16(a + chunk64_at(row, chunk), there ? static_cast<const void*>(from + first + chunk * 8) : w.data, there);
    }
    char* const b = stage + A_BYTES;
    constexpr int CHUNKS = ROW_BYTES / 16, ELEMENTS = 128 / BITS;
    for (int i = threadIdx.x; i < GEMM_COLUMNS * CHUNKS; i += GEMM_THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const int64_t column = column_of(row), element = first + chunk * ELEMENTS;
      const bool there = column >= 0 && element < w.depth;
      const char* from = static_cast<const char*>(w.data) + (there ? (column * w.depth + element) * BITS / 8 : 0);
      // Integers are read by the thread's own rows in turn: only 16-bit tiles need the permutation that ldmatrix likes.
      char* to = BITS == 16 ? reinterpret_cast<char*>(reinterpret_cast<T*>(b) + chunk64_at(row, chunk))
                            : b + row * ROW_BYTES + chunk * 16;
      copy_async_16(to, from, there);
    }
  }

  static __device__ void multiply(const T* a, const T* b, Sums& sums) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, matrix = lane / 8;
#pragma unroll
    for (int step = 0; step < GEMM_DEPTH / 16; ++step) {
      uint32_t columns[2][4];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        ldmatrix_x4(columns[pair], shared_at(b + chunk64_at(warp * 32 + pair * 16 + matrix / 2 * 8 + lane % 8, step * 2 + matrix % 2)));
#pragma unroll
      for (int m = 0; m < BM / 16; ++m) {
        uint32_t rows[4];
        ldmatrix_x4(rows, shared_at(a + chunk64_at(m * 16 + lane % 16, step * 2 + lane / 16)));
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma_16816<T>(sums[m][j], rows, {columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]});
      }
    }
  }

  template <class ColumnOf>
  static __device__ void scale_into(ColumnOf column_of, const Weights& w, int group, Sums& part, Sums& sums) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int64_t groups = (w.depth + w.group - 1) / w.group;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t column = column_of(warp * 32 + j * 8 + lane % 4 * 2 + i);
        const float scale = column >= 0 ? w.scales[column * groups + group] : 0.0f;
#pragma unroll
        for (int m = 0; m < BM / 16; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            sums[m][j][half * 2 + i] = __fmaf_rn(part[m][j][half * 2 + i], scale, sums[m][j][half * 2 + i]);
            part[m][j][half * 2 + i] = 0.0f;
          }
      }
  }
};

}  // namespace fdserve::cuda
