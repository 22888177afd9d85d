// What the kernels ask of the device beyond C++: launches, shared memory, 16-byte accesses, matrix instructions.
// Everything that g++ cannot compile is here; tests/cuda_emulation holds the same functions in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <mutex>
#include <set>
#include <utility>

#include "common/half.h"

#define RF_DEVICE __device__ __forceinline__
#define RF_UNROLL _Pragma("unroll")

namespace robustfast {

RF_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Ends the kernel with cudaErrorAssert, as PyTorch's own assertions do, whatever NDEBUG says.
RF_DEVICE void device_assert(bool holds, const char* message) {
  if (!holds) __assert_fail(message, __FILE__, __LINE__, "robustfast");
}

struct alignas(16) Vector16 {
  uint32_t word[4];
};

RF_DEVICE uint64_t load8(const void* from) {
  const uint2 value = *static_cast<const uint2*>(from);
  return uint64_t(value.y) << 32 | value.x;
}

RF_DEVICE void store8(void* to, uint64_t value) {
  *static_cast<uint2*>(to) = make_uint2(uint32_t(value), uint32_t(value >> 32));
}

RF_DEVICE Vector16 load16(const void* from) {
  const uint4 value = *static_cast<const uint4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}

RF_DEVICE void store16(void* to, Vector16 value) {
  *static_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

// For data that nobody reads or writes again soon: it leaves the caches first.
RF_DEVICE Vector16 load16_once(const void* from) {
  const uint4 value = __ldcs(static_cast<const uint4*>(from));
  return {{value.x, value.y, value.z, value.w}};
}
RF_DEVICE void store16_once(void* to, Vector16 value) {
  __stcs(static_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
}

// Approximations in one instruction, for x of the size that normals need; errors as in the PTX manual.
RF_DEVICE float log2_approx(float x) {  // 0 < x <= 1: 2^-22, relative where that is more
  float value;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
RF_DEVICE float sqrt_approx(float x) {  // relative 2^-23
  float value;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
RF_DEVICE float sin_approx(float x) {  // |x| <= pi: 2^-20.9
  float value;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
RF_DEVICE float cos_approx(float x) {
  float value;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// 2^23 + x as a float, x the byte `at` of a word, by its bits.
RF_DEVICE float float_of_byte(uint32_t word, int at) {
  return bit_cast<float>(__byte_perm(word, 0x4b000000, 0x7650 | at));
}

// Sums and products whose rounding does not depend on what the compiler makes of the code around them.
RF_DEVICE float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
RF_DEVICE double rounded_sum(double a, double b) { return __dadd_rn(a, b); }
RF_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a b + c, rounded once
RF_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// 1 / x of normal x to the last bit or so; a division branches for the others.
RF_DEVICE float reciprocal(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return fused(value, fused(-x, value, 1.0f), value);
}
RF_DEVICE double reciprocal(double x) { return 1 / x; }

// The smaller and the larger of two; nan if one is.
RF_DEVICE float min_nan(float a, float b) {
  float value;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
  return value;
}
RF_DEVICE float max_nan(float a, float b) {
  float value;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
  return value;
}
RF_DEVICE double min_nan(double a, double b) { return a > b ? b : a; }  // b is a number
RF_DEVICE double max_nan(double a, double b) { return a < b ? b : a; }

// Makes the compiler compute what follows from a value again, where it would keep results and run out of registers.
template <class T>
RF_DEVICE void recompute_from(T& value) {
  if constexpr (sizeof(T) % 4 == 0) {
    uint32_t word[sizeof(T) / 4];
    memcpy(word, &value, sizeof(T));
    RF_UNROLL
    for (int w = 0; w < int(sizeof(T) / 4); ++w) asm volatile("" : "+r"(word[w]));
    memcpy(&value, word, sizeof(T));
  }
}

// x / sqrt(square) for a square in the middle of float's range, without the branches of root and quotient; exact where
// the root and the result are numbers of float.
RF_DEVICE float over_root(float x, float square) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(square));
  const float rough = square * inverse, root = fused(fused(-rough, rough, square), 0.5f * inverse, rough);
  inverse = fused(fused(-root, inverse, 1.0f), inverse, inverse);
  const float quotient = x * inverse;
  return fabsf(quotient) < INFINITY ? fused(fused(-root, quotient, x), inverse, quotient) : quotient;
}
RF_DEVICE double over_root(double x, double square) { return x / sqrt(square); }

// Two bfloat16, rounded to nearest even, in one word.
RF_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix l / 8, and
// gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
RF_DEVICE void load_matrices(uint32_t (&fragment)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// sum (16, 8) += a (16, 16) b (16, 8) over the warp, bfloat16 operands in the layout of PTX's mma.m16n8k16.
RF_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// What a kernel may ask for at a launch, beside its own: the most that every architecture has.
constexpr size_t most_shared_bytes = 96 * 1024;

// Permission for that, which the driver is asked for once for a kernel and a device: it takes longer than a launch.
inline cudaError_t permit_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> permitted;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error != cudaSuccess || permitted.count({kernel, device})) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most_shared_bytes));
  if (error == cudaSuccess) permitted.insert({kernel, device});
  return error;
}

// Launches on a stream of the current device.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared_bytes > 32 * 1024) {  // 48 KiB, with what is the kernel's own, need no permission
    const cudaError_t error = permit_shared(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return cudaGetLastError();
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace robustfast
