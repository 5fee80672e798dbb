/* Attention over pages: what a layer asks for. The rest of C hands it on as it is. */

#ifndef QHUB_ATTENTION_H
#define QHUB_ATTENTION_H

#include "cpu.h"

/* `AttentionKind` of adapterhub_local/base/attention.py; a cap or a window of 0 is none. */
typedef struct {
    float scale, softcap;
    int64_t window;
} kind_t;

/* Where keys and values lie, in float32 or bfloat16: steps between pages, heads and places; within a place, one after
   the other. */
typedef struct { const void *data; int64_t page, head, place, kind; } cache_t;

/* Attention of one token a row. `query` and `out` (rows, heads, dim); `tables` and `lengths` as in the reference;
   `parts` (rows * heads * spans, dim + 2) is room for each head's share of each SPAN places of each row. */
typedef struct {
    float *out;
    const float *query;
    int64_t query_row, query_head;
    cache_t keys, values;
    const int32_t *tables;
    int64_t table_row;
    const int32_t *lengths;
    int64_t rows, heads, kv_heads, dim, page, spans;
    kind_t kind;
    float *parts;
} attention_t;

/* Attention of one token a row, the last of its places: by all threads of a parallel region. Ends with a barrier. */
void attention(const attention_t *now);

#endif
