/* Which way a plan takes. */
#include "attn/attn_policy.h"

#include "attn/attn.h"
#include "attn/attn_cost.h"
#include "attn/attn_half.h"
#include "attn/attn_keys.h"
#include "attn/attn_paper.h"

#include <stdio.h>

static bool needs_gpu(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]) {
  (void)plan;
  snprintf(why, SFA_ATTN_WHY_BYTES,
           "it runs on the tensor cores of a GPU: make the context with device = SFA_DEVICE_CUDA, or choose SFA_POLICY_AUTO");
  return false;
}

static const sfa_attn_way ways[] = {
    [SFA_POLICY_AUTO] = {.name = "auto"},
    [SFA_POLICY_TILES] = {"tiles", NULL, NULL, sfa_attn_tiles},
    [SFA_POLICY_KEYS] = {"keys", sfa_attn_keys_fits, sfa_attn_keys_workspace, sfa_attn_keys},
    [SFA_POLICY_HALF_CODES] = {"half-codes", sfa_attn_half_codes_fits, sfa_attn_half_workspace_bytes, sfa_attn_half},
    [SFA_POLICY_HALF_DENSE] = {"half-dense", sfa_attn_half_dense_fits, sfa_attn_half_workspace_bytes, sfa_attn_half},
    [SFA_POLICY_PAPER] = {"paper", sfa_attn_paper_fits, NULL, sfa_attn_tiles},
    [SFA_POLICY_POSTINGS] = {"postings", sfa_attn_keys_postings_fit, sfa_attn_keys_workspace, sfa_attn_keys},
    [SFA_POLICY_BF16] = {.name = "bf16", .fits = needs_gpu},
    [SFA_POLICY_SP_BF16] = {.name = "sp-bf16", .fits = needs_gpu},
    [SFA_POLICY_INT8] = {.name = "int8", .fits = needs_gpu},
    [SFA_POLICY_SP_INT8] = {.name = "sp-int8", .fits = needs_gpu},
};
enum { N_WAYS = sizeof ways / sizeof *ways };

const sfa_attn_way *sfa_attn_way_of(sfa_policy policy) {
  static const sfa_attn_way none = {.name = "unknown"};
  return (unsigned)policy < N_WAYS ? &ways[policy] : &none;
}

const char *sfa_policy_name(sfa_policy policy) { return sfa_attn_way_of(policy)->name; }

static bool fits(const sfa_attention_plan *plan, sfa_policy policy, char why[SFA_ATTN_WHY_BYTES]) {
  const sfa_attn_way *way = sfa_attn_way_of(policy);
  if (way->run || way->fits)
    return !way->fits || way->fits(plan, why);
  snprintf(why, SFA_ATTN_WHY_BYTES, "this build cannot: choose SFA_POLICY_AUTO");
  return false;
}

/* Dense scores of codes have the bits of sparse ones: the zeros between add nothing. Int8 sums do while a row has no more slots than are
 * summed exactly. */
static bool may_densify(const sfa_attention_options *o) {
  return o->k_k > 0 && o->k_k < o->head_dim && (o->k_dtype != SFA_I8 || o->k_k <= SFA_EXACT_TERMS);
}

/* What AUTO chooses among, of equals the first. The 16-bit ways only where the precision admits them. */
typedef struct candidate {
  sfa_policy policy;
  bool densify, half;
} candidate;

static const candidate candidates[] = {
    {SFA_POLICY_KEYS, false, false},      {SFA_POLICY_TILES, false, false},     {SFA_POLICY_TILES, true, false},
    {SFA_POLICY_HALF_CODES, false, true}, {SFA_POLICY_HALF_DENSE, false, true},
};
enum { N_CANDIDATES = sizeof candidates / sizeof *candidates };

static bool is_half(sfa_policy policy) { return policy == SFA_POLICY_HALF_CODES || policy == SFA_POLICY_HALF_DENSE; }

/* Whether AUTO may round keys and values of these types to 16 bits. */
static bool admits_half(const sfa_attention_options *o, sfa_dtype k_dtype, sfa_dtype v_dtype) {
  bool stored_short = k_dtype != SFA_F32 && v_dtype != SFA_F32;
  return o->precision == SFA_PRECISION_HALF || (o->precision == SFA_PRECISION_DEFAULT && stored_short);
}

static bool is_candidate(const sfa_attention_plan *plan, const candidate *c) {
  const sfa_attention_options *o = &plan->options;
  char why[SFA_ATTN_WHY_BYTES];
  if (o->policy != SFA_POLICY_AUTO && o->policy != c->policy)
    return false;
  if (o->policy == SFA_POLICY_AUTO && o->eps > 0 && c->policy != SFA_POLICY_KEYS && fits(plan, SFA_POLICY_KEYS, why))
    return false; /* only KEYS leaves values out */
  if ((c->half && o->policy == SFA_POLICY_AUTO && !admits_half(o, o->k_dtype, o->v_dtype)) || (c->densify && !may_densify(o)))
    return false;
  return fits(plan, c->policy, why);
}

/* Why the winner won, for people. */
static void explain(sfa_attention_plan *plan, double best_ns, const candidate *second, double second_ns) {
  const sfa_attention_options *o = &plan->options;
  const char *form = plan->densify ? "codes written out as dense rows, " : "";
  char *to = plan->reason;
  size_t capacity = sizeof plan->reason;
  if (o->policy != SFA_POLICY_AUTO)
    snprintf(to, capacity, "%sas asked", form);
  else if (!second)
    snprintf(to, capacity, "no other way fits");
  else
    snprintf(to, capacity, "%s%.3g ms predicted; next is %s%s with %.3g ms", form, 1e-6 * best_ns, sfa_policy_name(second->policy),
             second->densify ? " on codes written out as dense rows" : "", 1e-6 * second_ns);
}

bool sfa_attn_policy_choose(sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]) {
  const sfa_attention_options *o = &plan->options;
  if (o->precision == SFA_PRECISION_F32 && is_half(o->policy)) {
    snprintf(why, SFA_ATTN_WHY_BYTES, "it rounds to 16 bits, which options.precision = SFA_PRECISION_F32 excludes: change one of the two");
    return false;
  }
  if (o->policy != SFA_POLICY_AUTO && !fits(plan, o->policy, why))
    return false;
  const candidate *best = NULL, *second = NULL;
  double best_ns = 0, second_ns = 0;
  for (const candidate *c = candidates; c < candidates + N_CANDIDATES; c++) {
    if (!is_candidate(plan, c))
      continue;
    sfa_attn_times times;
    sfa_attn_predict(plan, c->policy, c->densify, &times);
    double ns = sfa_attn_times_total(&times);
    if (!best || ns < best_ns) {
      second = best;
      second_ns = best_ns;
      best = c;
      best_ns = ns;
    } else if (!second || ns < second_ns) {
      second = c;
      second_ns = ns;
    }
  }
  plan->policy = best ? best->policy : o->policy; /* none: a way that is only ever asked for */
  plan->densify = best && best->densify;
  explain(plan, best_ns, second, second_ns);
  return true;
}

/* ---- The whole plan ---------------------------------------------------------------------------------------------------------- */

/* The costs that the plan compares with: the caller's, or those in the source. */
static sfa_status check_costs(sfa_context *ctx, const sfa_costs *given, sfa_isa isa, sfa_costs *costs) {
  if (given) {
    SFA_REQUIRE(ctx, given->struct_size == sizeof *given, "costs.struct_size is %zu: this library's is %zu, measure the costs again",
                given->struct_size, sizeof *given);
    SFA_REQUIRE(ctx, given->isa == isa, "the costs are of %s, the context uses %s: measure them under it, or pass NULL",
                sfa_isa_name(given->isa), sfa_isa_name(isa));
    SFA_REQUIRE(ctx, sfa_attn_costs_usable(given), "an entry of the costs is not a positive time: measure them again, or pass NULL");
  }
  *costs = given ? *given : *sfa_attn_costs_of(isa);
  return SFA_OK;
}

sfa_status sfa_attn_plan_fill(sfa_attention_plan *plan, const sfa_costs *costs) {
  sfa_context *ctx = plan->ctx;
  const sfa_attention_options *o = &plan->options;
  char why[SFA_ATTN_WHY_BYTES];
  plan->kernels = sfa_kernel_of(ctx->isa);
  if (!plan->kernels)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "this build has no kernels for %s", sfa_isa_name(ctx->isa));
  SFA_TRY(check_costs(ctx, costs, ctx->isa, &plan->costs));
  sfa_attn_plan_shape(plan);
  if (!sfa_attn_policy_choose(plan, why))
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "policy %s: %s", sfa_policy_name(o->policy), why);
  SFA_REQUIRE(ctx, sfa_attn_plan_workspace(plan), "%d sequences of %lld keys and %d heads do not fit an address", o->n_sequences,
              (long long)o->max_seqlen_k, o->n_kv_heads);
  return SFA_OK;
}

/* The plan of the same call with dense rows, as far as the prediction looks at it; *ns what AUTO would come to. */
static double dense_prediction(const sfa_attention_plan *plan) {
  sfa_attention_plan dense = *plan;
  char why[SFA_ATTN_WHY_BYTES];
  sfa_attn_times times;
  dense.options.policy = SFA_POLICY_AUTO;
  dense.options.k_q = dense.options.k_k = 0;
  sfa_attn_plan_shape(&dense);
  sfa_attn_policy_choose(&dense, why); /* AUTO always finds one */
  sfa_attn_predict(&dense, dense.policy, false, &times);
  return sfa_attn_times_total(&times);
}

void sfa_attn_report_times(const sfa_attention_plan *plan, sfa_attention_report *report) {
  sfa_attn_times t;
  sfa_attn_predict(plan, plan->policy, plan->densify, &t);
  report->topk_ns = t.topk;
  report->pack_ns = t.pack;
  report->score_ns = t.score;
  report->softmax_ns = t.softmax;
  report->value_ns = t.value;
  report->call_ns = t.call;
  report->dense_ns = dense_prediction(plan);
  report->dense_wins = report->dense_ns < sfa_attn_times_total(&t);
}

/* ---- Running it -------------------------------------------------------------------------------------------------------------- */

/* A plan without from_cache may meet a cache or pages of other types than it was made for: what is stored in f32 there is not rounded. */
static void attend(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views) {
  const sfa_attention_options *o = &plan->options;
  bool too_short =
      is_half(plan->policy) && o->policy == SFA_POLICY_AUTO && !admits_half(o, views[0].k.format.dtype, views[0].v.format.dtype);
  (too_short ? sfa_attn_tiles : ways[plan->policy].run)(plan, args, views);
}

void sfa_attn_attend(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views) {
  sfa_attn_stages_clear(plan, args);
  attend(plan, args, views);
  sfa_attn_stages_add(plan, args);
}

sfa_status sfa_attn_run(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  sfa_kv_view *views = (sfa_kv_view *)(void *)((unsigned char *)args->workspace + plan->views);
  sfa_attn_stages_clear(plan, args);
  SFA_TRY(sfa_attn_prepare(plan, args, views));
  attend(plan, args, views);
  sfa_attn_stages_add(plan, args);
  return SFA_OK;
}

void sfa_attn_tiles(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views) {
  (plan->split ? sfa_attn_decode : sfa_attn_prefill)(plan, args, views);
}
