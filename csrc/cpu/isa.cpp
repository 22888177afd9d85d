#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace robustfast {
namespace {

std::vector<Isa> find_isas() {
  std::vector<Isa> isas = {Isa::baseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    isas.push_back(Isa::avx512);
  }
#endif
  return isas;
}

Isa choose_isa() {
  const char* wanted = std::getenv("ROBUSTFAST_CPU_ISA");
  if (wanted == nullptr || *wanted == 0) return available_isas().back();
  std::string names;
  for (const Isa isa : available_isas()) {
    if (std::strcmp(name(isa), wanted) == 0) return isa;
    names += std::string(names.empty() ? "" : ", ") + name(isa);
  }
  throw std::invalid_argument("ROBUSTFAST_CPU_ISA: expected one of what this processor has (" + names + "), got '" +
                              wanted + "'");
}

}  // namespace

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = find_isas();
  return isas;
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

bool has_vnni() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has;
#else
  return false;
#endif
}

const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

}  // namespace robustfast
