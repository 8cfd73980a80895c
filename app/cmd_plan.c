/* sfa plan: what the planner chooses for a shape, and what it expects it to cost. */
#include "app.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Cases --------------------------------------------------------------------------------------------------------------------- */

/* Lists of the command line, each with its default; a case is one combination. */
typedef struct axis {
  const int64_t *values;
  int64_t n;
} axis;

static axis choose(const int_list *given, const int64_t *values, int64_t n) {
  return given->n ? (axis){given->values, given->n} : (axis){values, n};
}

enum { N_KEYS, N_QUERIES, HEAD_DIM, KEPT, BATCH, N_AXES };

/* The type at a place of "f32|bf16|f16|int8|int4|fp8" in the option table. */
static sfa_dtype type_at(const int_list *given, sfa_dtype otherwise) {
  static const sfa_dtype types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8, SFA_I4, SFA_E4M3};
  return given->n ? types[given->values[0]] : otherwise;
}

static const char *type_name(sfa_dtype type) {
  static const char *const names[] = {"", "f32", "bf16", "f16", "int8", "int4", "fp8"};
  return names[type];
}

/* What one combination asks the planner. With a model: its heads, a cache, and a causal mask. */
static sfa_attention_options options_of(const app *a, const int64_t at[N_AXES], const sfa_costs *costs) {
  const app_options *o = a->o;
  bool model = a->model != NULL;
  int32_t D = (int32_t)at[HEAD_DIM], k = at[KEPT] < D ? (int32_t)at[KEPT] : D;
  int32_t n_heads = o->heads > 0 ? (int32_t)o->heads : model ? a->info.n_heads : 1;
  return (sfa_attention_options){
      .struct_size = sizeof(sfa_attention_options),
      .n_heads = n_heads,
      .n_kv_heads = o->kv_heads > 0 ? (int32_t)o->kv_heads
                    : model         ? a->info.n_kv_heads
                                    : n_heads,
      .head_dim = D,
      .head_dim_v = o->head_dim_v > 0 ? (int32_t)o->head_dim_v : D,
      .n_sequences = (int32_t)at[BATCH],
      .max_seqlen_q = at[N_QUERIES] ? at[N_QUERIES] : at[N_KEYS],
      .max_seqlen_k = at[N_KEYS],
      .k_q = o->plan_k_q == 0  ? k
             : o->plan_k_q < 0 ? 0
                               : (int32_t)o->plan_k_q,
      .k_k = k,
      .row_dtype = type_at(&o->bench_dtype, SFA_F32),
      .k_dtype = type_at(&o->bench_k_type, model || o->cached ? (k ? SFA_I8 : SFA_BF16) : SFA_F32),
      .v_dtype = type_at(&o->bench_v_type, model || o->cached ? SFA_BF16 : SFA_F32),
      .causal = o->bench_causal.n ? o->bench_causal.values[0] != 0 : model,
      .has_window = o->window > 0,
      .window_size = {o->window - 1, -1},
      .n_sink_tokens = o->sinks,
      .policy = (sfa_policy)o->policy,
      .precision = (sfa_precision)o->precision,
      .eps = (float)o->eps,
      .from_cache = model || o->cached,
      .costs = costs,
  };
}

static int check_options(const sfa_attention_options *p) {
  if (p->head_dim % 8)
    return app_usage("--head-dim %d is not a multiple of 8", p->head_dim);
  if (p->head_dim_v % 8)
    return app_usage("--head-dim-v %d is not a multiple of 8", p->head_dim_v);
  if (p->n_heads % p->n_kv_heads)
    return app_usage("--heads %d is not a multiple of --kv-heads %d", p->n_heads, p->n_kv_heads);
  if (p->k_q > p->head_dim)
    return app_usage("--k-q %d keeps more features than --head-dim %d has", p->k_q, p->head_dim);
  return EXIT_OK;
}

/* ---- Output -------------------------------------------------------------------------------------------------------------------- */

static const char *human_time(double ns, char out[32]) {
  static const char *const units[] = {"ns", "us", "ms", "s"};
  int unit = 0;
  while (ns >= 1000 && unit < 3) {
    ns /= 1000;
    unit++;
  }
  snprintf(out, 32, "%.*f %s", ns < 10 ? 2 : ns < 100 ? 1 : 0, ns, units[unit]);
  return out;
}

typedef struct stage {
  const char *name, *key;
  double ns;
} stage;

enum { N_STAGES = 6 };

/* Times of the report in their order; returns their sum. */
static double stages_of(const sfa_attention_report *r, stage out[N_STAGES]) {
  const stage stages[N_STAGES] = {{"top-k", "topk_ns", r->topk_ns},    {"packing", "pack_ns", r->pack_ns},
                                  {"scores", "score_ns", r->score_ns}, {"softmax", "softmax_ns", r->softmax_ns},
                                  {"values", "value_ns", r->value_ns}, {"calls", "call_ns", r->call_ns}};
  double total = 0;
  for (int i = 0; i < N_STAGES; i++) {
    out[i] = stages[i];
    total += stages[i].ns;
  }
  return total;
}

static void print_case(const app *a, const sfa_attention_options *p, const sfa_attention_report *r) {
  char one[32], two[32], three[32];
  stage stages[N_STAGES];
  double total = stages_of(r, stages);
  printf("%lld %s x %lld keys", (long long)p->max_seqlen_q, p->max_seqlen_q == 1 ? "query" : "queries", (long long)p->max_seqlen_k);
  if (p->n_sequences > 1)
    printf(", %d sequences", p->n_sequences);
  printf(", %d %s of %d", p->n_heads, p->n_heads == 1 ? "head" : "heads", p->head_dim);
  if (p->head_dim_v != p->head_dim)
    printf(" and %d", p->head_dim_v);
  if (p->n_kv_heads != p->n_heads)
    printf(" sharing %d of keys", p->n_kv_heads);
  if (p->k_k)
    printf(", k = %d", p->k_k);
  else
    printf(", dense");
  if (p->k_k && p->k_q != p->k_k)
    printf(p->k_q ? " (queries %d)" : " (queries dense)", p->k_q);
  printf(", rows of %s, keys %s, values %s%s%s\n", type_name(p->row_dtype), type_name(p->k_dtype), type_name(p->v_dtype),
         p->causal ? ", causal" : "", p->has_window ? ", window" : "");
  printf("  way      %s: %s\n", sfa_policy_name(r->policy), r->reason);
  printf("  time     %s on one thread:", human_time(total, one));
  for (int i = 0; i < N_STAGES; i++)
    printf("%s %s %.0f %%", i ? "," : "", stages[i].name, 100 * stages[i].ns / total);
  printf("\n");
  if (p->k_k)
    printf("           dense %s, %.2f times as long%s\n", human_time(r->dense_ns, one), r->dense_ns / total,
           r->dense_wins ? ": dense wins here" : "");
  printf("  memory   keys %s (dense %s), values %s, workspace %s on %d %s\n", human_bytes((double)r->key_bytes, one),
         human_bytes((double)r->dense_key_bytes, two), human_bytes((double)r->value_bytes, three),
         human_bytes((double)r->workspace_bytes, (char[32]){0}), sfa_context_threads(a->ctx),
         sfa_context_threads(a->ctx) == 1 ? "thread" : "threads");
}

static cJSON *case_json(const sfa_attention_options *p, const sfa_attention_report *r) {
  stage stages[N_STAGES];
  const struct {
    const char *name;
    double value;
  } numbers[] = {
      {"n_q", (double)p->max_seqlen_q},
      {"n", (double)p->max_seqlen_k},
      {"batch", p->n_sequences},
      {"heads", p->n_heads},
      {"kv_heads", p->n_kv_heads},
      {"head_dim", p->head_dim},
      {"k", p->k_k},
      {"k_q", p->k_q},
  };
  cJSON *row = cJSON_CreateObject();
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    cJSON_AddNumberToObject(row, numbers[i].name, numbers[i].value);
  cJSON_AddStringToObject(row, "dtype", type_name(p->row_dtype));
  cJSON_AddStringToObject(row, "k_type", type_name(p->k_dtype));
  cJSON_AddStringToObject(row, "v_type", type_name(p->v_dtype));
  cJSON_AddBoolToObject(row, "causal", p->causal);
  cJSON_AddBoolToObject(row, "cached", p->from_cache);
  cJSON_AddStringToObject(row, "policy", sfa_policy_name(r->policy));
  cJSON_AddBoolToObject(row, "densified", r->densified);
  cJSON_AddStringToObject(row, "reason", r->reason);
  double total = stages_of(r, stages);
  for (int i = 0; i < N_STAGES; i++)
    cJSON_AddNumberToObject(row, stages[i].key, stages[i].ns);
  cJSON_AddNumberToObject(row, "total_ns", total);
  cJSON_AddNumberToObject(row, "dense_ns", r->dense_ns);
  cJSON_AddBoolToObject(row, "dense_wins", r->dense_wins);
  cJSON_AddNumberToObject(row, "key_bytes", (double)r->key_bytes);
  cJSON_AddNumberToObject(row, "dense_key_bytes", (double)r->dense_key_bytes);
  cJSON_AddNumberToObject(row, "value_bytes", (double)r->value_bytes);
  cJSON_AddNumberToObject(row, "workspace_bytes", (double)r->workspace_bytes);
  return row;
}

/* One combination: planned, then shown, behind the title if that is given, or added to the list. */
static int plan_case(const app *a, const sfa_attention_options *p, const char *title, cJSON *list) {
  sfa_attention_plan *plan;
  sfa_attention_report report = {.struct_size = sizeof report};
  int status = check_options(p);
  if (status)
    return status;
  if (sfa_attention_plan_create(a->ctx, p, &plan) != SFA_OK)
    return app_fail_status(a->ctx);
  sfa_status told = sfa_attention_plan_report(plan, &report);
  if (told == SFA_OK && list)
    cJSON_AddItemToArray(list, case_json(p, &report));
  else if (told == SFA_OK) {
    if (title)
      printf("%s\n", title);
    print_case(a, p, &report);
  }
  sfa_attention_plan_destroy(plan);
  return told == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
}

/* ---- The verb -------------------------------------------------------------------------------------------------------------------- */

/* Where the costs come from: *costs is NULL for those in the source; path: of the kept ones. */
static int find_costs(const app *a, sfa_costs *memory, const sfa_costs **costs, char *path, size_t capacity) {
  sfa_isa isa = sfa_context_isa(a->ctx);
  if (a->o->calibrate) {
    if (sfa_costs_measure(a->ctx, memory) != SFA_OK)
      return app_fail_status(a->ctx);
    *costs = memory;
    return costs_keep(memory, path, capacity);
  }
  *costs = costs_kept(isa, memory);
  if (*costs)
    costs_path(isa, path, capacity);
  return EXIT_OK;
}

static int plan_cases(const app *a, const sfa_costs *costs, const char *title, cJSON *list) {
  const app_options *o = a->o;
  const int64_t n = a->model ? a->info.context_len : 4096, head_dim = a->model ? a->info.head_dim : 64, batch = 1;
  const int64_t k = a->model && a->info.sfa_k ? a->info.sfa_k : 16, steps[] = {512 < n ? 512 : n, 1}, all = 0;
  const axis axes[N_AXES] = {
      [N_KEYS] = choose(&o->bench_n, &n, 1),
      [N_QUERIES] = a->model ? choose(&o->bench_n_q, steps, 2) : choose(&o->bench_n_q, &all, 1),
      [HEAD_DIM] = choose(&o->bench_head_dim, &head_dim, 1),
      [KEPT] = choose(&o->bench_k, &k, 1),
      [BATCH] = choose(&o->bench_batch, &batch, 1),
  };
  int64_t n_cases = 1, at[N_AXES];
  for (int i = 0; i < N_AXES; i++)
    n_cases *= axes[i].n;
  int status = EXIT_OK;
  for (int64_t number = 0; number < n_cases && !status; number++) {
    int64_t rest = number;
    for (int i = N_AXES - 1; i >= 0; i--) {
      at[i] = axes[i].values[rest % axes[i].n];
      rest /= axes[i].n;
    }
    sfa_attention_options options = options_of(a, at, costs);
    status = plan_case(a, &options, number ? NULL : title, list);
  }
  return status;
}

int cmd_plan(const app_options *o) {
  app a = {0};
  sfa_costs memory;
  const sfa_costs *costs = NULL;
  char path[1024] = "";
  int status = o->model ? app_open_model(&a, o, false) : app_open_context(&a, o, o->threads, (sfa_isa)o->isa);
  if (!status)
    status = find_costs(&a, &memory, &costs, path, sizeof path);
  cJSON *document = o->json && !status ? cJSON_CreateObject() : NULL;
  if (document) {
    cJSON_AddStringToObject(document, "isa", sfa_isa_name(sfa_context_isa(a.ctx)));
    cJSON_AddStringToObject(document, "costs", costs ? path : "source");
    cJSON_AddBoolToObject(document, "calibrated", o->calibrate);
    status = plan_cases(&a, costs, NULL, cJSON_AddArrayToObject(document, "plans"));
  } else if (!status) {
    char title[1200];
    const char *origin = !costs         ? "of the source (sfa plan --calibrate measures this machine's)"
                         : o->calibrate ? "measured now and kept in "
                                        : "measured on this machine: ";
    snprintf(title, sizeof title, "%s, costs %s%s", sfa_isa_name(sfa_context_isa(a.ctx)), origin, path);
    status = plan_cases(&a, costs, title, NULL);
    status = status ? status : app_flush();
  }
  if (document && status)
    cJSON_Delete(document);
  else if (document)
    status = app_print_json(document);
  app_close(&a);
  return status;
}
