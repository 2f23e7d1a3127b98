// Two products of whole numbers by the copy engine and the matrix unit of cuda.h, sound or with one fault: tests/test_cuda.py
// runs them to see that the sound one is exact and that the faults are found.
//   hopper_faults NAME SEED
#include "../../csrc/cuda/hopper.cuh"

using namespace fastllm;

namespace {

enum Fault {
  kSound, kParity, kBytes, kEarly, kUnfenced, kUnwaited, kOverwritten, kRewritten, kSwizzle, kStride, kLeft, kArrivals,
  kRegisters, kOffset, kFaults
};
const char* const kNames[] = {"sound", "parity", "bytes", "early", "unfenced", "unwaited", "overwritten", "rewritten", "swizzle",
                              "stride", "left", "arrivals", "registers", "offset"};
constexpr int kRows = 64, kCols = 128, kDepth = 64;

struct Tiles {
  uint16_t a[kRows][64], b[kCols][64], v[kDepth][64];
  uint64_t full, used;
};

uint16_t bits(int x) { return uint16_t(cuda_host::hopper::rounded<false>(float(x))); }
int left(int row, int k) { return (row * 3 + k * 5) % 7 - 3; }
int right(int col, int k) { return (col * 5 + k * 2) % 9 - 4; }

// c [64, 128] = a b^T, of which a [60, 64] has four rows too few; d [64, 64] = a v, a in registers.
__global__ void products(Fault fault, CUtensorMap a_map, CUtensorMap b_map, CUtensorMap v_map, float* c, float* d) {
  char* memory = &shared_memory<char>();
  Tiles& s = *reinterpret_cast<Tiles*>(memory + (-shared_address(memory) & 1023) + (fault == kOffset ? 128 : 0));
  const uint32_t full = shared_address(&s.full), used = shared_address(&s.used);
  const int t = int(threadIdx.x), lane = t % 32, row = t / 32 * 16 + lane / 4;
  if (t == 0) {
    barrier_init(full, 1), barrier_init(used, fault == kArrivals ? 5 : 4);
    barriers_ready();
  }
  __syncthreads();
  if (t >= 128) {
    give_registers<120>();    // of 128
    if (t > 128) return;
    barrier_expect(full, uint32_t(sizeof s.a + sizeof s.b + sizeof s.v) / (fault == kBytes ? 2 : 1));
    tma_load(shared_address(s.a), &a_map, full, 0, 0, 0, 0);
    tma_load(shared_address(s.b), &b_map, full, 0, 0, 0, 0);
    tma_load(shared_address(s.v), &v_map, full, 0, 0, 0, 0);
    if (fault == kLeft) return tma_load(shared_address(s.v), &v_map, full, 0, 0, 0, 0);
    barrier_wait(used, 0);    // then the tile may be taken for something else
    memset(&s, 0, offsetof(Tiles, full));
    return;
  }
  if (fault == kRegisters)
    take_registers<160>();
  else
    take_registers<152>();
  if (fault != kEarly) barrier_wait(full, fault == kParity ? 1 : 0);
  float sums[kCols / 2], others[32] = {};
  uint32_t own[4][4];
  for (int i = 0; i < 16; ++i) {
    const int r = row + i % 2 * 8, k = i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
    own[i / 4][i % 4] = pack<false>(float(left(r, k)), float(left(r, k + 1)));
  }
  if (fault != kUnfenced) wgmma_fence();
  const uint64_t a = tile_descriptor(shared_address(s.a)), v = tile_descriptor(shared_address(s.v));
  uint64_t b = tile_descriptor(shared_address(s.b));
  if (fault == kSwizzle) b &= ~(uint64_t(3) << 62);
  if (fault == kStride) b -= uint64_t(512 >> 4) << 32;
  for (int i = 0; i < 4; ++i) wgmma<kCols, false>(sums, a + unsigned(i * 2), b + unsigned(i * 2), i > 0);
  wgmma_commit();
  for (int i = 0; i < 4; ++i) wgmma<64, false>(others, own[i], v + unsigned(i * 128));
  wgmma_commit();
  wgmma_wait<1>();
  for (int i = 0; i < 64; ++i) c[(row + i / 2 % 2 * 8) * kCols + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  if (fault == kRewritten) own[3][0] = 0;
  if (fault == kOverwritten && lane == 0) barrier_arrive(used);
  if (fault != kUnwaited) wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) d[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = others[i];
  if (fault == kUnwaited) wgmma_wait<0>();
  if (fault != kOverwritten && lane == 0) barrier_arrive(used);
}

}  // namespace

int main(int count, char** words) {
  int fault = 0;
  while (fault < kFaults && count == 3 && strcmp(kNames[fault], words[1])) ++fault;
  if (count != 3 || fault == kFaults) return 2;
  cuda_host_seed(strtoull(words[2], nullptr, 10));
  static uint16_t a[kRows * 64], b[kCols * 64], v[kDepth * 64];
  for (int i = 0; i < kRows * 64; ++i) a[i] = bits(left(i / 64, i % 64));
  for (int i = 0; i < kCols * 64; ++i) b[i] = bits(right(i / 64, i % 64));
  for (int i = 0; i < kDepth * 64; ++i) v[i] = bits(right(i % 64, i / 64));
  CUtensorMap maps[3];
  const int64_t strides[3] = {64, 64, 64}, sizes[3][4] = {{64, 60, 1, 1}, {64, kCols, 1, 1}, {64, kDepth, 1, 1}};
  const void* from[3] = {a, b, v};
  for (int i = 0; i < 3; ++i)
    if (tensor_map(&maps[i], from[i], false, sizes[i], strides, i == 1 ? kCols : 64)) return 3;
  static float c[kRows * kCols], d[kRows * 64];
  const int64_t shared = int64_t(sizeof(Tiles)) + 1152;
  const int e = launch(products, 1, 512, shared, 1, nullptr, Fault(fault), maps[0], maps[1], maps[2], &c[0], &d[0]);
  if (e) return printf("%s\n", cudaGetErrorString(cudaError_t(e))), 0;
  int wrong = 0;
  for (int row = 0; row < kRows; ++row)
    for (int col = 0; col < kCols; ++col) {
      int first = 0, second = 0;
      for (int k = 0; k < 64; ++k) {
        first += row < 60 ? left(row, k) * right(col, k) : 0;
        second += left(row, k) * right(col, k);
      }
      wrong += !(c[row * kCols + col] == float(first)) + (col < 64 && !(d[row * 64 + col] == float(second)));
    }
  printf("%d wrong\n", wrong);
}
