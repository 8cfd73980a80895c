/* sfa info: what a model file holds, and what its KV cache takes; sfa info --devices: what there is to compute on. */
#include "app.h"

#include <sfa/stream.h>

#include <stdio.h>

static const char *const weight_names[] = {"auto", "f32", "bf16", "int8"};

typedef struct cache_row {
  char name[96];
  int k;
  size_t token_bytes;
} cache_row;

enum { MOST_ROWS = 5 };

static int add_row(const app *a, const sfa_attention_choice *choice, const char *name, cache_row *rows, int *n_rows) {
  cache_row *row = &rows[(*n_rows)++];
  *row = (cache_row){.k = choice->sparse ? choice->k : 0};
  snprintf(row->name, sizeof row->name, "%s", name);
  return sfa_model_kv_bytes(a->model, choice, &row->token_bytes) == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
}

/* KV bytes a token: dense and SFA at 8, 16 and 32, then what the options or the model file ask for. */
static int cache_rows(const app *a, cache_row *rows, int *n_rows) {
  static const int ks[] = {0, 8, 16, 32};
  char name[96];
  *n_rows = 0;
  for (int i = 0; i < 4 && ks[i] < a->info.head_dim; i++) {
    sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = ks[i] > 0, .k = ks[i]};
    snprintf(name, sizeof name, ks[i] ? "SFA k=%d" : "dense", ks[i]);
    int status = add_row(a, &choice, name, rows, n_rows);
    if (status)
      return status;
  }
  if (!a->choice.sparse && a->choice.cache_k == SFA_DTYPE_DEFAULT && a->choice.cache_v == SFA_DTYPE_DEFAULT)
    return EXIT_OK;
  return add_row(a, &a->choice, app_attention_name(a, name, sizeof name), rows, n_rows);
}

static void print_shape(const sfa_tensor_info *t, char *out, size_t capacity) {
  size_t n = 0;
  for (int32_t i = 0; i < t->n_dims; i++)
    n += (size_t)snprintf(out + n, capacity - n, "%s%lld", i ? " x " : "", (long long)t->shape[i]);
}

static int info_json(const app *a, const cache_row *rows, int n_rows) {
  const sfa_model_info *m = &a->info;
  cJSON *d = cJSON_CreateObject();
  const struct {
    const char *name, *value;
  } texts[] = {{"family", m->family}, {"name", m->name}, {"format", m->format}, {"weights", weight_names[m->weights]}};
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
    cJSON_AddStringToObject(d, texts[i].name, texts[i].value);
  const struct {
    const char *name;
    double value;
  } numbers[] = {
      {"n_parameters", (double)m->n_parameters},
      {"file_bytes", (double)m->file_bytes},
      {"n_tensors", (double)m->n_tensors},
      {"n_layers", m->n_layers},
      {"n_heads", m->n_heads},
      {"n_kv_heads", m->n_kv_heads},
      {"head_dim", m->head_dim},
      {"hidden_dim", m->hidden_dim},
      {"intermediate_dim", m->intermediate_dim},
      {"vocab_size", m->vocab_size},
      {"context_len", (double)m->context_len},
      {"sfa_k", m->sfa_k},
      {"sfa_k_q", m->sfa_k_q},
  };
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    cJSON_AddNumberToObject(d, numbers[i].name, numbers[i].value);
  cJSON_AddBoolToObject(d, "is_instruct", m->is_instruct);
  cJSON *cache = cJSON_AddArrayToObject(d, "kv_cache");
  for (int i = 0; i < n_rows; i++) {
    cJSON *row = cJSON_CreateObject();
    cJSON_AddStringToObject(row, "attention", rows[i].name);
    cJSON_AddNumberToObject(row, "k", rows[i].k);
    cJSON_AddNumberToObject(row, "token_bytes", (double)rows[i].token_bytes);
    cJSON_AddNumberToObject(row, "context_bytes", (double)rows[i].token_bytes * (double)m->context_len);
    cJSON_AddItemToArray(cache, row);
  }
  if (a->o->tensors) {
    cJSON *tensors = cJSON_AddArrayToObject(d, "tensors");
    sfa_tensor_info t;
    for (int64_t i = 0; sfa_model_tensor(a->model, i, &t); i++) {
      cJSON *row = cJSON_CreateObject(), *shape;
      cJSON_AddStringToObject(row, "name", t.name);
      cJSON_AddStringToObject(row, "type", t.type);
      shape = cJSON_AddArrayToObject(row, "shape");
      for (int32_t j = 0; j < t.n_dims; j++)
        cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)t.shape[j]));
      cJSON_AddNumberToObject(row, "bytes", (double)t.bytes);
      cJSON_AddItemToArray(tensors, row);
    }
  }
  return app_print_json(d);
}

static int info_table(const app *a, const cache_row *rows, int n_rows) {
  const sfa_model_info *m = &a->info;
  char bytes[32];
  printf("%s%s%s model, %s file of %s, %lld tensors\n", m->name, *m->name ? ": " : "", m->family, m->format,
         human_bytes((double)m->file_bytes, bytes), (long long)m->n_tensors);
  printf("  parameters   %.4g million, linear layers in memory as %s\n", 1e-6 * (double)m->n_parameters, weight_names[m->weights]);
  printf("  layers       %d of width %d, feed-forward %d\n", m->n_layers, m->hidden_dim, m->intermediate_dim);
  printf("  attention    %d query heads, %d key/value heads, head dim %d\n", m->n_heads, m->n_kv_heads, m->head_dim);
  printf("  vocabulary   %d tokens%s\n", m->vocab_size, a->tokenizer ? "" : ", no tokenizer found");
  printf("  context      %lld tokens\n", (long long)m->context_len);
  printf("  chat         %s\n", m->is_instruct ? "has a chat template" : "no chat template");
  if (m->sfa_k)
    printf("  trained SFA  k = %d, k of queries = %d\n", m->sfa_k, m->sfa_k_q ? m->sfa_k_q : m->head_dim);
  printf("\n%-32s %10s   %12s   %8s\n", "KV cache", "a token", "full context", "of dense");
  for (int i = 0; i < n_rows; i++) {
    char token[32];
    printf("  %-30s %10s   %12s   %6.0f %%\n", rows[i].name, human_bytes((double)rows[i].token_bytes, token),
           human_bytes((double)rows[i].token_bytes * (double)m->context_len, bytes),
           100.0 * (double)rows[i].token_bytes / (double)rows[0].token_bytes);
  }
  if (a->o->tensors) {
    sfa_tensor_info t;
    printf("\n");
    for (int64_t i = 0; sfa_model_tensor(a->model, i, &t); i++) {
      char shape[96];
      print_shape(&t, shape, sizeof shape);
      printf("%-56s %-5s %10s  %s\n", t.name, t.type, human_bytes((double)t.bytes, bytes), shape);
    }
  }
  return app_flush();
}

/* ---- Devices ---------------------------------------------------------------------------------------------------------------------- */

enum { MOST_DEVICES = 64 };

static int devices_json(const app *a, const sfa_device_info *devices, int32_t n, const char *why) {
  cJSON *d = cJSON_CreateObject(), *cpu = cJSON_AddObjectToObject(d, "cpu");
  cJSON_AddStringToObject(cpu, "isa", sfa_isa_name(sfa_context_isa(a->ctx)));
  cJSON_AddNumberToObject(cpu, "threads", sfa_context_threads(a->ctx));
  cJSON *cuda = cJSON_AddObjectToObject(d, "cuda"), *gpus = cJSON_AddArrayToObject(cuda, "devices");
  cJSON_AddStringToObject(cuda, "why", why);
  for (int32_t i = 0; i < n; i++) {
    const sfa_device_info *gpu = &devices[i];
    char compute[32];
    snprintf(compute, sizeof compute, "%d.%d", gpu->compute_major, gpu->compute_minor);
    cJSON *row = cJSON_CreateObject();
    cJSON_AddNumberToObject(row, "index", gpu->index);
    cJSON_AddStringToObject(row, "name", gpu->name);
    cJSON_AddStringToObject(row, "compute_capability", compute);
    cJSON_AddNumberToObject(row, "n_processors", gpu->n_processors);
    cJSON_AddNumberToObject(row, "memory_bytes", (double)gpu->memory_bytes);
    cJSON_AddNumberToObject(row, "free_bytes", (double)gpu->free_bytes);
    cJSON_AddBoolToObject(row, "is_usable", gpu->is_usable);
    cJSON_AddStringToObject(row, "why", gpu->why);
    cJSON_AddItemToArray(gpus, row);
  }
  return app_print_json(d);
}

static int devices_table(const app *a, const sfa_device_info *devices, int32_t n, const char *why) {
  printf("cpu      %s, %d threads\n", sfa_isa_name(sfa_context_isa(a->ctx)), sfa_context_threads(a->ctx));
  if (*why)
    printf("cuda     none: %s\n", why);
  for (int32_t i = 0; i < n; i++) {
    const sfa_device_info *gpu = &devices[i];
    char memory[32], left[32];
    printf("cuda:%-3d %s, compute capability %d.%d, %d processors, %s of memory, %s free%s%s\n", gpu->index, gpu->name, gpu->compute_major,
           gpu->compute_minor, gpu->n_processors, human_bytes((double)gpu->memory_bytes, memory),
           human_bytes((double)gpu->free_bytes, left), gpu->is_usable ? "" : "; not usable: ", gpu->why);
  }
  return app_flush();
}

static int info_devices(const app_options *o) {
  app a;
  sfa_device_info devices[MOST_DEVICES];
  int32_t n = 0;
  int status = app_open_context(&a, o, 0, SFA_ISA_DEFAULT);
  if (!status) {
    const char *why = sfa_device_list(a.ctx, MOST_DEVICES, devices, &n) == SFA_OK ? "" : sfa_context_error(a.ctx);
    n = n < MOST_DEVICES ? n : MOST_DEVICES;
    status = o->json ? devices_json(&a, devices, n, why) : devices_table(&a, devices, n, why);
  }
  app_close(&a);
  return status;
}

int cmd_info(const app_options *o) {
  if (o->devices)
    return info_devices(o);
  app a = {0};
  cache_row rows[MOST_ROWS];
  int n_rows;
  int status = app_require_model(o, "info");
  if (!status)
    status = app_open_model(&a, o, false);
  if (!status)
    status = cache_rows(&a, rows, &n_rows);
  if (!status)
    status = o->json ? info_json(&a, rows, n_rows) : info_table(&a, rows, n_rows);
  app_close(&a);
  return status;
}
