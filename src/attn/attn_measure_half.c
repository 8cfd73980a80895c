/* Timing the 16-bit kernels: one chunk of keys after the other against a block of queries, as attn_half.c has them meet. */
#include "attn/attn_cost.h"
#include "base/rng.h"
#include "kernel/kernel_half.h"

#include <math.h>
#include <string.h>

enum {
  N_CHUNKS = 4, /* of keys and values: with the queries they fill a second-level cache */
  MOST_DIM = 256,
  MOST_KEPT = 16,
  MOST_WIDTH = SFA_HALF_MAX_WIDTH
};
static const int64_t probe_ns = 150000;
static const int32_t dims[SFA_COST_DIMS] = {64, 128, 256};

struct sfa_attn_half_probe {
  const sfa_half_kernels *kernels;
  float *rows;       /* [CHUNK][MOST_DIM] random, also Qt [D][32] */
  uint8_t *ids;      /* [CHUNK][MOST_KEPT] ascending */
  uint32_t *values;  /* [N_CHUNKS][CHUNK][MOST_KEPT] packed codes */
  uint16_t *offsets; /* the same */
  uint16_t *keys;    /* [N_CHUNKS][CHUNK][MOST_DIM] packed rows */
  uint16_t *v;       /* the same, transposed */
  uint16_t *query;   /* [MOST_DIM][MOST_WIDTH] */
  uint16_t *weights; /* P of a block */
  float *o, *l;      /* [MOST_DIM][MOST_WIDTH], [MOST_WIDTH] */
  float *squares;    /* [MOST_WIDTH] */
};

static size_t place(sfa_attn_half_probe *x, unsigned char *memory) {
  const size_t n = (size_t)N_CHUNKS * SFA_HALF_CHUNK;
  const struct {
    void **array;
    size_t bytes;
  } arrays[] = {
      {(void **)&x->rows, sizeof(float) * SFA_HALF_CHUNK * MOST_DIM},
      {(void **)&x->ids, SFA_HALF_CHUNK * MOST_KEPT},
      {(void **)&x->values, sizeof(uint32_t) * n * MOST_KEPT},
      {(void **)&x->offsets, sizeof(uint16_t) * n * MOST_KEPT},
      {(void **)&x->keys, sizeof(uint16_t) * n * MOST_DIM},
      {(void **)&x->v, sizeof(uint16_t) * n * MOST_DIM},
      {(void **)&x->query, sizeof(uint16_t) * MOST_DIM * MOST_WIDTH},
      {(void **)&x->weights, sizeof(uint16_t) * (MOST_WIDTH / 32) * SFA_HALF_WEIGHTS_STRIDE},
      {(void **)&x->o, sizeof(float) * MOST_DIM * MOST_WIDTH},
      {(void **)&x->l, sizeof(float) * MOST_WIDTH},
      {(void **)&x->squares, sizeof(float) * MOST_WIDTH},
  };
  size_t used = sfa_align64(sizeof *x);
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
    if (memory)
      *arrays[i].array = memory + used;
    used += sfa_align64(arrays[i].bytes);
  }
  return used;
}

sfa_status sfa_attn_half_probe_create(sfa_context *ctx, sfa_attn_half_probe **probe) {
  sfa_attn_half_probe counted;
  void *memory;
  SFA_TRY(sfa_alloc(ctx, place(&counted, NULL), "timing the 16-bit kernels", &memory));
  sfa_attn_half_probe *x = memory;
  memset(memory, 0, place(&counted, NULL));
  place(x, memory);
  x->kernels = sfa_half_kernel_of(ctx->isa);
  sfa_rng rng = {11};
  for (int64_t i = 0; i < (int64_t)SFA_HALF_CHUNK * MOST_DIM; i++)
    x->rows[i] = (float)sfa_rng_normal(&rng);
  *probe = x;
  return SFA_OK;
}

/* K features of D for each key of a chunk: one of each D / K in a row, as uneven as random ones within them. */
static void choose_ids(sfa_attn_half_probe *x, int32_t D, int32_t K) {
  sfa_rng rng = {13};
  for (int32_t i = 0; i < SFA_HALF_CHUNK * K; i++)
    x->ids[i] = (uint8_t)(i % K * (D / K) + (int32_t)(sfa_rng_next(&rng) % (uint64_t)(D / K)));
}

static void pack(sfa_attn_half_probe *x, int32_t D, int32_t K, int32_t W) {
  const sfa_half_kernels *kernels = x->kernels;
  choose_ids(x, D, K);
  for (int64_t chunk = 0; chunk < N_CHUNKS; chunk++)
    for (int32_t step = 0; step < SFA_HALF_STEPS; step++) {
      const float *rows = x->rows + (int64_t)step * SFA_HALF_STEP * D;
      int64_t first = chunk * SFA_HALF_CHUNK;
      kernels->pack_codes(step, SFA_HALF_STEP, K, x->ids + (int64_t)step * SFA_HALF_STEP * K, 1, rows, W, x->values + first * K,
                          x->offsets + first * K);
      kernels->pack_keys(step, SFA_HALF_STEP, D, rows, D, x->keys + first * D);
      kernels->pack_values(step, SFA_HALF_STEP, D, rows, D, x->v + first * D);
    }
}

/* What a step is: a chunk of codes, of rows, or of values against the block; or the packing of a chunk of values. */
typedef enum part { CODES, ROWS, VALUES, PACKING } part;

static void run_chunk(sfa_attn_half_probe *x, part what, int64_t chunk, int32_t D, int32_t K, int32_t W) {
  const sfa_half_kernels *kernels = x->kernels;
  int64_t first = chunk * SFA_HALF_CHUNK;
  switch (what) {
  case CODES:
    kernels->weights_codes(0, SFA_HALF_STEPS, K, x->values + first * K, x->offsets + first * K, W, x->query, NULL, NULL, NULL, x->weights);
    break;
  case ROWS: kernels->weights_dense(0, SFA_HALF_STEPS, D, x->keys + first * D, W, x->query, 1, NULL, NULL, NULL, x->weights); break;
  case VALUES: kernels->accumulate(0, SFA_HALF_STEPS, D, x->v + first * D, W, x->weights, x->o, x->l); break;
  case PACKING:
    for (int32_t step = 0; step < SFA_HALF_STEPS; step++)
      kernels->pack_values(step, SFA_HALF_STEP, D, x->rows + (int64_t)step * SFA_HALF_STEP * D, D, x->v + first * D);
    break;
  }
}

/* Nanoseconds of a chunk. */
static double time_of(sfa_attn_half_probe *x, part what, int32_t D, int32_t K, int32_t W) {
  int64_t start = sfa_now_ns(), passed, count = 0;
  do
    run_chunk(x, what, count++ % N_CHUNKS, D, K, W);
  while ((passed = sfa_now_ns() - start) < probe_ns);
  return (double)passed / (double)count;
}

void sfa_attn_half_probe_read(sfa_attn_half_probe *x, sfa_costs *c) {
  enum { FEW = 8, MANY = 16 };
  double exp_sum = 0;
  x->kernels->begin();
  for (int d = 0; d < SFA_COST_DIMS; d++) {
    int32_t D = dims[d], W = sfa_half_width(D);
    double pairs = (double)SFA_HALF_CHUNK * W;
    pack(x, D, FEW, W);
    for (int32_t i = 0; i < W; i += 32)
      x->kernels->query_codes(i, 32, D, x->rows, 1 / sqrtf((float)D), W, x->query, x->squares + i);
    double few = time_of(x, CODES, D, FEW, W) / pairs;
    double values = time_of(x, VALUES, D, FEW, W) / pairs;
    pack(x, D, MANY, W);
    double many = time_of(x, CODES, D, MANY, W) / pairs;
    for (int32_t i = 0; i < W; i += 32)
      x->kernels->query_dense(i, 32, D, x->rows, 1 / sqrtf((float)D), x->query, x->squares + i);
    double dense = time_of(x, ROWS, D, MANY, W) / pairs;
    c->half_code_step[d] = (many - few) / (MANY - FEW);
    double exp_pair = few - FEW * c->half_code_step[d];
    c->half_dense_step[d] = (dense - exp_pair) / D;
    c->half_value_step[d] = values / D;
    exp_sum += exp_pair;
  }
  c->half_exp_pair = exp_sum / SFA_COST_DIMS;
  c->half_pack_value = time_of(x, PACKING, dims[1], FEW, MOST_WIDTH) / (SFA_HALF_CHUNK * dims[1]);
  x->kernels->end();
}
