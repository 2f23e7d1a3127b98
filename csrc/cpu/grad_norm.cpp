// grad_norm: squares are added in fp32 within a block, the blocks in fp64 in their order: the same bits for any team.
#include "tensor_list.h"

namespace fastllm {
namespace {

template <class T> void run(const GradNormArgs& a, Team& team) {
  double* squares = reinterpret_cast<double*>(team.scratch);
  each_block(team, a.tensors, a.count, a.blocks, [&](const GradNormTensor& t, int64_t from, int64_t n, int64_t block) {
    const T* g = static_cast<const T*>(t.grad) + from;
    squares[block] = double(sum_columns(n, [&](vf acc, int64_t i, auto m) {
      const vf v = load(g + i, m);
      return fma(v, v, acc);
    }));
  });
  sync(team);
  if (team.rank) return;
  double total = 0;
  for (int64_t b = 0; b < a.blocks; ++b) total += squares[b];
  *a.norm = float(::sqrt(total));
}

}  // namespace

namespace FASTLLM_TIER {

void grad_norm(const GradNormArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) { run<decltype(type)>(a, team); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
