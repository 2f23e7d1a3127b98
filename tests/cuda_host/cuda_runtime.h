// CUDA C++ on a processor, for tests alone: with this header in the place of CUDA's own, g++ compiles csrc/cuda into a library that
// the core opens like the real one, and the kernels run on the memory of CPU tensors. Names are CUDA's; what no kernel uses is
// not here.
//
// A thread is a fiber. Those of a cluster of blocks take turns, each until it must wait: at __syncthreads, at a cluster's barrier,
// or in an operation of its warp. Clusters follow one another. What it finds:
// - a barrier, or a warp's operation, that some thread does not reach, or reaches at another line: the launch fails, and says so;
// - races between threads: who goes on is drawn each time, so other seeds (cuda_host_seed) give other bits;
// - shared memory that nobody has written: it is filled with bytes that depend on the seed;
// - accesses beyond shared memory: it ends where a page ends.
// What it cannot show: time; races that two orders of whole stretches between barriers do not tell apart; the order in which
// memory becomes visible; a block that leaves while its neighbours still read its memory. What sm_90a adds is in cuda.h.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 900
#define CUDART_VERSION 13000
#define FASTLLM_CUDA_ARCHS "80;90+PTX"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline uint3 threadIdx, blockIdx;    // of the fiber that runs
inline dim3 blockDim, gridDim;

// ------------------------------------------------------------------------------------------------------ the scheduler

namespace cuda_host {

struct Fiber;

// Where some threads meet: the last to come lets all go on.
struct Meeting {
  int arrived = 0, line = 0;
  unsigned mask = 0;
  uint64_t times = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Meeting meeting;
  uint64_t value[2][32];    // of this operation and the one before, which some may still read
};

struct Block {
  uint3 index;
  unsigned rank;    // in its cluster
  char* shared;
  int64_t shared_bytes;
  int threads;
  std::shared_ptr<void> hopper;    // of cuda.h
  Meeting meeting;
  int sum[2];       // of __syncthreads_or and its like
  std::vector<Warp> warps;
};

struct Fiber {
  uint3 thread;
  Block* block;
  uint64_t cluster_times;    // how often its cluster had met when it arrived
  bool arrived;              // there, and has not waited since
  bool begun;
  sigjmp_buf here;
  ucontext_t start;
};

constexpr int64_t kStack = 64 << 10;

struct Machine {
  std::mt19937_64 random;
  int capability = 9, shared_limit = 227 << 10, multiprocessors = 132;
  std::string message;
  std::map<const void*, int> shared_allowed;
  std::set<const void*> large_clusters;    // that may have 16 blocks
  // of the launch that runs
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  std::vector<std::function<void()>> beside;    // what copies and products have to do, at some time
  unsigned haste = 2;                           // one step of those in so many
  std::string (*fault_of)(Block&) = nullptr;    // what is wrong with a block that has ended
  std::vector<char*> stacks;
  Meeting meeting;    // of the cluster
  Fiber* self = nullptr;
  int left = 0;    // fibers that have not come to their end
  void (*run)(const void*) = nullptr;
  const void* kernel = nullptr;
  sigjmp_buf scheduler;
};
inline Machine machine;

__attribute__((noinline)) inline void yield() {
  Fiber* self = machine.self;
  if (!sigsetjmp(self->here, 0)) siglongjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& message) {
  machine.message = message + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
  siglongjmp(machine.scheduler, 2);
}

inline void come(Meeting& m, int size) {
  if (++m.arrived < size) return;
  machine.ready.insert(machine.ready.end(), m.waiting.begin(), m.waiting.end());
  m.waiting.clear(), m.arrived = 0, ++m.times;
}
inline void wait_for(Meeting& m, uint64_t times) {
  if (m.times != times) return;
  m.waiting.push_back(machine.self);
  yield();
}
inline void meet(Meeting& m, int size, int line, unsigned mask = 0) {
  if (m.arrived == 0) m.line = line, m.mask = mask;
  if (m.line != line || m.mask != mask)
    fail("threads meet at different places, lines " + std::to_string(m.line) + " and " + std::to_string(line));
  const uint64_t times = m.times;
  come(m, size);
  wait_for(m, times);
}

inline void enter() {
  machine.run(machine.kernel);
  --machine.left;
  siglongjmp(machine.scheduler, 1);
}

__attribute__((noinline)) inline void prepare(Fiber& f, char* stack) {    // getcontext, too, forgets what registers hold
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = stack, f.start.uc_stack.ss_size = kStack;
  makecontext(&f.start, enter, 0);
}

inline void resume(Fiber& f) {
  machine.self = &f, threadIdx = f.thread, blockIdx = f.block->index;
  if (f.begun) siglongjmp(f.here, 1);
  f.begun = true;
  setcontext(&f.start);
}

// Runs the fibers of one cluster to their end; false: they got stuck, or one failed. A frame of its own: sigsetjmp forgets what
// registers hold.
__attribute__((noinline)) inline bool run_cluster() {
  std::vector<Fiber*>& ready = machine.ready;
  ready.clear(), machine.beside.clear(), machine.message.clear();
  for (Fiber& f : machine.fibers) ready.push_back(&f);
  machine.left = int(ready.size());
  if (sigsetjmp(machine.scheduler, 0) == 2) return false;
  while (!machine.beside.empty() && (ready.empty() || machine.random() % machine.haste == 0)) {
    std::swap(machine.beside[machine.random() % machine.beside.size()], machine.beside.back());
    const std::function<void()> next = std::move(machine.beside.back());
    machine.beside.pop_back();
    if (!machine.left) return machine.message = "a block ends before its copies and products do", false;
    next();
  }
  if (!ready.empty()) {
    std::swap(ready[machine.random() % ready.size()], ready.back());
    Fiber* next = ready.back();
    ready.pop_back();
    resume(*next);
  }
  for (Block& b : machine.blocks)
    if (!machine.left && machine.fault_of && machine.message.empty()) machine.message = machine.fault_of(b);
  if (!machine.left) return machine.message.empty();
  machine.message = "a barrier that not all threads reach: " + std::to_string(machine.left) + " wait, and " +
                    std::to_string(int(machine.fibers.size()) - machine.left) + " have left";
  return false;
}

// Memory that ends where a page ends, which nobody may touch.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : size_((bytes + 4095) / 4096 * 4096) {
    base_ = static_cast<char*>(mmap(nullptr, size_t(size_ + 4096), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + size_, 4096, PROT_NONE);
    data = base_ + size_ - (bytes + 15) / 16 * 16;
  }
  ~Guarded() { munmap(base_, size_t(size_ + 4096)); }
  char* data;

 private:
  int64_t size_;
  char* base_;
};

inline char* shared() { return machine.self->block->shared; }

}  // namespace cuda_host

#define CUDA_HOST_API extern "C" inline __attribute__((visibility("default"), used))
CUDA_HOST_API void cuda_host_seed(uint64_t seed) {
  cuda_host::machine.random.seed(seed), cuda_host::machine.haste = 1u << seed % 4 * 3;
}
CUDA_HOST_API void cuda_host_multiprocessors(int count) { cuda_host::machine.multiprocessors = count; }
// The device that the library sees: its compute capability's first number, and how much shared memory a block may have.
CUDA_HOST_API void cuda_host_device(int capability, int shared) {
  cuda_host::machine.capability = capability, cuda_host::machine.shared_limit = shared;
}

// ---------------------------------------------------------------------------------------------------------- the runtime

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInsufficientDriver = 35,
                   cudaErrorNoKernelImageForDevice = 209, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributeNonPortableClusterSizeAllowed = 9 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4, cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttributeValue {
  dim3 clusterDim;
  int programmaticStreamSerializationAllowed = 0;    // grids run one after another here
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : e == cudaErrorLaunchFailure ? cuda_host::machine.message.c_str() : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return memset(p, value, bytes), cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount      ? cuda_host::machine.multiprocessors
           : what == cudaDevAttrComputeCapabilityMajor ? cuda_host::machine.capability
           : what == cudaDevAttrComputeCapabilityMinor ? 0
                                                       : cuda_host::machine.shared_limit;
  return cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute what, int bytes) {
  if (what == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    cuda_host::machine.large_clusters.insert(reinterpret_cast<const void*>(kernel));
    return cudaSuccess;
  }
  if (bytes > cuda_host::machine.shared_limit) return cudaErrorInvalidValue;
  cuda_host::machine.shared_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

// The largest cluster is that of the device: of one with few multiprocessors it has no place for 16 blocks.
template <class F> cudaError_t cudaOccupancyMaxActiveClusters(int* count, F* kernel, const cudaLaunchConfig_t* c) {
  const int cluster = int(c->attrs[0].val.clusterDim.x);
  if (cluster > 8 && !cuda_host::machine.large_clusters.count(reinterpret_cast<const void*>(kernel))) return cudaErrorInvalidValue;
  return *count = cuda_host::machine.multiprocessors / cluster, cudaSuccess;
}

namespace cuda_host {

template <class F> cudaError_t launch(const cudaLaunchConfig_t& c, const void* kernel, const F& run) {
  Machine& m = machine;
  dim3 cluster;
  for (unsigned i = 0; i < c.numAttrs; ++i)
    if (c.attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c.attrs[i].val.clusterDim;
  const int threads = int(c.blockDim.x), allowed = m.shared_allowed.count(kernel) ? m.shared_allowed[kernel] : 48 << 10;
  if (int64_t(c.dynamicSmemBytes) > std::max(allowed, 48 << 10) || threads < 1 || threads > 1024 || c.gridDim.x % cluster.x ||
      !c.gridDim.x || cluster.x > (m.large_clusters.count(kernel) ? 16 : 8) || (cluster.x > 1 && m.capability < 9) || c.blockDim.y * c.blockDim.z != 1 || c.gridDim.z != 1)
    return cudaErrorInvalidValue;
  gridDim = c.gridDim, blockDim = c.blockDim;
  m.kernel = &run, m.run = [](const void* f) { (*static_cast<const F*>(f))(); };
  const size_t count = size_t(threads) * cluster.x;
  while (m.stacks.size() < count)
    m.stacks.push_back(static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  std::deque<Guarded> memory;
  for (unsigned i = 0; i < cluster.x; ++i) memory.emplace_back(int64_t(c.dynamicSmemBytes));
  std::vector<unsigned> order(c.gridDim.x / cluster.x * c.gridDim.y);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (const unsigned which : order) {
    m.blocks.assign(cluster.x, Block());
    m.fibers.assign(count, Fiber());
    m.meeting = Meeting();
    const unsigned wide = c.gridDim.x / cluster.x;
    for (unsigned b = 0; b < cluster.x; ++b) {
      Block& block = m.blocks[b];
      block.index = {which % wide * cluster.x + b, which / wide, 0}, block.rank = b, block.shared = memory[b].data;
      block.shared_bytes = int64_t(c.dynamicSmemBytes);
      block.threads = threads;
      block.warps.resize(size_t(threads + 31) / 32);
      memset(block.shared, int(m.random() & 0xff), c.dynamicSmemBytes);
      for (int t = 0; t < threads; ++t) {
        Fiber& f = m.fibers[b * size_t(threads) + size_t(t)];
        f.thread = {unsigned(t), 0, 0}, f.block = &block;
        prepare(f, m.stacks[b * size_t(threads) + size_t(t)]);
      }
    }
    if (!run_cluster()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace cuda_host

template <class... P, class... A> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... a) {
  return cuda_host::launch(*c, reinterpret_cast<const void*>(kernel), [&] { kernel(P(a)...); });
}

// ------------------------------------------------------------------------------------------------------------- a thread

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_host::Block& b = *cuda_host::machine.self->block;
  cuda_host::meet(b.meeting, b.threads, line);
}
inline int __syncthreads_or(int value, int line = __builtin_LINE()) {
  cuda_host::Block& b = *cuda_host::machine.self->block;
  int& sum = b.sum[b.meeting.times & 1];
  if (b.meeting.arrived == 0) sum = 0;
  sum |= value != 0;
  cuda_host::meet(b.meeting, b.threads, line);
  return sum;
}

inline unsigned __clusterRelativeBlockRank() { return cuda_host::machine.self->block->rank; }
inline void __cluster_barrier_arrive() {
  cuda_host::Machine& m = cuda_host::machine;
  if (m.self->arrived) cuda_host::fail("a thread arrives twice at its cluster's barrier");
  m.self->arrived = true, m.self->cluster_times = m.meeting.times;
  cuda_host::come(m.meeting, int(m.fibers.size()));
}
inline void __cluster_barrier_wait() {
  cuda_host::Machine& m = cuda_host::machine;
  if (!m.self->arrived) cuda_host::fail("a thread waits at its cluster's barrier and has not arrived");
  m.self->arrived = false;
  cuda_host::wait_for(m.meeting, m.self->cluster_times);
}
inline void* __cluster_map_shared_rank(const void* p, unsigned rank) {
  const cuda_host::Block& mine = *cuda_host::machine.self->block;
  return cuda_host::machine.blocks[rank].shared + (static_cast<const char*>(p) - mine.shared);
}

namespace cuda_host {

// Gives every lane of the mask what the others brought.
template <class T> const uint64_t* exchange(unsigned mask, T mine, int line) {
  static_assert(sizeof(T) <= 8, "a lane brings up to 8 bytes");
  Fiber& self = *machine.self;
  Warp& w = self.block->warps[self.thread.x / 32];
  if (!(mask >> self.thread.x % 32 & 1)) fail("a lane that its mask leaves out");
  uint64_t* value = w.value[w.meeting.times & 1];
  memcpy(value + self.thread.x % 32, &mine, sizeof mine);
  meet(w.meeting, __builtin_popcount(mask), line, mask);
  return value;
}
template <class T> T lane_of(const uint64_t* value, unsigned lane) {
  T v;
  memcpy(&v, value + lane, sizeof v);
  return v;
}

}  // namespace cuda_host

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { cuda_host::exchange(mask, 0, line); }
template <class T> T __shfl_sync(unsigned mask, T v, int from, int = 32, int line = __builtin_LINE()) {
  return cuda_host::lane_of<T>(cuda_host::exchange(mask, v, line), unsigned(from) % 32);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int with, int = 32, int line = __builtin_LINE()) {
  return cuda_host::lane_of<T>(cuda_host::exchange(mask, v, line), (threadIdx.x ^ unsigned(with)) % 32);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by, int = 32, int line = __builtin_LINE()) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_host::lane_of<T>(cuda_host::exchange(mask, v, line), lane < by ? lane : lane - by);
}
inline int __all_sync(unsigned mask, int v, int line = __builtin_LINE()) {
  const uint64_t* all = cuda_host::exchange(mask, v, line);
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1 && !cuda_host::lane_of<int>(all, i)) return 0;
  return 1;
}

template <class T> T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = T(old + v);
  return old;
}
template <class T> T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += int(int8_t(a >> i)) * int(int8_t(b >> i));
  return c;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t(static_cast<unsigned __int128>(a) * b >> 64); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline int __float_as_int(float x) {
  int i;
  return memcpy(&i, &x, 4), i;
}
inline float __int_as_float(int i) {
  float x;
  return memcpy(&x, &i, 4), x;
}
inline long long __double_as_longlong(double x) {
  long long i;
  return memcpy(&i, &x, 8), i;
}
inline double __longlong_as_double(long long i) {
  double x;
  return memcpy(&x, &i, 8), x;
}
