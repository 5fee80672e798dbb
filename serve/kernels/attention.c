/* Attention over pages, of what is held in float32 or bfloat16: attention.h says what is asked for. */

#include "attention.h"

#define AHEAD 2 /* pages that are under way from memory */

/* The first of `length` places that the last of them sees. */
INLINE int64_t first_seen(const kind_t *kind, int64_t length) {
    return kind->window && length > kind->window ? length - kind->window : 0;
}

/* What softmax takes, of n products of a query and keys that are scaled already. */
INLINE void cap(float *scores, int64_t n, const kind_t *kind) {
    const float softcap = kind->softcap;
    if (softcap != 0) /* tanh(y) = 1 - 2 / (e^2y + 1) */
        for (int64_t i = 0; i < n; i++) scores[i] = softcap * (1 - 2 / (exponential(2 * scores[i] / softcap) + 1));
}

/* Have a place under way while others are read: pages lie anywhere, so the processor does not guess the next. */
INLINE void fetch(const void *at, int64_t dim, const int kind) {
    for (int64_t d = 0; d < dim; d += kind == FP32 ? 16 : 32) __builtin_prefetch(held_at(at, d, kind));
}

/* Where a place of a row lies. */
INLINE const void *place_in(const cache_t *cache, const int32_t *pages, int64_t page, int64_t at, const int kind) {
    return held_at(cache->data, pages[at / page] * cache->page + at % page * cache->place, kind);
}

/* Up to TOKENS queries of one key head over the places [begin, end) of a row: unnormalised results, peaks and sums. */
INLINE void attend(float *out, float *peaks, float *sums, const float *query, int64_t query_head, cache_t keys,
                   cache_t values, const int32_t *pages, int64_t page, int64_t begin, int64_t end, int64_t dim,
                   const kind_t *attends, const int count, const int kind) {
    float scores[TOKENS][SPAN];
    const float scale = attends->scale;
    const int64_t whole = dim / LANES * LANES, n = end - begin;
    for (int64_t at = begin; at < end;) {
        const int64_t stop = least((at / page + 1) * page, end);
        const void *k = place_in(&keys, pages, page, at, kind);
        const int64_t ahead = at + AHEAD * page, beyond = least(begin + ahead - end, end - 1); /* then come the values */
        const void *next = place_in(ahead < end ? &keys : &values, pages, page, ahead < end ? ahead : beyond, kind);
        for (; at < stop; at++, k = held_at(k, keys.place, kind), next = held_at(next, keys.place, kind)) {
            fetch(next, dim, kind);
            vec parts[TOKENS];
            UNROLL for (int g = 0; g < count; g++) parts[g] = (vec){0};
            for (int64_t d = 0; d < whole; d += LANES) {
                const vec own = load_as(held_at(k, d, kind), kind);
                UNROLL for (int g = 0; g < count; g++) parts[g] += load(query + g * query_head + d) * own;
            }
            UNROLL for (int g = 0; g < count; g++) {
                float score = total(parts[g]);
                for (int64_t d = whole; d < dim; d++) score += query[g * query_head + d] * one_as(held_at(k, d, kind), kind);
                scores[g][at - begin] = score * scale;
            }
        }
    }
    for (int g = 0; g < count; g++) {
        float *own = scores[g], peak = -INFINITY, sum = 0;
        cap(own, n, attends);
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
        const void *v = place_in(&values, pages, page, at, kind);
        const void *next = place_in(&values, pages, page, least(at + AHEAD * page, end - 1), kind);
        for (int64_t i = 0; i < stop - at; i++) fetch(held_at(next, i * values.place, kind), dim, kind);
        few(out, dim, &scores[0][at - begin], SPAN, v, values.place, stop - at, dim, count, kind);
        at = stop;
    }
}

void attention(const attention_t *now) {
    const int64_t heads = now->heads, kv_heads = now->kv_heads, dim = now->dim, page = now->page, spans = now->spans;
    const int64_t repeats = heads / kv_heads, size = dim + 2;
    const kind_t *kind = &now->kind;
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t row = 0; row < now->rows; row++)
        for (int64_t head = 0; head < kv_heads; head++)
            for (int64_t span = 0; span < spans; span++) {
                const int64_t length = now->lengths[row], first = first_seen(kind, length);
                const int64_t begin = span * SPAN > first ? span * SPAN : first, end = least((span + 1) * SPAN, length);
                cache_t k = now->keys, v = now->values;
                k.data = held_at(k.data, head * k.head, (int)k.kind);
                v.data = held_at(v.data, head * v.head, (int)v.kind);
                const int32_t *table = now->tables + row * now->table_row;
                float results[TOKENS * dim], peaks[TOKENS], sums[TOKENS];
                for (int64_t g = 0; begin < end && g < repeats; g += TOKENS) {
                    const int64_t count = least(TOKENS, repeats - g), own = head * repeats + g;
                    const float *q = now->query + row * now->query_row + own * now->query_head;
#define ATTEND(n)                                                                                                       \
    {                                                                                                                   \
        if (k.kind == FP32)                                                                                             \
            attend(results, peaks, sums, q, now->query_head, k, v, table, page, begin, end, dim, kind, n, FP32);        \
        else attend(results, peaks, sums, q, now->query_head, k, v, table, page, begin, end, dim, kind, n, BF16);       \
    }
                    if (count == 4) ATTEND(4)
                    else if (count == 3) ATTEND(3)
                    else if (count == 2) ATTEND(2)
                    else ATTEND(1)
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
            const int64_t length = now->lengths[row], first = first_seen(kind, length);
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
