/* What the kernels for a CPU share: vectors, products of a few tokens with factors, e^x. All in float32.

   Every sum has one order, whatever the number of threads and whatever else is in the batch, so the same request gets
   the same answer. */

#ifndef QHUB_CPU_H
#define QHUB_CPU_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define TOKENS 4   /* computed together, so that what is read for one serves all */
#define TILE 16    /* the most tokens of a tile of add_parts */
#define SPAN 512   /* places of a row that one task of attention reads */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { FOUR_BIT, BF16, FP16, FP32 }; /* how numbers are held */

INLINE vec load(const float *at) { return *(const vec_at *)at; }
INLINE void store(float *at, vec value) { *(vec_at *)at = value; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* a * b + sum, rounded once. */
INLINE vec multiply_add(vec a, vec b, vec sum) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return a * b + sum;
#endif
}

INLINE float multiply_add_one(float a, float b, float sum) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, sum);
#else
    return a * b + sum;
#endif
}

/* What the lanes add up to: each half to the other, again and again. */
INLINE float total(vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    UNROLL for (int n = LANES / 2; n; n /= 2)
        UNROLL for (int lane = 0; lane < n; lane++) value[lane] += value[lane + n];
    return value[0];
#endif
}

/* out (rows) = what the lanes of each of the sums add up to, in the order of `total`, and the bias, which may be NULL. */
INLINE void totals(float *out, const vec *sums, const float *bias, const int rows) {
#ifdef __AVX512F__
    if (rows == 8) { /* two vectors become one at each step: a third of the work of eight totals */
        __m512 half[4], quarter[2];
        UNROLL for (int i = 0; i < 4; i++) {
            const __m512 a = (__m512)sums[2 * i], b = (__m512)sums[2 * i + 1];
            half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
        UNROLL for (int i = 0; i < 2; i++)
            quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[2 * i], half[2 * i + 1], 0x88),
                                       _mm512_shuffle_f32x4(half[2 * i], half[2 * i + 1], 0xdd));
        const __m512 pair = _mm512_add_ps(_mm512_shuffle_ps(quarter[0], quarter[1], 0x44),
                                          _mm512_shuffle_ps(quarter[0], quarter[1], 0xee));
        const __m512 each = _mm512_add_ps(pair, _mm512_permute_ps(pair, 0xb1));
        const __m512i order = _mm512_castsi256_si512(_mm256_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14));
        __m256 found = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, each));
        if (bias) found = _mm256_add_ps(found, _mm256_loadu_ps(bias));
        _mm256_storeu_ps(out, found);
        return;
    }
#endif
    UNROLL for (int r = 0; r < rows; r++) out[r] = total(sums[r]) + (bias ? bias[r] : 0);
}

/* A number of 16 bits as a float. Half precision is put together where the compiler does not know it: its exponent is 112
   less, and what is below its least one is so many 2^-24. */
INLINE float widen_one(const uint16_t *at, const int kind) {
    union { uint32_t bits; float value; } one = {(uint32_t)*at << 16};
    if (kind == BF16) return one.value;
#ifdef __FLT16_MANT_DIG__
    _Float16 half;
    memcpy(&half, at, 2);
    return half;
#else
    const uint32_t sign = (uint32_t)(*at & 0x8000) << 16, exponent = *at >> 10 & 31, rest = *at & 0x3ff;
    if (!exponent) return (sign ? -1.0f : 1.0f) * rest * 0x1p-24f;
    one.bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13;
    return one.value;
#endif
}

/* LANES numbers of 16 bits as floats: bfloat16 is a float's upper half; half precision by the processor. */
INLINE vec widen(const uint16_t *at, const int kind) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256((const __m256i *)at);
    if (kind == BF16) return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    return (vec)_mm512_cvtph_ps(bits);
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128((const __m128i *)at);
    if (kind == BF16) return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#ifdef __F16C__
    return (vec)_mm256_cvtph_ps(bits);
#endif
#endif
    vec out = {0};
    for (int i = 0; i < LANES; i++) out[i] = widen_one(at + i, kind);
    return out;
}

/* Where number `n` is, and it and the LANES - 1 behind it as floats. */
INLINE void *held_at(const void *at, int64_t n, const int kind) { return (char *)at + n * (kind == FP32 ? 4 : 2); }
INLINE vec load_as(const void *at, const int kind) { return kind == FP32 ? load(at) : widen(at, kind); }

INLINE float one_as(const void *at, const int kind) { return kind == FP32 ? *(const float *)at : widen_one(at, kind); }

/* The nearest bfloat16, the even one of two; NaN stays NaN. */
INLINE uint16_t narrowed(float value) {
    union { float value; uint32_t bits; } one = {value};
    return value != value ? 0x7fc0 : (uint16_t)((one.bits + 0x7fff + (one.bits >> 16 & 1)) >> 16);
}

/* n numbers, written as they are held. */
INLINE void write_as(void *out, const float *x, int64_t n, const int kind) {
    if (kind == FP32) memcpy(out, x, n * sizeof(float));
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t *)out)[i] = narrowed(x[i]);
}

/* out (count, LANES * vectors) += x (count, n) @ w (n, LANES * vectors), w in float32 or bfloat16; x of one token lies
   `x_row` from the next. */
INLINE void block(float *out, int64_t out_row, const float *x, int64_t x_row, const void *w, int64_t w_row, int64_t n,
                  const int count, const int vectors, const int kind) {
    vec sums[TOKENS][4];
    UNROLL for (int t = 0; t < count; t++)
        UNROLL for (int v = 0; v < vectors; v++) sums[t][v] = load(out + t * out_row + v * LANES);
    for (int64_t k = 0; k < n; k++) {
        vec row[4];
        UNROLL for (int v = 0; v < vectors; v++) row[v] = load_as(held_at(w, k * w_row + v * LANES, kind), kind);
        UNROLL for (int t = 0; t < count; t++)
            UNROLL for (int v = 0; v < vectors; v++)
                sums[t][v] = multiply_add(x[t * x_row + k] + (vec){0}, row[v], sums[t][v]);
    }
    UNROLL for (int t = 0; t < count; t++)
        UNROLL for (int v = 0; v < vectors; v++) store(out + t * out_row + v * LANES, sums[t][v]);
}

/* out (count, width) += x (count, n) @ w (n, width), for up to TOKENS tokens. */
INLINE void few(float *out, int64_t out_row, const float *x, int64_t x_row, const void *w, int64_t w_row, int64_t n,
                int64_t width, const int count, const int kind) {
    int64_t c = 0;
#define VECTORS(vectors)                                                                               \
    {                                                                                                  \
        block(out + c, out_row, x, x_row, held_at(w, c, kind), w_row, n, count, vectors, kind);          \
        c += vectors * LANES;                                                                          \
    }
    while (c + 4 * LANES <= width) VECTORS(4)
    if (c + 3 * LANES <= width) VECTORS(3)
    else if (c + 2 * LANES <= width) VECTORS(2)
    else if (c + LANES <= width) VECTORS(1)
    const int rest = (int)(width - c);
    if (!rest) return;
    for (int t = 0; t < count; t++) {
        float sums[LANES] = {0};
        for (int64_t k = 0; k < n; k++)
            for (int j = 0; j < rest; j++)
                sums[j] = multiply_add_one(x[t * x_row + k], one_as(held_at(w, k * w_row + c + j, kind), kind), sums[j]);
        for (int j = 0; j < rest; j++) out[t * out_row + c + j] += sums[j];
    }
}

INLINE void product_of(float *out, int64_t out_row, const float *x, int64_t x_row, const void *w, int64_t w_row, int64_t n,
                       int64_t width, int64_t count, const int kind) {
    for (; count >= 4; count -= 4, out += 4 * out_row, x += 4 * x_row)
        few(out, out_row, x, x_row, w, w_row, n, width, 4, kind);
    if (count == 3) few(out, out_row, x, x_row, w, w_row, n, width, 3, kind);
    if (count == 2) few(out, out_row, x, x_row, w, w_row, n, width, 2, kind);
    if (count == 1) few(out, out_row, x, x_row, w, w_row, n, width, 1, kind);
}

/* out (count, width) += x (count, n) @ w (n, width), w held in whatever kind. */
static void product(float *out, int64_t out_row, const float *x, int64_t x_row, const void *w, int64_t w_row, int64_t n,
                    int64_t width, int64_t count, int64_t kind) {
    if (kind == FP32) product_of(out, out_row, x, x_row, w, w_row, n, width, count, FP32);
    else if (kind == BF16) product_of(out, out_row, x, x_row, w, w_row, n, width, count, BF16);
    else product_of(out, out_row, x, x_row, w, w_row, n, width, count, FP16);
}

/* e^x to 2 units in the last place, 0 far below; NaN stays NaN. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = rintf(x * 1.44269504f);
    const float f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.98756915e-4f;
    p = p * f + 1.39819995e-3f;
    p = p * f + 8.33345190e-3f;
    p = p * f + 4.16657960e-2f;
    p = p * f + 1.66666654e-1f;
    p = p * f + 5.00000000e-1f;
    p = p * f * f + f + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

#endif
