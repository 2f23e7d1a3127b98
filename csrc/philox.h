// Philox4x32-10 (Salmon et al. 2011): a random number is a function of a key and a counter, with no state in between.
#pragma once
#include <stdint.h>

namespace fastllm {
namespace {

struct Philox {
  uint32_t word[4];
};

[[maybe_unused]] constexpr Philox philox(uint64_t key, uint64_t low, uint64_t high) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  uint32_t c0 = uint32_t(low), c1 = uint32_t(low >> 32), c2 = uint32_t(high), c3 = uint32_t(high >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 64 uniform bits: counter (position, index), key seed; words 0 and 1 of the output, word 0 low.
[[maybe_unused]] constexpr uint64_t random_bits(int64_t seed, int64_t index, int64_t position) {
  const Philox p = philox(uint64_t(seed), uint64_t(position), uint64_t(index));
  return uint64_t(p.word[1]) << 32 | p.word[0];
}

}  // namespace
}  // namespace fastllm
