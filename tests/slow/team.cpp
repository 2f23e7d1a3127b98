// The core without Python and torch: barrier, launches and plans on plain std::threads, checked against straightforward
// loops. test_sanitizers.py builds it with ThreadSanitizer, test_processors.py runs it on emulated processors.
//   team EXPECTED_ISA THREADS ROUNDS        exit 0: all right; 1: said on stderr
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <thread>
#include <vector>

#include "../../csrc/cpu/runtime.h"
#include "../../csrc/cpu/sync.h"

#ifdef BROKEN_BARRIER    // ThreadSanitizer must see this, or it sees nothing
#define sync(team) relax()
#endif

namespace fastllm {    // in place of threads.cpp

static int team_size = 1;
int max_threads() { return team_size; }
char* scratch(int64_t bytes) {
  static std::vector<char> arena;
  if (int64_t(arena.size()) < bytes + 64) arena.resize(size_t(bytes + 64));
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(arena.data()) + 63) / 64 * 64);
}
void check_scratch(int64_t, const char*) {}    // no kernel that runs here has any
void parallel(int threads, char* buffer, int32_t* status, void (*body)(void*, Team&), void* context) {
  Barrier barrier{0, 0};
  std::vector<std::thread> others;
  const auto enter = [&](int rank) {
    Team team{rank, threads, &barrier, buffer, status};
    body(context, team);
  };
  for (int rank = 1; rank < threads; ++rank) others.emplace_back(enter, rank);
  enter(0);
  for (std::thread& t : others) t.join();
}

}  // namespace fastllm

using namespace fastllm;

static void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "team: %s\n", what);
  exit(1);
}

// Every thread adds to its own slot, meets the others, and reads all slots: plain memory, ordered by the barrier alone.
static void hammer(int threads, int rounds) {
  struct Slots {
    std::vector<int64_t> value;
    int rounds;
    int32_t wrong;
  } slots{std::vector<int64_t>(size_t(threads), 0), rounds, 0};
  int32_t status = 0;
  parallel(threads, nullptr, &status, [](void* context, Team& team) {
    Slots& s = *static_cast<Slots*>(context);
    for (int64_t round = 1; round <= s.rounds; ++round) {
      s.value[size_t(team.rank)] += team.rank + 1;
      sync(team);
      int64_t sum = 0;
      for (int64_t v : s.value) sum += v;
      if (sum != round * team.size * (team.size + 1) / 2) __atomic_store_n(&s.wrong, 1, __ATOMIC_RELAXED);
      sync(team);
    }
  }, &slots);
  require(!slots.wrong, "a thread left the barrier before the others arrived");
}

static int kernel(const char* name) {
  for (int i = 0; i < kKernelCount; ++i)
    if (!strcmp(kKernels[i].name, name)) return i;
  require(false, "the kernel table lacks rms_norm");
  return -1;
}

using Floats = std::vector<float>;
static void fill(Floats& v, uint32_t seed) {
  for (float& x : v) x = float(int32_t((seed = seed * 1664525u + 1013904223u) >> 8) - (1 << 23)) / float(1 << 22);
}

// Three records as in tests/test_threads.py: the second cuts the first one's output across its threads' shares.
struct Step {
  int64_t rows, cols;
  Floats x, weight, weight2, y, z, rstd, dx, dweight;
  RmsNormArgs first, second;
  RmsNormBackwardArgs third;

  Step(int64_t r, int64_t c) : rows(r), cols(c), x(r * c), weight(c), weight2(r), y(r * c), z(r * c), rstd(c), dx(r * c), dweight(r) {
    fill(weight, 1), fill(weight2, 2);
    first = {y.data(), nullptr, nullptr, x.data(), nullptr, weight.data(), rows, cols, cols, 0, kFloat32, 1e-6};
    second = {z.data(), nullptr, rstd.data(), y.data(), nullptr, weight2.data(), cols, rows, rows, 0, kFloat32, 1e-6};
    third = {dx.data(), dweight.data(), z.data(), nullptr, y.data(), weight2.data(), rstd.data(), cols, rows, rows, 0, rows, kFloat32};
  }
  void run() const {
    require(launch(kernel("rms_norm"), &first) == kOk, "launch failed");
    require(launch(kernel("rms_norm"), &second) == kOk, "launch failed");
    require(launch(kernel("rms_norm_backward"), &third) == kOk, "launch failed");
  }
};

static bool same(const Floats& a, const Floats& b) { return !memcmp(a.data(), b.data(), a.size() * sizeof(float)); }

static void check_values(const Step& s) {
  for (int64_t r = 0; r < s.rows; ++r) {
    double squares = 0;
    for (int64_t c = 0; c < s.cols; ++c) squares += double(s.x[r * s.cols + c]) * s.x[r * s.cols + c];
    const double scale = 1 / sqrt(squares / double(s.cols) + 1e-6);
    for (int64_t c = 0; c < s.cols; ++c) {
      const double want = s.x[r * s.cols + c] * scale * s.weight[c];
      require(fabs(s.y[r * s.cols + c] - want) <= 1e-6 * (1 + fabs(want)), "rms_norm is wrong");
    }
  }
}

int main(int argc, char** argv) {
  require(argc == 4, "usage: team EXPECTED_ISA THREADS ROUNDS");
  const int threads = atoi(argv[2]), rounds = atoi(argv[3]);
  if (strcmp(isa_name(isa()), argv[1])) {
    fprintf(stderr, "team: chose %s, expected %s\n", isa_name(isa()), argv[1]);
    return 1;
  }
  hammer(threads, 20 * rounds);

  Step step(96, 257);
  std::shared_ptr<Plan> plan = plan_new();
  require(plan_begin(plan) && !plan_begin(plan), "begin");
  step.run();
  require(plan_end(plan) && !plan_end(plan) && plan_size(plan.get()) == 3, "end");
  for (int round = 0; round < rounds; ++round) {
    fill(step.x, uint32_t(round));
    team_size = 1;
    step.run();
    check_values(step);
    const Floats y = step.y, z = step.z, dx = step.dx;
    for (Floats* v : {&step.y, &step.z, &step.dx}) v->assign(v->size(), NAN);
    team_size = threads;
    require(plan_replay(plan.get(), threads, 2, nullptr) == kOk, "replay failed");
    require(same(step.y, y) && same(step.z, z) && same(step.dx, dx), "a replay by the team differs from a serial run");
  }
  printf("%s, %d threads: ok\n", isa_name(isa()), threads);
}
