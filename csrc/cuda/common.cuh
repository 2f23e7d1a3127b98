// What CUDA kernels share: a block's memory, warps, clusters of blocks, launches. tests/cuda_host compiles it for a processor.
//
// Products and sums are never contracted (-fmad=false): an fma is where the kernel says so, as on a CPU.
#pragma once
#include <cuda_runtime.h>

#include <mutex>

#include "../common.h"

namespace fastllm {

bool weights_rest();    // what the host has said of this thread's launches: see abi.h

namespace {

constexpr unsigned kWhole = 0xffffffff;    // all lanes of a warp

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// A block's shared memory, whose size the launch names, as a record.
template <class T> __device__ __forceinline__ T& shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return *reinterpret_cast<T*>(memory);
#else
  return *reinterpret_cast<T*>(cuda_host::shared());
#endif
}

template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int with = 16; with; with /= 2) v += __shfl_xor_sync(kWhole, v, with);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int with = 16; with; with /= 2) v = fmaxf(v, __shfl_xor_sync(kWhole, v, with));
  return v;
}

// A cluster: blocks that see each other's shared memory. Before sm_90 a block is alone.
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return __clusterRelativeBlockRank();
#else
  return 0;
#endif
}
// All threads of the cluster have arrived before any goes on from where it waits.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}
__device__ __forceinline__ void cluster_sync() { cluster_arrive(), cluster_wait(); }
// The same place in the shared memory of another block of the cluster.
template <class T> __device__ __forceinline__ T* at_rank(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
#else
  return p;
#endif
}

// A kernel that `launch_early` launches begins when all blocks of the one before it have called `next_may_begin` (or are done),
// and may read what that one writes, or what was written before that one, after `wait_for_previous`. Before sm_90 it begins
// when the other one is done.
__device__ __forceinline__ void next_may_begin() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline int attribute(cudaDeviceAttr what) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, what, device) != cudaSuccess) return 0;
  return value;
}

constexpr int kEarlyInGraphs = 12030;    // the CUDA whose graphs can hold launches of that kind

inline int driver_version() {
  static const int version = [] {
    int v = 0;
    return cudaDriverGetVersion(&v) == cudaSuccess ? v : 0;
  }();
  return version;
}

// What a kernel must be allowed once: much shared memory, and clusters of more than every device of an architecture is sure to have.
template <class... P> cudaError_t allow(void (*kernel)(P...), int64_t shared, int cluster) {
  cudaError_t e = cudaSuccess;
  if (shared > 48 << 10) e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (e == cudaSuccess && cluster > 8) e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return e;
}

inline cudaLaunchConfig_t configuration(int64_t blocks, int threads, int64_t shared, cudaLaunchAttribute* attributes, int cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim.x = unsigned(blocks), config.blockDim.x = unsigned(threads);
  config.gridDim.y = config.gridDim.z = config.blockDim.y = config.blockDim.z = 1;
  config.dynamicSmemBytes = size_t(shared), config.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = unsigned(cluster), a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  return config;
}

// Whether the device, which may be a slice of one, has a place for such a cluster.
template <class... P> bool has_place(void (*kernel)(P...), int threads, int64_t shared, int cluster) {
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = configuration(cluster, threads, shared, attributes, cluster);
  int clusters = 0;
  const bool known = allow(kernel, shared, cluster) == cudaSuccess && cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
  if (!known) cudaGetLastError();    // or torch finds it
  return known && clusters > 0;
}

template <class... P, class... A>
int launch_with(bool early, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, int cluster, void* stream,
                A... arguments) {
  if (blocks <= 0) return int(cudaSuccess);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidValue);
  static std::mutex one_at_a_time;    // what a kernel is allowed is of the last thread that said so
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (const cudaError_t e = allow(kernel, shared, cluster); e != cudaSuccess) return int(e);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = configuration(blocks, threads, shared, attributes, cluster);
  config.stream = static_cast<cudaStream_t>(stream);
  if (early && CUDART_VERSION >= kEarlyInGraphs && driver_version() >= kEarlyInGraphs &&
      attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  return int(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Launches a grid of one dimension, in clusters where `cluster` is above 1; returns a cudaError_t.
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, int cluster, void* stream, A... a) {
  return launch_with(false, kernel, blocks, threads, shared, cluster, stream, a...);
}
template <class... P, class... A>
int launch_early(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, int cluster, void* stream, A... a) {
  return launch_with(true, kernel, blocks, threads, shared, cluster, stream, a...);
}

}  // namespace
}  // namespace fastllm
