/* sfa bench model: prefill and decode steps of a model at several depths of context, dense and with SFA, and llama.cpp beside them. Every
 * engine is at every depth at once and rounds go over all of them, so that what a step costs more at depth is a difference within rounds.
 */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  C_MODEL,
  C_DEPTH,
  C_THREADS,
  C_ENGINE,
  C_VERSION,
  C_CACHE,
  C_PREFILL_TOKENS,
  C_PREFILL_RATE,
  C_PREFILL_ATTENTION_SHARE,
  C_STEP_MS,
  C_MIN_STEP_MS,
  C_MAX_STEP_MS,
  C_STEPS,
  C_ROUNDS,
  C_DECODE_RATE,
  C_ATTENTION_MS,
  C_DEPTH_MS,
  C_TIMES_FIRST,
  C_KV_BYTES,
  N_COLUMNS
};

static const bench_column columns[N_COLUMNS] = {
    [C_MODEL] = {"model", NULL, CELL_TEXT},
    [C_DEPTH] = {"depth", "depth", CELL_COUNT, 7},
    [C_THREADS] = {"threads", "thr", CELL_COUNT, 3},
    [C_ENGINE] = {"engine", "engine", CELL_TEXT, 24},
    [C_VERSION] = {"version", NULL, CELL_TEXT},
    [C_CACHE] = {"cache", "cache", CELL_TEXT, 9},
    [C_PREFILL_TOKENS] = {"prefill_tokens", NULL, CELL_COUNT},
    [C_PREFILL_RATE] = {"prefill_tokens_per_s", "prefill/s", CELL_NUMBER, 9, 1},
    [C_PREFILL_ATTENTION_SHARE] = {"prefill_attention_share", "attention", CELL_PERCENT, 9},
    [C_STEP_MS] = {"step_ms", "step ms", CELL_NUMBER, 8, 2},
    [C_MIN_STEP_MS] = {"min_step_ms", NULL, CELL_NUMBER},
    [C_MAX_STEP_MS] = {"max_step_ms", NULL, CELL_NUMBER},
    [C_STEPS] = {"steps", NULL, CELL_COUNT},
    [C_ROUNDS] = {"rounds", NULL, CELL_COUNT},
    [C_DECODE_RATE] = {"decode_tokens_per_s", "decode/s", CELL_NUMBER, 8, 1},
    [C_ATTENTION_MS] = {"attention_ms", "attention ms", CELL_NUMBER, 12, 2},
    [C_DEPTH_MS] = {"depth_ms", "for depth ms", CELL_NUMBER, 12, 2},
    [C_TIMES_FIRST] = {"times_first", "of the first", CELL_TIMES, 12, 2},
    [C_KV_BYTES] = {"kv_bytes", "KV", CELL_BYTES, 9},
};

enum { MOST_SIDES = 2, MOST_DEPTHS = 4, DEFAULT_STEPS = 8, DEFAULT_DEPTH = 8192 };

/* A session at a depth: `prompt` tokens stay, steps go up to the depth and are taken back. */
typedef struct model_side {
  const struct model_bench *bench;
  sfa_attention_choice choice;
  char name[64], cache[24];
  sfa_session *session;
  int64_t depth, prompt;
  double prefill_ms, attention_share;
} model_side;

typedef struct model_bench {
  app a;
  int64_t steps, depths[MOST_DEPTHS];
  int n_depths, n_sides;
  int32_t *tokens; /* [largest depth] */
  float *logits;   /* [vocab] */
  model_side sides[MOST_SIDES * MOST_DEPTHS];
} model_bench;

/* ---- Our own sessions ------------------------------------------------------------------------------------------------------ */

static int side_open(model_bench *b, model_side *s, const sfa_attention_choice *choice, const char *name, int64_t depth) {
  const sfa_context *ctx = b->a.ctx;
  *s = (model_side){.bench = b, .choice = *choice, .depth = depth, .prompt = depth - b->steps};
  snprintf(s->name, sizeof s->name, "%s", name);
  sfa_dtype k = choice->cache_k ? choice->cache_k : choice->sparse ? SFA_I8 : SFA_BF16, v = choice->cache_v ? choice->cache_v : SFA_BF16;
  snprintf(s->cache, sizeof s->cache, "%s/%s", bench_dtype_name(k), bench_dtype_name(v));
  sfa_session_options options = {
      .struct_size = sizeof options, .attention = &s->choice, .context_len = depth, .chunk_len = (int32_t)b->a.o->chunk};
  if (sfa_session_create(b->a.model, &options, &s->session) != SFA_OK)
    return app_fail_status(ctx);
  if (sfa_context_device(ctx) != SFA_DEVICE_CPU && /* the first prompt also loads the GPU's kernels */
      (sfa_session_append(s->session, b->tokens, s->prompt, b->logits) != SFA_OK || sfa_session_truncate(s->session, 0) != SFA_OK))
    return app_fail_status(ctx);
  double start = seconds_now();
  if (sfa_session_append(s->session, b->tokens, s->prompt, b->logits) != SFA_OK)
    return app_fail_status(ctx);
  s->prefill_ms = 1e3 * (seconds_now() - start);
  sfa_session_stats stats;
  sfa_session_stats_read(s->session, &stats);
  s->attention_share = (double)stats.prefill_attention_ns / (double)(stats.prefill_ns ? stats.prefill_ns : 1);
  return EXIT_OK;
}

/* A bench_engine's run: all steps of a round. */
static int side_run(void *arg, double *ms, int64_t *stage_ns) {
  model_side *s = arg;
  const model_bench *b = s->bench;
  sfa_session_stats before, after;
  sfa_session_stats_read(s->session, &before);
  double start = seconds_now();
  for (int64_t i = 0; i < b->steps; i++)
    if (sfa_session_append(s->session, b->tokens + s->prompt + i, 1, b->logits) != SFA_OK)
      return app_fail_status(b->a.ctx);
  *ms = 1e3 * (seconds_now() - start);
  sfa_session_stats_read(s->session, &after);
  stage_ns[SFA_STAGE_ATTEND] = after.decode_attention_ns - before.decode_attention_ns;
  return sfa_session_truncate(s->session, s->prompt) == SFA_OK ? EXIT_OK : app_fail_status(b->a.ctx);
}

/* ---- Set-up ------------------------------------------------------------------------------------------------------------- */

static int read_depths(model_bench *b) {
  const app_options *o = b->a.o;
  int64_t most = b->a.info.context_len, both[2] = {64, most < DEFAULT_DEPTH ? most : DEFAULT_DEPTH};
  bench_axis depths = bench_choose(&o->bench_depth, both, 2);
  b->steps = o->steps > 0 ? o->steps : DEFAULT_STEPS;
  if (depths.n > MOST_DEPTHS)
    return app_usage("--depth takes at most %d depths, not %lld", MOST_DEPTHS, (long long)depths.n);
  for (int64_t i = 0; i < depths.n; i++) {
    if (depths.values[i] > most)
      return app_usage("--depth %lld is more than the %lld tokens that the model was trained on", (long long)depths.values[i],
                       (long long)most);
    if (depths.values[i] <= b->steps)
      return app_usage("--depth %lld leaves no prompt before %lld steps; give a larger depth or fewer --steps", (long long)depths.values[i],
                       (long long)b->steps);
    b->depths[b->n_depths++] = depths.values[i];
  }
  return EXIT_OK;
}

static int bench_open(model_bench *b) {
  int64_t most = 0;
  for (int i = 0; i < b->n_depths; i++)
    most = b->depths[i] > most ? b->depths[i] : most;
  b->tokens = bench_alloc(most, sizeof *b->tokens);
  b->logits = bench_alloc(b->a.info.vocab_size, sizeof *b->logits);
  if (!b->tokens || !b->logits)
    return app_fail("out of memory for %lld tokens", (long long)most);
  uint32_t state = 1;
  for (int64_t i = 0; i < most; i++) /* any tokens do: no step looks at what they are */
    b->tokens[i] = (int32_t)((state = state * 1664525u + 1013904223u) % (uint32_t)b->a.info.vocab_size);
  const app_options *o = b->a.o;
  sfa_attention_choice dense = {.struct_size = sizeof dense, .costs = b->a.choice.costs}, sparse = b->a.choice;
  sparse.sparse = 1;
  char sfa_name[64];
  int32_t k = sparse.k ? sparse.k : b->a.info.sfa_k ? b->a.info.sfa_k : 16;
  snprintf(sfa_name, sizeof sfa_name, "SFA k %d%s%s%s", k < b->a.info.head_dim ? k : b->a.info.head_dim, sparse.k_q < 0 ? ", q dense" : "",
           sparse.policy ? ", " : "", sparse.policy ? sfa_policy_name(sparse.policy) : "");
  int status = EXIT_OK;
  for (int i = 0; i < b->n_depths && !status; i++) {
    if (o->attention != 0)
      status = side_open(b, &b->sides[b->n_sides++], &sparse, sfa_name, b->depths[i]);
    if (!status)
      status = side_open(b, &b->sides[b->n_sides++], &dense, "dense", b->depths[i]);
  }
  return status;
}

static void bench_close(model_bench *b) {
  for (int i = 0; i < b->n_sides; i++)
    sfa_session_destroy(b->sides[i].session);
  free(b->tokens);
  free(b->logits);
  app_close(&b->a);
}

static cJSON *peer_case(const model_bench *b, int64_t depth) {
  cJSON *object = cJSON_CreateObject(), *tokens = cJSON_AddArrayToObject(object, "tokens");
  cJSON_AddStringToObject(object, "bench", "model");
  cJSON_AddStringToObject(object, "model", b->a.o->model);
  cJSON_AddNumberToObject(object, "steps", (double)b->steps);
  for (int64_t i = 0; i < depth; i++)
    cJSON_AddItemToArray(tokens, cJSON_CreateNumber(b->tokens[i]));
  return object;
}

/* ---- Showing it --------------------------------------------------------------------------------------------------------- */

/* The engine of that name at the least depth. */
static int shallowest(const bench_engine *engines, const int64_t *depths, int n_engines, const char *name) {
  int found = -1;
  for (int i = 0; i < n_engines; i++)
    if (strcmp(engines[i].name, name) == 0 && !engines[i].lost && (found < 0 || depths[i] < depths[found]))
      found = i;
  return found;
}

static int show(model_bench *b, const bench_engine *engines, const int64_t *depths, int n_engines, const bench_times *times, int n_rounds,
                bench_output *out) {
  double steps = (double)b->steps;
  int status = EXIT_OK;
  for (int d = 0; d < b->n_depths && !status; d++) {
    int first = -1;
    for (int i = 0; i < n_engines && !status; i++) {
      if (depths[i] != b->depths[d] || engines[i].lost)
        continue;
      first = first < 0 ? i : first;
      int shallow = shallowest(engines, depths, n_engines, engines[i].name);
      bench_cell *row = bench_output_row(out);
      if (!row)
        return EXIT_FAILED;
      double prompt = (double)(depths[i] - b->steps), prefill_ms = i < b->n_sides ? b->sides[i].prefill_ms : engines[i].setup_ms;
      row[C_MODEL].text = b->a.o->model;
      row[C_DEPTH].number = (double)depths[i];
      row[C_THREADS].number = sfa_context_threads(b->a.ctx);
      row[C_ENGINE].text = bench_output_keep(out, engines[i].name);
      row[C_VERSION].text = bench_output_keep(out, engines[i].version);
      row[C_PREFILL_TOKENS].number = prompt;
      row[C_PREFILL_RATE].number = 1e3 * prompt / prefill_ms;
      row[C_STEP_MS].number = times[i].median_ms / steps;
      row[C_MIN_STEP_MS].number = times[i].least_ms / steps;
      row[C_MAX_STEP_MS].number = times[i].most_ms / steps;
      row[C_STEPS].number = steps;
      row[C_ROUNDS].number = n_rounds;
      row[C_DECODE_RATE].number = 1e3 * steps / times[i].median_ms;
      if (shallow != i)
        row[C_DEPTH_MS].number = (times[i].median_ms - times[shallow].median_ms) / steps;
      row[C_TIMES_FIRST].number = times[i].median_ms / times[first].median_ms;
      if (i < b->n_sides) {
        sfa_session_stats stats;
        sfa_session_stats_read(b->sides[i].session, &stats);
        row[C_CACHE].text = bench_output_keep(out, b->sides[i].cache);
        row[C_PREFILL_ATTENTION_SHARE].number = b->sides[i].attention_share;
        row[C_ATTENTION_MS].number = times[i].stage_ms[SFA_STAGE_ATTEND] / steps;
        row[C_KV_BYTES].number = (double)stats.kv_bytes;
      }
      status = bench_output_show(out);
    }
  }
  return status;
}

static int run(model_bench *b, bench_engine *engines, bench_peers *peers, bench_output *out) {
  bench_times times[BENCH_MOST_ENGINES];
  int64_t depths[BENCH_MOST_ENGINES];
  int n_rounds, n_engines = b->n_sides;
  for (int i = 0; i < b->n_sides; i++) {
    engines[i] = (bench_engine){.name = b->sides[i].name, .version = SFA_VERSION, .run = side_run, .arg = &b->sides[i]};
    depths[i] = b->sides[i].depth;
  }
  for (int d = 0; d < b->n_depths; d++) {
    int before = n_engines;
    bench_peers_add(peers, sfa_context_threads(b->a.ctx), peer_case(b, b->depths[d]), engines, &n_engines);
    for (int i = before; i < n_engines; i++)
      depths[i] = b->depths[d];
  }
  int status = bench_time(engines, n_engines, b->a.o->repeats, 0, times, &n_rounds);
  return status ? status : show(b, engines, depths, n_engines, times, n_rounds, out);
}

int cmd_bench_model(const app_options *o) {
  int status = app_require_model(o, "bench model");
  if (status)
    return status;
  model_bench b = {0};
  bench_output out = {0};
  bench_engine *engines = calloc(BENCH_MOST_ENGINES, sizeof *engines);
  bench_peers *peers = NULL;
  status = engines ? app_open_model(&b.a, o, false) : app_fail("out of memory for the rounds");
  if (!status)
    status = read_depths(&b);
  if (!status)
    status = bench_open(&b);
  if (!status) {
    status = bench_output_open(&out, o, columns, N_COLUMNS);
    peers = bench_peers_open(o);
    if (!status)
      status = run(&b, engines, peers, &out);
    if (!status && o->plot)
      status = bench_output_bars(&out, o->plot, "ms a step", 1, (const int[]){C_DEPTH, C_ENGINE, C_STEP_MS});
    status = bench_output_close(&out, status);
  }
  bench_peers_close(peers);
  bench_close(&b);
  free(engines);
  return status;
}
