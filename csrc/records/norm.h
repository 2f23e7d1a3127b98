// What the backward of a norm needs beside its record: partial sums of the weight's gradient, one for each group of rows.
#pragma once
#include "../common.h"

namespace fastllm {

static inline int64_t norm_groups(int64_t rows) { return rows < 64 ? rows : 64; }
static inline int64_t norm_padded(int64_t cols) { return (cols + 15) / 16 * 16; }
static inline int64_t norm_scratch(int64_t rows, int64_t cols, int64_t sums) { return norm_groups(rows) * norm_padded(cols) * sums * 4; }

}  // namespace fastllm
