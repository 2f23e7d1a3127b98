// The function table that the core module fetches, and the device's own facts.
#include <cuda_runtime.h>

#include "../records.h"
#include "abi.h"

namespace fastllm {

int copy(void* to, const void* from, int64_t bytes, void* stream);    // copy.cu
bool weights_rest();                                                  // common.cuh
#define CUDA_KERNEL(name, Args) int name(const Args&, char* scratch, void* stream);
#include "kernels.def"
#undef CUDA_KERNEL

static thread_local bool resting = false;
bool weights_rest() { return resting; }
static void set_weights_rest(int yes) { resting = yes != 0; }

static int device_count() {
  int n = 0;
  cudaError_t e = cudaGetDeviceCount(&n);
  return e == cudaSuccess ? n : -int(e);
}
static int capability(int device) {
  int major = 0, minor = 0;
  cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return e == cudaSuccess ? major * 10 + minor : -int(e);
}
static const char* error_string(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace fastllm

extern "C" __attribute__((visibility("default"))) const fastllm::CudaTable* fastllm_cuda_table() {
  using namespace fastllm;
  static const CudaTable table = {
      kCudaAbi, CUDART_VERSION, FASTLLM_CUDA_ARCHS, device_count, capability, error_string, set_weights_rest, copy, {
#define CUDA_KERNEL(name, Args) \
  [](const void* record, char* scratch, void* stream) { return name(*static_cast<const Args*>(record), scratch, stream); },
#include "kernels.def"
#undef CUDA_KERNEL
      }};
  return &table;
}
