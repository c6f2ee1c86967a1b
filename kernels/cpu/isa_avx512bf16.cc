// bfloat16 kernels with AVX512-BF16.
#include <immintrin.h>

#include "layout.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx512vbmi,avx2,fma")
#define FD_ISA avx512bf16
#define VL 16
#define FD_BF16

#include "vec.h"
#include "gemm.h"
#include "digits.h"
#include "weight_only.h"
#include "quantize.h"
#include "rows.h"
#include "byte_pairs.h"
#include "cache_bytes.h"
#include "attend.h"
#include "attend_part.h"
#include "part_softmax.h"
#include "attend_bytes.h"
#include "vector_attend_bytes.h"
#include "isa_kernels.h"
