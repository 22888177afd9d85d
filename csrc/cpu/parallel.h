// Threads for the kernels, lent by whoever links them: csrc/ops/loss_cpu.cpp defines run_parallel with PyTorch's pool.
#pragma once

#include <cstdint>

namespace robustfast {

// Calls body(begin, end, context) on parts of [begin, end) of at least `grain`, as many as there are threads.
void run_parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int num_threads();

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (end - begin <= grain) {
    if (begin < end) body(begin, end);
    return;
  }
  run_parallel(
      begin, end, grain,
      [](int64_t from, int64_t to, void* context) { (*static_cast<const Body*>(context))(from, to); },
      const_cast<Body*>(&body));
}

}  // namespace robustfast
