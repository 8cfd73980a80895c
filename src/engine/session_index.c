/* Sessions in files: what a session's pages depend on, as the settings of an index; saving, loading. */
#include <sfa/data.h>

#include "engine/session.h"
#include "file/index_file.h"

#include <string.h>

/* ---- What the pages depend on -------------------------------------------------------------------------------------------------- */

/* *layers is the memory of settings->layers, to be freed. */
static sfa_status settings_of(const sfa_session *s, sfa_index_settings *settings, sfa_index_layer_entry **layers) {
  sfa_model_info info;
  sfa_model_describe(s->model, &info);
  SFA_TRY(sfa_alloc_zero(s->ctx, (size_t)info.n_layers, sizeof **layers, "the settings of an index", (void **)layers));
  for (int32_t i = 0; i < info.n_layers; i++) {
    sfa_layer_storage storage = sfa_forward_storage(s->forward, i);
    (*layers)[i] = (sfa_index_layer_entry){.k = (uint32_t)storage.k,
                                           .k_q = (uint32_t)storage.k_q,
                                           .k_dtype = storage.k_dtype,
                                           .v_dtype = storage.v_dtype,
                                           .page_bytes = storage.page_bytes};
  }
  *settings = (sfa_index_settings){.model = sfa_model_fingerprint(s->model),
                                   .tokenizer = sfa_tokenizer_fingerprint(sfa_model_tokenizer(s->model)),
                                   .n_layers = info.n_layers,
                                   .n_kv_heads = info.n_kv_heads,
                                   .head_dim = info.head_dim,
                                   .head_dim_v = info.head_dim_v,
                                   .weights = (int32_t)info.weights,
                                   .vocab_size = info.vocab_size,
                                   .layers = *layers,
                                   .name = *info.name ? info.name : info.family};
  return SFA_OK;
}

/* ---- Save and load ------------------------------------------------------------------------------------------------------------- */

static sfa_status save_page(void *user, int32_t layer, int64_t page, void *image) {
  return sfa_forward_page_save(((const sfa_session *)user)->forward, layer, page, image);
}

sfa_status sfa_session_save(const sfa_session *session, sfa_index_writer *writer, const sfa_index_source *sources, int64_t n_sources) {
  if (!session)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(session->ctx, writer, "sfa_session_save wants a writer");
  sfa_index_settings settings;
  sfa_index_layer_entry *layers;
  SFA_TRY(settings_of(session, &settings, &layers));
  sfa_index_state state = {.settings = &settings,
                           .tokens = session->tokens,
                           .n_tokens = sfa_session_len(session),
                           .sources = sources,
                           .n_sources = n_sources,
                           .page = save_page,
                           .user = (void *)(uintptr_t)session};
  sfa_status status = sfa_index_writer_commit(writer, &state);
  sfa_free(session->ctx, layers);
  return status;
}

/* The session is empty; on failure the caller destroys it, and the index with it. */
static sfa_status take_index(sfa_session *s, const char *path) {
  sfa_index_settings settings;
  sfa_index_layer_entry *layers;
  SFA_TRY(sfa_index_open(s->ctx, path, &s->index));
  SFA_TRY(settings_of(s, &settings, &layers));
  sfa_status status = sfa_index_settings_match(s->index, &settings);
  sfa_free(s->ctx, layers);
  SFA_TRY(status);
  const sfa_index *index = s->index;
  if (index->n_tokens > s->context_len)
    return sfa_fail(s->ctx, SFA_ERROR_RANGE, "%s holds %lld tokens, more than the context of %lld; take a larger context", path,
                    (long long)index->n_tokens, (long long)s->context_len);
  SFA_TRY(sfa_session_reserve(s, index->n_tokens));
  memcpy(s->tokens, index->tokens, (size_t)index->n_tokens * sizeof *s->tokens);
  return sfa_forward_map(s->forward, index->n_tokens, index->pages);
}

sfa_status sfa_session_load(const sfa_model *model, const sfa_session_options *options, const char *path, sfa_session **session) {
  SFA_TRY(sfa_session_create(model, options, session));
  sfa_status status = take_index(*session, path);
  if (status != SFA_OK) {
    sfa_session_destroy(*session);
    *session = NULL;
  }
  return status;
}

int64_t sfa_session_index_bytes(const sfa_session *s) {
  int64_t bytes = 0,
          n_pages = s->index ? (sfa_min64(s->index->n_tokens, sfa_session_len(s)) + SFA_INDEX_PAGE_LEN - 1) / SFA_INDEX_PAGE_LEN : 0;
  for (int32_t i = 0; n_pages && i < s->index->settings.n_layers; i++)
    bytes += n_pages * (int64_t)s->index->layers[i].page_bytes;
  return bytes;
}
