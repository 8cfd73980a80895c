/* Attention in 16 bits: blocks of many query rows meet packed keys, a chunk at a time (kernel/kernel_half.h).
 *
 * A call packs keys and values once, chunk by chunk, and notes of each chunk its longest key and its largest value. Then blocks run, a few
 * of one kv head to an item, from the last one down. Of a block's rows and of the chunks that they see comes a bound on every score,
 * |s| <= |q| max|k| (Cauchy and Schwarz), and the bound chooses how the block is computed:
 *
 *     CODES   f16 sums, near (no shift) or far (shifted); of operands that are exactly bf16 only where the bound is small, because f16
 *             sums then lose what products of bf16 would not
 *     DENSE   bf16 products with f32 sums, likewise near or far
 *     F32     attn_tile.c, for what 16 bits cannot hold: huge scores or values, inf and NaN
 *
 * Which rows share a block decides that, and so does T; the number of threads and the other sequences do not. */
#include "attn/attn_half.h"

#include "attn/attn_tile.h"
#include "base/half.h"
#include "code/code.h"
#include "kernel/kernel_half.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
  MAX_BLOCKS = 4,     /* of an item */
  ENOUGH_BLOCKS = 16, /* fewer, and blocks are made narrower */
  ENOUGH_ITEMS = 32,  /* fewer, and items get fewer blocks */
  /* Bounds in units of 1/128 octave. Codes: t = s - shift reaches twice the bound and must fit 16 bits. Dense: what t is beyond 16 bits
   * costs another round of shifting per 256 octaves. */
  CODES_LIMIT = 120 * SFA_HALF_OCTAVE,
  DENSE_LIMIT = 1024 * SFA_HALF_OCTAVE
};
/* Lengths of keys and of queries (in those units) whose f16 entries neither overflow nor lose bits that count. */
static const float shortest_key = 0x1p-6f, longest_key = 0x1p14f, longest_query = 0x1p15f;
/* Weights reach 2^16, and 2^8 beside a shift: sums of values stay finite. */
static const float largest_value = 0x1p92f;

/* ---- What the options allow --------------------------------------------------------------------------------------------------------- */

/* Rows of a block: as many as the kernels like, fewer where that leaves threads without work. By shape alone: what shares a block shows in
 * the result. */
static int32_t block_width(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  int32_t width = sfa_half_width(o->head_dim);
  while (width > SFA_HALF_MIN_WIDTH && (int64_t)o->n_sequences * o->n_kv_heads * o->max_seqlen_q * plan->group < ENOUGH_BLOCKS * width)
    width /= 2;
  return width;
}

bool sfa_attn_half_dense_fits(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]) {
  const sfa_attention_options *o = &plan->options;
  float scale = fabsf(o->softmax_scale);
  int32_t W = block_width(plan);
  bool asked = o->policy == SFA_POLICY_HALF_CODES || o->policy == SFA_POLICY_HALF_DENSE;
  const char *hint = "choose SFA_POLICY_AUTO, which takes an f32 way";
  why[0] = 0;
  if (!sfa_half_kernel_of(plan->ctx->isa) || (plan->ctx->isa == SFA_ISA_SCALAR && !asked))
    snprintf(why, SFA_ATTN_WHY_BYTES, "16-bit attention needs AVX512-FP16 and AMX, the context has %s: %s", sfa_isa_name(plan->ctx->isa),
             hint);
  else if (o->head_dim > 256)
    snprintf(why, SFA_ATTN_WHY_BYTES, "16-bit attention takes head_dim up to 256, it is %d: %s", o->head_dim, hint);
  else if (o->softcap > 0)
    snprintf(why, SFA_ATTN_WHY_BYTES, "16-bit attention has no softcap, it is %g: %s", (double)o->softcap, hint);
  else if (!(scale >= 0x1p-60f && scale <= 0x1p60f))
    snprintf(why, SFA_ATTN_WHY_BYTES, "16-bit attention takes a softmax_scale of 2^-60 to 2^60, it is %g: %s", (double)o->softmax_scale,
             hint);
  else if (plan->n_blocks > 1 && W % plan->width) /* not with today's widths; blocks of both kinds must end together */
    snprintf(why, SFA_ATTN_WHY_BYTES, "blocks of %d query rows do not divide %d: %s", plan->width, W, hint);
  return !why[0];
}

bool sfa_attn_half_codes_fits(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]) {
  if (!sfa_attn_half_dense_fits(plan, why))
    return false;
  if (!plan->k_format.k)
    snprintf(why, SFA_ATTN_WHY_BYTES, "keys are dense (k_k is %d): choose SFA_POLICY_HALF_DENSE", plan->options.k_k);
  return !why[0];
}

/* ---- Memory ------------------------------------------------------------------------------------------------------------------------- */

/* Of a chunk: its longest key, squared (infinite or NaN if an entry is), and its largest |value|. */
typedef struct chunk_facts {
  float key_square, value;
} chunk_facts;

/* A call: what is where. Offsets into the policy's memory. */
typedef struct half_call {
  sfa_attn_call call;
  const sfa_half_kernels *kernels;
  unsigned char *memory;
  bool codes; /* keys are packed as codes */
  int32_t W, Dp, Ep, K, n_together;
  int64_t n_chunks, n_blocks; /* of a (sequence, kv head) */
  size_t key_bytes, value_bytes, scratch_bytes, block_bytes;
  size_t facts, keys, values, scratch; /* [B G][n_chunks], threads */
} half_call;

/* A block of query rows. */
typedef struct half_block {
  const half_call *job;
  int32_t b, g, thread, n_rows; /* of a sequence, a kv head */
  int64_t first_row, n_keys;
  enum { CODES, DENSE, F32 } kind;
  bool far;
  float unit;            /* of DENSE: a product's worth */
  uint16_t *Q;           /* in the form of the kind */
  float *O, *l, *m;      /* [E][W] transposed, [W], [W] */
  float *squares;        /* [W] squared lengths of queries, in units */
  int64_t *first, *last; /* [W] keys that a row sees, sink tokens apart */
} half_block;

static size_t take(size_t *used, size_t count, size_t bytes) {
  size_t at = *used;
  *used += sfa_align64(count * bytes);
  return at;
}

/* A thread's memory that its blocks share: weights, and what one chunk needs on the way. */
typedef struct half_scratch {
  uint16_t *P;
  sfa_half_mask *mask;
  int16_t *top;
  float *factor;
  float **rows;                /* [W] of out */
  float *keys_f32, *dense_f32; /* [64][D] of int8 keys, of codes written out */
  uint16_t *keys;              /* a chunk packed as dense rows, where codes will not do */
  unsigned char *blocks;
} half_scratch;

static size_t scratch_place(const half_call *job, unsigned char *memory, half_scratch *s) {
  size_t used = 0, W = (size_t)job->W;
  s->P = (uint16_t *)(void *)(memory + take(&used, W / 32, SFA_HALF_WEIGHTS_STRIDE * sizeof(uint16_t)));
  s->mask = (sfa_half_mask *)(void *)(memory + take(&used, 1, sizeof(sfa_half_mask)));
  s->top = (int16_t *)(void *)(memory + take(&used, W, sizeof(int16_t)));
  s->factor = (float *)(void *)(memory + take(&used, W, sizeof(float)));
  s->rows = (float **)(void *)(memory + take(&used, W, sizeof(float *)));
  s->keys_f32 = (float *)(void *)(memory + take(&used, SFA_KEY_TILE * (size_t)job->Dp, sizeof(float)));
  s->dense_f32 = (float *)(void *)(memory + take(&used, SFA_KEY_TILE * (size_t)job->Dp, sizeof(float)));
  s->keys = (uint16_t *)(void *)(memory + take(&used, job->codes ? SFA_HALF_CHUNK * (size_t)job->Dp : 0, sizeof(uint16_t)));
  s->blocks = memory + used;
  return used + MAX_BLOCKS * job->block_bytes;
}

static size_t block_place(const half_call *job, unsigned char *memory, half_block *block) {
  size_t used = 0, W = (size_t)job->W;
  block->Q = (uint16_t *)(void *)(memory + take(&used, W * (size_t)job->Dp, sizeof(uint16_t)));
  block->O = (float *)(void *)(memory + take(&used, W * (size_t)job->Ep, sizeof(float)));
  block->l = (float *)(void *)(memory + take(&used, W, sizeof(float)));
  block->m = (float *)(void *)(memory + take(&used, W, sizeof(float)));
  block->squares = (float *)(void *)(memory + take(&used, W, sizeof(float)));
  block->first = (int64_t *)(void *)(memory + take(&used, W, sizeof(int64_t)));
  block->last = (int64_t *)(void *)(memory + take(&used, W, sizeof(int64_t)));
  return used;
}

/* Fills all but call and kernels; returns the bytes. */
static size_t half_place(const sfa_attention_plan *plan, half_call *job) {
  const sfa_attention_options *o = &plan->options;
  half_scratch scratch;
  half_block block;
  size_t used = 0, n_pairs = (size_t)o->n_sequences * (size_t)o->n_kv_heads;
  job->codes = plan->policy == SFA_POLICY_HALF_CODES;
  job->W = block_width(plan);
  job->Dp = sfa_half_padded(o->head_dim);
  job->Ep = sfa_half_padded(o->head_dim_v);
  job->K = plan->k_format.k;
  job->n_chunks = (o->max_seqlen_k + SFA_HALF_CHUNK - 1) / SFA_HALF_CHUNK;
  job->n_blocks = (o->max_seqlen_q * plan->group + job->W - 1) / job->W;
  /* Blocks that go through the keys together bring them from afar once; enough items must be left for threads to share evenly. */
  job->n_together = (int32_t)sfa_min64(sfa_max64((int64_t)n_pairs * job->n_blocks / ENOUGH_ITEMS, 1), MAX_BLOCKS);
  job->key_bytes =
      SFA_HALF_CHUNK * (job->codes ? (size_t)job->K * (sizeof(uint32_t) + sizeof(uint16_t)) : (size_t)job->Dp * sizeof(uint16_t));
  job->value_bytes = SFA_HALF_CHUNK * (size_t)job->Ep * sizeof(uint16_t);
  job->block_bytes = block_place(job, job->memory, &block);
  job->scratch_bytes = scratch_place(job, job->memory, &scratch);
  job->facts = take(&used, n_pairs * (size_t)job->n_chunks, sizeof(chunk_facts));
  job->keys = take(&used, n_pairs * (size_t)job->n_chunks, job->key_bytes);
  job->values = take(&used, n_pairs * (size_t)job->n_chunks, job->value_bytes);
  job->scratch = take(&used, (size_t)plan->ctx->n_threads, job->scratch_bytes);
  return used;
}

size_t sfa_attn_half_workspace_bytes(const sfa_attention_plan *plan) {
  unsigned char nowhere; /* sizes alone are wanted */
  half_call job = {.memory = &nowhere};
  const sfa_attention_options *o = &plan->options;
  size_t n_keys, per_key = 8 * ((size_t)o->head_dim + (size_t)o->head_dim_v + 64), bytes; /* more than a packed key and its value */
  if (!sfa_mul_size((size_t)o->n_sequences * (size_t)o->n_kv_heads, (size_t)o->max_seqlen_k + SFA_HALF_CHUNK, &n_keys) ||
      !sfa_mul_size(n_keys, per_key, &bytes))
    return SIZE_MAX; /* fits no address */
  return half_place(plan, &job);
}

/* Chunk `chunk` of (b, g). */
static size_t chunk_index(const half_call *job, int32_t b, int32_t g, int64_t chunk) {
  return (size_t)(((int64_t)b * job->call.plan->options.n_kv_heads + g) * job->n_chunks + chunk);
}
static chunk_facts *facts_of(const half_call *job, size_t index) { return (chunk_facts *)(void *)(job->memory + job->facts) + index; }
static uint16_t *values_of(const half_call *job, size_t index) {
  return (uint16_t *)(void *)(job->memory + job->values + index * job->value_bytes);
}
static unsigned char *keys_of(const half_call *job, size_t index) { return job->memory + job->keys + index * job->key_bytes; }
/* Of keys packed as codes: their offsets come after their values. */
static uint16_t *offsets_of(const half_call *job, unsigned char *keys) {
  return (uint16_t *)(void *)(keys + SFA_HALF_CHUNK * (size_t)job->K * sizeof(uint32_t));
}

static half_scratch scratch_of(const half_call *job, int32_t thread) {
  half_scratch s;
  scratch_place(job, job->memory + job->scratch + (size_t)thread * job->scratch_bytes, &s);
  return s;
}

/* ---- Packing ------------------------------------------------------------------------------------------------------------------------- */

/* Finds keys and values of (b, g) for sfa_attn_tile_keys and _values. */
static sfa_attn_block reader_of(const half_call *job, int32_t b, int32_t g, int32_t thread) {
  sfa_attn_block reader = {.call = &job->call, .view = &job->call.views[b], .kv_head = g};
  sfa_attn_scratch_of(job->call.plan, job->call.args, thread, 0, &reader.scratch);
  return reader;
}

/* The keys of a tile become steps `step` and the next one of a chunk, as codes or as dense rows; those beyond the last key are zeros.
 * Returns the longest key's square, as bits. */
static uint32_t pack_keys(const half_call *job, const sfa_attn_key_tile *tile, int32_t step, bool codes, const half_scratch *s,
                          unsigned char *out) {
  int32_t D = job->call.plan->options.head_dim, K = job->K, width = K ? K : D;
  const uint8_t *ids = tile->ids; /* D <= 256 */
  const float *keys = tile->keys;
  uint32_t longest = 0;
  for (int32_t j = 0; tile->scale && j < tile->n_keys; j++) /* int8 keys are whole numbers; their factors hold the query's scale too */
    for (int32_t u = 0; u < width; u++)
      s->keys_f32[j * width + u] = keys[j * width + u] * tile->scale[j];
  if (tile->scale)
    keys = s->keys_f32;
  if (ids && !codes) {
    sfa_code_write_out(tile->n_keys, D, width, ids, keys, s->dense_f32); /* given codes may keep all features: K is 0 then */
    keys = s->dense_f32;
  }
  for (int32_t first = 0; first < SFA_KEY_TILE; first += SFA_HALF_STEP, step++) {
    int32_t n = (int32_t)sfa_min64(sfa_max64(tile->n_keys - first, 0), SFA_HALF_STEP);
    uint32_t length = codes ? job->kernels->pack_codes(step, n, K, ids + first * K, 1, keys + first * K, job->W, (uint32_t *)(void *)out,
                                                       offsets_of(job, out))
                            : job->kernels->pack_keys(step, n, D, keys + first * D, D, (uint16_t *)(void *)out);
    longest = length > longest ? length : longest;
  }
  return longest;
}

/* Likewise values, those of tile `number`: bf16 ones as they are stored. */
static uint32_t pack_values(const half_call *job, const sfa_attn_block *reader, int64_t number, sfa_attn_key_tile *tile, int32_t step,
                            uint16_t *out) {
  const sfa_kv_side *v = &reader->view->v;
  const uint16_t *stored = NULL;
  int32_t E = job->call.plan->options.head_dim_v;
  uint32_t largest = 0;
  if (tile->n_keys && v->format.dtype == SFA_BF16)
    stored = (const uint16_t *)(const void *)sfa_kv_at(reader->view, &v->values, reader->kv_head, number);
  else if (tile->n_keys)
    sfa_attn_tile_values(reader, number, tile);
  for (int32_t j = 0; tile->value_scale && j < tile->n_keys; j++) /* those lie in the reader's scratch */
    for (int32_t e = 0; e < E; e++)
      reader->scratch.v_rows[j * E + e] *= tile->value_scale[j];
  for (int32_t first = 0; first < SFA_KEY_TILE; first += SFA_HALF_STEP, step++) {
    int32_t n = (int32_t)sfa_min64(sfa_max64(tile->n_keys - first, 0), SFA_HALF_STEP);
    uint32_t size = stored ? job->kernels->pack_values_bf16(step, n, E, stored + first * v->values.row_stride, v->values.row_stride, out)
                           : job->kernels->pack_values(step, n, E, tile->values + (int64_t)first * E, E, out);
    largest = size > largest ? size : largest;
  }
  return largest;
}

enum { CHUNK_TILES = SFA_HALF_CHUNK / SFA_KEY_TILE, TILE_STEPS = SFA_KEY_TILE / SFA_HALF_STEP };

/* The keys of a tile; none beyond the sequence's end. */
static sfa_attn_key_tile load_keys(const sfa_attn_block *reader, int64_t number) {
  return number * SFA_KEY_TILE < reader->view->n_keys ? sfa_attn_tile_keys(reader, number) : (sfa_attn_key_tile){.n_keys = 0};
}

/* Whether a query of sequence b may see a key of the chunk: the first one sees furthest back. */
static bool is_seen(const half_call *job, int32_t b, int64_t chunk) {
  const sfa_attention_options *o = &job->call.plan->options;
  int64_t n_keys = job->call.views[b].n_keys, first_key = chunk * SFA_HALF_CHUNK, first_token, n_tokens;
  sfa_attn_token_range(job->call.args->cu_seqlens_q, o->max_seqlen_q, b, &first_token, &n_tokens);
  int64_t leftmost = o->has_window && o->window_size[0] >= 0 ? n_keys - n_tokens - o->window_size[0] : 0;
  return first_key < n_keys && (first_key + SFA_HALF_CHUNK > leftmost || first_key < o->n_sink_tokens);
}

static void pack_item(void *arg, int64_t item, int32_t thread) {
  const half_call *job = arg;
  int32_t n_kv_heads = job->call.plan->options.n_kv_heads;
  int64_t chunk = item % job->n_chunks, pair = item / job->n_chunks;
  int32_t b = (int32_t)(pair / n_kv_heads), g = (int32_t)(pair % n_kv_heads);
  if (!is_seen(job, b, chunk))
    return;
  sfa_attn_block reader = reader_of(job, b, g, thread);
  half_scratch s = scratch_of(job, thread);
  int64_t start = job->call.args->stage_ns ? sfa_now_ns() : 0;
  uint32_t key = 0, value = 0;
  for (int32_t i = 0; i < CHUNK_TILES; i++) {
    int64_t number = chunk * CHUNK_TILES + i;
    sfa_attn_key_tile tile = load_keys(&reader, number);
    uint32_t length = pack_keys(job, &tile, i * TILE_STEPS, job->codes, &s, keys_of(job, (size_t)item));
    uint32_t size = pack_values(job, &reader, number, &tile, i * TILE_STEPS, values_of(job, (size_t)item));
    key = length > key ? length : key;
    value = size > value ? size : value;
  }
  *facts_of(job, (size_t)item) = (chunk_facts){sfa_float_of(key), sfa_float_of(value)};
  if (job->call.args->stage_ns)
    reader.scratch.stage_ns[SFA_STAGE_PACK] += sfa_now_ns() - start;
}

/* Keys of a chunk as dense rows: where a call packs codes and a block's bound forbids them. *packed: the chunk that the thread's scratch
 * has already, for an earlier block of the item; -1: none. */
static const uint16_t *dense_keys(const half_block *block, int64_t chunk, int64_t *packed) {
  const half_call *job = block->job;
  if (!job->codes)
    return (const uint16_t *)(const void *)keys_of(job, chunk_index(job, block->b, block->g, chunk));
  sfa_attn_block reader = reader_of(job, block->b, block->g, block->thread);
  half_scratch s = scratch_of(job, block->thread);
  for (int32_t i = 0; *packed != chunk && i < CHUNK_TILES; i++) {
    sfa_attn_key_tile tile = load_keys(&reader, chunk * CHUNK_TILES + i);
    pack_keys(job, &tile, i * TILE_STEPS, false, &s, (unsigned char *)s.keys);
  }
  *packed = chunk;
  return s.keys;
}

/* ---- A block ------------------------------------------------------------------------------------------------------------ */

/* Rows are laid out, and finished, by the f32 path: it knows codes, strides and heads. Calls fn for the parts that it cuts a block into. */
static void each_part(const half_block *block, void (*fn)(sfa_attn_block *part, int32_t first, void *arg), void *arg) {
  int32_t width = block->job->call.plan->width;
  for (int32_t i = 0; i < block->n_rows; i += width) {
    sfa_attn_block part;
    sfa_attn_block_find(&block->job->call, block->b, block->g, (block->first_row + i) / width, block->thread, 0, &part);
    fn(&part, i, arg);
  }
}

static void load_part(sfa_attn_block *part, int32_t first, void *arg) {
  half_block *block = arg;
  const half_call *job = block->job;
  const sfa_attention_plan *plan = job->call.plan;
  int32_t D = plan->options.head_dim;
  for (int32_t i = 0; i < part->n_rows; i++)
    sfa_attn_block_range(part, i, &block->first[first + i], &block->last[first + i]);
  if (block->kind == CODES && sfa_attn_block_load_codes(part)) {
    const sfa_attn_scratch *s = &part->scratch;
    job->kernels->query_sparse(first, part->n_rows, D, plan->options.k_q, s->id_rows, s->value_rows, plan->query_scale * SFA_HALF_OCTAVE,
                               job->W, block->Q, block->squares + first);
    return;
  }
  sfa_attn_block_load(part);
  if (block->kind == CODES) {
    job->kernels->query_codes(first, plan->width, D, part->scratch.q_tile, SFA_HALF_OCTAVE, job->W, block->Q, block->squares + first);
  } else {                                                            /* without the scale, which would spoil rows that are exactly bf16 */
    bool scaled = job->call.views[block->b].k.format.dtype != SFA_I8; /* int8 keys bring the scale */
    block->unit = scaled ? plan->query_scale * SFA_HALF_OCTAVE : SFA_HALF_OCTAVE;
    job->kernels->query_dense(first, plan->width, D, part->scratch.q_tile, scaled ? 1 / plan->query_scale : 1, block->Q,
                              block->squares + first);
    for (int32_t i = first; i < first + plan->width; i++)
      block->squares[i] *= block->unit * block->unit;
  }
}

static void load_rows(half_block *block) {
  const half_call *job = block->job;
  if (block->n_rows < job->W || job->call.plan->options.head_dim < job->Dp) /* rows and features beyond the real ones */
    memset(block->Q, 0, (size_t)job->W * (size_t)job->Dp * sizeof *block->Q);
  memset(block->squares, 0, (size_t)job->W * sizeof *block->squares);
  each_part(block, load_part, block);
  for (int32_t i = block->n_rows; i < job->W; i++) {
    block->first[i] = block->first[block->n_rows - 1];
    block->last[i] = block->last[block->n_rows - 1];
  }
}

/* Whether any row sees a key of the chunk. */
static bool sees_chunk(const half_block *block, int64_t chunk) {
  int64_t first_key = chunk * SFA_HALF_CHUNK, n_sink = block->job->call.plan->options.n_sink_tokens;
  return first_key < block->n_keys && block->last[block->n_rows - 1] >= first_key &&
         (block->first[0] < first_key + SFA_HALF_CHUNK || first_key < n_sink);
}

/* Whether every row sees all keys of [first, end). */
static bool sees_all(const half_block *block, int64_t first_key, int64_t end_key) {
  return block->last[0] >= end_key - 1 &&
         (block->first[block->n_rows - 1] <= first_key || end_key <= block->job->call.plan->options.n_sink_tokens);
}

/* The larger of two numbers that are not negative; NaN above all. */
static float larger(float a, float b) {
  uint32_t x = sfa_bits_of(fabsf(a)), y = sfa_bits_of(fabsf(b));
  return sfa_float_of(x > y ? x : y);
}

/* The bound on scores in units, with the shifts to begin with; and the kind. Weights down to 2^-64 need no shift, and most rows never move
 * from 0; with larger bounds shifts begin where every t is positive, so that none is lost below 16 bits. */
static void choose_kind(half_block *block, chunk_facts seen) {
  const half_call *job = block->job;
  const sfa_attention_args *args = job->call.args;
  float longest = 0, bound;
  for (int32_t i = 0; i < job->W; i++) {
    longest = larger(longest, block->squares[i]);
    bound = sqrtf(block->squares[i]) * sqrtf(seen.key_square);
    block->m[i] = bound <= 64 * SFA_HALF_OCTAVE ? 0 : -SFA_HALF_OCTAVE * ceilf(bound / SFA_HALF_OCTAVE);
  }
  bound = sqrtf(longest) * sqrtf(seen.key_square);
  bool exact = job->call.views[block->b].k.format.dtype == SFA_BF16 &&
               (args->q_codes ? args->q_codes->dtype == SFA_BF16 : args->q.dtype == SFA_BF16 && !args->q.rope && !args->q.norm);
  bool in_f16 = sqrtf(longest) <= longest_query && sqrtf(seen.key_square) <= longest_key &&
                (seen.key_square >= shortest_key * shortest_key || seen.key_square == 0);
  block->far = !(bound <= SFA_HALF_NEAR);
  if (!(bound <= DENSE_LIMIT) || !(seen.value <= largest_value))
    block->kind = F32;
  else if (block->kind == CODES && !(in_f16 && bound <= (exact ? SFA_HALF_NEAR : CODES_LIMIT)))
    block->kind = DENSE;
}

/* False if the sequence has no such block. */
static bool block_start(const half_call *job, int32_t b, int32_t g, int64_t number, int32_t thread, unsigned char *memory,
                        half_block *block) {
  const sfa_attention_plan *plan = job->call.plan;
  int64_t first_token, n_tokens;
  sfa_attn_token_range(job->call.args->cu_seqlens_q, plan->options.max_seqlen_q, b, &first_token, &n_tokens);
  *block = (half_block){.job = job, .b = b, .g = g, .thread = thread, .first_row = number * job->W, .n_keys = job->call.views[b].n_keys};
  block->n_rows = (int32_t)sfa_min64(sfa_max64(n_tokens * plan->group - block->first_row, 0), job->W);
  if (!block->n_rows)
    return false;
  block_place(job, memory, block);
  block->kind = job->codes ? CODES : DENSE;
  load_rows(block);
  chunk_facts seen = {0, 0};
  for (int64_t chunk = 0; chunk < job->n_chunks; chunk++)
    if (sees_chunk(block, chunk)) {
      const chunk_facts *facts = facts_of(job, chunk_index(job, b, g, chunk));
      seen = (chunk_facts){larger(seen.key_square, facts->key_square), larger(seen.value, facts->value)};
    }
  choose_kind(block, seen);
  if (job->codes && block->kind == DENSE)
    load_rows(block); /* in the other form */
  memset(block->O, 0, (size_t)job->W * (size_t)job->Ep * sizeof *block->O);
  memset(block->l, 0, (size_t)job->W * sizeof *block->l);
  return true;
}

/* ---- A block meets a chunk ---------------------------------------------------------------------------------------------- */

static int16_t within_chunk(int64_t key) { return (int16_t)sfa_min64(sfa_max64(key, -1), SFA_HALF_CHUNK); }

static void fill_mask(const half_block *block, int64_t first_key, sfa_half_mask *mask) {
  for (int32_t i = 0; i < block->job->W; i++) {
    mask->lo[i] = within_chunk(block->first[i] - first_key);
    mask->hi[i] = within_chunk(block->last[i] - first_key);
  }
  mask->n_always = (int32_t)sfa_min64(sfa_max64(block->job->call.plan->options.n_sink_tokens - first_key, 0), SFA_HALF_CHUNK);
}

/* Weights of steps [begin, end), which are all masked or all not. */
static void weigh_steps(const half_block *block, int64_t chunk, const uint16_t *dense, int32_t begin, int32_t end,
                        const sfa_half_mask *mask, const half_scratch *s) {
  const half_call *job = block->job;
  const float *shift = block->far ? block->m : NULL;
  int16_t *top = block->far ? s->top : NULL;
  if (block->kind == CODES) {
    unsigned char *keys = keys_of(job, chunk_index(job, block->b, block->g, chunk));
    job->kernels->weights_codes(begin, end - begin, job->K, (const uint32_t *)(const void *)keys, offsets_of(job, keys), job->W, block->Q,
                                shift, mask, top, s->P);
  } else {
    job->kernels->weights_dense(begin, end - begin, job->call.plan->options.head_dim, dense, job->W, block->Q, block->unit, shift, mask,
                                top, s->P);
  }
}

/* Moves the shifts of rows with a weight beyond SFA_HALF_LAZY to the octave above. Whether there were any. */
static bool move_shifts(half_block *block, const half_scratch *s) {
  const half_call *job = block->job;
  int16_t most = SFA_HALF_UNSEEN;
  for (int32_t i = 0; i < job->W; i++)
    most = s->top[i] > most ? s->top[i] : most;
  if (most <= SFA_HALF_LAZY)
    return false;
  for (int32_t i = 0; i < job->W; i++) {
    bool beyond = s->top[i] > SFA_HALF_LAZY;
    int32_t octaves = beyond ? (s->top[i] + SFA_HALF_OCTAVE - 1) / SFA_HALF_OCTAVE : 0;
    s->factor[i] = beyond ? ldexpf(1, -octaves) : 1;
    block->m[i] += (float)(octaves * SFA_HALF_OCTAVE);
  }
  job->kernels->rescale(job->call.plan->options.head_dim_v, job->W, s->factor, block->O, block->l);
  return true;
}

static void attend_chunk(half_block *block, int64_t chunk, int64_t *packed) {
  const half_call *job = block->job;
  const sfa_attention_options *o = &job->call.plan->options;
  half_scratch s = scratch_of(job, block->thread);
  int64_t first_key = chunk * SFA_HALF_CHUNK, last_key = sfa_min64(block->last[block->n_rows - 1], first_key + SFA_HALF_CHUNK - 1);
  int64_t from_key = first_key < o->n_sink_tokens ? first_key : sfa_max64(block->first[0], first_key);
  int32_t begin = (int32_t)(from_key - first_key) / SFA_HALF_STEP, end = (int32_t)(last_key - first_key) / SFA_HALF_STEP + 1;
  const uint16_t *dense = block->kind == DENSE ? dense_keys(block, chunk, packed) : NULL;
  if (!sees_all(block, first_key + begin * SFA_HALF_STEP, first_key + end * SFA_HALF_STEP))
    fill_mask(block, first_key, s.mask);
  do {
    for (int32_t i = 0; i < job->W; i++)
      s.top[i] = SFA_HALF_UNSEEN;
    for (int32_t step = begin, next; step < end; step = next) { /* runs of steps of one kind */
      bool all = sees_all(block, first_key + step * SFA_HALF_STEP, first_key + (step + 1) * SFA_HALF_STEP);
      for (next = step + 1; next < end; next++)
        if (sees_all(block, first_key + next * SFA_HALF_STEP, first_key + (next + 1) * SFA_HALF_STEP) != all)
          break;
      weigh_steps(block, chunk, dense, step, next, all ? NULL : s.mask, &s);
    }
  } while (block->far && move_shifts(block, &s));
  job->kernels->accumulate(begin, end - begin, o->head_dim_v, values_of(job, chunk_index(job, block->b, block->g, chunk)), job->W, s.P,
                           block->O, block->l);
}

/* Sink, division, lse of the rows of a part: sfa_attn_block_finish, for sums that are transposed. */
static void finish_part(sfa_attn_block *part, int32_t first, void *arg) {
  const half_block *block = arg;
  const half_call *job = block->job;
  const sfa_attention_args *args = job->call.args;
  half_scratch s = scratch_of(job, block->thread);
  int32_t E = job->call.plan->options.head_dim_v;
  for (int32_t i = 0; i < part->n_rows; i++) {
    int64_t row = part->scratch.row[i];
    double shift = (double)block->m[first + i] / SFA_HALF_OCTAVE, sum = (double)block->l[first + i];
    if (sum == 0)
      shift = 0; /* no key seen: O is 0 */
    if (args->sink_logit)
      sum += exp2((double)args->sink_logit[part->scratch.head[i]] * M_LOG2E - shift);
    s.factor[i] = sum > 0 ? (float)(1 / sum) : 0;
    s.rows[i] = args->out + row * E;
    if (args->dropped)
      args->dropped[row] = 0;
    if (args->lse)
      args->lse[row] = (float)(shift * M_LN2 + log(sum));
  }
  job->kernels->output_rows(first, part->n_rows, E, job->W, block->O, s.factor, s.rows);
}

static void attend_part_in_f32(sfa_attn_block *part, int32_t first, void *arg) {
  (void)first;
  (void)arg;
  sfa_attn_blocks_attend(part, 1);
}

/* Item 0 has the last blocks of a kv head: under a causal mask they see most keys, and what is left at the end is short. */
static void block_item(void *arg, int64_t item, int32_t thread) {
  const half_call *job = arg;
  const sfa_attention_options *o = &job->call.plan->options;
  half_scratch s = scratch_of(job, thread);
  half_block blocks[MAX_BLOCKS];
  int64_t n_items = (job->n_blocks + job->n_together - 1) / job->n_together, pair = item / n_items;
  int64_t first = (n_items - 1 - item % n_items) * job->n_together;
  int32_t b = (int32_t)(pair / o->n_kv_heads), g = (int32_t)(pair % o->n_kv_heads), n = 0;
  sfa_attn_block clock = reader_of(job, b, g, thread);
  int64_t start = sfa_attn_clock(&clock);
  while (n < job->n_together && block_start(job, b, g, first + n, thread, s.blocks + (size_t)n * job->block_bytes, &blocks[n]))
    n++;
  int64_t packed = -1;
  job->kernels->begin();
  for (int64_t chunk = 0; chunk < job->n_chunks; chunk++)
    for (int32_t i = 0; i < n; i++)
      if (blocks[i].kind != F32 && sees_chunk(&blocks[i], chunk))
        attend_chunk(&blocks[i], chunk, &packed);
  job->kernels->end();
  for (int32_t i = 0; i < n; i++)
    if (blocks[i].kind != F32)
      each_part(&blocks[i], finish_part, &blocks[i]);
  sfa_attn_clock_stop(&clock, start);
  for (int32_t i = 0; i < n; i++)
    if (blocks[i].kind == F32)
      each_part(&blocks[i], attend_part_in_f32, NULL);
}

void sfa_attn_half(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views) {
  const sfa_attention_options *o = &plan->options;
  half_call job = {.call = {plan, args, views},
                   .kernels = sfa_half_kernel_of(plan->ctx->isa),
                   .memory = (unsigned char *)args->workspace + plan->way_memory};
  if (args->alibi_slopes) { /* no part of 16-bit scores */
    sfa_attn_tiles(plan, args, views);
    return;
  }
  half_place(plan, &job);
  int64_t n_pairs = (int64_t)o->n_sequences * o->n_kv_heads;
  sfa_parallel(plan->ctx, n_pairs * job.n_chunks, pack_item, &job);
  sfa_parallel(plan->ctx, n_pairs * ((job.n_blocks + job.n_together - 1) / job.n_together), block_item, &job);
}
