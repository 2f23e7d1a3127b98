// Opens the CUDA library by path, once, on first use.
#include <stdexcept>
#include <string>

#include "../cuda/abi.h"
#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastllm {

const CudaTable* open_cuda(const char* path) {
#if defined(__linux__)
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  auto table = reinterpret_cast<const CudaTable* (*)()>(dlsym(library, "fastllm_cuda_table"));
  if (!table || table()->abi != kCudaAbi)
    throw std::runtime_error(std::string(path) + " was built from another version; reinstall fastllm");
  return table();
#else
  throw std::runtime_error(std::string(path) + ": CUDA kernels are built on Linux only");
#endif
}

}  // namespace fastllm
