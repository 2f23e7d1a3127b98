// sm_90a on a processor: the functions of csrc/cuda/hopper.cuh, and of the driver's API what a tensor map takes. Written from
// NVIDIA's documents alone ("PTX ISA" 9.0, whose sections are named, and "CUDA Driver API"), sharing nothing with the kernels.
//
// Copies and products run beside the threads, at a moment that is drawn, as early or as late as they may. What it finds,
// besides what cuda_runtime.h does:
// - a wait for a phase that never ends: a wrong parity, count of arrivals or number of bytes;
// - a tile that is overwritten while a product still reads it, or read before it is there: a copy that begins leaves NaN;
// - sums that are read before their product has been waited for: they hold NaN; operands written meanwhile; a fence left out;
// - wrong descriptors, swizzles and fragments, and boxes beyond a tensor's end;
// - bytes and arrivals that are left over when a block ends;
// - registers that warpgroups ask of each other and that nobody has.
// What it cannot show: which writes the other proxy would not see, bank conflicts, time.
#pragma once
#include "cuda_runtime.h"

#define __grid_constant__

// --------------------------------------------------------------------- CUDA Driver API, "Tensor Map Object Management"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
struct alignas(64) CUtensorMap {
  const char* base;
  uint64_t size[4], stride[4];    // bytes from one to the next
  uint32_t box[4];
  CUtensorMapSwizzle swizzle;
};
static_assert(sizeof(CUtensorMap) == 128, "as CUDA's");

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base, const cuuint64_t* size,
                                       const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* steps,
                                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  *map = {static_cast<const char*>(base), {}, {2}, {}, swizzle};
  bool good = rank == 4 && reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  good = good && box[0] * 2 % 16 == 0 && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || box[0] * 2 <= 128);
  for (int i = 0; i < 4; ++i) {
    map->size[i] = size[i], map->box[i] = box[i];
    good = good && size[i] >= 1 && size[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  }
  for (int i = 0; i < 3; ++i) {
    map->stride[i + 1] = stride[i];
    good = good && stride[i] && stride[i] % 16 == 0 && stride[i] < uint64_t(1) << 40;
  }
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr uint64_t cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, uint64_t,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool known = !strcmp(name, "cuTensorMapEncodeTiled");
  *found = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

namespace cuda_host {
namespace hopper {

// ------------------------------------------------------------------------------------------------- a block's own state

struct Barrier {
  int count, pending;
  int64_t bytes = 0;
  uint64_t phases = 0;
  std::vector<Fiber*> waiting;
};
struct Numbered {
  int threads = 0, arrived = 0;
  std::vector<Fiber*> waiting;
};
// What a product will leave in the registers of a lane. Until they are waited for they hold NaN.
struct Sums {
  std::vector<float> value;
  int pending = 0, group = 0;    // the last group that adds to them
};
struct Product {
  int cols;
  bool half, a_shared, a_across, b_across, add;    // across: along the other side than k
  uint64_t a_at, b_at;
  int group, arrived = 0;
  float* sums[32];
  const uint32_t* a[32];
  uint32_t given[32][4];
};
struct Lane {
  int issued = 0, committed = 0;
  bool fenced = false;
  std::map<float*, Sums> sums;
};
struct Products {    // of a warp
  Lane lane[32];
  std::deque<Product> queue;
  int first = 0;    // number of the queue's first
  std::vector<Fiber*> waiting;
};
struct State {
  uint32_t base;    // the address of shared memory: of it 16 bytes are certain
  std::map<uint32_t, Barrier> barriers;
  Numbered numbered[16];
  std::vector<Products> warps;
  std::vector<std::pair<uint64_t, uint64_t>> issued[8];    // by warpgroup: descriptors, the same for its four warps
  std::vector<size_t> compared;
  int registers, spare = 0;    // of a thread at the start; of all, given back
  std::vector<int> owned;
  std::vector<Fiber*> asking;
};

constexpr uint64_t kMark = 0x6d62617272696572;    // what a barrier's memory holds here
constexpr uint32_t kPoison = 0x7fbadbad;

inline std::string fault_of(Block&);
inline State& state(Block& b) {
  if (!b.hopper) {
    machine.fault_of = fault_of;
    auto s = std::make_shared<State>();
    s->base = 1024 + 16 * uint32_t(machine.random() % 64);
    s->warps.resize(b.warps.size()), s->compared.resize(b.warps.size());
    s->registers = 65536 / b.threads / 8 * 8, s->owned.assign(size_t(b.threads), s->registers);
    b.hopper = s;
  }
  return *static_cast<State*>(b.hopper.get());
}
inline Block& block() { return *machine.self->block; }
inline State& state() { return state(block()); }
inline int lane() { return int(machine.self->thread.x % 32); }
inline Products& products() { return state().warps[machine.self->thread.x / 32]; }

inline void wake(std::vector<Fiber*>& waiting) {
  machine.ready.insert(machine.ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}
inline void sleep(std::vector<Fiber*>& waiting) {
  waiting.push_back(machine.self);
  yield();
}

inline char* at(Block& b, uint32_t address, int64_t bytes) {
  const int64_t offset = int64_t(address) - state(b).base;
  if (offset < 0 || offset + bytes > b.shared_bytes) fail("shared memory at " + std::to_string(offset));
  return b.shared + offset;
}
inline uint32_t shared_address(const void* p) {
  const int64_t offset = static_cast<const char*>(p) - block().shared;
  if (offset < 0 || offset > block().shared_bytes) fail("not an address in shared memory");
  return state().base + uint32_t(offset);
}

inline std::string fault_of(Block& b) {
  for (const auto& entry : state(b).barriers)
    if (entry.second.bytes) return "a block ends with bytes that a barrier did not announce, or that never came";
  for (const Numbered& n : state(b).numbered)
    if (n.arrived) return "a block ends with an arrival that nobody waited for";
  return "";
}

// ------------------------------------------------- "Parallel Synchronization and Communication Instructions: mbarrier"

// A phase ends when no arrival and no byte is missing; a wait names the parity of the phase whose end it waits for.
inline Barrier& barrier(Block& b, uint32_t address) {
  const auto found = state(b).barriers.find(address);
  if (found == state(b).barriers.end()) fail("a barrier that nobody has initialised");
  uint64_t mark;
  memcpy(&mark, at(b, address, 8), 8);
  if (mark != kMark) fail("a barrier that was overwritten");
  return found->second;
}
inline void settle_phase(Barrier& m) {
  if (m.pending || m.bytes) return;
  m.pending = m.count, ++m.phases;
  wake(m.waiting);
}
inline void barrier_init(uint32_t address, int count) {
  if (address % 8) fail("a barrier at no multiple of 8 bytes");
  memcpy(at(block(), address, 8), &kMark, 8);
  Barrier m = {};
  m.count = m.pending = count;
  state().barriers[address] = m;
}
inline void barriers_ready() {}
inline void barrier_arrive(uint32_t address) {
  Barrier& m = barrier(block(), address);
  if (--m.pending < 0) fail("more arrivals than a barrier counts");
  settle_phase(m);
}
inline void barrier_expect(uint32_t address, uint32_t bytes) {
  Barrier& m = barrier(block(), address);
  m.bytes += bytes;
  if (m.bytes >= 1 << 20) fail("more bytes than a barrier counts");
  barrier_arrive(address);
}
inline void barrier_wait(uint32_t address, uint32_t parity) {
  if (parity > 1) fail("a parity that is none");
  Barrier& m = barrier(block(), address);
  while ((m.phases & 1) == parity) sleep(m.waiting);
}

// ---------------------------------------- "Data Movement and Conversion Instructions: cp.async.bulk.tensor", "Tensors"

// A box's elements beyond the tensor are zeros. 128B swizzling: of eight rows of 128 bytes, the 16-byte piece i of row r lies
// at piece i ^ r.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void tma_load(uint32_t to, const CUtensorMap* tensor, uint32_t barrier_at, int c0, int c1, int c2, int c3) {
  Block& b = block();
  const CUtensorMap map = *tensor;
  const int64_t bytes = int64_t(map.box[0]) * map.box[1] * map.box[2] * map.box[3] * 2;
  if (to % 128) fail("a copy to no multiple of 128 bytes");
  barrier(b, barrier_at);
  memset(at(b, to, bytes), 0xff, size_t(bytes));
  machine.beside.push_back([=, &b] {
    uint32_t place = to;
    for (uint32_t i3 = 0; i3 < map.box[3]; ++i3)
      for (uint32_t i2 = 0; i2 < map.box[2]; ++i2)
        for (uint32_t i1 = 0; i1 < map.box[1]; ++i1)
          for (uint32_t i0 = 0; i0 < map.box[0]; ++i0, place += 2) {
            const int64_t c[4] = {c0 + int64_t(i0), c1 + int64_t(i1), c2 + int64_t(i2), c3 + int64_t(i3)};
            const char* from = map.base;
            bool inside = true;
            for (int d = 0; d < 4; ++d) {
              inside = inside && c[d] >= 0 && uint64_t(c[d]) < map.size[d];
              from += c[d] * int64_t(map.stride[d]);
            }
            const bool moved = map.swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
            const uint16_t nothing = 0;
            memcpy(at(b, moved ? swizzled(place) : place, 2), inside ? from : reinterpret_cast<const char*>(&nothing), 2);
          }
    Barrier& m = barrier(b, barrier_at);
    m.bytes -= bytes;
    settle_phase(m);
  });
}

inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier_at) {
  Block& b = block();
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a copy of no multiples of 16 bytes");
  barrier(b, barrier_at);
  memset(at(b, to, bytes), 0xff, bytes);
  machine.beside.push_back([=, &b] {
    memcpy(at(b, to, bytes), from, bytes);
    Barrier& m = barrier(b, barrier_at);
    m.bytes -= bytes;
    settle_phase(m);
  });
}
inline void shared_written() {}
inline void add_four(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(to) % 16) fail("four numbers at no multiple of 16 bytes");
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}

// --------------------------------------------- "Parallel Synchronization and Communication Instructions: bar, barrier"

// In whole warps; those that arrive and those that wait are counted together.
inline bool numbered_come(Numbered& n, int threads) {
  if (threads % 32 || threads < 32) fail("a barrier of no whole warps");
  if (n.arrived && n.threads != threads) fail("a barrier of two sizes");
  n.threads = threads;
  if (++n.arrived < threads) return false;
  n.arrived = 0;
  wake(n.waiting);
  return true;
}
inline Numbered& numbered(int number) {
  if (number < 1 || number > 15) fail("a barrier that is not 1 to 15");
  return state().numbered[number];
}
inline void numbered_arrive(int number, int threads) { numbered_come(numbered(number), threads); }
inline void numbered_wait(int number, int threads) {
  if (!numbered_come(numbered(number), threads)) sleep(numbered(number).waiting);
}

// ---------------------------------------------------------------------------- "Miscellaneous Instructions: setmaxnreg"

// An increase waits until the block has the registers to spare.
template <int kRegisters> void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256, by 8");
  State& s = state();
  int& own = s.owned[machine.self->thread.x];
  if (own < kRegisters) fail("registers given that nobody had");
  s.spare += own - kRegisters, own = kRegisters;
  wake(s.asking);
}
template <int kRegisters> void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256, by 8");
  State& s = state();
  int& own = s.owned[machine.self->thread.x];
  while (s.spare < kRegisters - own) sleep(s.asking);
  s.spare -= kRegisters - own, own = kRegisters;
}

// --------------------------------------- 9.7.15 "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"

inline float number(uint16_t bits, bool half) {
  if (!half) return __int_as_float(int(uint32_t(bits) << 16));
  _Float16 h;
  memcpy(&h, &bits, 2);
  return float(h);
}

// 9.7.15.5.1.2.2 "Matrix Descriptor Format", 9.7.15.5.1.2.1 "Strides" and "Canonical Layouts" for 128B swizzling, T = 8.
struct Matrix {
  Block& block;
  uint32_t start, leading, stride;
  Matrix(Block& b, uint64_t d) : block(b) {
    start = uint32_t(d & 0x3fff) << 4, leading = uint32_t(d >> 16 & 0x3fff) << 4, stride = uint32_t(d >> 32 & 0x3fff) << 4;
    if (d >> 62 != 1) fail("a descriptor without 128-byte swizzling, which alone is here");
    if (d & 0x3fffc000c000c000) fail("a descriptor with a base offset, or bits that mean nothing");
    if (start & 0x380) fail("a matrix that begins within the swizzling's pattern of 1024 bytes, without a base offset");
  }
  uint16_t read(uint32_t offset) const {
    uint16_t bits;
    memcpy(&bits, at(block, swizzled(start + offset), 2), 2);
    return bits;
  }
  // ((8, m), (T, 2k)) : ((8T, SBO), (1, T))
  uint16_t k_major(uint32_t row, uint32_t k) const { return read(row % 8 * 128 + row / 8 * stride + k % 8 * 2 + k / 8 * 16); }
  // ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO))
  uint16_t mn_major(uint32_t col, uint32_t k) const {
    return read(col % 8 * 2 + col / 8 % 8 * 16 + col / 64 * leading + k % 8 * 128 + k / 8 * stride);
  }
};

// 9.7.15.5.1.1.1 "Matrix Fragments for wgmma.mma_async.m64nNk16": a warp has 16 rows.
inline void run_product(Block& b, unsigned warp) {
  Products& w = state(b).warps[warp];
  const Product p = w.queue.front();
  static float left[16][16], right[16][256];
  const Matrix second(b, p.b_at);
  for (uint32_t k = 0; k < 16; ++k)
    for (uint32_t n = 0; n < uint32_t(p.cols); ++n)
      right[k][n] = number(p.b_across ? second.mn_major(n, k) : second.k_major(n, k), p.half);
  if (p.a_shared) {
    const Matrix first(b, p.a_at);
    for (uint32_t row = 0; row < 16; ++row)
      for (uint32_t k = 0; k < 16; ++k) {
        const uint32_t m = warp % 4 * 16 + row;
        left[row][k] = number(p.a_across ? first.mn_major(m, k) : first.k_major(m, k), p.half);
      }
  } else {
    for (int l = 0; l < 32; ++l) {
      if (memcmp(p.a[l], p.given[l], 16)) fail("a product's left side was written while it ran");
      for (int i = 0; i < 8; ++i)    // a0 .. a7
        left[l / 4 + (i / 2 % 2) * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = number(uint16_t(p.given[l][i / 2] >> i % 2 * 16), p.half);
    }
  }
  for (int l = 0; l < 32; ++l) {
    Sums& sums = w.lane[l].sums.at(p.sums[l]);
    for (int i = 0; i < p.cols / 2; ++i) {    // d0, d1, ...
      const int row = l / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + l % 4 * 2 + i % 2;
      double sum = p.add ? sums.value[size_t(i)] : 0;
      for (int k = 0; k < 16; ++k) sum += double(left[row][k]) * right[k][col];
      sums.value[size_t(i)] = float(sum);
    }
    --sums.pending;
  }
  w.queue.pop_front(), ++w.first;
  wake(w.waiting);
}

inline void check_poison(const float* d, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (uint32_t(__float_as_int(d[i])) != kPoison) fail("accumulators were written while a product ran");
}

inline void issue(Product p, float* d, const uint32_t* a) {
  Block& b = block();
  const unsigned warp = machine.self->thread.x / 32;
  Products& w = products();
  const int l = lane();
  Lane& mine = w.lane[l];
  if (!mine.fenced) fail("a product without wgmma.fence");
  p.group = mine.committed;
  const size_t index = size_t(mine.issued++ - w.first);
  if (index == w.queue.size()) {
    w.queue.push_back(p);
    auto& all = state(b).issued[warp / 4];
    const std::pair<uint64_t, uint64_t> descriptors = {p.a_at, p.b_at};
    size_t& at = state(b).compared[warp];
    if (at == all.size()) all.push_back(descriptors);
    if (all[at++] != descriptors) fail("warps of a warpgroup with two descriptors");
  }
  Product& q = w.queue[index];
  const bool same = q.a_at == p.a_at && q.b_at == p.b_at && q.cols == p.cols && q.add == p.add && q.a_shared == p.a_shared &&
                    q.a_across == p.a_across && q.b_across == p.b_across;
  if (!same || q.group != p.group) fail("lanes of a warp with two products");
  q.sums[l] = d, q.a[l] = a;
  if (a) memcpy(q.given[l], a, 16);
  Sums& sums = mine.sums[d];
  const size_t count = size_t(p.cols / 2);
  if (sums.value.empty()) {
    sums.value.assign(d, d + count);
    const float poison = __int_as_float(int(kPoison));
    std::fill(d, d + count, poison);
  } else {
    check_poison(d, count);
  }
  ++sums.pending, sums.group = p.group;
  if (++q.arrived == 32) machine.beside.push_back([&b, warp] { run_product(b, warp); });
}

inline void wgmma_fence() { products().lane[lane()].fenced = true; }
inline void wgmma_commit() { ++products().lane[lane()].committed; }
template <int kPending> void wgmma_wait() {
  Products& w = products();
  Lane& mine = w.lane[lane()];
  const int done = mine.committed - kPending;    // groups before this one have ended
  while (!w.queue.empty() && w.queue.front().group < done && w.first < mine.issued) sleep(w.waiting);
  for (auto i = mine.sums.begin(); i != mine.sums.end();) {
    Sums& sums = i->second;
    if (sums.group >= done) {
      ++i;
      continue;
    }
    if (sums.pending) fail("a product that was waited for still runs");
    check_poison(i->first, sums.value.size());
    std::copy(sums.value.begin(), sums.value.end(), i->first);
    i = mine.sums.erase(i);
  }
  mine.fenced = false;
}
template <class T> void settle(T&) {}

template <int kCols, bool kHalf, bool kAcrossA = false, bool kAcrossB = false>
void wgmma(float (&d)[kCols / 2], uint64_t a, uint64_t b, bool add) {
  Product p = {};
  p.cols = kCols, p.half = kHalf, p.a_shared = true, p.a_across = kAcrossA, p.b_across = kAcrossB;
  p.add = add, p.a_at = a, p.b_at = b;
  issue(p, d, nullptr);
}
template <int kCols, bool kHalf> void wgmma(float (&d)[kCols / 2], const uint32_t (&a)[4], uint64_t b) {
  Product p = {};
  p.cols = kCols, p.half = kHalf, p.b_across = p.add = true, p.b_at = b;
  issue(p, d, a);
}

// ------------------------------------------------------------------------------------------------------------- numbers

template <bool kHalf> uint32_t rounded(float x) {
  if (kHalf) {
    const _Float16 h = _Float16(x);
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
  }
  const uint32_t u = uint32_t(__float_as_int(x));
  return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
template <bool kHalf> uint32_t pack(float low, float high) { return rounded<kHalf>(low) | rounded<kHalf>(high) << 16; }
template <bool kHalf> float wide(uint32_t bits) { return number(uint16_t(bits), kHalf); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

}  // namespace hopper
}  // namespace cuda_host
