/* Timing this machine: one entry of sfa_costs after the other, each by running its kernel over random rows in the order in which attention
 * would. A machine is rarely quiet, so the whole table is read many times, each round short. Other work can only add to a reading: every
 * entry becomes the reading a third of the way up from the shortest. */
#include "attn/attn_cost.h"
#include "attn/attn_tile.h"
#include "base/half.h"
#include "base/rng.h"
#include "code/code.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum {
  N_TILES = 16, /* of keys: values of 256 fill a second-level cache, as they do in a long sequence */
  N_KEYS = N_TILES * SFA_KEY_TILE,
  N_STRIPS = SFA_MAX_STRIPS,
  W = 64,
  MOST_DIM = 256,
  MOST_KEPT = 32,
  N_ROUNDS = 21,
  STREAM_BYTES = 64 << 20 /* beyond the caches of most machines */
};
static const int64_t probe_ns = 150000, all_ns = 1400000000; /* one reading at least, all of them at most */
static const int32_t dims[SFA_COST_DIMS] = {64, 128, 256}, kept[SFA_COST_KEPT] = {8, 16, 32};

typedef struct measurement {
  const sfa_kernels *kernels;
  float *rows, *values;  /* [N_KEYS][MOST_DIM] random */
  uint16_t *rows_bf16;   /* the rows in bf16 */
  float *code_values;    /* [N_KEYS][MOST_KEPT] */
  uint8_t *ids;          /* the same, ascending */
  unsigned char *stored; /* rows in a narrow type */
  uint16_t *scales;      /* [N_KEYS] */
  float *q_tile;         /* [N_STRIPS][MOST_DIM][W] */
  float *scores, *alpha; /* [64][W], [W] */
  float *m, *l, *o;      /* [N_STRIPS][W], the same, [N_STRIPS][W][MOST_DIM] */
  float *dense;          /* [64][MOST_DIM] */
  void *table;           /* of SFA_KEYS_ROWS query rows */
  const float *row_pointers[W];
  uint64_t *stream;
  int64_t clock_ns; /* that reading the clock takes */
  uint64_t sink;    /* so that reading memory is not left out */
} measurement;

static sfa_dtype const types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8, SFA_I4, SFA_E4M3};
enum { N_TYPES = sizeof types / sizeof *types };

/* ---- Data -------------------------------------------------------------------------------------------------------------------- */

/* Lays the arrays over memory; NULL counts only. */
static size_t place(measurement *x, unsigned char *memory) {
  size_t used = 0;
  const struct {
    void **array;
    size_t bytes;
  } arrays[] = {
      {(void **)&x->rows, sizeof(float) * N_KEYS * MOST_DIM},
      {(void **)&x->values, sizeof(float) * N_KEYS * MOST_DIM},
      {(void **)&x->rows_bf16, sizeof(uint16_t) * N_KEYS * MOST_DIM},
      {(void **)&x->code_values, sizeof(float) * N_KEYS * MOST_KEPT},
      {(void **)&x->ids, N_KEYS * MOST_KEPT},
      {(void **)&x->stored, sizeof(float) * N_KEYS * MOST_DIM},
      {(void **)&x->scales, sizeof(uint16_t) * N_KEYS},
      {(void **)&x->q_tile, sizeof(float) * N_STRIPS * MOST_DIM * W},
      {(void **)&x->scores, sizeof(float) * SFA_KEY_TILE * W},
      {(void **)&x->m, sizeof(float) * N_STRIPS * W},
      {(void **)&x->l, sizeof(float) * N_STRIPS * W},
      {(void **)&x->alpha, sizeof(float) * W},
      {(void **)&x->o, sizeof(float) * N_STRIPS * W * MOST_DIM},
      {(void **)&x->dense, sizeof(float) * SFA_KEY_TILE * MOST_DIM},
      {&x->table, SFA_KEYS_ROWS * sfa_query_table_bytes(MOST_DIM)},
      {(void **)&x->stream, STREAM_BYTES},
  };
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
    if (memory)
      *arrays[i].array = memory + used;
    used += sfa_align64(arrays[i].bytes);
  }
  return used;
}

static void fill(measurement *x) {
  sfa_rng rng = {7};
  for (int64_t i = 0; i < (int64_t)N_KEYS * MOST_DIM; i++) {
    x->rows[i] = (float)sfa_rng_normal(&rng);
    x->values[i] = (float)sfa_rng_normal(&rng);
    x->rows_bf16[i] = sfa_bf16_from_f32(x->rows[i]);
  }
  memset(x->stream, 1, STREAM_BYTES);
  x->clock_ns = INT64_MAX;
  for (int i = 0; i < 100; i++) {
    int64_t start = sfa_now_ns();
    x->clock_ns = sfa_min64(x->clock_ns, sfa_now_ns() - start);
  }
}

/* Codes of the rows taken as [N_KEYS][D], and the first of them as queries. */
static void set_shape(measurement *x, int32_t D, int32_t K) {
  const sfa_kernels *kernels = x->kernels;
  if (K)
    kernels->topk(N_KEYS, x->rows, D, D, K, x->ids, x->code_values);
  for (int32_t i = 0; i < W; i++)
    x->row_pointers[i] = x->values + (int64_t)i * D;
  for (int32_t strip = 0; strip < N_STRIPS; strip++)
    kernels->query_tile(W, x->row_pointers, D, W, 1 / sqrtf((float)D), x->q_tile + (int64_t)strip * D * W);
  for (int32_t i = 0; i < N_STRIPS * W; i++) {
    x->m[i] = -INFINITY;
    x->l[i] = 0;
  }
  memset(x->o, 0, sizeof(float) * N_STRIPS * W * MOST_DIM);
}

/* ---- Readings ------------------------------------------------------------------------------------------------------------------ */

/* What a step works on. */
typedef struct probe {
  int32_t dim, k, n_rows; /* D or E; K; rows of queries */
  sfa_dtype dtype;
} probe;

/* Nanoseconds of one step. */
static double time_of(measurement *x, void (*step)(measurement *x, const probe *p), const probe *p) {
  int64_t start = sfa_now_ns(), passed, count = 0;
  do {
    step(x, p);
    count++;
  } while ((passed = sfa_now_ns() - start) < probe_ns);
  return (double)passed / (double)count;
}

static void step_topk_bf16(measurement *x, const probe *p) {
  x->kernels->topk_bf16(64, x->rows_bf16, p->dim, p->dim, p->k, x->ids, x->code_values);
}
static void step_topk(measurement *x, const probe *p) { x->kernels->topk(64, x->rows, p->dim, p->dim, p->k, x->ids, x->code_values); }

static void step_pack(measurement *x, const probe *p) {
  const sfa_kernels *kernels = x->kernels;
  switch (p->dtype) {
  case SFA_I8: kernels->quantize_i8(64, p->dim, x->rows, p->dim, (int8_t *)x->stored, p->dim, x->scales); break;
  case SFA_I4: kernels->quantize_i4(64, p->dim, x->rows, p->dim, x->stored, p->dim, x->scales); break;
  case SFA_E4M3: kernels->quantize_e4m3(64, p->dim, x->rows, p->dim, x->stored, p->dim, x->scales); break;
  default: kernels->store_rows(64, p->dim, x->rows, p->dim, p->dtype, x->stored, p->dim); break;
  }
}

static void step_load(measurement *x, const probe *p) {
  bool scaled = sfa_has_scales(p->dtype);
  x->kernels->load_rows(64, p->dim, p->dtype, x->stored, p->dim, scaled ? x->scales : NULL, x->dense, p->dim);
}

static void step_query_tile(measurement *x, const probe *p) { x->kernels->query_tile(W, x->row_pointers, p->dim, W, 1, x->q_tile); }

static void step_densify(measurement *x, const probe *p) {
  sfa_code_write_out(SFA_KEY_TILE, p->dim, p->k, x->ids, x->code_values, x->dense);
}

static void step_query_table(measurement *x, const probe *p) {
  x->kernels->query_table(p->n_rows, p->dim, x->rows, p->dim, NULL, x->table);
}

/* All keys' codes, or dense rows, against a few queries, as they are stored. */
static void step_score_keys(measurement *x, const probe *p) {
  int32_t width = p->k ? p->k : p->dim;
  for (int32_t first = 0; first < N_KEYS; first += SFA_KEY_TILE) {
    const unsigned char *values = x->stored + (size_t)first * (size_t)width * sfa_dtype_bytes(p->dtype);
    sfa_stored_rows keys = {.n = SFA_KEY_TILE,
                            .width = width,
                            .dtype = p->dtype,
                            .ids = p->k ? x->ids + (size_t)first * (size_t)width : NULL,
                            .values = values,
                            .ids_stride = width,
                            .values_stride = width,
                            .scales = p->dtype == SFA_I8 ? x->scales + first : NULL,
                            .scales_stride = 1};
    x->kernels->score_keys(&keys, p->n_rows, p->dim, x->table, 1, x->scores);
  }
}

static void step_value_keys(measurement *x, const probe *p) {
  for (int32_t first = 0; first < N_KEYS; first += SFA_KEY_TILE) {
    size_t bytes = sfa_stored_bytes(p->dtype, p->dim);
    sfa_stored_rows values = {.n = SFA_KEY_TILE,
                              .width = p->dim,
                              .dtype = p->dtype,
                              .values = x->stored + (size_t)first * bytes,
                              .values_stride = p->dim,
                              .scales = sfa_has_scales(p->dtype) ? x->scales + first : NULL,
                              .scales_stride = 1};
    x->kernels->value_keys(&values, p->n_rows, x->scores, p->dim, x->o);
  }
}

static void step_softmax_keys(measurement *x, const probe *p) {
  x->kernels->softmax_keys(p->n_rows, SFA_KEY_TILE, x->scores, x->m, x->l, x->alpha);
}

static void step_stream(measurement *x, const probe *p) {
  (void)p;
  uint64_t sum[8] = {0};
  for (size_t i = 0; i < STREAM_BYTES / sizeof *x->stream; i += 8)
    for (size_t lane = 0; lane < 8; lane++)
      sum[lane] += x->stream[i + lane];
  for (size_t lane = 0; lane < 8; lane++)
    x->sink += sum[lane];
}

/* The tile loop: all keys tile by tile, for each the blocks of an item. Nanoseconds of a pair (lane, key) in scores, softmax, values. */
static void time_tiles(measurement *x, int32_t D, int32_t K, double part[3]) {
  const sfa_kernels *kernels = x->kernels;
  int64_t passed[3] = {0}, pairs = 0, last = sfa_now_ns();
  int32_t tile = 0;
  do {
    for (int32_t strip = 0; strip < N_STRIPS; strip++) {
      const float *q_tile = x->q_tile + (int64_t)strip * D * W;
      float *m = x->m + strip * W, *l = x->l + strip * W, *o = x->o + (int64_t)strip * W * MOST_DIM;
      int64_t first = (int64_t)tile * SFA_KEY_TILE, now;
      if (K)
        kernels->score_codes(SFA_KEY_TILE, K, x->ids + first * K, 1, x->code_values + first * K, NULL, q_tile, W, x->scores);
      else
        kernels->score_dense(SFA_KEY_TILE, D, x->rows + first * D, D, NULL, q_tile, W, x->scores);
      now = sfa_now_ns();
      passed[0] += now - last - x->clock_ns;
      last = now;
      if (kernels->softmax_tile(SFA_KEY_TILE, W, x->scores, m, l, x->alpha))
        kernels->rescale(W, D, x->alpha, o);
      now = sfa_now_ns();
      passed[1] += now - last - x->clock_ns;
      last = now;
      kernels->value_product(W, SFA_KEY_TILE, W, x->scores, D, x->values + first * D, D, o);
      now = sfa_now_ns();
      passed[2] += now - last - x->clock_ns;
      last = now;
      pairs += SFA_KEY_TILE * W;
    }
    tile = (tile + 1) % N_TILES;
  } while (passed[0] + passed[1] + passed[2] < 2 * probe_ns);
  for (int i = 0; i < 3; i++)
    part[i] = (double)passed[i] / (double)pairs;
}

/* ---- One reading of the table ---------------------------------------------------------------------------------------------------- */

static void read_tiles(measurement *x, sfa_costs *c) {
  double exp_sum = 0;
  for (int d = 0; d < SFA_COST_DIMS; d++) {
    int32_t D = dims[d], fewest = kept[0], most = kept[SFA_COST_KEPT - 1];
    double dense[3], few[3], many[3];
    for (int i = 0; i < SFA_COST_KEPT; i++) {
      c->topk[d][i] = time_of(x, step_topk, &(probe){.dim = D, .k = kept[i]}) / 64;
      c->topk_bf16[d][i] = time_of(x, step_topk_bf16, &(probe){.dim = D, .k = kept[i]}) / 64;
    }
    set_shape(x, D, fewest);
    time_tiles(x, D, fewest, few);
    set_shape(x, D, most);
    time_tiles(x, D, most, many);
    time_tiles(x, D, 0, dense);
    c->code_step[d] = (many[0] - few[0]) / (most - fewest);
    c->dense_step[d] = dense[0] / D;
    c->value_step[d] = (dense[2] + few[2] + many[2]) / (3 * D);
    c->code_pair[d] = few[0] - fewest * c->code_step[d];
    exp_sum += (dense[1] + few[1] + many[1]) / 3;
  }
  c->exp_pair = exp_sum / SFA_COST_DIMS;
}

static void read_rows(measurement *x, sfa_costs *c) {
  probe p = {.dim = 128, .k = kept[0], .n_rows = 1};
  set_shape(x, p.dim, p.k);
  c->query_value = time_of(x, step_query_tile, &p) / (W * p.dim);
  c->keys_table = time_of(x, step_query_table, &p) / p.dim;
  double few = time_of(x, step_densify, &p) / SFA_KEY_TILE;
  p.k = kept[SFA_COST_KEPT - 1];
  set_shape(x, p.dim, p.k);
  double many = time_of(x, step_densify, &p) / SFA_KEY_TILE;
  c->densify_value = (many - few) / (kept[SFA_COST_KEPT - 1] - kept[0]);
  c->densify_key = (few - kept[0] * c->densify_value) / p.dim;
  for (int i = 0; i < N_TYPES; i++) {
    p.dtype = types[i];
    c->pack_value[p.dtype] = time_of(x, step_pack, &p) / (64 * p.dim);
    c->load_value[p.dtype] = time_of(x, step_load, &p) / (64 * p.dim);
  }
}

/* Entries for one query row and for each further one, from the times of one and of four, of `units` a step. */
static void by_rows(measurement *x, void (*step)(measurement *x, const probe *p), probe p, double units, double cost[SFA_COST_ROWS]) {
  p.n_rows = 1;
  double one = time_of(x, step, &p) / units;
  p.n_rows = 4;
  cost[0] = one;
  cost[1] = (time_of(x, step, &p) / units - one) / 3;
}

/* Keys and values stored as `p.dtype`, all of them. */
static void store(measurement *x, const float *rows, int32_t width, sfa_dtype dtype) {
  const sfa_kernels *kernels = x->kernels;
  switch (dtype) {
  case SFA_I8: kernels->quantize_i8(N_KEYS, width, rows, width, (int8_t *)x->stored, width, x->scales); break;
  case SFA_I4: kernels->quantize_i4(N_KEYS, width, rows, width, x->stored, width, x->scales); break;
  case SFA_E4M3: kernels->quantize_e4m3(N_KEYS, width, rows, width, x->stored, width, x->scales); break;
  default: kernels->store_rows(N_KEYS, width, rows, width, dtype, x->stored, width); break;
  }
}

static void read_keys(measurement *x, sfa_costs *c) {
  const sfa_kernels *kernels = x->kernels;
  float steps[4];
  probe p = {.dim = 128, .k = 16, .n_rows = 4};
  set_shape(x, p.dim, p.k);
  for (int i = 0; i < N_TYPES; i++) {
    p.dtype = types[i];
    bool whole = p.dtype == SFA_I8;
    if (p.dtype <= SFA_I8) { /* the others are of values only */
      float *q = x->dense;
      memcpy(q, x->values, 4 * (size_t)p.dim * sizeof *q);
      if (whole)
        kernels->round_rows(4, p.dim, p.k, q, p.dim, steps);
      kernels->query_table(4, p.dim, q, p.dim, whole ? steps : NULL, x->table);
      store(x, x->code_values, p.k, p.dtype);
      by_rows(x, step_score_keys, p, (double)N_KEYS * p.k, c->keys_code[p.dtype]);
      store(x, x->rows, p.dim, p.dtype);
      by_rows(x, step_score_keys, (probe){.dim = p.dim, .dtype = p.dtype}, (double)N_KEYS * p.dim, c->keys_dense[p.dtype]);
    }
    store(x, x->values, p.dim, p.dtype);
    for (int j = 0; j < 4 * SFA_KEY_TILE; j++)
      x->scores[j] = 1.0f / SFA_KEY_TILE;
    by_rows(x, step_value_keys, p, (double)N_KEYS * p.dim, c->keys_value[p.dtype]);
  }
  for (int dtype = SFA_I4; dtype < SFA_COST_TYPES; dtype++) {
    memcpy(c->keys_code[dtype], c->keys_code[SFA_I8], sizeof c->keys_code[0]);
    memcpy(c->keys_dense[dtype], c->keys_dense[SFA_I8], sizeof c->keys_dense[0]);
  }
  p.n_rows = 4;
  c->keys_exp_pair = time_of(x, step_softmax_keys, &p) / (4 * SFA_KEY_TILE);
}

/* ---- Of all readings ---------------------------------------------------------------------------------------------------------------- */

enum { FIRST_ENTRY = offsetof(sfa_costs, call), N_ENTRIES = (sizeof(sfa_costs) - FIRST_ENTRY) / sizeof(double) };

static double entry_of(const sfa_costs *c, int i) {
  double entry;
  memcpy(&entry, (const unsigned char *)c + FIRST_ENTRY + (size_t)i * sizeof entry, sizeof entry);
  return entry;
}

/* The value a third of the way up; sorts. */
static double low_third(double *values, int n) {
  for (int i = 1; i < n; i++)
    for (int j = i; j > 0 && values[j - 1] > values[j]; j--) {
      double swap = values[j];
      values[j] = values[j - 1];
      values[j - 1] = swap;
    }
  return values[(n - 1) / 3];
}

/* Entry by entry. A difference of two times may come out as nothing: then as little as a clock can tell. */
static void combine(const sfa_costs *readings, int n, sfa_costs *costs) {
  for (int i = 0; i < N_ENTRIES; i++) {
    double values[N_ROUNDS];
    for (int round = 0; round < n; round++)
      values[round] = entry_of(&readings[round], i);
    double entry = low_third(values, n);
    if (entry_of(costs, i) > 0)
      entry = fmax(entry, 1e-5);
    memcpy((unsigned char *)costs + FIRST_ENTRY + (size_t)i * sizeof entry, &entry, sizeof entry);
  }
}

sfa_status sfa_attn_costs_measure(sfa_context *ctx, sfa_costs *costs) {
  measurement x = {.kernels = sfa_kernel_select(ctx->isa)};
  sfa_costs readings[N_ROUNDS], table = *sfa_attn_costs_of(ctx->isa);
  if (!x.kernels)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "this build has no kernels for %s", sfa_isa_name(ctx->isa));
  void *memory;
  SFA_TRY(sfa_alloc(ctx, place(&x, NULL), "timing the kernels", &memory));
  sfa_attn_half_probe *half = NULL;
  sfa_status status = table.half_code_step[0] > 0 ? sfa_attn_half_probe_create(ctx, &half) : SFA_OK;
  if (status != SFA_OK) {
    sfa_free(ctx, memory);
    return status;
  }
  int64_t start = sfa_now_ns();
  place(&x, memory);
  fill(&x);
  int n = 0;
  for (; n < N_ROUNDS && (n < 3 || sfa_now_ns() - start < all_ns); n++) {
    readings[n] = table; /* what is not timed */
    read_tiles(&x, &readings[n]);
    read_rows(&x, &readings[n]);
    read_keys(&x, &readings[n]);
    if (half)
      sfa_attn_half_probe_read(half, &readings[n]);
    readings[n].read_byte = time_of(&x, step_stream, NULL) / STREAM_BYTES;
  }
  combine(readings, n, &table);
  sfa_free(ctx, half);
  sfa_free(ctx, memory);
  *costs = table;
  return SFA_OK;
}
