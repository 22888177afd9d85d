// Compiles the file RF_KERNEL once for each instruction set, in a namespace named after it (RF_ISA), with vectors of
// RF_VECTOR_BYTES. A kernel's source includes this with RF_KERNEL naming itself, and holds its code behind
// #ifdef RF_ISA; see margin.cpp.
//
// Everything that a kernel includes must be included before the first pragma: an inline function of the standard
// library compiled for AVX-512 could otherwise be the one that the linker keeps for all callers. Template functions
// take the target of the place of their definition, but lambdas inside of them do not: those need RF_TARGET_LAMBDA.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/matrix.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

// Of what is called for whole rows and more: a copy at each call is larger, and no faster.
#define RF_NOINLINE __attribute__((noinline))

#if defined(__x86_64__)

#define RF_TARGET_LAMBDA __attribute__((target(RF_TARGET)))

#define RF_ISA avx512
#define RF_VECTOR_BYTES 64
#define RF_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#include "cpu/one_isa.h"

#define RF_ISA avx2
#define RF_VECTOR_BYTES 32
#define RF_TARGET "avx2,fma"
#include "cpu/one_isa.h"

#undef RF_TARGET_LAMBDA
#define RF_TARGET_LAMBDA

#endif

#define RF_ISA baseline
#define RF_VECTOR_BYTES 16
#include RF_KERNEL
