/* From the tensors of a model file to parameters: f32, under the names and in the shapes of Hugging Face, whatever the file's format. */
#include "base/rng.h"
#include "model/learn_parts.h"

#include <math.h>
#include <string.h>

static bool is_conv1d(const sfa_model_config *c, sfa_role role) {
  return c->family->conv1d && role != SFA_ROLE_HEAD && role != SFA_ROLE_EMBEDDING && role != SFA_ROLE_POSITIONS && !sfa_role_is_norm(role);
}

/* Rows of a GGUF file's q and k stand so that rotated pairs are side by side; here the first members come before the second ones. */
static void separate_pairs(const sfa_model_config *c, int64_t n_rows, int64_t row_len, const float *from, float *to) {
  int64_t n_pairs = c->rope_pairs;
  for (int64_t row = 0; row < n_rows; row++) {
    int64_t head = row / c->head_dim * c->head_dim, i = row % c->head_dim;
    int64_t place = i < 2 * n_pairs ? i / 2 + i % 2 * n_pairs : i;
    memcpy(to + (head + place) * row_len, from + row * row_len, (size_t)row_len * sizeof *to);
  }
}

/* The values of a file's tensor in the parameter's order; on the host. */
static sfa_status read_values(sfa_learner *l, const sfa_tensor *t, const sfa_parameter *p, float *out) {
  const sfa_model_config *c = &l->config;
  bool pairs = c->rope_interleaved && (p->role == SFA_ROLE_Q || p->role == SFA_ROLE_K);
  bool turned = c->is_gguf && is_conv1d(c, p->role) && p->n_dims == 2; /* GGUF has [out][in] */
  if (t->shape[t->n_dims - 1] % sfa_tensor_block_len(t->type) != 0)
    return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "tensor %s: rows of %lld are not whole blocks of %s", t->name,
                    (long long)t->shape[t->n_dims - 1], sfa_tensor_type_name(t->type));
  if (!pairs && !turned) {
    sfa_tensor_dequantize(t->type, p->n, t->data, out);
  } else {
    float *values;
    SFA_TRY(sfa_alloc_zero(l->ctx, (size_t)p->n, sizeof *values, "a tensor on its way", (void **)&values));
    sfa_tensor_dequantize(t->type, p->n, t->data, values);
    if (pairs)
      separate_pairs(c, p->shape[0], p->shape[1], values, out);
    for (int64_t i = 0; turned && i < p->shape[0]; i++)
      for (int64_t o = 0; o < p->shape[1]; o++)
        out[i * p->shape[1] + o] = values[o * p->shape[0] + i];
    sfa_free(l->ctx, values);
  }
  for (int64_t i = 0; c->is_gguf && c->family->norm_plus_one && sfa_role_is_norm(p->role) && i < p->n; i++)
    out[i] -= 1.0f;
  return SFA_OK;
}

static sfa_status place_values(sfa_learner *l, const sfa_tensor *t, const sfa_parameter *p) {
  float *values;
  SFA_TRY(sfa_alloc_zero(l->ctx, (size_t)p->n, sizeof *values, t->name, (void **)&values));
  sfa_status status = read_values(l, t, p, values);
  if (status == SFA_OK)
    status = sfa_memory_copy(l->ctx, p->value, values, (size_t)p->n * sizeof *values);
  sfa_free(l->ctx, values);
  return status;
}

/* Makes a parameter of a tensor: role and layer as they are, n_out x n_in (1: a vector). */
static sfa_status add_parameter(sfa_learner *l, const sfa_tensor_names *names, const sfa_tensor *t, sfa_role role, int32_t layer,
                                const char *suffix, sfa_role_shape shape, sfa_parameter **out) {
  const sfa_model_config *c = &l->config;
  sfa_tensor_names prefixed = *names;
  prefixed.prefix = role == SFA_ROLE_HEAD ? "" : c->is_gguf ? c->family->tensor_prefixes[0] : names->prefix;
  bool is_vector = shape.n_in == 1, swapped = is_conv1d(c, role) && !is_vector;
  if (is_vector)
    SFA_TRY(sfa_tensor_check_shape(l->ctx, t, 0, shape.n_out));
  else
    SFA_TRY(sfa_tensor_check_shape(l->ctx, t, swapped && !c->is_gguf ? shape.n_in : shape.n_out,
                                   swapped && !c->is_gguf ? shape.n_out : shape.n_in));
  sfa_parameter *p = &l->parameters[l->n_parameters];
  *p = (sfa_parameter){.name = sfa_role_name(&prefixed, false, role, layer, suffix, l->names[l->n_parameters]),
                       .role = role,
                       .layer = layer,
                       .n_dims = is_vector ? 1 : 2,
                       .shape = {swapped ? shape.n_in : shape.n_out, swapped ? shape.n_out : shape.n_in},
                       .n = shape.n_out * shape.n_in,
                       .decays = !is_vector,
                       .trainable = true};
  l->n_parameters++;
  SFA_TRY(sfa_learn_alloc_device(l, (size_t)p->n, sizeof(float), &p->value));
  SFA_TRY(sfa_learn_alloc_device(l, (size_t)p->n, sizeof(float), &p->gradient));
  *out = p;
  return place_values(l, t, p);
}

static sfa_status load_norm(sfa_learner *l, const sfa_tensor_names *names, sfa_role role, int32_t layer, sfa_learn_norm *norm) {
  const sfa_tensor *t;
  sfa_role_shape shape = sfa_role_shape_of(&l->config, role);
  if (!l->config.family->tensors[role])
    return SFA_OK;
  SFA_TRY(sfa_role_require(names, role, layer, ".weight", &t));
  SFA_TRY(add_parameter(l, names, t, role, layer, ".weight", shape, &norm->weight));
  if (!l->config.family->layer_norm)
    return SFA_OK;
  SFA_TRY(sfa_role_require(names, role, layer, ".bias", &t));
  return add_parameter(l, names, t, role, layer, ".bias", shape, &norm->bias);
}

static sfa_status load_linear(sfa_learner *l, const sfa_tensor_names *names, sfa_role role, int32_t layer, sfa_learn_linear *linear) {
  const sfa_model_config *c = &l->config;
  sfa_role_shape shape = sfa_role_shape_of(c, role);
  const sfa_tensor *t;
  if (!c->family->tensors[role])
    return SFA_OK;
  SFA_TRY(sfa_role_require(names, role, layer, ".weight", &t));
  SFA_TRY(add_parameter(l, names, t, role, layer, ".weight", shape, &linear->weight));
  linear->n_in = shape.n_in;
  linear->n_out = shape.n_out;
  linear->out_stride = is_conv1d(c, role) ? 1 : shape.n_in;
  linear->in_stride = is_conv1d(c, role) ? shape.n_out : 1;
  if (c->family->biased)
    SFA_TRY(sfa_role_require(names, role, layer, ".bias", &t));
  else
    t = sfa_role_find(names, role, layer, ".bias");
  return t ? add_parameter(l, names, t, role, layer, ".bias", (sfa_role_shape){shape.n_out, 1}, &linear->bias) : SFA_OK;
}

/* n_out of the outputs of `all`, from `first` on. */
static sfa_learn_linear outputs_of(const sfa_learn_linear *all, int64_t first, int64_t n_out) {
  sfa_learn_linear part = *all;
  part.first = first;
  part.n_out = n_out;
  return part;
}

static sfa_status load_layer(sfa_learner *l, const sfa_tensor_names *names, int32_t index) {
  const sfa_model_config *c = &l->config;
  sfa_learn_layer *layer = &l->layers[index];
  sfa_learn_linear all = {NULL, NULL, 0, 0, 0, 0, 0};
  SFA_TRY(load_norm(l, names, SFA_ROLE_ATTENTION_NORM, index, &layer->attention_norm));
  SFA_TRY(load_linear(l, names, SFA_ROLE_QKV, index, &all));
  if (all.weight) {
    layer->q = outputs_of(&all, 0, sfa_learn_q_dim(c));
    layer->k = outputs_of(&all, sfa_learn_q_dim(c), sfa_learn_k_dim(c));
    layer->v = outputs_of(&all, sfa_learn_q_dim(c) + sfa_learn_k_dim(c), sfa_learn_v_dim(c));
  } else {
    SFA_TRY(load_linear(l, names, SFA_ROLE_Q, index, &layer->q));
    SFA_TRY(load_linear(l, names, SFA_ROLE_K, index, &layer->k));
    SFA_TRY(load_linear(l, names, SFA_ROLE_V, index, &layer->v));
  }
  SFA_TRY(load_norm(l, names, SFA_ROLE_Q_NORM, index, &layer->q_norm));
  SFA_TRY(load_norm(l, names, SFA_ROLE_K_NORM, index, &layer->k_norm));
  SFA_TRY(load_linear(l, names, SFA_ROLE_O, index, &layer->o));
  SFA_TRY(load_norm(l, names, SFA_ROLE_POST_ATTENTION_NORM, index, &layer->post_attention_norm));
  SFA_TRY(load_norm(l, names, SFA_ROLE_FFN_NORM, index, &layer->ffn_norm));
  SFA_TRY(load_linear(l, names, SFA_ROLE_GATE, index, &layer->gate));
  SFA_TRY(load_linear(l, names, SFA_ROLE_UP, index, &layer->up));
  SFA_TRY(load_linear(l, names, SFA_ROLE_DOWN, index, &layer->down));
  return load_norm(l, names, SFA_ROLE_POST_FFN_NORM, index, &layer->post_ffn_norm);
}

sfa_status sfa_learn_load(sfa_learner *l) {
  sfa_model_config *c = &l->config;
  const sfa_tensor *t;
  sfa_tensor_names names = sfa_tensor_names_of(l->ctx, l->weights, c);
  double range = 0.02;
  l->most_parameters = 4 + c->n_layers * 2 * SFA_ROLE_COUNT;
  SFA_TRY(sfa_learn_alloc(l, (size_t)l->most_parameters, sizeof *l->parameters, "parameters", &l->parameters));
  SFA_TRY(sfa_learn_alloc(l, (size_t)l->most_parameters, sizeof *l->names, "names of parameters", &l->names));
  SFA_TRY(sfa_learn_alloc(l, (size_t)c->n_layers, sizeof *l->layers, "layers", &l->layers));

  SFA_TRY(sfa_role_require(&names, SFA_ROLE_EMBEDDING, 0, ".weight", &t));
  if (t->n_dims != 2 || t->shape[0] > INT32_MAX / 2 || t->shape[0] < 1)
    return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "tensor %s is not a table of token embeddings", t->name);
  c->vocab_size = (int32_t)t->shape[0];
  SFA_TRY(add_parameter(l, &names, t, SFA_ROLE_EMBEDDING, -1, ".weight", sfa_role_shape_of(c, SFA_ROLE_EMBEDDING), &l->embedding));
  if (c->family->tensors[SFA_ROLE_POSITIONS]) {
    SFA_TRY(sfa_role_require(&names, SFA_ROLE_POSITIONS, 0, ".weight", &t));
    c->context_len = t->shape[0];
    SFA_TRY(add_parameter(l, &names, t, SFA_ROLE_POSITIONS, -1, ".weight", sfa_role_shape_of(c, SFA_ROLE_POSITIONS), &l->positions));
  }
  for (int32_t i = 0; i < c->n_layers; i++)
    SFA_TRY(load_layer(l, &names, i));
  SFA_TRY(load_norm(l, &names, SFA_ROLE_FINAL_NORM, -1, &l->final_norm));
  l->head = (sfa_learn_linear){l->embedding, NULL, c->hidden_dim, c->vocab_size, 0, c->hidden_dim, 1};
  t = sfa_role_find_head(&names);
  if (t)
    SFA_TRY(add_parameter(l, &names, t, SFA_ROLE_HEAD, -1, ".weight", sfa_role_shape_of(c, SFA_ROLE_HEAD), &l->head.weight));
  c->rope_interleaved = false; /* see separate_pairs */
  sfa_config_number(l->weights, c, "initializer_range", &range);
  l->initializer_range = (float)range;
  return SFA_OK;
}

static sfa_status init_parameter(sfa_learner *l, const sfa_parameter *p, uint64_t seed) {
  sfa_rng rng = {seed};
  bool is_weight = p->name[strlen(p->name) - 1] == 't'; /* ".weight" */
  double range = (double)l->initializer_range;
  float *values, constant = is_weight && !l->config.family->norm_plus_one ? 1.0f : 0.0f;
  if (l->config.family->conv1d && (p->role == SFA_ROLE_O || p->role == SFA_ROLE_DOWN))
    range /= sqrt(2.0 * l->config.n_layers);
  SFA_TRY(sfa_alloc(l->ctx, (size_t)p->n * sizeof *values, p->name, (void **)&values));
  for (int64_t e = 0; e < p->n; e++)
    values[e] = p->decays ? (float)(range * sfa_rng_normal(&rng)) : constant;
  sfa_status status = sfa_memory_copy(l->ctx, p->value, values, (size_t)p->n * sizeof *values);
  sfa_free(l->ctx, values);
  return status;
}

sfa_status sfa_learner_init_random(sfa_learner *l, uint64_t seed) {
  for (int32_t i = 0; i < l->n_parameters; i++)
    SFA_TRY(init_parameter(l, &l->parameters[i], seed + (uint64_t)i * 0x632be59bd9b4e019ull));
  return SFA_OK;
}
