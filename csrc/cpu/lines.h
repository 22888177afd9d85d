// Memory that begins with a line of the cache: vectors that straddle two lines cost twice.
#pragma once

#include <cstdint>
#include <memory>

namespace robustfast {

template <class T>
struct alignas(64) Line {
  T values[64 / sizeof(T)];
};

template <class T>
using Lines = std::unique_ptr<Line<T>[]>;

// Uninitialised.
template <class T>
Lines<T> lines(int64_t elements) {
  return std::make_unique_for_overwrite<Line<T>[]>((elements * sizeof(T) + 63) / 64);
}

}  // namespace robustfast
