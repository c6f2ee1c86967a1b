// What a wide kernel of attention does at the end of a part of the keys.
#pragma once

#include "attention_tasks.cuh"

namespace fdserve::cuda {

// A lane's share of the merged parts of two rows (group and group + 8). The values wait in memory while a part is computed
// on: there are no registers for them, nor shared memory.
template <class T, int HD>
struct Totals {
  float peak[2] = {NONE, NONE}, mass[2] = {0.0f, 0.0f};
  volatile float values[HD / 8 * 4];

  // Row `row` of the task, this lane's `half`: the part goes to the workspace where parts are shared out among blocks, is
  // merged with those before otherwise, and the last then written to `out`.
  __device__ void end_part(const Task& task, const Call& call, int part, int row, int half, const Softmax& state,
                           const float (&sums)[HD / 8][4], T* out) {
    const int column = threadIdx.x % 4 * 2;
    const float part_mass = total_mass(state.mass[half]);
    if (call.plan.wide > 1) {
      if (row >= task.rows) return;
      float* to = wide_part(call, task.place(row, call), part);
#pragma unroll
      for (int j = 0; j < HD / 8; ++j)
        *reinterpret_cast<float2*>(to + j * 8 + column) = make_float2(sums[j][half * 2], sums[j][half * 2 + 1]);
      if (column == 0) *reinterpret_cast<float2*>(to + HD) = make_float2(state.peak[half], part_mass);
      return;
    }
    const bool is_last = (part + 1) * KEY_PART >= task.end;
    const Merge merge(peak[half], state.peak[half]);
    peak[half] = merge.peak;
    mass[half] = merge(mass[half], part_mass);
    T* to = out + (row < task.rows ? task.place(row, call) * HD : 0);
    const float inverse = is_last ? __fdiv_rn(1.0f, mass[half]) : 0.0f;
#pragma unroll
    for (int j = 0; j < HD / 8; ++j) {
      float both[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        volatile float& kept = values[j * 4 + half * 2 + i];
        both[i] = merge(part == 0 ? 0.0f : kept, sums[j][half * 2 + i]);
        if (!is_last) kept = both[i];
      }
      if (is_last && row < task.rows)
        *reinterpret_cast<uint32_t*>(to + j * 8 + column) =
            pack<T>(__fmul_rn(both[0], inverse), __fmul_rn(both[1], inverse));
    }
  }
};

}  // namespace fdserve::cuda
