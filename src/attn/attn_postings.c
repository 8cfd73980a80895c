/* The inverted index: sealing blocks, and the scores of a block for a query.
 *
 * A query's score is the sum over its features u of q_u k_ju, so feature by feature: the keys of u are the set bits of a bitmap, and their
 * values follow one another. With keys in int8 and the query rounded to whole multiples of its step, these are whole numbers whose sum is
 * exact in any order: the bits of the code scan (kernel/kernel.h). */
#include "attn/attn_postings.h"

#include <string.h>

/* ---- Blocks ------------------------------------------------------------------------------------------------------------------ */

/* One head of a block. */
typedef struct block_head {
  uint64_t *bitmaps; /* [D][SFA_POSTINGS_WORDS] */
  uint32_t *starts;  /* [D + 1] */
  uint16_t *scales;  /* [SFA_POSTINGS_BLOCK] */
  int8_t *values;    /* [starts[D]] */
} block_head;

static block_head head_of(const sfa_postings *p, int64_t block, int32_t kv_head) {
  unsigned char *memory = p->blocks[block] + (size_t)kv_head * p->head_bytes;
  return (block_head){(uint64_t *)(void *)(memory + p->bitmaps), (uint32_t *)(void *)(memory + p->starts),
                      (uint16_t *)(void *)(memory + p->scales), (int8_t *)(memory + p->values)};
}

bool sfa_attn_postings_fit(const sfa_row_format *format) {
  return format->dtype == SFA_I8 && format->k > 0 && format->k <= SFA_EXACT_TERMS;
}

static size_t add_array(size_t *total, size_t bytes) {
  size_t offset = *total;
  *total += sfa_align64(bytes);
  return offset;
}

sfa_status sfa_attn_postings_create(sfa_context *ctx, const void *cache, int32_t layer, int32_t n_kv_heads, const sfa_row_format *format,
                                    sfa_postings **postings) {
  sfa_postings *p;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *p, "an index of postings", (void **)&p));
  size_t D = (size_t)format->dim;
  *p = (sfa_postings){.ctx = ctx, .kernels = sfa_kernel_of(ctx->isa), .cache = cache, .layer = layer, .n_kv_heads = n_kv_heads};
  p->format = *format;
  p->bitmaps = add_array(&p->head_bytes, D * SFA_POSTINGS_WORDS * sizeof(uint64_t));
  p->starts = add_array(&p->head_bytes, (D + 1) * sizeof(uint32_t));
  p->scales = add_array(&p->head_bytes, SFA_POSTINGS_BLOCK * sizeof(uint16_t));
  p->values = add_array(&p->head_bytes, SFA_POSTINGS_BLOCK * (size_t)format->k + SFA_EXPAND_SLACK);
  *postings = p;
  return SFA_OK;
}

static void forget(sfa_postings *p, int64_t n_blocks) {
  for (; p->n_blocks > n_blocks; p->n_blocks--)
    sfa_free(p->ctx, p->blocks[p->n_blocks - 1]);
}

void sfa_attn_postings_destroy(sfa_postings *p) {
  if (!p)
    return;
  forget(p, 0);
  sfa_free(p->ctx, p->stamps);
  sfa_free(p->ctx, p->blocks);
  sfa_free(p->ctx, p);
}

/* ---- In line with a sequence ------------------------------------------------------------------------------------------------- */

static uint64_t stamp_of(const sfa_kv_view *view, int64_t block) {
  return view->stamps[(block + 1) * (SFA_POSTINGS_BLOCK / SFA_KEY_TILE) - 1];
}

int64_t sfa_attn_postings_valid(const sfa_postings *p, const sfa_kv_view *view) {
  int64_t n = view->stamps ? sfa_min64(p->n_blocks, view->n_keys / SFA_POSTINGS_BLOCK) : 0;
  while (n > 0 && p->stamps[n - 1] != stamp_of(view, n - 1)) /* where one is right, all before it are */
    n--;
  return n;
}

static sfa_status reserve(sfa_postings *p, int64_t n_blocks) {
  if (n_blocks <= p->capacity)
    return SFA_OK;
  int64_t capacity = sfa_max64(n_blocks, 2 * p->capacity);
  uint64_t *stamps;
  unsigned char **blocks;
  SFA_TRY(sfa_alloc_zero(p->ctx, (size_t)capacity, sizeof *stamps, "an index's list of blocks", (void **)&stamps));
  sfa_status status = sfa_alloc_zero(p->ctx, (size_t)capacity, sizeof *blocks, "an index's list of blocks", (void **)&blocks);
  if (status != SFA_OK) {
    sfa_free(p->ctx, stamps);
    return status;
  }
  if (p->n_blocks) {
    memcpy(stamps, p->stamps, (size_t)p->n_blocks * sizeof *stamps);
    memcpy(blocks, p->blocks, (size_t)p->n_blocks * sizeof *blocks);
  }
  sfa_free(p->ctx, p->stamps);
  sfa_free(p->ctx, p->blocks);
  p->stamps = stamps;
  p->blocks = blocks;
  p->capacity = capacity;
  return SFA_OK;
}

typedef struct seal_job {
  const sfa_postings *postings;
  const sfa_kv_view *view;
  int64_t first_block;
} seal_job;

/* The codes of one tile and kv head. */
typedef struct code_tile {
  const void *ids;
  const int8_t *values;
  const uint16_t *scales;
} code_tile;

static code_tile tile_of(const sfa_kv_view *view, int32_t kv_head, int64_t tile) {
  return (code_tile){sfa_kv_at(view, &view->k.ids, kv_head, tile), (const int8_t *)sfa_kv_at(view, &view->k.values, kv_head, tile),
                     (const uint16_t *)(const void *)sfa_kv_at(view, &view->k.scales, kv_head, tile)};
}

/* Empties the lists with more keys than values. There are none, unless someone wrote to the pages between two readings. */
static void drop_torn_lists(const block_head *head, int32_t D) {
  for (int32_t u = 0; u < D; u++) {
    uint64_t *bitmap = head->bitmaps + (int64_t)u * SFA_POSTINGS_WORDS;
    uint32_t n_keys = 0;
    for (int32_t w = 0; w < SFA_POSTINGS_WORDS; w++)
      n_keys += (uint32_t)__builtin_popcountll(bitmap[w]);
    if (n_keys > head->starts[u + 1] - head->starts[u])
      memset(bitmap, 0, SFA_POSTINGS_WORDS * sizeof *bitmap);
  }
}

/* Transposes the codes of a block: a count of each feature gives the starts, then every value goes to its feature's next place. */
static void seal_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const seal_job *job = arg;
  const sfa_postings *p = job->postings;
  const sfa_kv_side *keys = &job->view->k;
  int32_t g = (int32_t)(item % p->n_kv_heads), D = p->format.dim, K = p->format.k;
  int64_t block = job->first_block + item / p->n_kv_heads, first_tile = block * (SFA_POSTINGS_BLOCK / SFA_KEY_TILE);
  block_head head = head_of(p, block, g);
  memset(head.bitmaps, 0, (size_t)D * SFA_POSTINGS_WORDS * sizeof *head.bitmaps);
  memset(head.starts, 0, ((size_t)D + 1) * sizeof *head.starts);
  for (int placing = 0; placing < 2; placing++) {
    for (int32_t w = 0; w < SFA_POSTINGS_WORDS; w++) {
      code_tile tile = tile_of(job->view, g, first_tile + w);
      for (int32_t j = 0; j < SFA_KEY_TILE; j++) {
        for (int32_t u = 0; u < K; u++) {
          int64_t id_at = j * keys->ids.row_stride + u;
          int32_t feature = sfa_id_at(tile.ids, D, id_at);
          int8_t value = tile.values[j * keys->values.row_stride + u];
          if (!value || feature >= D) /* adds nothing, or is of no feature: pages may be a damaged file */
            continue;
          if (placing) {
            if (head.starts[feature] < head.starts[feature + 1])
              head.values[head.starts[feature]++] = value;
            head.bitmaps[(int64_t)feature * SFA_POSTINGS_WORDS + w] |= (uint64_t)1 << j;
          } else {
            head.starts[feature + 1]++;
          }
        }
        head.scales[w * SFA_KEY_TILE + j] = tile.scales[j * keys->scales.row_stride];
      }
    }
    for (int32_t u = 0; u < D && !placing; u++)
      head.starts[u + 1] += head.starts[u];
  }
  memset(head.values + head.starts[D], 0, SFA_EXPAND_SLACK);
  memmove(head.starts + 1, head.starts, (size_t)D * sizeof *head.starts); /* each has moved on to where the next one begins */
  head.starts[0] = 0;
  drop_torn_lists(&head, D);
}

sfa_status sfa_attn_postings_update(sfa_postings *p, const sfa_kv_view *view) {
  int64_t n_blocks = view->n_keys / SFA_POSTINGS_BLOCK, first = sfa_attn_postings_valid(p, view);
  forget(p, first);
  sfa_status status = reserve(p, n_blocks);
  for (; status == SFA_OK && p->n_blocks < n_blocks; p->n_blocks += status == SFA_OK) {
    p->stamps[p->n_blocks] = stamp_of(view, p->n_blocks);
    status = sfa_alloc(p->ctx, p->head_bytes * (size_t)p->n_kv_heads, "a block of postings", (void **)&p->blocks[p->n_blocks]);
  }
  seal_job job = {p, view, first};
  sfa_parallel(p->ctx, (p->n_blocks - first) * p->n_kv_heads, seal_item, &job);
  return status;
}

/* ---- Scores ------------------------------------------------------------------------------------------------------------------ */

void sfa_attn_postings_count(const sfa_postings *p, int64_t block, int32_t kv_head, const float *q, sfa_attn_postings_work *work) {
  const uint32_t *starts = head_of(p, block, kv_head).starts;
  int64_t most = p->kernels->isa >= SFA_ISA_AVX512 ? SFA_POSTINGS_WORDS * SFA_EXPAND_STEPS : SFA_POSTINGS_BLOCK;
  work->steps += SFA_POSTINGS_BLOCK / 16; /* clearing the sums and scaling them */
  work->bytes += SFA_POSTINGS_BLOCK * (int64_t)sizeof(uint16_t);
  for (int32_t u = 0; u < p->format.dim; u++)
    if (q[u] != 0) {
      int64_t n_values = starts[u + 1] - starts[u];
      work->steps += sfa_min64(n_values, most);
      work->bytes += SFA_POSTINGS_WORDS * (int64_t)sizeof(uint64_t) + n_values;
    }
}

void sfa_attn_postings_scores(const sfa_postings *p, int64_t block, int32_t kv_head, const float *q, float step, float query_scale,
                              int32_t *sums, float *S) {
  block_head head = head_of(p, block, kv_head);
  memset(sums, 0, SFA_POSTINGS_BLOCK * sizeof *sums);
  for (int32_t u = 0; u < p->format.dim && step == step; u++) { /* a NaN step makes every score NaN */
    uint32_t n_values = head.starts[u + 1] - head.starts[u];
    if (q[u] != 0 && n_values)
      p->kernels->expand_add(SFA_POSTINGS_WORDS, head.bitmaps + (int64_t)u * SFA_POSTINGS_WORDS, n_values, head.values + head.starts[u],
                             (int32_t)(q[u] / step), sums);
  }
  p->kernels->scale_sums(SFA_POSTINGS_BLOCK, sums, step, head.scales, query_scale, S);
}
