/* What all threads of a parallel region do together, dividing the work among them. */

#ifndef QHUB_REGION_H
#define QHUB_REGION_H

#include "attention.h"
#include "weights.h"

/* What one adapter adds to up to three layers that are given one x; `width` 0 if nothing. A (inputs, width) of the layers
   that it changes lies side by side, that of layer l from `columns[l]` on; B_l (rank, outputs) is NULL for one that it
   leaves alone; `scales[l]` (outputs) by how much more than once W x counts, or NULL. `kind_a` and `kinds_b` are how A and
   B are held. serve/kernels/part.py is the same. */
typedef struct {
    const void *a, *b[3];
    const float *scales[3];
    int64_t columns[3], kinds_b[3], kind_a, width, rank;
} part_t;

/* outs[l][token] += scales_l (outs[l][token] - bias_l) + x[token] @ A_l @ B_l, for the tokens of each tile (first, count),
   whose adapter's part is `owns[tile][number]`. Ends with a barrier if any of them has one. `biases` and what is in it
   may be NULL. `inner` is room for x @ A, in parts of `part` inputs: (parts, tokens of all tiles, width of the widest). */
void add_parts(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *const *biases, const float *x,
               int64_t x_row, int64_t inputs, int64_t layers, const part_t *const *owns, int64_t number,
               const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part);

/* out (tokens, outputs) = x @ W^T + bias, x as `in_order` gives it. Ends without a barrier. */
void multiply(float *out, int64_t out_row, const void *x, const linear_t *linear, const table_t *table, int64_t inputs,
              int64_t tokens, int is_narrow);

#endif
