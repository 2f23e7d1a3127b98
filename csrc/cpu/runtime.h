// The CPU runtime behind every kernel: ISA choice, the thread team, launches and plans. Not included by ISA files.
#pragma once
#include <memory>

#include "../records.h"

namespace fastllm {

constexpr int kMaxFields = 64;    // of an argument record

enum Isa : int { kGeneric, kAvx2, kAvx512, kIsaCount };

struct Kernel {
  const char* name;
  const char* kinds;
  void (*run[kIsaCount])(const void* args, Team& team) noexcept;    // null where this build lacks the tier
  int64_t (*work)(const void* args);                                // elements touched, to choose a thread count
  int64_t (*scratch)(const void* args, int64_t threads);
};
extern const Kernel kKernels[];
extern const int kKernelCount;

Isa best_isa();    // what CPU and OS allow
Isa isa();         // the tier that runs: the best one, lowered by FASTLLM_ISA
const char* isa_name(Isa);

// Threads: torch's own OpenMP pool, found in the process.
const char* openmp_path();
int max_threads();               // what torch.get_num_threads() says, under this thread's limit
int set_thread_limit(int n);     // 0: none; returns the previous limit of the calling thread
void parallel(int threads, char* scratch, int32_t* status, void (*body)(void*, Team&), void* context);
char* scratch(int64_t bytes);    // grows, per calling thread, reused; null when out of memory
void check_scratch(int64_t bytes, const char* kernel);    // ends the process when something has written behind it
int64_t take_most_scratch();     // the most that a kernel of this thread asked for since the last such question

// Runs the kernel now and, while a plan records, appends it to the plan. Returns a Status, or -1 when out of memory.
int launch(int kernel, const void* args);

// Plans. The recording thread holds no reference: dropping a plan that records ends its recording.
struct Plan;
std::shared_ptr<Plan> plan_new();
bool plan_begin(const std::shared_ptr<Plan>&);    // appends; false when this thread or this plan records already
bool plan_end(const std::shared_ptr<Plan>&);      // false when this thread does not record into it
bool plan_recording(const Plan*);
int64_t plan_size(const Plan*);
const char* plan_kernel(const Plan*, int64_t index);
// Status, or -1 when out of memory; adds each record's time, up to the barrier after it, to nanoseconds unless that is null.
int plan_replay(const Plan*, int threads, int64_t times, int64_t* nanoseconds);

}  // namespace fastllm
