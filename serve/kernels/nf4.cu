// x @ W^T straight from the 4-bit weights of bitsandbytes, on tensor cores, for few tokens (decode).
//
// A byte is looked up as the pair of 16-bit numbers that its two weights stand for: one load from a table in shared memory
// of which every lane has a copy of its own, so that no two lanes ever meet in a bank. Pairs are what `mma` takes. The sum
// runs over k in any order, so a lane takes weights and x in the order in which memory holds them, 8 bytes and 32 at a
// time, and nothing is laid out anew. Each block of 64 weights is summed by itself, in float32, and then scaled.
//
// Compiled with NT (blocks of 8 tokens), MT (blocks of 16 outputs), WARPS that divide k (at least 8), AHEAD (blocks of 64
// that a lane asks for at once, at most 4), RESIDENT (programs on a multiprocessor) and HALF (float16, else bfloat16).

typedef unsigned int u32;
typedef unsigned short u16;

#define SUMS (MT * NT * 4)
#define CHUNK (SUMS < 16 ? SUMS : 16)  // of a lane's sums that the warps add up at a time
#ifndef X_AHEAD
#define X_AHEAD (NT <= 2)  // whether x is asked for with the weights: of few tokens there are registers for it
#endif

#ifndef EMULATED  // tests run this source on a CPU, where these are functions of their own
__device__ __forceinline__ u32 pair(float first, float second) {
  u32 both;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#endif
  return both;
}

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// volatile: the compiler would ask for what is needed later when it is needed
__device__ __forceinline__ uint2 ask(const unsigned char *at) {
  uint2 value;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(at));
  return value;
}

__device__ __forceinline__ uint4 ask(const uint4 *at) {
  uint4 value;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(at));
  return value;
}

__device__ __forceinline__ float ask(const float *at) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(at));
  return value;
}
#endif

struct Blocks {  // AHEAD blocks of 64 of the outputs `group` and `group + 8` of each block of 16
  uint2 bytes[AHEAD][MT][2];
  float scales[MT][2];  // lane `quad` has that of the block `quad`
#if X_AHEAD
  uint4 x[AHEAD][NT][2];
#endif
};

struct Job {
  const unsigned char *packed;  // (out_features, in_features / 2), the first weight in the high half
  const float *absmax;          // (out_features, in_features / 64)
  const u16 *x[NT];             // what this lane reads of each block of 8 tokens
  int out_features, blocks, end;
};

__device__ __forceinline__ void ask_for(Blocks &some, const Job &job, int tile, int start, int group, int quad) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const long long row = min((tile * MT + m) * 16 + half * 8 + group, job.out_features - 1);
      const unsigned char *const own = job.packed + row * job.blocks * 32 + quad * 8;
#pragma unroll
      for (int ahead = 0; ahead < AHEAD; ahead++)
        some.bytes[ahead][m][half] = ask(own + min(start + ahead, job.blocks - 1) * 32);
      some.scales[m][half] = ask(job.absmax + row * job.blocks + min(start + quad, job.blocks - 1));
    }
#if X_AHEAD
#pragma unroll
  for (int ahead = 0; ahead < AHEAD; ahead++)
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 *const at = reinterpret_cast<const uint4 *>(job.x[n] + min(start + ahead, job.blocks - 1) * 64);
      some.x[ahead][n][0] = ask(at), some.x[ahead][n][1] = ask(at + 1);
    }
#endif
}

__device__ __forceinline__ void add(float (&total)[MT][NT][4], const Blocks &some, const Job &job, const char *table,
                                    int lane, int start) {
#pragma unroll
  for (int ahead = 0; ahead < AHEAD; ahead++) {
    if (start + ahead >= job.end) continue;
    u32 a[MT][4][4];  // of four products of 16 weights each
    float scales[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        scales[m][half] = __shfl_sync(0xffffffffu, some.scales[m][half], (lane & ~3) + ahead);
#pragma unroll
        for (int step = 0; step < 4; step++) {
          const u32 four = step < 2 ? some.bytes[ahead][m][half].x : some.bytes[ahead][m][half].y;
          const u32 low = step % 2 ? four >> 9 : four << 7, high = step % 2 ? four >> 17 : four >> 1;
          a[m][step][half] = *reinterpret_cast<const u32 *>(table + ((low & 0x7f80u) | lane * 4));
          a[m][step][half + 2] = *reinterpret_cast<const u32 *>(table + ((high & 0x7f80u) | lane * 4));
        }
      }
#pragma unroll
    for (int n = 0; n < NT; n++) {
#if X_AHEAD
      const uint4 left = some.x[ahead][n][0], right = some.x[ahead][n][1];
#else
      const uint4 *const at = reinterpret_cast<const uint4 *>(job.x[n] + (start + ahead) * 64);
      const uint4 left = __ldg(at), right = __ldg(at + 1);
#endif
#pragma unroll
      for (int m = 0; m < MT; m++) {
        float part[4] = {};
        mma(part, a[m][0], left.x, left.y);
        mma(part, a[m][1], left.z, left.w);
        mma(part, a[m][2], right.x, right.y);
        mma(part, a[m][3], right.z, right.w);
#pragma unroll
        for (int i = 0; i < 4; i++) total[m][n][i] += scales[m][i / 2] * part[i];
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) multiply(
    const u16 *__restrict__ x,  // (tokens, in_features), rows x_stride apart
    const unsigned char *__restrict__ packed, const float *__restrict__ absmax,
    const float *__restrict__ code,  // (16,)
    u16 *__restrict__ out,           // (tokens, out_features)
    int x_stride, int tokens, int in_features, int out_features) {
  __shared__ u32 table[256 * 32];
  __shared__ float sums[WARPS][CHUNK][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const int first_token = blockIdx.y * (NT * 8);
  const int share = (in_features / 64 + WARPS - 1) / WARPS;
  const int begin = warp * share;
  const int entries = 256 / WARPS, byte = warp * entries + lane % entries;  // of the table: at most 32 a warp
  const float first = code[byte >> 4], second = code[byte & 15];
  Job job = {packed, absmax, {}, out_features, in_features / 64, min(begin + share, in_features / 64)};
#pragma unroll
  for (int n = 0; n < NT; n++)  // beyond the last token it is read once more, and what comes of it is dropped
    job.x[n] = x + (long long)min(first_token + n * 8 + group, tokens - 1) * x_stride + quad * 16;
  const int tiles = (out_features + MT * 16 - 1) / (MT * 16);

  int tile = blockIdx.x, start = begin;
  Blocks now;
  ask_for(now, job, tile, start, group, quad);
  const u32 own = pair(first, second);
#pragma unroll
  for (int entry = 0; entry < entries; entry++)
    table[(warp * entries + entry) * 32 + lane] = __shfl_sync(0xffffffffu, own, entry);
  __syncthreads();

  float total[MT][NT][4] = {};
  while (tile < tiles) {
    int next_tile = tile, next = start + AHEAD;
    if (next >= job.end) next_tile += gridDim.x, next = begin;
    Blocks then;
    if (next_tile < tiles) ask_for(then, job, next_tile, next, group, quad);
    add(total, now, job, reinterpret_cast<const char *>(table), lane, start);
    if (next_tile != tile) {  // the warps' sums, always in the same order
#pragma unroll
      for (int chunk = 0; chunk < SUMS; chunk += CHUNK) {
#pragma unroll
        for (int place = 0; place < CHUNK; place++) {
          const int at = chunk + place;
          sums[warp][place][lane] = total[at / (NT * 4)][at / 4 % NT][at % 4];
          total[at / (NT * 4)][at / 4 % NT][at % 4] = 0.0f;
        }
        __syncthreads();
        for (int index = threadIdx.x; index < CHUNK * 32; index += WARPS * 32) {
          const int at = chunk + index / 32, of = index % 32;
          float sum = 0.0f;
#pragma unroll
          for (int one = 0; one < WARPS; one++) sum += sums[one][index / 32][of];
          const int feature = (tile * MT + at / (NT * 4)) * 16 + at % 4 / 2 * 8 + of / 4;
          const int token = first_token + at / 4 % NT * 8 + of % 4 * 2 + at % 2;
          if (token < tokens && feature < out_features)
            out[(long long)token * out_features + feature] = (u16)pair(sum, 0.0f);
        }
        __syncthreads();
      }
    }
    now = then;
    tile = next_tile, start = next;
  }
}
