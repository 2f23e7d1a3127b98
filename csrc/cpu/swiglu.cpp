// swiglu: y = gate * sigmoid(gate) * up.
#include "gated.h"

namespace fastllm {
namespace {

struct Silu {
  static FL_INLINE_MEMBER vf value(vf x) { return silu(x); }
  static FL_INLINE_MEMBER Slope slope(vf x) {    // s * (1 + x * (1 - s)) with s = sigmoid(x)
    const Sigmoid s = sigmoid(x);
    return {x * s.of, s.of * fma(x, s.of_negative, set1(1))};
  }
};

}  // namespace

namespace FASTLLM_TIER {

void swiglu(const GatedArgs& a, Team& team) noexcept { run_gated<Silu, true>(a, team); }
void swiglu_backward(const GatedBackwardArgs& a, Team& team) noexcept { run_gated<Silu, true>(a, team); }

}  // namespace FASTLLM_TIER
}  // namespace fastllm
