// gelu: y = x * Phi(x), or its approximation by tanh.
#include "gelu.h"

namespace fastllm {
namespace FASTLLM_TIER {

void gelu(const GeluArgs& a, Team& team) noexcept { run_gelu<false>(a, team); }
void gelu_backward(const GeluBackwardArgs& a, Team& team) noexcept { run_gelu<false>(a, team); }

}  // namespace FASTLLM_TIER
}  // namespace fastllm
