/* Adapters, attention over pages and products of NF4: what serve/kernels/reference.py computes, whose words are used here.

   Compiled by serve/kernels/compiled.py for the processor it runs on. Functions without `qhub_` are called by all
   threads of a parallel region and divide the work among them. */

#include "region.h"

#define MANY 128 /* tokens for which a weight is expanded once: more do not stay in the cache */

void add_lora(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *x, int64_t x_row,
              int64_t inputs, const float *a, int64_t a_slot, const float *const *bs, const int64_t *b_slots,
              int64_t layers, int64_t rank, const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part) {
    const int64_t width = layers * rank, parts = (inputs + part - 1) / part, columns = 256;
    int64_t begins[num_tiles + 1], widest = 0;
    begins[0] = 0;
    for (int64_t i = 0; i < num_tiles; i++) begins[i + 1] = begins[i] + (tiles[3 * i + 2] < 0 ? 0 : tiles[3 * i + 1]);
    for (int64_t l = 0; l < layers; l++) widest = sizes[l] > widest ? sizes[l] : widest;
    const int64_t tokens = begins[num_tiles], pieces = (widest + columns - 1) / columns;
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

void qhub_add_lora(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *x, int64_t x_row,
                   int64_t inputs, const float *a, int64_t a_slot, const float *const *bs, const int64_t *b_slots,
                   int64_t layers, int64_t rank, const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part) {
#pragma omp parallel
    add_lora(outs, out_rows, sizes, x, x_row, inputs, a, a_slot, bs, b_slots, layers, rank, tiles, num_tiles, inner, part);
}

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
        vec many = {0};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) many += load(own + i);
        for (sum = total(many); i < n; i++) sum += own[i];
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

void attention(const attention_t *now) {
    const int64_t heads = now->heads, kv_heads = now->kv_heads, dim = now->dim, page = now->page, spans = now->spans;
    const int64_t repeats = heads / kv_heads, size = dim + 2, window = now->window;
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t row = 0; row < now->rows; row++)
        for (int64_t head = 0; head < kv_heads; head++)
            for (int64_t span = 0; span < spans; span++) {
                const int64_t length = now->lengths[row], first = window && length > window ? length - window : 0;
                const int64_t begin = span * SPAN > first ? span * SPAN : first, end = least((span + 1) * SPAN, length);
                cache_t k = now->keys, v = now->values;
                k.data += head * k.head;
                v.data += head * v.head;
                const int32_t *table = now->tables + row * now->table_row;
                float results[TOKENS * dim], peaks[TOKENS], sums[TOKENS];
                for (int64_t g = 0; begin < end && g < repeats; g += TOKENS) {
                    const int64_t count = least(TOKENS, repeats - g), own = head * repeats + g;
                    const float *q = now->query + row * now->query_row + own * now->query_head;
#define ATTEND(n) attend(results, peaks, sums, q, now->query_head, k, v, table, page, begin, end, dim, now->scale, now->softcap, n)
                    if (count == 4) ATTEND(4);
                    else if (count == 3) ATTEND(3);
                    else if (count == 2) ATTEND(2);
                    else ATTEND(1);
                    for (int64_t i = 0; i < count; i++) {
                        float *part = now->parts + ((row * heads + own + i) * spans + span) * size;
                        memcpy(part, results + i * dim, dim * sizeof(float));
                        part[dim] = peaks[i];
                        part[dim + 1] = sums[i];
                    }
                }
            }
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < now->rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            const int64_t length = now->lengths[row], first = window && length > window ? length - window : 0;
            float *own = now->out + (row * heads + head) * dim, peak = -INFINITY, sum = 0;
            const float *part = now->parts + (row * heads + head) * spans * size;
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

void qhub_paged_attention(const attention_t *now) {
#pragma omp parallel
    attention(now);
}

void multiply(float *out, int64_t out_row, const float *x, const linear_t *linear, const table_t *table, int64_t inputs,
              int64_t tokens) {
    const int64_t tasks = (linear->outputs + ROWS - 1) / ROWS;
    for (int64_t first = 0; first < tokens; first += MANY) {
        const int64_t count = least(MANY, tokens - first);
#pragma omp for schedule(dynamic, 8) nowait
        for (int64_t task = 0; task < tasks; task++)
            times(out + first * out_row + task * ROWS, out_row, x + first * inputs, linear, table, task * ROWS, inputs, count);
    }
}

/* The same of NF4 alone, and x (tokens, inputs) as it is; `room` holds as much. */
void qhub_multiply(float *out, int64_t out_row, const float *x, int64_t x_row, const uint8_t *packed, const float *absmax,
                   const float *code, int64_t tokens, int64_t inputs, int64_t outputs, float *room) {
    const linear_t linear = {packed, absmax, 0, NF4, outputs};
    const table_t table = table_of(code);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) in_order(room + t * inputs, x + t * x_row, inputs);
        multiply(out, out_row, room, &linear, &table, inputs, tokens);
    }
}
