// kv_append: what stands between the qkv projection and attention, in one pass: q rotated into a new tensor, k rotated and
// written into its page as a column of [dim][16], v copied into its page as a row of [16][dim]; into pages of bytes with a scale
// each.
#include "page_bytes.h"
#include "rope.h"

namespace fastllm {
namespace {

template <class T>
void append_head(const KvAppendArgs& a, const T* k, const T* v, const float* angle, int64_t slot, int64_t head) {
  alignas(64) T rotated[kMaxHeadDim];
  rotate(k, angle, a.rotary, a.dim, rotated);
  const int64_t page = slot / kPage, offset = slot % kPage, at = head * a.dim * kPage;
  T* column = static_cast<T*>(a.k_pages) + page * a.k_page + at + offset;
  for (int64_t d = 0; d < a.dim; ++d) column[d * kPage] = rotated[d];
  T* row = static_cast<T*>(a.v_pages) + page * a.v_page + at + offset * a.dim;
  for (int64_t d = 0; d < a.dim; d += kLanes) store(row + d, load(v + d, first(a.dim - d)), first(a.dim - d));
}

// k is not rounded to its dtype between the turn and its bytes.
template <class E, class T>
void append_bytes(const KvAppendArgs& a, const T* k, const T* v, const float* angle, int64_t slot, int64_t head) {
  alignas(64) float x[kMaxHeadDim];
  const int64_t page = slot / kPage, offset = slot % kPage, at = head * a.dim * kPage;
  float* scales = a.scales + page * a.scale_page + head * 2 * kPage + offset;
  rotate(k, angle, a.rotary, a.dim, x);
  scales[0] = quantise(x, a.dim, static_cast<E*>(a.k_pages) + page * a.k_page + at + offset, kPage);
  each(a.dim, [&](int64_t i, auto m) { store(x + i, load(v + i, m), m); });
  scales[kPage] = quantise(x, a.dim, static_cast<E*>(a.v_pages) + page * a.v_page + at + offset * a.dim, 1);
}

// Heads are shared, not tokens: a decode step of one token uses every thread.
template <class T> void run(const KvAppendArgs& a, Team& team) {
  const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
  T* q_out = static_cast<T*>(a.q_out);
  const int64_t heads = a.heads + a.kv_heads;
  const Range items = share(team, a.tokens * heads);
  for (int64_t i = items.begin; i < items.end; ++i) {
    const int64_t t = i / heads, h = i % heads, slot = a.slot[t];
    const float* angle = angles(a.position, a.position_is_int64, t, a.table, a.positions, a.rotary);
    if (!angle || slot >= a.pages * kPage) {
      report(team, kIndexOutOfRange);
      continue;
    }
    if (h < a.heads) {
      rotate(q + t * a.q_row + h * a.q_head, angle, a.rotary, a.dim, q_out + (t * a.heads + h) * a.dim);
    } else if (slot >= 0) {
      const int64_t g = h - a.heads;
      const T *key = k + t * a.k_row + g * a.k_head, *value = v + t * a.v_row + g * a.v_head;
      if (a.scales)
        with_page_bytes(a.page_dtype, [&](auto e) { append_bytes<decltype(e)>(a, key, value, angle, slot, g); });
      else
        append_head(a, key, value, angle, slot, g);
    }
  }
}

}  // namespace

namespace FASTLLM_TIER {

void kv_append(const KvAppendArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) { run<decltype(type)>(a, team); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
