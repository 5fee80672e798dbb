/* What all threads of a parallel region do together, dividing the work among them. */

#ifndef QHUB_REGION_H
#define QHUB_REGION_H

#include "attention.h"
#include "weights.h"

/* outs[l][token] += x[token] @ A_slot[:, l] @ B_slot of layer l, for the tokens of each tile (first, count, slot). Ends
   with a barrier. `inner` (parts, tokens of all tiles, layers * rank) is room for x @ A, in parts of `part` inputs. A and
   B are held in `kind`: float32 or bfloat16. */
void add_lora(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *x, int64_t x_row,
              int64_t inputs, const void *a, int64_t a_slot, const void *const *bs, const int64_t *b_slots,
              int64_t layers, int64_t rank, const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part,
              const int kind);

/* out (tokens, outputs) = x @ W^T + bias, x as `in_order` gives it. Ends without a barrier. */
void multiply(float *out, int64_t out_row, const void *x, const linear_t *linear, const table_t *table, int64_t inputs,
              int64_t tokens, int is_narrow);

#endif
