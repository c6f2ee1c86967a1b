// Float kernels for any x86-64.
#include <immintrin.h>

#include "layout.h"

#define FD_ISA baseline
#define VL 4

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
