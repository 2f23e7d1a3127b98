// A row of logits as several threads read it: their scratch and what they tell each other.
#pragma once
#include "select.h"

namespace fastllm {
namespace {

// What a thread found in its blocks.
struct alignas(64) Part {
  uint64_t sum, moment, tempered;
  int64_t found, first;
  float max, min, raw_max;
  int32_t nan;
};
static_assert(sizeof(Part) == 64, "sample_scratch counts 64 bytes a thread");

struct RowScratch {
  Part* part;            // [threads]
  float* groups;         // [blocks, 16]: lane maxima of the logits that are sampled from
  float* raw_groups;     // [blocks, 16]: of the logits as given
  uint64_t* sums;        // [blocks]
  float* adjusted;       // the lists below: [blocks * 256 + 16]
  int32_t* counts;
  float* value;          // the candidates, every thread's from its first block on
  int32_t* index;
  float* weight;
  float *work_x, *work_e;
};

[[maybe_unused]] RowScratch row_scratch(char* base, int64_t vocab, int64_t threads) {
  const int64_t blocks = (vocab + kBlock - 1) / kBlock;
  auto take = [&](int64_t bytes) {
    char* p = base;
    base += bytes;
    return p;
  };
  RowScratch s;
  s.part = reinterpret_cast<Part*>(take(threads * 64));
  s.groups = reinterpret_cast<float*>(take(blocks * 64));
  s.raw_groups = reinterpret_cast<float*>(take(blocks * 64));
  s.adjusted = reinterpret_cast<float*>(take(blocks * 4 * kBlock + 64));
  s.counts = reinterpret_cast<int32_t*>(take(blocks * 4 * kBlock + 64));
  s.value = reinterpret_cast<float*>(take(blocks * 4 * kBlock + 64));
  s.index = reinterpret_cast<int32_t*>(take(blocks * 4 * kBlock + 64));
  s.weight = reinterpret_cast<float*>(take(blocks * 4 * kBlock + 64));
  s.work_x = reinterpret_cast<float*>(take(blocks * 4 * kBlock + 64));
  s.work_e = reinterpret_cast<float*>(take(blocks * 4 * kBlock + 64));
  s.sums = reinterpret_cast<uint64_t*>(take(blocks * 8));
  return s;
}

// Puts every thread's candidates side by side; returns how many there are. For one thread, after a barrier.
[[maybe_unused]] int64_t join(const RowScratch& s, const Team& team, int64_t blocks) {
  int64_t total = s.part[0].found;
  for (int64_t t = 1; t < team.size; ++t) {
    const int64_t from = blocks * t / team.size * kBlock, n = s.part[t].found;
    memmove(s.value + total, s.value + from, size_t(n) * 4);
    memmove(s.index + total, s.index + from, size_t(n) * 4);
    total += n;
  }
  return total;
}

// Runs row(r, team, scratch) for every row: whole rows by single threads while there is one for each, the rest by all.
template <class F> FL_INLINE void for_rows(int64_t count, int64_t vocab, Team& team, F row) {
  const int64_t whole = count / team.size * team.size, bytes = sample_scratch(vocab, team.size);
  Team alone{0, 1, team.barrier, nullptr, team.status};
  const Range mine = share(team, whole);
  const RowScratch own = row_scratch(team.scratch + team.rank * bytes, vocab, 1);
  for (int64_t r = mine.begin; r < mine.end; ++r) row(r, alone, own);
  for (int64_t r = whole; r < count; ++r) {
    if (r) sync(team);    // the scratch is in use until here
    row(r, team, row_scratch(team.scratch, vocab, team.size));
  }
}

}  // namespace
}  // namespace fastllm
