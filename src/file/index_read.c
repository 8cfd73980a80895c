/* Reading a document index. Nothing of the file is believed before it is checked: the slot, then the chain of segments from the newest to
 * the first, each with its checksums; the pages alone are left to sfa_index_verify. */
#include "file/index_file.h"

#include <stdatomic.h>
#include <string.h>

#include "base/hash.h"

static bool all_zero(const uint8_t *data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    if (data[i])
      return false;
  return true;
}

/* ---- Header and slots ---------------------------------------------------------------------------------------------------------------- */

/* A struct at an offset whose last 8 bytes are the checksum of the others; it is inside the file. */
static bool read_sealed(const sfa_map *map, uint64_t at, void *out, size_t bytes) {
  uint64_t sum;
  memcpy(out, map->data + at, bytes);
  memcpy(&sum, (const uint8_t *)out + bytes - sizeof sum, sizeof sum);
  return sfa_hash_bytes(0, out, bytes - sizeof sum) == sum;
}

static sfa_status damaged(const sfa_index *index, const char *what, uint64_t at) {
  return sfa_fail(index->ctx, SFA_ERROR_FORMAT,
                  "%s is damaged: %s at byte %llu is not what was written; restore the file, or delete it and read the document again",
                  index->path, what, (unsigned long long)at);
}

static const char *dtype_name(uint32_t dtype) {
  static const char *const names[] = {"default", "f32", "bf16", "f16", "int8", "int4", "fp8"};
  return dtype < sizeof names / sizeof *names ? names[dtype] : "unknown";
}

static sfa_status cut_short(const sfa_index *index, uint64_t wanted) {
  return sfa_fail(index->ctx, SFA_ERROR_FORMAT,
                  "%s is cut short: it has %zu of %llu bytes; copy it again, or delete it and read the document again", index->path,
                  index->map.bytes, (unsigned long long)wanted);
}

/* A file that was begun but holds no state: empty, a part of the first block, or both slots never written. */
static bool is_unfinished(const sfa_map *map) {
  size_t n_magic = map->bytes < 8 ? map->bytes : 8;
  if (n_magic && memcmp(map->data, SFA_INDEX_MAGIC, n_magic) != 0)
    return false;
  size_t slots_end = map->bytes < SFA_INDEX_SETTINGS_AT ? map->bytes : SFA_INDEX_SETTINGS_AT;
  return slots_end <= SFA_INDEX_SLOT_BYTES || all_zero(map->data + SFA_INDEX_SLOT_BYTES, slots_end - SFA_INDEX_SLOT_BYTES);
}

sfa_status sfa_index_is_unfinished(sfa_context *ctx, const char *path, bool *unfinished) {
  sfa_map map;
  SFA_TRY(sfa_map_open(ctx, path, &map));
  *unfinished = is_unfinished(&map);
  sfa_map_close(&map);
  return SFA_OK;
}

static sfa_status read_header(sfa_index *index, sfa_index_header *header) {
  const sfa_map *map = &index->map;
  if (map->bytes >= 8 && memcmp(map->data, SFA_INDEX_MAGIC, 8) != 0)
    return sfa_fail(index->ctx, SFA_ERROR_FORMAT, "%s is not a document index; name another file", index->path);
  if (map->bytes >= sizeof *header) {
    memcpy(header, map->data, sizeof *header);
    if (header->endian != SFA_INDEX_ENDIAN)
      return sfa_fail(index->ctx, SFA_ERROR_UNSUPPORTED,
                      "%s: its byte order mark is %08x, not %08x: damaged, or of another kind of machine", index->path, header->endian,
                      SFA_INDEX_ENDIAN);
    if (header->version != SFA_INDEX_VERSION)
      return sfa_fail(index->ctx, SFA_ERROR_UNSUPPORTED,
                      "%s is an index of version %u, this program reads version %d: delete it and read the document again", index->path,
                      header->version, SFA_INDEX_VERSION);
  }
  if (is_unfinished(map))
    return sfa_fail(index->ctx, SFA_ERROR_FORMAT, "%s holds no document: %s; delete it, or have it written", index->path,
                    map->bytes ? "its writing was never finished" : "it is empty");
  if (map->bytes < SFA_INDEX_SETTINGS_AT)
    return cut_short(index, SFA_INDEX_SETTINGS_AT);
  return read_sealed(map, 0, header, sizeof *header) ? SFA_OK : damaged(index, "the header", 0);
}

/* The newer one of those that are whole. A commit that was stopped leaves one that is not. */
static sfa_status read_slot(sfa_index *index) {
  for (uint64_t i = 0; i < 2; i++) {
    sfa_index_slot slot;
    if (read_sealed(&index->map, (i + 1) * SFA_INDEX_SLOT_BYTES, &slot, sizeof slot) && slot.sequence % 2 == i &&
        slot.sequence > index->slot.sequence)
      index->slot = slot;
  }
  if (index->slot.sequence == 0)
    return damaged(index, "both commit slots", SFA_INDEX_SLOT_BYTES);
  return index->slot.bytes > index->map.bytes ? cut_short(index, index->slot.bytes) : SFA_OK;
}

/* ---- Settings ------------------------------------------------------------------------------------------------------------------------ */

static bool settings_make_sense(const sfa_index_settings_head *h, const sfa_index_layer_entry *layers) {
  bool good = h->n_kv_heads >= 1 && h->n_kv_heads <= 65536 && h->head_dim >= 1 && h->head_dim <= 65536 && h->head_dim_v >= 1 &&
              h->head_dim_v <= 65536 && h->vocab_size >= 1 && h->vocab_size <= INT32_MAX && h->weights <= INT32_MAX;
  for (uint32_t i = 0; i < h->n_layers; i++)
    good = good && layers[i].k < h->head_dim && layers[i].k_q < h->head_dim && layers[i].k_dtype >= SFA_F32 &&
           layers[i].k_dtype <= SFA_I8 && layers[i].v_dtype >= SFA_F32 && layers[i].v_dtype <= SFA_E4M3 &&
           layers[i].page_bytes >= SFA_INDEX_ALIGN && layers[i].page_bytes % SFA_INDEX_ALIGN == 0 &&
           layers[i].page_bytes <= (uint64_t)1 << 40;
  return good;
}

static sfa_status read_settings(sfa_index *index, const sfa_index_header *header, uint64_t *end) {
  sfa_index_settings_head head;
  const uint8_t *data = index->map.data + SFA_INDEX_SETTINGS_AT;
  uint64_t room = index->slot.bytes - SFA_INDEX_SETTINGS_AT, bytes = header->settings_bytes;
  if (index->slot.bytes < SFA_INDEX_SETTINGS_AT || bytes > room || bytes < sizeof head ||
      sfa_hash_bytes(0, data, bytes) != header->settings_checksum)
    return damaged(index, "the settings", SFA_INDEX_SETTINGS_AT);
  memcpy(&head, data, sizeof head);
  if (head.page_format != SFA_INDEX_PAGE_FORMAT || head.page_len != SFA_INDEX_PAGE_LEN)
    return sfa_fail(index->ctx, SFA_ERROR_UNSUPPORTED,
                    "%s has pages of format %u with %u tokens, this program reads format %d with %d: delete it and read the document again",
                    index->path, head.page_format, head.page_len, SFA_INDEX_PAGE_FORMAT, SFA_INDEX_PAGE_LEN);
  uint64_t layer_bytes = head.n_layers * (uint64_t)sizeof *index->layers;
  if (head.n_layers < 1 || head.n_layers > SFA_INDEX_MAX_LAYERS || head.name_bytes > bytes ||
      bytes != sizeof head + layer_bytes + head.name_bytes)
    return damaged(index, "the settings", SFA_INDEX_SETTINGS_AT);
  SFA_TRY(sfa_alloc(index->ctx, layer_bytes, "an index's layers", (void **)&index->layers));
  memcpy(index->layers, data + sizeof head, layer_bytes);
  SFA_TRY(sfa_alloc_zero(index->ctx, head.name_bytes + 1, 1, "the name of an index's model", (void **)&index->name));
  memcpy(index->name, data + sizeof head + layer_bytes, head.name_bytes);
  if (!settings_make_sense(&head, index->layers) || strlen(index->name) != head.name_bytes)
    return damaged(index, "the settings", SFA_INDEX_SETTINGS_AT);
  index->settings = (sfa_index_settings){.model = head.model,
                                         .tokenizer = head.tokenizer,
                                         .n_layers = (int32_t)head.n_layers,
                                         .n_kv_heads = (int32_t)head.n_kv_heads,
                                         .head_dim = (int32_t)head.head_dim,
                                         .head_dim_v = (int32_t)head.head_dim_v,
                                         .weights = (int32_t)head.weights,
                                         .vocab_size = (int32_t)head.vocab_size,
                                         .layers = index->layers,
                                         .name = index->name};
  *end = SFA_INDEX_SETTINGS_AT + bytes;
  return SFA_OK;
}

/* ---- Segments ------------------------------------------------------------------------------------------------------------------------ */

/* *at += count * bytes, then up to a multiple of align; false if that does not fit. */
static bool pass(uint64_t *at, uint64_t count, uint64_t bytes, uint64_t align) {
  uint64_t size, sum;
  if (__builtin_mul_overflow(count, bytes, &size) || __builtin_add_overflow(*at, size, &sum) || sum > (uint64_t)INT64_MAX - align)
    return false;
  *at = (sum + align - 1) / align * align;
  return true;
}

bool sfa_index_parts_of(const sfa_index_settings *settings, uint64_t at, const sfa_index_segment *head, sfa_index_parts *parts) {
  uint64_t n_tokens = head->n_tokens;
  if (head->first_token > INT32_MAX || n_tokens > INT32_MAX - head->first_token)
    return false;
  parts->first_page = head->first_token / SFA_INDEX_PAGE_LEN;
  parts->n_pages = (head->first_token + n_tokens + SFA_INDEX_PAGE_LEN - 1) / SFA_INDEX_PAGE_LEN - parts->first_page;
  parts->tokens_at = at + sizeof *head;
  parts->sources_at = parts->tokens_at;
  bool fits = pass(&parts->sources_at, n_tokens, sizeof(int32_t), 8);
  parts->names_at = parts->sources_at;
  fits = fits && pass(&parts->names_at, head->n_sources, sizeof(sfa_index_source_entry), 8);
  parts->sums_at = parts->names_at;
  fits = fits && pass(&parts->sums_at, head->name_bytes, 1, 8);
  parts->pages_at = parts->sums_at;
  fits = fits && pass(&parts->pages_at, (uint64_t)settings->n_layers * parts->n_pages, sizeof(uint64_t), SFA_INDEX_ALIGN);
  parts->end = parts->pages_at;
  for (int32_t layer = 0; layer < settings->n_layers; layer++)
    fits = fits && pass(&parts->end, parts->n_pages, settings->layers[layer].page_bytes, SFA_INDEX_ALIGN);
  return fits;
}

typedef struct segment {
  uint64_t at;
  sfa_index_segment head;
  sfa_index_parts parts;
} segment;

/* The segment at an offset; it must end at or before `limit`. */
static sfa_status read_segment(const sfa_index *index, uint64_t at, uint64_t limit, segment *s) {
  const sfa_map *map = &index->map;
  s->at = at;
  if (limit < sizeof s->head || at > limit - sizeof s->head || at % SFA_INDEX_ALIGN || !read_sealed(map, at, &s->head, sizeof s->head) ||
      memcmp(s->head.magic, SFA_SEGMENT_MAGIC, 8) != 0 || !sfa_index_parts_of(&index->settings, at, &s->head, &s->parts) ||
      s->parts.pages_at != s->head.pages_at || s->parts.end != s->head.end || s->head.end > limit)
    return damaged(index, "a segment", at);
  if (sfa_hash_bytes(0, map->data + s->parts.tokens_at, s->parts.pages_at - s->parts.tokens_at) != s->head.meta_checksum)
    return damaged(index, "the list of tokens and sources", s->parts.tokens_at);
  return SFA_OK;
}

/* Names and places of a segment's sources. */
static bool take_sources(sfa_index *index, const segment *s) {
  const uint8_t *entries = index->map.data + s->parts.sources_at, *name = index->map.data + s->parts.names_at;
  const uint8_t *names_end = name + s->head.name_bytes;
  for (uint64_t i = 0; i < s->head.n_sources; i++) {
    sfa_index_source_entry e;
    memcpy(&e, entries + i * sizeof e, sizeof e);
    const uint8_t *nul = memchr(name, 0, (size_t)(names_end - name));
    if (!nul || e.first_byte > INT64_MAX / 2 || e.n_bytes > INT64_MAX / 2 || e.first_token > INT32_MAX || e.n_tokens > INT32_MAX)
      return false;
    index->sources[s->head.first_source + i] = (sfa_index_source){.name = (const char *)name,
                                                                  .first_byte = (int64_t)e.first_byte,
                                                                  .n_bytes = (int64_t)e.n_bytes,
                                                                  .first_token = (int64_t)e.first_token,
                                                                  .n_tokens = (int64_t)e.n_tokens};
    name = nul + 1;
  }
  return name == names_end;
}

/* A segment's part of the lists. Segments come newest first, so that a page which a later one has written again is there already. */
static sfa_status take_segment(sfa_index *index, const segment *s) {
  memcpy(index->tokens + s->head.first_token, index->map.data + s->parts.tokens_at, s->head.n_tokens * sizeof(int32_t));
  for (uint64_t i = 0; i < s->head.n_tokens; i++) {
    int32_t token = index->tokens[s->head.first_token + i];
    if (token < 0 || token >= index->settings.vocab_size)
      return damaged(index, "a token", s->parts.tokens_at + i * sizeof token);
  }
  if (!take_sources(index, s))
    return damaged(index, "a source", s->parts.sources_at);
  const uint8_t *sum = index->map.data + s->parts.sums_at, *page = index->map.data + s->parts.pages_at;
  for (int32_t layer = 0; layer < index->settings.n_layers; layer++)
    for (uint64_t p = 0; p < s->parts.n_pages; p++, sum += sizeof(uint64_t), page += index->layers[layer].page_bytes) {
      uint64_t at = (uint64_t)layer * (uint64_t)index->n_pages + s->parts.first_page + p;
      if (index->pages[at])
        continue;
      index->pages[at] = page;
      memcpy(&index->page_sums[at], sum, sizeof(uint64_t));
    }
  return SFA_OK;
}

/* Room for the lists, after a look at whether the file can hold so much. */
static sfa_status make_lists(sfa_index *index) {
  sfa_context *ctx = index->ctx;
  uint64_t n_tokens = index->slot.n_tokens, n_sources = index->slot.n_sources, bytes = index->slot.bytes;
  uint64_t n_pages = n_tokens / SFA_INDEX_PAGE_LEN + (n_tokens % SFA_INDEX_PAGE_LEN > 0);
  uint64_t n_layers = (uint64_t)index->settings.n_layers;
  if (n_tokens > INT32_MAX || n_tokens > bytes / sizeof(int32_t) || n_sources > bytes / sizeof(sfa_index_source_entry) ||
      n_pages > bytes / SFA_INDEX_ALIGN / n_layers)
    return damaged(index, "the counts of a commit slot", SFA_INDEX_SLOT_BYTES);
  index->n_tokens = (int64_t)n_tokens;
  index->n_sources = (int64_t)n_sources;
  index->n_pages = (int64_t)n_pages;
  SFA_TRY(sfa_alloc(ctx, n_tokens * sizeof *index->tokens, "an index's tokens", (void **)&index->tokens));
  SFA_TRY(sfa_alloc_zero(ctx, n_sources, sizeof *index->sources, "an index's sources", (void **)&index->sources));
  SFA_TRY(sfa_alloc_zero(ctx, n_layers * n_pages, sizeof *index->pages, "an index's pages", (void **)&index->pages));
  return sfa_alloc(ctx, n_layers * n_pages * sizeof *index->page_sums, "an index's checksums", (void **)&index->page_sums);
}

/* Sources in order, none beyond the tokens. */
static bool sources_in_order(const sfa_index *index) {
  int64_t byte = 0, token = 0;
  for (int64_t i = 0; i < index->n_sources; i++) {
    const sfa_index_source *s = &index->sources[i];
    if (s->first_byte < byte || s->first_token < token)
      return false;
    byte = s->first_byte + s->n_bytes;
    token = s->first_token + s->n_tokens;
  }
  return token <= index->n_tokens;
}

/* The chain, back from the newest; each segment lies before the one that names it and ends where that one's tokens begin. */
static sfa_status read_segments(sfa_index *index, uint64_t first_at) {
  SFA_TRY(make_lists(index));
  segment s;
  uint64_t limit = index->slot.bytes, tokens = index->slot.n_tokens, sources = index->slot.n_sources;
  for (uint64_t at = index->slot.segment; at; at = s.head.previous) {
    if (at < first_at)
      return damaged(index, "the place of a segment", limit);
    SFA_TRY(read_segment(index, at, limit, &s));
    if (s.head.n_tokens > tokens || s.head.first_token != tokens - s.head.n_tokens || s.head.n_sources > sources ||
        s.head.first_source != sources - s.head.n_sources)
      return damaged(index, "the count of a segment", at);
    SFA_TRY(take_segment(index, &s));
    limit = at;
    tokens = s.head.first_token;
    sources = s.head.first_source;
    index->n_segments++;
  }
  if (tokens || sources || !sources_in_order(index))
    return damaged(index, "the chain of segments", index->slot.segment);
  return SFA_OK;
}

/* ---- Open and close ------------------------------------------------------------------------------------------------------------------ */

static sfa_status read_file(sfa_index *index) {
  sfa_index_header header = {0};
  uint64_t settings_end = 0;
  SFA_TRY(sfa_map_open(index->ctx, index->path, &index->map));
  SFA_TRY(read_header(index, &header));
  SFA_TRY(read_slot(index));
  SFA_TRY(read_settings(index, &header, &settings_end));
  return read_segments(index, settings_end);
}

sfa_status sfa_index_open(sfa_context *ctx, const char *path, sfa_index **out) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, out, "sfa_index_open wants a place for the index");
  *out = NULL;
  SFA_REQUIRE(ctx, path && *path, "sfa_index_open wants a path");
  sfa_index *index;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *index, "an index", (void **)&index));
  index->ctx = ctx;
  sfa_status status = sfa_strdup(ctx, path, &index->path);
  if (status == SFA_OK)
    status = read_file(index);
  if (status == SFA_OK)
    *out = index;
  else
    sfa_index_close(index);
  return status;
}

void sfa_index_close(sfa_index *index) {
  if (!index)
    return;
  sfa_map_close(&index->map);
  void *parts[] = {index->path, index->layers, index->name, index->tokens, index->sources, index->pages, index->page_sums};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
    sfa_free(index->ctx, parts[i]);
  sfa_free(index->ctx, index);
}

/* ---- What it tells ------------------------------------------------------------------------------------------------------------------- */

void sfa_index_describe(const sfa_index *index, sfa_index_info *info) {
  const sfa_index_settings *s = &index->settings;
  const sfa_index_layer_entry *shown = &s->layers[0];
  *info = (sfa_index_info){.model_name = s->name,
                           .model = s->model,
                           .tokenizer = s->tokenizer,
                           .weights = (sfa_weight_format)s->weights,
                           .n_layers = s->n_layers,
                           .n_kv_heads = s->n_kv_heads,
                           .head_dim = s->head_dim,
                           .vocab_size = s->vocab_size,
                           .n_tokens = index->n_tokens,
                           .n_sources = index->n_sources,
                           .n_segments = index->n_segments,
                           .n_commits = (int64_t)index->slot.sequence,
                           .bytes = (int64_t)index->slot.bytes};
  for (int32_t i = 0; i < s->n_layers; i++) {
    const sfa_index_layer_entry *layer = &s->layers[i];
    if (layer->k && !info->n_sparse_layers++)
      shown = layer;
    info->k = (int32_t)layer->k > info->k ? (int32_t)layer->k : info->k;
    info->k_q = (int32_t)layer->k_q > info->k_q ? (int32_t)layer->k_q : info->k_q;
    info->page_bytes += index->n_pages * (int64_t)layer->page_bytes;
  }
  info->k_dtype = (sfa_dtype)shown->k_dtype;
  info->v_dtype = (sfa_dtype)shown->v_dtype;
}

const int32_t *sfa_index_tokens(const sfa_index *index) { return index->tokens; }

int sfa_index_source_at(const sfa_index *index, int64_t number, sfa_index_source *source) {
  if (number < 0 || number >= index->n_sources)
    return 0;
  *source = index->sources[number];
  return 1;
}

static const char *weights_name(int32_t format) {
  static const char *const names[] = {"auto", "f32", "bf16", "int8"};
  return format >= 0 && format < (int32_t)(sizeof names / sizeof *names) ? names[format] : "unknown";
}

sfa_status sfa_index_settings_match(const sfa_index *index, const sfa_index_settings *wanted) {
  const sfa_index_settings *has = &index->settings;
  sfa_context *ctx = index->ctx;
  SFA_REQUIRE(ctx,
              has->model == wanted->model && has->n_layers == wanted->n_layers && has->n_kv_heads == wanted->n_kv_heads &&
                  has->head_dim == wanted->head_dim && has->head_dim_v == wanted->head_dim_v && has->vocab_size == wanted->vocab_size,
              "%s was made by another model%s%.80s%s: take that one, or another index file for this one", index->path,
              *has->name ? ", " : "", has->name, *has->name ? "" : " file");
  SFA_REQUIRE(ctx, has->tokenizer == wanted->tokenizer, "%s was made with another tokenizer: take that one, or another index file",
              index->path);
  SFA_REQUIRE(ctx, has->weights == wanted->weights,
              "%s was made with weights in memory as %s, here they are %s: take the same, or another index file", index->path,
              weights_name(has->weights), weights_name(wanted->weights));
  for (int32_t i = 0; i < has->n_layers; i++) {
    const sfa_index_layer_entry *a = &has->layers[i], *b = &wanted->layers[i];
    SFA_REQUIRE(
        ctx, a->k == b->k && a->k_q == b->k_q,
        "%s was made with %u kept features of keys and %u of queries in layer %d, here they are %u and %u (0: all): choose the same "
        "attention, or another index file",
        index->path, a->k, a->k_q, i, b->k, b->k_q);
    SFA_REQUIRE(ctx, a->k_dtype == b->k_dtype && a->v_dtype == b->v_dtype && a->page_bytes == b->page_bytes,
                "%s stores keys and values of layer %d as %s and %s, here they are %s and %s: choose the same, or another index file",
                index->path, i, dtype_name(a->k_dtype), dtype_name(a->v_dtype), dtype_name(b->k_dtype), dtype_name(b->v_dtype));
  }
  return SFA_OK;
}

/* ---- Verify -------------------------------------------------------------------------------------------------------------------------- */

typedef struct verify_job {
  const sfa_index *index;
  _Atomic int64_t first_bad; /* the least number of a damaged page */
} verify_job;

static void verify_page(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  verify_job *job = arg;
  const sfa_index *index = job->index;
  size_t bytes = index->layers[item / index->n_pages].page_bytes;
  if (sfa_hash_bytes(0, index->pages[item], bytes) == index->page_sums[item])
    return;
  int64_t least = atomic_load(&job->first_bad);
  while (item < least && !atomic_compare_exchange_weak(&job->first_bad, &least, item))
    ;
}

sfa_status sfa_index_verify(const sfa_index *index) {
  verify_job job = {index, INT64_MAX};
  sfa_parallel(index->ctx, index->settings.n_layers * index->n_pages, verify_page, &job);
  int64_t bad = atomic_load(&job.first_bad);
  if (bad == INT64_MAX)
    return SFA_OK;
  int64_t first = bad % index->n_pages * SFA_INDEX_PAGE_LEN;
  return sfa_fail(
      index->ctx, SFA_ERROR_FORMAT,
      "%s is damaged: layer %lld of tokens %lld..%lld, at byte %lld, is not what was written; restore the file, or delete it and "
      "read the document again",
      index->path, (long long)(bad / index->n_pages), (long long)first,
      (long long)sfa_min64(first + SFA_INDEX_PAGE_LEN, index->n_tokens) - 1,
      (long long)((const uint8_t *)index->pages[bad] - index->map.data));
}
