/* Whole attention through include/sfa/attention.h: random combinations of its options against the oracle; the same bits with codes made
 * before, alone or in a batch, in chunks, with two threads, on every instruction set, and dense or with K = D; needle sweeps. */
#include "check_forward.h"
#include <math.h>
#include <sfa/attention.h>
#include <string.h>

enum { MAX_BATCH = 3 };

typedef struct attention_case {
  sfa_attention_options options;
  int32_t cu_q[MAX_BATCH + 1], cu_k[MAX_BATCH + 1]; /* first tokens of the sequences */
  bool varlen;
  sfa_dtype dtype;    /* of q, k and v as they are passed */
  float *q, *k, *v;   /* [token][head][dim] */
  sfa_rows passed[3]; /* the same, of dtype, with gaps between tokens and heads */
  float *sink_logit, *alibi_slopes;
} attention_case;

static sfa_context *context_create(check *c, sfa_isa isa, int n_threads) {
  const sfa_context_options options = {.struct_size = sizeof options, .isa = isa, .n_threads = n_threads};
  sfa_context *ctx = NULL;
  if (sfa_context_create(&options, &ctx) != SFA_OK)
    check_fail(c, "no context of %d threads for %s", n_threads, sfa_isa_name(isa));
  return ctx;
}

/* x [tokens][heads][dim] as an argument of the call: other strides, other type (whose values x already has). */
static sfa_rows pass_rows(check *c, const float *x, int64_t tokens, int heads, int dim, sfa_dtype dtype) {
  const int64_t head_stride = dim + check_pick(c, 3), token_stride = heads * head_stride + check_pick(c, 3);
  const size_t item = sfa_dtype_bytes(dtype);
  char *data = check_memory(c, (size_t)(tokens * token_stride) * item);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      c->plain->store_rows(1, dim, x + (t * heads + h) * dim, dim, dtype, data + (size_t)(t * token_stride + h * head_stride) * item, dim);
  return (sfa_rows){.data = data, .dtype = dtype, .token_stride = token_stride, .head_stride = head_stride};
}

static int kept_of(check *c, int D) {
  const int choices[] = {0, D, check_range(c, 1, D), D < 8 ? D : 8};
  return choices[check_pick(c, 4)];
}

static void case_create(check *c, attention_case *a, bool decode) {
  static const int head_dims[] = {8, 16, 24, 64, 72, 128, 264};
  sfa_attention_options *o = &a->options;
  *a = (attention_case){.varlen = check_pick(c, 2), .dtype = check_pick(c, 3) ? SFA_F32 : SFA_BF16};
  *o = (sfa_attention_options){.struct_size = sizeof *o, .n_sequences = check_range(c, 1, decode ? 2 : MAX_BATCH)};
  o->n_kv_heads = check_range(c, 1, 2);
  o->n_heads = o->n_kv_heads * check_range(c, 1, 4);
  o->head_dim = decode ? 24 : head_dims[check_pick(c, 7)];
  o->head_dim_v = check_pick(c, 3) ? 8 * check_range(c, 1, decode ? 4 : 18) : 0;
  o->k_q = kept_of(c, o->head_dim);
  o->k_k = kept_of(c, o->head_dim);
  o->k_dtype = (sfa_dtype)check_range(c, SFA_F32, SFA_I8);
  o->v_dtype = (sfa_dtype)check_range(c, SFA_F32, SFA_E4M3);
  o->softmax_scale = check_pick(c, 3) ? 0.0f : 0.2f;
  o->softcap = check_pick(c, 4) ? 0.0f : 1.0f + (float)check_pick(c, 30);
  o->causal = check_pick(c, 2);
  o->has_window = !check_pick(c, 3);
  o->window_size[0] = check_range(c, -1, 90);
  o->window_size[1] = check_range(c, -1, 40);
  o->n_sink_tokens = check_pick(c, 2) * check_range(c, 0, 70);
  for (int b = 0; b < o->n_sequences; b++) {
    int n_q = decode ? check_range(c, 1, 3) : check_range(c, a->varlen ? 0 : 1, 40),
        n_k = decode ? check_range(c, 4000, 9000) : check_range(c, 1, 200);
    if (!a->varlen && b > 0) {
      n_q = a->cu_q[1];
      n_k = a->cu_k[1];
    }
    a->cu_q[b + 1] = a->cu_q[b] + n_q;
    a->cu_k[b + 1] = a->cu_k[b] + n_k;
    o->max_seqlen_q = o->max_seqlen_q > n_q ? o->max_seqlen_q : n_q;
    o->max_seqlen_k = o->max_seqlen_k > n_k ? o->max_seqlen_k : n_k;
  }
  const int64_t n_q = a->cu_q[o->n_sequences], n_k = a->cu_k[o->n_sequences];
  const int D = o->head_dim, E = o->head_dim_v ? o->head_dim_v : D;
  a->q = check_rows(c, check_pick(c, 6) ? CHECK_NORMAL : CHECK_TIES, n_q * o->n_heads * D);
  a->k = check_rows(c, check_pick(c, 6) ? CHECK_NORMAL : CHECK_TIES, n_k * o->n_kv_heads * D);
  a->v = check_rows(c, CHECK_NORMAL, n_k * o->n_kv_heads * E);
  if (a->dtype == SFA_BF16) {
    oracle_round(a->q, (int)(n_q * o->n_heads * D), ORACLE_BF16);
    oracle_round(a->k, (int)(n_k * o->n_kv_heads * D), ORACLE_BF16);
    oracle_round(a->v, (int)(n_k * o->n_kv_heads * E), ORACLE_BF16);
  }
  a->passed[0] = pass_rows(c, a->q, n_q, o->n_heads, D, a->dtype);
  a->passed[1] = pass_rows(c, a->k, n_k, o->n_kv_heads, D, a->dtype);
  a->passed[2] = pass_rows(c, a->v, n_k, o->n_kv_heads, E, a->dtype);
  a->sink_logit = check_pick(c, 3) ? NULL : check_rows(c, CHECK_NORMAL, o->n_heads);
  a->alibi_slopes = check_pick(c, 3) ? NULL : check_rows(c, CHECK_NORMAL, o->n_heads);
  for (int h = 0; a->alibi_slopes && h < o->n_heads; h++)
    a->alibi_slopes[h] = fabsf(a->alibi_slopes[h]) * 0.02f;
}

/* Plan and run; NULL options or codes: those of the case, none. */
static void case_run(check *c, const attention_case *a, sfa_isa isa, int n_threads, const sfa_attention_options *options,
                     const sfa_attention_args *changed, float *out, float *lse) {
  sfa_context *ctx = context_create(c, isa, n_threads);
  sfa_attention_plan *plan = NULL;
  sfa_attention_args args = {.struct_size = sizeof args, .q = a->passed[0], .k = a->passed[1], .v = a->passed[2]};
  if (a->varlen) {
    args.cu_seqlens_q = a->cu_q;
    args.cu_seqlens_k = a->cu_k;
  }
  args.sink_logit = a->sink_logit;
  args.alibi_slopes = a->alibi_slopes;
  if (changed)
    args = *changed;
  args.out = out;
  args.lse = lse;
  sfa_status status = ctx ? sfa_attention_plan_create(ctx, options ? options : &a->options, &plan) : SFA_ERROR_MEMORY;
  if (status == SFA_OK) {
    args.workspace = check_memory(c, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
    status = sfa_attention_run(plan, &args);
  }
  if (status != SFA_OK)
    check_fail(c, "%s: %s", sfa_status_name(status), ctx ? sfa_context_error(ctx) : "no context");
  sfa_attention_plan_destroy(plan);
  sfa_context_destroy(ctx);
}

static const float *tokens_at(const sfa_rows *rows, int64_t token) {
  return (const void *)((const char *)rows->data + (size_t)(token * rows->token_stride) * sfa_dtype_bytes(rows->dtype));
}

/* Sequence b alone, of which queries first_q .. end_q - 1 run, over keys up to end_k. */
static void case_run_part(check *c, const attention_case *a, int b, int first_q, int end_q, int end_k, float *out, float *lse) {
  sfa_attention_options options = a->options;
  options.n_sequences = 1;
  options.max_seqlen_q = end_q - first_q;
  options.max_seqlen_k = end_k;
  sfa_attention_args args = {.struct_size = sizeof args, .q = a->passed[0], .k = a->passed[1], .v = a->passed[2]};
  args.q.data = tokens_at(&a->passed[0], a->cu_q[b] + first_q);
  args.k.data = tokens_at(&a->passed[1], a->cu_k[b]);
  args.v.data = tokens_at(&a->passed[2], a->cu_k[b]);
  args.sink_logit = a->sink_logit;
  args.alibi_slopes = a->alibi_slopes;
  case_run(c, a, c->kernels->isa, 1, &options, &args, out, lse);
}

/* The same call with codes made before. */
static void case_run_codes(check *c, const attention_case *a, float *out, float *lse) {
  const sfa_attention_options *o = &a->options;
  sfa_context *ctx = context_create(c, c->kernels->isa, 1);
  sfa_attention_args args = {.struct_size = sizeof args, .q = a->passed[0], .k = a->passed[1], .v = a->passed[2]};
  sfa_codes codes[2];
  args.cu_seqlens_q = a->varlen ? a->cu_q : NULL;
  args.cu_seqlens_k = a->varlen ? a->cu_k : NULL;
  args.sink_logit = a->sink_logit;
  args.alibi_slopes = a->alibi_slopes;
  for (int side = 0; ctx && side < 2; side++) {
    const int64_t n_rows = side ? (int64_t)a->cu_k[o->n_sequences] * o->n_kv_heads : (int64_t)a->cu_q[o->n_sequences] * o->n_heads;
    const int k = side ? o->k_k : o->k_q;
    const sfa_dtype dtype = side ? o->k_dtype : SFA_F32;
    if (k == 0)
      continue;
    void *memory = check_memory(c, sfa_codes_bytes(n_rows, o->head_dim, k, dtype));
    if (sfa_codes_place(ctx, n_rows, o->head_dim, k, dtype, memory, &codes[side]) != SFA_OK ||
        sfa_codes_select(ctx, side ? a->k : a->q, SFA_F32, o->head_dim, &codes[side]) != SFA_OK)
      check_fail(c, "codes: %s", sfa_context_error(ctx));
    *(side ? &args.k_codes : &args.q_codes) = &codes[side];
  }
  sfa_context_destroy(ctx);
  case_run(c, a, c->kernels->isa, 1, NULL, &args, out, lse);
}

/* The oracle's view of sequence b. */
static oracle_problem problem_of(const attention_case *a, int b) {
  const sfa_attention_options *o = &a->options;
  const int E = o->head_dim_v ? o->head_dim_v : o->head_dim;
  return (oracle_problem){.n_queries = a->cu_q[b + 1] - a->cu_q[b],
                          .n_keys = a->cu_k[b + 1] - a->cu_k[b],
                          .n_heads = o->n_heads,
                          .n_kv_heads = o->n_kv_heads,
                          .head_dim = o->head_dim,
                          .head_dim_v = E,
                          .k_q = o->k_q,
                          .k_k = o->k_k,
                          .k_storage = (int)o->k_dtype,
                          .v_storage = (int)o->v_dtype,
                          .softmax_scale = o->softmax_scale,
                          .softcap = o->softcap,
                          .causal = o->causal,
                          .has_window = o->has_window,
                          .window_left = (long)o->window_size[0],
                          .window_right = (long)o->window_size[1],
                          .n_sink_tokens = (long)o->n_sink_tokens,
                          .sink_logit = a->sink_logit,
                          .alibi_slopes = a->alibi_slopes,
                          .q = a->q + (int64_t)a->cu_q[b] * o->n_heads * o->head_dim,
                          .k = a->k + (int64_t)a->cu_k[b] * o->n_kv_heads * o->head_dim,
                          .v = a->v + (int64_t)a->cu_k[b] * o->n_kv_heads * E};
}

static void attention_check_case(check *c, bool decode) {
  attention_case a;
  check_begin(c, "attention", "case %lld", (long long)(c->n_passed + c->n_failed));
  case_create(c, &a, decode);
  const sfa_attention_options *o = &a.options;
  check_begin(c, "attention",
              "B %d%s H %d G %d D %d E %d k_q %d k_k %d types %d %d %d T %lld S %lld%s window %d %lld %lld sinks %lld cap %g scale %g %s%s",
              o->n_sequences, a.varlen ? " varlen" : "", o->n_heads, o->n_kv_heads, o->head_dim, o->head_dim_v, o->k_q, o->k_k, a.dtype,
              o->k_dtype, o->v_dtype, (long long)o->max_seqlen_q, (long long)o->max_seqlen_k, o->causal ? " causal" : "", o->has_window,
              (long long)o->window_size[0], (long long)o->window_size[1], (long long)o->n_sink_tokens, (double)o->softcap,
              (double)o->softmax_scale, a.sink_logit ? " sink" : "", a.alibi_slopes ? " alibi" : "");
  const int E = o->head_dim_v ? o->head_dim_v : o->head_dim;
  const int64_t rows = (int64_t)a.cu_q[o->n_sequences] * o->n_heads, n = rows * E, row_n = (int64_t)o->n_heads * E;
  float *out = check_floats(c, n), *lse = check_floats(c, rows), *again = check_floats(c, n), *again_lse = check_floats(c, rows);
  case_run(c, &a, c->kernels->isa, 1, NULL, NULL, out, lse);
  for (int b = 0; b < o->n_sequences; b++) {
    const oracle_problem p = problem_of(&a, b);
    const int T = p.n_queries, S = p.n_keys, cut = T / 2;
    const float *own = out + a.cu_q[b] * row_n, *own_lse = lse + (int64_t)a.cu_q[b] * o->n_heads;
    if (T == 0)
      continue;
    check_attention_judge(c, &p, own, own_lse);
    case_run_part(c, &a, b, 0, T, S, again, again_lse);
    check_bits(c, "alone", again, own, T * row_n);
    check_bits(c, "alone, lse", again_lse, own_lse, (int64_t)T * o->n_heads);
    case_run_part(c, &a, b, cut, T, S, again, again_lse);
    check_bits(c, "second chunk", again, own + cut * row_n, (T - cut) * row_n);
    if (o->causal && cut > 0 && S - (T - cut) > 0) { /* what comes later is not there yet */
      case_run_part(c, &a, b, 0, cut, S - (T - cut), again, again_lse);
      check_bits(c, "first chunk", again, own, cut * row_n);
    }
  }
  case_run(c, &a, c->kernels->isa, 2, NULL, NULL, again, again_lse);
  check_bits(c, "two threads", again, out, n);
  check_bits(c, "two threads, lse", again_lse, lse, rows);
  case_run(c, &a, c->plain->isa, 1, NULL, NULL, again, again_lse);
  check_bits(c, "plain C", again, out, n);
  case_run_codes(c, &a, again, again_lse);
  check_bits(c, "codes made before", again, out, n);
  if (o->k_q > 0 && o->k_q < o->head_dim && o->k_k > 0 && o->k_k < o->head_dim) {
    sfa_attention_options paper = *o;
    paper.policy = SFA_POLICY_PAPER;
    case_run(c, &a, c->kernels->isa, 1, &paper, NULL, again, again_lse);
    if (o->k_dtype != SFA_I8 || o->k_k <= SFA_EXACT_TERMS || o->k_q <= SFA_EXACT_TERMS) {
      check_bits(c, "Algorithm 1 of the paper", again, out, n);
      check_bits(c, "Algorithm 1 of the paper, lse", again_lse, lse, rows);
    }
    for (int b = 0; b < o->n_sequences; b++) {
      const oracle_problem p = problem_of(&a, b);
      if (p.n_queries)
        check_attention_judge(c, &p, again + a.cu_q[b] * row_n, again_lse + (int64_t)a.cu_q[b] * o->n_heads);
    }
  }
  if (o->k_k == 0 || o->k_k == o->head_dim) { /* the dense twin */
    sfa_attention_options twin = *o;
    twin.k_k = o->k_k ? 0 : o->head_dim;
    twin.k_q = o->k_q == o->head_dim ? 0 : o->k_q ? o->k_q : o->head_dim;
    case_run(c, &a, c->kernels->isa, 1, &twin, NULL, again, again_lse);
    check_bits(c, "K = D", again, out, n);
    check_bits(c, "K = D, lse", again_lse, lse, rows);
  }
  check_end(c);
}

static void check_public(check *c) {
  const int n_cases = c->quick ? 60 : 1000;
  for (int i = 0; i < n_cases; i++)
    attention_check_case(c, i % 30 == 29);
}

/* One key alone shares a feature with the query, by far: its V row comes out bit for bit, unless the mask forbids the key. */
static void public_needle_case(check *c, int D, int K, int T, int S, int needle) {
  attention_case a = {.dtype = SFA_F32};
  const int query = check_pick(c, T), position = query + S - T, E = 40;
  const int window = check_pick(c, 2) ? check_range(c, 0, S) : -1;
  a.options = (sfa_attention_options){.struct_size = sizeof a.options, .n_heads = 1, .head_dim = D, .head_dim_v = E, .max_seqlen_q = T};
  a.options.max_seqlen_k = S;
  a.options.k_q = a.options.k_k = K;
  a.options.causal = 1;
  a.options.has_window = window >= 0;
  a.options.window_size[0] = window;
  a.options.window_size[1] = -1;
  a.cu_q[1] = T;
  a.cu_k[1] = S;
  check_begin(c, "public needle", "D %d K %d T %d S %d needle %d query at %d window %d", D, K, T, S, needle, position, window);
  a.q = check_rows(c, CHECK_NORMAL, (int64_t)T * D);
  a.k = check_floats(c, (int64_t)S * D);
  a.v = check_rows(c, CHECK_NORMAL, (int64_t)S * E);
  const int feature = check_pick(c, D), other = (feature + 1 + check_pick(c, D - 1)) % D;
  memset(a.q + (int64_t)query * D, 0, (size_t)D * sizeof *a.q);
  memset(a.k, 0, (size_t)S * (size_t)D * sizeof *a.k);
  a.q[query * D + feature] = 64.0f;
  for (int j = 0; j < S; j++)
    a.k[j * D + (j == needle ? feature : other)] = 64.0f;
  a.passed[0] = (sfa_rows){.data = a.q};
  a.passed[1] = (sfa_rows){.data = a.k};
  a.passed[2] = (sfa_rows){.data = a.v};
  float *out = check_floats(c, (int64_t)T * E), *lse = check_floats(c, T);
  case_run(c, &a, c->kernels->isa, 1, NULL, NULL, out, lse);
  const oracle_problem p = problem_of(&a, 0);
  const bool sees = oracle_sees(&p, query, needle), equal = !memcmp(out + query * E, a.v + needle * E, (size_t)E * sizeof *out);
  if (sees)
    check_bits(c, "needle's values", out + query * E, a.v + needle * E, E);
  else if (equal)
    check_fail(c, "the query sees a key that it must not see");
  check_end(c);
}

static void check_public_needle(check *c) {
  static const int shapes[][4] = {{64, 8, 20, 150}, {128, 16, 1, 200}, {24, 0, 70, 70}, {264, 264, 5, 66}};
  for (int s = 0; s < 4; s++)
    for (int needle = 0; needle < shapes[s][3]; needle++)
      public_needle_case(c, shapes[s][0], shapes[s][1], shapes[s][2], shapes[s][3], needle);
  for (int needle = 4090; needle < 4102; needle++) /* where spans of keys meet */
    public_needle_case(c, 24, 8, 10, 4105, needle);
}

const check_entry check_attention_entries[] = {{"attention", check_public}, {"public_needle", check_public_needle}, {NULL, NULL}};
