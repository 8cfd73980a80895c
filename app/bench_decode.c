/* sfa bench decode: steps over a cache of random rows. Dense caches and those with codes hold the same tokens and take turns, so that one
 * run compares all of them. A step reads the keys and values of every token once: its bytes are the cache's. On a GPU a round is many steps
 * in a row, over several copies of the tokens where one would stay in the GPU's own cache. */
#include "bench.h"

#include <math.h>
#include <sfa/cache.h>
#include <sfa/plan.h>
#include <sfa/stream.h>
#include <stdlib.h>
#include <string.h>

/* ---- Columns ------------------------------------------------------------------------------------------------------------------------ */

enum {
  C_N,
  C_BATCH,
  C_N_Q,
  C_HEADS,
  C_KV_HEADS,
  C_HEAD_DIM,
  C_HEAD_DIM_V,
  C_K,
  C_K_DTYPE,
  C_V_DTYPE,
  C_EPS,
  C_SCORE_SD,
  C_SUPPORTS,
  C_ISA,
  C_THREADS,
  C_SEED,
  C_ENGINE,
  C_VERSION,
  C_POLICY,
  C_MS,
  C_MIN_MS,
  C_MAX_MS,
  C_ROUNDS,
  C_TIMES_DENSE,
  C_TOPK_MS,
  C_ATTEND_MS,
  C_JOIN_MS,
  C_PREDICTED_MS,
  C_BYTES,
  C_RATE,
  C_READ_RATE,
  C_READ_SHARE,
  C_TOKEN_BYTES,
  C_DROPPED,
  C_KEPT,
  N_COLUMNS
};

static const bench_column columns[N_COLUMNS] = {
    [C_N] = {"n", "n", CELL_COUNT, 8},
    [C_BATCH] = {"batch", "batch", CELL_COUNT, 5},
    [C_N_Q] = {"n_q", "n-q", CELL_COUNT, 3},
    [C_HEADS] = {"heads", "heads", CELL_COUNT, 5},
    [C_KV_HEADS] = {"kv_heads", "kv", CELL_COUNT, 3},
    [C_HEAD_DIM] = {"head_dim", "dim", CELL_COUNT, 4},
    [C_HEAD_DIM_V] = {"head_dim_v", NULL, CELL_COUNT},
    [C_K] = {"k", NULL, CELL_COUNT},
    [C_K_DTYPE] = {"k_dtype", NULL, CELL_TEXT},
    [C_V_DTYPE] = {"v_dtype", NULL, CELL_TEXT},
    [C_EPS] = {"eps", NULL, CELL_NUMBER},
    [C_SCORE_SD] = {"score_sd", NULL, CELL_NUMBER},
    [C_SUPPORTS] = {"supports", NULL, CELL_TEXT},
    [C_ISA] = {"isa", "isa", CELL_TEXT, 6},
    [C_THREADS] = {"threads", "thr", CELL_COUNT, 3},
    [C_SEED] = {"seed", NULL, CELL_COUNT},
    [C_ENGINE] = {"engine", "engine", CELL_TEXT, 34},
    [C_VERSION] = {"version", NULL, CELL_TEXT},
    [C_POLICY] = {"policy", NULL, CELL_TEXT},
    [C_MS] = {"ms", "ms", CELL_NUMBER, 9, 3},
    [C_MIN_MS] = {"min_ms", NULL, CELL_NUMBER},
    [C_MAX_MS] = {"max_ms", NULL, CELL_NUMBER},
    [C_ROUNDS] = {"rounds", NULL, CELL_COUNT},
    [C_TIMES_DENSE] = {"times_dense", "faster", CELL_TIMES, 7, 2},
    [C_TOPK_MS] = {"topk_ms", NULL, CELL_NUMBER},
    [C_ATTEND_MS] = {"attend_ms", NULL, CELL_NUMBER},
    [C_JOIN_MS] = {"join_ms", "join ms", CELL_NUMBER, 7, 3},
    [C_PREDICTED_MS] = {"predicted_ms", "planned", CELL_NUMBER, 9, 3},
    [C_BYTES] = {"bytes", "bytes", CELL_BYTES, 9},
    [C_RATE] = {"bytes_per_s", "a second", CELL_BYTES, 9},
    [C_READ_RATE] = {"read_bytes_per_s", NULL, CELL_NUMBER},
    [C_READ_SHARE] = {"share_of_reads", "of reads", CELL_PERCENT, 8},
    [C_TOKEN_BYTES] = {"token_bytes", "a token", CELL_COUNT, 8},
    [C_DROPPED] = {"dropped", "dropped", CELL_NUMBER, 8, 5},
    [C_KEPT] = {"least_kept", "kept", CELL_PERCENT, 6},
};

/* ---- A case ---------------------------------------------------------------------------------------------------------------- */

typedef struct decode_case {
  int64_t n, batch, n_q, head_dim, head_dim_v, heads, kv_heads, n_threads, seed;
  sfa_isa isa;
  bench_supports supports;
  double eps, score_sd;
  int64_t n_sets; /* copies of the sequences in every cache */
} decode_case;

/* A cache and the plan that reads it. */
typedef struct decode_side {
  const struct decode_bench *bench;
  int32_t k; /* 0: dense */
  sfa_dtype k_dtype, v_dtype;
  float eps;
  char name[64];
  sfa_cache *cache;
  sfa_attention_plan *plan;
  void *workspace;
  int64_t n_calls; /* steps of a round */
} decode_side;

enum { MOST_SIDES = BENCH_MOST_ENGINES - 2, CHUNK = 1024 };

typedef struct decode_bench {
  decode_case c;
  sfa_context *ctx, *host; /* the device's, and the CPU's: one and the same where that is the device */
  bool on_gpu;
  double copy_rate; /* bench_cuda_copy_rate */
  bench_random *random;
  float *q, *keys, *values; /* [B][T][H][D], [CHUNK][G][D], [CHUNK][G][E] */
  float *dropped;           /* [B][T][H] */
  int32_t *slots;           /* [n_sets][B] 0, 1, ... */
  /* In the device's memory: copies of the first four, and the output [B][T][H][E]. */
  float *device_q, *device_keys, *device_values, *device_dropped, *device_out;
  float *scores; /* [T * H][n] of sequence 0, where least_kept is wanted; else NULL */
  decode_side sides[MOST_SIDES];
  int n_sides;
} decode_bench;

static int64_t length_of(const decode_case *c, int64_t sequence) { return c->n * (sequence + 1) / c->batch; }

/* Bytes of one set in the largest of the caches. */
static int64_t set_bytes(const decode_case *c) { return c->batch * c->n * c->kv_heads * (c->head_dim + c->head_dim_v) * 2; }

static int side_open(decode_bench *b, decode_side *s) {
  const decode_case *c = &b->c;
  s->bench = b;
  s->n_calls = c->n_sets;
  if (s->k)
    snprintf(s->name, sizeof s->name, "SFA k %d %s, V %s%s", s->k, bench_dtype_name(s->k_dtype), bench_dtype_name(s->v_dtype),
             s->eps > 0 ? ", eps" : "");
  else
    snprintf(s->name, sizeof s->name, "dense %s, V %s%s", bench_dtype_name(s->k_dtype), bench_dtype_name(s->v_dtype),
             s->eps > 0 ? ", eps" : "");
  sfa_cache_options cache = {.struct_size = sizeof cache,
                             .n_layers = 1,
                             .n_kv_heads = (int32_t)c->kv_heads,
                             .head_dim = (int32_t)c->head_dim,
                             .head_dim_v = (int32_t)c->head_dim_v,
                             .k = &s->k,
                             .k_dtype = s->k_dtype,
                             .v_dtype = s->v_dtype,
                             .n_sequences = (int32_t)(c->batch * c->n_sets)};
  sfa_costs costs;
  sfa_attention_options options = {.struct_size = sizeof options,
                                   .n_heads = (int32_t)c->heads,
                                   .n_kv_heads = (int32_t)c->kv_heads,
                                   .head_dim = (int32_t)c->head_dim,
                                   .head_dim_v = (int32_t)c->head_dim_v,
                                   .n_sequences = (int32_t)c->batch,
                                   .max_seqlen_q = c->n_q,
                                   .max_seqlen_k = c->n,
                                   .k_q = s->k,
                                   .k_k = s->k,
                                   .from_cache = 1,
                                   .k_dtype = s->k_dtype,
                                   .v_dtype = s->v_dtype,
                                   .causal = 1,
                                   .eps = s->eps,
                                   .costs = costs_kept(sfa_context_isa(b->ctx), &costs)};
  if (sfa_cache_create(b->ctx, &cache, &s->cache) != SFA_OK || sfa_attention_plan_create(b->ctx, &options, &s->plan) != SFA_OK)
    return app_fail_status(b->ctx);
  bool memory = sfa_memory_alloc(b->ctx, sfa_attention_workspace_bytes(s->plan), &s->workspace) == SFA_OK;
  return memory ? EXIT_OK : app_fail_status(b->ctx);
}

static void bench_close(decode_bench *b) {
  for (decode_side *s = b->sides; s < b->sides + b->n_sides; s++) {
    sfa_attention_plan_destroy(s->plan);
    sfa_cache_destroy(s->cache);
    sfa_memory_free(b->ctx, s->workspace);
  }
  void *device_memory[] = {b->device_q, b->device_keys, b->device_values, b->device_dropped, b->device_out};
  for (size_t i = 0; i < sizeof device_memory / sizeof *device_memory; i++)
    sfa_memory_free(b->ctx, device_memory[i]);
  void *memory[] = {b->q, b->keys, b->values, b->dropped, b->slots, b->scores};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
    free(memory[i]);
  bench_random_destroy(b->random);
  if (b->host != b->ctx)
    sfa_context_destroy(b->host);
  sfa_context_destroy(b->ctx);
}

/* The stages of a call: one more, behind others, so that a GPU does not wait for it to be enqueued. */
static sfa_status time_stages(const decode_side *s, sfa_attention_args *args, int64_t *stage_ns) {
  enum { BEFORE = 2 };
  const decode_bench *b = s->bench;
  sfa_status status = SFA_OK;
  for (int call = b->on_gpu ? 0 : BEFORE; call <= BEFORE && status == SFA_OK; call++) {
    args->stage_ns = call == BEFORE ? stage_ns : NULL;
    status = sfa_attention_run_cached(s->plan, args, s->cache, 0, b->slots + call % b->c.n_sets * b->c.batch);
  }
  return status;
}

/* A bench_engine's run. */
static int side_run(void *arg, double *ms, int64_t *stage_ns) {
  decode_side *s = arg;
  const decode_bench *b = s->bench;
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q = {.data = b->device_q},
                             .out = b->device_out,
                             .dropped = b->device_dropped,
                             .workspace = s->workspace};
  double start = seconds_now();
  for (int64_t call = 0; call < s->n_calls; call++)
    if (sfa_attention_run_cached(s->plan, &args, s->cache, 0, b->slots + call % b->c.n_sets * b->c.batch) != SFA_OK)
      return app_fail_status(b->ctx);
  if (sfa_stream_wait(b->ctx) != SFA_OK)
    return app_fail_status(b->ctx);
  double passed = seconds_now() - start;
  *ms = 1e3 * passed / (double)s->n_calls;
  if (b->on_gpu && passed < 5e-3) /* from the next round on, so that waiting does not count */
    s->n_calls *= 1 + (int64_t)(10e-3 / (passed + 1e-5));
  return time_stages(s, &args, stage_ns) == SFA_OK ? EXIT_OK : app_fail_status(b->ctx);
}

/* ---- Filling the caches ---------------------------------------------------------------------------------------------------- */

/* Codes of a chunk of keys as side s stores them, as f32 rows with zeros outside of the support: [n * G][D]. */
static int coded_rows(const decode_bench *b, const decode_side *s, int64_t n_rows, float *rows) {
  if (!s->k)
    return EXIT_OK;
  int32_t D = (int32_t)b->c.head_dim;
  void *memory = bench_alloc((int64_t)sfa_codes_bytes(n_rows, D, s->k, SFA_F32), 1);
  sfa_codes codes;
  bool good = memory && sfa_codes_place(b->host, n_rows, D, s->k, SFA_F32, memory, &codes) == SFA_OK &&
              sfa_codes_select(b->host, rows, SFA_F32, D, &codes) == SFA_OK && sfa_codes_densify(b->host, &codes, rows, D) == SFA_OK;
  free(memory);
  return good ? EXIT_OK : app_fail("the codes of %lld rows cannot be made", (long long)n_rows);
}

/* Scores of n keys [n][G][D] for all query rows of sequence 0, into columns first .. of out [T * H][stride]. */
static void score_rows(const decode_bench *b, const float *q, const float *keys, int64_t n, int64_t first, int64_t stride, float *out) {
  const decode_case *c = &b->c;
  int64_t D = c->head_dim, group = c->heads / c->kv_heads;
  float scale = 1 / sqrtf((float)D);
  for (int64_t row = 0; row < c->n_q * c->heads; row++)
    for (int64_t j = 0; j < n; j++) {
      const float *x = q + row * D, *y = keys + (j * c->kv_heads + row % c->heads / group) * D;
      float sum[8] = {0};
      for (int64_t u = 0; u < D; u += 8)
        for (int lane = 0; lane < 8; lane++)
          sum[lane] += x[u + lane] * y[u + lane];
      out[row * stride + first + j] = scale * (((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
    }
}

/* Scales the queries so that scores over a sample of keys, as the first sparse side has them (else the first), spread by score_sd. */
static int spread_scores(decode_bench *b) {
  const decode_case *c = &b->c;
  if (c->score_sd <= 0)
    return EXIT_OK;
  const decode_side *s = &b->sides[b->n_sides - 1];
  int64_t n = CHUNK, rows = c->n_q * c->heads, width = rows * c->head_dim;
  float *q = bench_alloc(width, sizeof *q), *scores = bench_alloc(rows * n, sizeof *scores);
  int status = q && scores ? EXIT_OK : app_fail("out of memory for a sample of scores");
  if (!status) {
    bench_random_features(b->random, n, b->keys);
    memcpy(q, b->q, (size_t)width * sizeof *q);
    status = coded_rows(b, s, n * c->kv_heads, b->keys);
  }
  if (!status)
    status = coded_rows(b, s, rows, q);
  double sum = 0, squares = 0;
  if (!status)
    score_rows(b, q, b->keys, n, 0, n, scores);
  for (int64_t i = 0; !status && i < rows * n; i++) {
    sum += (double)scores[i];
    squares += (double)scores[i] * (double)scores[i];
  }
  double count = (double)(rows * n), sd = sqrt(fmax(squares / count - sum / count * (sum / count), 1e-30));
  for (int64_t i = 0; !status && i < c->batch * width; i++)
    b->q[i] *= (float)(c->score_sd / sd);
  free(q);
  free(scores);
  return status;
}

static int append(decode_bench *b, int64_t sequence, int64_t n) {
  const decode_case *c = &b->c;
  const sfa_rows k = {.data = b->device_keys}, v = {.data = b->device_values};
  size_t rows = (size_t)(n * c->kv_heads) * sizeof(float);
  if (sfa_memory_copy(b->ctx, b->device_keys, b->keys, rows * (size_t)c->head_dim) != SFA_OK ||
      sfa_memory_copy(b->ctx, b->device_values, b->values, rows * (size_t)c->head_dim_v) != SFA_OK)
    return app_fail_status(b->ctx);
  for (decode_side *s = b->sides; s < b->sides + b->n_sides; s++)
    for (int64_t set = 0; set < c->n_sets; set++)
      if (sfa_cache_append(s->cache, (int32_t)(set * c->batch + sequence), 0, n, &k, &v) != SFA_OK)
        return app_fail_status(b->ctx);
  return EXIT_OK;
}

/* The same random tokens into every cache. */
static int fill(decode_bench *b) {
  const decode_case *c = &b->c;
  int64_t rows = c->n_q * c->heads;
  float *q = b->scores ? bench_alloc(rows * c->head_dim, sizeof *q) : NULL;
  const decode_side *last = &b->sides[b->n_sides - 1];
  int status = !b->scores || q ? EXIT_OK : app_fail("out of memory for coded queries");
  if (q && !status) {
    memcpy(q, b->q, (size_t)(rows * c->head_dim) * sizeof *q);
    status = coded_rows(b, last, rows, q);
  }
  for (int64_t sequence = 0; sequence < c->batch && !status; sequence++)
    for (int64_t first = 0; first < length_of(c, sequence) && !status; first += CHUNK) {
      int64_t left = length_of(c, sequence) - first, n = left < CHUNK ? left : CHUNK;
      bench_random_features(b->random, n, b->keys);
      bench_random_values(b->random, n, c->kv_heads * c->head_dim_v, b->values);
      status = append(b, sequence, n);
      if (!status && b->scores && sequence == 0) {
        status = coded_rows(b, last, n * c->kv_heads, b->keys);
        if (!status)
          score_rows(b, q, b->keys, n, first, c->n, b->scores);
      }
    }
  free(q);
  return status;
}

static int compare_floats(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

/* The least share of keys that hold 1 - eps of the mass, of those that some query of a kv head has to read: what a perfect choice would
 * read, mean over the kv heads. NaN: out of memory. */
static double least_kept(const decode_bench *b, double eps) {
  const decode_case *c = &b->c;
  int64_t n_kept = 0, rows_of_head = c->heads / c->kv_heads;
  float *sorted = bench_alloc(c->n, sizeof *sorted);
  unsigned char *kept = bench_alloc(c->kv_heads * c->n, 1); /* [G][n] */
  bool memory = sorted && kept;
  if (memory)
    memset(kept, 0, (size_t)(c->kv_heads * c->n));
  for (int64_t row = 0; memory && row < c->n_q * c->heads; row++) {
    const float *s = b->scores + row * c->n;
    unsigned char *of_head = kept + row % c->heads / rows_of_head * c->n;
    memcpy(sorted, s, (size_t)c->n * sizeof *sorted);
    qsort(sorted, (size_t)c->n, sizeof *sorted, compare_floats);
    double largest = (double)sorted[c->n - 1], total = 0, dropped = 0;
    for (int64_t j = 0; j < c->n; j++)
      total += exp((double)sorted[j] - largest);
    int64_t edge = 0;
    while (edge < c->n - 1 && (dropped += exp((double)sorted[edge] - largest)) <= eps * total)
      edge++;
    for (int64_t j = 0; j < c->n; j++)
      of_head[j] |= s[j] >= sorted[edge];
  }
  for (int64_t i = 0; memory && i < c->kv_heads * c->n; i++)
    n_kept += kept[i];
  free(sorted);
  free(kept);
  return memory ? (double)n_kept / (double)(c->kv_heads * c->n) : NAN;
}

/* ---- A case, open and closed -------------------------------------------------------------------------------------------- */

static int open_contexts(decode_bench *b, const app_options *o) {
  const decode_case *c = &b->c;
  app a;
  int status = app_open_context(&a, o, c->n_threads, c->isa);
  if (status)
    return status;
  b->ctx = b->host = a.ctx;
  b->on_gpu = sfa_context_device(b->ctx) == SFA_DEVICE_CUDA;
  if (!b->on_gpu)
    return EXIT_OK;
  sfa_context_options context = {.struct_size = sizeof context};
  if (sfa_context_create(&context, &b->host) != SFA_OK)
    return app_fail("out of memory for a context");
  b->copy_rate = bench_cuda_copy_rate(b->ctx, o);
  return b->copy_rate > 0 ? EXIT_OK : app_fail_status(b->ctx);
}

static int open_device_memory(decode_bench *b) {
  const decode_case *c = &b->c;
  size_t rows = (size_t)(c->batch * c->n_q * c->heads), kv_rows = (size_t)(CHUNK * c->kv_heads);
  const struct {
    float **to;
    size_t n;
  } arrays[] = {{&b->device_q, rows * (size_t)c->head_dim},
                {&b->device_keys, kv_rows * (size_t)c->head_dim},
                {&b->device_values, kv_rows * (size_t)c->head_dim_v},
                {&b->device_dropped, rows},
                {&b->device_out, rows * (size_t)c->head_dim_v}};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
    if (sfa_memory_alloc(b->ctx, arrays[i].n * sizeof(float), (void **)arrays[i].to) != SFA_OK)
      return app_fail_status(b->ctx);
  return EXIT_OK;
}

static int bench_open(decode_bench *b, const app_options *o) {
  enum { MOST_SETS = 8, GPU_CACHE_BYTES = 1 << 28 }; /* several times the L2 of any GPU */
  decode_case *c = &b->c;
  int status = open_contexts(b, o);
  if (status)
    return status;
  c->n_sets = 1;
  while (b->on_gpu && c->n_sets < MOST_SETS && c->n_sets * set_bytes(c) < GPU_CACHE_BYTES)
    c->n_sets++;
  int64_t rows = c->batch * c->n_q * c->heads;
  b->random = bench_random_create(c->supports, (int32_t)c->kv_heads, (int32_t)c->head_dim, (uint64_t)c->seed);
  b->q = bench_alloc(rows * c->head_dim, sizeof *b->q);
  b->keys = bench_alloc(CHUNK * c->kv_heads * c->head_dim, sizeof *b->keys);
  b->values = bench_alloc(CHUNK * c->kv_heads * c->head_dim_v, sizeof *b->values);
  b->dropped = bench_alloc(rows, sizeof *b->dropped);
  b->slots = bench_alloc(c->n_sets * c->batch, sizeof *b->slots);
  bool memory = b->random && b->q && b->keys && b->values && b->dropped && b->slots;
  if (memory && c->eps > 0 && c->n_q * c->heads * c->n <= 1 << 26 && c->batch == 1)
    memory = (b->scores = bench_alloc(c->n_q * c->heads * c->n, sizeof *b->scores)) != NULL;
  if (!memory)
    return app_fail("out of memory for the rows of a step over %lld tokens", (long long)c->n);
  for (int64_t i = 0; i < c->n_sets * c->batch; i++)
    b->slots[i] = (int32_t)i;
  /* Query heads of a group have the popularities of their key head: rows of G heads, spread out. */
  int64_t group = c->heads / c->kv_heads;
  for (int64_t row = 0; row < c->batch * c->n_q; row++)
    for (int64_t member = 0; member < group; member++) {
      bench_random_features(b->random, 1, b->keys);
      for (int64_t g = 0; g < c->kv_heads; g++)
        memcpy(b->q + (row * c->heads + g * group + member) * c->head_dim, b->keys + g * c->head_dim, (size_t)c->head_dim * sizeof *b->q);
    }
  status = open_device_memory(b);
  for (decode_side *s = b->sides; s < b->sides + b->n_sides && !status; s++)
    status = side_open(b, s);
  if (!status)
    status = spread_scores(b);
  if (!status && sfa_memory_copy(b->ctx, b->device_q, b->q, (size_t)(rows * c->head_dim) * sizeof *b->q) != SFA_OK)
    status = app_fail_status(b->ctx);
  return status ? status : fill(b);
}

/* ---- Showing it --------------------------------------------------------------------------------------------------------- */

static cJSON *peer_case(const decode_bench *b) {
  const decode_case *c = &b->c;
  cJSON *object = cJSON_CreateObject(), *lengths = cJSON_AddArrayToObject(object, "lengths");
  cJSON_AddStringToObject(object, "bench", "decode");
  cJSON_AddStringToObject(object, "device", b->on_gpu ? "cuda" : "cpu");
  for (int64_t i = 0; i < c->batch; i++)
    cJSON_AddItemToArray(lengths, cJSON_CreateNumber((double)length_of(c, i)));
  cJSON_AddNumberToObject(object, "heads", (double)c->heads);
  cJSON_AddNumberToObject(object, "kv_heads", (double)c->kv_heads);
  cJSON_AddNumberToObject(object, "head_dim", (double)c->head_dim);
  cJSON_AddNumberToObject(object, "n_q", (double)c->n_q);
  return object;
}

static void fill_case(bench_cell *row, const decode_bench *b) {
  const decode_case *c = &b->c;
  row[C_N].number = (double)c->n;
  row[C_BATCH].number = (double)c->batch;
  row[C_N_Q].number = (double)c->n_q;
  row[C_HEADS].number = (double)c->heads;
  row[C_KV_HEADS].number = (double)c->kv_heads;
  row[C_HEAD_DIM].number = (double)c->head_dim;
  row[C_HEAD_DIM_V].number = (double)c->head_dim_v;
  row[C_SCORE_SD].number = c->score_sd > 0 ? c->score_sd : NAN;
  row[C_SUPPORTS].text = c->supports == SUPPORTS_SKEWED ? "skewed" : "uniform";
  row[C_ISA].text = b->on_gpu ? "cuda" : sfa_isa_name(c->isa);
  row[C_THREADS].number = b->on_gpu ? NAN : (double)c->n_threads;
  row[C_SEED].number = (double)c->seed;
}

/* What a side of ours tells beyond its time. */
static int fill_side(bench_cell *row, decode_bench *b, decode_side *s, const bench_times *times) {
  sfa_attention_report report = {.struct_size = sizeof report};
  if (sfa_attention_plan_report(s->plan, &report) != SFA_OK)
    return app_fail_status(b->ctx);
  double tokens = 0, threads = b->on_gpu ? 1 : (double)b->c.n_threads;
  for (int64_t i = 0; i < b->c.batch; i++)
    tokens += (double)length_of(&b->c, i);
  row[C_K].number = s->k;
  row[C_K_DTYPE].text = bench_dtype_name(s->k_dtype);
  row[C_V_DTYPE].text = bench_dtype_name(s->v_dtype);
  row[C_EPS].number = (double)s->eps;
  row[C_POLICY].text = sfa_policy_name(report.policy);
  if (!b->on_gpu)
    row[C_PREDICTED_MS].number =
        1e-6 / threads * (report.topk_ns + report.pack_ns + report.score_ns + report.softmax_ns + report.value_ns + report.call_ns);
  row[C_TOPK_MS].number = times->stage_ms[SFA_STAGE_TOPK] / threads;
  row[C_ATTEND_MS].number = times->stage_ms[SFA_STAGE_ATTEND] / threads;
  row[C_JOIN_MS].number = b->on_gpu ? times->stage_ms[SFA_STAGE_JOIN] : NAN;
  row[C_TOKEN_BYTES].number = (double)sfa_cache_token_bytes(s->cache);
  row[C_BYTES].number = tokens * row[C_TOKEN_BYTES].number;
  row[C_RATE].number = row[C_BYTES].number / (1e-3 * times->median_ms);
  row[C_READ_RATE].number = b->on_gpu ? b->copy_rate : bench_read_rate((int64_t)row[C_BYTES].number, b->c.n_threads);
  row[C_READ_SHARE].number = row[C_READ_RATE].number > 0 ? row[C_RATE].number / row[C_READ_RATE].number : NAN;
  if (s->eps <= 0)
    return EXIT_OK;
  double once;
  int64_t stage_ns[SFA_STAGE_COUNT] = {0};
  int status = side_run(s, &once, stage_ns); /* for what it drops */
  size_t n_dropped = (size_t)(b->c.batch * b->c.n_q * b->c.heads);
  if (!status && sfa_memory_copy(b->ctx, b->dropped, b->device_dropped, n_dropped * sizeof *b->dropped) != SFA_OK)
    return app_fail_status(b->ctx);
  row[C_DROPPED].number = 0;
  for (size_t i = 0; i < n_dropped; i++)
    row[C_DROPPED].number = fmax(row[C_DROPPED].number, (double)b->dropped[i]);
  if (b->scores && s == &b->sides[b->n_sides - 1])
    row[C_KEPT].number = least_kept(b, (double)s->eps);
  return status;
}

static int fill_row(void *bench, bench_table *t, int i, bench_cell *row) {
  decode_bench *b = bench;
  fill_case(row, b);
  row[C_TIMES_DENSE].number = 1 / row[C_TIMES_DENSE].number; /* the dense one over this */
  return i < b->n_sides ? fill_side(row, b, &b->sides[i], &t->times[i]) : EXIT_OK;
}

/* ---- The grid ----------------------------------------------------------------------------------------------------------- */

enum { A_N, A_HEAD_DIM, A_BATCH, A_N_Q, A_ISA, A_THREADS, N_AXES };

static decode_case case_at(const app_options *o, const int64_t *v) {
  int64_t kv_heads = o->kv_heads > 0 ? o->kv_heads : 1;
  return (decode_case){.n = v[A_N],
                       .batch = v[A_BATCH],
                       .n_q = v[A_N_Q],
                       .head_dim = v[A_HEAD_DIM],
                       .head_dim_v = o->head_dim_v > 0 ? o->head_dim_v : v[A_HEAD_DIM],
                       .heads = o->heads > 0 ? o->heads : kv_heads,
                       .kv_heads = kv_heads,
                       .n_threads = v[A_THREADS],
                       .seed = o->seed < 0 ? 1 : o->seed,
                       .isa = v[A_ISA] ? (sfa_isa)v[A_ISA] : sfa_isa_best(),
                       .supports = (bench_supports)o->supports,
                       .eps = o->eps,
                       .score_sd = o->score_sd};
}

/* The sides of every case: the dense caches to compare with, then k by type of codes by type of values, each exact and, with --eps, once
 * more with it. The last one is the sparsest. */
static int add_sides(const app_options *o, decode_bench *b) {
  static const int64_t k[] = {8, 16}, int8[] = {3}, bf16[] = {1}, values[] = {1, 3, 4};
  bench_axis against = bench_choose(&o->bench_against, bf16, 1);
  const bench_axis axes[] = {bench_choose(&o->bench_k, k, 2), bench_choose(&o->bench_k_type, int8, 1),
                             bench_choose(&o->bench_v_type, values, 3)};
  int64_t passes = o->eps > 0 ? 2 : 1, n = bench_places(axes, 3);
  if (against.n + n * passes > MOST_SIDES)
    return app_usage("%lld caches at a time are too many; at most %d: give fewer of --k, --k-type, --v-type, --against",
                     (long long)(against.n + n * passes), MOST_SIDES);
  b->n_sides = 0;
  for (int64_t i = 0; i < against.n; i++) {
    sfa_dtype dtype = bench_dtype(against.values[i]);
    b->sides[b->n_sides++] = (decode_side){.k_dtype = dtype, .v_dtype = dtype};
  }
  for (int64_t i = 0; i < n * passes; i++) {
    int64_t v[3];
    bench_place(axes, 3, i / passes, v);
    if (v[0] > b->c.head_dim)
      return app_usage("--k %lld keeps more features than --head-dim %lld has", (long long)v[0], (long long)b->c.head_dim);
    b->sides[b->n_sides++] = (decode_side){
        .k = (int32_t)v[0], .k_dtype = bench_dtype(v[1]), .v_dtype = bench_dtype(v[2]), .eps = i % passes ? (float)o->eps : 0};
  }
  return EXIT_OK;
}

static int check_case(const app_options *o, const int64_t *v) {
  decode_bench b = {.c = case_at(o, v)};
  const decode_case *c = &b.c;
  if (c->head_dim % 8 || c->head_dim_v % 8)
    return app_usage("--head-dim %lld and --head-dim-v %lld: both must be multiples of 8", (long long)c->head_dim,
                     (long long)c->head_dim_v);
  if (c->heads % c->kv_heads)
    return app_usage("--heads %lld is not a multiple of --kv-heads %lld", (long long)c->heads, (long long)c->kv_heads);
  if (length_of(c, 0) < c->n_q)
    return app_usage("--n-q %lld: the shortest of %lld sequences has %lld tokens", (long long)c->n_q, (long long)c->batch,
                     (long long)length_of(c, 0));
  int status = bench_check_isa(c->isa);
  return status ? status : add_sides(o, &b);
}

static int run_case(bench_table *t, const int64_t *v) {
  decode_bench b = {.c = case_at(t->o, v)};
  int status = add_sides(t->o, &b);
  if (!status)
    status = bench_open(&b, t->o);
  if (!status) {
    for (int i = 0; i < b.n_sides; i++)
      t->engines[t->n_engines++] = (bench_engine){.name = b.sides[i].name, .version = SFA_VERSION, .run = side_run, .arg = &b.sides[i]};
    status = bench_table_time(t, b.c.n_threads, peer_case(&b), 0);
  }
  if (!status)
    status = bench_table_show(t, C_ENGINE, C_MS, fill_row, &b);
  bench_close(&b);
  return status;
}

static int draw(const bench_output *out, const char *path) {
  return bench_output_bars(out, path, "times as fast as the dense cache", 2, (const int[]){C_N, C_ENGINE, C_TIMES_DENSE});
}

int cmd_bench_decode(const app_options *o) {
  static const int64_t n[] = {65536}, head_dim[] = {128}, zero[] = {0}, one[] = {1};
  const bench_axis axes[N_AXES] = {
      [A_N] = bench_choose(&o->bench_n, n, 1),           [A_HEAD_DIM] = bench_choose(&o->bench_head_dim, head_dim, 1),
      [A_BATCH] = bench_choose(&o->bench_batch, one, 1), [A_N_Q] = bench_choose(&o->bench_n_q, one, 1),
      [A_ISA] = bench_choose(&o->bench_isa, zero, 1),    [A_THREADS] = bench_choose(&o->bench_threads, one, 1)};
  return bench_grid_run(o, &(bench_grid){columns, N_COLUMNS, N_AXES, axes, check_case, run_case, draw});
}
