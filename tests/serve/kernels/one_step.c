/* Steps of small random models, their logits as text: the same whatever processor it is compiled for. */

#include "step.c"

#include <stdio.h>
#include <stdlib.h>

enum { HIDDEN = 128, HEADS = 6, KV_HEADS = 2, DIM = 64, MLP = 192, LAYERS = 2, VOCABULARY = 77, PAGE = 16, PAGES = 120 };

static uint32_t state;

/* Uniform in [-1, 1). */
static float any(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(int32_t)state / 2147483648.0f;
}

static void *room(int64_t bytes) { return aligned_alloc(64, (bytes + 4096) / 64 * 64); }

static float *numbers(int64_t n, float scale) {
    float *made = room(n * sizeof(float));
    for (int64_t i = 0; i < n; i++) made[i] = scale * any();
    return made;
}

/* The same numbers held in 16 bits, of which half precision is made from small multiples of 1/64. */
static void *held(int64_t n, float scale, int kind) {
    if (kind == FP32) return numbers(n, scale);
    uint16_t *made = room(n * 2);
    for (int64_t i = 0; i < n; i++)
        if (kind == BF16) made[i] = narrowed(scale * any());
        else {
            const int steps = (int)(any() * 15.99f), size = steps < 0 ? -steps : steps;
            int bits = 0;
            for (int shift = 0; shift < 4; shift++)
                if (size >> shift == 1) bits = (15 - 6 + shift) << 10 | ((size << (10 - shift)) & 0x3ff);
            made[i] = (uint16_t)(bits | (steps < 0 ? 0x8000 : 0));
        }
    return made;
}

static linear_t linear(int64_t outputs, int64_t inputs, int kind, int has_bias) {
    linear_t made = {.kind = kind, .outputs = outputs, .bias = has_bias ? numbers(outputs, 0.1f) : 0};
    if (kind == FOUR_BIT) {
        uint8_t *packed = room(outputs * inputs / 2);
        for (int64_t i = 0; i < outputs * inputs / 2; i++) packed[i] = (uint8_t)(128 + 127 * any());
        float *absmax = numbers(outputs * inputs / 64, 0.05f);
        for (int64_t i = 0; i < outputs * inputs / 64; i++) absmax[i] = 0.1f + absmax[i];
        made.weight = packed;
        made.absmax = absmax;
    } else made.weight = held(outputs * inputs, 0.1f, kind);
    return made;
}

static group_t group(int64_t inputs, int count, const int64_t *outputs, int kind, int has_bias) {
    group_t made = {.count = count, .inputs = inputs};
    for (int i = 0; i < count; i++) made.linears[i] = linear(outputs[i], inputs, kind, has_bias);
    return made;
}

int main(int count, char **given) {
    if (count != 8) return 2;
    /* kind of the numbers held, of the layers' weights and of the head; tokens; longest; rank; whether it has biases,
       norms of heads, a window and a cap */
    const int kind = atoi(given[1]), weights = atoi(given[2]), head = atoi(given[3]), tokens = atoi(given[4]);
    const int longest = atoi(given[5]), rank = atoi(given[6]), more = atoi(given[7]);
    state = 1;
    const int64_t qkv[] = {HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM}, hidden[] = {HIDDEN}, mlp[] = {MLP, MLP};
    layer_t layers[LAYERS];
    void *keys[LAYERS], *values[LAYERS];
    const int64_t cache = (int64_t)PAGES * KV_HEADS * PAGE * DIM;
    for (int l = 0; l < LAYERS; l++) {
        layers[l] = (layer_t){
            .qkv = group(HIDDEN, 3, qkv, weights, more), .out = group(HEADS * DIM, 1, hidden, weights, 0),
            .gate_up = group(HIDDEN, 2, mlp, weights, 0), .down = group(MLP, 1, hidden, weights, 0),
            .norm_in = numbers(HIDDEN, 1), .norm_mlp = numbers(HIDDEN, 1),
            .norm_query = more ? numbers(DIM, 1) : 0, .norm_key = more ? numbers(DIM, 1) : 0,
            .attention = {.scale = 0.125f, .softcap = more ? 20 : 0, .window = more ? 40 : 0}};
        keys[l] = held(cache, 1, kind);
        values[l] = held(cache, 1, kind);
    }
    float code[16];
    for (int i = 0; i < 16; i++) code[i] = (i - 7.5f) / 8;
    const model_t model = {.layers = layers, .num_layers = LAYERS, .hidden = HIDDEN, .heads = HEADS,
                           .kv_heads = KV_HEADS, .dim = DIM, .mlp = MLP, .rotary = DIM, .page = PAGE, .kind = kind,
                           .code = code, .norm = numbers(HIDDEN, 1), .head = linear(VOCABULARY, HIDDEN, head, 0),
                           .eps = 1e-5f};
    const int64_t row = (longest + PAGE - 1) / PAGE, spans = (row * PAGE + SPAN - 1) / SPAN, widest = HEADS * DIM;
    int32_t *tables = room(tokens * row * 4), *lengths = room(tokens * 4), *tiles = room(tokens * 8);
    int64_t num_tiles = 0;
    int64_t *places = room(tokens * 16), *wanted = room(tokens * 8);
    for (int t = 0; t < tokens; t++) {
        for (int i = 0; i < row; i++) tables[t * row + i] = (int32_t)((t * 7 + i * 5) % PAGES);
        lengths[t] = 1 + (t * 37) % longest;
        places[2 * t] = tables[t * row + (lengths[t] - 1) / PAGE];
        places[2 * t + 1] = (lengths[t] - 1) % PAGE;
        wanted[t] = t;
    }
    /* one adapter as the model is held; one in half precision beside numbers that also count W x, without the second layer */
    part_t adapters[2][LAYERS * 4];
    memset(adapters, 0, sizeof(adapters));
    for (int i = 0; i < 2 * LAYERS * 4; i++) {
        const int n = i % (LAYERS * 4), own = i / (LAYERS * 4), held_in = own ? FP16 : kind;
        const group_t *of = (group_t *[]){&layers[n / 4].qkv, &layers[n / 4].out, &layers[n / 4].gate_up,
                                          &layers[n / 4].down}[n % 4];
        part_t *part = &adapters[own][n];
        part->rank = rank + own, part->kind_a = held_in;
        for (int j = 0; j < of->count; j++) {
            if (own && j == 1) continue;
            part->columns[j] = part->width;
            part->width += part->rank;
            part->b[j] = held(part->rank * of->linears[j].outputs, 0.1f, own ? FP32 : kind);
            part->kinds_b[j] = own ? FP32 : kind;
            part->scales[j] = own ? numbers(of->linears[j].outputs, 0.1f) : 0;
        }
        part->a = held(of->inputs * part->width, 0.1f, held_in);
    }
    const part_t **owns = room(tokens * sizeof(*owns));
    for (int t = 0; t < tokens && rank; t++)
        if (t % 3) { /* the others have none */
            tiles[2 * num_tiles] = t, tiles[2 * num_tiles + 1] = 1;
            owns[num_tiles++] = adapters[t % 3 - 1];
        }
    const int64_t rows = 2 * widest + (HEADS + 2 * KV_HEADS) * DIM + HIDDEN + 2 * MLP;
    const int64_t size = rows + HEADS * spans * (DIM + 2) + (widest + PART - 1) / PART * 3 * (rank + 1);
    const step_t step = {
        .x = numbers(tokens * HIDDEN, 1), .cos = numbers(tokens * DIM, 1), .sin = numbers(tokens * DIM, 1),
        .places = places, .wanted = wanted, .keys = keys, .values = values, .tables = tables, .lengths = lengths,
        .tiles = tiles, .owns = owns, .logits = room(tokens * VOCABULARY * 4), .room = room(tokens * size * 4), .tokens = tokens,
        .num_wanted = tokens, .num_tiles = num_tiles, .table_row = row, .spans = spans,
        .page_step = KV_HEADS * PAGE * DIM, .head_step = PAGE * DIM, .place_step = DIM, .widest = widest};
    qhub_step(&model, &step, 2);
    for (int i = 0; i < tokens * VOCABULARY; i++) printf("%.9g\n", step.logits[i]);
    return 0;
}
