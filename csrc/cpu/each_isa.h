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

#include "common/matrix.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

#define RF_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define RF_BEGIN_TARGET(features) \
  RF_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RF_END_TARGET RF_PRAGMA(clang attribute pop)
#else
#define RF_BEGIN_TARGET(features) RF_PRAGMA(GCC push_options) RF_PRAGMA(GCC target(features))
#define RF_END_TARGET RF_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)

#define RF_ISA avx512
#define RF_VECTOR_BYTES 64
#define RF_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define RF_TARGET_LAMBDA __attribute__((target(RF_TARGET)))
RF_BEGIN_TARGET(RF_TARGET)
#include RF_KERNEL
RF_END_TARGET
#undef RF_ISA
#undef RF_VECTOR_BYTES
#undef RF_TARGET
#undef RF_TARGET_LAMBDA

#define RF_ISA avx2
#define RF_VECTOR_BYTES 32
#define RF_TARGET "avx2,fma"
#define RF_TARGET_LAMBDA __attribute__((target(RF_TARGET)))
RF_BEGIN_TARGET(RF_TARGET)
#include RF_KERNEL
RF_END_TARGET
#undef RF_ISA
#undef RF_VECTOR_BYTES
#undef RF_TARGET
#undef RF_TARGET_LAMBDA

#endif

#define RF_ISA baseline
#define RF_VECTOR_BYTES 16
#define RF_TARGET_LAMBDA
#include RF_KERNEL
#undef RF_ISA
#undef RF_VECTOR_BYTES
#undef RF_TARGET_LAMBDA
