// attention_backward: dq, dk, dv, and the gradients of bias and sinks. Weights are computed again, from lse, in tiles:
//
//   p = exp(score - lse), ds = p * (dout . v - rowsum(dout * out)), dv += p^T dout, dk += ds^T q, dq += ds k
//
// A tile of 256 keys meets all query rows that see it, in blocks; within a block 64 keys at a time, so that what is at
// work stays in the caches. A key's dk and dv are sums over query rows ascending, one FMA chain for each block, and the
// chains are added in order; a row's dq is one chain over keys ascending. Where there are few heads the keys are cut in
// pieces, by the shapes alone, and the pieces' dq are added in order. So every sum has one order, whichever thread
// takes which piece; each takes the next one that is left.
//
// Rows and keys that do not see each other never meet in the arithmetic, NaN or not.
#include "attention_source.h"

namespace fastllm {
namespace {

constexpr int64_t kStep = 64;    // keys at work at once; Dropout's masks have as many bits

struct Problem {
  const AttentionBackwardArgs& a;
  GradientScratch size;
  Shaping shaping;
  int64_t group, padded, bias_queries, bias_keys;
  float *delta, *dq;    // shared by the team: rowsum(dout * out) as lse lies; where there are pieces, dq of each
  int64_t* next;        // the piece that nobody has taken
};

struct Workspace {
  float *query, *upstream;    // [block][kQueryStride]: rows of q and dout
  float *scores, *slopes;     // [block][kScoreStride]: p, then what is kept of it; dout . v, then ds
  float *key_panels, *value_panels, *keys, *dk, *dv, *dq;
  float *lse, *delta;    // per row of the block
  Visible* visible;      // likewise, absolute
};
Workspace carve(const Problem& p, Team& team) {
  float* at = reinterpret_cast<float*>(team.scratch) + p.size.shared + team.rank * p.size.thread;
  Workspace w;
  w.query = at, at += p.size.rows;
  w.upstream = at, at += p.size.rows;
  w.scores = at, at += p.size.scores;
  w.slopes = at, at += p.size.scores;
  w.key_panels = at, at += p.size.panels;
  w.value_panels = at, at += p.size.panels;
  w.keys = at, at += p.size.tile;
  w.dk = at, at += p.size.tile;
  w.dv = at, at += p.size.tile;
  w.dq = at, at += p.size.own_dq;
  w.visible = reinterpret_cast<Visible*>(at), at += kGradientBlock * 4;
  w.lse = at, at += kGradientBlock;
  w.delta = at;
  return w;
}

// Query rows of one sequence that share a KV head, as in attention.cpp: row i * group + g is head g of the group at
// query i.
struct Item {
  int64_t b, kv_head;
  Sequence sequence;
  float* dq;    // [rows][padded]
};

int64_t row_of(const Problem& p, const Item& item, int64_t head, int64_t query) {    // in lse and delta
  const Sequence& s = item.sequence;
  return (p.a.cu_q ? head * p.a.queries + s.first : (item.b * p.a.heads + head) * p.a.queries) + query;
}
Visible visible(const Problem& p, const Sequence& s, int64_t query) {
  return fastllm::visible(p.a.causal, p.a.window, s.queries, s.keys, query);
}

// ------------------------------------------------------------------------------------------------------- the products

// out[r][16 c ..] += sum over rows i of p[i][r] * x[i][16 c ..]. The sum starts from zero: a chain over all rows of a
// long sequence would lose accuracy.
template <int R, int N>
FL_INLINE void outer_block(const float* p, const float* x, Visible rows, float* out, int64_t out_row) {
  vf acc[R][N];
  FL_UNROLL for (int r = 0; r < R; ++r)
    FL_UNROLL for (int c = 0; c < N; ++c) acc[r][c] = set1(0);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    vf w[N];
    FL_UNROLL for (int c = 0; c < N; ++c) w[c] = load(x + i * kQueryStride + c * kLanes);
    FL_UNROLL for (int r = 0; r < R; ++r) {
      const vf y = set1(p[i * kScoreStride + r]);
      FL_UNROLL for (int c = 0; c < N; ++c) acc[r][c] = fma(y, w[c], acc[r][c]);
    }
  }
  FL_UNROLL for (int r = 0; r < R; ++r)
    FL_UNROLL for (int c = 0; c < N; ++c) {
      float* at = out + r * out_row + c * kLanes;
      store(at, load(at) + acc[r][c]);
    }
}
template <int R, int N>
void outer_columns(const float* p, const float* x, Visible rows, int64_t column, int64_t padded, float* out) {
  for (; column + N * kLanes <= padded; column += N * kLanes)
    outer_block<R, N>(p, x + column, rows, out + column, padded);
  if constexpr (N > 1)
    if (column < padded) outer_columns<R, N / 2>(p, x, rows, column, padded, out);
}

// R keys from key j on: out[j + r] += sum over the rows that see the key. Rows that all R see go through the register
// tile, the few at both ends key by key.
template <int R>
void weigh_rows(const float* p, const float* x, const Visible* rows, int64_t padded, float* out) {
  Visible common = rows[0];
  for (int r = 1; r < R; ++r) {
    if (rows[r].begin > common.begin) common.begin = rows[r].begin;
    if (rows[r].end < common.end) common.end = rows[r].end;
  }
  const bool none = common.begin >= common.end;
  for (int r = 0; r < R; ++r) {
    const Visible head = {rows[r].begin, none ? rows[r].end : common.begin};
    if (head.begin < head.end) outer_columns<1, width(1)>(p + r, x, head, 0, padded, out + r * padded);
  }
  if (none) return;
  outer_columns<R, width(R)>(p, x, common, 0, padded, out);
  for (int r = 0; r < R; ++r) {
    const Visible tail = {common.end, rows[r].end};
    if (tail.begin < tail.end) outer_columns<1, width(1)>(p + r, x, tail, 0, padded, out + r * padded);
  }
}

// ------------------------------------------------------------------------------------------------------ the softmax

// Adds ds of panel `panel`, of which the row sees `keys`, to the bias's gradient.
void add_bias_gradient(const Problem& p, const RowAt& at, int64_t base, int64_t panel, Visible keys, vf ds) {
  const AttentionBackwardArgs& a = p.a;
  const int64_t b = a.bias_batch ? at.b : 0, h = a.bias_head ? at.head : 0, i = a.bias_query ? at.query : 0;
  float* row = a.dbias + ((b * (a.bias_head ? a.heads : 1) + h) * p.bias_queries + i) * p.bias_keys;
  const vf seen = keep(ds, panel, keys, set1(0));
  if (!a.bias_key) {
    row[0] += sum(seen);
    return;
  }
  const vm inside = first(keys.end - panel * kLanes);
  row += base + panel * kLanes;
  store(row, load(row, inside) + seen, inside);
}

// One row against the step's keys: s holds scale * q . k and becomes the weight (what dropout keeps of it), d holds
// dout . v and becomes the gradient of scale * q . k.
void gradient_row(const Problem& p, const RowAt& at, int64_t base, Visible keys, float lse, float delta, float* s,
                  float* d) {
  const Shaping& shape = p.shaping;
  const int64_t p0 = keys.begin / kLanes, p1 = (keys.end + kLanes - 1) / kLanes;
  const vf shift = set1(lse == -__builtin_inff() ? 0.0f : lse), total = set1(delta);
  if (!shape.scores && !shape.drops) {
    for (int64_t i = p0; i < p1; ++i) {
      const vf weight = exp_not_positive(load(s + i * kLanes) - shift);
      store(s + i * kLanes, weight);
      store(d + i * kLanes, weight * (load(d + i * kLanes) - total));
    }
    return;
  }
  float slope[kStep];    // of the cap
  if (shape.cap != 0)
    for (int64_t i = p0; i < p1; ++i) {
      const vf t = soft_cap(load(s + i * kLanes), set1(shape.cap)) / set1(shape.cap);
      store(slope + i * kLanes, set1(1) - t * t);
    }
  if (shape.scores) shape_scores(shape, at, base, keys, s);
  uint64_t kept = shape.drops ? kept_keys(shape, at, base) >> p0 * kLanes : 0;
  const vf scale = set1(shape.dropout.scale);
  for (int64_t i = p0; i < p1; ++i, kept >>= kLanes) {
    const vf weight = exp_not_positive(load(s + i * kLanes) - shift);
    vf used = weight, gradient = load(d + i * kLanes);
    if (shape.drops) used = drop(used, kept, scale), gradient = drop(gradient, kept, scale);
    gradient = weight * (gradient - total);
    if (p.a.dbias) add_bias_gradient(p, at, base, i, keys, gradient);
    if (shape.cap != 0) gradient = gradient * load(slope + i * kLanes);
    store(s + i * kLanes, used), store(d + i * kLanes, gradient);
  }
}

// ------------------------------------------------------------------------------------------------------ one KV tile

// The block's rows against keys [step, step + count) of the tile at `base`.
void run_step(const Problem& p, const Item& item, const Workspace& w, int64_t first_row, int64_t rows, int64_t base,
              int64_t step, int64_t count, const float* keys, int64_t key_row) {
  const int64_t dim = p.a.dim, padded = p.padded, from = base + step;
  KvTile<float> key_tile, value_tile;
  key_tile.value_row = key_row;
  for (int64_t i = 0; i * kLanes < count; ++i) {
    key_tile.keys[i] = w.key_panels + (step / kLanes + i) * dim * kLanes;
    value_tile.keys[i] = w.value_panels + (step / kLanes + i) * dim * kLanes;
    key_tile.values[i] = keys + (step + i * kLanes) * key_row;
  }
  const auto inside = [&](int64_t key) { return key <= from ? 0 : key >= from + count ? count : key - from; };
  const auto seen = [&](int64_t r) { return Visible{inside(w.visible[r].begin), inside(w.visible[r].end)}; };
  const vf scale = set1(float(p.a.scale));
  for (int64_t r = 0, n; r < rows; r += n) {
    n = group_rows(rows - r);
    Visible each[kGroupRows], any = {count, 0};
    for (int64_t i = 0; i < n; ++i) {
      each[i] = seen(r + i);
      if (each[i].begin >= each[i].end) continue;
      if (each[i].begin < any.begin) any.begin = each[i].begin;
      if (each[i].end > any.end) any.end = each[i].end;
    }
    if (any.begin >= any.end) continue;
    float *s = w.scores + r * kScoreStride, *d = w.slopes + r * kScoreStride;
    with_rows(n, [&](auto number) {
      constexpr int R = decltype(number)::value;
      const int64_t p0 = any.begin / kLanes, p1 = (any.end + kLanes - 1) / kLanes;
      score_panels<R, width(R), false>(w.query + r * kQueryStride, key_tile, p0, p1, dim, scale, s);
      score_panels<R, width(R), false>(w.upstream + r * kQueryStride, value_tile, p0, p1, dim, set1(1), d);
      for (int i = 0; i < R; ++i) {
        if (each[i].begin >= each[i].end) continue;
        const int64_t row = first_row + r + i, query = row / p.group, head = item.kv_head * p.group + row % p.group;
        const Sequence& q = item.sequence;
        const RowAt at = {item.b, head, query, q.keys - q.queries + query,
                          q.first * p.a.heads + head * q.queries + query};
        gradient_row(p, at, from, each[i], w.lse[r + i], w.delta[r + i], s + i * kScoreStride, d + i * kScoreStride);
      }
      weigh_values<R, false>(d, key_tile, each, padded, item.dq + (first_row + r) * padded, false);
    });
  }
  int64_t begin = 0, end = 0;
  for (int64_t j = 0, n; j < count; j += n) {
    n = group_rows(count - j);
    Visible each[kGroupRows];
    for (int64_t i = 0; i < n; ++i) {    // neither end of what sees a key ever goes back
      while (begin < rows && w.visible[begin].end <= from + j + i) ++begin;
      while (end < rows && w.visible[end].begin <= from + j + i) ++end;
      each[i] = {begin, end};
    }
    with_rows(n, [&](auto number) {
      constexpr int R = decltype(number)::value;
      weigh_rows<R>(w.scores + j, w.upstream, each, padded, w.dv + (step + j) * padded);
      weigh_rows<R>(w.slopes + j, w.query, each, padded, w.dk + (step + j) * padded);
    });
  }
}

template <class T>
void write_rows(const float* from, int64_t rows, int64_t dim, int64_t padded, float scale, T* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < dim; c += kLanes)
      store(to + r * to_row + c, load(from + r * padded + c) * set1(scale), first(dim - c));
}

template <class T> void run_tile(const Problem& p, const Item& item, const Workspace& w, int64_t t) {
  const AttentionBackwardArgs& a = p.a;
  const Sequence& s = item.sequence;
  const int64_t base = t * kKvTile, left = s.keys - base, count = left < kKvTile ? left : kKvTile;
  const bool packed = a.cu_q != nullptr;
  const auto at = [&](const void* x, int64_t batch, int64_t row, int64_t head, int64_t first, int64_t h) {
    return static_cast<const T*>(x) + (packed ? 0 : item.b * batch) + first * row + h * head;
  };
  const T* k = at(a.k, a.k_batch, a.k_row, a.k_head, s.first_key + base, item.kv_head);
  const T* v = at(a.v, a.v_batch, a.v_row, a.v_head, s.first_key + base, item.kv_head);
  for (int64_t i = 0; i * kLanes < count; ++i) {
    pack_panel(k + i * kLanes * a.k_row, a.k_row, count - i * kLanes, a.dim, w.key_panels + i * kLanes * a.dim);
    pack_panel(v + i * kLanes * a.v_row, a.v_row, count - i * kLanes, a.dim, w.value_panels + i * kLanes * a.dim);
  }
  copy_rows(k, a.k_row, count, a.dim, w.keys, p.padded);
  memset(w.dk, 0, size_t(count * p.padded) * sizeof(float));
  memset(w.dv, 0, size_t(count * p.padded) * sizeof(float));
  const int64_t rows = s.queries * p.group, first = packed ? s.first : 0;
  for (int64_t row = 0; row < rows; row += kGradientBlock) {
    const int64_t n = row + kGradientBlock < rows ? kGradientBlock : rows - row;
    const Visible low = visible(p, s, row / p.group), high = visible(p, s, (row + n - 1) / p.group);
    if (high.end <= base || low.begin >= base + count) continue;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t query = (row + r) / p.group, head = item.kv_head * p.group + (row + r) % p.group;
      const T* q = at(a.q, a.q_batch, a.q_row, a.q_head, first + query, head);
      copy_rows(q, 0, 1, a.dim, w.query + r * kQueryStride, 0);
      const T* dout = at(a.dout, a.dout_batch, a.dout_row, a.dout_head, first + query, head);
      copy_rows(dout, 0, 1, a.dim, w.upstream + r * kQueryStride, 0);
      w.visible[r] = visible(p, s, query);
      const int64_t index = row_of(p, item, head, query);
      w.lse[r] = a.lse[index], w.delta[r] = p.delta[index];
    }
    for (int64_t step = 0; step < count; step += kStep)
      run_step(p, item, w, row, n, base, step, step + kStep < count ? kStep : count - step, w.keys, p.padded);
  }
  const int64_t row = a.kv_heads * a.dim, to = ((packed ? 0 : item.b * a.keys) + s.first_key + base) * row;
  T *dk = static_cast<T*>(a.dk) + to + item.kv_head * a.dim, *dv = static_cast<T*>(a.dv) + to + item.kv_head * a.dim;
  write_rows(w.dk, count, a.dim, p.padded, float(a.scale), dk, row);
  write_rows(w.dv, count, a.dim, p.padded, 1.0f, dv, row);
}

// ---------------------------------------------------------------------------------------------------- the sums of rows

// delta = rowsum(dout * out), for this thread's share of the rows.
template <class T> void sum_rows(const Problem& p, Team& team) {
  const AttentionBackwardArgs& a = p.a;
  const int64_t sequences = a.cu_q ? 1 : a.batch;
  const Range mine = share(team, sequences * a.queries);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t b = i / a.queries, query = i % a.queries;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* out = static_cast<const T*>(a.out) + (i * a.heads + h) * a.dim;
      const T* dout = static_cast<const T*>(a.dout) + b * a.dout_batch + query * a.dout_row + h * a.dout_head;
      vf acc = set1(0);
      for (int64_t c = 0; c < a.dim; c += kLanes) {
        const vm inside = first(a.dim - c);
        acc = fma(load(out + c, inside), load(dout + c, inside), acc);
      }
      p.delta[(b * a.heads + h) * a.queries + query] = sum(acc);
    }
  }
}

// dsink = -sum over rows of exp(sink - lse) * delta, for this thread's share of the heads. A row that no sequence
// claims has lse -inf.
void sum_sinks(const Problem& p, Team& team) {
  const AttentionBackwardArgs& a = p.a;
  const Range mine = share(team, a.heads);
  const vf lowest = set1(-__builtin_inff());
  for (int64_t h = mine.begin; h < mine.end; ++h) {
    vf acc = set1(0);
    for (int64_t b = 0; b < (a.cu_q ? 1 : a.batch); ++b)
      for (int64_t i = 0; i < a.queries; i += kLanes) {
        const int64_t at = (b * a.heads + h) * a.queries + i;
        const vm inside = first(a.queries - i);
        const vf lse = load(a.lse + at, inside), delta = load(p.delta + at, inside);
        const vf term = exp(set1(a.sinks[h]) - lse) * delta;
        const vm claimed = lanes(bits(inside) & ~bits(lowest >= lse));
        acc = acc - select(claimed, term, set1(0));
      }
    a.dsinks[h] = sum(acc);
  }
}

template <class T> void write_dq(const Problem& p, const Item& item, const float* dq) {
  const int64_t heads = p.a.heads, dim = p.a.dim, rows = item.sequence.queries * p.group;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (item.sequence.first + r / p.group) * heads + item.kv_head * p.group + r % p.group;
    write_rows(dq + r * p.padded, 1, dim, p.padded, float(p.a.scale), static_cast<T*>(p.a.dq) + row * dim, 0);
  }
}

// Rows that belong to no sequence have no gradient.
template <class T> void clear_unclaimed(void* x, const int32_t* cu, int64_t batch, int64_t rows, int64_t width) {
  const int64_t begin = cu[0] < rows ? cu[0] : rows, end = cu[batch] > 0 ? cu[batch] : 0;
  T* at = static_cast<T*>(x);
  if (begin > 0) memset(at, 0, size_t(begin * width) * sizeof(T));
  if (end < rows) memset(at + end * width, 0, size_t((rows - end) * width) * sizeof(T));
}

// ------------------------------------------------------------------------------------------------ sharing out the work

Item item_at(const Problem& p, const Workspace& w, int64_t b, int64_t kv_head, int64_t piece, Team& team) {
  const AttentionBackwardArgs& a = p.a;
  Item item = {b, kv_head, dense_sequence(a, b, team), nullptr};
  const int64_t all = (a.cu_q ? 1 : a.batch) * a.queries * a.heads;
  const int64_t before = item.sequence.first * a.heads + kv_head * p.group * item.sequence.queries;
  item.dq = p.size.pieces == 1 ? w.dq : p.dq + (piece * all + before) * p.padded;
  return item;
}

template <class T> void run_piece(const Problem& p, const Item& item, int64_t piece, const Workspace& w) {
  const int64_t tiles = attention_tiles(item.sequence.keys), pieces = p.size.pieces;
  memset(item.dq, 0, size_t(item.sequence.queries * p.group * p.padded) * sizeof(float));
  for (int64_t t = tiles * piece / pieces; t < tiles * (piece + 1) / pieces; ++t) run_tile<T>(p, item, w, t);
  if (pieces == 1) write_dq<T>(p, item, item.dq);
}

template <class T> void run(const Problem& p, Team& team) {
  const AttentionBackwardArgs& a = p.a;
  const Workspace w = carve(p, team);
  if (team.rank == 0) {
    *p.next = 0;
    if (a.cu_q) {
      clear_unclaimed<T>(a.dq, a.cu_q, a.batch, a.queries, a.heads * a.dim);
      clear_unclaimed<T>(a.dk, a.cu_k, a.batch, a.keys, a.kv_heads * a.dim);
      clear_unclaimed<T>(a.dv, a.cu_k, a.batch, a.keys, a.kv_heads * a.dim);
    }
  }
  sum_rows<T>(p, team);
  sync(team);
  if (a.dsinks) sum_sinks(p, team);
  const int64_t pieces = p.size.pieces, heads = p.size.merge_heads ? a.kv_heads : 1;
  const int64_t across = a.kv_heads / heads, batch = p.size.merge_batch ? a.batch : 1;
  const int64_t units = (a.batch ? a.batch / batch : 0) * across * pieces;
  for (int64_t u; (u = __atomic_fetch_add(p.next, 1, __ATOMIC_RELAXED)) < units;) {
    const int64_t piece = u % pieces, head = u / pieces % across * heads, b = u / pieces / across * batch;
    for (int64_t i = b; i < b + batch; ++i)
      for (int64_t h = head; h < head + heads; ++h) run_piece<T>(p, item_at(p, w, i, h, piece, team), piece, w);
  }
  if (pieces == 1) return;
  sync(team);
  for (int64_t u = team.rank; u < a.batch * a.kv_heads; u += team.size) {
    const Item whole = item_at(p, w, u / a.kv_heads, u % a.kv_heads, 0, team);
    const int64_t size = whole.sequence.queries * p.group * p.padded;
    for (int64_t piece = 1; piece < pieces; ++piece) {
      const float* part = item_at(p, w, whole.b, whole.kv_head, piece, team).dq;
      for (int64_t i = 0; i < size; i += kLanes) store(whole.dq + i, load(whole.dq + i) + load(part + i));
    }
    write_dq<T>(p, whole, whole.dq);
  }
}

}  // namespace

namespace FASTLLM_TIER {

void attention_backward(const AttentionBackwardArgs& a, Team& team) noexcept {
  const GradientScratch size = layout(a);
  float* scratch = reinterpret_cast<float*>(team.scratch);
  const Problem p = {a, size, shaping_of(a), a.heads / a.kv_heads, attention_padded(a.dim), a.bias_queries, a.bias_keys,
                     scratch + 16, scratch + 16 + size.delta, reinterpret_cast<int64_t*>(scratch)};
  with_dtype(a.dtype, [&](auto element) { run<decltype(element)>(p, team); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
