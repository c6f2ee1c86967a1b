// Float kernels with AVX2 and FMA.
#include <immintrin.h>

#include "layout.h"

#pragma GCC target("avx2,fma")
#define FD_ISA avx2
#define VL 8

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
