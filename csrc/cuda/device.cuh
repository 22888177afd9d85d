// What the kernels ask of the device beyond C++: launches, shared memory, 16-byte accesses, matrix instructions.
// Everything that g++ cannot compile is here; tests/cuda_emulation holds the same functions in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cassert>

#include "math/half.h"

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

// Launches on a stream of the current device; `shared_bytes` may pass the 48 KiB that need no permission.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace robustfast
