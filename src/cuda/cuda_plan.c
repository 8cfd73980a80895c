/* Plans on a GPU: which policy, and what lies where in the workspace. Pure functions of the options, the GPU's compute capability and the
 * stages of the build. */
#include "cuda/cuda_state.h"

#include <stdio.h>

enum {
  MOST_DIM = 256,          /* of heads on the tensor cores */
  MOST_DECODE_ROWS = 64,   /* query rows of a kv head that read keys and values as they are stored; more pay for writing them out */
  WRITTEN_BYTES = 1 << 28, /* of keys and values that are written out at once: of half as many, turns take up to 12 % longer than one */
  WRITTEN_KEYS = 1280      /* of each sequence at least */
};

static bool is_whole(sfa_policy policy) { return policy == SFA_POLICY_INT8 || policy == SFA_POLICY_SP_INT8; }
static bool is_tensor(sfa_policy policy) { return policy >= SFA_POLICY_BF16 && policy <= SFA_POLICY_SP_INT8; }

/* ---- The policy ---------------------------------------------------------------------------------------------------------------------- */

const char *(*sfa_cuda_prefill_of(const sfa_context *ctx, sfa_policy policy))(const sfa_cuda_prefill *, sfa_cuda_stream) {
  const sfa_cuda_stages *stages = sfa_cuda_stages_of(ctx);
  if (ctx->cuda->compute == 90 && stages->prefill_sm90)
    return stages->prefill_sm90;
  return policy == SFA_POLICY_BF16 ? stages->prefill_portable : NULL;
}

/* Whether the plan's call can be done so; if not, `why` says what is in the way and what to choose. */
static bool fits(const sfa_attention_plan *plan, sfa_policy policy, char why[SFA_CUDA_WHY_BYTES]) {
  const sfa_attention_options *o = &plan->options;
  const sfa_cuda_stages *stages = sfa_cuda_stages_of(plan->ctx);
  const char *missing = NULL;
  if (is_tensor(policy) || policy == SFA_POLICY_PAPER) {
    if (o->head_dim > MOST_DIM || o->head_dim_v > MOST_DIM)
      return snprintf(why, SFA_CUDA_WHY_BYTES, "head_dim is %d, head_dim_v %d: its kernels take up to %d, choose SFA_POLICY_AUTO",
                      o->head_dim, o->head_dim_v, MOST_DIM),
             false;
    if (o->precision == SFA_PRECISION_F32)
      return snprintf(why, SFA_CUDA_WHY_BYTES,
                      "it rounds to 16 bits, which options.precision = SFA_PRECISION_F32 excludes: change one of the two"),
             false;
    missing = !stages->select ? "select" : !stages->gather ? "gather" : NULL;
  }
  if (is_tensor(policy) && !sfa_cuda_prefill_of(plan->ctx, policy)) {
    snprintf(why, SFA_CUDA_WHY_BYTES,
             "compute capability %d.%d has no kernels for it in this build: choose SFA_POLICY_BF16, or a GPU of 9.0",
             plan->ctx->cuda->compute / 10, plan->ctx->cuda->compute % 10);
    return false;
  }
  if (policy == SFA_POLICY_KEYS)
    missing = !stages->select ? "select" : !stages->decode ? "decode" : NULL;
  if (policy == SFA_POLICY_PAPER) {
    if (o->from_cache || o->k_q < 1 || o->k_k < 1)
      return snprintf(why, SFA_CUDA_WHY_BYTES,
                      "Algorithm 1 takes sparse queries and keys that are arguments: set k_q and k_k, and from_cache = 0"),
             false;
    missing = !stages->paper ? "paper" : missing;
  }
  if (missing)
    snprintf(why, SFA_CUDA_WHY_BYTES, "this build of libsfa_cuda.so has no %s", missing);
  return !missing;
}

static bool is_wide(const sfa_attention_options *o) { return o->head_dim > MOST_DIM || o->head_dim_v > MOST_DIM; }

/* Few query rows read what is stored, many pay for writing it out. Heads too wide for the tensor cores are read where they are. */
static sfa_policy preferred(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  bool few = o->max_seqlen_q * plan->group <= MOST_DECODE_ROWS;
  return few || is_wide(o) || o->eps > 0 || o->precision == SFA_PRECISION_F32 ? SFA_POLICY_KEYS : SFA_POLICY_BF16;
}

static sfa_status choose(sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  char why[SFA_CUDA_WHY_BYTES];
  bool on_gpu = o->policy == SFA_POLICY_AUTO || o->policy == SFA_POLICY_KEYS || o->policy == SFA_POLICY_PAPER || is_tensor(o->policy);
  if (!on_gpu)
    return sfa_fail(plan->ctx, SFA_ERROR_UNSUPPORTED, "policy %s is a way of the CPU's: choose SFA_POLICY_AUTO on a GPU",
                    sfa_policy_name(o->policy));
  plan->policy = o->policy == SFA_POLICY_AUTO ? preferred(plan) : o->policy;
  if (!fits(plan, plan->policy, why))
    return sfa_fail(plan->ctx, SFA_ERROR_UNSUPPORTED, "policy %s: %s", sfa_policy_name(plan->policy), why);
  if (o->policy != SFA_POLICY_AUTO)
    snprintf(plan->reason, sizeof plan->reason, "as asked");
  else if (is_wide(o))
    snprintf(plan->reason, sizeof plan->reason, "heads beyond %d: keys and values are read where they are stored", MOST_DIM);
  else if (plan->policy == SFA_POLICY_KEYS)
    snprintf(plan->reason, sizeof plan->reason, "%lld query rows of a kv head: keys and values are read where they are stored",
             (long long)(o->max_seqlen_q * plan->group));
  else
    snprintf(plan->reason, sizeof plan->reason, "%lld query rows of a kv head: tensor cores", (long long)(o->max_seqlen_q * plan->group));
  return SFA_OK;
}

sfa_status sfa_cuda_plan(sfa_attention_plan *plan, const sfa_costs *costs) {
  const sfa_attention_options *o = &plan->options;
  size_t parts[SFA_CUDA_N_PARTS + 1];
  (void)costs; /* a GPU's plans do not compare times */
  plan->k_format = (sfa_row_format){o->head_dim, o->k_k == o->head_dim ? 0 : o->k_k, o->k_dtype};
  plan->v_format = (sfa_row_format){o->head_dim_v, 0, o->v_dtype};
  plan->encode_k = !o->from_cache; /* a rope is always met */
  SFA_TRY(choose(plan));
  if (!sfa_cuda_parts(plan, false, parts))
    return sfa_fail(plan->ctx, SFA_ERROR_ARGUMENT, "%d sequences of %lld keys and %d heads do not fit an address", o->n_sequences,
                    (long long)o->max_seqlen_k, o->n_kv_heads);
  plan->workspace_bytes = parts[SFA_CUDA_N_PARTS];
  return SFA_OK;
}

/* ---- The workspace ------------------------------------------------------------------------------------------------------------------- */

/* Storage types that rows of bf16 do not hide: values are rounded to them first. */
static bool rounds_first(sfa_dtype dtype) { return dtype != SFA_F32 && dtype != SFA_BF16; }

sfa_cuda_scores sfa_cuda_scores_of(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  const sfa_attention_options *o = &plan->options;
  return (sfa_cuda_scores){.softmax_scale = o->softmax_scale,
                           .softcap = o->softcap,
                           .causal = o->causal,
                           .window_left = o->has_window ? o->window_size[0] : -1,
                           .window_right = o->has_window ? o->window_size[1] : -1,
                           .n_sink_tokens = o->n_sink_tokens,
                           .sink_logit = args ? args->sink_logit : NULL,
                           .alibi_slopes = args ? args->alibi_slopes : NULL};
}

sfa_cuda_decode sfa_cuda_decode_shape(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  return (sfa_cuda_decode){.n_sequences = o->n_sequences,
                           .n_queries = (int32_t)o->max_seqlen_q,
                           .n_heads = o->n_heads,
                           .n_kv_heads = o->n_kv_heads,
                           .head_dim = o->head_dim,
                           .head_dim_v = o->head_dim_v,
                           .k_q = o->k_q == o->head_dim ? 0 : o->k_q,
                           .k.format = plan->k_format,
                           .v.format = plan->v_format,
                           .max_keys = o->max_seqlen_k,
                           .scores = sfa_cuda_scores_of(plan, NULL),
                           .eps = o->eps};
}

sfa_cuda_backward sfa_cuda_backward_shape(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  return (sfa_cuda_backward){.n_heads = o->n_heads,
                             .n_kv_heads = o->n_kv_heads,
                             .head_dim = o->head_dim,
                             .head_dim_v = o->head_dim_v,
                             .q_tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_q},
                             .k_tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_k},
                             .scores = sfa_cuda_scores_of(plan, NULL)};
}

int64_t sfa_cuda_turn_keys(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  int64_t key_bytes = (int64_t)o->n_sequences * o->n_kv_heads * (o->head_dim + o->head_dim_v) * 2; /* bf16 */
  int64_t n_keys = WRITTEN_BYTES / key_bytes / SFA_CUDA_WHOLE_TILES * SFA_CUDA_WHOLE_TILES;
  return n_keys < WRITTEN_KEYS ? WRITTEN_KEYS : n_keys;
}

int64_t sfa_cuda_keys_at_once(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  return o->from_cache ? sfa_min64(o->max_seqlen_k, sfa_cuda_turn_keys(plan)) : o->max_seqlen_k;
}

bool sfa_cuda_in_turns(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  bool far = o->n_sink_tokens > 0 && o->has_window && o->window_size[0] >= 0 && o->max_seqlen_k > sfa_cuda_far_keys(plan);
  return is_tensor(plan->policy) && o->from_cache && (far || o->max_seqlen_k > sfa_cuda_turn_keys(plan));
}

static size_t paper_bytes(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  sfa_cuda_paper shape = {.shape = {.policy = SFA_POLICY_PAPER,
                                    .n_heads = o->n_heads,
                                    .n_kv_heads = o->n_kv_heads,
                                    .head_dim = o->head_dim,
                                    .head_dim_v = o->head_dim_v,
                                    .q_tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_q},
                                    .k_tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_k},
                                    .scores = sfa_cuda_scores_of(plan, NULL)},
                          .q_codes = {.head_dim = o->head_dim, .k = o->k_q, .dtype = SFA_F32},
                          .k_codes = {.head_dim = o->head_dim, .k = o->k_k, .dtype = SFA_F32}};
  return sfa_cuda_stages_of(plan->ctx)->paper_bytes(&shape);
}

bool sfa_cuda_parts(const sfa_attention_plan *plan, bool backward, size_t parts[SFA_CUDA_N_PARTS + 1]) {
  const sfa_attention_options *o = &plan->options;
  const sfa_cuda_stages *stages = sfa_cuda_stages_of(plan->ctx);
  int32_t B = o->n_sequences, H = o->n_heads, G = o->n_kv_heads, D = o->head_dim, E = o->head_dim_v, n_words = (D + 31) / 32;
  int64_t n_q = B * o->max_seqlen_q, n_k = B * o->max_seqlen_k, n_pages = (o->max_seqlen_k + 63) / 64;
  int64_t n_written = backward ? n_k : B * sfa_cuda_keys_at_once(plan);
  bool paper = plan->policy == SFA_POLICY_PAPER && !backward, keys = plan->policy == SFA_POLICY_KEYS && !backward;
  bool tensor = backward || is_tensor(plan->policy), in_turns = !backward && sfa_cuda_in_turns(plan);
  bool whole = is_whole(plan->policy) && !backward, arguments = !o->from_cache || backward;
  size_t sizes[SFA_CUDA_N_PARTS] = {0}, lse_bytes = sizeof(float) * (size_t)(n_q * H);
  int64_t most; /* every array is less than the rows of all heads in f32 with their scales: API checks those, this adds what is beside */
  if (__builtin_mul_overflow(n_q + n_k + 64, ((int64_t)H + G) * (D + E + 64) * 16, &most))
    return false;
  sizes[SFA_CUDA_PART_NUMBERS] = sizeof(int32_t) * (size_t)(SFA_CUDA_NUMBERS + 3 * B);
  if (tensor) {
    sfa_dtype dtype = whole ? SFA_I8 : SFA_BF16;
    sizes[SFA_CUDA_PART_Q] = sfa_cuda_rows_bytes(n_q, dtype, H, D);
    sizes[SFA_CUDA_PART_K] = sfa_cuda_rows_bytes(n_written, dtype, G, D);
    sizes[SFA_CUDA_PART_Q_SCALES] = whole ? sizeof(float) * (size_t)(n_q * H) : 0;
    sizes[SFA_CUDA_PART_K_SCALES] = whole ? sizeof(float) * (size_t)(n_written * G) : 0;
    sizes[SFA_CUDA_PART_LSE_ALL] = in_turns ? lse_bytes : 0;
  }
  if (tensor || paper)
    sizes[SFA_CUDA_PART_V] = sfa_cuda_rows_bytes(n_written, SFA_BF16, G, E);
  if (keys) {
    sizes[SFA_CUDA_PART_Q] = sizes[SFA_CUDA_PART_Q_APART] = sfa_cuda_rows_bytes(n_q, SFA_F32, H, D);
    sizes[SFA_CUDA_PART_DROPPED] = lse_bytes;
  }
  if (keys || in_turns) {
    sizes[SFA_CUDA_PART_OUT] = sfa_cuda_rows_bytes(n_q, SFA_F32, H, E);
    sizes[SFA_CUDA_PART_LSE] = lse_bytes;
  }
  if (arguments && (keys || rounds_first(o->k_dtype))) {
    sfa_row_format given = {D, o->k_k, o->k_dtype}; /* of k_codes, which have ids even where they keep all features */
    size_t bytes = sfa_cuda_store_bytes(&plan->k_format, G, o->max_seqlen_k),
           given_bytes = sfa_cuda_store_bytes(&given, G, o->max_seqlen_k);
    sizes[SFA_CUDA_PART_K_STORE] = (size_t)B * (bytes > given_bytes ? bytes : given_bytes);
  }
  if (arguments && (keys || rounds_first(o->v_dtype)))
    sizes[SFA_CUDA_PART_V_STORE] = (size_t)B * sfa_cuda_store_bytes(&plan->v_format, G, o->max_seqlen_k);
  if (paper) { /* codes of f32 in place of rows */
    sfa_row_format q = {D, o->k_q, SFA_F32}, k = {D, o->k_k, SFA_F32};
    sizes[SFA_CUDA_PART_Q] = sfa_cuda_store_bytes(&q, H, n_q);
    sizes[SFA_CUDA_PART_K] = sfa_cuda_store_bytes(&k, G, n_k);
  }
  if (backward) {
    sfa_cuda_backward shape = sfa_cuda_backward_shape(plan);
    sizes[SFA_CUDA_PART_Q_SUPPORT] = sizeof(uint32_t) * (size_t)(n_q * H * n_words);
    sizes[SFA_CUDA_PART_K_SUPPORT] = sizeof(uint32_t) * (size_t)(n_k * G * n_words);
    sizes[SFA_CUDA_PART_STAGE] = stages->backward_bytes ? stages->backward_bytes(&shape) : 0;
  } else
    sizes[SFA_CUDA_PART_TABLES] = sizeof(void *) * (size_t)(B * n_pages);
  if (keys) {
    sfa_cuda_decode shape = sfa_cuda_decode_shape(plan);
    sizes[SFA_CUDA_PART_STAGE] = stages->decode_bytes(&shape);
  } else if (paper)
    sizes[SFA_CUDA_PART_STAGE] = paper_bytes(plan);
  parts[0] = 0;
  for (int i = 0; i < SFA_CUDA_N_PARTS; i++)
    if (!sfa_add_size(parts[i], (sizes[i] + 255) & ~(size_t)255, &parts[i + 1]))
      return false;
  return true;
}
