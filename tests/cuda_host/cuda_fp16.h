// Half precision of CUDA on a processor: see cuda_runtime.h.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return __int_as_float(int(sign | 0x7f800000 | (magnitude & 0x3ff) << 13));
  const float size = __int_as_float(int(magnitude << 13)) * 0x1p112f;    // the exponent's bias; subnormals come out right
  return sign ? -size : size;
}
