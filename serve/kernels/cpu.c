/* Adapters, attention over pages and products of 4-bit weights: what serve/kernels/reference.py computes, whose words are used here.

   Compiled by serve/kernels/compiled.py for the processor it runs on. Functions without `qhub_` are called by all
   threads of a parallel region and divide the work among them. */

#include "region.h"

#define RANKS 128 /* of x @ A that are added up at a time */
#define MANY 128 /* tokens for which a weight is expanded once: more do not stay in the cache */

void add_parts(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *const *biases, const float *x,
               int64_t x_row, int64_t inputs, int64_t layers, const part_t *const *owns, int64_t number,
               const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part) {
    const int64_t parts = (inputs + part - 1) / part, columns = 256;
    int64_t begins[num_tiles + 1], widest = 0; /* where x @ A of each tile begins, in floats */
    begins[0] = 0;
    for (int64_t i = 0; i < num_tiles; i++) begins[i + 1] = begins[i] + tiles[2 * i + 1] * owns[i][number].width;
    for (int64_t l = 0; l < layers; l++) widest = sizes[l] > widest ? sizes[l] : widest;
    const int64_t room = begins[num_tiles], pieces = (widest + columns - 1) / columns;
    if (!room) return;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < num_tiles; i++)
        for (int64_t p = 0; p < parts; p++) {
            const part_t *own = &owns[i][number];
            const int64_t count = own->width ? tiles[2 * i + 1] : 0, first = p * part;
            float *sums = inner + p * room + begins[i];
            memset(sums, 0, count * own->width * sizeof(float));
            if (count)
                product(sums, own->width, x + tiles[2 * i] * x_row + first, x_row,
                        held_at(own->a, first * own->width, (int)own->kind_a), own->width, least(part, inputs - first),
                        own->width, count, own->kind_a);
        }
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t i = 0; i < num_tiles; i++)
        for (int64_t l = 0; l < layers; l++)
            for (int64_t piece = 0; piece < pieces; piece++) {
                const part_t *own = &owns[i][number];
                const int64_t count = own->width ? tiles[2 * i + 1] : 0, rank = own->rank, c = piece * columns;
                if (!own->b[l] || !count || c >= sizes[l]) continue;
                const int64_t some = least(columns, sizes[l] - c);
                float *out = outs[l] + tiles[2 * i] * out_rows[l] + c;
                if (own->scales[l])
                    for (int64_t t = 0; t < count; t++)
                        for (int64_t j = 0; j < some; j++) {
                            const float bias = biases && biases[l] ? biases[l][c + j] : 0;
                            out[t * out_rows[l] + j] += own->scales[l][c + j] * (out[t * out_rows[l] + j] - bias);
                        }
                for (int64_t r = 0; r < rank; r += RANKS) { /* whatever the rank, the stack holds this */
                    float sums[TILE * RANKS];
                    const int64_t n = least(RANKS, rank - r), column = own->columns[l] + r;
                    memset(sums, 0, count * n * sizeof(float));
                    for (int64_t p = 0; p < parts; p++)
                        for (int64_t t = 0; t < count; t++)
                            for (int64_t j = 0; j < n; j++)
                                sums[t * n + j] += inner[p * room + begins[i] + t * own->width + column + j];
                    product(out, out_rows[l], sums, n, held_at(own->b[l], r * sizes[l] + c, (int)own->kinds_b[l]), sizes[l],
                            n, some, count, own->kinds_b[l]);
                }
            }
}

void qhub_add_parts(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *x, int64_t x_row,
                    int64_t inputs, int64_t layers, const part_t *const *owns, const int32_t *tiles, int64_t num_tiles,
                    float *inner, int64_t part) {
#pragma omp parallel
    add_parts(outs, out_rows, sizes, 0, x, x_row, inputs, layers, owns, 0, tiles, num_tiles, inner, part);
}

void qhub_paged_attention(const attention_t *now) {
#pragma omp parallel
    attention(now);
}

void multiply(float *out, int64_t out_row, const void *x, const linear_t *linear, const table_t *table, int64_t inputs,
              int64_t tokens, int is_narrow) {
    const int64_t tasks = (linear->outputs + ROWS - 1) / ROWS;
    for (int64_t first = 0; first < tokens; first += MANY) {
        const int64_t count = least(MANY, tokens - first);
        /* large parts first: what a thread reads lies in a row, and what is left at the end is small */
#pragma omp for schedule(guided, 32 / ROWS) nowait
        for (int64_t task = 0; task < tasks; task++)
            times(out + first * out_row + task * ROWS, out_row, held_at(x, first * inputs, is_narrow ? BF16 : FP32), linear,
                  table, task * ROWS, inputs, count, is_narrow);
    }
}

/* The same of 4-bit weights alone, and x (tokens, inputs) as it is; `room` holds as much. */
void qhub_multiply(float *out, int64_t out_row, const float *x, int64_t x_row, const uint8_t *packed, const float *absmax,
                   const float *code, int64_t tokens, int64_t inputs, int64_t outputs, float *room) {
    const linear_t linear = {packed, absmax, 0, FOUR_BIT, outputs};
    const table_t table = table_of(code);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) in_order(room + t * inputs, x + t * x_row, inputs, 1, 0);
        multiply(out, out_row, room, &linear, &table, inputs, tokens, 0);
    }
}
