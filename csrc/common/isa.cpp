#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mirasol {
namespace {

constexpr Isa all[] = {Isa::base, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx};

#if defined(__x86_64__)
bool has_f16c() {  // by hand: __builtin_cpu_supports knows the name since gcc 11 only
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// Tile registers are 8 KB that Linux saves for a process only once it has asked.
bool amx_granted() {
#if defined(MIRASOL_AMX) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bfloat16) == 0 || (d & tiles) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // asks the operating system too: registers it does not save are not reported
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())) return Isa::base;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return amx_granted() ? Isa::amx : Isa::avx512bf16;
#else
  return Isa::base;
#endif
}

Isa asked(Isa otherwise) {
  if (const char* name = std::getenv("MIRASOL_ISA"))
    for (Isa which : all)
      if (!std::strcmp(name, isa_name(which))) return which;
  return otherwise;
}

}  // namespace

Isa isa() {
  static const Isa chosen = [] {
    const Isa top = best(), wish = asked(top);
    return wish < top ? wish : top;
  }();
  return chosen;
}

bool pairs_pay() {
  static const bool pays = [] {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned float16 = 1u << 23;
    const bool has_float16 = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & float16);
    return isa() >= Isa::avx512bf16 && !(__builtin_cpu_is("intel") && has_float16);
#else
    return false;
#endif
  }();
  return pays;
}

bool isa_granted() { return asked(isa()) == isa(); }

const char* isa_name(Isa which) {
  switch (which) {
    case Isa::amx: return "amx";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "base";
  }
}

}  // namespace mirasol

// For `python -m mirasol_kernels`, through ctypes: the one thing the compiled library says that takes no tensor.
extern "C" __attribute__((visibility("default"))) const char* mirasol_isa() {
  return mirasol::isa_name(mirasol::isa());
}
