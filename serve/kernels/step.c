/* A whole step of a decoder in one call, for a few tokens: what a graph is on a GPU.

   Llama's kind of layer: norm, query, key and value, rotary embedding, attention over pages, output, norm, gate and up,
   SiLU, down; with biases and norms of queries and keys where the model has them. Every product is of the weights as
   they are held; adapters are added as by qhub_add_parts. serve/kernels/step.py says what is in these structures. */

#include "region.h"

#define PART 192 /* inputs of x @ A that one task sums up, as in cpu.py */

/* Layers that are given the same x (tokens, inputs). */
typedef struct {
    linear_t linears[3];
    int64_t count, inputs;
} group_t;

/* One layer. `norm_query` and `norm_key` (dim) may be NULL. */
typedef struct {
    group_t qkv, out, gate_up, down;
    const float *norm_in, *norm_mlp, *norm_query, *norm_key;
    kind_t attention;
} layer_t;

/* `kind`: FP32 or BF16, in which keys and values are held, and products made if the processor has them. */
typedef struct {
    const layer_t *layers;
    int64_t num_layers, hidden, heads, kv_heads, dim, mlp, rotary, page, kind;
    const float *code, *norm;
    linear_t head;
    float eps;
} model_t;

/* What is to be computed: tokens one a row, whatever sequence they belong to. `x` (tokens, hidden) are their embeddings,
   `cos` and `sin` (tokens, rotary); `places` (tokens, 2) the page and the place in it that each is written to; `wanted`
   (num_wanted) the tokens whose logits (num_wanted, vocabulary) are asked for; `tiles` (num_tiles, 2) the tokens with
   adapters, and of each tile `owns` (num_layers, 4) its adapter's parts; `room` what room_for() asks for. */
typedef struct {
    float *x;
    const float *cos, *sin;
    const int64_t *places, *wanted;
    void *const *keys, *const *values;
    const int32_t *tables, *lengths, *tiles;
    const part_t *const *owns;
    float *logits, *room;
    int64_t tokens, num_wanted, num_tiles, table_row, spans, page_step, head_step, place_step, widest;
} step_t;

/* out = weight * x / sqrt(mean(x^2) + eps), which may be x itself. */
INLINE void norm(float *out, const float *x, const float *weight, int64_t n, float eps) {
    vec sums = {0};
    float square = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums = multiply_add(load(x + i), load(x + i), sums);
    for (square = total(sums); i < n; i++) square += x[i] * x[i];
    const float by = 1 / sqrtf(square / n + eps);
    for (i = 0; i < n; i++) out[i] = weight[i] * (x[i] * by);
}

INLINE void rotate(float *x, const float *cos, const float *sin, int64_t n) {
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}

/* outs[l] = x W_l^T + bias, and what the adapters add; `ordered` is x as 4 bits want it. Ends with a barrier. */
static void products(float *const *outs, const float *x, const void *ordered, const group_t *group, const table_t *table,
                     const step_t *step, int64_t number, float *inner, int64_t kind) {
    int64_t sizes[3];
    const float *biases[3];
    for (int64_t l = 0; l < group->count; l++) {
        const linear_t *linear = &group->linears[l];
        sizes[l] = linear->outputs;
        biases[l] = linear->bias;
        const int is_four_bit = linear->kind == FOUR_BIT;
        multiply(outs[l], linear->outputs, is_four_bit ? ordered : x, linear, table, group->inputs, step->tokens,
                 is_four_bit && narrow(linear, kind == BF16));
    }
    if (step->num_tiles)
        add_parts(outs, sizes, sizes, biases, x, group->inputs, group->inputs, group->count, step->owns, number, step->tiles,
                  step->num_tiles, inner, PART);
#pragma omp barrier
}

/* The layers, called by all threads: x (tokens, hidden) after the last of them is x + branch. */
static void layers(const model_t *model, const step_t *step, const table_t *table) {
    const int64_t tokens = step->tokens, hidden = model->hidden, mlp = model->mlp, dim = model->dim;
    const int64_t heads = model->heads, kv_heads = model->kv_heads, queries = heads * dim, keys = kv_heads * dim;
    const int is_narrow = HAS_NARROW && model->kind == BF16, held = is_narrow ? BF16 : FP32, kind = (int)model->kind;
    float *x = step->x, *plain = step->room;
    void *ordered = plain + tokens * step->widest;
    float *q = plain + 2 * tokens * step->widest, *k = q + tokens * queries, *v = k + tokens * keys;
    float *branch = v + tokens * keys, *gate = branch + tokens * hidden, *up = gate + tokens * mlp;
    float *parts = up + tokens * mlp, *inner = parts + tokens * heads * step->spans * (dim + 2);
    attention_t now = {.out = plain, .query = q, .query_row = queries, .query_head = dim, .tables = step->tables,
                       .table_row = step->table_row, .lengths = step->lengths, .rows = tokens, .heads = heads,
                       .kv_heads = kv_heads, .dim = dim, .page = model->page, .spans = step->spans,
                       .parts = parts};
    for (int64_t number = 0; number < model->num_layers; number++) {
        const layer_t *layer = &model->layers[number];
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            float *own = x + t * hidden, *more = branch + t * hidden;
            if (number)
                for (int64_t i = 0; i < hidden; i++) own[i] += more[i];
            norm(plain + t * hidden, own, layer->norm_in, hidden, model->eps);
            in_order(held_at(ordered, t * hidden, held), plain + t * hidden, hidden, 1, is_narrow);
        }
        products((float *[]){q, k, v}, plain, ordered, &layer->qkv, table, step, 4 * number, inner, kind);
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < heads + kv_heads; h++) {
                const int is_query = h < heads;
                float *own = is_query ? q + t * queries + h * dim : k + t * keys + (h - heads) * dim;
                const float *weight = is_query ? layer->norm_query : layer->norm_key;
                if (weight) norm(own, own, weight, dim, model->eps);
                rotate(own, step->cos + t * model->rotary, step->sin + t * model->rotary, model->rotary);
                if (is_query) continue;
                const int64_t at = step->places[2 * t] * step->page_step + (h - heads) * step->head_step +
                                   step->places[2 * t + 1] * step->place_step;
                write_as(held_at(step->keys[number], at, kind), own, dim, kind);
                write_as(held_at(step->values[number], at, kind), v + t * keys + (h - heads) * dim, dim, kind);
            }
        now.keys = (cache_t){step->keys[number], step->page_step, step->head_step, step->place_step, kind};
        now.values = (cache_t){step->values[number], step->page_step, step->head_step, step->place_step, kind};
        now.kind = layer->attention;
        attention(&now);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) 
            in_order(held_at(ordered, t * queries, held), plain + t * queries, queries, 1, is_narrow);
        products((float *[]){branch}, plain, ordered, &layer->out, table, step, 4 * number + 1, inner, kind);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            float *own = x + t * hidden, *more = branch + t * hidden;
            for (int64_t i = 0; i < hidden; i++) own[i] += more[i];
            norm(plain + t * hidden, own, layer->norm_mlp, hidden, model->eps);
            in_order(held_at(ordered, t * hidden, held), plain + t * hidden, hidden, 1, is_narrow);
        }
        products((float *[]){gate, up}, plain, ordered, &layer->gate_up, table, step, 4 * number + 2, inner, kind);
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t first = 0; first < mlp; first += BLOCK) {
                float *own = plain + t * mlp + first;
                const float *g = gate + t * mlp + first, *u = up + t * mlp + first;
                for (int64_t i = 0; i < BLOCK; i++) own[i] = g[i] / (1 + exponential(-g[i])) * u[i];
                in_order(held_at(ordered, t * mlp + first, held), own, BLOCK, 1, is_narrow);
            }
        products((float *[]){branch}, plain, ordered, &layer->down, table, step, 4 * number + 3, inner, kind);
    }
}

/* Logits of the tokens that are wanted; keys and values of all tokens are in their pages then. By `threads` threads,
   whose number changes no bit of them. */
void qhub_step(const model_t *model, const step_t *step, int64_t threads) {
    const table_t table = table_of(model->code);
    const int64_t hidden = model->hidden;
#pragma omp parallel num_threads(threads)
    {
        layers(model, step, &table);
        float *plain = step->room, *branch = plain + 2 * step->tokens * step->widest;
        void *ordered = plain + step->tokens * step->widest;
        const int is_narrow = narrow(&model->head, model->kind == BF16), held = is_narrow ? BF16 : FP32;
        branch += step->tokens * (model->heads + 2 * model->kv_heads) * model->dim;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < step->num_wanted; i++) {
            const int64_t t = step->wanted[i];
            float *own = plain + i * hidden;
            for (int64_t j = 0; j < hidden; j++) own[j] = step->x[t * hidden + j] + branch[t * hidden + j];
            norm(own, own, model->norm, hidden, model->eps);
            in_order(held_at(ordered, i * hidden, held), own, hidden, model->head.kind == FOUR_BIT, is_narrow);
        }
        multiply(step->logits, model->head.outputs, ordered, &model->head, &table, hidden, step->num_wanted, is_narrow);
    }
}
