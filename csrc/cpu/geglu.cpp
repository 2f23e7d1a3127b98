// geglu: y = gelu(gate) * up.
#include "gelu.h"

namespace fastllm {
namespace FASTLLM_TIER {

void geglu(const GeluArgs& a, Team& team) noexcept { run_gelu<true>(a, team); }
void geglu_backward(const GeluBackwardArgs& a, Team& team) noexcept { run_gelu<true>(a, team); }

}  // namespace FASTLLM_TIER
}  // namespace fastllm
