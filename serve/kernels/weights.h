/* Rows of a weight times a few tokens, the weight as it is held: 4 bits, 16 bits or float32, expanded as it is read.

   Weights are taken 64 at a time. 4 bits come out of their bytes in an order of their own (`place_of`), in which the tokens
   are then laid out too, so that nothing is moved about in the inner loop.

   In bfloat16 (`is_narrow`), where the processor multiplies pairs of them and adds up in float32, weights and tokens are
   rounded to it: half of the vectors, and twice as many products in each. */

#ifndef QHUB_WEIGHTS_H
#define QHUB_WEIGHTS_H

#include "cpu.h"

#define BLOCK 64             /* weights with one absmax */
#define VECS (BLOCK / LANES) /* vectors of a block */
#define CHUNK 9              /* blocks of each row that are expanded at a time: 18 kB, which stay in the nearest cache */
#define FEW 4                /* rows of 4 bits that are expanded and used at once */
#ifdef __AVX512F__
#define ROWS 8    /* rows of W computed together, with 3 tokens: as many sums as there are registers for */
#define AT_ONCE 6 /* tokens for which what is expanded is used at once */
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#elif defined(__AVX2__)
#define ROWS 4
#define AT_ONCE 2
#define IN_REGISTER(value) __asm__("" : "+x"(value))
#else
#define ROWS 4
#define AT_ONCE 2
#define IN_REGISTER(value)
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_NARROW 1
#else
#define HAS_NARROW 0
#endif

/* W (outputs, inputs) of a layer. `absmax` (outputs * inputs / 64) is of 4 bits, `bias` (outputs) may be NULL. */
typedef struct {
    const void *weight;
    const float *absmax, *bias;
    int64_t kind, outputs;
} linear_t;

/* The 16 values that 4 bits stand for as the instruction that looks them up wants them. */
typedef struct {
#if defined(__AVX512F__)
    __m512 values;
#elif defined(__AVX2__)
    __m256i bytes[4]; /* byte k of each float, twice */
#else
    float values[16];
#endif
} table_t;

INLINE table_t table_of(const float *code) {
    table_t table;
#if defined(__AVX512F__)
    table.values = _mm512_loadu_ps(code);
#elif defined(__AVX2__)
    for (int k = 0; k < 4; k++) {
        uint8_t bytes[32];
        for (int i = 0; i < 32; i++) bytes[i] = ((const uint8_t *)code)[4 * (i % 16) + k];
        table.bytes[k] = _mm256_loadu_si256((const __m256i *)bytes);
    }
#else
    memcpy(table.values, code, sizeof(table.values));
#endif
    return table;
}

/* Which weight of a block stands at place i of what `expand` gives; the first of a byte is in its high half. */
INLINE int place_of(int i) {
#if defined(__AVX512F__)
    return 32 * (i / 32) + 2 * (i % 16) + i / 16 % 2;
#elif defined(__AVX2__)
    return 2 * (16 * (i / 4 % 2) + 4 * (i / 8 % 4) + i % 4) + i / 32;
#else
    return 16 * (i / 16) + 2 * (i % 8) + i / 8 % 2;
#endif
}

/* A block of 32 bytes as floats. */
INLINE void expand(const uint8_t *packed, const table_t *table, float absmax, vec *out) {
#if defined(__AVX512F__)
    const __m512 values = (__m512)((vec)table->values * absmax);
    UNROLL for (int half = 0; half < 2; half++) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed + half));
        out[2 * half] = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values);
        out[2 * half + 1] = (vec)_mm512_permutexvar_ps(bytes, values); /* its low 4 bits count */
    }
#elif defined(__AVX2__)
    const __m256i bytes = _mm256_loadu_si256((const __m256i *)packed), low = _mm256_set1_epi8(15);
    UNROLL for (int half = 0; half < 2; half++) {
        const __m256i at = _mm256_and_si256(half ? bytes : _mm256_srli_epi16(bytes, 4), low);
        __m256i found[4];
        UNROLL for (int k = 0; k < 4; k++) found[k] = _mm256_shuffle_epi8(table->bytes[k], at);
        const __m256i a = _mm256_unpacklo_epi8(found[0], found[1]), b = _mm256_unpacklo_epi8(found[2], found[3]);
        const __m256i c = _mm256_unpackhi_epi8(found[0], found[1]), d = _mm256_unpackhi_epi8(found[2], found[3]);
        out[4 * half] = (vec)_mm256_unpacklo_epi16(a, b) * absmax;
        out[4 * half + 1] = (vec)_mm256_unpackhi_epi16(a, b) * absmax;
        out[4 * half + 2] = (vec)_mm256_unpacklo_epi16(c, d) * absmax;
        out[4 * half + 3] = (vec)_mm256_unpackhi_epi16(c, d) * absmax;
    }
#else
    for (int i = 0; i < BLOCK; i++) {
        const int at = place_of(i), byte = packed[at / 2];
        out[i / LANES][i % LANES] = table->values[at % 2 ? byte & 15 : byte >> 4] * absmax;
    }
#endif
}

#if HAS_NARROW
/* A block of 32 bytes in bfloat16: the first of every byte, and then the second. */
INLINE void expand_narrow(const uint8_t *packed, const table_t *table, float absmax, vec *out) {
    const __m256bh each = _mm512_cvtneps_pbh((__m512)((vec)table->values * absmax));
    const __m512i values = _mm512_broadcast_i64x4((__m256i)each); /* twice, for bit 4 is the other number's */
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)packed));
    out[0] = (vec)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), values);
    out[1] = (vec)_mm512_permutexvar_epi16(bytes, values);
}
#endif

/* x * w + sum, each lane by itself; of bfloat16, two products a lane. */
INLINE vec add_product(vec x, vec w, vec sum, const int is_narrow) {
#if HAS_NARROW
    if (is_narrow) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#endif
    return multiply_add(x, w, sum);
}

INLINE vec vector_at(const char *at, int number) { return load((const float *)at + number * LANES); }

/* Bytes of a block. */
INLINE int64_t bytes_of(const int kind) { return kind == FOUR_BIT ? BLOCK / 2 : kind == FP32 ? 4 * BLOCK : 2 * BLOCK; }

/* Have a block under way from memory, of rows that come later. */
INLINE void fetch_block(const uint8_t *at, const int kind) {
    for (int64_t i = 0; i < bytes_of(kind); i += 64) __builtin_prefetch(at + i);
}

/* A block as floats, or in bfloat16 if it is held in 4 bits or in that: 4 bits in the order of their expansion. */
INLINE void block_of(const uint8_t *at, const float *absmax, const table_t *table, vec *out, const int kind,
                     const int is_narrow) {
#if HAS_NARROW
    if (is_narrow && kind == FOUR_BIT) expand_narrow(at, table, *absmax, out);
    else if (is_narrow)
        UNROLL for (int v = 0; v < VECS / 2; v++) out[v] = load((const float *)at + v * LANES); /* bits as they are */
    else
#endif
    if (kind == FOUR_BIT) expand(at, table, *absmax, out);
    else
        UNROLL for (int v = 0; v < VECS; v++)
            out[v] = kind == FP32 ? load((const float *)at + v * LANES) : widen((const uint16_t *)at + v * LANES, kind);
}

/* out (tokens, rows) = x (tokens, inputs) times `rows` rows of W from `row` on; x in the order in which they expand. What
   is expanded is used at once. A single row is read sequentially, which the hardware prefetcher follows by itself; with
   several rows, the group after the next is prefetched. */
INLINE void at_once(float *out, int64_t out_row, const char *x, const linear_t *linear, const table_t *table, int64_t row,
                    int64_t inputs, const int tokens, const int rows, const int kind, const int is_narrow) {
    const int64_t blocks = inputs / BLOCK, bytes = blocks * bytes_of(kind), x_row = inputs * (is_narrow ? 2 : 4);
    const int vecs = is_narrow ? VECS / 2 : VECS;
    const uint8_t *at = (const uint8_t *)linear->weight + row * bytes;
    const float *absmax = linear->absmax + row * blocks;
    const char *end = x + x_row;
    vec sums[AT_ONCE][FEW];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int r = 0; r < rows; r++) sums[t][r] = (vec){0};
    for (; x < end; x += vecs * sizeof(vec), at += bytes_of(kind), absmax++)
        UNROLL for (int r = 0; r < rows; r++) {
            vec weights[VECS];
            if (rows > 1) fetch_block(at + (2 * rows + r) * bytes, kind);
            block_of(at + r * bytes, absmax + r * blocks, table, weights, kind, is_narrow);
            UNROLL for (int v = 0; v < vecs; v++)
                UNROLL for (int t = 0; t < tokens; t++)
                    sums[t][r] = add_product(vector_at(x + t * x_row, v), weights[v], sums[t][r], is_narrow);
        }
    UNROLL for (int t = 0; t < tokens; t++) totals(out + t * out_row, sums[t], linear->bias ? linear->bias + row : 0, rows);
}

/* The same for more tokens: what is expanded is kept for all of them, and laid out as they want it. */
INLINE void expanded(float *out, int64_t out_row, const char *x, const linear_t *linear, const table_t *table, int64_t row,
                     int64_t inputs, int64_t tokens, const int rows, const int kind, const int is_narrow) {
    const int64_t blocks = inputs / BLOCK, bytes = blocks * bytes_of(kind), x_row = inputs * (is_narrow ? 2 : 4);
    const int vecs = is_narrow ? VECS / 2 : VECS;
    const uint8_t *held = (const uint8_t *)linear->weight + row * bytes;
    const float *absmax = linear->absmax + row * blocks, *bias = linear->bias ? linear->bias + row : 0;
    vec weights[CHUNK][ROWS][VECS], sums[tokens][ROWS];
    for (int64_t first = 0; first < blocks; first += CHUNK) {
        const int64_t n = least(CHUNK, blocks - first);
        const int is_last = first + CHUNK >= blocks;
        for (int r = 0; r < rows; r++) {
            const uint8_t *at = held + r * bytes + first * bytes_of(kind);
            const float *own = absmax + r * blocks + first;
            for (int64_t i = 0; i < n; i++, at += bytes_of(kind), own++) {
                fetch_block(at + rows * bytes, kind);
                block_of(at, own, table, weights[i][r], kind, is_narrow);
            }
        }
        int64_t t = 0;
#define MULTIPLY(count)                                                                               \
    {                                                                                                 \
        vec own[count][ROWS];                                                                         \
        const char *at = x + t * x_row + first * vecs * sizeof(vec);                                  \
        UNROLL for (int j = 0; j < count; j++)                                                        \
            UNROLL for (int r = 0; r < rows; r++) own[j][r] = first ? sums[t + j][r] : (vec){0};      \
        for (int64_t i = 0; i < n; i++, at += vecs * sizeof(vec))                                     \
            UNROLL for (int v = 0; v < vecs; v++) {                                                   \
                vec one[count];                                                                       \
                UNROLL for (int j = 0; j < count; j++) one[j] = vector_at(at + j * x_row, v);         \
                UNROLL for (int r = 0; r < rows; r++) {                                               \
                    vec weight = weights[i][r][v];                                                    \
                    IN_REGISTER(weight); /* read once, not for each token */                          \
                    UNROLL for (int j = 0; j < count; j++)                                            \
                        own[j][r] = add_product(one[j], weight, own[j][r], is_narrow);                \
                }                                                                                     \
            }                                                                                         \
        UNROLL for (int j = 0; j < count; j++)                                                        \
            if (is_last) totals(out + (t + j) * out_row, own[j], bias, rows);                         \
            else UNROLL for (int r = 0; r < rows; r++) sums[t + j][r] = own[j][r];                    \
        t += count;                                                                                   \
    }
        while (t < tokens)
            if (tokens - t == 3 || tokens - t > 4) MULTIPLY(3)
            else MULTIPLY(2)
    }
}

/* out (tokens, ROWS) = x (tokens, inputs) times as many rows of W from `row` on; x in the order in which they expand. */
INLINE void times_rows(float *out, int64_t out_row, const void *x, const linear_t *linear, const table_t *table,
                       int64_t row, int64_t inputs, int64_t tokens, const int kind, const int is_narrow) {
    const int most = kind == FOUR_BIT || kind == BF16 ? AT_ONCE : 2; /* less to be compiled for what is rare */
    const int step = kind == FOUR_BIT ? FEW : 1; /* what needs no expansion waits for memory alone: in its own order */
    if (tokens > most) {
        expanded(out, out_row, x, linear, table, row, inputs, tokens, ROWS, kind, is_narrow);
        return;
    }
    for (int r = 0; r < ROWS; r += step)
        switch (tokens) {
#define TOKENS_AT_ONCE(n)                                                                                             \
    case n:                                                                                                           \
        if (n <= most) at_once(out + r, out_row, x, linear, table, row + r, inputs, n, step, kind, is_narrow);        \
        break;
            TOKENS_AT_ONCE(1)
            TOKENS_AT_ONCE(2)
#if AT_ONCE > 2
            TOKENS_AT_ONCE(3)
            TOKENS_AT_ONCE(4)
            TOKENS_AT_ONCE(5)
            TOKENS_AT_ONCE(6)
#endif
        }
}

/* The same for up to ROWS rows, of whatever kind; the few that may be left of a layer one by one, for each token. */
static inline void times(float *out, int64_t out_row, const void *x, const linear_t *linear, const table_t *table,
                         int64_t row, int64_t inputs, int64_t tokens, int is_narrow) {
    const int64_t rows = least(ROWS, linear->outputs - row), x_row = inputs * (is_narrow ? 2 : 4);
#define TIMES(kind, is_narrow)                                                                                         \
    if (rows == ROWS) times_rows(out, out_row, x, linear, table, row, inputs, tokens, kind, is_narrow);                \
    else                                                                                                               \
        for (int64_t i = 0; i < rows * tokens; i++)                                                                    \
            at_once(out + i / rows * out_row + i % rows, out_row, (const char *)x + i / rows * x_row, linear, table,   \
                    row + i % rows, inputs, 1, 1, kind, is_narrow);
#if HAS_NARROW
    if (is_narrow && linear->kind == FOUR_BIT) { TIMES(FOUR_BIT, 1) }
    else if (is_narrow && linear->kind == BF16) { TIMES(BF16, 1) }
    else
#endif
    if (linear->kind == FOUR_BIT) { TIMES(FOUR_BIT, 0) }
    else if (linear->kind == BF16) { TIMES(BF16, 0) }
    else if (linear->kind == FP16) { TIMES(FP16, 0) }
    else { TIMES(FP32, 0) }
}

/* Whether products with such weights are of bfloat16, where they may be. */
INLINE int narrow(const linear_t *linear, int is_narrow) {
    return HAS_NARROW && is_narrow && (linear->kind == FOUR_BIT || linear->kind == BF16);
}

/* x (n) as `times` wants it: in the order in which 4 bits expand, or in its own, in float32 or bfloat16. */
INLINE void in_order(void *out, const float *x, int64_t n, int is_four_bit, int is_narrow) {
    for (int64_t first = 0; first < n; first += BLOCK) {
#if HAS_NARROW
        if (is_narrow) {
            const __m512i a = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(x + first + LANES), (__m512)load(x + first));
            const __m512i b =
                (__m512i)_mm512_cvtne2ps_pbh((__m512)load(x + first + 3 * LANES), (__m512)load(x + first + 2 * LANES));
            uint16_t even[32], odd[32];
            for (int i = 0; i < 32; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
            __m512i *own = (__m512i *)((uint16_t *)out + first);
            _mm512_storeu_si512(own, is_four_bit ? _mm512_permutex2var_epi16(a, _mm512_loadu_si512(even), b) : a);
            _mm512_storeu_si512(own + 1, is_four_bit ? _mm512_permutex2var_epi16(a, _mm512_loadu_si512(odd), b) : b);
            continue;
        }
#endif
        float *own = (float *)out + first;
        if (is_four_bit)
            UNROLL for (int i = 0; i < BLOCK; i++) own[i] = x[first + place_of(i)];
        else memcpy(own, x + first, BLOCK * sizeof(float));
    }
}

#endif
