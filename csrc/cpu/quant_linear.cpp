// quant_linear: y = norm(x) W^T, then + bias, + residual or swiglu, with weights of 4 or 8 bits; quant_gemm.h has the product
// and the layout of such weights, which are packed and read back here.
#include "quant_gemm.h"

namespace fastllm {
namespace FASTLLM_TIER {

void quant_linear(const LinearArgs& a, Team& team) noexcept {
  quant_product(a, NoHooks(), team, reinterpret_cast<float*>(team.scratch));
}

void pack_quants(const PackQuantsArgs& a, Team& team) noexcept {
  const QuantFormat format(a.bits, a.has_min, a.group);
  const int64_t width = a.swiglu ? 2 : 1, half = a.rows / width, parts = a.group / kGroup, part = a.block_bits * 4;
  const int64_t size = (a.block_min ? 4 : 2) + part * parts;
  const int zero = a.block_bits == 4 ? 8 : 128, own = a.bits == 4 ? 8 : 128;
  const uint8_t shift = (a.block_bits == 8 ? 128 : 0) + (a.has_min ? 0 : own - zero);    // s8 to unsigned, zero point to zero point
  const Range mine = share(team, (half + kLanes - 1) / kLanes * width);
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    const int64_t n = p % width * half + p / width * kLanes;    // row of lane 0
    const int64_t limit = (p % width + 1) * half, last = a.first + a.count < limit ? a.first + a.count : limit;
    const int64_t begin = a.first > n ? a.first - n : 0, end = last - n < kLanes ? last - n : kLanes;
    for (int64_t g = 0; g < a.groups && begin < end; ++g) {
      uint8_t* w = a.panels + (p * a.groups + g) * format.bytes;
      f16 scale[16] = {}, minimum[16] = {};
      for (int64_t i = begin; i < end; ++i) {
        const uint8_t* block = a.blocks + ((n + i - a.first) * a.groups + g) * size;
        memcpy(scale + i, block, 2);
        if (a.block_min) memcpy(minimum + i, block + 2, 2);
        block += a.block_min ? 4 : 2;
        uint8_t* to = w + i * 4;
        for (int64_t n = 0; n < parts; ++n, block += part, to += format.quants) {
          uint8_t q[32];
          if (a.block_bits == 8)
            for (int k = 0; k < 32; ++k) q[k] = uint8_t(block[k] + shift);
          else
            for (int k = 0; k < 16; ++k) q[k] = uint8_t((block[k] & 15) + shift), q[k + 16] = uint8_t((block[k] >> 4) + shift);
          uint32_t words[8];    // of 4 consecutive k
          memcpy(words, q, 32);
          if (a.bits == 8)
            for (int c = 0; c < 8; ++c) memcpy(to + c * 64, words + c, 4);
          else
            for (int c = 0; c < 4; ++c) {
              const uint32_t both = words[2 * c] | words[2 * c + 1] << 4;
              memcpy(to + c * 64, &both, 4);
            }
        }
      }
      if (a.has_min && !a.block_min) store(minimum, load(scale) * set1(float(-zero)));    // a power of two: exact
      uint8_t* scales = w + format.scales(0);
      memcpy(scales + begin * 2, scale + begin, (end - begin) * 2);
      if (a.has_min) memcpy(scales + 32 + begin * 2, minimum + begin, (end - begin) * 2);
    }
  }
}

// Exact: a float16 scale times a quant has at most 19 significant bits, so the product is, and one rounding adds the minimum.
void quant_embedding(const QuantEmbeddingArgs& a, Team& team) noexcept {
  const QuantFormat format(a.bits, a.has_min, a.group);
  const int64_t groups = padded(a.depth) / kGroup, size = format.panel(a.depth);
  const Range mine = share(team, a.count);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t id = a.ids[i];
    if (id < 0 || id >= a.rows) {
      report(team, kIndexOutOfRange);
      continue;
    }
    const int64_t r = id % kLanes;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t *panel = a.weight + id / kLanes * size, *w = panel + format.at(g);
      const auto* of_group = reinterpret_cast<const f16*>(panel + format.scales(g));
      float scales[16], minima[16];
      store(scales, load(of_group));
      store(minima, a.has_min ? load(of_group + 16) : set1(0));
      for (int64_t k = g * kGroup; k < (g + 1) * kGroup && k < a.depth; ++k) {
        const int64_t j = k % kGroup;
        const uint8_t b = a.bits == 4 ? w[j / 8 * 64 + r * 4 + j % 4] >> (j % 8 / 4 * 4) & 15 : w[j / 4 * 64 + r * 4 + j % 4];
        const float q = a.has_min ? float(b) : float(int(b) - (a.bits == 4 ? 8 : 128));
        a.y[i * a.depth + k] = q * scales[r] + minima[r];
      }
    }
  }
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
