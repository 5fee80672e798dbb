/* Attention over pages, of what is held in float32 or bfloat16: attention.h says what is asked for. */

#include "attention.h"

#include <omp.h>

#define MOST 32 /* queries of a task: their scores stay in the nearest caches */

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

/* Where a place of a row lies. */
INLINE const void *place_in(const cache_t *cache, const int32_t *pages, int64_t page, int64_t at, const int kind) {
    return held_at(cache->data, pages[at / page] * cache->page + at % page * cache->place, kind);
}

/* Scores of up to TOKENS queries of one key head at `n` places of a page; a query's lie SPAN from the next one's. */
INLINE void score(float *scores, const float *query, int64_t query_head, const void *k, int64_t place, int64_t n,
                  int64_t dim, float scale, const int count, const int kind) {
    const int64_t whole = dim / LANES * LANES;
    for (int64_t i = 0; i < n; i++, k = held_at(k, place, kind)) {
        vec parts[TOKENS];
        UNROLL for (int g = 0; g < count; g++) parts[g] = (vec){0};
        for (int64_t d = 0; d < whole; d += LANES) {
            const vec own = load_as(held_at(k, d, kind), kind);
            UNROLL for (int g = 0; g < count; g++) parts[g] += load(query + g * query_head + d) * own;
        }
        UNROLL for (int g = 0; g < count; g++) {
            float sum = total(parts[g]);
            for (int64_t d = whole; d < dim; d++) sum += query[g * query_head + d] * one_as(held_at(k, d, kind), kind);
            scores[g * SPAN + i] = sum * scale;
        }
    }
}

/* e to the n scores less their peak, in their place; what that adds up to. */
INLINE float soften(float *own, int64_t n, const kind_t *kind, float *peak) {
    float most = -INFINITY, sum = 0;
    vec many = {0};
    int64_t i = 0;
    cap(own, n, kind);
    for (int64_t j = 0; j < n; j++) most = own[j] > most ? own[j] : most;
    for (int64_t j = 0; j < n; j++) own[j] = exponential(own[j] - most);
    for (; i + LANES <= n; i += LANES) many += load(own + i);
    for (sum = total(many); i < n; i++) sum += own[i];
    *peak = most;
    return sum;
}

/* What one SPAN of a row gives to the queries of `count` key heads from `head` on: unnormalised results, peaks, sums.
   All that these heads have in a page is read before the next page: from one end to the other, memory is read fastest. */
INLINE void attend(const attention_t *now, int64_t row, int64_t head, int64_t count, int64_t span, const int kind) {
    const int64_t dim = now->dim, page = now->page, repeats = now->heads / now->kv_heads, queries = count * repeats;
    const int64_t length = now->lengths[row], first = first_seen(&now->kind, length);
    const int64_t begin = span * SPAN > first ? span * SPAN : first, end = least((span + 1) * SPAN, length);
    if (begin >= end) return;
    const int32_t *pages = now->tables + row * now->table_row;
    const float *query = now->query + row * now->query_row + head * repeats * now->query_head;
    float scores[queries * SPAN], results[queries * dim];
#define EACH_PAGE_AND_HEAD(cache, call)                                                               \
    for (int64_t at = begin, stop; at < end; at = stop) {                                             \
        stop = least((at / page + 1) * page, end);                                                    \
        for (int64_t h = 0; h < count; h++) {                                                         \
            const void *here = held_at(place_in(&cache, pages, page, at, kind), (head + h) * cache.head, kind); \
            for (int64_t g = 0; g < repeats; g += TOKENS) {                                           \
                const int64_t q = h * repeats + g, n = stop - at;                                     \
                float *own = scores + q * SPAN + at - begin;                                          \
                if (repeats - g >= 4) call(4);                                                        \
                else if (repeats - g == 3) call(3);                                                   \
                else if (repeats - g == 2) call(2);                                                   \
                else call(1);                                                                         \
            }                                                                                         \
        }                                                                                             \
    }
#define SCORE(some)                                                                                              \
    score(own, query + q * now->query_head, now->query_head, here, now->keys.place, n, dim, now->kind.scale, some, kind)
#define GATHER(some) few(results + q * dim, dim, own, SPAN, here, now->values.place, n, dim, some, kind)
    EACH_PAGE_AND_HEAD(now->keys, SCORE)
    float *parts = now->parts + ((row * now->heads + head * repeats) * now->spans + span) * (dim + 2);
    const int64_t step = now->spans * (dim + 2);
    for (int64_t q = 0; q < queries; q++)
        parts[q * step + dim + 1] = soften(scores + q * SPAN, end - begin, &now->kind, parts + q * step + dim);
    memset(results, 0, sizeof(results));
    EACH_PAGE_AND_HEAD(now->values, GATHER)
    for (int64_t q = 0; q < queries; q++) memcpy(parts + q * step, results + q * dim, dim * sizeof(float));
}

void attention(const attention_t *now) {
    const int64_t heads = now->heads, kv_heads = now->kv_heads, dim = now->dim, spans = now->spans, size = dim + 2;
    const kind_t *kind = &now->kind;
    /* as many heads as a task may have, if there are tasks enough without dividing them */
    const int64_t most = least(kv_heads, MOST * kv_heads / heads), many = most < 1 ? 1 : most;
    const int64_t tasks = now->rows * spans * ((kv_heads + many - 1) / many);
    const int64_t together = tasks < 4 * omp_get_num_threads() ? 1 : many;
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t row = 0; row < now->rows; row++)
        for (int64_t head = 0; head < kv_heads; head += together)
            for (int64_t span = 0; span < spans; span++) {
                const int64_t count = least(together, kv_heads - head);
                if (now->keys.kind == FP32) attend(now, row, head, count, span, FP32);
                else attend(now, row, head, count, span, BF16);
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
