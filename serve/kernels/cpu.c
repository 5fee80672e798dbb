/* The kernels for a CPU, in float32: what serve/kernels/reference.py computes, whose words are used here.

   Compiled by serve/kernels/compiled.py for the processor it runs on. Every sum has one order, whatever the number of
   threads and whatever else is in the batch, so the same request gets the same answer. */

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
#define TILE 16    /* the most tokens of a tile of add_lora */
#define SPAN 512   /* places of a row that one task of attention reads */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *at) { return *(const vec_at *)at; }
INLINE void store(float *at, vec value) { *(vec_at *)at = value; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float total(vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
#endif
}

/* out (count, LANES * vectors) += x (count, n) @ w (n, LANES * vectors); x of one token lies `x_row` from the next. */
INLINE void block(float *out, int64_t out_row, const float *x, int64_t x_row, const float *w, int64_t w_row, int64_t n,
                  const int count, const int vectors) {
    vec sums[TOKENS][4];
    UNROLL for (int t = 0; t < count; t++)
        UNROLL for (int v = 0; v < vectors; v++) sums[t][v] = load(out + t * out_row + v * LANES);
    for (int64_t k = 0; k < n; k++) {
        vec row[4];
        UNROLL for (int v = 0; v < vectors; v++) row[v] = load(w + k * w_row + v * LANES);
        UNROLL for (int t = 0; t < count; t++)
            UNROLL for (int v = 0; v < vectors; v++) sums[t][v] += x[t * x_row + k] * row[v];
    }
    UNROLL for (int t = 0; t < count; t++)
        UNROLL for (int v = 0; v < vectors; v++) store(out + t * out_row + v * LANES, sums[t][v]);
}

/* out (count, width) += x (count, n) @ w (n, width), for up to TOKENS tokens. */
INLINE void few(float *out, int64_t out_row, const float *x, int64_t x_row, const float *w, int64_t w_row, int64_t n,
                int64_t width, const int count) {
    int64_t c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES) block(out + c, out_row, x, x_row, w + c, w_row, n, count, 4);
    if (c + 2 * LANES <= width) {
        if (c + 3 * LANES <= width) {
            block(out + c, out_row, x, x_row, w + c, w_row, n, count, 3);
            c += 3 * LANES;
        } else {
            block(out + c, out_row, x, x_row, w + c, w_row, n, count, 2);
            c += 2 * LANES;
        }
    }
    for (; c + LANES <= width; c += LANES) block(out + c, out_row, x, x_row, w + c, w_row, n, count, 1);
    const int rest = (int)(width - c);
    if (!rest) return;
    for (int t = 0; t < count; t++) {
        float sums[LANES] = {0};
        for (int64_t k = 0; k < n; k++)
            for (int j = 0; j < rest; j++) sums[j] += x[t * x_row + k] * w[k * w_row + c + j];
        for (int j = 0; j < rest; j++) out[t * out_row + c + j] += sums[j];
    }
}

static void product(float *out, int64_t out_row, const float *x, int64_t x_row, const float *w, int64_t w_row,
                    int64_t n, int64_t width, int64_t count) {
    for (; count >= 4; count -= 4, out += 4 * out_row, x += 4 * x_row) few(out, out_row, x, x_row, w, w_row, n, width, 4);
    if (count == 3) few(out, out_row, x, x_row, w, w_row, n, width, 3);
    if (count == 2) few(out, out_row, x, x_row, w, w_row, n, width, 2);
    if (count == 1) few(out, out_row, x, x_row, w, w_row, n, width, 1);
}

/* outs[l][token] += x[token] @ A_slot[:, l] @ B_slot of layer l, for the tokens of each tile (first, count, slot).

   `inner` (parts, tokens of all tiles, layers * rank) is room for x @ A, in parts of `part` inputs. */
void qhub_add_lora(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *x, int64_t x_row,
                   int64_t inputs, const float *a, int64_t a_slot, const float *const *bs, const int64_t *b_slots,
                   int64_t layers, int64_t rank, const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part) {
    const int64_t width = layers * rank, parts = (inputs + part - 1) / part, columns = 256;
    int64_t begins[num_tiles + 1], widest = 0;
    begins[0] = 0;
    for (int64_t i = 0; i < num_tiles; i++) begins[i + 1] = begins[i] + (tiles[3 * i + 2] < 0 ? 0 : tiles[3 * i + 1]);
    for (int64_t l = 0; l < layers; l++) widest = sizes[l] > widest ? sizes[l] : widest;
    const int64_t tokens = begins[num_tiles], pieces = (widest + columns - 1) / columns;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < num_tiles; i++)
            for (int64_t p = 0; p < parts; p++) {
                const int64_t count = begins[i + 1] - begins[i], first = p * part;
                float *own = inner + (p * tokens + begins[i]) * width;
                memset(own, 0, count * width * sizeof(float));
                if (count)
                    product(own, width, x + tiles[3 * i] * x_row + first, x_row,
                            a + tiles[3 * i + 2] * a_slot + first * width, width, least(part, inputs - first), width, count);
            }
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t i = 0; i < num_tiles; i++)
            for (int64_t l = 0; l < layers; l++)
                for (int64_t piece = 0; piece < pieces; piece++) {
                    const int64_t count = begins[i + 1] - begins[i], c = piece * columns;
                    if (!bs[l] || !count || c >= sizes[l]) continue;
                    float sums[count * rank];
                    memset(sums, 0, sizeof(sums));
                    for (int64_t p = 0; p < parts; p++)
                        for (int64_t t = 0; t < count; t++)
                            for (int64_t r = 0; r < rank; r++)
                                sums[t * rank + r] += inner[(p * tokens + begins[i] + t) * width + l * rank + r];
                    product(outs[l] + tiles[3 * i] * out_rows[l] + c, out_rows[l], sums, rank,
                            bs[l] + tiles[3 * i + 2] * b_slots[l] + c, sizes[l], rank, least(columns, sizes[l] - c), count);
                }
    }
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

/* Where keys and values lie: steps between pages, heads and places; within a place, one after the other. */
typedef struct { const float *data; int64_t page, head, place; } cache_t;

/* Have a page under way while another is read: pages lie anywhere, so the processor does not guess the next. */
INLINE void fetch(const float *data, int64_t place, int64_t page, int64_t dim) {
    for (int64_t i = 0; i < page; i++)
        for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(data + i * place + d);
}

/* Up to TOKENS queries of one key head over the places [begin, end) of a row: unnormalised results, peaks and sums. */
INLINE void attend(float *out, float *peaks, float *sums, const float *query, int64_t query_head, cache_t keys,
                   cache_t values, const int32_t *pages, int64_t page, int64_t begin, int64_t end, int64_t dim, float scale,
                   float softcap, const int count) {
    float scores[TOKENS][SPAN];
    const int64_t whole = dim / LANES * LANES, n = end - begin;
    for (int64_t at = begin; at < end;) {
        const int64_t stop = least((at / page + 1) * page, end);
        const float *k = keys.data + pages[at / page] * keys.page + at % page * keys.place;
        if (stop < end) fetch(keys.data + pages[stop / page] * keys.page, keys.place, page, dim);
        for (; at < stop; at++, k += keys.place) {
            vec parts[TOKENS];
            UNROLL for (int g = 0; g < count; g++) parts[g] = (vec){0};
            for (int64_t d = 0; d < whole; d += LANES) {
                const vec own = load(k + d);
                UNROLL for (int g = 0; g < count; g++) parts[g] += load(query + g * query_head + d) * own;
            }
            UNROLL for (int g = 0; g < count; g++) {
                float score = total(parts[g]);
                for (int64_t d = whole; d < dim; d++) score += query[g * query_head + d] * k[d];
                scores[g][at - begin] = score * scale;
            }
        }
    }
    for (int g = 0; g < count; g++) {
        float *own = scores[g], peak = -INFINITY, sum = 0;
        if (softcap != 0) /* tanh(y) = 1 - 2 / (e^2y + 1) */
            for (int64_t i = 0; i < n; i++) own[i] = softcap * (1 - 2 / (exponential(2 * own[i] / softcap) + 1));
        for (int64_t i = 0; i < n; i++) peak = own[i] > peak ? own[i] : peak;
        for (int64_t i = 0; i < n; i++) own[i] = exponential(own[i] - peak);
        for (int64_t i = 0; i < n; i++) sum += own[i];
        peaks[g] = peak;
        sums[g] = sum;
        memset(out + g * dim, 0, dim * sizeof(float));
    }
    for (int64_t at = begin; at < end;) { /* page by page, in which the places lie one behind the other */
        const int64_t stop = least((at / page + 1) * page, end);
        const float *v = values.data + pages[at / page] * values.page + at % page * values.place;
        if (stop < end) fetch(values.data + pages[stop / page] * values.page, values.place, page, dim);
        few(out, dim, &scores[0][at - begin], SPAN, v, values.place, stop - at, dim, count);
        at = stop;
    }
}

/* softmax(cap(scale * query @ keys^T)) @ values of one token a row. `parts` (tasks, head_dim + 2) is room for each
   query head's share of each SPAN places of each row. */
void qhub_paged_attention(float *out, const float *query, int64_t query_row, int64_t query_head, const float *keys,
                          int64_t key_page, int64_t key_head, int64_t key_place, const float *values, int64_t value_page,
                          int64_t value_head, int64_t value_place, const int32_t *tables, int64_t table_row,
                          const int32_t *lengths, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page,
                          int64_t spans, float scale, int64_t window, float softcap, float *parts) {
    const int64_t repeats = heads / kv_heads, size = dim + 2;
#pragma omp parallel
    {
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t head = 0; head < kv_heads; head++)
                for (int64_t span = 0; span < spans; span++) {
                    const int64_t length = lengths[row], first = window && length > window ? length - window : 0;
                    const int64_t begin = span * SPAN > first ? span * SPAN : first, end = least((span + 1) * SPAN, length);
                    const cache_t k = {keys + head * key_head, key_page, key_head, key_place};
                    const cache_t v = {values + head * value_head, value_page, value_head, value_place};
                    float results[TOKENS * dim], peaks[TOKENS], sums[TOKENS];
                    for (int64_t g = 0; begin < end && g < repeats; g += TOKENS) {
                        const int64_t count = least(TOKENS, repeats - g), own = head * repeats + g;
                        const float *q = query + row * query_row + own * query_head;
#define ATTEND(n) attend(results, peaks, sums, q, query_head, k, v, tables + row * table_row, page, begin, end, dim, scale, softcap, n)
                        if (count == 4) ATTEND(4);
                        else if (count == 3) ATTEND(3);
                        else if (count == 2) ATTEND(2);
                        else ATTEND(1);
                        for (int64_t i = 0; i < count; i++) {
                            float *part = parts + ((row * heads + own + i) * spans + span) * size;
                            memcpy(part, results + i * dim, dim * sizeof(float));
                            part[dim] = peaks[i];
                            part[dim + 1] = sums[i];
                        }
                    }
                }
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t head = 0; head < heads; head++) {
                const int64_t length = lengths[row], first = window && length > window ? length - window : 0;
                float *own = out + (row * heads + head) * dim, peak = -INFINITY, sum = 0;
                const float *part = parts + (row * heads + head) * spans * size;
                memset(own, 0, dim * sizeof(float));
                for (int64_t span = first / SPAN; span * SPAN < length; span++)
                    peak = part[span * size + dim] > peak ? part[span * size + dim] : peak;
                for (int64_t span = first / SPAN; span * SPAN < length; span++) {
                    const float *one = part + span * size, weight = exponential(one[dim] - peak);
                    for (int64_t d = 0; d < dim; d++) own[d] += weight * one[d];
                    sum += weight * one[dim + 1];
                }
                for (int64_t d = 0; length > 0 && d < dim; d++) own[d] /= sum;
            }
    }
}

/* What 2 * LANES packed weights stand for: those in the high halves of the bytes, then those in the low halves. */
INLINE void expand(const uint8_t *packed, const float *code, float scale, vec *high, vec *low) {
#if defined(__AVX512F__)
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed));
    const __m512 table = _mm512_loadu_ps(code);
    *high = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table) * scale;
    *low = (vec)_mm512_permutexvar_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), table) * scale;
#elif defined(__AVX2__)
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)packed));
    const __m256 first = _mm256_loadu_ps(code), second = _mm256_loadu_ps(code + 8);
    const __m256i up = _mm256_srli_epi32(bytes, 4), down = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
    /* bit 3 of a number says which half of the table it is in; as the sign, it chooses */
#define LOOK_UP(at) _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, at), _mm256_permutevar8x32_ps(second, at), \
                                     _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)))
    *high = (vec)LOOK_UP(up) * scale;
    *low = (vec)LOOK_UP(down) * scale;
#else
    for (int lane = 0; lane < LANES; lane++) {
        (*high)[lane] = code[packed[lane] >> 4] * scale;
        (*low)[lane] = code[packed[lane] & 15] * scale;
    }
#endif
}

#define ROWS 4     /* rows of W computed together */
#define INPUTS 256 /* inputs of them that are expanded at a time */

INLINE void rows_of(float *out, int64_t out_row, const float *x, const uint8_t *packed, const float *absmax,
                    const float *code, int64_t inputs, int64_t tokens, vec *sums, const int rows) {
    vec weights[ROWS][INPUTS / LANES];
    for (int64_t i = 0; i < tokens * ROWS; i++) sums[i] = (vec){0};
    for (int64_t first = 0; first < inputs; first += INPUTS) {
        const int64_t n = least(INPUTS, inputs - first) / LANES;
        UNROLL for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < n; i += 2) {
                const int64_t at = r * inputs + first + i * LANES;
                expand(packed + at / 2, code, absmax[at / 64], &weights[r][i], &weights[r][i + 1]);
            }
        int64_t t = 0;
#define MULTIPLY(count)                                                                               \
    for (; t + count <= tokens; t += count) {                                                         \
        vec own[count][ROWS];                                                                         \
        UNROLL for (int j = 0; j < count; j++)                                                        \
            UNROLL for (int r = 0; r < rows; r++) own[j][r] = sums[(t + j) * ROWS + r];               \
        for (int64_t i = 0; i < n; i++)                                                               \
            UNROLL for (int j = 0; j < count; j++) {                                                  \
                const vec one = load(x + (t + j) * inputs + first + i * LANES);                       \
                UNROLL for (int r = 0; r < rows; r++) own[j][r] += one * weights[r][i];               \
            }                                                                                         \
        UNROLL for (int j = 0; j < count; j++)                                                        \
            UNROLL for (int r = 0; r < rows; r++) sums[(t + j) * ROWS + r] = own[j][r];               \
    }
        MULTIPLY(4)
        MULTIPLY(1)
    }
    for (int64_t t = 0; t < tokens; t++)
        UNROLL for (int r = 0; r < rows; r++) out[t * out_row + r] = total(sums[t * ROWS + r]);
}

/* out (tokens, outputs) = x @ W^T of a W in NF4, expanded as it is read. `room` holds (tokens, inputs) floats. */
void qhub_multiply(float *out, int64_t out_row, const float *x, int64_t x_row, const uint8_t *packed, const float *absmax,
                   const float *code, int64_t tokens, int64_t inputs, int64_t outputs, float *room) {
    const int64_t group = 2 * LANES; /* in the order in which `expand` gives the weights */
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t first = 0; first < inputs; first += group)
                for (int64_t lane = 0; lane < LANES; lane++) {
                    room[t * inputs + first + lane] = x[t * x_row + first + 2 * lane];
                    room[t * inputs + first + LANES + lane] = x[t * x_row + first + 2 * lane + 1];
                }
        vec sums[tokens * ROWS];
#pragma omp for schedule(static)
        for (int64_t o = 0; o < outputs; o += ROWS) {
            const uint8_t *own = packed + o * inputs / 2;
            if (o + ROWS <= outputs) rows_of(out + o, out_row, room, own, absmax + o * inputs / 64, code, inputs, tokens, sums, ROWS);
            else
                for (int64_t r = 0; r < outputs - o; r++)
                    rows_of(out + o + r, out_row, room, own + r * inputs / 2, absmax + (o + r) * inputs / 64, code, inputs,
                            tokens, sums, 1);
        }
    }
}
