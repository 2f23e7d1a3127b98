// The C ABI of the CUDA library (_cuda.so): one table of functions, fetched on first use. It carries its own static CUDA
// runtime, so the core module links nothing of CUDA and imports on a machine without a driver. Functions return a
// cudaError_t as int; the stream is passed in as a pointer.
#pragma once
#include <stdint.h>

namespace fastllm {

constexpr int kCudaAbi = 9;

enum CudaKernel : int {
#define CUDA_KERNEL(name, Args) kCuda_##name,
#include "kernels.def"
#undef CUDA_KERNEL
  kCudaKernelCount
};

struct CudaTable {
  int abi;
  int runtime_version;
  const char* architectures;        // that the kernels were compiled for, as of FASTLLM_CUDA_ARCHS: "80;90+PTX"
  int (*device_count)();            // negative: minus a cudaError_t (no driver, driver too old)
  int (*capability)(int device);    // 90 of 9.0; negative: minus a cudaError_t
  const char* (*error_string)(int code);
  // Of the kernels that this thread launches from here on: those before them write no weight, and not where tokens stand, so that
  // reading these may begin early.
  void (*weights_rest)(int yes);
  int (*copy)(void* to, const void* from, int64_t bytes, void* stream);    // 16-byte aligned; the bandwidth ceiling
  int (*run[kCudaKernelCount])(const void* record, char* scratch, void* stream);
};

const CudaTable* open_cuda(const char* path);    // throws std::runtime_error when the file cannot be used

}  // namespace fastllm
