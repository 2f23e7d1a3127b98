// The function table that the core module fetches, and the device's own facts.
#include <cuda_runtime.h>

#include "abi.h"

namespace fastllm {

int copy(void* to, const void* from, int64_t bytes, void* stream);    // copy.cu

static int device_count() {
  int n = 0;
  cudaError_t e = cudaGetDeviceCount(&n);
  return e == cudaSuccess ? n : -int(e);
}
static const char* error_string(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace fastllm

extern "C" __attribute__((visibility("default"))) const fastllm::CudaTable* fastllm_cuda_table() {
  static const fastllm::CudaTable table = {fastllm::kCudaAbi, CUDART_VERSION, fastllm::device_count, fastllm::error_string,
                                           fastllm::copy};
  return &table;
}
