/* Adapters, attention over pages and products of 4-bit weights: what serve/kernels/reference.py computes, whose words are used here.

   Compiled by serve/kernels/compiled.py for the processor it runs on. Functions without `qhub_` are called by all
   threads of a parallel region and divide the work among them. */

#include "region.h"

#define MANY 128 /* tokens for which a weight is expanded once: more do not stay in the cache */

void add_lora(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *x, int64_t x_row,
              int64_t inputs, const void *a, int64_t a_slot, const void *const *bs, const int64_t *b_slots,
              int64_t layers, int64_t rank, const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part,
              const int kind) {
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
                        held_at(a, tiles[3 * i + 2] * a_slot + first * width, kind), width, least(part, inputs - first), width,
                        count, kind);
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
                        held_at(bs[l], tiles[3 * i + 2] * b_slots[l] + c, kind), sizes[l], rank,
                        least(columns, sizes[l] - c), count, kind);
            }
}

void qhub_add_lora(float *const *outs, const int64_t *out_rows, const int64_t *sizes, const float *x, int64_t x_row,
                   int64_t inputs, const void *a, int64_t a_slot, const void *const *bs, const int64_t *b_slots,
                   int64_t layers, int64_t rank, const int32_t *tiles, int64_t num_tiles, float *inner, int64_t part) {
#pragma omp parallel
    add_lora(outs, out_rows, sizes, x, x_row, inputs, a, a_slot, bs, b_slots, layers, rank, tiles, num_tiles, inner, part,
             FP32);
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
