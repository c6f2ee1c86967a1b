// Float kernels for any x86-64.
#include <immintrin.h>

#include "kernels.h"

#define FD_ISA baseline
#define VL 4

#include "vec.h"
#include "gemm.h"
#include "rows.h"
#include "attend.h"
#include "scan.h"
#include "isa_kernels.h"
