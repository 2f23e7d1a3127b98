// advance: what lies between a sampled token and the next forward, so that a replayed step needs nobody else. For every
// row: the token joins its history, its random counter moves on, and position, context length and cache slot become
// those of the token. A row that is left out (rows[r] < 0) writes nothing to the cache: slot -1.
#include "simd.h"

namespace fastllm {
namespace FASTLLM_TIER {

void advance(const AdvanceArgs& a, Team& team) noexcept {
  const Range mine = share(team, a.count);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const int64_t which = a.rows ? a.rows[r] : r;
    if (which < 0 || which >= a.state_rows) {
      if (which >= 0) report(team, kIndexOutOfRange);
      if (a.slot) a.slot[r] = -1;
      continue;
    }
    SampleRow& s = a.state[which];
    if (s.history_len >= 0 && s.history_len < a.history_stride)
      a.history[which * a.history_stride + s.history_len] = int32_t(a.token[r]);
    else if (a.history_stride)
      report(team, kIndexOutOfRange);    // the history is full: the penalties would look at too little
    if (a.next_ids) a.next_ids[r] = a.token[r];
    ++s.history_len;
    ++s.position;
    if (a.context_len) ++a.context_len[r];
    if (!a.position) continue;
    const int64_t position =
        a.position_is_int64 ? ++static_cast<int64_t*>(a.position)[r] : ++static_cast<int32_t*>(a.position)[r];
    if (!a.slot) continue;
    const int64_t column = position / a.page;
    if (position < 0 || column >= a.pages) {
      report(team, kIndexOutOfRange);
      a.slot[r] = -1;
    } else {
      a.slot[r] = int64_t(a.block_table[r * a.table_stride + column]) * a.page + position % a.page;
    }
  }
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
