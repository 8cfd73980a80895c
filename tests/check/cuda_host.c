/* cuda_host: libsfa_cuda.so with the host in place of a GPU, in plain loops: what lies between the API and the stages (src/cuda's C) is
 * tested by cuda_check on machines without one. Memory is the host's, the stages are the text of cuda_stages.h, row by row, in double where
 * the text leaves the order open. Algorithm 1 and captured graphs are left to machines with a GPU. */
#include "cuda/cuda_library.h"

#include "base/fp8.h"
#include "base/half.h"
#include "code/code.h"
#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- The devices ----------------------------------------------------------------------------------------------------- */

/* A GPU of each sort: one that all stages are for, one that has some, one that is too old. */
static const int32_t computes[] = {90, 80, 75};
enum { N_DEVICES = sizeof computes / sizeof *computes, NOBODYS = 4096 /* an address whose reading loses the GPU */ };
static int32_t entered;
static bool lost;

static const char *find(int32_t capacity, sfa_cuda_found *found, int32_t *n_found) {
  for (int32_t i = 0; i < N_DEVICES && i < capacity; i++)
    found[i] = (sfa_cuda_found){.name = "the host, as a GPU",
                                .compute_major = computes[i] / 10,
                                .compute_minor = computes[i] % 10,
                                .n_processors = 1,
                                .memory_bytes = (int64_t)1 << 30,
                                .free_bytes = (int64_t)1 << 30};
  *n_found = N_DEVICES;
  return NULL;
}

static const char *enter(int32_t index) {
  entered = index;
  return index >= 0 && index < N_DEVICES ? NULL : "there is no such device";
}
static bool is_lost(void) { return lost; }

static const char *stream_create(sfa_cuda_stream *stream) {
  *stream = malloc(1);
  return *stream ? NULL : "no memory for a stream";
}
static void stream_destroy(sfa_cuda_stream stream) { free(stream); }
static const char *stream_wait(sfa_cuda_stream stream) {
  return !stream ? "no stream" : lost ? "an illegal memory access was encountered" : NULL;
}

static bool stream_is_captured(sfa_cuda_stream stream) {
  (void)stream;
  return false;
}

static const char *memory_alloc(size_t bytes, void **out, size_t *free_bytes) {
  *free_bytes = (size_t)1 << 40;
  *out = NULL;
  if (lost)
    return "an illegal memory access was encountered";
  *out = bytes > *free_bytes ? NULL : aligned_alloc(256, (bytes + 511) / 256 * 256);
  if (*out)
    memset(*out, 0xff, bytes);
  return NULL;
}
static void memory_free(void *memory) { free(memory); }

static const char *memory_copy(void *to, const void *from, size_t bytes, sfa_cuda_stream stream) {
  memcpy(to, from, bytes);
  return stream_wait(stream);
}
static const char *memory_copy_rows(void *to, size_t to_pitch, const void *from, size_t row_bytes, size_t n_rows, sfa_cuda_stream stream) {
  for (size_t i = 0; i < n_rows; i++)
    memcpy((char *)to + i * to_pitch, (const char *)from + i * row_bytes, row_bytes);
  return stream_wait(stream);
}
static const char *memory_zero(void *memory, size_t bytes, sfa_cuda_stream stream) {
  memset(memory, 0, bytes);
  return stream_wait(stream);
}

/* A mark is a count of the marks so far: each lap takes 1000 ns. */
static const char *mark_create(void **mark) { return (*mark = calloc(1, sizeof(int64_t))) ? NULL : "out of memory"; }
static void mark_destroy(void *mark) { free(mark); }
static const char *mark(void *mark, sfa_cuda_stream stream) {
  static int64_t n_marks;
  *(int64_t *)mark = ++n_marks;
  return stream_wait(stream);
}
static const char *mark_ns(void *from, void *to, int64_t *ns) {
  *ns = 1000 * (*(int64_t *)to - *(int64_t *)from);
  return NULL;
}

/* ---- Rows and stores ------------------------------------------------------------------------------------------------- */

static int64_t first_of(const sfa_cuda_tokens *t, int64_t b) { return t->cu_seqlens ? t->cu_seqlens[b] : b * t->max_seqlen; }
static int64_t len_of(const sfa_cuda_tokens *t, int64_t b) {
  return t->cu_seqlens ? t->cu_seqlens[b + 1] - t->cu_seqlens[b] : t->max_seqlen;
}

static float element(const void *row, sfa_dtype dtype, int64_t i) {
  switch (dtype) {
  case SFA_BF16: return sfa_f32_from_bf16(((const uint16_t *)row)[i]);
  case SFA_F16: return sfa_f32_from_f16(((const uint16_t *)row)[i]);
  case SFA_I8: return (float)((const int8_t *)row)[i];
  case SFA_E4M3: return sfa_f32_from_e4m3(((const uint8_t *)row)[i]);
  case SFA_I4: return (float)((int)(((const uint8_t *)row)[i / 2] >> (i % 2 ? 4 : 0) & 15) - 8);
  default: return ((const float *)row)[i];
  }
}

static void *row_at(const sfa_cuda_rows *rows, int64_t token, int64_t head) {
  return (unsigned char *)rows->data + (size_t)(token * rows->token_stride + head * rows->head_stride) * sfa_dtype_bytes(rows->dtype);
}

/* Row of a stream: element_bits of each element. */
static void *stored_at(const sfa_cuda_store *s, const sfa_kv_stream *stream, size_t element_bits, int64_t b, int64_t head, int64_t token) {
  const unsigned char *at =
      s->pages ? s->pages[b * s->max_pages + token / 64] : stream->base + b * s->sequence_bytes + (size_t)(token / 64) * stream->tile_bytes;
  return (unsigned char *)(uintptr_t)at + stream->offset + (size_t)head * stream->head_bytes +
         (size_t)(token % 64 * stream->row_stride) * element_bits / 8;
}
static size_t value_bits(sfa_dtype dtype) { return dtype == SFA_I4 ? 4 : 8 * sfa_dtype_bytes(dtype); }

/* A stored row as numbers [dim]. */
static void load_stored(const sfa_cuda_store *s, int64_t b, int64_t head, int64_t token, float *row) {
  const sfa_row_format *f = &s->format;
  const void *values = stored_at(s, &s->values, value_bits(f->dtype), b, head, token);
  float scale = sfa_has_scales(f->dtype) ? sfa_f32_from_f16(*(uint16_t *)stored_at(s, &s->scales, 16, b, head, token)) : 1;
  memset(row, 0, (size_t)f->dim * sizeof *row);
  const void *ids = f->k ? stored_at(s, &s->ids, 8 * sfa_id_bytes(f->dim), b, head, token) : NULL;
  for (int32_t u = 0; u < sfa_row_width(f); u++)
    row[ids ? sfa_id_at(ids, f->dim, u) : u] = element(values, f->dtype, u) * scale;
}

/* A row of numbers to rows for the tensor cores. */
static void put_row(const sfa_cuda_rows *rows, float *scales, int64_t token, int64_t head, int32_t n_heads, int32_t dim, const float *row) {
  void *to = row_at(rows, token, head);
  int *whole = malloc((size_t)dim * sizeof *whole);
  if (rows->dtype == SFA_I8)
    scales[token * n_heads + head] = (float)oracle_i8(row, dim, whole);
  for (int32_t f = 0; f < dim; f++)
    if (rows->dtype == SFA_I8)
      ((int8_t *)to)[f] = (int8_t)whole[f];
    else
      ((uint16_t *)to)[f] = sfa_bf16_from_f32(row[f]);
  free(whole);
}

/* A row, turned by a line of a rope. */
static void turn(float *x, const float *cosines, const float *sines, int32_t n_pairs, int32_t interleaved) {
  for (int32_t p = 0; p < n_pairs; p++) {
    float *a = &x[interleaved ? 2 * p : p], *c = &x[interleaved ? 2 * p + 1 : p + n_pairs], was = *a;
    *a = was * cosines[p] - *c * sines[p];
    *c = *c * cosines[p] + was * sines[p];
  }
}

/* ---- Stages ---------------------------------------------------------------------------------------------------------- */

static const char *select_rows(const sfa_cuda_select *s, sfa_cuda_stream stream) {
  lost = lost || s->x.data == (void *)(uintptr_t)NOBODYS;
  if (lost)
    return stream_wait(stream);
  int32_t D = s->dim, k = s->k == D ? 0 : s->k;
  float *x = malloc((size_t)D * sizeof *x), *kept = malloc((size_t)D * sizeof *kept);
  int *ids = malloc((size_t)D * sizeof *ids);
  for (int64_t b = 0; b < s->tokens.n_sequences; b++)
    for (int64_t t = 0; t < len_of(&s->tokens, b); t++)
      for (int32_t h = 0; h < s->n_heads; h++) {
        int64_t token = first_of(&s->tokens, b) + t, line = s->first_line ? s->first_line[b] + t : token;
        for (int32_t f = 0; f < D; f++)
          x[f] = element(row_at(&s->x, token, h), s->x.dtype, f);
        if (s->norm_weight)
          sfa_kernel_of(SFA_ISA_SCALAR)->norm_rows(1, D, x, D, s->norm_weight, s->norm_eps, x, D);
        if (s->rope_cos)
          turn(x, s->rope_cos + line * s->n_pairs, s->rope_sin + line * s->n_pairs, s->n_pairs, s->rope_interleaved);
        for (int32_t four = 0; s->two_of_four && four < D; four += 4) {
          oracle_topk(x + four, 4, 2, ids);
          for (int f = 0; f < 4; f++)
            if (f != ids[0] && f != ids[1])
              x[four + f] = 0;
        }
        memcpy(kept, x, (size_t)D * sizeof *x);
        for (int32_t f = 0; f < D; f++)
          ids[f] = f;
        if (k) {
          oracle_topk(x, D, k, ids);
          memset(kept, 0, (size_t)D * sizeof *kept);
          for (int32_t u = 0; u < k; u++)
            kept[ids[u]] = x[ids[u]];
        }
        for (int32_t word = 0; s->support && word < (D + 31) / 32; word++)
          s->support[(token * s->n_heads + h) * ((D + 31) / 32) + word] = 0;
        for (int32_t u = 0; s->support && u < (k ? k : D); u++)
          s->support[(token * s->n_heads + h) * ((D + 31) / 32) + ids[u] / 32] |= 1u << ids[u] % 32;
        if (s->rows_f32)
          memcpy(s->rows_f32 + (token * s->n_heads + h) * D, kept, (size_t)D * sizeof *kept);
        if (s->has_store) {
          const sfa_cuda_store *to = &s->store;
          int64_t stored = t + (s->first_token ? s->first_token[b] : 0);
          size_t bytes = sfa_code_scratch_bytes(&to->format, 1);
          void *scratch = aligned_alloc(64, bytes + 64);
          sfa_row_source source = {.data = x, .dtype = SFA_F32, .row_stride = D};
          sfa_row_store at = {to->format.k ? stored_at(to, &to->ids, 8 * sfa_id_bytes(D), b, h, stored) : NULL,
                              stored_at(to, &to->values, value_bits(to->format.dtype), b, h, stored),
                              sfa_has_scales(to->format.dtype) ? stored_at(to, &to->scales, 16, b, h, stored) : NULL};
          if (sfa_code_rows(sfa_kernel_of(SFA_ISA_SCALAR), 1, &source, &to->format, &at, scratch, NULL) && s->n_bad)
            ++*s->n_bad;
          free(scratch);
          load_stored(to, b, h, stored, kept);
        }
        if (s->rows.data)
          put_row(&s->rows, s->row_scales, token, h, s->n_heads, D, kept);
      }
  free(x), free(kept), free(ids);
  return stream_wait(stream);
}

static const char *store(const sfa_cuda_select *k, const sfa_cuda_select *v, int32_t *len, sfa_cuda_stream stream) {
  select_rows(k, stream);
  select_rows(v, stream);
  *len += (int32_t)k->tokens.max_seqlen;
  return stream_wait(stream);
}

static const char *gather(const sfa_cuda_gather *g, sfa_cuda_stream stream) {
  float *row = malloc((size_t)g->store.format.dim * sizeof *row);
  for (int64_t b = 0; b < g->n_sequences; b++)
    for (int64_t t = 0; t < g->n_keys[b]; t++)
      for (int32_t h = 0; h < g->n_heads; h++) {
        load_stored(&g->store, b, h, t, row);
        put_row(&g->rows, g->row_scales, b * g->max_keys + t, h, g->n_heads, g->store.format.dim, row);
      }
  free(row);
  return stream_wait(stream);
}

/* The oracle's problem of T queries and S keys of a sequence, from rows of numbers. */
static oracle_problem problem_of(int64_t T, int64_t S, int32_t H, int32_t G, int32_t D, int32_t E, const sfa_cuda_scores *c, const float *q,
                                 const float *k, const float *v) {
  return (oracle_problem){.n_queries = (int)T,
                          .n_keys = (int)S,
                          .n_heads = H,
                          .n_kv_heads = G,
                          .head_dim = D,
                          .head_dim_v = E,
                          .k_storage = ORACLE_F32,
                          .v_storage = ORACLE_F32,
                          .softmax_scale = (double)c->softmax_scale,
                          .softcap = (double)c->softcap,
                          .causal = c->causal,
                          .has_window = 1,
                          .window_left = c->window_left,
                          .window_right = c->window_right,
                          .n_sink_tokens = c->n_sink_tokens,
                          .sink_logit = c->sink_logit,
                          .alibi_slopes = c->alibi_slopes,
                          .q = q,
                          .k = k,
                          .v = v};
}

/* Rows of n tokens as numbers. */
static float *numbers_of(const sfa_cuda_rows *rows, const float *scales, int64_t first, int64_t n, int32_t n_heads, int32_t dim) {
  float *x = malloc((size_t)(n * n_heads * dim + 1) * sizeof *x);
  for (int64_t i = 0; i < n * n_heads; i++)
    for (int32_t f = 0; f < dim; f++)
      x[i * dim + f] = element(row_at(rows, first + i / n_heads, i % n_heads), rows->dtype, f) *
                       (rows->dtype == SFA_I8 ? scales[first * n_heads + i] : 1);
  return x;
}

static const char *prefill(const sfa_cuda_prefill *p, sfa_cuda_stream stream) {
  int32_t H = p->n_heads, G = p->n_kv_heads, D = p->head_dim, E = p->head_dim_v;
  for (int64_t b = 0; b < p->q_tokens.n_sequences; b++) {
    int64_t q0 = first_of(&p->q_tokens, b), T = len_of(&p->q_tokens, b), k0 = first_of(&p->k_tokens, b);
    int64_t S = p->k_lens ? p->k_lens[b] : len_of(&p->k_tokens, b);
    float *q = numbers_of(&p->q, p->q_scales, q0, T, H, D), *k = numbers_of(&p->k, p->k_scales, k0, S, G, D),
          *v = numbers_of(&p->v, NULL, k0, S, G, E);
    double *out = malloc((size_t)(T * H * E + 1) * sizeof *out), *lse = malloc((size_t)(T * H + 1) * sizeof *lse);
    oracle_problem problem = problem_of(T, S, H, G, D, E, &p->scores, q, k, v);
    problem.n_keys_behind = p->k_ends ? p->k_ends[b] - S : 0;
    oracle_attention_f64(&problem, out, lse);
    for (int64_t i = 0; i < T * H; i++) {
      if (p->lse)
        p->lse[q0 * H + i] = (float)lse[i];
      for (int32_t e = 0; e < E; e++)
        ((float *)row_at(&p->out, q0 + i / H, i % H))[e] = (float)out[i * E + e];
    }
    free(q), free(k), free(v), free(out), free(lse);
  }
  return stream_wait(stream);
}

/* Rows are read 16 bytes at a time. Code of sm_90a runs on no other GPU; mma.sync has bf16 rows alone. */
static const char *prefill_aligned(const sfa_cuda_prefill *p, sfa_cuda_stream stream) {
  const sfa_cuda_rows *const all[] = {&p->q, &p->k, &p->v};
  for (int i = 0; i < 3; i++) {
    size_t bytes = sfa_dtype_bytes(all[i]->dtype);
    if (((uintptr_t)all[i]->data | (size_t)all[i]->token_stride * bytes | (size_t)all[i]->head_stride * bytes) % 16)
      return "rows lie apart by what is no multiple of 16 bytes";
  }
  return prefill(p, stream);
}
static const char *prefill_sm90(const sfa_cuda_prefill *p, sfa_cuda_stream stream) {
  return computes[entered] == 90 ? prefill_aligned(p, stream) : "no kernel image is available for execution on the device";
}
static const char *prefill_portable(const sfa_cuda_prefill *p, sfa_cuda_stream stream) {
  return p->policy == SFA_POLICY_BF16 && p->q.dtype == SFA_BF16 ? prefill_aligned(p, stream) : "rows of bf16 are all that there is here";
}

static size_t decode_bytes(const sfa_cuda_decode *d) { return (size_t)d->n_sequences * 256; }

static const char *decode(const sfa_cuda_decode *d, sfa_cuda_stream stream) {
  int32_t H = d->n_heads, G = d->n_kv_heads, D = d->head_dim, E = d->head_dim_v;
  int64_t T = d->n_queries;
  memset(d->workspace, 0xff, decode_bytes(d));
  if (d->between)
    mark(d->between, stream);
  for (int64_t b = 0; b < d->n_sequences; b++) {
    int64_t S = d->n_keys[b];
    float *q = numbers_of(&d->q, NULL, b * T, T, H, D), *k = malloc((size_t)(S * G * D + 1) * sizeof *k),
          *v = malloc((size_t)(S * G * E + 1) * sizeof *v);
    double *out = malloc((size_t)(T * H * E + 1) * sizeof *out), *lse = malloc((size_t)(T * H + 1) * sizeof *lse);
    for (int64_t i = 0; d->rope_cos && i < T * H; i++)
      turn(q + i * D, d->rope_cos + i / H * d->n_pairs, d->rope_sin + i / H * d->n_pairs, d->n_pairs, d->rope_interleaved);
    for (int64_t j = 0; j < S * G; j++) {
      load_stored(&d->k, b, j % G, j / G, k + j * D);
      load_stored(&d->v, b, j % G, j / G, v + j * E);
    }
    oracle_problem problem = problem_of(T, S, H, G, D, E, &d->scores, q, k, v);
    problem.k_q = d->k_q;
    oracle_attention_f64(&problem, out, lse);
    for (int64_t i = 0; i < T * H; i++) {
      int64_t row = b * T * H + i;
      if (d->lse)
        d->lse[row] = (float)lse[i];
      if (d->dropped)
        d->dropped[row] = 0;
      for (int32_t e = 0; e < E; e++)
        d->out[row * E + e] = (float)out[i * E + e];
    }
    free(q), free(k), free(v), free(out), free(lse);
  }
  return stream_wait(stream);
}

static size_t paper_bytes(const sfa_cuda_paper *args) { return (size_t)args->shape.q_tokens.n_sequences * 256; }

static float *dense_codes(const sfa_codes *codes, int64_t first_row, int64_t n_rows) {
  float *x = calloc((size_t)(n_rows * codes->head_dim + 1), sizeof *x);
  for (int64_t i = 0; i < n_rows; i++)
    for (int32_t u = 0; u < codes->k; u++)
      x[i * codes->head_dim + sfa_code_id(codes, first_row + i, u)] = sfa_code_value(codes, first_row + i, u);
  return x;
}

/* As prefill, over codes. */
static const char *paper(const sfa_cuda_paper *args, sfa_cuda_stream stream) {
  const sfa_cuda_prefill *shape = &args->shape;
  int64_t n_q = first_of(&shape->q_tokens, shape->q_tokens.n_sequences) * shape->n_heads;
  int64_t n_k = first_of(&shape->k_tokens, shape->k_tokens.n_sequences) * shape->n_kv_heads;
  sfa_cuda_prefill p = *shape;
  memset(args->workspace, 0xff, paper_bytes(args));
  p.q = (sfa_cuda_rows){dense_codes(&args->q_codes, 0, n_q), SFA_F32, (int64_t)p.n_heads * p.head_dim, p.head_dim};
  p.k = (sfa_cuda_rows){dense_codes(&args->k_codes, 0, n_k), SFA_F32, (int64_t)p.n_kv_heads * p.head_dim, p.head_dim};
  const char *text = prefill(&p, stream);
  free(p.q.data), free(p.k.data);
  return text;
}

static size_t backward_bytes(const sfa_cuda_backward *args) { return (size_t)args->q_tokens.n_sequences * 256; }

/* Gradients [n][n_heads][dim] to where they go, 0 outside of the supports. */
static void put_gradients(const sfa_cuda_gradient *to, int64_t first, int64_t n, int32_t n_heads, int32_t dim, const double *x) {
  int32_t n_words = (dim + 31) / 32;
  for (int64_t i = 0; i < n * n_heads; i++) {
    int64_t row = first * n_heads + i;
    float *out = to->rows.data ? row_at(&to->rows, first + i / n_heads, i % n_heads) : NULL;
    float *values = to->values ? to->values + row * to->k : NULL;
    for (int32_t f = 0; f < dim; f++) {
      bool kept = !to->support || (to->support[row * n_words + f / 32] >> f % 32 & 1);
      if (out)
        out[f] = kept ? (float)x[i * dim + f] : 0;
      if (values && kept)
        *values++ = (float)x[i * dim + f];
    }
  }
}

static const char *backward(const sfa_cuda_backward *p, sfa_cuda_stream stream) {
  int32_t H = p->n_heads, G = p->n_kv_heads, D = p->head_dim, E = p->head_dim_v;
  if (computes[entered] != 90)
    return "gradients need a GPU of compute capability 9.0";
  memset(p->workspace, 0xff, backward_bytes(p));
  for (int32_t h = 0; p->d_sink_logit && h < H; h++)
    p->d_sink_logit[h] = 0;
  for (int64_t b = 0; b < p->q_tokens.n_sequences; b++) {
    int64_t q0 = first_of(&p->q_tokens, b), T = len_of(&p->q_tokens, b), k0 = first_of(&p->k_tokens, b), S = len_of(&p->k_tokens, b);
    float *q = numbers_of(&p->q, NULL, q0, T, H, D), *k = numbers_of(&p->k, NULL, k0, S, G, D), *v = numbers_of(&p->v, NULL, k0, S, G, E);
    float *d_out = numbers_of(&p->d_out, NULL, q0, T, H, E);
    oracle_grad_f64 grad = {malloc((size_t)(T * H * D + 1) * sizeof(double)), malloc((size_t)(S * G * D + 1) * sizeof(double)),
                            malloc((size_t)(S * G * E + 1) * sizeof(double)), malloc((size_t)H * sizeof(double))};
    oracle_problem problem = problem_of(T, S, H, G, D, E, &p->scores, q, k, v);
    oracle_backward_f64(&problem, d_out, p->d_lse ? p->d_lse + q0 * H : NULL, &grad);
    put_gradients(&p->d_q, q0, T, H, D, grad.q);
    put_gradients(&p->d_k, k0, S, G, D, grad.k);
    put_gradients(&p->d_v, k0, S, G, E, grad.v);
    for (int32_t h = 0; p->d_sink_logit && h < H; h++)
      p->d_sink_logit[h] += (float)grad.sink_logit[h];
    free(q), free(k), free(v), free(d_out), free(grad.q), free(grad.k), free(grad.v), free(grad.sink_logit);
  }
  return stream_wait(stream);
}

/* ---- Between them (cuda_help.h) -------------------------------------------------------------------------------------- */

static const char *words(uint64_t *to, int32_t n, const uint64_t *values, sfa_cuda_stream stream) {
  memcpy(to, values, (size_t)n * sizeof *to);
  return stream_wait(stream);
}

static const char *lens(int32_t *at, int64_t stride, int64_t n, int32_t len, sfa_cuda_len_change change, sfa_cuda_stream stream) {
  for (int64_t i = 0; i < n; i++) {
    int32_t *l = &at[i * stride];
    *l = change == SFA_CUDA_LEN_AT_MOST && *l < len ? *l : len;
  }
  return stream_wait(stream);
}

static const char *numbers(const sfa_cuda_tokens *q, const sfa_cuda_tokens *k, int32_t *to, sfa_cuda_stream stream) {
  to[0] = to[2] = 0;
  to[1] = (int32_t)first_of(q, q->n_sequences);
  to[3] = (int32_t)first_of(k, k->n_sequences);
  for (int64_t b = 0; b < k->n_sequences; b++)
    to[SFA_CUDA_NUMBERS + b] = (int32_t)len_of(k, b);
  return stream_wait(stream);
}

static const char *span(int32_t n_sequences, const int32_t *n_keys, int64_t first, int64_t most, int32_t *lens_of, int32_t *ends,
                        sfa_cuda_stream stream) {
  for (int32_t b = 0; b < n_sequences; b++) {
    int64_t left = n_keys[b] - first;
    lens_of[b] = (int32_t)(left < 0 ? 0 : sfa_min64(left, most));
    ends[b] = (int32_t)left;
  }
  return stream_wait(stream);
}

static const char *tables(const sfa_cuda_tables *t, sfa_cuda_stream stream) {
  for (int32_t b = 0; b < t->n_sequences; b++) {
    int32_t row = t->rows ? t->rows[b] : t->first_row + b;
    t->n_keys[b] = t->lens[t->from ? row : b];
    for (int64_t i = 0; i * 64 < t->n_keys[b]; i++)
      t->pages[b * t->max_pages + i] =
          t->from ? t->from[row * t->from_stride + i]
                  : (unsigned char *)(uintptr_t)t->pool + (size_t)t->block_table[b * t->from_stride + i] * t->page_bytes;
  }
  return stream_wait(stream);
}

static const char *slots(int64_t n, const int64_t *from, unsigned char *pool, size_t page_bytes, int64_t n_pages, unsigned char *nowhere,
                         unsigned char **pages, int32_t *tokens, sfa_cuda_stream stream) {
  for (int64_t i = 0; i < n; i++) {
    bool there = from[i] >= 0 && from[i] < n_pages * 64;
    pages[i] = there ? pool + (size_t)(from[i] / 64) * page_bytes : nowhere;
    tokens[i] = there ? (int32_t)(from[i] % 64) : 0;
  }
  return stream_wait(stream);
}

static const char *unpack(const sfa_cuda_places *p, sfa_cuda_stream stream) {
  unsigned char *apart = p->apart;
  size_t width = (size_t)p->row_bytes;
  memset(apart, 0, (size_t)(p->tokens.n_sequences * p->tokens.max_seqlen) * width);
  for (int64_t b = 0; b < p->tokens.n_sequences; b++) {
    int64_t n = len_of(&p->tokens, b), first = b * p->tokens.max_seqlen + (p->at_end ? p->tokens.max_seqlen - n : 0);
    if (n && width) /* packed is NULL where there is nothing, as of codes without scales */
      memcpy(apart + (size_t)first * width, (unsigned char *)p->packed + (size_t)first_of(&p->tokens, b) * width, (size_t)n * width);
  }
  return stream_wait(stream);
}

static const char *pack(const sfa_cuda_places *p, sfa_cuda_stream stream) {
  size_t width = (size_t)p->row_bytes;
  for (int64_t b = 0; b < p->tokens.n_sequences; b++) {
    int64_t n = len_of(&p->tokens, b), first = b * p->tokens.max_seqlen + (p->at_end ? p->tokens.max_seqlen - n : 0);
    unsigned char *packed = (unsigned char *)p->packed + (size_t)first_of(&p->tokens, b) * width;
    if (p->apart)
      memcpy(packed, (unsigned char *)p->apart + (size_t)first * width, (size_t)n * width);
    else
      memset(packed, 0, (size_t)n * width);
  }
  return stream_wait(stream);
}

static const char *merge(const sfa_cuda_tokens *tokens, int32_t n_heads, int32_t dim, float *out_a, float *lse_a, const float *out_b,
                         const float *lse_b, sfa_cuda_stream stream) {
  int64_t n_rows = first_of(tokens, tokens->n_sequences) * n_heads;
  for (int64_t i = 0; i < n_rows; i++) {
    double a = exp((double)lse_a[i]), b = exp((double)lse_b[i]);
    for (int64_t e = i * dim; e < (i + 1) * dim; e++)
      out_a[e] = a + b == 0 ? 0 : (float)((a * (double)out_a[e] + b * (double)out_b[e]) / (a + b));
    lse_a[i] = (float)log(a + b);
  }
  return stream_wait(stream);
}

static const char *spread(const sfa_codes *codes, float *rows, int64_t row_stride, uint32_t *support, sfa_cuda_stream stream) {
  int32_t D = codes->head_dim, n_words = (D + 31) / 32;
  for (int64_t i = 0; i < codes->n_rows; i++) {
    for (int32_t f = 0; rows && f < D; f++)
      rows[i * row_stride + f] = 0;
    for (int32_t w = 0; support && w < n_words; w++)
      support[i * n_words + w] = 0;
    for (int32_t u = 0; u < codes->k; u++) {
      int32_t f = sfa_code_id(codes, i, u);
      if (rows)
        rows[i * row_stride + f] = sfa_code_value(codes, i, u);
      if (support)
        support[i * n_words + f / 32] |= 1u << f % 32;
    }
  }
  return stream_wait(stream);
}

static const char *unrotate(const sfa_cuda_tokens *tokens, int32_t n_heads, int32_t dim, const sfa_rope *rope, float *rows,
                            int64_t token_stride, sfa_cuda_stream stream) {
  int32_t n_pairs = rope->n_rotated / 2;
  for (int64_t t = 0; t < first_of(tokens, tokens->n_sequences); t++)
    for (int64_t i = 0; i < (int64_t)n_heads * n_pairs; i++) {
      int64_t p = i % n_pairs, line = tokens->cu_seqlens ? t : t % tokens->max_seqlen;
      float *row = rows + t * token_stride + i / n_pairs * dim, cosine = rope->cos[line * n_pairs + p],
            sine = rope->sin[line * n_pairs + p];
      float *x = row + (rope->interleaved ? 2 * p : p), *y = rope->interleaved ? x + 1 : x + n_pairs, a = *x, b = *y;
      *x = a * cosine + b * sine;
      *y = b * cosine - a * sine;
    }
  return stream_wait(stream);
}

/* ---- The table ------------------------------------------------------------------------------------------------------- */

static const sfa_cuda_library library = {
    .find = find,
    .enter = enter,
    .is_lost = is_lost,
    .stream_create = stream_create,
    .stream_destroy = stream_destroy,
    .stream_wait = stream_wait,
    .stream_is_captured = stream_is_captured,
    .memory_alloc = memory_alloc,
    .memory_free = memory_free,
    .memory_copy = memory_copy,
    .memory_copy_rows = memory_copy_rows,
    .memory_zero = memory_zero,
    .mark_create = mark_create,
    .mark_destroy = mark_destroy,
    .mark = mark,
    .mark_ns = mark_ns,
    .help = {words, lens, numbers, span, tables, slots, unpack, pack, merge, spread, unrotate},
    .stages = {.select = select_rows,
               .store = store,
               .gather = gather,
               .prefill_sm90 = prefill_sm90,
               .prefill_portable = prefill_portable,
               .decode_bytes = decode_bytes,
               .decode = decode,
               .backward_bytes = backward_bytes,
               .backward = backward,
               .paper_bytes = paper_bytes,
               .paper = paper},
};

const sfa_cuda_library *sfa_backend_cuda_open(const char *version, size_t interface_bytes) {
  return strcmp(version, SFA_VERSION) == 0 && interface_bytes == SFA_CUDA_INTERFACE ? &library : NULL;
}
