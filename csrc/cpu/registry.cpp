// The kernel table, and the choice of the instruction set: it asks the CPU and the OS, FASTLLM_ISA can only lower it.
#include "runtime.h"

#include <stdlib.h>
#include <string.h>
#ifdef FASTLLM_X86
#include <cpuid.h>
#endif

namespace fastllm {

#define KERNEL(name, Args, kinds) void name(const Args&, Team&) noexcept;
namespace generic {
#include "kernels.def"
}
#ifdef FASTLLM_X86
namespace avx2 {
#include "kernels.def"
}
namespace avx512 {
#include "kernels.def"
}
#endif
#undef KERNEL

#define ENTRY(tier, name, Args) [](const void* a, Team& t) noexcept { tier::name(*static_cast<const Args*>(a), t); }
#ifdef FASTLLM_X86
#define ENTRIES(name, Args) {ENTRY(generic, name, Args), ENTRY(avx2, name, Args), ENTRY(avx512, name, Args)}
#else
#define ENTRIES(name, Args) {ENTRY(generic, name, Args), nullptr, nullptr}
#endif

#define KERNEL(name, Args, kinds) \
  static_assert(sizeof(Args) == 8 * (sizeof(kinds) - 1), #name ": kinds and record differ"); \
  static_assert(sizeof(kinds) - 1 <= kMaxFields, #name ": more fields than a plan's record holds");
#include "kernels.def"
#undef KERNEL

#define KERNEL(name, Args, kinds)                                                            \
  {#name, kinds, ENTRIES(name, Args),                                                        \
   [](const void* a) { return work(*static_cast<const Args*>(a)); },                         \
   [](const void* a, int64_t n) { return scratch_bytes(*static_cast<const Args*>(a), n); }},
const Kernel kKernels[] = {
#include "kernels.def"
};
#undef KERNEL
const int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

#ifdef FASTLLM_X86
static bool has_f16c() {    // gcc before 11 does not know it by name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static unsigned amd_family() {    // 0: another maker's
  unsigned a, b, c, d;
  __builtin_cpu_init();
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return (a >> 8 & 15) + (a >> 20 & 255);
}
#endif

// Measured: Ice Lake follows many short runs and stops at a third less than its best on one; Zen 4 is a tenth slower with two
// long runs than with four short ones, Zen 5 (family 1Ah) the other way round.
extern const Streaming streaming = [] {
#ifdef FASTLLM_X86
  if (const unsigned family = amd_family()) return family >= 0x1a ? Streaming{2, 2048} : Streaming{4, 512};
#endif
  return Streaming{8, 768};
}();

static const char* const kIsaNames[] = {"generic", "avx2", "avx512"};

const char* isa_name(Isa i) { return kIsaNames[i]; }

Isa best_isa() {
  Isa best = kGeneric;
#ifdef FASTLLM_X86
  __builtin_cpu_init();    // also asks the OS (XGETBV) whether it saves the wide registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() && __builtin_cpu_supports("bmi2"))
    best = kAvx2;
  if (best == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    best = kAvx512;
#endif
  return best;
}

Isa isa() {
  static const Isa chosen = [] {
    const Isa best = best_isa();
    if (const char* wish = getenv("FASTLLM_ISA"))
      for (int i = 0; i < best; ++i)
        if (!strcmp(wish, kIsaNames[i])) return Isa(i);
    return best;    // a wish that cannot be granted is refused in Python, at import
  }();
  return chosen;
}

}  // namespace fastllm
