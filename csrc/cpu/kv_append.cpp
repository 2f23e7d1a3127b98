// kv_append: what stands between the qkv projection and attention, in one pass: q rotated into a new tensor, k rotated and
// written into its page as a column of [dim][16], v copied into its page as a row of [16][dim].
#include "rope.h"

namespace fastllm {
namespace {

void append_head(const KvAppendArgs& a, const float* k, const float* v, const float* angle, int64_t slot, int64_t head) {
  alignas(64) float rotated[kMaxHeadDim];
  rotate(k, angle, a.rotary, a.dim, rotated);
  const int64_t page = slot / kPage, offset = slot % kPage, at = head * a.dim * kPage;
  float* column = a.k_pages + page * a.k_page + at + offset;
  for (int64_t d = 0; d < a.dim; ++d) column[d * kPage] = rotated[d];
  float* row = a.v_pages + page * a.v_page + at + offset * a.dim;
  for (int64_t d = 0; d < a.dim; d += kLanes) store(row + d, load(v + d, first(a.dim - d)), first(a.dim - d));
}

}  // namespace

namespace FASTLLM_TIER {

// Heads are shared, not tokens: a decode step of one token uses every thread.
void kv_append(const KvAppendArgs& a, Team& team) noexcept {
  const int64_t heads = a.heads + a.kv_heads;
  const Range items = share(team, a.tokens * heads);
  for (int64_t i = items.begin; i < items.end; ++i) {
    const int64_t t = i / heads, h = i % heads, slot = a.slot[t];
    const float* angle = angles(a.position, a.position_is_int64, t, a.table, a.positions, a.rotary);
    if (!angle || slot >= a.pages * kPage) {
      report(team, kIndexOutOfRange);
      continue;
    }
    if (h < a.heads)
      rotate(a.q + t * a.q_row + h * a.q_head, angle, a.rotary, a.dim, a.q_out + (t * a.heads + h) * a.dim);
    else if (slot >= 0)
      append_head(a, a.k + t * a.k_row + (h - a.heads) * a.k_head, a.v + t * a.v_row + (h - a.heads) * a.v_head, angle, slot, h - a.heads);
  }
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
