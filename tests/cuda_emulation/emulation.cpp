#include "emulation.h"

#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace emulation {

Index thread_index, block_index;
dim3 block_size, grid_size;
unsigned char* shared;

namespace {

constexpr size_t stack_bytes = 256 * 1024;

struct Warp {
  unsigned arrived = 0, live = 0, exited = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
  alignas(16) unsigned char values[2][32 * 16];
};

struct Fiber {
  jmp_buf context;
  ucontext_t first;
  std::vector<unsigned char> stack;
  Index index;
  bool started, done;
  const uint64_t* waits_on;  // the fiber can go on once this differs from `seen`
  uint64_t seen;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* current;
jmp_buf scheduler;
uint64_t barrier_generation;
unsigned at_barrier, live;
bool asserted;
void (*kernel)(void*);
void* kernel_context;

[[noreturn]] void die(const std::string& message) {
  std::fprintf(stderr, "CUDA emulation: block (%u, %u), thread %u: %s\n", block_index.x, block_index.y,
               current ? current->index.x : 0, message.c_str());
  std::abort();
}

void release_barrier() {
  at_barrier = 0;
  ++barrier_generation;
}

void entry() {
  kernel(kernel_context);
  current->done = true;
  Warp& warp = warps[current->index.x / 32];
  ++warp.exited;
  if (warp.arrived) die("a thread left while its warp waits in " + std::string(warp.operation));
  if (--live && at_barrier == live) release_barrier();
  _longjmp(scheduler, 1);
}

void wait(const uint64_t& generation) {
  current->waits_on = &generation;
  current->seen = generation;
  if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, entry, 0);
  setcontext(&fiber.first);
}

bool backwards() {
  const char* order = std::getenv("ROBUSTFAST_EMULATION_ORDER");
  return order && std::string(order) == "reverse";
}

void run_block(bool reverse) {
  const unsigned threads = block_size.x;
  live = threads;
  at_barrier = 0;
  for (Warp& warp : warps) warp.arrived = warp.exited = 0;
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].index = {t, 0, 0};
    fibers[t].started = fibers[t].done = false;
    fibers[t].waits_on = nullptr;
  }
  for (bool progress = true; live && !asserted;) {
    if (!progress) die("deadlock: threads wait for a barrier or a warp operation that others never reach");
    progress = false;
    for (unsigned t = 0; t < threads && !asserted; ++t) {
      Fiber& fiber = fibers[reverse ? threads - 1 - t : t];
      if (fiber.done || (fiber.waits_on && *fiber.waits_on == fiber.seen)) continue;
      progress = true;
      resume(fiber);
    }
  }
}

}  // namespace

void barrier() {
  if (++at_barrier == live) return release_barrier();
  wait(barrier_generation);
}

void fail_assertion(const char* message) {
  std::fprintf(stderr, "CUDA emulation: device assertion failed: %s\n", message);
  asserted = true;
  _longjmp(scheduler, 1);
}

const unsigned char* exchange(const char* operation, const void* value, size_t bytes) {
  Warp& warp = warps[current->index.x / 32];
  if (warp.exited) die(std::string(operation) + " after lanes of the warp left");
  if (warp.arrived && std::strcmp(warp.operation, operation)) {
    die(std::string(operation) + " meets " + warp.operation + " in one warp");
  }
  warp.operation = operation;
  unsigned char* values = warp.values[warp.generation & 1];
  memcpy(values + 16 * (current->index.x % 32), value, bytes);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait(warp.generation);
  }
  return values;
}

bool run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  if (block.x % 32 || block.y != 1 || block.z != 1) die("a block is a multiple of 32 threads along x");
  grid_size = grid, block_size = block, kernel = body, kernel_context = context, asserted = false;
  if (fibers.size() < block.x) fibers.resize(block.x);
  for (Fiber& fiber : fibers) fiber.stack.resize(stack_bytes);
  warps.resize(block.x / 32);
  std::vector<uint64_t> memory((shared_bytes + 64) / 8 + 1);
  shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) & ~uintptr_t(15));
  const bool reverse = backwards();
  const uint64_t blocks = uint64_t(grid.x) * grid.y;
  for (uint64_t b = 0; b < blocks && !asserted; ++b) {
    const uint64_t index = reverse ? blocks - 1 - b : b;
    block_index = {unsigned(index % grid.x), unsigned(index / grid.x), 0};
    memset(shared, 0xff, shared_bytes);
    memset(shared + shared_bytes, 0xa5, 16);
    run_block(reverse);
    for (int i = 0; i < 16; ++i) {
      if (shared[shared_bytes + i] != 0xa5) die("a write behind the block's shared memory");
    }
  }
  return !asserted;
}

}  // namespace emulation
