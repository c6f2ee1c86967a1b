// Choosing an instruction set at run time, and the plain C functions of the library.
#include <malloc.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "kernels.h"
#include "pool.h"

namespace fdserve {

namespace baseline {
extern const RowKernels row_kernels;
extern const FloatKernels float_kernels;
}  // namespace baseline
namespace avx2 {
extern const RowKernels row_kernels;
extern const FloatKernels float_kernels;
}  // namespace avx2
namespace avx512 {
extern const RowKernels row_kernels;
extern const FloatKernels float_kernels;
}  // namespace avx512
namespace avx512bf16 {
extern const RowKernels row_kernels;
}  // namespace avx512bf16
namespace amx {
extern const RowKernels row_kernels;
}  // namespace amx

namespace {

// Tiles are large: a process asks Linux for the right to have them, once for all its threads.
bool allowed_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return kAvx2;
  // Whatever has the first also has the others, but for one generation of processors.
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512vbmi");
  return !bf16 ? kAvx512 : allowed_tiles() ? kAmx : kAvx512Bf16;
}

Isa& current() {
  static Isa isa = detect();
  return isa;
}

}  // namespace

Isa isa() { return current(); }

Isa force_isa(int level) {
  static const int best = detect();
  current() = static_cast<Isa>(std::min(level, best));
  return current();
}

const RowKernels& row_kernels(Dtype dtype) {
  const Isa now = isa();
  if (dtype == Dtype::kBfloat16) {
    if (now < kAvx512Bf16) throw std::invalid_argument("bfloat16 needs a CPU with AVX512-BF16; compute in float32");
    return now >= kAmx ? amx::row_kernels : avx512bf16::row_kernels;
  }
  return now >= kAvx512 ? avx512::row_kernels : now == kAvx2 ? avx2::row_kernels : baseline::row_kernels;
}

const FloatKernels& float_kernels() {
  const Isa now = isa();
  return now >= kAvx512 ? avx512::float_kernels : now == kAvx2 ? avx2::float_kernels : baseline::float_kernels;
}

}  // namespace fdserve

#pragma GCC visibility push(default)
extern "C" {

int fdserve_isa() { return fdserve::isa(); }
int fdserve_force_isa(int level) { return fdserve::force_isa(level); }
// Results larger than malloc's usual threshold would be mapped and unmapped at every call, and a page fault for every
// 4 KiB costs a prefill a fifth of its time: keep freed memory instead.
void fdserve_keep_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
}

int fdserve_num_threads() { return fdserve::num_threads(); }
void fdserve_set_num_threads(int count) { fdserve::set_num_threads(count); }

int64_t fdserve_panel_bytes(int format, int64_t k) {
  return fdserve::panel_bytes(static_cast<fdserve::Format>(format), k);
}

void fdserve_pack(void* panels, const void* weight, int64_t n, int64_t k, int64_t stride, int source_is_float, int format,
                  int in_out) {
  using fdserve::Dtype;
  fdserve::pack(panels, weight, n, k, stride, source_is_float ? Dtype::kFloat32 : Dtype::kBfloat16,
                static_cast<fdserve::Format>(format), in_out != 0);
}

}  // extern "C"
#pragma GCC visibility pop
