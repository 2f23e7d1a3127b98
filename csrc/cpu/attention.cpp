// attention: softmax(scale * q k^T) v, dense and paged, prefill and decode, all through the same tiles.
//
// Keys are cut in tiles of 256 at absolute positions. Each tile gives a row its own (highest, sum, values); the tiles are
// folded left to right. So a row has the same bits in a full forward, in any chunk of a prefill and in a decode step, with
// any page order and any number of threads. Work is cut when the kernel runs, from lengths read from memory.
#include "attention_tile.h"

namespace fastllm {
namespace {

struct Sequence {
  int64_t queries, keys;    // this call's tokens; all keys, the tokens' own included
};

// ------------------------------------------------------------------------------------------- where queries and keys lie

struct Dense {
  const AttentionArgs& a;
  static constexpr bool kPacked = true;    // key rows become panels in scratch
  Sequence sequence(int64_t, Team&) const { return {a.queries, a.keys}; }
  int64_t row(int64_t b, int64_t i) const { return b * a.queries + i; }
  const float* query(int64_t b, int64_t i, int64_t head) const { return a.q + b * a.q_batch + i * a.q_row + head * a.q_head; }

  // Fills the tile for keys [visible) of tile t.
  void load(KvTile& tile, int64_t b, int64_t head, int64_t t, Visible visible, int64_t keys, int64_t, float* packed, Team&) const {
    const float* k = a.k + b * a.k_batch + head * a.k_head + t * kKvTile * a.k_row;
    const float* v = a.v + b * a.v_batch + head * a.v_head + t * kKvTile * a.v_row;
    tile.value_row = a.v_row;
    for (int64_t p = visible.begin / kLanes; p * kLanes < visible.end; ++p) {
      float* panel = packed + p * kLanes * a.dim;
      pack_panel(k + p * kLanes * a.k_row, a.k_row, keys - t * kKvTile - p * kLanes, a.dim, panel);
      tile.keys[p] = panel;
      tile.values[p] = v + p * kLanes * a.v_row;
    }
  }
};

struct Paged {
  const PagedAttentionArgs& a;
  static constexpr bool kPacked = false;
  Sequence sequence(int64_t b, Team& team) const {    // an invalid sequence is reported and gives no row
    const int64_t begin = a.cu_q[b], end = a.cu_q[b + 1], keys = a.context_len[b];
    if (begin >= 0 && begin <= end && end <= a.rows && keys >= 0 && keys <= a.max_pages * kPage && (a.pages || !keys)) return {end - begin, keys};
    report(team, kIndexOutOfRange);
    return {0, 0};
  }
  int64_t row(int64_t b, int64_t i) const { return a.cu_q[b] + i; }
  const float* query(int64_t b, int64_t i, int64_t head) const { return a.q + row(b, i) * a.q_row + head * a.q_head; }

  void load(KvTile& tile, int64_t b, int64_t head, int64_t t, Visible visible, int64_t keys, int64_t ahead, float*, Team& team) const {
    const int64_t p0 = visible.begin / kLanes, p1 = (visible.end + kLanes - 1) / kLanes, first = t * kPanels;
    tile.value_row = a.dim;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t at = page(b, first + p, team);
      tile.keys[p] = keys_at(at, head);
      tile.values[p] = a.v_pages + at * a.v_page + head * a.dim * kPage;
    }
    if (!ahead) return;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t next = p + ahead, after = first + kPanels + next - p1;    // within the tile, or in the next one
      tile.keys_ahead[p] = next < p1 ? tile.keys[next] : tile.values[next - p1 + p0 < p1 ? next - p1 + p0 : p];
      tile.values_ahead[p] = next < p1 ? tile.values[next] : after * kPage < keys ? keys_at(page(b, after, team), head) : tile.values[p];
    }
  }
  const float* keys_at(int64_t page, int64_t head) const { return a.k_pages + page * a.k_page + head * a.dim * kPage; }
  int64_t page(int64_t b, int64_t index, Team& team) const {
    const int64_t p = a.block_table[b * a.table_row + index];
    if (p >= 0 && p < a.pages) return p;
    report(team, kIndexOutOfRange);
    return 0;
  }
};

// ------------------------------------------------------------------------------------------------------- one work item

struct Problem {
  float* out;
  int64_t batch, heads, kv_heads, group, dim, padded, causal, window;
  float scale, softcap;
};
template <class Args> Problem describe(const Args& a) {
  const int64_t padded = (a.dim + kLanes - 1) / kLanes * kLanes;
  return {a.out, a.batch, a.heads, a.kv_heads, a.heads / a.kv_heads, a.dim, padded, a.causal, a.window, float(a.scale), float(a.softcap)};
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

// Query rows of one sequence that share a KV head: row i * group + g is head g of the group at query i, so that neighbours
// see nearly the same keys.
struct Item {
  int64_t b, kv_head;
  Sequence sequence;
  int64_t row_begin, row_end;
};
struct Span {
  int64_t begin, end;    // KV tiles
};

Visible visible(const Problem& p, const Sequence& s, int64_t query) {
  const int64_t position = s.keys - s.queries + query;
  Visible v = {0, p.causal ? position + 1 : s.keys};
  if (p.window && position + 1 > p.window) v.begin = position + 1 - p.window;
  if (v.end < v.begin) v.end = v.begin;
  return v;
}
Span tiles(const Problem& p, const Item& item) {
  const Visible low = visible(p, item.sequence, item.row_begin / p.group), high = visible(p, item.sequence, (item.row_end - 1) / p.group);
  return {low.begin / kKvTile, (high.end + kKvTile - 1) / kKvTile};
}

struct TileResult {
  float highest[kGroupRows], total[kGroupRows];
};

// One group of rows against one tile: results in w.values and r.
template <bool Ahead> void attend(const Problem& p, const Workspace& w, int64_t row, int64_t rows, const KvTile& tile, const Visible* keys, TileResult& r) {
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
    score_panels<R, width(R), Ahead>(w.query + row * kQueryStride, tile, p0, p1, p.dim, set1(p.scale), w.scores);
    for (int i = 0; i < R; ++i)
      if (keys[i].begin < keys[i].end) softmax_tile(w.scores + i * kScoreStride, keys[i], p.softcap, r.highest[i], r.total[i]);
    weigh_values<R, Ahead>(w.scores, tile, keys, p.padded, w.values);
  });
}

int64_t group_rows(int64_t left) { return left <= kGroupRows ? left : 6; }

// A tile's result for one row, kept by a thread that does not own the row: values [padded], then highest and total.
float* partial_at(const Problem& p, float* partial, int64_t tile, int64_t rows, int64_t row) { return partial + (tile * rows + row) * (p.padded + 16); }

// Runs an item's rows over the tiles of `span`, into w.state or, when partial, tile by tile into w.partial.
template <class Source, bool Ahead>
void run_tiles(const Problem& p, const Source& source, const Item& item, Span span, bool partial, const Workspace& w, Team& team) {
  const int64_t rows = item.row_end - item.row_begin;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = item.row_begin + r, query = row / p.group;
    const float* q = source.query(item.b, query, item.kv_head * p.group + row % p.group);
    copy_rows(q, 0, 1, p.dim, w.query + r * kQueryStride, 0);
    w.visible[r] = visible(p, item.sequence, query);
  }
  for (int64_t t = span.begin; t < span.end; ++t) {
    const int64_t base = t * kKvTile;
    const auto inside = [&](int64_t key) { return key <= base ? 0 : key >= base + kKvTile ? kKvTile : key - base; };
    const Visible any = {inside(w.visible[0].begin), inside(w.visible[rows - 1].end)};
    if (any.begin >= any.end) continue;
    KvTile tile;
    const int64_t ahead = Ahead && p.padded == p.dim ? width(int(group_rows(rows))) : 0;
    source.load(tile, item.b, item.kv_head, t, any, item.sequence.keys, ahead, w.keys, team);
    if (p.padded != p.dim) {
      for (int64_t j = any.begin / kLanes; j * kLanes < any.end; ++j) {
        const int64_t end = any.end - j * kLanes, skip = any.begin > j * kLanes ? any.begin - j * kLanes : 0;
        float* to = w.padded_values + j * kLanes * p.padded;
        copy_rows(tile.values[j] + skip * tile.value_row, tile.value_row, (end < kLanes ? end : kLanes) - skip, p.dim, to + skip * p.padded, p.padded);
        tile.values[j] = to;
      }
      tile.value_row = p.padded;
    }
    for (int64_t r = 0, n; r < rows; r += n) {
      n = group_rows(rows - r);
      Visible keys[kGroupRows];
      TileResult result;
      for (int64_t i = 0; i < n; ++i) keys[i] = {inside(w.visible[r + i].begin), inside(w.visible[r + i].end)};
      if (ahead && r == 0)    // the group that meets the tile first
        attend<Ahead>(p, w, r, n, tile, keys, result);
      else
        attend<false>(p, w, r, n, tile, keys, result);
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

// Rows that see no key, or only keys with a score of -inf, are zeros.
template <class Source> void write_rows(const Problem& p, const Source& source, const Item& item, const Workspace& w) {
  for (int64_t r = 0; r < item.row_end - item.row_begin; ++r) {
    const int64_t row = item.row_begin + r, head = item.kv_head * p.group + row % p.group;
    float* out = p.out + (source.row(item.b, row / p.group) * p.heads + head) * p.dim;
    const bool empty = w.visible[r].begin >= w.visible[r].end || w.state.total[r] == 0;
    const vf total = set1(empty ? 1.0f : w.state.total[r]);
    for (int64_t c = 0; c < p.dim; c += kLanes)
      store(out + c, empty ? set1(0) : load(w.state.values + r * p.padded + c) / total, first(p.dim - c));
  }
}

// ------------------------------------------------------------------------------------------------- sharing out the work

// All items stand on one line, each as long as its cost; a thread takes an equal stretch of it. An item that a border falls
// into is cut between rows, or, when it has few rows and many tiles, between tiles: then the thread with the first tile owns
// the rows and folds the others' tiles after a barrier.
struct Line {
  int64_t total, size;
  int64_t border(int64_t rank) const { return total / size * rank + total % size * rank / size; }
};

int64_t cost(const Problem& p, const Item& item) {
  const Visible low = visible(p, item.sequence, item.row_begin / p.group), high = visible(p, item.sequence, (item.row_end - 1) / p.group);
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

template <class Source, bool Ahead> void run_item(const Problem& p, const Source& source, const Item& item, const Workspace& w, Team& team) {
  run_tiles<Source, Ahead>(p, source, item, tiles(p, item), false, w, team);
  write_rows(p, source, item, w);
}

template <class Source> void run(const Problem& p, const Source& source, const AttentionScratch& size, Team& team) {
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
        part.row_begin = first_row + cut(begin - at, c, rows, step), part.row_end = first_row + cut(end - at, c, rows, step);
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

void attention(const AttentionArgs& a, Team& team) noexcept { run(describe(a), Dense{a}, layout(a), team); }

void paged_attention(const PagedAttentionArgs& a, Team& team) noexcept {
  if (team.rank == 0) {    // rows that no sequence claims
    const int64_t width = a.heads * a.dim, begin = a.cu_q[0], end = a.cu_q[a.batch];
    for (int64_t i = 0; i < begin * width && i < a.rows * width; ++i) a.out[i] = 0;
    for (int64_t i = end > 0 ? end * width : 0; i < a.rows * width; ++i) a.out[i] = 0;
  }
  run(describe(a), Paged{a}, layout(a), team);
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
