#pragma once
// Which build of the CPU kernels runs.  Every csrc/<op>/cpu.cpp is compiled once per instruction set, with MIRASOL_ISA
// defined as its name, into namespace mirasol::<isa>.  A binding writes MIRASOL_CALL(f, ...) and the best one that this
// CPU has is called; on other processors than x86-64 there is only `base`.

namespace mirasol {

// Each includes those before it.  `amx` has no build of its own: kernels of avx512bf16 that can use it hold both.
enum class Isa { base, avx2, avx512, avx512bf16, amx };

Isa isa();  // found once; the environment variable MIRASOL_ISA=<name> lowers it, never raises it
const char* isa_name(Isa which);

// Whether bfloat16 in pairs (VDPBF16PS) is faster than floats here.  Intel's cores that have FP16 as well, all since
// Sapphire Rapids, begin one every fourth time that they could a multiply-add of floats (NOTES): half the work.
bool pairs_pay();

// False where MIRASOL_ISA asks for what this CPU has not, so that a test of that instruction set can say "skipped".
bool isa_granted();

}  // namespace mirasol

#if defined(__x86_64__)
#define MIRASOL_DECLARE(...)                                                     \
  namespace mirasol::base { __VA_ARGS__; }                                       \
  namespace mirasol::avx2 { __VA_ARGS__; }                                       \
  namespace mirasol::avx512 { __VA_ARGS__; }                                     \
  namespace mirasol::avx512bf16 { __VA_ARGS__; }
#define MIRASOL_CALL(f, ...)                                                                       \
  (::mirasol::isa() >= ::mirasol::Isa::avx512bf16 ? ::mirasol::avx512bf16::f(__VA_ARGS__)          \
   : ::mirasol::isa() == ::mirasol::Isa::avx512   ? ::mirasol::avx512::f(__VA_ARGS__)              \
   : ::mirasol::isa() == ::mirasol::Isa::avx2     ? ::mirasol::avx2::f(__VA_ARGS__)                \
                                                  : ::mirasol::base::f(__VA_ARGS__))
#else
#define MIRASOL_DECLARE(...) namespace mirasol::base { __VA_ARGS__; }
#define MIRASOL_CALL(f, ...) ::mirasol::base::f(__VA_ARGS__)
#endif
