// Hopper's products of a warpgroup (wgmma, sm_90a alone): four warps multiply 64 rows at a time, matrices of the right
// operand lie in shared memory, and results come later: the warpgroup goes on until it waits for them.
//
// A right operand has 64 elements, 128 bytes, a row; 16-byte chunks of a row are permuted within it by the row's number
// modulo 8 ("128-byte swizzle"), and tiles begin at multiples of 1024 bytes. Formats and fragments: PTX ISA, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate". The left operand and the result are in registers, each warp's 16 rows laid
// out as for mma.m16n8k16, element for element.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace fdserve::cuda {

constexpr int WARPGROUP = 4 * WARP;
constexpr int SWIZZLED_ROW = 64;        // elements
constexpr int SWIZZLED_ALIGNMENT = 1024;

// The place of a 16-byte chunk of a row in such a tile, in elements.
__device__ inline int swizzled_at(int row, int chunk) { return row * SWIZZLED_ROW + (chunk ^ row % 8) * 8; }

#ifndef FDSERVE_EMULATED

// Whether the code that is being compiled may hold these instructions.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FDSERVE_WGMMA 1
#endif

// Where the right operand lies. `leading` and `stride` are in bytes: from 8 rows to the next 8 it is `stride`; where
// columns of the product run along the rows (`TRANSPOSED`), from 64 of them to the next 64 it is `leading`.
using Operand = uint64_t;
__device__ inline Operand operand_at(Shared place, int leading, int stride) {
  constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62;
  return SWIZZLE_128 | static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
         (place >> 4 & 0x3FFF);
}
// The one `bytes` further on, within shared memory.
__device__ inline Operand operand_after(Operand operand, int bytes) { return operand + (bytes >> 4); }

// Keeps the compiler from moving accesses of registers across what products do to them.
template <int N>
__device__ inline void hold(float (&registers)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(registers[i][j])::"memory");
}

// Before the first product after registers were written by anything else.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups of products are under way.
template <int N>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// What this thread has written to shared memory, its finished asynchronous copies too, can be read by products.
__device__ inline void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#ifdef FDSERVE_WGMMA
#define FDSERVE_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FDSERVE_SIXTEEN(i) FDSERVE_FOUR(i), FDSERVE_FOUR(i + 1), FDSERVE_FOUR(i + 2), FDSERVE_FOUR(i + 3)
#define FDSERVE_PRODUCT_64(TYPE)                                                                                       \
  asm volatile(                                                                                                        \
      "{.reg .pred p; setp.ne.b32 p, %37, 0;\n"                                                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                      \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"   \
      "%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;}\n"                                                         \
      : FDSERVE_SIXTEEN(0), FDSERVE_SIXTEEN(4)                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(TRANSPOSED))
#define FDSERVE_PRODUCT_128(TYPE)                                                                                      \
  asm volatile(                                                                                                        \
      "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"                                                                        \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                     \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"   \
      "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"   \
      "%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, p, 1, 1, %70;}\n"                                     \
      : FDSERVE_SIXTEEN(0), FDSERVE_SIXTEEN(4), FDSERVE_SIXTEEN(8), FDSERVE_SIXTEEN(12)                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(TRANSPOSED))
#endif

// Begins d[64][8 N] = a[64][16] b[16][8 N], added to d if `add`; N is 8 or 16. a must stay as it is, and d not be touched,
// until the product has been waited for. Rows of b's tile are the product's columns, or, TRANSPOSED, those of a.
template <class T, int TRANSPOSED, int N>
__device__ inline void begin_product(float (&d)[N][4], const uint32_t (&a)[4], Operand b, bool add) {
  static_assert(N == 8 || N == 16, "as many columns as a product has");
#ifdef FDSERVE_WGMMA
  constexpr bool IS_BF16 = std::is_same_v<T, bf16>;
  if constexpr (N == 8 && IS_BF16) {
    FDSERVE_PRODUCT_64("bf16");
  } else if constexpr (N == 8) {
    FDSERVE_PRODUCT_64("f16");
  } else if constexpr (IS_BF16) {
    FDSERVE_PRODUCT_128("bf16");
  } else {
    FDSERVE_PRODUCT_128("f16");
  }
#endif
}

#endif

// Before a wait for products that what made `x`, which is never negative, is to run beside: the compiler moves a wait up,
// above all of that, but not across a branch.
__device__ inline void compute_before_wait(float x) {
#ifndef FDSERVE_EMULATED
  if (__any_sync(ALL, x < 0.0f)) asm volatile("trap;");
#endif
}

}  // namespace fdserve::cuda
