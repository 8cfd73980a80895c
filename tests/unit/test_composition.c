/* Everything with everything: window x attention sinks x where keys lie x type of keys x type of values x eps x GQA x queries x rows, every
 * cell against the definition in double. Shapes come from a seed, a new one for each problem. */
#include "attention_call.h"

enum { H = 4, E = 16, N_SEQUENCES = 2, STORE = 99991 };

enum { WINDOWS = 2, SINKS = 4, CODES = 8, VALUES = 6, GROUPS = 2, QUERIES = 2, ROWS = 2 }; /* a problem */
enum { ARRAYS, CACHE, TABLE, PLACES };                                                     /* three ways to pass it, */
enum { BUDGETS = 2 };                                                                      /* exact or not */
enum { N_PROBLEMS = WINDOWS * SINKS * CODES * VALUES * GROUPS * QUERIES * ROWS, N_CELLS = N_PROBLEMS * PLACES * BUDGETS };

static const sfa_dtype key_types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8},
                       value_types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8, SFA_I4, SFA_E4M3};
static const float budgets[] = {0, 1e-2f};

typedef struct problem {
  char name[120];
  sfa_attention_options o;
  int32_t cu_k[N_SEQUENCES + 1];
  float *q, *k, *v, sinks[H];
  bool has_sinks;
  double *out, *lse;                      /* the definition */
  double out_limit, rms_limit, lse_limit; /* how far one may be from it */
  double largest_v;
} problem;

static int64_t pick(sfa_rng *rng, int64_t least, int64_t most) {
  return least + (int64_t)(sfa_rng_next(rng) % (uint64_t)(most - least + 1));
}

static int64_t n_rows(const problem *p) { return N_SEQUENCES * p->o.max_seqlen_q * H; }

/* The next digit of a mixed-radix number. */
static int digit(int *rest, int radix) {
  int d = *rest % radix;
  *rest /= radix;
  return d;
}

static oracle_problem sequence(const problem *p, int b) {
  const sfa_attention_args a = {
      .q.data = p->q, .k.data = p->k, .v.data = p->v, .cu_seqlens_k = p->cu_k, .sink_logit = p->has_sinks ? p->sinks : NULL};
  int64_t q0, k0;
  return oracle_of(&p->o, &a, b, &q0, &k0);
}

/* The definition, and from naive code in f32, in the two most different of its natural orders, how well f32 can do: docs/NUMERICS.md. */
static void solve(problem *p) {
  const int64_t rows = n_rows(p), n = rows * E, rows_b = rows / N_SEQUENCES;
  double worst = 0, worst_rms = 0, worst_lse = 0, largest = 0, largest_lse = 0;
  float *out = memory((size_t)n * sizeof *out), *lse = memory((size_t)rows * sizeof *lse);
  p->out = memory((size_t)n * sizeof *p->out);
  p->lse = memory((size_t)rows * sizeof *p->lse);
  for (int b = 0; b < N_SEQUENCES; b++) {
    oracle_problem truth = sequence(p, b);
    oracle_attention_f64(&truth, p->out + b * rows_b * E, p->lse + b * rows_b);
  }
  for (int order = 0; order < 2; order++) {
    double sum = 0;
    for (int b = 0; b < N_SEQUENCES; b++) {
      oracle_problem naive = sequence(p, b);
      naive.scale_first = order;
      naive.features_backwards = order;
      oracle_attention_f32(&naive, out + b * rows_b * E, lse + b * rows_b);
    }
    for (int64_t i = 0; i < n; i++) {
      double error = fabs((double)out[i] - p->out[i]);
      worst = fmax(worst, error);
      largest = fmax(largest, fabs(p->out[i]));
      sum += error * error;
    }
    worst_rms = fmax(worst_rms, sqrt(sum / (double)n));
    for (int64_t i = 0; i < rows; i++) {
      worst_lse = fmax(worst_lse, fabs((double)lse[i] - p->lse[i]));
      largest_lse = fmax(largest_lse, fabs(p->lse[i]));
    }
  }
  const double ulp = 0x1p-23,
               exponential = 2e-7; /* what each weight may err by, of which few outputs of few keys tell more than naive code */
  p->out_limit = 2 * worst + 2 * ulp * largest + exponential * p->largest_v;
  p->rms_limit = 2 * worst_rms + ulp / 2 * largest + exponential * largest;
  p->lse_limit = 2 * worst_lse + 2 * ulp * largest_lse;
  free(out);
  free(lse);
}

/* n numbers out of a common store, from a place that the seed chooses: drawing them anew would take longer than attention does. */
static float *slice(const float *store, sfa_rng *rng, int64_t n) {
  float *x = memory((size_t)n * sizeof *x);
  for (int64_t i = 0, at = pick(rng, 0, STORE - 1); i < n; i++)
    x[i] = store[(at + i) % STORE];
  return x;
}

static problem new_problem(int number, const float *store) {
  problem p = {.has_sinks = false};
  sfa_attention_options *o = &p.o;
  sfa_rng rng = {(uint64_t)number + 1};
  int rest = number, window = digit(&rest, WINDOWS), sinks = digit(&rest, SINKS), code = digit(&rest, CODES), value = digit(&rest, VALUES),
      group = digit(&rest, GROUPS), sparse_q = digit(&rest, QUERIES), many = digit(&rest, ROWS);
  bool long_one = !many && number % 97 == 0; /* over a span's end */
  *o = (sfa_attention_options){.struct_size = sizeof *o, .n_heads = H, .n_sequences = N_SEQUENCES, .head_dim_v = E};
  o->n_kv_heads = group ? 1 : H;
  o->head_dim = long_one ? 8 : 8 * (int32_t)pick(&rng, 2, 5);
  o->max_seqlen_q = many ? (group ? pick(&rng, 5, 6) : pick(&rng, 17, 19)) : pick(&rng, 1, group ? 4 : 6);
  o->max_seqlen_k = long_one ? pick(&rng, 4090, 4170) : pick(&rng, 62, 131);
  o->k_k = code < 4 ? 0 : (int32_t)pick(&rng, 3, 7);
  o->k_q = sparse_q ? (int32_t)pick(&rng, 3, 7) : 0;
  o->k_dtype = key_types[code % 4];
  o->v_dtype = value_types[value];
  o->softmax_scale = pick(&rng, 0, 1) ? 0 : 0.6f;
  o->causal = (int32_t)pick(&rng, 0, 1);
  o->has_window = window;
  o->window_size[0] = pick(&rng, 5, 80);
  o->window_size[1] = pick(&rng, -1, 3);
  o->n_sink_tokens = sinks & 1 ? pick(&rng, 1, 5) : 0;
  o->precision = SFA_PRECISION_F32;
  p.has_sinks = sinks & 2;
  p.cu_k[1] = (int32_t)o->max_seqlen_k;
  p.cu_k[2] = p.cu_k[1] + (int32_t)pick(&rng, 1, 60);
  for (int h = 0; h < H; h++)
    p.sinks[h] = (float)sfa_rng_normal(&rng);
  int64_t n_k = (int64_t)p.cu_k[2] * o->n_kv_heads;
  p.q = slice(store, &rng, n_rows(&p) * o->head_dim);
  p.k = slice(store, &rng, n_k * o->head_dim);
  p.v = slice(store, &rng, n_k * E);
  for (int64_t i = 0; i < n_k * E; i++)
    p.largest_v = fmax(p.largest_v, fabs((double)p.v[i]));
  snprintf(p.name, sizeof p.name, "problem %d: %s %s, keys %d %s, values %d, group %d, %s q, T %lld, S %lld", number,
           window ? "window" : "full", (const char *[]){"no sinks", "sink tokens", "sink logits", "both sinks"}[sinks], key_types[code % 4],
           code < 4 ? "dense" : "codes", value_types[value], group ? 4 : 1, sparse_q ? "sparse" : "dense", (long long)o->max_seqlen_q,
           (long long)o->max_seqlen_k);
  solve(&p);
  return p;
}

static void free_problem(problem *p) {
  free(p->q);
  free(p->k);
  free(p->v);
  free(p->out);
  free(p->lse);
}

/* ---- Where keys and values lie ----------------------------------------------------------------------------------------------- */

static sfa_rows rows_at(const float *x, int64_t token, int32_t heads, int32_t dim) { return (sfa_rows){.data = x + token * heads * dim}; }

/* A cache with both sequences, each appended in two parts. */
static sfa_cache *new_cache(sfa_context *ctx, const problem *p) {
  sfa_cache_options options = {.struct_size = sizeof options,
                               .n_layers = 1,
                               .n_kv_heads = p->o.n_kv_heads,
                               .head_dim = p->o.head_dim,
                               .head_dim_v = E,
                               .k = &p->o.k_k,
                               .k_dtype = p->o.k_dtype,
                               .v_dtype = p->o.v_dtype,
                               .n_sequences = N_SEQUENCES};
  sfa_cache *cache;
  assert_int_equal(sfa_cache_create(ctx, &options, &cache), SFA_OK);
  for (int b = 0; b < N_SEQUENCES; b++) {
    int64_t n = p->cu_k[b + 1] - p->cu_k[b], cut = n / 3;
    for (int part = 0; part < 2; part++) {
      sfa_rows k = rows_at(p->k, p->cu_k[b] + part * cut, p->o.n_kv_heads, p->o.head_dim),
               v = rows_at(p->v, p->cu_k[b] + part * cut, p->o.n_kv_heads, E);
      assert_int_equal(sfa_cache_append(cache, b, 0, part ? n - cut : cut, &k, &v), SFA_OK);
    }
  }
  return cache;
}

/* Pages in disorder. */
typedef struct paged {
  sfa_paged_kv kv;
  void *pool;
  int32_t *table, seqlens[N_SEQUENCES];
} paged;

static paged new_pages(sfa_context *ctx, const problem *p) {
  const sfa_attention_options *o = &p->o;
  int64_t max_pages = (o->max_seqlen_k + 63) / 64 + 1, n_pages = N_SEQUENCES * max_pages, n = p->cu_k[N_SEQUENCES];
  paged out = {.kv = {.struct_size = sizeof out.kv,
                      .page = {.struct_size = sizeof out.kv.page,
                               .n_kv_heads = o->n_kv_heads,
                               .head_dim = o->head_dim,
                               .head_dim_v = E,
                               .k = o->k_k,
                               .k_dtype = o->k_dtype,
                               .v_dtype = o->v_dtype},
                      .n_pages = n_pages,
                      .max_pages = max_pages}};
  int64_t *slots = memory((size_t)n * sizeof *slots);
  out.kv.pool = out.pool = memory((size_t)n_pages * sfa_page_bytes(&out.kv.page));
  out.kv.block_table = out.table = memory((size_t)n_pages * sizeof *out.table);
  for (int b = 0; b < N_SEQUENCES; b++) {
    out.seqlens[b] = p->cu_k[b + 1] - p->cu_k[b];
    for (int64_t j = 0; j < out.seqlens[b]; j++) {
      int64_t page = n_pages - 1 - (j / 64 * N_SEQUENCES + b); /* from the end, the sequences in turns */
      out.table[b * max_pages + j / 64] = (int32_t)page;
      slots[p->cu_k[b] + j] = page * 64 + j % 64;
    }
  }
  sfa_rows k = {.data = p->k}, v = {.data = p->v};
  if (sfa_pages_store(ctx, &out.kv.page, out.pool, n_pages, n, slots, &k, &v) != SFA_OK)
    fail_msg("%s: %s", p->name, sfa_context_error(ctx));
  free(slots);
  return out;
}

static void free_pages(paged *pages) {
  free(pages->pool);
  free(pages->table);
}

/* ---- Cells ------------------------------------------------------------------------------------------------------------------- */

typedef struct result {
  float *out, *lse, *dropped;
} result;

static void run_cell(sfa_context *ctx, const problem *p, int place, float eps, const sfa_cache *cache, paged *pages, const result *to) {
  sfa_attention_options o = p->o;
  sfa_attention_plan *plan;
  static const int32_t sequences[] = {0, 1};
  o.eps = eps;
  sfa_status status = sfa_attention_plan_create(ctx, &o, &plan);
  if (status != SFA_OK)
    fail_msg("%s: %s", p->name, sfa_context_error(ctx));
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q.data = p->q,
                             .sink_logit = p->has_sinks ? p->sinks : NULL,
                             .out = to->out,
                             .lse = to->lse,
                             .dropped = to->dropped,
                             .workspace = memory(sfa_attention_workspace_bytes(plan))};
  pages->kv.cache_seqlens = pages->seqlens;
  if (place == CACHE) {
    status = sfa_attention_run_cached(plan, &args, cache, 0, sequences);
  } else if (place == TABLE) {
    status = sfa_attention_run_paged(plan, &args, &pages->kv);
  } else {
    args.k.data = p->k;
    args.v.data = p->v;
    args.cu_seqlens_k = p->cu_k;
    status = sfa_attention_run(plan, &args);
  }
  if (status != SFA_OK)
    fail_msg("%s: %s", p->name, sfa_context_error(ctx));
  free(args.workspace);
  sfa_attention_plan_destroy(plan);
}

/* One cell against the definition; exact cells by the rule of docs/NUMERICS.md, the others by their certificate. Returns the largest rho.
 */
static double judge(const problem *p, const char *cell, float eps, const result *got) {
  int64_t rows = n_rows(p);
  double sum = 0, most = 0;
  for (int64_t row = 0; row < rows; row++) {
    double rho = (double)got->dropped[row],
           slack = 2.13 * rho * p->largest_v; /* int8 and int4 values may be 1 % above those that came, e4m3 6.3 % */
    double lse_error = (double)got->lse[row] == p->lse[row] ? 0 : fabs((double)got->lse[row] - p->lse[row]);
    if (!(rho >= 0 && rho <= (double)eps))
      fail_msg("%s, %s: row %lld drops %g of %g", p->name, cell, (long long)row, rho, (double)eps);
    if (!(lse_error <= p->lse_limit))
      fail_msg("%s, %s: lse of row %lld errs by %g, limit %g", p->name, cell, (long long)row, lse_error, p->lse_limit);
    for (int e = 0; e < E; e++) {
      double error = fabs((double)got->out[row * E + e] - p->out[row * E + e]);
      if (!(error <= p->out_limit + slack))
        fail_msg("%s, %s: out of row %lld errs by %g, limit %g + %g", p->name, cell, (long long)row, error, p->out_limit, slack);
      sum += error * error;
    }
    most = fmax(most, rho);
  }
  if (most == 0 && !(sqrt(sum / (double)(rows * E)) <= p->rms_limit))
    fail_msg("%s, %s: rms error %g, limit %g", p->name, cell, sqrt(sum / (double)(rows * E)), p->rms_limit);
  return most;
}

static result new_result(const problem *p) {
  int64_t rows = n_rows(p);
  return (result){memory((size_t)(rows * E) * sizeof(float)), memory((size_t)rows * sizeof(float)), memory((size_t)rows * sizeof(float))};
}

static void free_result(result *r) {
  free(r->out);
  free(r->lse);
  free(r->dropped);
}

static void every_cell(void **state) {
  (void)state;
  static const char *const cells[PLACES][BUDGETS] = {
      {"arrays, exact", "arrays, eps"}, {"cache, exact", "cache, eps"}, {"block table, exact", "block table, eps"}};
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  int n_run = 0, n_dropping = 0;
  float *store = normals(1, STORE);
  for (int number = 0; number < N_PROBLEMS; number++) {
    problem p = new_problem(number, store);
    sfa_cache *cache = new_cache(ctx, &p);
    paged pages = new_pages(ctx, &p);
    result first = new_result(&p), got = new_result(&p);
    for (int budget = 0; budget < BUDGETS; budget++)
      for (int place = 0; place < PLACES; place++) {
        result *to = place == ARRAYS ? &first : &got;
        run_cell(ctx, &p, place, budgets[budget], cache, &pages, to);
        n_dropping += judge(&p, cells[place][budget], budgets[budget], to) > 0;
        n_run++;
        if (place && (memcmp(first.out, got.out, (size_t)(n_rows(&p) * E) * sizeof(float)) ||
                      memcmp(first.lse, got.lse, (size_t)n_rows(&p) * sizeof(float))))
          fail_msg("%s, %s: other bits than with arrays", p.name, cells[place][budget]);
      }
    free_result(&first);
    free_result(&got);
    free_pages(&pages);
    sfa_cache_destroy(cache);
    free_problem(&p);
  }
  free(store);
  sfa_context_destroy(ctx);
  print_message("%d cells, of which %d left values out\n", n_run, n_dropping);
  assert_int_equal(n_run, N_CELLS);
  assert_true(n_dropping > N_CELLS / 40);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(every_cell)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
