// Just enough of CUDA to run a kernel on a CPU, one block after the other, a thread of the system for each of a block's:
// slow, and lane for lane what the GPU computes. Define WARPS before including the kernel's source.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static

using std::min;
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct Index { int x, y; };
struct Warp {
  std::barrier<> gate{32};
  uint32_t given[32], a[32][4], b[32][2];
};

static Index gridDim;
static thread_local Index threadIdx, blockIdx;
static std::unique_ptr<std::barrier<>> block_gate;
static Warp warps[WARPS];

inline Warp &own_warp() { return warps[threadIdx.x / 32]; }
inline void __syncthreads() { block_gate->arrive_and_wait(); }

template <typename T> T __shfl_sync(uint32_t, T value, int lane) {
  Warp &warp = own_warp();
  std::memcpy(&warp.given[threadIdx.x % 32], &value, 4);
  warp.gate.arrive_and_wait();
  std::memcpy(&value, &warp.given[lane % 32], 4);
  warp.gate.arrive_and_wait();
  return value;
}

template <typename T> T __ldg(const T *at) { return *at; }
template <typename T> T ask(const T *at) { return *at; }
inline uint2 ask(const unsigned char *at) {
  uint2 value;
  std::memcpy(&value, at, 8);
  return value;
}

#if HALF
inline uint16_t narrow(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float widen(uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &low, 2);
  return static_cast<float>(half);
}
#else
inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float widen(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
#endif

inline uint32_t pair(float first, float second) { return narrow(first) | static_cast<uint32_t>(narrow(second)) << 16; }

// mma.sync.m16n8k16.row.col, its fragments as PTX's documentation lays them out
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Warp &warp = own_warp();
  const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  std::memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  warp.gate.arrive_and_wait();
  for (int i = 0; i < 4; i++) {
    const int row_half = i / 2, column = quad * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const int of = k % 8 / 2, shift = k % 2 * 16;
      const uint32_t left = warp.a[group * 4 + of][row_half + k / 8 * 2] >> shift & 0xffff;
      const uint32_t right = warp.b[column * 4 + of][k / 8] >> shift & 0xffff;
      d[i] += widen(left) * widen(right);
    }
  }
  warp.gate.arrive_and_wait();
}

template <typename Kernel> void launch(int grid_x, int grid_y, const Kernel &kernel) {
  gridDim = {grid_x, grid_y};
  for (int y = 0; y < grid_y; y++)
    for (int x = 0; x < grid_x; x++) {
      block_gate = std::make_unique<std::barrier<>>(WARPS * 32);
      std::vector<std::thread> threads;
      for (int index = 0; index < WARPS * 32; index++)
        threads.emplace_back([=, &kernel] {
          threadIdx = {index, 0}, blockIdx = {x, y};
          kernel();
        });
      for (std::thread &thread : threads) thread.join();
    }
}
