/* Attention on a GPU: from checked arguments to stages.
 *
 *     many queries    select q, k, v -> rows (or gather them from pages) -> prefill on the tensor cores
 *     few queries     select k, v -> stored rows (or pages as they are) -> decode, which cuts q itself
 *     Algorithm 1     select q, k -> codes -> paper
 */
#include "cuda/cuda_state.h"

static void *part(const sfa_attention_args *args, const size_t *parts, sfa_cuda_part which) {
  return (unsigned char *)args->workspace + parts[which];
}

static bool is_whole(sfa_policy policy) { return policy == SFA_POLICY_INT8 || policy == SFA_POLICY_SP_INT8; }

/* ---- Operands -------------------------------------------------------------------------------------------------------------------- */

/* Whether its rows are what the tensor cores read already. */
static bool is_ready(const sfa_cuda_operand *p) {
  const sfa_rows *x = p->x;
  bool rounded = p->format.dtype == SFA_F32 || p->format.dtype == SFA_BF16;
  /* Of packed sequences the host does not know how many tokens there are, and tiles are read whole: the workspace has room for that. */
  bool packed = !p->tokens.cu_seqlens && (p->tokens.n_sequences == 1 || x->batch_stride == p->tokens.max_seqlen * x->token_stride);
  bool aligned = (uintptr_t)x->data % 16 == 0 && x->token_stride % 8 == 0 && x->head_stride == p->dim;
  return x->dtype == SFA_BF16 && !p->whole && !p->k && !x->rope && !x->norm && !p->support && rounded && packed && aligned;
}

static sfa_status rows_of_codes(sfa_context *ctx, const sfa_cuda_operand *p, const sfa_cuda_rows *rows) {
  const sfa_cuda *cuda = ctx->cuda;
  sfa_cuda_gather g = {.store = sfa_cuda_store_over(p->codes, p->n_heads),
                       .n_sequences = 1,
                       .n_heads = p->n_heads,
                       .n_keys = p->n_tokens,
                       .max_keys = p->tokens.n_sequences * p->tokens.max_seqlen,
                       .rows = *rows,
                       .row_scales = p->scales};
  SFA_TRY(sfa_cuda_status(ctx, "codes to rows", sfa_cuda_stages_of(ctx)->gather(&g, cuda->stream)));
  if (!p->support)
    return SFA_OK;
  sfa_codes codes = *p->codes;
  codes.n_rows = sfa_min64(codes.n_rows, g.max_keys * p->n_heads);
  return sfa_cuda_status(ctx, "supports", sfa_cuda_help_of(ctx)->spread(&codes, NULL, 0, p->support, cuda->stream));
}

sfa_status sfa_cuda_rows_of(sfa_context *ctx, const sfa_cuda_operand *p, sfa_cuda_rows *rows) {
  if (!p->codes && is_ready(p)) {
    *rows = (sfa_cuda_rows){(void *)(uintptr_t)p->x->data, SFA_BF16, p->x->token_stride, p->x->head_stride};
    return SFA_OK;
  }
  *rows = sfa_cuda_rows_in(p->rows, p->whole ? SFA_I8 : SFA_BF16, p->n_heads, p->dim);
  if (p->codes)
    return rows_of_codes(ctx, p, rows);
  sfa_cuda_select s = {.tokens = p->tokens,
                       .n_heads = p->n_heads,
                       .dim = p->dim,
                       .k = p->k,
                       .rows = *rows,
                       .row_scales = p->scales,
                       .support = p->support,
                       .has_store = p->format.dtype != SFA_F32 && p->format.dtype != SFA_BF16};
  if (s.has_store)
    s.store = sfa_cuda_store_in(p->store, &p->format, p->n_heads, p->tokens.max_seqlen);
  return sfa_cuda_select_rows(ctx, p->x, &s);
}

void sfa_cuda_operands_of(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts, bool whole,
                          sfa_cuda_operands *operands) {
  const sfa_attention_options *o = &plan->options;
  const int32_t *numbers = part(args, parts, SFA_CUDA_PART_NUMBERS);
  sfa_row_format q_format = {o->head_dim, o->k_q == o->head_dim ? 0 : o->k_q, SFA_F32};
  operands->q =
      (sfa_cuda_operand){.tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_q, .cu_seqlens = args->cu_seqlens_q},
                         .n_heads = o->n_heads,
                         .dim = o->head_dim,
                         .k = q_format.k,
                         .format = q_format,
                         .x = &args->q,
                         .codes = args->q_codes,
                         .n_tokens = numbers + 1,
                         .whole = whole,
                         .rows = part(args, parts, SFA_CUDA_PART_Q),
                         .scales = whole ? part(args, parts, SFA_CUDA_PART_Q_SCALES) : NULL};
  operands->k =
      (sfa_cuda_operand){.tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_k, .cu_seqlens = args->cu_seqlens_k},
                         .n_heads = o->n_kv_heads,
                         .dim = o->head_dim,
                         .k = plan->k_format.k,
                         .format = plan->k_format,
                         .x = &args->k,
                         .codes = args->k_codes,
                         .n_tokens = numbers + 3,
                         .whole = whole,
                         .rows = part(args, parts, SFA_CUDA_PART_K),
                         .scales = whole ? part(args, parts, SFA_CUDA_PART_K_SCALES) : NULL,
                         .store = part(args, parts, SFA_CUDA_PART_K_STORE)};
  operands->v = (sfa_cuda_operand){.tokens = operands->k.tokens,
                                   .n_heads = o->n_kv_heads,
                                   .dim = o->head_dim_v,
                                   .format = plan->v_format,
                                   .x = &args->v,
                                   .rows = part(args, parts, SFA_CUDA_PART_V),
                                   .store = part(args, parts, SFA_CUDA_PART_V_STORE)};
}

sfa_status sfa_cuda_put_numbers(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts) {
  const sfa_attention_options *o = &plan->options;
  sfa_cuda_tokens q = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_q, .cu_seqlens = args->cu_seqlens_q};
  sfa_cuda_tokens k = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_k, .cu_seqlens = args->cu_seqlens_k};
  int32_t *numbers = part(args, parts, SFA_CUDA_PART_NUMBERS);
  return sfa_cuda_status(plan->ctx, "lengths", sfa_cuda_help_of(plan->ctx)->numbers(&q, &k, numbers, plan->ctx->cuda->stream));
}

/* ---- Many queries ---------------------------------------------------------------------------------------------------------------- */

static sfa_cuda_tokens queries_of(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  const sfa_attention_options *o = &plan->options;
  return (sfa_cuda_tokens){.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_q, .cu_seqlens = args->cu_seqlens_q};
}

/* Answers of decode, or queries for it: the last positions of a sequence. */
static sfa_cuda_places places_of(const sfa_attention_plan *plan, const sfa_attention_args *args, int64_t n_floats, float *packed,
                                 float *apart) {
  return (sfa_cuda_places){
      .tokens = queries_of(plan, args), .row_bytes = n_floats * (int64_t)sizeof(float), .at_end = 1, .packed = packed, .apart = apart};
}

/* [tokens][n_floats] from where each sequence has max_seqlen_q; apart NULL: zeros. packed NULL: not wanted. */
static sfa_status pack(const sfa_attention_plan *plan, const sfa_attention_args *args, int64_t n_floats, float *packed, float *apart) {
  sfa_cuda_places places = places_of(plan, args, n_floats, packed, apart);
  return packed ? sfa_cuda_status(plan->ctx, "results", sfa_cuda_help_of(plan->ctx)->pack(&places, plan->ctx->cuda->stream)) : SFA_OK;
}

/* Nothing is left out. */
static sfa_status clear_dropped(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  return pack(plan, args, plan->options.n_heads, args->dropped, NULL);
}

static sfa_cuda_prefill prefill_of(const sfa_attention_plan *plan, const sfa_attention_args *args, sfa_policy policy) {
  const sfa_attention_options *o = &plan->options;
  return (sfa_cuda_prefill){.policy = policy,
                            .n_heads = o->n_heads,
                            .n_kv_heads = o->n_kv_heads,
                            .head_dim = o->head_dim,
                            .head_dim_v = o->head_dim_v,
                            .q_tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_q, .cu_seqlens = args->cu_seqlens_q},
                            .k_tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_k, .cu_seqlens = args->cu_seqlens_k},
                            .scores = sfa_cuda_scores_of(plan, args),
                            .out = sfa_cuda_rows_in(args->out, SFA_F32, o->n_heads, o->head_dim_v),
                            .lse = args->lse};
}

static sfa_status multiply(const sfa_attention_plan *plan, const sfa_cuda_prefill *prefill) {
  SFA_TRY(sfa_cuda_status(plan->ctx, "attention", sfa_cuda_prefill_of(plan->ctx, prefill->policy)(prefill, plan->ctx->cuda->stream)));
  return sfa_cuda_lap(plan->ctx, SFA_STAGE_ATTEND);
}

static sfa_status run_tensor(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts) {
  sfa_cuda_operands p;
  sfa_cuda_prefill prefill = prefill_of(plan, args, plan->policy);
  sfa_cuda_operands_of(plan, args, parts, is_whole(plan->policy), &p);
  if (args->q_codes || args->k_codes)
    SFA_TRY(sfa_cuda_put_numbers(plan, args, parts));
  SFA_TRY(sfa_cuda_rows_of(plan->ctx, &p.q, &prefill.q));
  SFA_TRY(sfa_cuda_rows_of(plan->ctx, &p.k, &prefill.k));
  SFA_TRY(sfa_cuda_rows_of(plan->ctx, &p.v, &prefill.v));
  prefill.q_scales = p.q.scales;
  prefill.k_scales = p.k.scales;
  SFA_TRY(clear_dropped(plan, args));
  SFA_TRY(sfa_cuda_lap(plan->ctx, SFA_STAGE_TOPK));
  return multiply(plan, &prefill);
}

/* ---- Few queries ----------------------------------------------------------------------------------------------------------------- */

/* The queries as decode reads them: [B * T][H][D], where they are or in the workspace; zeros before those of a shorter sequence. */
static sfa_status decode_queries(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts, sfa_cuda_decode *d) {
  const sfa_attention_options *o = &plan->options;
  const sfa_rows *q = &args->q;
  sfa_cuda_rows copy = sfa_cuda_rows_in(part(args, parts, SFA_CUDA_PART_Q), SFA_F32, o->n_heads, o->head_dim);
  d->q = copy;
  if (args->q_codes) {
    sfa_codes codes = *args->q_codes;
    codes.n_rows = sfa_min64(codes.n_rows, o->n_sequences * o->max_seqlen_q * o->n_heads);
    d->k_q = 0;
    SFA_TRY(sfa_cuda_status(plan->ctx, "codes to rows",
                            sfa_cuda_help_of(plan->ctx)->spread(&codes, copy.data, o->head_dim, NULL, plan->ctx->cuda->stream)));
  } else if (!args->cu_seqlens_q && !q->norm && (o->n_sequences == 1 || q->batch_stride == o->max_seqlen_q * q->token_stride)) {
    d->q = (sfa_cuda_rows){(void *)(uintptr_t)q->data, q->dtype, q->token_stride, q->head_stride};
    if (q->rope) {
      d->rope_cos = q->rope->cos;
      d->rope_sin = q->rope->sin;
      d->n_pairs = q->rope->n_rotated / 2;
      d->rope_interleaved = q->rope->interleaved;
    }
  } else {
    sfa_cuda_select s = {.tokens = queries_of(plan, args), .n_heads = o->n_heads, .dim = o->head_dim, .k = d->k_q, .rows_f32 = copy.data};
    d->k_q = 0;
    SFA_TRY(sfa_cuda_select_rows(plan->ctx, q, &s));
  }
  if (!args->cu_seqlens_q)
    return SFA_OK;
  d->q.data = part(args, parts, SFA_CUDA_PART_Q_APART);
  sfa_cuda_places places = places_of(plan, args, copy.token_stride, copy.data, d->q.data);
  return sfa_cuda_status(plan->ctx, "queries", sfa_cuda_help_of(plan->ctx)->unpack(&places, plan->ctx->cuda->stream));
}

/* Where decode answers: in place, or for sequences of different lengths in the workspace, from where put_back takes it. */
static void answer_at(const sfa_attention_args *args, const size_t *parts, sfa_cuda_decode *d) {
  bool apart = args->cu_seqlens_q != NULL;
  d->out = apart ? part(args, parts, SFA_CUDA_PART_OUT) : args->out;
  d->lse = apart && args->lse ? part(args, parts, SFA_CUDA_PART_LSE) : args->lse;
  d->dropped = apart && args->dropped ? part(args, parts, SFA_CUDA_PART_DROPPED) : args->dropped;
}

static sfa_status put_back(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_cuda_decode *d) {
  const sfa_attention_options *o = &plan->options;
  if (!args->cu_seqlens_q)
    return SFA_OK;
  SFA_TRY(pack(plan, args, (int64_t)o->n_heads * o->head_dim_v, args->out, d->out));
  SFA_TRY(pack(plan, args, o->n_heads, args->lse, d->lse));
  return pack(plan, args, o->n_heads, args->dropped, d->dropped);
}

/* Keys or values as decode reads them: dense ones that are what is to be stored already stay where they are. */
static sfa_status decode_side(const sfa_attention_plan *plan, const sfa_cuda_operand *p, bool packed, sfa_cuda_store *store) {
  const sfa_rows *x = p->x;
  bool same = x->dtype == p->format.dtype || p->format.dtype == SFA_F32;
  if (!p->k && !x->rope && !x->norm && same && !packed) {
    size_t bytes = sfa_dtype_bytes(x->dtype);
    *store = (sfa_cuda_store){.sequence_bytes = x->batch_stride * (int64_t)bytes,
                              .format = {p->dim, 0, x->dtype},
                              .values = {.base = x->data,
                                         .head_bytes = (size_t)x->head_stride * bytes,
                                         .tile_bytes = 64 * (size_t)x->token_stride * bytes,
                                         .row_stride = x->token_stride}};
    return SFA_OK;
  }
  *store = sfa_cuda_store_in(p->store, &p->format, p->n_heads, p->tokens.max_seqlen);
  sfa_cuda_select s = {.tokens = p->tokens, .n_heads = p->n_heads, .dim = p->dim, .k = p->k, .has_store = 1, .store = *store};
  return sfa_cuda_select_rows(plan->ctx, x, &s);
}

static sfa_status decode(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts, sfa_cuda_decode *d) {
  d->scores = sfa_cuda_scores_of(plan, args);
  d->workspace = part(args, parts, SFA_CUDA_PART_STAGE);
  SFA_TRY(sfa_cuda_lap(plan->ctx, SFA_STAGE_TOPK));
  SFA_TRY(sfa_cuda_lap_inside(plan->ctx, SFA_STAGE_ATTEND, &d->between));
  SFA_TRY(sfa_cuda_status(plan->ctx, "decode", sfa_cuda_stages_of(plan->ctx)->decode(d, plan->ctx->cuda->stream)));
  return sfa_cuda_lap(plan->ctx, SFA_STAGE_JOIN);
}

/* Codes of keys with max_seqlen_k of each sequence: the caller's, or those of sequences of different lengths laid out so. */
static sfa_status key_codes(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts, sfa_codes *codes) {
  const sfa_attention_options *o = &plan->options;
  *codes = *args->k_codes;
  if (!args->cu_seqlens_k)
    return SFA_OK;
  sfa_row_format format = {codes->head_dim, codes->k, codes->dtype};
  sfa_cuda_store all =
      sfa_cuda_store_in(part(args, parts, SFA_CUDA_PART_K_STORE), &format, 1, o->n_sequences * o->max_seqlen_k * o->n_kv_heads);
  const struct {
    void *packed;
    const void *apart;
    size_t row_bytes;
  } arrays[] = {{codes->ids, all.ids.base, sfa_row_ids_bytes(&format)},
                {codes->values, all.values.base, sfa_row_values_bytes(&format)},
                {codes->scales, all.scales.base, sfa_row_scale_bytes(&format)}};
  for (int i = 0; i < 3; i++) {
    sfa_cuda_places places = {.tokens = {.n_sequences = o->n_sequences, .max_seqlen = o->max_seqlen_k, .cu_seqlens = args->cu_seqlens_k},
                              .row_bytes = (int64_t)arrays[i].row_bytes * o->n_kv_heads,
                              .packed = arrays[i].packed,
                              .apart = (void *)(uintptr_t)arrays[i].apart};
    SFA_TRY(sfa_cuda_status(plan->ctx, "codes", sfa_cuda_help_of(plan->ctx)->unpack(&places, plan->ctx->cuda->stream)));
  }
  codes->ids = (void *)(uintptr_t)all.ids.base;
  codes->values = (void *)(uintptr_t)all.values.base;
  codes->scales = codes->scales ? (void *)(uintptr_t)all.scales.base : NULL;
  return SFA_OK;
}

/* Codes of several sequences: a call a sequence. */
static sfa_status decode_codes(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts,
                               const sfa_cuda_decode *all) {
  const sfa_attention_options *o = &plan->options;
  int64_t T = o->max_seqlen_q, n_key_rows = o->max_seqlen_k * o->n_kv_heads, n_rows = T * o->n_heads;
  sfa_codes of_all;
  SFA_TRY(key_codes(plan, args, parts, &of_all));
  for (int32_t b = 0; b < o->n_sequences; b++) {
    sfa_codes codes = of_all;
    sfa_row_format format = {codes.head_dim, codes.k, codes.dtype};
    codes.ids = (unsigned char *)codes.ids + (size_t)(b * n_key_rows) * sfa_row_ids_bytes(&format);
    codes.values = (unsigned char *)codes.values + (size_t)(b * n_key_rows) * sfa_row_values_bytes(&format);
    codes.scales = codes.scales ? codes.scales + b * n_key_rows : NULL;
    sfa_cuda_decode d = *all;
    d.n_sequences = 1;
    d.k = sfa_cuda_store_over(&codes, o->n_kv_heads);
    d.v.values.base = d.v.values.base + b * d.v.sequence_bytes;
    d.v.scales.base = d.v.scales.base ? d.v.scales.base + b * d.v.sequence_bytes : NULL;
    d.q.data = (unsigned char *)d.q.data + (size_t)(b * T * d.q.token_stride) * sfa_dtype_bytes(d.q.dtype);
    d.n_keys = all->n_keys + b;
    d.out += b * n_rows * o->head_dim_v;
    d.lse = d.lse ? d.lse + b * n_rows : NULL;
    d.dropped = d.dropped ? d.dropped + b * n_rows : NULL;
    SFA_TRY(decode(plan, args, parts, &d));
  }
  return SFA_OK;
}

static sfa_status run_few(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts) {
  sfa_cuda_operands p;
  sfa_cuda_decode d = sfa_cuda_decode_shape(plan);
  bool packed = args->cu_seqlens_k != NULL;
  sfa_cuda_operands_of(plan, args, parts, false, &p);
  SFA_TRY(sfa_cuda_put_numbers(plan, args, parts));
  d.n_keys = (int32_t *)part(args, parts, SFA_CUDA_PART_NUMBERS) + SFA_CUDA_NUMBERS;
  answer_at(args, parts, &d);
  SFA_TRY(decode_queries(plan, args, parts, &d));
  SFA_TRY(decode_side(plan, &p.v, packed, &d.v));
  if (args->k_codes)
    SFA_TRY(decode_codes(plan, args, parts, &d));
  else {
    SFA_TRY(decode_side(plan, &p.k, packed, &d.k));
    SFA_TRY(decode(plan, args, parts, &d));
  }
  return put_back(plan, args, &d);
}

/* ---- Algorithm 1 ----------------------------------------------------------------------------------------------------------------- */

/* Codes of f32, [tokens][n_heads], of an operand: the caller's, or made in the workspace. */
static sfa_status paper_codes(sfa_context *ctx, const sfa_cuda_operand *p, int32_t k, sfa_codes *codes) {
  if (p->codes && (p->codes->dtype == SFA_F32 || p->codes->dtype == SFA_BF16)) {
    *codes = *p->codes;
    return SFA_OK;
  }
  if (p->codes)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "policy paper takes codes of SFA_F32 or SFA_BF16 on a GPU, these are dtype %d",
                    (int)p->codes->dtype);
  sfa_row_format format = {p->dim, k, SFA_F32};
  int64_t n_rows = p->tokens.n_sequences * p->tokens.max_seqlen * p->n_heads;
  sfa_cuda_store all = sfa_cuda_store_in(p->rows, &format, 1, n_rows);
  *codes = (sfa_codes){.n_rows = n_rows,
                       .head_dim = p->dim,
                       .k = k,
                       .dtype = SFA_F32,
                       .ids = (void *)(uintptr_t)all.ids.base,
                       .values = (void *)(uintptr_t)all.values.base};
  /* Codes lie together, rows of x by sequences: a selection each. Packed ones are one sequence of p->n_tokens[0] tokens. */
  sfa_cuda_tokens tokens = {.n_sequences = 1, .max_seqlen = p->tokens.max_seqlen};
  if (p->tokens.cu_seqlens)
    tokens = (sfa_cuda_tokens){.n_sequences = 1, .max_seqlen = n_rows / p->n_heads, .cu_seqlens = p->n_tokens - 1};
  for (int32_t b = 0; b < (p->tokens.cu_seqlens ? 1 : p->tokens.n_sequences); b++) {
    sfa_codes of_sequence = *codes;
    int64_t first = b * p->tokens.max_seqlen * p->n_heads;
    of_sequence.ids = (unsigned char *)codes->ids + (size_t)first * sfa_row_ids_bytes(&format);
    of_sequence.values = (unsigned char *)codes->values + (size_t)first * sfa_row_values_bytes(&format);
    sfa_rows x = *p->x;
    x.data = (const unsigned char *)x.data + (size_t)(b * x.batch_stride) * sfa_dtype_bytes(x.dtype);
    sfa_cuda_select s = {.tokens = tokens,
                         .n_heads = p->n_heads,
                         .dim = p->dim,
                         .k = k,
                         .has_store = 1,
                         .store = sfa_cuda_store_over(&of_sequence, p->n_heads)};
    SFA_TRY(sfa_cuda_select_rows(ctx, &x, &s));
  }
  return SFA_OK;
}

static sfa_status run_paper(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts) {
  const sfa_attention_options *o = &plan->options;
  sfa_cuda_operands p;
  sfa_cuda_paper paper = {.shape = prefill_of(plan, args, SFA_POLICY_PAPER), .workspace = part(args, parts, SFA_CUDA_PART_STAGE)};
  sfa_cuda_operands_of(plan, args, parts, false, &p);
  SFA_TRY(sfa_cuda_put_numbers(plan, args, parts));
  SFA_TRY(paper_codes(plan->ctx, &p.q, o->k_q, &paper.q_codes));
  SFA_TRY(paper_codes(plan->ctx, &p.k, o->k_k, &paper.k_codes));
  SFA_TRY(sfa_cuda_rows_of(plan->ctx, &p.v, &paper.shape.v));
  SFA_TRY(clear_dropped(plan, args));
  SFA_TRY(sfa_cuda_lap(plan->ctx, SFA_STAGE_TOPK));
  SFA_TRY(sfa_cuda_status(plan->ctx, "Algorithm 1", sfa_cuda_stages_of(plan->ctx)->paper(&paper, plan->ctx->cuda->stream)));
  return sfa_cuda_lap(plan->ctx, SFA_STAGE_ATTEND);
}

/* ---- Calls ------------------------------------------------------------------------------------------------------------------------ */

sfa_status sfa_cuda_run(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  size_t parts[SFA_CUDA_N_PARTS + 1];
  sfa_cuda_parts(plan, false, parts);
  SFA_TRY(sfa_cuda_enter(plan->ctx));
  SFA_TRY(sfa_cuda_laps_begin(plan->ctx, args->stage_ns));
  SFA_TRY(plan->policy == SFA_POLICY_PAPER  ? run_paper(plan, args, parts)
          : plan->policy == SFA_POLICY_KEYS ? run_few(plan, args, parts)
                                            : run_tensor(plan, args, parts));
  return sfa_cuda_laps_end(plan->ctx);
}

/* The tables of the call's sequences: the cache's own where they follow each other, or a copy in the workspace. */
static sfa_status tables_of(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts, const sfa_kv_tables *t,
                            unsigned char *const **pages, int64_t *max_pages, const int32_t **n_keys) {
  const sfa_attention_options *o = &plan->options;
  int32_t B = o->n_sequences;
  bool follow = t->sequences != NULL;
  for (int32_t b = 1; follow && b < B; b++)
    follow = t->sequences[b] == t->sequences[0] + b;
  if (follow) {
    *pages = t->pages + t->sequences[0] * t->table_stride;
    *max_pages = t->table_stride;
    *n_keys = t->lens + t->sequences[0];
    return SFA_OK;
  }
  unsigned char **copy = part(args, parts, SFA_CUDA_PART_TABLES);
  int32_t *lens = (int32_t *)part(args, parts, SFA_CUDA_PART_NUMBERS) + SFA_CUDA_NUMBERS;
  *pages = copy;
  *max_pages = (o->max_seqlen_k + 63) / 64;
  *n_keys = lens;
  int32_t step = t->sequences ? SFA_CUDA_WORDS : B; /* row numbers travel with the launch */
  for (int32_t b = 0; b < B; b += step) {
    sfa_cuda_tables job = {.n_sequences = B - b < step ? B - b : step,
                           .rows = t->sequences ? t->sequences + b : NULL,
                           .from = t->pages,
                           .pool = t->pool,
                           .page_bytes = t->page_bytes,
                           .n_pages = t->n_pages,
                           .block_table = t->block_table,
                           .lens = t->lens,
                           .from_stride = t->table_stride,
                           .max_pages = *max_pages,
                           .max_keys = o->max_seqlen_k,
                           .pages = copy + b * *max_pages,
                           .n_keys = lens + b};
    SFA_TRY(sfa_cuda_status(plan->ctx, "page tables", sfa_cuda_help_of(plan->ctx)->tables(&job, plan->ctx->cuda->stream)));
  }
  return SFA_OK;
}

/* Keys that a call over pages sees: those before `sinks`, then begin .. end - 1. sinks and begin are whole tiles. */
typedef struct seen_keys {
  int64_t sinks, begin, end;
} seen_keys;

static int64_t whole_tiles(int64_t n) { return n / SFA_CUDA_WHOLE_TILES * SFA_CUDA_WHOLE_TILES; }

/* Without lengths on the host, all that the plan is for. */
static seen_keys seen_of(const sfa_attention_plan *plan, const sfa_kv_tables *t) {
  const sfa_attention_options *o = &plan->options;
  const sfa_cuda *cuda = plan->ctx->cuda;
  if (!t->sequences || cuda->library->stream_is_captured(cuda->stream))
    return (seen_keys){0, 0, o->max_seqlen_k};
  seen_keys seen = {0, 0, sfa_max64(t->most_len, 1)};
  if (o->has_window && o->window_size[0] >= 0) { /* the first query of the shortest sequence sees furthest back */
    seen.begin = whole_tiles(sfa_max64(t->least_len - o->max_seqlen_q - o->window_size[0], 0));
    seen.sinks = sfa_min64(whole_tiles(sfa_min64(o->n_sink_tokens, seen.begin) + SFA_CUDA_WHOLE_TILES - 1), seen.begin);
  }
  if (seen.sinks > 0 && seen.begin - seen.sinks < sfa_cuda_far_keys(plan))
    seen.sinks = seen.begin = 0;
  return seen;
}

/* Keys and values of places first .. first + n - 1 of each sequence, k_lens of them, as rows. */
static sfa_status gather(const sfa_attention_plan *plan, const sfa_kv_tables *t, const sfa_cuda_operands *p, unsigned char *const *pages,
                         int64_t max_pages, int64_t first, sfa_cuda_prefill *prefill) {
  const sfa_attention_options *o = &plan->options;
  for (int side = 0; side < 2; side++) {
    const sfa_cuda_operand *operand = side ? &p->v : &p->k;
    sfa_cuda_gather g = {.store = sfa_cuda_store_pages(side ? &t->v : &t->k, pages + first / 64, max_pages),
                         .n_sequences = o->n_sequences,
                         .n_heads = o->n_kv_heads,
                         .n_keys = prefill->k_lens,
                         .max_keys = prefill->k_tokens.max_seqlen,
                         .rows = sfa_cuda_rows_in(operand->rows, operand->whole ? SFA_I8 : SFA_BF16, o->n_kv_heads, operand->dim),
                         .row_scales = operand->scales};
    SFA_TRY(sfa_cuda_status(plan->ctx, "reading pages", sfa_cuda_stages_of(plan->ctx)->gather(&g, plan->ctx->cuda->stream)));
    *(side ? &prefill->v : &prefill->k) = g.rows;
  }
  return SFA_OK;
}

/* Queries of a call over pages, as run_tensor has them; keys and values gathered, so many at a time as the workspace has room for: then
 * the results of each turn join those before. */
static sfa_status tensor_over_tables(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts,
                                     const sfa_kv_tables *t, unsigned char *const *pages, int64_t max_pages, const int32_t *n_keys) {
  const sfa_attention_options *o = &plan->options;
  sfa_context *ctx = plan->ctx;
  const sfa_cuda_helpers *help = sfa_cuda_help_of(ctx);
  sfa_cuda_stream stream = ctx->cuda->stream;
  const int64_t most = sfa_cuda_keys_at_once(plan);
  const seen_keys seen = seen_of(plan, t);
  int32_t *lens = (int32_t *)part(args, parts, SFA_CUDA_PART_NUMBERS) + SFA_CUDA_NUMBERS + o->n_sequences, *ends = lens + o->n_sequences;
  sfa_cuda_operands p;
  sfa_cuda_prefill prefill = prefill_of(plan, args, plan->policy);
  sfa_attention_args bare = *args;
  bare.k_codes = NULL;
  bare.cu_seqlens_k = NULL;
  sfa_cuda_operands_of(plan, &bare, parts, is_whole(plan->policy), &p);
  SFA_TRY(clear_dropped(plan, args));
  SFA_TRY(sfa_cuda_rows_of(plan->ctx, &p.q, &prefill.q));
  prefill.q_scales = p.q.scales;
  prefill.k_scales = p.k.scales;
  SFA_TRY(sfa_cuda_lap(ctx, SFA_STAGE_TOPK));
  prefill.k_lens = n_keys;
  if (seen.begin > 0 || most < seen.end) { /* a part of the keys at a time */
    prefill.k_lens = lens;
    prefill.k_ends = ends;
    if (!prefill.lse && sfa_cuda_in_turns(plan))
      prefill.lse = part(args, parts, SFA_CUDA_PART_LSE_ALL);
  }
  const sfa_cuda_prefill all = prefill;
  bool begun = false;
  for (int64_t first = seen.sinks > 0 ? 0 : seen.begin, end; first < seen.end; first = end == seen.sinks ? seen.begin : end) {
    end = sfa_min64(first + most, first < seen.sinks ? seen.sinks : seen.end);
    prefill.k_tokens = (sfa_cuda_tokens){.n_sequences = o->n_sequences, .max_seqlen = end - first};
    if (prefill.k_ends)
      SFA_TRY(sfa_cuda_status(ctx, "lengths", help->span(o->n_sequences, n_keys, first, end - first, lens, ends, stream)));
    SFA_TRY(gather(plan, t, &p, pages, max_pages, first, &prefill));
    SFA_TRY(sfa_cuda_lap(ctx, SFA_STAGE_PACK));
    prefill.scores.n_sink_tokens = sfa_max64(all.scores.n_sink_tokens - first, 0);
    if (begun) {
      prefill.out.data = part(args, parts, SFA_CUDA_PART_OUT);
      prefill.lse = part(args, parts, SFA_CUDA_PART_LSE);
      prefill.scores.sink_logit = NULL; /* it has been counted */
    }
    SFA_TRY(multiply(plan, &prefill));
    if (begun)
      SFA_TRY(sfa_cuda_status(
          ctx, "joining results",
          help->merge(&prefill.q_tokens, o->n_heads, o->head_dim_v, args->out, all.lse, prefill.out.data, prefill.lse, stream)));
    SFA_TRY(sfa_cuda_lap(ctx, SFA_STAGE_JOIN));
    begun = true;
  }
  return SFA_OK;
}

sfa_status sfa_cuda_attend_tables(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_tables *t) {
  size_t parts[SFA_CUDA_N_PARTS + 1];
  unsigned char *const *pages;
  const int32_t *n_keys;
  int64_t max_pages;
  sfa_cuda_parts(plan, false, parts);
  SFA_TRY(sfa_cuda_enter(plan->ctx));
  if (plan->policy == SFA_POLICY_PAPER)
    return sfa_fail(plan->ctx, SFA_ERROR_UNSUPPORTED, "policy paper takes arguments, not pages, on a GPU: choose SFA_POLICY_AUTO");
  SFA_TRY(sfa_cuda_laps_begin(plan->ctx, args->stage_ns));
  if (args->q_codes) /* before the tables, whose lengths lie behind these */
    SFA_TRY(sfa_cuda_put_numbers(plan, args, parts));
  SFA_TRY(tables_of(plan, args, parts, t, &pages, &max_pages, &n_keys));
  if (plan->policy != SFA_POLICY_KEYS) {
    SFA_TRY(tensor_over_tables(plan, args, parts, t, pages, max_pages, n_keys));
    return sfa_cuda_laps_end(plan->ctx);
  }
  sfa_cuda_decode d = sfa_cuda_decode_shape(plan);
  d.k = sfa_cuda_store_pages(&t->k, pages, max_pages);
  d.v = sfa_cuda_store_pages(&t->v, pages, max_pages);
  d.n_keys = n_keys;
  answer_at(args, parts, &d);
  SFA_TRY(decode_queries(plan, args, parts, &d));
  SFA_TRY(decode(plan, args, parts, &d));
  SFA_TRY(put_back(plan, args, &d));
  return sfa_cuda_laps_end(plan->ctx);
}

sfa_status sfa_cuda_merge(sfa_context *ctx, int64_t n_rows, int32_t head_dim_v, float *out_a, float *lse_a, const float *out_b,
                          const float *lse_b) {
  sfa_cuda_tokens tokens = {.n_sequences = 1, .max_seqlen = n_rows};
  SFA_TRY(sfa_cuda_enter(ctx));
  return sfa_cuda_status(ctx, "joining results",
                         sfa_cuda_help_of(ctx)->merge(&tokens, 1, head_dim_v, out_a, lse_a, out_b, lse_b, ctx->cuda->stream));
}
