/* From the tensors of a file to a sfa_model: names, shapes, prepared weights. */
#include "base/half.h"
#include "model/model_parts.h"

#include <sfa/stream.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct loader {
  sfa_model *model;
  sfa_tensor_names names;
  sfa_weight_format format;
} loader;

static sfa_status load_vector(const loader *load, const sfa_tensor *t, int64_t n, float **out) {
  SFA_TRY(sfa_tensor_check_shape(load->model->ctx, t, 0, n));
  SFA_TRY(sfa_alloc_zero(load->model->ctx, (size_t)n, sizeof **out, t->name, (void **)out));
  if (n % sfa_tensor_block_len(t->type) != 0)
    return sfa_fail(load->model->ctx, SFA_ERROR_FORMAT, "tensor %s: %lld elements are not whole blocks of %s", t->name, (long long)n,
                    sfa_tensor_type_name(t->type));
  sfa_tensor_dequantize(t->type, n, t->data, *out);
  return SFA_OK;
}

/* In the memory of the device; with plus_one, one more than the file has. */
static sfa_status load_placed(const loader *load, const sfa_tensor *t, int64_t n, bool plus_one, float **out) {
  sfa_context *ctx = load->model->ctx;
  float *values = NULL;
  sfa_status status = load_vector(load, t, n, &values);
  for (int64_t i = 0; status == SFA_OK && plus_one && i < n; i++)
    values[i] += 1.0f;
  if (status == SFA_OK)
    status = sfa_memory_alloc(ctx, (size_t)n * sizeof *values, (void **)out);
  if (status == SFA_OK)
    status = sfa_memory_copy(ctx, *out, values, (size_t)n * sizeof *values);
  sfa_free(ctx, values);
  return status;
}

/* A norm that the family does not have stays zero. */
static sfa_status load_norm(const loader *load, sfa_role role, int32_t layer, sfa_norm *norm) {
  const sfa_model_config *c = &load->model->config;
  int64_t n = sfa_role_shape_of(c, role).n_out;
  const sfa_tensor *t;
  if (!c->family->tensors[role])
    return SFA_OK;
  SFA_TRY(sfa_role_require(&load->names, role, layer, ".weight", &t));
  SFA_TRY(load_placed(load, t, n, c->family->norm_plus_one && !c->is_gguf, &norm->weight));
  if (!c->family->layer_norm)
    return SFA_OK;
  SFA_TRY(sfa_role_require(&load->names, role, layer, ".bias", &t));
  return load_placed(load, t, n, false, &norm->bias);
}

static sfa_status create_linear(const loader *load, const sfa_tensor *t, bool transposed, const float *bias, sfa_linear **out) {
  sfa_context *ctx = load->model->ctx;
  sfa_weight_rows rows = {t, transposed};
  sfa_linear_source source;
  if (t->shape[1] % sfa_tensor_block_len(t->type) != 0 || (transposed && sfa_tensor_block_len(t->type) != 1))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "tensor %s: rows of %lld are not whole blocks of %s", t->name, (long long)t->shape[1],
                    sfa_tensor_type_name(t->type));
  sfa_storage storage = load->model->device->fast_storage(ctx, sfa_weight_storage(t, load->format));
  sfa_weight_source(&rows, storage, &source);
  source.bias = bias;
  return load->model->device->linear_create(ctx, &source, storage, out);
}

/* A linear layer with the bias that the file has for it; one that the family does not have stays NULL. */
static sfa_status load_linear(const loader *load, sfa_role role, int32_t layer, sfa_linear **out) {
  const sfa_model_config *c = &load->model->config;
  sfa_role_shape shape = sfa_role_shape_of(c, role);
  const sfa_tensor *t, *bias_tensor;
  if (!c->family->tensors[role])
    return SFA_OK;
  bool transposed = c->family->conv1d && !c->is_gguf && role != SFA_ROLE_HEAD;
  SFA_TRY(sfa_role_require(&load->names, role, layer, ".weight", &t));
  SFA_TRY(sfa_tensor_check_shape(load->model->ctx, t, transposed ? shape.n_in : shape.n_out, transposed ? shape.n_out : shape.n_in));
  float *bias = NULL;
  sfa_status status = SFA_OK;
  if (c->family->biased)
    status = sfa_role_require(&load->names, role, layer, ".bias", &bias_tensor);
  else
    bias_tensor = sfa_role_find(&load->names, role, layer, ".bias");
  if (status == SFA_OK && bias_tensor)
    status = load_vector(load, bias_tensor, shape.n_out, &bias);
  if (status == SFA_OK)
    status = create_linear(load, t, transposed, bias, out);
  sfa_free(load->model->ctx, bias);
  return status;
}

static sfa_status load_layer(const loader *load, int32_t index, sfa_layer *layer) {
  SFA_TRY(load_norm(load, SFA_ROLE_ATTENTION_NORM, index, &layer->attention_norm));
  SFA_TRY(load_linear(load, SFA_ROLE_QKV, index, &layer->qkv[0]));
  if (!layer->qkv[0]) {
    SFA_TRY(load_linear(load, SFA_ROLE_Q, index, &layer->qkv[0]));
    SFA_TRY(load_linear(load, SFA_ROLE_K, index, &layer->qkv[1]));
    SFA_TRY(load_linear(load, SFA_ROLE_V, index, &layer->qkv[2]));
  }
  SFA_TRY(load_norm(load, SFA_ROLE_Q_NORM, index, &layer->q_norm));
  SFA_TRY(load_norm(load, SFA_ROLE_K_NORM, index, &layer->k_norm));
  SFA_TRY(load_linear(load, SFA_ROLE_O, index, &layer->o));
  SFA_TRY(load_norm(load, SFA_ROLE_POST_ATTENTION_NORM, index, &layer->post_attention_norm));
  SFA_TRY(load_norm(load, SFA_ROLE_FFN_NORM, index, &layer->ffn_norm));
  SFA_TRY(load_linear(load, SFA_ROLE_GATE, index, &layer->gate));
  SFA_TRY(load_linear(load, SFA_ROLE_UP, index, &layer->up));
  SFA_TRY(load_linear(load, SFA_ROLE_DOWN, index, &layer->down));
  return load_norm(load, SFA_ROLE_POST_FFN_NORM, index, &layer->post_ffn_norm);
}

static sfa_status load_embedding(loader *load) {
  sfa_model *m = load->model;
  sfa_model_config *c = &m->config;
  SFA_TRY(sfa_role_require(&load->names, SFA_ROLE_EMBEDDING, 0, ".weight", &m->embedding));
  const sfa_tensor *t = m->embedding;
  if (t->n_dims != 2 || t->shape[0] > INT32_MAX / 2 || t->shape[0] < 1)
    return sfa_fail(m->ctx, SFA_ERROR_FORMAT, "tensor %s is not a table of token embeddings", t->name);
  c->vocab_size = (int32_t)t->shape[0];
  SFA_TRY(sfa_tensor_check_shape(m->ctx, t, c->vocab_size, c->hidden_dim));
  if (t->type == SFA_TENSOR_BF16) /* the scale has the type of the weights, as transformers computes it */
    c->embedding_scale = sfa_f32_from_bf16(sfa_bf16_from_f32(c->embedding_scale));
  if (c->family->tensors[SFA_ROLE_POSITIONS]) {
    SFA_TRY(sfa_role_require(&load->names, SFA_ROLE_POSITIONS, 0, ".weight", &m->positions));
    SFA_TRY(sfa_tensor_check_shape(m->ctx, m->positions, m->positions->shape[0], c->hidden_dim));
    c->context_len = sfa_min64(c->context_len, m->positions->shape[0]);
  }
  return load_norm(load, SFA_ROLE_FINAL_NORM, 0, &m->final_norm);
}

/* The head, and on a device that cannot read the file's map the tables that embeddings are taken from; they are often the same. */
static sfa_status load_head(const loader *load) {
  sfa_model *m = load->model;
  const sfa_model_config *c = &m->config;
  const sfa_tensor *t = sfa_role_find_head(&load->names);
  t = t ? t : m->embedding;
  SFA_TRY(sfa_tensor_check_shape(m->ctx, t, c->vocab_size, c->hidden_dim));
  SFA_TRY(create_linear(load, t, false, NULL, &m->head));
  if (!m->device->rows)
    return SFA_OK;
  if (t == m->embedding)
    m->embedding_rows = m->head;
  else
    SFA_TRY(create_linear(load, m->embedding, false, NULL, &m->embedding_rows));
  return m->positions ? create_linear(load, m->positions, false, NULL, &m->position_rows) : SFA_OK;
}

/* What `format` = AUTO came to, by the linear layers of the first block. */
static void note_formats(loader *load) {
  sfa_model *m = load->model;
  const sfa_tensor *t = sfa_role_find(&load->names, SFA_ROLE_O, 0, ".weight");
  static const sfa_weight_format formats[] = {
      [SFA_STORE_F32] = SFA_WEIGHTS_F32,  [SFA_STORE_BF16] = SFA_WEIGHTS_BF16, [SFA_STORE_BF16_PRODUCTS] = SFA_WEIGHTS_BF16,
      [SFA_STORE_F16] = SFA_WEIGHTS_BF16, [SFA_STORE_U8] = SFA_WEIGHTS_INT8,   [SFA_STORE_U4] = SFA_WEIGHTS_INT8};
  m->format = formats[m->device->fast_storage(m->ctx, sfa_weight_storage(t, load->format))];
  m->file_is_f32 = t->type == SFA_TENSOR_F32;
  for (int64_t i = 0; i < sfa_weights_count(m->weights); i++)
    m->n_parameters += sfa_weights_at(m->weights, i)->n_elements;
}

static sfa_status load_model(loader *load) {
  sfa_model *m = load->model;
  SFA_TRY(sfa_model_config_read(m->ctx, m->weights, &m->config));
  load->names = sfa_tensor_names_of(m->ctx, m->weights, &m->config);
  SFA_TRY(load_embedding(load));
  SFA_TRY(sfa_alloc_zero(m->ctx, (size_t)m->config.n_layers, sizeof *m->layers, "layers", (void **)&m->layers));
  for (int32_t i = 0; i < m->config.n_layers; i++)
    SFA_TRY(load_layer(load, i, &m->layers[i]));
  SFA_TRY(load_head(load));
  note_formats(load);
  return SFA_OK;
}

sfa_status sfa_model_load(sfa_context *ctx, sfa_weights *weights, sfa_weight_format format, sfa_model **model) {
  sfa_model *m = NULL;
  *model = NULL;
  sfa_status status = sfa_alloc_zero(ctx, 1, sizeof *m, "a model", (void **)&m);
  if (status != SFA_OK) {
    sfa_weights_close(weights);
    return status;
  }
  m->ctx = ctx;
  m->weights = weights;
  loader load = {.model = m, .format = format};
  const sfa_training *training;
  status = sfa_device_of(ctx, &m->device, &training);
  if (status == SFA_OK)
    status = load_model(&load);
  if (status != SFA_OK) {
    sfa_model_destroy(m);
    return status;
  }
  *model = m;
  return SFA_OK;
}

static void free_norm(sfa_context *ctx, sfa_norm *norm) {
  sfa_memory_free(ctx, norm->weight);
  sfa_memory_free(ctx, norm->bias);
}

static void free_layer(sfa_context *ctx, const sfa_device *device, sfa_layer *layer) {
  sfa_norm *norms[] = {&layer->attention_norm,      &layer->q_norm,   &layer->k_norm,
                       &layer->post_attention_norm, &layer->ffn_norm, &layer->post_ffn_norm};
  sfa_linear *linears[] = {layer->qkv[0], layer->qkv[1], layer->qkv[2], layer->o, layer->gate, layer->up, layer->down};
  for (size_t i = 0; i < sizeof norms / sizeof *norms; i++)
    free_norm(ctx, norms[i]);
  for (size_t i = 0; i < sizeof linears / sizeof *linears; i++)
    device->linear_destroy(ctx, linears[i]);
}

void sfa_model_destroy(sfa_model *model) {
  if (!model)
    return;
  sfa_context *ctx = model->ctx;
  for (int32_t i = 0; model->layers && i < model->config.n_layers; i++)
    free_layer(ctx, model->device, &model->layers[i]);
  free_norm(ctx, &model->final_norm);
  if (model->device) {
    if (model->embedding_rows != model->head)
      model->device->linear_destroy(ctx, model->embedding_rows);
    model->device->linear_destroy(ctx, model->position_rows);
    model->device->linear_destroy(ctx, model->head);
  }
  sfa_free(ctx, model->layers);
  sfa_model_config_free(ctx, &model->config);
  sfa_weights_close(model->weights);
  sfa_free(ctx, model);
}
