/* sfa index: what a document index holds. */
#include "app.h"

#include <stdio.h>

static const char *const dtypes[] = {"default", "f32", "bf16", "f16", "int8", "int4", "fp8"};
static const char *const weights[] = {"auto", "f32", "bf16", "int8"};

static int index_json(const sfa_index *index, const sfa_index_info *i, bool verified) {
  cJSON *d = cJSON_CreateObject();
  char fingerprint[20];
  snprintf(fingerprint, sizeof fingerprint, "%016llx", (unsigned long long)i->model);
  cJSON_AddStringToObject(d, "model", i->model_name);
  cJSON_AddStringToObject(d, "fingerprint", fingerprint);
  const struct {
    const char *name;
    double value;
  } numbers[] = {{"tokens", (double)i->n_tokens},
                 {"bytes", (double)i->bytes},
                 {"page_bytes", (double)i->page_bytes},
                 {"segments", (double)i->n_segments},
                 {"commits", (double)i->n_commits},
                 {"layers", i->n_layers},
                 {"sparse_layers", i->n_sparse_layers},
                 {"kv_heads", i->n_kv_heads},
                 {"head_dim", i->head_dim},
                 {"k", i->k},
                 {"k_q", i->k_q}};
  for (size_t n = 0; n < sizeof numbers / sizeof *numbers; n++)
    cJSON_AddNumberToObject(d, numbers[n].name, numbers[n].value);
  cJSON_AddStringToObject(d, "k_type", dtypes[i->k_dtype]);
  cJSON_AddStringToObject(d, "v_type", dtypes[i->v_dtype]);
  cJSON_AddStringToObject(d, "weights", weights[i->weights]);
  cJSON_AddBoolToObject(d, "verified", verified);
  cJSON *sources = cJSON_AddArrayToObject(d, "sources");
  sfa_index_source source;
  for (int64_t n = 0; sfa_index_source_at(index, n, &source); n++) {
    cJSON *row = cJSON_CreateObject();
    cJSON_AddStringToObject(row, "name", source.name);
    cJSON_AddNumberToObject(row, "first_byte", (double)source.first_byte);
    cJSON_AddNumberToObject(row, "bytes", (double)source.n_bytes);
    cJSON_AddNumberToObject(row, "first_token", (double)source.first_token);
    cJSON_AddNumberToObject(row, "tokens", (double)source.n_tokens);
    cJSON_AddItemToArray(sources, row);
  }
  return app_print_json(d);
}

static int index_table(const sfa_index *index, const sfa_index_info *i, bool verified) {
  char bytes[32], page_bytes[32];
  printf("%lld tokens of %lld sources, %s in %lld segments%s\n", (long long)i->n_tokens, (long long)i->n_sources,
         human_bytes((double)i->bytes, bytes), (long long)i->n_segments, verified ? "; every byte is as it was written" : "");
  printf("  model        %s, %d layers of %d key/value heads, head dim %d, weights as %s\n", i->model_name, i->n_layers, i->n_kv_heads,
         i->head_dim, weights[i->weights]);
  if (i->n_sparse_layers)
    printf("  attention    SFA k=%d of %d, k of queries %d, in %d layers\n", i->k, i->head_dim, i->k_q ? i->k_q : i->head_dim,
           i->n_sparse_layers);
  else
    printf("  attention    dense\n");
  printf("  cache        keys %s, values %s, %s\n", dtypes[i->k_dtype], dtypes[i->v_dtype], human_bytes((double)i->page_bytes, page_bytes));
  sfa_index_source source;
  int64_t end = 0;
  printf("\n%12s %10s   source\n", "from token", "tokens");
  for (int64_t n = 0; sfa_index_source_at(index, n, &source); n++) {
    printf("%12lld %10lld   %s\n", (long long)source.first_token, (long long)source.n_tokens, source.name);
    end = source.first_token + source.n_tokens;
  }
  if (end < i->n_tokens)
    printf("%12lld %10lld   (not read to its end)\n", (long long)end, (long long)(i->n_tokens - end));
  return app_flush();
}

int cmd_index(const app_options *o) {
  app a = {0};
  sfa_index *index = NULL;
  sfa_index_info info;
  int status = o->index ? app_open_context(&a, o, 0, SFA_ISA_DEFAULT) : app_usage("index wants a file: sfa index FILE");
  if (!status && sfa_index_open(a.ctx, o->index, &index) != SFA_OK)
    status = app_fail_status(a.ctx);
  if (!status && o->verify && sfa_index_verify(index) != SFA_OK)
    status = app_fail_status(a.ctx);
  if (!status) {
    sfa_index_describe(index, &info);
    status = o->json ? index_json(index, &info, o->verify) : index_table(index, &info, o->verify);
  }
  sfa_index_close(index);
  app_close(&a);
  return status;
}
