// Float kernels with AVX-512.
#include <immintrin.h>

#include "layout.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define FD_ISA avx512
#define VL 16

#include "vec.h"
#include "gemm.h"
#include "weight_only.h"
#include "quantize.h"
#include "turn.h"
#include "rows.h"
#include "cache_bytes.h"
#include "attend.h"
#include "attend_part.h"
#include "scan.h"
#include "mass.h"
#include "isa_kernels.h"
