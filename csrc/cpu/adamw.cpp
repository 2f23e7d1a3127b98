// adamw: m = m + (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;
//        p = p (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
// One pass in fp32; what is stored in another dtype is rounded once, after it was used. Bound by memory.
#include "tensor_list.h"

namespace fastllm {
namespace {

// By the dtypes that a step knows only when it runs: a branch a vector, always taken the same way, is free beside the memory.
template <class Mask> FL_INLINE vf load_as(int64_t dtype, const void* p, int64_t i, Mask m) {
  return dtype == kFloat32 ? load(static_cast<const float*>(p) + i, m)
                           : dtype == kBFloat16 ? load(static_cast<const bf16*>(p) + i, m) : load(static_cast<const f16*>(p) + i, m);
}
template <class Mask> FL_INLINE void store_as(int64_t dtype, void* p, int64_t i, vf v, Mask m) {
  dtype == kFloat32 ? store(static_cast<float*>(p) + i, v, m)
                    : dtype == kBFloat16 ? store(static_cast<bf16*>(p) + i, v, m) : store(static_cast<f16*>(p) + i, v, m);
}

}  // namespace

namespace FASTLLM_TIER {

void adamw(const AdamwArgs& a, Team& team) noexcept {
  if (a.skip && *a.skip != 0) return;
  const vf scale = set1(a.scale ? *a.scale : 1.0f), root = set1(float(a.root)), eps = set1(float(a.eps));
  const vf new1 = set1(float(1 - a.beta1)), new2 = set1(float(1 - a.beta2)), old2 = set1(float(a.beta2));
  each_block(team, a.tensors, a.count, a.blocks, [&](const AdamwTensor& t, int64_t from, int64_t n, int64_t) {
    const float* rates = a.rates ? a.rates + 2 * (&t - a.tensors) : nullptr;
    const vf step_size = set1(-(rates ? rates[0] : float(a.step_size))), keep = set1(rates ? rates[1] : float(a.keep));
    each(n, [&](int64_t column, auto mask) {
      const int64_t i = from + column;
      const vf g = load_as(a.grad_dtype, t.grad, i, mask) * scale, old_m = load_as(a.moment_dtype, t.exp_avg, i, mask);
      const vf m = fma(new1, g - old_m, old_m);
      const vf v = fma(new2 * g, g, old2 * load_as(a.moment_dtype, t.exp_avg_sq, i, mask));
      const vf p = t.master ? load(t.master + i, mask) : load_as(a.param_dtype, t.param, i, mask);
      const vf updated = fma(step_size, m / fma(sqrt(v), root, eps), p * keep);
      store_as(a.moment_dtype, t.exp_avg, i, m, mask);
      store_as(a.moment_dtype, t.exp_avg_sq, i, v, mask);
      if (t.master) store(t.master + i, updated, mask);
      store_as(a.param_dtype, t.param, i, updated, mask);
    });
  });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
