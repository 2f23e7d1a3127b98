// Launches, and plans: a plan is the list of the kernels that one step ran, with their argument records. Replay walks the
// list inside one parallel region, with a barrier after each kernel, and never enters the Python interpreter. What changes
// from step to step lives in memory that the records point to.
#include "runtime.h"

#include <string.h>
#include <time.h>

#include <new>
#include <vector>

#include "sync.h"

namespace fastllm {

struct Record {
  int kernel;
  int64_t slots[kMaxFields];
};
struct Plan {
  std::vector<Record> records;
  bool recording = false;
};

namespace {

thread_local std::weak_ptr<Plan> recorded;    // weak: a plan that is dropped while it records leaves the thread clean

constexpr int64_t kElementsPerThread = 16384;    // below this, waking another thread costs more than it saves

struct Launch {
  void (*run)(const void*, Team&) noexcept;
  const void* args;
};
void run_one(void* context, Team& team) {
  const Launch* l = static_cast<const Launch*>(context);
  l->run(l->args, team);
}

struct Replay {
  const Plan* plan;
  int64_t times;
  int64_t* nanoseconds;    // of each record, added up, or null
};

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

void run_plan(void* context, Team& team) {
  const Replay* replay = static_cast<const Replay*>(context);
  const Isa tier = isa();
  int64_t* const clock = team.rank == 0 ? replay->nanoseconds : nullptr;
  for (int64_t i = 0; i < replay->times; ++i) {
    int64_t* total = clock;
    int64_t last = clock ? now() : 0;
    for (const Record& r : replay->plan->records) {
      kKernels[r.kernel].run[tier](r.slots, team);
      sync(team);
      if (clock) {
        const int64_t t = now();
        *total++ += t - last;
        last = t;
      }
    }
  }
}

}  // namespace

int launch(int kernel, const void* args) {
  const Kernel& k = kKernels[kernel];
  int64_t share = k.work(args) / kElementsPerThread;
  int threads = max_threads();
  if (share < threads) threads = share < 1 ? 1 : int(share);
  int64_t bytes = k.scratch(args, threads);
  char* buffer = bytes ? scratch(bytes) : nullptr;
  if (bytes && !buffer) return -1;
  int32_t status = kOk;
  Launch l{k.run[isa()], args};
  parallel(threads, buffer, &status, run_one, &l);
  if (bytes) check_scratch(bytes, k.name);
  if (const std::shared_ptr<Plan> plan = recorded.lock()) {
    Record r{kernel, {}};
    memcpy(r.slots, args, 8 * strlen(k.kinds));
    try {
      plan->records.push_back(r);
    } catch (const std::bad_alloc&) {
      return -1;
    }
  }
  return status;
}

std::shared_ptr<Plan> plan_new() { return std::make_shared<Plan>(); }
bool plan_begin(const std::shared_ptr<Plan>& plan) {
  if (!recorded.expired() || plan->recording) return false;
  recorded = plan;
  return plan->recording = true;
}
bool plan_end(const std::shared_ptr<Plan>& plan) {
  if (recorded.lock() != plan) return false;
  recorded.reset();
  plan->recording = false;
  return true;
}
bool plan_recording(const Plan* p) { return p->recording; }
int64_t plan_size(const Plan* p) { return int64_t(p->records.size()); }
const char* plan_kernel(const Plan* p, int64_t i) { return kKernels[p->records[size_t(i)].kernel].name; }

int plan_replay(const Plan* plan, int threads, int64_t times, int64_t* nanoseconds) {
  int available = max_threads();
  if (threads <= 0 || threads > available) threads = available;
  int64_t bytes = 0;
  for (const Record& r : plan->records) {
    int64_t b = kKernels[r.kernel].scratch(r.slots, threads);
    if (b > bytes) bytes = b;
  }
  char* buffer = bytes ? scratch(bytes) : nullptr;
  if (bytes && !buffer) return -1;
  int32_t status = kOk;
  Replay replay{plan, times, nanoseconds};
  parallel(threads, buffer, &status, run_plan, &replay);
  if (bytes) check_scratch(bytes, "a recorded plan");
  return status;
}

}  // namespace fastllm
