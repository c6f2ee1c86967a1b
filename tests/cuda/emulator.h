// Runs CUDA kernels on the CPU, for tests on machines without a GPU: g++ compiles the same sources with this header in
// place of CUDA's. It is about results, not speed: arithmetic and masks by what comes out, and every access to memory by
// itself (emulator_memory.cc).
#pragma once

#include "emulator_cuda.h"
#include "emulator_device.h"
#include "emulator_wgmma.h"
