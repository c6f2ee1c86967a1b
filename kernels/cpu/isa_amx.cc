// bfloat16 and byte kernels with AMX; what has no product of tiles is that of AVX512-BF16.
#include <immintrin.h>

#include "layout.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx512vbmi,avx2,fma,amx-tile,amx-bf16,amx-int8")
#define FD_ISA amx
#define VL 16
#define FD_BF16
#define FD_AMX

#include "vec.h"
#include "gemm.h"
#include "digits.h"
#include "weight_only.h"
#include "amx.h"
#include "amx_weight_only.h"
#include "quantize.h"
#include "rows.h"
#include "byte_pairs.h"
#include "cache_bytes.h"
#include "attend.h"
#include "attend_part.h"
#include "part_softmax.h"
#include "amx_attend.h"
#include "attend_bytes.h"
#include "amx_attend_bytes.h"
#include "isa_kernels.h"
