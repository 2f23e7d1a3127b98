// Kernels with one fault each, and a sound one: tests/test_cuda.py runs them to see that cuda_runtime.h finds the faults.
//   faults NAME SEED
#include <cuda_runtime.h>

namespace {

int* memory() { return reinterpret_cast<int*>(cuda_host::shared()); }

__global__ void sound(int* out) {    // a sum over the block: neighbours in the warp, then warps
  int* s = memory();
  int v = int(threadIdx.x) + 1;
  for (int with = 16; with; with /= 2) v += __shfl_xor_sync(~0u, v, with);
  if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) *out = s[0] + s[1];
}
__global__ void missed(int*) {    // half of the threads leave before the barrier
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void elsewhere(int*) {    // two barriers that are not the same
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void lane(int*) {    // a shuffle that one lane does not take part in
  if (threadIdx.x != 7) __shfl_xor_sync(~0u, 1, 1);
}
__global__ void cluster(int*) {    // a cluster's barrier that one block does not reach
  if (__clusterRelativeBlockRank() == 0) __cluster_barrier_arrive(), __cluster_barrier_wait();
}
__global__ void twice(int*) { __cluster_barrier_arrive(), __cluster_barrier_arrive(), __cluster_barrier_wait(); }
__global__ void waits(int*) {    // once more than it arrived
  __cluster_barrier_arrive(), __cluster_barrier_wait(), __cluster_barrier_wait();
}
__global__ void race(int* out) {    // no barrier between the writes and the read
  memory()[threadIdx.x / 32] = int(threadIdx.x);
  if (threadIdx.x == 40) *out = memory()[0];
}
__global__ void unwritten(int* out) {
  if (threadIdx.x == 0) *out = memory()[5];
}
__global__ void beyond(int* out) {
  if (threadIdx.x == 0) *out = memory()[64];
}

}  // namespace

int main(int count, char** words) {
  const struct {
    const char* name;
    void (*kernel)(int*);
  } kernels[] = {{"sound", sound}, {"missed", missed}, {"elsewhere", elsewhere}, {"lane", lane}, {"cluster", cluster},
                 {"twice", twice}, {"waits", waits},   {"race", race},
                 {"unwritten", unwritten}, {"beyond", beyond}};
  if (count != 3) return 2;
  cuda_host_seed(strtoull(words[2], nullptr, 10));
  for (const auto& k : kernels)
    if (!strcmp(k.name, words[1])) {
      cudaLaunchAttribute pair = {cudaLaunchAttributeClusterDimension, {{2, 1, 1}}};
      cudaLaunchConfig_t config = {};
      config.gridDim.x = 2, config.blockDim.x = 64, config.dynamicSmemBytes = 256, config.attrs = &pair, config.numAttrs = 1;
      int out = -1;
      const cudaError_t e = cudaLaunchKernelEx(&config, k.kernel, &out);
      e == cudaSuccess ? printf("%d\n", out) : printf("%s\n", cudaGetErrorString(e));
      return 0;
    }
  return 2;
}
