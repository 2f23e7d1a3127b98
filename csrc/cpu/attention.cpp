// attention: softmax(scale * q k^T) v, dense, packed and paged, prefill and decode, all through the same tiles.
//
// Keys are cut in tiles of 256 at absolute positions. Each tile gives a row its own (highest, sum, values); the tiles
// are folded left to right. So a row has the same bits in a full forward, in any chunk of a prefill and in a decode
// step, with any page order and any number of threads. Work is cut when the kernel runs, from lengths read from memory.
#include "attention_source.h"

namespace fastllm {
namespace {

// ------------------------------------------------------------------------------------------------------ one work item

struct Problem {
  void* out;
  float* lse;    // or null
  int64_t batch, heads, kv_heads, group, dim, padded, causal, window, dtype;
  float scale;
  Shaping shaping;
};
template <class Args> Problem describe(const Args& a, const Shaping& shaping) {
  return {a.out, nullptr, a.batch, a.heads, a.kv_heads, a.heads / a.kv_heads, a.dim, attention_padded(a.dim),
          a.causal, a.window, a.dtype, float(a.scale), shaping};
}

struct Workspace {
  float* query;
  State state;
  Visible* visible;    // per row, absolute
  float *scores, *values, *keys, *padded_values, *partial;
};
Workspace carve(char* scratch, const AttentionScratch& size, int64_t rank, int64_t padded) {
  float* p = reinterpret_cast<float*>(scratch) + rank * size.total;
  const int64_t block = size.query / kQueryStride;
  Workspace w;
  w.query = p, p += size.query;
  w.visible = reinterpret_cast<Visible*>(p), p += block * 4;    // 16 bytes a row, in the place of 4 floats
  w.state = {p, p + block, nullptr}, p += block * 2;
  w.state.values = p, p += size.values;
  w.scores = p, p += 8 * kScoreStride;
  w.values = p, p += 8 * padded;
  w.keys = p, p += size.keys;
  w.padded_values = p, p += size.padded_values;
  w.partial = p;
  return w;
}

// Query rows of one sequence that share a KV head: row i * group + g is head g of the group at query i, so that
// neighbours see nearly the same keys.
struct Item {
  int64_t b, kv_head;
  Sequence sequence;
  int64_t row_begin, row_end;
};
struct Span {
  int64_t begin, end;    // KV tiles
};

Visible visible(const Problem& p, const Sequence& s, int64_t query) {
  return fastllm::visible(p.causal, p.window, s.queries, s.keys, query);
}
Span tiles(const Problem& p, const Item& item) {
  const Visible low = visible(p, item.sequence, item.row_begin / p.group);
  const Visible high = visible(p, item.sequence, (item.row_end - 1) / p.group);
  return {low.begin / kKvTile, attention_tiles(high.end)};
}
RowAt row_at(const Problem& p, const Item& item, int64_t row) {
  const Sequence& s = item.sequence;
  const int64_t query = row / p.group, head = item.kv_head * p.group + row % p.group;
  return {item.b, head, query, s.keys - s.queries + query, s.first * p.heads + head * s.queries + query};
}

struct TileResult {
  float highest[kGroupRows], total[kGroupRows];
};

// One group of rows, from row `row` of the item, against the tile at key `base`: results in w.values and r.
template <bool Ahead, class E>
void attend(const Problem& p, const Item& item, const Workspace& w, int64_t row, int64_t rows, const KvTile<E>& tile,
            int64_t base, const Visible* keys, TileResult& r) {
  Visible any = {kKvTile, 0};
  for (int64_t i = 0; i < rows; ++i) {
    if (keys[i].begin >= keys[i].end) continue;
    if (keys[i].begin < any.begin) any.begin = keys[i].begin;
    if (keys[i].end > any.end) any.end = keys[i].end;
  }
  if (any.begin >= any.end) return;
  with_rows(rows, [&](auto n) {
    constexpr int R = decltype(n)::value;
    const int64_t p0 = any.begin / kLanes, p1 = (any.end + kLanes - 1) / kLanes;
    score_panels<R, width(R), Ahead>(w.query + row * kQueryStride, tile, p0, p1, p.dim, set1(p.scale * kLoadUnit<E>), w.scores);
    for (int i = 0; i < R; ++i) {
      if (keys[i].begin >= keys[i].end) continue;
      float* scores = w.scores + i * kScoreStride;
      if (p.shaping.scores) shape_scores(p.shaping, row_at(p, item, item.row_begin + row + i), base, keys[i], scores);
      softmax_tile(scores, keys[i], r.highest[i], r.total[i]);
      if (p.shaping.drops) drop_weights(p.shaping, row_at(p, item, item.row_begin + row + i), base, keys[i], scores);
      if constexpr (kBytes<E>) scale_weights(scores, tile, keys[i]);
    }
    weigh_values<R, Ahead>(w.scores, tile, keys, p.padded, w.values, true);
  });
}

// A tile's result for one row, kept by a thread that does not own the row: values [padded], then highest and total.
float* partial_at(const Problem& p, float* partial, int64_t tile, int64_t rows, int64_t row) {
  return partial + (tile * rows + row) * (p.padded + 16);
}

// Runs an item's rows over the tiles of `span`, into w.state or, when partial, tile by tile into w.partial.
template <class Source, bool Ahead>
void run_tiles(const Problem& p, const Source& source, const Item& item, Span span, bool partial, const Workspace& w,
               Team& team) {
  const int64_t rows = item.row_end - item.row_begin;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = item.row_begin + r, query = row / p.group;
    const auto* q = source.query(item.b, item.sequence, query, item.kv_head * p.group + row % p.group);
    copy_rows(q, 0, 1, p.dim, w.query + r * kQueryStride, 0);
    w.visible[r] = visible(p, item.sequence, query);
  }
  for (int64_t t = span.begin; t < span.end; ++t) {
    const int64_t base = t * kKvTile;
    const auto inside = [&](int64_t key) { return key <= base ? 0 : key >= base + kKvTile ? kKvTile : key - base; };
    const Visible any = {inside(w.visible[0].begin), inside(w.visible[rows - 1].end)};
    if (any.begin >= any.end) continue;
    KvTile<typename Source::Key> tile;
    const bool in_place = Source::kInPlace && p.padded == p.dim;
    const int64_t ahead = Ahead && in_place ? width(int(group_rows(rows))) : 0;
    const TileAt at = {item.b, item.kv_head, t, any};
    source.load(tile, at, item.sequence, ahead, {w.keys, w.padded_values}, team);
    for (int64_t r = 0, n; r < rows; r += n) {
      n = group_rows(rows - r);
      Visible keys[kGroupRows];
      TileResult result;
      for (int64_t i = 0; i < n; ++i) keys[i] = {inside(w.visible[r + i].begin), inside(w.visible[r + i].end)};
      if (ahead && r == 0)    // the group that meets the tile first
        attend<Ahead>(p, item, w, r, n, tile, base, keys, result);
      else
        attend<false>(p, item, w, r, n, tile, base, keys, result);
      for (int64_t i = 0; i < n; ++i) {
        if (keys[i].begin >= keys[i].end) continue;
        const float* values = w.values + i * p.padded;
        if (partial) {
          float* to = partial_at(p, w.partial, t - span.begin, rows, r + i);
          copy_rows(values, 0, 1, p.padded, to, 0);
          to[p.padded] = result.highest[i], to[p.padded + 1] = result.total[i];
        } else if (w.visible[r + i].begin / kKvTile == t) {
          begin(w.state, r + i, result.highest[i], result.total[i], values, p.padded);
        } else {
          fold(w.state, r + i, result.highest[i], result.total[i], values, p.padded);
        }
      }
    }
  }
}

// What a row's state comes to: its values times `factor` are the result. A row that sees no key, or only keys with a
// score of -inf, is zeros, sink or not.
struct Ending {
  bool empty;
  float divisor, factor, lse;
};
Ending end_row(const Shaping& s, const Workspace& w, int64_t r, int64_t head) {
  const float lowest = -__builtin_inff(), sink = s.sinks ? s.sinks[head] : lowest;
  if (w.visible[r].begin >= w.visible[r].end || w.state.total[r] == 0) return {true, 1, 0, sink};
  float highest = w.state.highest[r], total = w.state.total[r], factor = s.drops ? s.dropout.scale : 1.0f;
  if (s.sinks) {    // the last to be folded, a tile without values
    const float top = sink > highest ? sink : highest, reference = top == lowest ? 0.0f : top;
    float kept[kLanes], own[kLanes];
    store(kept, exp(set1(highest - reference))), store(own, exp(set1(sink - reference)));
    total = total * kept[0] + own[0], highest = top, factor *= kept[0];
  }
  const bool nan = total != total;
  return {false, total, factor, nan ? total : float(double(highest) + natural_log(double(total)))};
}

template <class Source> void write_rows(const Problem& p, const Source& source, const Item& item, const Workspace& w) {
  using T = typename Source::Element;
  const bool plain = !p.shaping.sinks && !p.shaping.drops;
  for (int64_t r = 0; r < item.row_end - item.row_begin; ++r) {
    const int64_t query = (item.row_begin + r) / p.group;
    const int64_t head = item.kv_head * p.group + (item.row_begin + r) % p.group;
    const Ending end = end_row(p.shaping, w, r, head);
    T* out = static_cast<T*>(p.out) + ((item.sequence.first + query) * p.heads + head) * p.dim;
    const vf divisor = set1(end.divisor), factor = set1(end.factor);
    for (int64_t c = 0; c < p.dim; c += kLanes) {
      vf x = set1(0);
      if (!end.empty) x = load(w.state.values + r * p.padded + c) / divisor;
      if (!end.empty && !plain) x = x * factor;
      store(out + c, x, first(p.dim - c));
    }
    if (p.lse) p.lse[source.lse_at(item.b, item.sequence, head) + query] = end.lse;
  }
}

// ------------------------------------------------------------------------------------------------ sharing out the work

// All items stand on one line, each as long as its cost; a thread takes an equal stretch of it. An item that a border
// falls into is cut between rows, or, when it has few rows and many tiles, between tiles: then the thread with the
// first tile owns the rows and folds the others' tiles after a barrier.
struct Line {
  int64_t total, size;
  int64_t border(int64_t rank) const { return total / size * rank + total % size * rank / size; }
};

int64_t cost(const Problem& p, const Item& item) {
  const Visible low = visible(p, item.sequence, item.row_begin / p.group);
  const Visible high = visible(p, item.sequence, (item.row_end - 1) / p.group);
  return (item.row_end - item.row_begin) * ((low.end - low.begin + high.end - high.begin) / 2 + 32);
}

// Where `at` of an item's cost falls among `parts`, in steps.
int64_t cut(int64_t at, int64_t whole, int64_t parts, int64_t step) {
  if (at <= 0) return 0;
  if (at >= whole) return parts;
  return int64_t(double(at) / double(whole) * double(parts) / double(step) + 0.5) * step;
}

bool cut_by_tiles(const Problem& p, const Item& item) {
  const Span span = tiles(p, item);
  return item.row_end - item.row_begin < kSplitRows && span.end - span.begin >= 4;
}

template <class Source, class F> void each_item(const Problem& p, const Source& source, Team& team, F f) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = source.sequence(b, team);
    const int64_t rows = s.queries * p.group;
    for (int64_t row = 0; row < rows; row += kQueryBlock) {
      const Item item = {b, 0, s, row, row + kQueryBlock < rows ? row + kQueryBlock : rows};
      if (!f(item, cost(p, item))) return;
    }
  }
}

template <class Source, bool Ahead>
void run_item(const Problem& p, const Source& source, const Item& item, const Workspace& w, Team& team) {
  run_tiles<Source, Ahead>(p, source, item, tiles(p, item), false, w, team);
  write_rows(p, source, item, w);
}

// Rows that no sequence claims.
template <class Source> void clear_unclaimed(const Problem& p, const Source& source) {
  using T = typename Source::Element;
  const int64_t width = p.heads * p.dim, rows = source.packed_rows();
  const auto clear = [&](int64_t begin, int64_t end) {
    begin = begin < 0 ? 0 : begin, end = end < rows ? end : rows;
    if (begin >= end) return;
    memset(static_cast<T*>(p.out) + begin * width, 0, size_t((end - begin) * width) * sizeof(T));
    if (p.lse)
      for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t i = begin; i < end; ++i) p.lse[h * rows + i] = -__builtin_inff();
  };
  clear(0, source.cu_q()[0]);
  clear(source.cu_q()[p.batch], rows);
}

template <class Source> void run(const Problem& p, const Source& source, const AttentionScratch& size, Team& team) {
  if (source.packed_rows() && team.rank == 0) clear_unclaimed(p, source);
  const Workspace w = carve(team.scratch, size, team.rank, p.padded);
  Line line = {0, team.size};
  bool barrier = false;
  each_item(p, source, team, [&](const Item& item, int64_t c) {
    line.total += c * p.kv_heads;
    barrier = barrier || (team.size > 1 && cut_by_tiles(p, item));
    return true;
  });
  const int64_t begin = line.border(team.rank), end = line.border(team.rank + 1);
  Item owned = {};    // cut by tiles, the first of them here
  int64_t owned_at = 0, owned_cost = 0, at = 0;
  each_item(p, source, team, [&](Item item, int64_t c) {
    for (item.kv_head = 0; item.kv_head < p.kv_heads; ++item.kv_head, at += c) {
      if (at + c <= begin) continue;
      if (at >= end) return false;
      const int64_t rows = item.row_end - item.row_begin;
      if (team.size > 1 && cut_by_tiles(p, item)) {
        const Span whole = tiles(p, item);
        const int64_t count = whole.end - whole.begin;
        const Span span = {whole.begin + cut(begin - at, c, count, 1), whole.begin + cut(end - at, c, count, 1)};
        if (span.begin >= span.end) continue;
        run_tiles<Source, !Source::kPacked>(p, source, item, span, span.begin > whole.begin, w, team);
        if (span.begin > whole.begin) continue;
        if (span.end == whole.end)
          write_rows(p, source, item, w);
        else
          owned = item, owned_at = at, owned_cost = c;
      } else {
        const int64_t step = rows >= kSplitRows ? 6 : 1, first_row = item.row_begin;
        Item part = item;
        part.row_begin = first_row + cut(begin - at, c, rows, step);
        part.row_end = first_row + cut(end - at, c, rows, step);
        if (part.row_end > item.row_end) part.row_end = item.row_end;
        if (part.row_begin >= part.row_end) continue;
        if (!Source::kPacked && rows < kSplitRows)
          run_item<Source, !Source::kPacked>(p, source, part, w, team);
        else
          run_item<Source, false>(p, source, part, w, team);
      }
    }
    return true;
  });
  if (!barrier) return;
  sync(team);
  if (!owned.row_end) return;
  const Span whole = tiles(p, owned);
  const int64_t count = whole.end - whole.begin, rows = owned.row_end - owned.row_begin;
  for (int64_t other = team.rank + 1; other < team.size; ++other) {
    const Span span = {whole.begin + cut(line.border(other) - owned_at, owned_cost, count, 1),
                       whole.begin + cut(line.border(other + 1) - owned_at, owned_cost, count, 1)};
    float* partial = carve(team.scratch, size, other, p.padded).partial;
    for (int64_t t = span.begin; t < span.end; ++t)
      for (int64_t r = 0; r < rows; ++r) {
        const Visible v = w.visible[r];
        if (v.begin >= v.end || v.begin >= (t + 1) * kKvTile || v.end <= t * kKvTile) continue;
        const float* values = partial_at(p, partial, t - span.begin, rows, r);
        if (v.begin / kKvTile == t)
          fastllm::begin(w.state, r, values[p.padded], values[p.padded + 1], values, p.padded);
        else
          fold(w.state, r, values[p.padded], values[p.padded + 1], values, p.padded);
      }
    if (span.end == whole.end) break;
  }
  write_rows(p, source, owned, w);
}

}  // namespace

namespace FASTLLM_TIER {

void attention(const AttentionArgs& a, Team& team) noexcept {
  Problem p = describe(a, shaping_of(a));
  p.lse = a.lse;
  with_dtype(a.dtype, [&](auto element) { run(p, Dense<decltype(element)>{a}, layout(a), team); });
}

void paged_attention(const PagedAttentionArgs& a, Team& team) noexcept {
  Shaping shaping = {};
  shaping.cap = float(a.softcap), shaping.alibi = a.alibi, shaping.sinks = a.sinks;
  shaping.scores = a.softcap != 0 || a.alibi;
  const Problem p = describe(a, shaping);
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.scales)
      with_page_bytes(a.page_dtype, [&](auto e) { run(p, Paged<T, decltype(e)>{a}, layout(a), team); });
    else
      run(p, Paged<T, T>{a}, layout(a), team);
  });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
