// Many tensors in one call: a table of them, each cut in blocks, and the blocks of all of them dealt out.
#pragma once
#include "../common.h"

namespace fastllm {

constexpr int64_t kListBlock = 16384;    // elements

}  // namespace fastllm
