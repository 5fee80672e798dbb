/* What a core can do at most: multiply-adds in its registers, and bytes read from memory. See benchmarks/steps.py. */

#include <immintrin.h>
#include <stdint.h>
#include <time.h>

#ifndef __AVX512F__
#error "this is written for AVX-512"
#endif
#define SUMS 12
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now); /* what else the machine does counts for nothing */
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

/* Multiply-adds a second of one thread, in float32. */
double float32_rate(int64_t rounds) {
#define FLOAT(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n"
    const double start = seconds();
    for (int64_t k = 0; k < rounds; k++) __asm__ volatile(EACH(FLOAT)::: "memory");
    return rounds * SUMS * 16 / (seconds() - start);
}

/* The same of pairs of bfloat16; 0 where there is no such instruction. */
double bfloat16_rate(int64_t rounds) {
#ifdef __AVX512BF16__
#define NARROW(i) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #i "\n"
    const double start = seconds();
    for (int64_t k = 0; k < rounds; k++) __asm__ volatile(EACH(NARROW)::: "memory");
    return rounds * SUMS * 32 / (seconds() - start);
#else
    return 0 * rounds;
#endif
}

/* Bytes a second that one thread reads, `size` of them, a multiple of 256, in their order. */
double read_rate(const char *at, int64_t size) {
    __m512i sums[4] = {{0}};
    const double start = seconds();
    for (int64_t i = 0; i < size; i += 256)
        for (int j = 0; j < 4; j++) {
            sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(at + i + 64 * j));
            __asm__ volatile("" : "+v"(sums[j]));
        }
    return size / (seconds() - start);
}
