/* Caches, pages of the caller, decode, captured graphs and streams on a GPU. */
#include "cuda_check.h"

#include "base/half.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef CUDA_CHECK_GRAPHS /* builds with CUDA */
#include <cuda_runtime_api.h>
#endif

/* ---- Memory ---------------------------------------------------------------------------------------------------------- */

void cuda_check_memory(cuda_check *t) {
  enum { N = 100000 };
  float *x = host_normals(1, N, false), *back = host_memory(N * sizeof *x);
  void *a = device_of(t, x, N * sizeof *x), *b = device_of(t, NULL, N * sizeof *x), *huge = a;
  cuda_ok(t, t->gpu, sfa_memory_copy(t->gpu, b, a, N * sizeof *x), "a copy on the device");
  fetch(t, back, b, N * sizeof *x);
  cuda_expect(t, !memcmp(x, back, N * sizeof *x), "copies do not come back as they were");
  cuda_ok(t, t->gpu, sfa_memory_zero(t->gpu, b, N * sizeof *x), "sfa_memory_zero");
  fetch(t, back, b, N * sizeof *x);
  int other = 0;
  for (int i = 0; i < N; i++)
    other += back[i] != 0;
  cuda_expect(t, !other, "%d of %d elements are not cleared", other, N);
  cuda_expect(t, sfa_memory_alloc(t->gpu, (size_t)1 << 46, &huge) == SFA_ERROR_MEMORY && !huge, "64 TiB are not refused");
  cuda_expect(t, strstr(sfa_context_error(t->gpu), "free") != NULL, "out of memory: \"%s\"", sfa_context_error(t->gpu));
  fetch(t, back, a, N * sizeof *x); /* and all is well after it */
  void *own = sfa_stream_of(t->gpu);
  sfa_context_options co = {.struct_size = sizeof co, .device = SFA_DEVICE_CUDA};
  sfa_context *second = NULL;
  cuda_expect(t, sfa_context_device(t->gpu) == SFA_DEVICE_CUDA && own, "the context has no stream");
  if (cuda_expect(t, sfa_context_create(&co, &second) == SFA_OK && sfa_stream_of(second) != own, "no second context of its own stream")) {
    sfa_stream_set(t->gpu, sfa_stream_of(second));
    cuda_expect(t, sfa_stream_of(t->gpu) == sfa_stream_of(second), "the caller's stream is not in use");
    cuda_ok(t, t->gpu, sfa_memory_zero(t->gpu, b, sizeof *x), "sfa_memory_zero on it");
    cuda_ok(t, t->gpu, sfa_stream_wait(t->gpu), "waiting for it");
    sfa_stream_set(t->gpu, NULL);
    cuda_expect(t, sfa_stream_of(t->gpu) == own, "the context's own stream is not back");
  }
  sfa_context_destroy(second);
  sfa_memory_free(t->gpu, a), sfa_memory_free(t->gpu, b), sfa_memory_free(t->gpu, NULL);
  free(x), free(back);
}

/* ---- A cache there and one here -------------------------------------------------------------------------------------- */

enum { LAYERS = 2, SLOTS = 4, LEN = 333 };

typedef struct pair {
  int64_t len; /* of the inputs */
  int32_t H, G, D, E;
  sfa_dtype k_dtype, v_dtype;
  int32_t k[LAYERS];
  sfa_cache *gpu, *cpu;
  float *q, *keys, *v;    /* [len][H][D], [len][G][D], [len][G][E] */
  float *dq, *dkeys, *dv; /* the same there */
} pair;

static pair new_pair(cuda_check *t, int64_t len, int32_t H, int32_t G, int32_t D, int32_t E, int32_t k, sfa_dtype k_dtype,
                     sfa_dtype v_dtype) {
  pair p = {.len = len, .H = H, .G = G, .D = D, .E = E, .k_dtype = k_dtype, .v_dtype = v_dtype, .k = {k, 0}};
  sfa_cache_options o = {.struct_size = sizeof o,
                         .n_layers = LAYERS,
                         .n_kv_heads = G,
                         .head_dim = D,
                         .head_dim_v = E,
                         .k = p.k,
                         .k_dtype = k_dtype,
                         .v_dtype = v_dtype,
                         .n_sequences = SLOTS};
  cuda_ok(t, t->gpu, sfa_cache_create(t->gpu, &o, &p.gpu), "sfa_cache_create");
  cuda_ok(t, t->cpu, sfa_cache_create(t->cpu, &o, &p.cpu), "sfa_cache_create on the CPU");
  p.q = host_normals(11, len * H * D, true);
  p.keys = host_normals(12, len * G * D, true);
  p.v = host_normals(13, len * G * E, true);
  p.dq = device_of(t, p.q, (size_t)len * (size_t)(H * D) * sizeof(float));
  p.dkeys = device_of(t, p.keys, (size_t)len * (size_t)(G * D) * sizeof(float));
  p.dv = device_of(t, p.v, (size_t)len * (size_t)(G * E) * sizeof(float));
  return p;
}

static void free_pair(cuda_check *t, pair *p) {
  sfa_cache_destroy(p->gpu), sfa_cache_destroy(p->cpu);
  sfa_memory_free(t->gpu, p->dq), sfa_memory_free(t->gpu, p->dkeys), sfa_memory_free(t->gpu, p->dv);
  free(p->q), free(p->keys), free(p->v);
}

/* Tokens first .. end - 1 of the inputs to a sequence, in every layer of both caches. */
static void append(cuda_check *t, pair *p, int32_t sequence, int64_t first, int64_t end) {
  sfa_rows dk = {.data = p->dkeys + first * p->G * p->D}, dv = {.data = p->dv + first * p->G * p->E};
  sfa_rows k = {.data = p->keys + first * p->G * p->D}, v = {.data = p->v + first * p->G * p->E};
  for (int32_t layer = 0; layer < LAYERS; layer++) {
    cuda_ok(t, t->gpu, sfa_cache_append(p->gpu, sequence, layer, end - first, &dk, &dv), "sfa_cache_append");
    cuda_ok(t, t->cpu, sfa_cache_append(p->cpu, sequence, layer, end - first, &k, &v), "sfa_cache_append on the CPU");
  }
}

static void expect_same_pages(cuda_check *t, const pair *p, const char *what) {
  for (int32_t sequence = 0; sequence < SLOTS; sequence++)
    for (int32_t layer = 0; layer < LAYERS; layer++) {
      int64_t len = sfa_cache_len(p->gpu, sequence, layer);
      cuda_expect(t, len == sfa_cache_len(p->cpu, sequence, layer), "%s: sequence %d has %lld tokens, on the CPU %lld", what, sequence,
                  (long long)len, (long long)sfa_cache_len(p->cpu, sequence, layer));
      size_t bytes = sfa_cache_page_bytes(p->cpu, layer);
      unsigned char *a = host_memory(bytes), *b = host_memory(bytes);
      for (int64_t page = 0; page * 64 < len; page++) {
        if (!cuda_ok(t, t->gpu, sfa_cache_page_save(p->gpu, sequence, layer, page, a), what) ||
            !cuda_ok(t, t->cpu, sfa_cache_page_save(p->cpu, sequence, layer, page, b), what))
          break;
        size_t at = 0;
        while (at < bytes && a[at] == b[at])
          at++;
        if (!cuda_expect(t, at == bytes, "%s: page %lld of layer %d of sequence %d differs from the CPU's at byte %zu: %d for %d", what,
                         (long long)page, layer, sequence, at, a[at], b[at]))
          break;
      }
      free(a), free(b);
    }
}

/* ---- Attention over it ----------------------------------------------------------------------------------------------------- */

typedef struct attended {
  float *out, *lse, *dropped;
} attended;

static void free_attended(attended *a) { free(a->out), free(a->lse), free(a->dropped); }

/* Calls with the last tokens of the inputs as queries of each sequence. */
typedef struct reading {
  int32_t layer, B, T;
  const int32_t *sequences, *cu_q; /* [B], [B + 1]: how many queries each has, at most T; NULL: T */
  float eps;
  sfa_policy policy;
  bool dense_q, q_codes, window, sinks, alibi; /* queries as codes; a window of 500 keys */
  bool only_out;                               /* lse and dropped are not wanted */
  int32_t sink_tokens;
} reading;

static int64_t first_query(const reading *r, int32_t b) { return r->cu_q ? r->cu_q[b] : (int64_t)b * r->T; }
static int64_t n_queries(const reading *r, int32_t b) { return first_query(r, b + 1) - first_query(r, b); }

static sfa_attention_options options_of(const pair *p, const reading *r) {
  return (sfa_attention_options){.struct_size = sizeof(sfa_attention_options),
                                 .n_heads = p->H,
                                 .n_kv_heads = p->G,
                                 .head_dim = p->D,
                                 .head_dim_v = p->E,
                                 .n_sequences = r->B,
                                 .max_seqlen_q = r->T,
                                 .max_seqlen_k = p->len,
                                 .k_q = r->dense_q ? 0 : p->k[r->layer],
                                 .k_k = p->k[r->layer],
                                 .from_cache = 1,
                                 .k_dtype = p->k_dtype       ? p->k_dtype
                                            : p->k[r->layer] ? SFA_I8
                                                             : SFA_BF16,
                                 .v_dtype = p->v_dtype ? p->v_dtype : SFA_BF16,
                                 .causal = 1,
                                 .has_window = r->window,
                                 .window_size = {500, 0},
                                 .n_sink_tokens = r->sink_tokens,
                                 .eps = r->eps,
                                 .policy = r->policy};
}

enum { MOST_HEADS = 16 };
static const float sink_logits[MOST_HEADS] = {2, -1, 0.5f, 3, 0, 1}, slopes[MOST_HEADS] = {0.25f, 0.0625f, 0.5f, 0.001f};

/* timed: with the times of its stages. */
static attended attend(cuda_check *t, const pair *p, const reading *r, bool timed) {
  const sfa_attention_options o = options_of(p, r);
  size_t n = (size_t)(first_query(r, r->B) * p->H);
  attended a = {host_memory(n * (size_t)p->E * 4), host_memory(n * 4), host_memory(n * 4)};
  sfa_attention_plan *plan;
  if (!cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, &o, &plan), "plan"))
    return a;
  float *q = device_of(t, NULL, n * (size_t)p->D * 4), *out = device_of(t, NULL, n * (size_t)p->E * 4), *lse = device_of(t, NULL, n * 4);
  float *dropped = device_of(t, NULL, n * 4);
  for (int32_t b = 0; b < r->B; b++) {
    int64_t queries = n_queries(r, b), first = sfa_cache_len(p->gpu, r->sequences[b], r->layer) - queries;
    sfa_memory_copy(t->gpu, q + first_query(r, b) * p->H * p->D, p->q + first * p->H * p->D, (size_t)(queries * p->H * p->D) * 4);
  }
  void *workspace = device_of(t, NULL, sfa_attention_workspace_bytes(plan));
  void *cu_q = r->cu_q ? device_of(t, r->cu_q, (size_t)(r->B + 1) * sizeof *r->cu_q) : NULL;
  void *dev_sinks = device_of(t, sink_logits, sizeof sink_logits), *dev_slopes = device_of(t, slopes, sizeof slopes);
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q.data = q,
                             .out = out,
                             .lse = r->only_out ? NULL : lse,
                             .dropped = r->only_out ? NULL : dropped,
                             .cu_seqlens_q = cu_q,
                             .sink_logit = r->sinks ? dev_sinks : NULL,
                             .alibi_slopes = r->alibi ? dev_slopes : NULL,
                             .workspace = workspace};
  int64_t stage_ns[SFA_STAGE_COUNT] = {0, 0, 7, 7}; /* added to */
  args.stage_ns = timed ? stage_ns : NULL;
  void *code_memory = NULL;
  sfa_codes codes;
  if (r->q_codes) {
    code_memory = device_of(t, NULL, sfa_codes_bytes((int64_t)n, p->D, o.k_q, SFA_F32));
    cuda_ok(t, t->gpu, sfa_codes_place(t->gpu, (int64_t)n, p->D, o.k_q, SFA_F32, code_memory, &codes), "sfa_codes_place");
    cuda_ok(t, t->gpu, sfa_codes_select(t->gpu, q, SFA_F32, 0, &codes), "sfa_codes_select");
    args.q.data = NULL;
    args.q_codes = &codes;
  }
  if (cuda_ok(t, t->gpu, sfa_attention_run_cached(plan, &args, p->gpu, r->layer, r->sequences), "sfa_attention_run_cached")) {
    fetch(t, a.out, out, n * (size_t)p->E * 4);
    fetch(t, a.lse, lse, n * 4);
    fetch(t, a.dropped, dropped, n * 4);
  }
  sfa_attention_report report = {.struct_size = sizeof report};
  cuda_ok(t, t->gpu, sfa_attention_plan_report(plan, &report), "sfa_attention_plan_report");
  if (timed)
    cuda_expect(t, stage_ns[SFA_STAGE_ATTEND] > 7 && (report.policy != SFA_POLICY_KEYS || stage_ns[SFA_STAGE_JOIN] > 7),
                "no time passes in a stage: keys %lld ns, join %lld ns", (long long)stage_ns[SFA_STAGE_ATTEND],
                (long long)stage_ns[SFA_STAGE_JOIN]);
  void *all[] = {q, out, lse, dropped, workspace, cu_q, dev_sinks, dev_slopes, code_memory};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    sfa_memory_free(t->gpu, all[i]);
  sfa_attention_plan_destroy(plan);
  return a;
}

/* Sequence b against the oracle over the inputs that it holds. eps: what may be left out; the bound of docs/MATH.md 7 on top. */
static void expect_sequence(cuda_check *t, const pair *p, const char *what, const reading *r, int32_t b, const attended *a) {
  int64_t len = sfa_cache_len(p->gpu, r->sequences[b], r->layer), T = n_queries(r, b), rows = T * p->H, first = first_query(r, b) * p->H;
  bool whole = r->policy == SFA_POLICY_INT8 || r->policy == SFA_POLICY_SP_INT8;
  cuda_call c = {.o = options_of(p, r),
                 .n_q = T,
                 .n_k = len,
                 .q = p->q + (len - T) * p->H * p->D,
                 .k = p->keys,
                 .v = p->v,
                 .sink_logit = r->sinks ? (float *)(uintptr_t)sink_logits : NULL,
                 .alibi_slopes = r->alibi ? (float *)(uintptr_t)slopes : NULL};
  c.o.n_sequences = 1;
  c.o.max_seqlen_q = T;
  c.o.max_seqlen_k = len;
  cuda_call_reference(&c, whole);
  const float *out = a->out + first * p->E;
  char name[128];
  snprintf(name, sizeof name, "%s, sequence %d of %lld tokens", what, r->sequences[b], (long long)len);
  if (r->eps == 0)
    cuda_expect_close(t, name, rows * p->E, out, c.ref, c.naive);
  double lse_error = 0, eps_error = 0, most_dropped = 0;
  for (int64_t i = 0; i < rows; i++) {
    double rho = a->dropped[first + i], got = a->lse[first + i], error = got == c.ref_lse[i] ? 0 : fabs(got - c.ref_lse[i]);
    lse_error = !(error <= lse_error) ? error : lse_error;
    most_dropped = !(rho <= most_dropped) ? rho : most_dropped;
    for (int32_t e = 0; e < p->E; e++) {
      double beyond = fabs(out[i * p->E + e] - c.ref[i * p->E + e]) - 2 * rho * 5.5; /* no normal number here is larger */
      eps_error = !(beyond <= eps_error) ? beyond : eps_error;
    }
  }
  cuda_expect(t, lse_error <= (whole ? 0.1 : 5e-3), "%s: error of lse %g", name, lse_error);
  cuda_expect(t, most_dropped <= r->eps && (whole || eps_error <= 0.03), "%s: left out %g of %g, error beyond the bound %g", name,
              most_dropped, (double)r->eps, eps_error);
  free(c.ref), free(c.ref_lse), free(c.naive);
}

/* All sequences; those that come again in a batch have the same bits again. And the call, made again, has them. */
static void expect_attended(cuda_check *t, const pair *p, const char *what, const reading *r) {
  attended a = attend(t, p, r, false), again = attend(t, p, r, true);
  size_t row_bytes = (size_t)(p->H * p->E) * sizeof(float);
  for (int32_t b = 0; b < r->B; b++) {
    int32_t twin = 0;
    while (r->sequences[twin] != r->sequences[b] || n_queries(r, twin) != n_queries(r, b))
      twin++;
    if (twin == b)
      expect_sequence(t, p, what, r, b, &a);
    else
      cuda_expect(
          t,
          !memcmp(a.out + first_query(r, b) * p->H * p->E, a.out + first_query(r, twin) * p->H * p->E, (size_t)n_queries(r, b) * row_bytes),
          "%s: sequence %d has other bits at %d of the batch than at %d", what, r->sequences[b], b, twin);
  }
  size_t n = (size_t)first_query(r, r->B);
  cuda_expect(t, !memcmp(a.out, again.out, n * row_bytes) && !memcmp(a.lse, again.lse, n * (size_t)p->H * sizeof *a.lse),
              "%s: other bits the second time", what);
  free_attended(&a), free_attended(&again);
}

void cuda_check_cache(cuda_check *t) {
  static const struct {
    int32_t H, G, D, E, k;
    sfa_dtype k_dtype, v_dtype;
  } shapes[] = {{4, 2, 64, 64, 8, 0, 0},
                {2, 2, 128, 128, 16, SFA_I8, SFA_I8},
                {4, 1, 256, 128, 32, SFA_F16, SFA_I4},
                {2, 1, 40, 96, 8, SFA_BF16, SFA_F16},
                {4, 2, 64, 128, 8, SFA_I8, SFA_E4M3},
                {2, 2, 96, 40, 12, SFA_F32, SFA_F32}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    pair p = new_pair(t, LEN, shapes[i].H, shapes[i].G, shapes[i].D, shapes[i].E, shapes[i].k, shapes[i].k_dtype, shapes[i].v_dtype);
    append(t, &p, 0, 0, 130);
    append(t, &p, 0, 130, 131);
    append(t, &p, 0, 131, LEN);
    append(t, &p, 2, 0, 64);
    expect_same_pages(t, &p, "after appending");
    for (int side = 0; side < 2; side++) {
      sfa_cache *cache = side ? p.cpu : p.gpu;
      sfa_context *ctx = side ? t->cpu : t->gpu;
      cuda_ok(t, ctx, sfa_cache_fork(cache, 0, 1, 150), "sfa_cache_fork");
      cuda_ok(t, ctx, sfa_cache_truncate(cache, 0, 200), "sfa_cache_truncate");
    }
    append(t, &p, 1, 150, 222);
    append(t, &p, 0, 200, 260);
    expect_same_pages(t, &p, "after a fork and a cut");
    cuda_expect(t, sfa_cache_bytes(p.gpu) == sfa_cache_bytes(p.cpu), "%zu bytes, on the CPU %zu", sfa_cache_bytes(p.gpu),
                sfa_cache_bytes(p.cpu));
    /* Keys as numbers; pages given back to another sequence. */
    int32_t width = shapes[i].k;
    uint8_t *ids[2] = {host_memory(100 * (size_t)width), host_memory(100 * (size_t)width)};
    float *values[2] = {host_memory(100 * (size_t)width * 4), host_memory(100 * (size_t)width * 4)};
    cuda_ok(t, t->gpu, sfa_cache_read_keys(p.gpu, 1, 0, shapes[i].G - 1, 33, 100, ids[0], values[0]), "sfa_cache_read_keys");
    cuda_ok(t, t->cpu, sfa_cache_read_keys(p.cpu, 1, 0, shapes[i].G - 1, 33, 100, ids[1], values[1]), "sfa_cache_read_keys");
    cuda_expect(t, !memcmp(ids[0], ids[1], 100 * (size_t)width) && !memcmp(values[0], values[1], 100 * (size_t)width * 4),
                "other keys than the CPU");
    for (int j = 0; j < 2; j++)
      free(ids[j]), free(values[j]);
    for (int32_t layer = 0; layer < LAYERS; layer++) {
      size_t bytes = sfa_cache_page_bytes(p.gpu, layer);
      unsigned char *images = host_memory(4 * bytes);
      const void *pages[4];
      for (int j = 0; j < 4; j++) {
        pages[j] = images + (size_t)j * bytes;
        cuda_ok(t, t->gpu, sfa_cache_page_save(p.gpu, 1, layer, j, images + (size_t)j * bytes), "sfa_cache_page_save");
      }
      cuda_ok(t, t->gpu, sfa_cache_map(p.gpu, 3, layer, 222, pages), "sfa_cache_map");
      for (int j = 0; j < 4; j++)
        cuda_ok(t, t->cpu, sfa_cache_page_save(p.cpu, 1, layer, j, images + (size_t)j * bytes), "sfa_cache_page_save");
      cuda_ok(t, t->cpu, sfa_cache_map(p.cpu, 3, layer, 222, pages), "sfa_cache_map");
      expect_same_pages(t, &p, "after mapping");
      cuda_ok(t, t->cpu, sfa_cache_truncate(p.cpu, 3, 0), "sfa_cache_truncate"); /* the images go */
      cuda_ok(t, t->gpu, sfa_cache_truncate(p.gpu, 3, 0), "sfa_cache_truncate");
      free(images);
    }
    free_pair(t, &p);
  }
}

/* More tokens than are stored at once, turned, some of them nowhere: every byte of the pool as the CPU has it. */
void cuda_check_slots(cuda_check *t) {
  enum { TOKENS = 33000, PAGES = TOKENS / 64 + 2, D = 16, PAIRS = 4 };
  const sfa_page_options page = {.struct_size = sizeof page, .n_kv_heads = 1, .head_dim = D, .k = 3, .v_dtype = SFA_I8};
  const size_t pool_bytes = PAGES * sfa_page_bytes(&page), row_bytes = TOKENS * D * sizeof(float),
               table_bytes = TOKENS * PAIRS * sizeof(float);
  float *x[] = {host_normals(31, TOKENS * D, true), host_normals(32, TOKENS * D, true), host_normals(33, TOKENS * PAIRS, false),
                host_normals(34, TOKENS * PAIRS, false)};
  int64_t *slots = host_memory(TOKENS * sizeof *slots);
  for (int64_t i = 0; i < TOKENS; i++)
    slots[i] = i % 1000 == 7 ? -1 : (i * 7919 + 5) % (PAGES * 64); /* 7919 divides no number of places */
  unsigned char *pools[2] = {host_memory(pool_bytes), host_memory(pool_bytes)};
  void *there[6] = {device_of(t, x[0], row_bytes),
                    device_of(t, x[1], row_bytes),
                    device_of(t, x[2], table_bytes),
                    device_of(t, x[3], table_bytes),
                    device_of(t, slots, TOKENS * sizeof *slots),
                    device_of(t, pools[0], pool_bytes)};
  for (int side = 0; side < 2; side++) {
    sfa_context *ctx = side ? t->cpu : t->gpu;
    const sfa_rope rope = {side ? x[2] : there[2], side ? x[3] : there[3], 2 * PAIRS, 0};
    const sfa_rows k = {.data = side ? x[0] : there[0], .rope = &rope}, v = {.data = side ? x[1] : there[1]};
    cuda_ok(t, ctx, sfa_pages_store(ctx, &page, side ? pools[1] : there[5], PAGES, TOKENS, side ? slots : there[4], &k, &v),
            "sfa_pages_store");
  }
  fetch(t, pools[0], there[5], pool_bytes);
  size_t at = 0;
  while (at < pool_bytes && pools[0][at] == pools[1][at])
    at++;
  cuda_expect(t, at == pool_bytes, "byte %zu of a pool of %zu: %d, on the CPU %d", at, pool_bytes, pools[0][at % pool_bytes],
              pools[1][at % pool_bytes]);
  for (int i = 0; i < 6; i++)
    sfa_memory_free(t->gpu, there[i]);
  for (int i = 0; i < 4; i++)
    free(x[i]);
  free(slots), free(pools[0]), free(pools[1]);
}

/* Pages of the caller's: the same tokens in a pool, in an order of their own; the same bits as the cache. */
static void paged(cuda_check *t, const pair *p, int32_t T, const int32_t *cu_q, sfa_policy policy) {
  enum { B = 2, POOL = 9, MOST = 6 };
  static const int32_t table[B][MOST] = {{3, 7, 1, 8, 0, -5}, {2, 6, 99, 99, 99, 99}}, lens[B] = {260, 64};
  sfa_page_options page = {.struct_size = sizeof page,
                           .n_kv_heads = p->G,
                           .head_dim = p->D,
                           .head_dim_v = p->E,
                           .k = p->k[0],
                           .k_dtype = p->k_dtype,
                           .v_dtype = p->v_dtype};
  static const int32_t sequences[B] = {0, 2};
  const reading r = {.B = B, .T = T, .sequences = sequences, .cu_q = cu_q, .policy = policy};
  const sfa_attention_options o = options_of(p, &r);
  size_t n = (size_t)(first_query(&r, B) * p->H), page_bytes = sfa_page_bytes(&page);
  unsigned char *pool = device_of(t, NULL, POOL * page_bytes);
  for (int32_t b = 0; b < B; b++) {
    int64_t slots[261];
    for (int32_t i = 0; i < lens[b]; i++)
      slots[i] = table[b][i / 64] * 64 + i % 64;
    slots[lens[b]] = b ? -1 : POOL * 64; /* nowhere */
    void *there = device_of(t, slots, (size_t)(lens[b] + 1) * sizeof *slots);
    sfa_rows k = {.data = p->dkeys}, v = {.data = p->dv};
    cuda_ok(t, t->gpu, sfa_pages_store(t->gpu, &page, pool, POOL, lens[b] + 1, there, &k, &v), "sfa_pages_store");
    sfa_memory_free(t->gpu, there);
  }
  attended cached = attend(t, p, &r, false);
  sfa_attention_plan *plan;
  if (cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, &o, &plan), "plan")) {
    float *q = device_of(t, NULL, n * (size_t)p->D * 4), *out = device_of(t, NULL, n * (size_t)p->E * 4),
          *back = host_memory(n * (size_t)p->E * 4);
    for (int32_t b = 0; b < B; b++)
      sfa_memory_copy(t->gpu, q + first_query(&r, b) * p->H * p->D, p->q + (lens[b] - n_queries(&r, b)) * p->H * p->D,
                      (size_t)(n_queries(&r, b) * p->H * p->D) * 4);
    void *dev_cu_q = cu_q ? device_of(t, cu_q, (B + 1) * sizeof *cu_q) : NULL;
    void *workspace = device_of(t, NULL, sfa_attention_workspace_bytes(plan)), *block_table = device_of(t, table, sizeof table),
         *seqlens = device_of(t, lens, sizeof lens);
    sfa_attention_args args = {.struct_size = sizeof args, .q.data = q, .out = out, .cu_seqlens_q = dev_cu_q, .workspace = workspace};
    sfa_paged_kv kv = {.struct_size = sizeof kv,
                       .page = page,
                       .pool = pool,
                       .n_pages = POOL,
                       .block_table = block_table,
                       .max_pages = MOST,
                       .cache_seqlens = seqlens};
    if (cuda_ok(t, t->gpu, sfa_attention_run_paged(plan, &args, &kv), "sfa_attention_run_paged")) {
      fetch(t, back, out, n * (size_t)p->E * 4);
      cuda_expect(t, !memcmp(back, cached.out, n * (size_t)p->E * 4),
                  "%d queries, policy %s: other bits from pages of the caller than from the cache", T, sfa_policy_name(policy));
    }
    sfa_memory_free(t->gpu, q), sfa_memory_free(t->gpu, out), sfa_memory_free(t->gpu, workspace), sfa_memory_free(t->gpu, block_table),
        sfa_memory_free(t->gpu, seqlens), sfa_memory_free(t->gpu, dev_cu_q);
    free(back);
    sfa_attention_plan_destroy(plan);
  }
  free_attended(&cached);
  sfa_memory_free(t->gpu, pool);
}

void cuda_check_decode(cuda_check *t) {
  static const struct {
    int32_t H, G, D, E, k;
    sfa_dtype k_dtype, v_dtype;
  } shapes[] = {{2, 2, 128, 128, 16, 0, 0},
                {8, 2, 128, 128, 16, SFA_I8, SFA_I8},
                {16, 1, 64, 64, 8, SFA_I8, SFA_BF16},
                {4, 2, 256, 256, 16, SFA_I8, SFA_BF16},
                {4, 2, 128, 128, 8, SFA_BF16, SFA_BF16},
                {4, 2, 40, 96, 8, SFA_I8, SFA_I8},
                {8, 2, 128, 128, 16, SFA_I8, SFA_E4M3},
                {2, 2, 64, 64, 64, SFA_BF16, SFA_E4M3},
                {2, 1, 96, 64, 12, SFA_F32, SFA_I4}};
  static const int32_t sequences[] = {0, 2, 1}, following[] = {1, 2}, several[] = {0, 2, 1, 2}, cu_q[] = {0, 3, 3, 8, 9};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    pair p = new_pair(t, LEN, shapes[i].H, shapes[i].G, shapes[i].D, shapes[i].E, shapes[i].k, shapes[i].k_dtype, shapes[i].v_dtype);
    append(t, &p, 0, 0, 260);
    append(t, &p, 1, 0, LEN);
    append(t, &p, 2, 0, 64);
    for (int32_t layer = 0; layer < LAYERS; layer++) {
      static const int32_t queries[] = {1, 3, 60};
      for (int j = 0; j < 3; j++) {
        char what[96];
        snprintf(what, sizeof what, "shape %zu, layer %d, %d queries", i, layer, queries[j]);
        expect_attended(t, &p, what, &(reading){.layer = layer, .B = 3, .T = queries[j], .sequences = sequences});
      }
      for (int j = 0; j < 2; j++) {
        sfa_policy policy = j ? SFA_POLICY_BF16 : SFA_POLICY_KEYS;
        char what[96];
        snprintf(what, sizeof what, "shape %zu, layer %d, numbers of queries, policy %s", i, layer, sfa_policy_name(policy));
        expect_attended(t, &p, what, &(reading){.layer = layer, .B = 4, .T = 5, .sequences = several, .cu_q = cu_q, .policy = policy});
      }
      expect_attended(t, &p, "neighbours", &(reading){.layer = layer, .B = 2, .T = 1, .sequences = following});
      expect_attended(t, &p, "eps 0.05", &(reading){.layer = layer, .B = 3, .T = 1, .sequences = sequences, .eps = 0.05f});
      expect_attended(t, &p, "dense queries", &(reading){.layer = layer, .B = 3, .T = 2, .sequences = sequences, .dense_q = true});
      for (int j = 0; layer == 0 && j < 2; j++) {
        sfa_policy policy = j ? SFA_POLICY_BF16 : SFA_POLICY_KEYS;
        expect_attended(t, &p, "queries as codes",
                        &(reading){.layer = layer, .B = 3, .T = 2, .sequences = sequences, .q_codes = true, .policy = policy});
        expect_attended(t, &p, "queries as codes, numbers of them",
                        &(reading){.layer = layer, .B = 4, .T = 5, .sequences = several, .cu_q = cu_q, .q_codes = true, .policy = policy});
      }
      expect_attended(t, &p, "eps 0.05, numbers of queries",
                      &(reading){.layer = layer, .B = 4, .T = 5, .sequences = several, .cu_q = cu_q, .eps = 0.05f});
    }
    paged(t, &p, 1, NULL, SFA_POLICY_AUTO);
    paged(t, &p, 60, NULL, SFA_POLICY_BF16);
    paged(t, &p, 5, cu_q, SFA_POLICY_AUTO);
    paged(t, &p, 5, cu_q, SFA_POLICY_BF16);
    free_pair(t, &p);
  }
  for (int32_t group = 1; group <= 16; group++) {
    pair p = new_pair(t, 200, 2 * group, 2, 64, 64, 8, SFA_I8, SFA_I8);
    char what[32];
    snprintf(what, sizeof what, "groups of %d", group);
    append(t, &p, 0, 0, 200);
    append(t, &p, 1, 0, 77);
    for (int32_t n = 1; n <= 2; n++)
      expect_attended(t, &p, what, &(reading){.B = 2, .T = n, .sequences = (const int32_t[]){0, 1}});
    free_pair(t, &p);
  }
}

/* ---- Long caches ----------------------------------------------------------------------------------------------------------- */

/* However many tokens a cache holds, the workspace of a prefill over it is that of so many keys as are written out at once: beside these
 * grows only the table of its pages. */
static void bounded(cuda_check *t, sfa_policy policy) {
  size_t bytes[3];
  for (int i = 0; i < 3; i++) {
    sfa_attention_options o = {.struct_size = sizeof o,
                               .n_heads = 32,
                               .n_kv_heads = 8,
                               .head_dim = 128,
                               .max_seqlen_q = 512,
                               .max_seqlen_k = (int64_t)1 << (16 + 4 * i),
                               .k_q = 16,
                               .k_k = 16,
                               .from_cache = 1,
                               .k_dtype = SFA_I8,
                               .v_dtype = SFA_I8,
                               .causal = 1,
                               .policy = policy};
    sfa_attention_plan *plan = NULL;
    cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, &o, &plan), "plan");
    bytes[i] = plan ? sfa_attention_workspace_bytes(plan) : 0;
    sfa_attention_plan_destroy(plan);
  }
  for (int i = 1; i < 3; i++)
    cuda_expect(t, bytes[i] - bytes[0] == (((size_t)1 << (16 + 4 * i)) - (1 << 16)) / 64 * sizeof(void *) && bytes[0] < (size_t)3 << 27,
                "policy %s: a workspace of %zu bytes for 2^16 keys, and of %zu for 2^%d", sfa_policy_name(policy), bytes[0], bytes[i],
                16 + 4 * i);
}

/* And however many the sequences, 1280 keys of each are written out at once. */
static void bounded_batch(cuda_check *t) {
  enum { B = 1000, H = 8, D = 128 };
  const double keys = 1280.0 * B * H * 2 * D * 2;
  const sfa_attention_options o = {.struct_size = sizeof o,
                                   .n_heads = H,
                                   .head_dim = D,
                                   .n_sequences = B,
                                   .max_seqlen_q = 1,
                                   .max_seqlen_k = (int64_t)1 << 20,
                                   .from_cache = 1,
                                   .k_dtype = SFA_BF16,
                                   .v_dtype = SFA_BF16,
                                   .policy = SFA_POLICY_BF16};
  sfa_attention_plan *plan = NULL;
  if (!cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, &o, &plan), "plan"))
    return;
  double bytes = (double)sfa_attention_workspace_bytes(plan);
  cuda_expect(t, bytes > keys && bytes < 1.1 * keys, "a workspace of %.0f bytes for %d sequences", bytes, B);
  sfa_attention_plan_destroy(plan);
}

/* A batch so large that the keys of a sequence are written out in turns: sequences within a turn, at its border and beyond. Most are short.
 */
void cuda_check_long(cuda_check *t) {
  enum { B = 300, MOST = 2700 };
  static const struct {
    int32_t H, G, D, E;
    sfa_policy policy;
    bool window, sinks, alibi;
  } cases[] = {{4, 2, 64, 64, SFA_POLICY_BF16, false, true, false},
               {2, 1, 256, 64, SFA_POLICY_BF16, true, true, true},
               {2, 1, 128, 192, SFA_POLICY_SP_BF16, false, false, true},
               {2, 1, 128, 128, SFA_POLICY_INT8, true, false, false},
               {4, 1, 64, 256, SFA_POLICY_SP_INT8, false, true, false}};
  static const int64_t lens[SLOTS] = {MOST, 1281, 1280, 3};
  bounded(t, SFA_POLICY_BF16);
  if (t->of_hopper)
    bounded(t, SFA_POLICY_SP_INT8);
  bounded_batch(t);
  int32_t sequences[B], cu_q[B + 1] = {0};
  for (int32_t b = 0; b < B; b++) {
    sequences[b] = b < 3 * SLOTS ? b % SLOTS : SLOTS - 1;
    cu_q[b + 1] = cu_q[b] + (b % 5 ? b % 3 : 3);
  }
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (cases[i].policy != SFA_POLICY_BF16 && !t->of_hopper)
      continue;
    pair p = new_pair(t, MOST, cases[i].H, cases[i].G, cases[i].D, cases[i].E, 8, 0, 0);
    for (int32_t s = 0; s < SLOTS; s++)
      append(t, &p, s, 0, lens[s]);
    for (int packed = 0; packed < 2; packed++) {
      char what[96];
      snprintf(what, sizeof what, "case %zu in turns%s", i, packed ? ", numbers of queries" : "");
      reading r = {.layer = (int32_t)i % LAYERS,
                   .B = B,
                   .T = 3,
                   .sequences = sequences,
                   .cu_q = packed ? cu_q : NULL,
                   .policy = cases[i].policy,
                   .window = cases[i].window,
                   .sink_tokens = cases[i].window ? 1300 : 0,
                   .sinks = cases[i].sinks,
                   .alibi = cases[i].alibi};
      expect_attended(t, &p, what, &r);
      if (i > 0)
        continue;
      attended whole = attend(t, &p, &r, false);
      r.only_out = true;
      attended out = attend(t, &p, &r, false);
      cuda_expect(t, !memcmp(whole.out, out.out, (size_t)(first_query(&r, B) * p.H * p.E) * sizeof(float)), "%s: other bits without lse",
                  what);
      free_attended(&whole), free_attended(&out);
    }
    for (int j = 0; cases[i].window && j < 4; j++) { /* it begins far behind the first key, for one sequence and for a batch in turns */
      static const int32_t far[B], sink_tokens[] = {0, 350, 700, 350};
      char what[96];
      snprintf(what, sizeof what, "case %zu, a window %s behind %d sink tokens", i, j < 3 ? "alone" : "in turns", sink_tokens[j]);
      expect_attended(t, &p, what,
                      &(reading){.layer = (int32_t)i % LAYERS,
                                 .B = j < 3 ? 1 : B,
                                 .T = 3,
                                 .sequences = far,
                                 .policy = cases[i].policy,
                                 .window = true,
                                 .sinks = true,
                                 .sink_tokens = sink_tokens[j]});
    }
    free_pair(t, &p);
  }
}

#ifdef CUDA_CHECK_GRAPHS
/* ---- Graphs ---------------------------------------------------------------------------------------------------------------- */

/* A prefill and its gradients, captured and run on other numbers, give the bits of calls. */
static void captured_gradients(cuda_check *t, cudaStream_t stream) {
  enum { H = 2, D = 64, T = 150, N = T * H * D };
  sfa_attention_options o = {
      .struct_size = sizeof o, .n_heads = H, .head_dim = D, .max_seqlen_q = T, .max_seqlen_k = T, .k_q = 8, .k_k = 8, .causal = 1};
  sfa_attention_plan *plan = NULL;
  if (!t->of_hopper || !cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, &o, &plan), "plan"))
    return;
  float *x = device_of(t, NULL, N * sizeof *x), *out[5], *there = host_memory(N * sizeof *x), *expected = host_memory(N * sizeof *x);
  for (int i = 0; i < 5; i++)
    out[i] = device_of(t, NULL, N * sizeof *x); /* out, lse, d_q, d_k, d_v */
  size_t forward = sfa_attention_workspace_bytes(plan), backward = sfa_attention_backward_workspace_bytes(plan);
  void *workspace = device_of(t, NULL, forward > backward ? forward : backward);
  sfa_attention_args args = {
      .struct_size = sizeof args, .q.data = x, .k.data = x, .v.data = x, .out = out[0], .lse = out[1], .workspace = workspace};
  sfa_attention_grad_args grad = {
      .struct_size = sizeof grad, .forward = &args, .d_out = x, .d_q = out[2], .d_k = out[3], .d_v = out[4], .workspace = workspace};
  cudaGraph_t graph;
  cudaGraphExec_t step = NULL;
  cuda_expect(t, cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "no capture");
  bool good = cuda_ok(t, t->gpu, sfa_attention_run(plan, &args), "captured prefill") &&
              cuda_ok(t, t->gpu, sfa_attention_backward(plan, &grad), "captured gradients");
  cudaError_t error = cudaStreamEndCapture(stream, &graph);
  good = cuda_expect(t, good && error == cudaSuccess && cudaGraphInstantiate(&step, graph, 0) == cudaSuccess, "the capture is broken: %s",
                     cudaGetErrorString(error));
  for (uint64_t round = 0; good && round < 3; round++) {
    float *normals = host_normals(90 + round, N, true);
    sfa_memory_copy(t->gpu, x, normals, N * sizeof *x);
    free(normals);
    for (int i = 0; i < 5; i++) {
      sfa_memory_zero(t->gpu, out[i], N * sizeof *x);
      cuda_expect(t, cudaGraphLaunch(step, stream) == cudaSuccess, "the graph does not run");
      fetch(t, there, out[i], N * sizeof *x);
      sfa_memory_zero(t->gpu, out[i], N * sizeof *x);
      cuda_ok(t, t->gpu, sfa_attention_run(plan, &args), "prefill");
      cuda_ok(t, t->gpu, sfa_attention_backward(plan, &grad), "gradients");
      fetch(t, expected, out[i], N * sizeof *x);
      cuda_expect(t, !memcmp(there, expected, N * sizeof *x), "round %d, result %d: the graph gives other bits than the calls", (int)round,
                  i);
    }
  }
  if (step)
    cudaGraphExecDestroy(step), cudaGraphDestroy(graph);
  for (int i = 0; i < 5; i++)
    sfa_memory_free(t->gpu, out[i]);
  sfa_memory_free(t->gpu, x), sfa_memory_free(t->gpu, workspace);
  free(there), free(expected);
  sfa_attention_plan_destroy(plan);
}

/* A step of decoding, captured once and run again and again, gives what calls give: it finds length and pages in device memory. */
void cuda_check_graph(cuda_check *t) {
  enum { FIRST = 120, STEPS = 20, H = 4, G = 2, D = 128 };
  pair p = new_pair(t, LEN, H, G, D, D, 16, 0, 0);
  append(t, &p, 0, 0, FIRST);
  append(t, &p, 1, 0, FIRST);
  sfa_attention_options o = {.struct_size = sizeof o,
                             .n_heads = H,
                             .n_kv_heads = G,
                             .head_dim = D,
                             .max_seqlen_q = 1,
                             .max_seqlen_k = 256,
                             .k_q = 16,
                             .k_k = 16,
                             .from_cache = 1,
                             .k_dtype = SFA_I8,
                             .v_dtype = SFA_BF16,
                             .causal = 1};
  sfa_attention_plan *plan = NULL;
  if (!cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, &o, &plan), "plan")) {
    free_pair(t, &p);
    return;
  }
  float *q = device_of(t, NULL, H * D * 4), *k = device_of(t, NULL, G * D * 4), *v = device_of(t, NULL, G * D * 4),
        *out = device_of(t, NULL, H * D * 4);
  float there[H * D], expected[H * D];
  void *workspace = device_of(t, NULL, sfa_attention_workspace_bytes(plan));
  sfa_attention_args args = {.struct_size = sizeof args, .q.data = q, .out = out, .workspace = workspace};
  sfa_rows key = {.data = k}, value = {.data = v};
  cudaGraph_t graph;
  cudaGraphExec_t step = NULL;
  cudaStream_t stream;
  int32_t slots[] = {0, 1};
  cuda_ok(t, t->gpu, sfa_cache_reserve(p.gpu, 0, 256), "sfa_cache_reserve");
  int64_t moves = sfa_cache_moves(p.gpu);
  cuda_expect(t, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "no stream");
  cuda_ok(t, t->gpu, sfa_stream_wait(t->gpu), "sfa_stream_wait");
  cuda_ok(t, t->gpu, sfa_stream_set(t->gpu, stream), "sfa_stream_set");
  captured_gradients(t, stream);
  for (int32_t i = 0; i < STEPS; i++) {
    int64_t token = FIRST + i;
    const float *input_q = p.dq + token * H * D, *input_k = p.dkeys + token * G * D, *input_v = p.dv + token * G * D;
    sfa_memory_copy(t->gpu, q, input_q, H * D * 4), sfa_memory_copy(t->gpu, k, input_k, G * D * 4),
        sfa_memory_copy(t->gpu, v, input_v, G * D * 4);
    if (i == 0) {
      cuda_expect(t, cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "no capture");
      bool good = cuda_ok(t, t->gpu, sfa_cache_append(p.gpu, 0, 0, 1, &key, &value), "captured append") &&
                  cuda_ok(t, t->gpu, sfa_cache_append(p.gpu, 0, 1, 1, &key, &value), "captured append") &&
                  cuda_ok(t, t->gpu, sfa_attention_run_cached(plan, &args, p.gpu, 0, &slots[0]), "captured attention");
      cudaError_t error = cudaStreamEndCapture(stream, &graph);
      cuda_expect(t, good && error == cudaSuccess, "the capture is broken: %s", cudaGetErrorString(error));
      if (!good || error != cudaSuccess || !cuda_expect(t, cudaGraphInstantiate(&step, graph, 0) == cudaSuccess, "no graph"))
        break;
    } else
      cuda_ok(t, t->gpu, sfa_cache_advance(p.gpu, 0, 1), "sfa_cache_advance");
    cuda_expect(t, cudaGraphLaunch(step, stream) == cudaSuccess, "the graph does not run");
    fetch(t, there, out, sizeof there);
    cuda_ok(t, t->gpu, sfa_cache_append(p.gpu, 1, 0, 1, &key, &value), "append");
    cuda_ok(t, t->gpu, sfa_cache_append(p.gpu, 1, 1, 1, &key, &value), "append");
    cuda_ok(t, t->gpu, sfa_attention_run_cached(plan, &args, p.gpu, 0, &slots[1]), "attention");
    fetch(t, expected, out, sizeof expected);
    if (!cuda_expect(t, !memcmp(there, expected, sizeof there), "step %d of the graph gives other bits than the calls", i))
      break;
  }
  cuda_expect(t, sfa_cache_len(p.gpu, 0, 0) == FIRST + STEPS && sfa_cache_moves(p.gpu) == moves, "the cache holds %lld tokens",
              (long long)sfa_cache_len(p.gpu, 0, 0));
  for (int64_t page = 0; page < 3; page++) {
    size_t bytes = sfa_cache_page_bytes(p.gpu, 0);
    unsigned char *a = host_memory(bytes), *b = host_memory(bytes);
    cuda_ok(t, t->gpu, sfa_cache_page_save(p.gpu, 0, 0, page, a), "sfa_cache_page_save");
    cuda_ok(t, t->gpu, sfa_cache_page_save(p.gpu, 1, 0, page, b), "sfa_cache_page_save");
    cuda_expect(t, !memcmp(a, b, bytes), "page %lld of the graph's tokens differs", (long long)page);
    free(a), free(b);
  }
  sfa_stream_wait(t->gpu);
  sfa_stream_set(t->gpu, NULL);
  if (step)
    cudaGraphExecDestroy(step), cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  sfa_memory_free(t->gpu, q), sfa_memory_free(t->gpu, k), sfa_memory_free(t->gpu, v), sfa_memory_free(t->gpu, out),
      sfa_memory_free(t->gpu, workspace);
  sfa_attention_plan_destroy(plan);
  free_pair(t, &p);
}
#endif

/* ---- Streams --------------------------------------------------------------------------------------------------------------- */

/* Two contexts work at the same time, each on its stream; each gets the bits that it gets alone. */
void cuda_check_streams(cuda_check *t) {
  enum { H = 4, D = 128, T = 700, ROUNDS = 10, SIDES = 2 };
  sfa_context_options co = {.struct_size = sizeof co, .device = SFA_DEVICE_CUDA};
  sfa_context *ctx[SIDES] = {t->gpu, NULL};
  if (!cuda_expect(t, sfa_context_create(&co, &ctx[1]) == SFA_OK, "no second context"))
    return;
  sfa_attention_options o = {
      .struct_size = sizeof o, .n_heads = H, .head_dim = D, .max_seqlen_q = T, .max_seqlen_k = T, .k_q = 16, .k_k = 16, .causal = 1};
  size_t bytes = (size_t)T * H * D * sizeof(float);
  sfa_attention_plan *plan[SIDES];
  void *q[SIDES], *workspace[SIDES], *out[SIDES];
  float *alone[SIDES], *together = host_memory(bytes);
  bool good = true;
  for (int i = 0; i < SIDES; i++) {
    float *x = host_normals(40 + (uint64_t)i, (int64_t)T * H * D, true);
    good = cuda_ok(t, ctx[i], sfa_attention_plan_create(ctx[i], &o, &plan[i]), "plan") && good;
    q[i] = device_of(t, x, bytes), out[i] = device_of(t, NULL, bytes), alone[i] = host_memory(bytes);
    workspace[i] = device_of(t, NULL, sfa_attention_workspace_bytes(plan[i]));
    cuda_ok(t, t->gpu, sfa_stream_wait(t->gpu), "sfa_stream_wait");
    free(x);
  }
  sfa_attention_args args = {.struct_size = sizeof args};
  for (int round = 0; good && round < ROUNDS; round++) {
    for (int i = 0; i < SIDES; i++) {
      args.q.data = args.k.data = args.v.data = q[i];
      args.out = out[i];
      args.workspace = workspace[i];
      good = cuda_ok(t, ctx[i], sfa_attention_run(plan[i], &args), "run") && good;
      if (round == 0) { /* alone */
        cuda_ok(t, ctx[i], sfa_stream_wait(ctx[i]), "sfa_stream_wait");
        sfa_memory_copy(ctx[i], alone[i], out[i], bytes);
      }
    }
    for (int i = 0; good && i < SIDES; i++) {
      sfa_memory_copy(ctx[i], together, out[i], bytes);
      cuda_ok(t, ctx[i], sfa_stream_wait(ctx[i]), "sfa_stream_wait");
      cuda_expect(t, !memcmp(alone[i], together, bytes), "round %d, context %d: other bits with another stream beside", round, i);
    }
  }
  for (int i = 0; i < SIDES; i++) {
    sfa_memory_free(t->gpu, q[i]), sfa_memory_free(t->gpu, out[i]), sfa_memory_free(t->gpu, workspace[i]);
    sfa_attention_plan_destroy(plan[i]);
    free(alone[i]);
  }
  free(together);
  sfa_context_destroy(ctx[1]);
}
