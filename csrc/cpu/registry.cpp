// The kernel table, and the choice of the instruction set: it asks the CPU and the OS, FASTLLM_ISA can only lower it.
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

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

// Intel's cores (Ice Lake) follow many short runs and stop at a third less on one; AMD's (Zen 5) lose a tenth to many runs.
extern const Streaming streaming = [] {
#ifdef FASTLLM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return Streaming{2, 2048};
#endif
  return Streaming{8, 768};
}();

static const char* const kIsaNames[] = {"generic", "avx2", "avx512"};

const char* isa_name(Isa i) { return kIsaNames[i]; }

Isa best_isa() {
  Isa best = kGeneric;
#ifdef FASTLLM_X86
  __builtin_cpu_init();    // also asks the OS (XGETBV) whether it saves the wide registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2"))
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
