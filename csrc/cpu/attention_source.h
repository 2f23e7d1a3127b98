// Where queries, keys and values lie: dense and packed tensors, and the paged cache. A source knows its sequences,
// finds a query, and fills a KV tile: keys as panels [dim][16], values as rows, in place where they lie so already,
// else in scratch.
#pragma once
#include "attention_tile.h"
#include "fixed.h"

namespace fastllm {
namespace {

struct Sequence {
  int64_t queries, keys;       // this call's tokens; all keys, the tokens' own included
  int64_t first, first_key;    // its first row among the rows of all sequences; likewise its first key, where packed
};

// What query `query` sees: its position is counted so that the last query stands at the last key.
FL_INLINE Visible visible(int64_t causal, int64_t window, int64_t queries, int64_t keys, int64_t query) {
  const int64_t position = keys - queries + query;
  Visible v = {0, causal ? position + 1 : window && position + window < keys ? position + window : keys};
  if (window && position + 1 > window) v.begin = position + 1 - window;
  if (v.end < v.begin) v.end = v.begin;
  return v;
}

struct TileAt {
  int64_t b, head, t;
  Visible keys;    // within the tile: the others are not looked at
};
struct TileMemory {
  float *keys, *values;    // [16][dim][16] and [256][padded], where a source needs them
};

// Value rows [visible) of panel p, which begins at `from`: in place, or widened and padded.
template <class T>
FL_INLINE void place_values(
    KvTile<float>& tile, int64_t p, const T* from, int64_t row, Visible visible, int64_t dim, float* memory) {
  const int64_t padded = attention_padded(dim);
  if constexpr (Read<T>::kInPlace) {
    if (padded == dim) {
      tile.values[p] = from, tile.value_row = row;
      return;
    }
  }
  const int64_t begin = visible.begin > p * kLanes ? visible.begin - p * kLanes : 0;
  const int64_t left = visible.end - p * kLanes, end = left < kLanes ? left : kLanes;
  float* to = memory + p * kLanes * padded;
  copy_rows(from + begin * row, row, end - begin, dim, to + begin * padded, padded);
  tile.values[p] = to, tile.value_row = padded;
}

// Where a sequence begins and ends among `rows`; false where the numbers make no sense.
FL_INLINE bool packed_range(const int32_t* cu, int64_t b, int64_t rows, int64_t& begin, int64_t& count) {
  begin = cu[b], count = int64_t(cu[b + 1]) - begin;
  return begin >= 0 && count >= 0 && begin + count <= rows;
}

// The sequence b of a call (forward or backward); an invalid one is reported and has no row.
template <class Args> Sequence dense_sequence(const Args& a, int64_t b, Team& team) {
  if (!a.cu_q) return {a.queries, a.keys, b * a.queries, 0};
  Sequence s;
  bool fits = packed_range(a.cu_q, b, a.queries, s.first, s.queries);
  fits = packed_range(a.cu_k, b, a.keys, s.first_key, s.keys) && fits;
  if (a.bias) fits = fits && (!a.bias_query || s.queries <= a.bias_queries) && (!a.bias_key || s.keys <= a.bias_keys);
  if (fits) return s;
  report(team, kIndexOutOfRange);
  return {0, 0, 0, 0};
}

template <class T> struct Dense {
  using Element = T;
  using Key = float;
  static constexpr bool kPacked = true, kInPlace = false;    // key rows become panels in scratch
  const AttentionArgs& a;

  Sequence sequence(int64_t b, Team& team) const { return dense_sequence(a, b, team); }
  int64_t packed_rows() const { return a.cu_q ? a.queries : 0; }
  const int32_t* cu_q() const { return a.cu_q; }
  const T* query(int64_t b, const Sequence& s, int64_t i, int64_t head) const {
    return static_cast<const T*>(a.q) + (a.cu_q ? s.first * a.q_row : b * a.q_batch) + i * a.q_row + head * a.q_head;
  }
  int64_t lse_at(int64_t b, const Sequence& s, int64_t head) const {
    return a.cu_q ? head * a.queries + s.first : (b * a.heads + head) * a.queries;
  }

  void load(KvTile<float>& tile, const TileAt& at, const Sequence& s, int64_t, TileMemory memory, Team&) const {
    const int64_t base = at.t * kKvTile, first = s.first_key + base;
    const T* k = static_cast<const T*>(a.k) + at.b * (a.cu_q ? 0 : a.k_batch) + at.head * a.k_head + first * a.k_row;
    const T* v = static_cast<const T*>(a.v) + at.b * (a.cu_q ? 0 : a.v_batch) + at.head * a.v_head + first * a.v_row;
    for (int64_t p = at.keys.begin / kLanes; p * kLanes < at.keys.end; ++p) {
      float* panel = memory.keys + p * kLanes * a.dim;
      pack_panel(k + p * kLanes * a.k_row, a.k_row, s.keys - base - p * kLanes, a.dim, panel);
      tile.keys[p] = panel;
      place_values(tile, p, v + p * kLanes * a.v_row, a.v_row, at.keys, a.dim, memory.values);
    }
  }
};

// T: of queries and the output; E: of the pages.
template <class T, class E> struct Paged {
  using Element = T;
  using Key = typename Read<E>::Type;
  static constexpr bool kPacked = false, kInPlace = Read<E>::kInPlace;
  const PagedAttentionArgs& a;

  Sequence sequence(int64_t b, Team& team) const {    // an invalid one is reported and has no row
    const int64_t begin = a.cu_q[b], end = a.cu_q[b + 1], keys = a.context_len[b];
    const bool rows_fit = begin >= 0 && begin <= end && end <= a.rows;
    const bool keys_fit = keys >= 0 && keys <= a.max_pages * kPage && (a.pages || !keys);
    if (rows_fit && keys_fit) return {end - begin, keys, begin, 0};
    report(team, kIndexOutOfRange);
    return {0, 0, 0, 0};
  }
  int64_t packed_rows() const { return a.rows; }
  const int32_t* cu_q() const { return a.cu_q; }
  const T* query(int64_t, const Sequence& s, int64_t i, int64_t head) const {
    return static_cast<const T*>(a.q) + (s.first + i) * a.q_row + head * a.q_head;
  }
  int64_t lse_at(int64_t, const Sequence& s, int64_t head) const { return head * a.rows + s.first; }

  void load(KvTile<Key>& tile, const TileAt& at, const Sequence& s, int64_t ahead, TileMemory memory, Team& team) const {
    const int64_t p0 = at.keys.begin / kLanes, p1 = (at.keys.end + kLanes - 1) / kLanes, first = at.t * kPanels;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t where = page(at.b, first + p, team);
      const E* keys = keys_at(where, at.head);
      if constexpr (kInPlace) {
        tile.keys[p] = keys;
      } else {
        float* panel = memory.keys + p * kLanes * a.dim;
        widen(keys, a.dim * kPage, panel);
        tile.keys[p] = panel;
      }
      const E* values = static_cast<const E*>(a.v_pages) + where * a.v_page + at.head * a.dim * kPage;
      if constexpr (kBytes<E>) {    // of which there are whole vectors only
        tile.values[p] = values, tile.value_row = a.dim;
        tile.scales[p] = scales_at(where, at.head);
      } else {
        place_values(tile, p, values, a.dim, at.keys, a.dim, memory.values);
      }
    }
    if constexpr (kInPlace) {
      if (!ahead) return;
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t next = p + ahead, wrapped = next - p1 + p0, after = first + kPanels + next - p1;
        tile.keys_ahead[p] = next < p1 ? tile.keys[next] : tile.values[wrapped < p1 ? wrapped : p];
        if (next < p1)
          tile.values_ahead[p] = tile.values[next];
        else    // the next tile's keys
          tile.values_ahead[p] = after * kPage < s.keys ? keys_at(page(at.b, after, team), at.head) : tile.values[p];
        if (kBytes<E> && (first + kPanels + p) * kPage < s.keys) {
          const float* scales = scales_at(page(at.b, first + kPanels + p, team), at.head);
          prefetch_into_l2(scales), prefetch_into_l2(scales + kPage);
        }
      }
    }
  }
  const E* keys_at(int64_t page, int64_t head) const {
    return static_cast<const E*>(a.k_pages) + page * a.k_page + head * a.dim * kPage;
  }
  const float* scales_at(int64_t page, int64_t head) const { return a.scales + page * a.scale_page + head * 2 * kPage; }
  int64_t page(int64_t b, int64_t index, Team& team) const {
    const int64_t p = a.block_table[b * a.table_row + index];
    if (p >= 0 && p < a.pages) return p;
    report(team, kIndexOutOfRange);
    return 0;
  }
};

}  // namespace
}  // namespace fastllm
