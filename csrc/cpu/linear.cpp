// linear: y = norm(x) W^T + bias, then + residual or swiglu, in fp32; gemm.h has the product.
#include "gemm.h"

namespace fastllm {
namespace FASTLLM_TIER {

void linear(const LinearArgs& a, Team& team) noexcept { product(a, NoHooks(), team, reinterpret_cast<float*>(team.scratch)); }

void pack_panels(const PackPanelsArgs& a, Team& team) noexcept {
  const Range mine = share(team, (a.cols + kLanes - 1) / kLanes);
  with_dtype(a.dtype, [&](auto type) {
    for (int64_t p = mine.begin; p < mine.end; ++p)
      pack_rows(a.panels + p * a.panel_stride, static_cast<const decltype(type)*>(a.weight), a.weight_stride, a.cols, a.depth, p * kLanes);
  });
}

void panel_rows(const PanelRowsArgs& a, Team& team) noexcept {
  const Range mine = share(team, a.count);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t id = a.ids[i];
    if (id < 0 || id >= a.rows) {
      report(team, kIndexOutOfRange);
      continue;
    }
    const float* column = a.panels + id / kLanes * a.depth * kLanes + id % kLanes;
    for (int64_t k = 0; k < a.depth; ++k) a.y[i * a.depth + k] = column[k * kLanes];
  }
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
