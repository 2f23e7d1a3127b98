// What the norms share: the addition of the residual, and sums over rows whose bits do not depend on the number of threads.
#pragma once
#include "columns.h"

namespace fastllm {
namespace {

template <class T> FL_INLINE void add_row(T* s, const T* x, const T* residual, int64_t n) {
  each(n, [&](int64_t i, auto m) { store(s + i, load(x + i, m) + load(residual + i, m), m); });
}

// The rows are cut in groups at places that the team's size does not move; a thread takes whole groups. row(r, partial) adds
// its row to `sums` vectors of cols floats; they lie side by side in `partial`, each padded to whole vectors.
template <class F> FL_INLINE void grouped_rows(Team& team, int64_t rows, int64_t cols, int64_t sums, F row) {
  const int64_t groups = norm_groups(rows), padded = norm_padded(cols) * sums;
  const Range mine = share(team, groups);
  for (int64_t g = mine.begin; g < mine.end; ++g) {
    float* partial = reinterpret_cast<float*>(team.scratch) + g * padded;
    for (int64_t i = 0; i < padded; i += kLanes) store(partial + i, set1(0));
    for (int64_t r = rows * g / groups; r < rows * (g + 1) / groups; ++r) row(r, partial);
  }
  sync(team);
}

// out[i] = the sum over groups, first to last, of the vector number `which`.
FL_INLINE void add_groups(const Team& team, float* out, int64_t rows, int64_t cols, int64_t sums, int64_t which) {
  const int64_t groups = norm_groups(rows), padded = norm_padded(cols);
  const float* partial = reinterpret_cast<const float*>(team.scratch) + which * padded;
  const Range vectors = share(team, padded / kLanes);
  for (int64_t i = vectors.begin * kLanes; i < vectors.end * kLanes; i += kLanes) {
    vf total = set1(0);
    for (int64_t g = 0; g < groups; ++g) total = total + load(partial + g * sums * padded + i);
    store(out + i, total, first(cols - i));
  }
}

}  // namespace
}  // namespace fastllm
