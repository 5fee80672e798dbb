/* What all threads of a parallel region do together, dividing the work among them. */

#ifndef QHUB_REGION_H
#define QHUB_REGION_H

#include "weights.h"

/* Where keys and values lie: steps between pages, heads and places; within a place, one after the other. */
typedef struct { const float *data; int64_t page, head, place; } cache_t;

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
    int64_t rows, heads, kv_heads, dim, page, spans, window;
    float scale, softcap;
    float *parts;
} attention_t;

/* outs[l][token] += x[token] @ A_slot[:, l] @ B_slot of layer l, for the tokens of each tile (first, count, slot). Ends
   with a barrier. `inner` (parts, tokens of all tiles, layers * rank) is room for x @ A, in parts of `part` inputs. */
void add_lora(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *x, int64_t x_row,
              int64_t inputs, const float *a, int64_t a_slot, const float *const *bs, const int64_t *b_slots,
              int64_t layers, int64_t rank, const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part);

/* softmax(cap(scale * query @ keys^T)) @ values of one token a row. Ends with a barrier. */
void attention(const attention_t *now);

/* out (tokens, outputs) = x @ W^T + bias, x in the order of NF4 if W is. Ends without a barrier. */
void multiply(float *out, int64_t out_row, const float *x, const linear_t *linear, const table_t *table, int64_t inputs,
              int64_t tokens);

#endif
