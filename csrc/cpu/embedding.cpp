// embedding: y[t] = weight[ids[t]], a copy; backward: dweight[v] = sum of dy[t] over the t with ids[t] = v, t ascending, in
// fp32 with one rounding.
#include "simd.h"

namespace fastllm {
namespace {

FL_INLINE int64_t id_at(const void* ids, int64_t wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

template <class T> FL_INLINE const T* row_of(const EmbeddingArgs& a, int64_t t) {    // null: no such row
  const int64_t id = id_at(a.ids, a.wide_ids, t * a.ids_stride);
  return id >= 0 && id < a.vocabulary ? static_cast<const T*>(a.weight) + id * a.weight_stride : nullptr;
}

// The rows of a table lie anywhere: while one is copied, the next is fetched.
template <class T> void forward(const EmbeddingArgs& a, Team& team) {
  const Range range = share(team, a.count);
  const T* row = range.begin < range.end ? row_of<T>(a, range.begin) : nullptr;
  for (int64_t t = range.begin; t < range.end; ++t) {
    const T* next = t + 1 < range.end ? row_of<T>(a, t + 1) : nullptr;
    T* y = static_cast<T*>(a.y) + t * a.cols;
    int64_t i = 0;
    if (row) {
      for (; i + kLanes <= a.cols; i += kLanes) {
        if (next) prefetch(next + i);
        memcpy(y + i, row + i, kLanes * sizeof(T));
      }
      if (i < a.cols) memcpy(y + i, row + i, size_t(a.cols - i) * sizeof(T));
    } else {
      report(team, kIndexOutOfRange);
      for (; i < a.cols; i += kLanes) store(y + i, as_float(seti(0x7fc00000)), first(a.cols - i));    // NaN
    }
    row = next;
  }
}

constexpr int64_t kNone = -1;
constexpr int64_t kRowsAtOnce = 32;    // of the vocabulary, handed out together

// Every id gets the chain of its positions, first to last: each thread links the ids of its own part of the vocabulary.
void link(const EmbeddingBackwardArgs& a, Team& team, int64_t* head, int64_t* next) {
  const Range own = share(team, a.vocabulary);
  for (int64_t v = own.begin; v < own.end; ++v) head[v] = kNone;
  for (int64_t t = a.count - 1; t >= 0; --t) {
    const int64_t id = id_at(a.ids, a.wide_ids, t * a.ids_stride);
    if (id < 0 || id >= a.vocabulary) report(team, kIndexOutOfRange);
    if (id < own.begin || id >= own.end) continue;
    next[t] = head[id];
    head[id] = t;
  }
}

template <bool stream_out, class T> FL_INLINE void put(T* p, vf v) { stream_out ? stream(p, v) : store(p, v); }

template <bool stream_out, class T> void sum_chain(const EmbeddingBackwardArgs& a, const int64_t* next, int64_t chain, T* out) {
  constexpr int64_t kVectors = 4;
  const T* dy = static_cast<const T*>(a.dy);
  int64_t i = 0;
  for (; i + kVectors * kLanes <= a.cols; i += kVectors * kLanes) {
    vf acc[kVectors];
    for (auto& x : acc) x = set1(0);
    for (int64_t t = chain; t != kNone; t = next[t])
      for (int64_t j = 0; j < kVectors; ++j) acc[j] = acc[j] + load(dy + t * a.dy_stride + i + j * kLanes);
    for (int64_t j = 0; j < kVectors; ++j) put<stream_out>(out + i + j * kLanes, acc[j]);
  }
  for (; i < a.cols; i += kLanes) {
    const vm m = first(a.cols - i);
    vf acc = set1(0);
    for (int64_t t = chain; t != kNone; t = next[t]) acc = acc + load(dy + t * a.dy_stride + i, m);
    store(out + i, acc, m);
  }
}

template <bool stream_out, class T> void clear(T* out, int64_t cols) {
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) put<stream_out>(out + i, set1(0));
  if (i < cols) store(out + i, set1(0), first(cols - i));
}

// A row's sum belongs to one thread, whichever: the work is handed out by a counter, since a few ids hold most positions.
template <class T, bool stream_out> void backward(const EmbeddingBackwardArgs& a, Team& team) {
  int64_t* counter = reinterpret_cast<int64_t*>(team.scratch);
  int64_t *head = counter + 8, *next = head + a.vocabulary;
  if (team.rank == 0) __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
  link(a, team, head, next);
  sync(team);
  for (;;) {
    const int64_t begin = __atomic_fetch_add(counter, kRowsAtOnce, __ATOMIC_RELAXED);
    if (begin >= a.vocabulary) break;
    const int64_t end = begin + kRowsAtOnce < a.vocabulary ? begin + kRowsAtOnce : a.vocabulary;
    for (int64_t v = begin; v < end; ++v) {
      T* out = static_cast<T*>(a.dweight) + v * a.cols;
      if (head[v] == kNone)
        clear<stream_out>(out, a.cols);
      else
        sum_chain<stream_out>(a, next, head[v], out);
    }
  }
  if (stream_out) fence();
}

}  // namespace

namespace FASTLLM_TIER {

void embedding(const EmbeddingArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) { forward<decltype(type)>(a, team); });
}
void embedding_backward(const EmbeddingBackwardArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.dweight, a.vocabulary, a.cols * sizeof(T)) ? backward<T, true>(a, team) : backward<T, false>(a, team);
  });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
