/* The decoder block of block.c as it learns: forward with what the way back wants, and the way back. In order:
 *
 *     n = norm(x);  q, k, v = n W + b;  q, k = rope(qk_norm(q, k));  a = attention(q, k, v)
 *     y = x + post_norm(a Wo);  n = norm(y);  z = y + post_norm((act(n Wgate) * n Wup) Wdown)
 *
 * Backward (docs/MATH.md 10) meets them from the end: dz is the gradient of the stream, and what a sub-layer adds to it goes through the
 * sub-layer's norm into it again.
 */
#include "model/learn_parts.h"

/* ---- Layers of parameters --------------------------------------------------------------------------------------------------------- */

/* One plus the stored weight in families that store it so. */
static const float *weight_of(sfa_learner *l, const sfa_learn_norm *norm) {
  if (!l->config.family->norm_plus_one)
    return norm->weight->value;
  l->training->shift(l->ctx, norm->weight->n, norm->weight->value, 1.0f, l->norm_weight);
  return l->norm_weight;
}

static float *gradient_of(const sfa_parameter *p) { return p && p->trainable ? p->gradient : NULL; }

void sfa_learn_norm_forward(sfa_learner *l, const sfa_learn_norm *norm, int64_t n, int32_t n_groups, int32_t dim, const float *x,
                            float *out) {
  int64_t stride = (int64_t)n_groups * dim;
  if (l->config.family->layer_norm)
    l->device->layer_norm(l->ctx, n, dim, x, stride, weight_of(l, norm), norm->bias->value, l->config.norm_eps, out, stride);
  else
    l->device->rms_norm(l->ctx, n, n_groups, dim, x, stride, weight_of(l, norm), l->config.norm_eps, out, stride);
}

void sfa_learn_norm_backward(sfa_learner *l, const sfa_learn_norm *norm, int64_t n, int32_t n_groups, int32_t dim, const float *x,
                             const float *d_out, float *d_x, bool add) {
  int64_t stride = (int64_t)n_groups * dim;
  const sfa_norm_backward backward = {.n_rows = n,
                                      .n_groups = n_groups,
                                      .dim = dim,
                                      .center = l->config.family->layer_norm,
                                      .eps = l->config.norm_eps,
                                      .weight = weight_of(l, norm),
                                      .x = x,
                                      .x_stride = stride,
                                      .d_out = d_out,
                                      .d_out_stride = stride,
                                      .d_x = d_x,
                                      .d_x_stride = stride,
                                      .add = add,
                                      .d_weight = gradient_of(norm->weight),
                                      .d_bias = gradient_of(norm->bias)};
  l->training->norm_backward(l->ctx, &backward, l->scratch);
}

void sfa_learn_linear_forward(sfa_learner *l, const sfa_learn_linear *w, int64_t n, const float *x, bool add, float *out) {
  const sfa_product product = {.m = n,
                               .n = w->n_out,
                               .k = w->n_in,
                               .a = {x, w->n_in, 1},
                               .b = {w->weight->value + w->first * w->out_stride, w->in_stride, w->out_stride},
                               .bias = w->bias ? w->bias->value + w->first : NULL,
                               .add = add,
                               .bf16 = l->options.bf16_products,
                               .out = out,
                               .out_stride = w->n_out};
  l->training->product(l->ctx, &product, l->scratch);
}

void sfa_learn_linear_backward(sfa_learner *l, const sfa_learn_linear *w, int64_t n, const float *x, const float *d_out, bool add,
                               float *d_x) {
  float *d_weight = gradient_of(w->weight), *d_bias = gradient_of(w->bias);
  sfa_matrix d_rows = {d_out, w->n_out, 1}, d_columns = {d_out, 1, w->n_out}, x_rows = {x, w->n_in, 1}, x_columns = {x, 1, w->n_in};
  sfa_product product = {.add = true, .bf16 = l->options.bf16_products, .k = n};
  if (d_weight) { /* the gradient in the order of the weight: dy^T x or x^T dy */
    bool by_out = w->in_stride == 1;
    product.m = by_out ? w->n_out : w->n_in;
    product.n = by_out ? w->n_in : w->n_out;
    product.a = by_out ? d_columns : x_columns;
    product.b = by_out ? x_rows : d_rows;
    product.out = d_weight + w->first * w->out_stride;
    product.out_stride = by_out ? w->out_stride : w->in_stride;
    l->training->product(l->ctx, &product, l->scratch);
  }
  if (d_bias)
    l->training->column_sum(l->ctx, n, (int32_t)w->n_out, d_out, w->n_out, d_bias + w->first, l->scratch);
  if (!d_x)
    return;
  product = (sfa_product){.m = n,
                          .n = w->n_in,
                          .k = w->n_out,
                          .a = d_rows,
                          .b = {w->weight->value + w->first * w->out_stride, w->out_stride, w->in_stride},
                          .add = add,
                          .bf16 = l->options.bf16_products,
                          .out = d_x,
                          .out_stride = w->n_in};
  l->training->product(l->ctx, &product, l->scratch);
}

/* ---- Forward ---------------------------------------------------------------------------------------------------------------------- */

/* out = x + post_norm(y w), with y w in `before` where there is such a norm. */
static void add_sub_layer(sfa_learner *l, const sfa_learn_linear *w, const sfa_learn_norm *post_norm, int64_t n, const float *y,
                          const float *x, float *before, float *out) {
  int32_t dim = l->config.hidden_dim;
  if (!post_norm->weight) {
    l->training->scale(l->ctx, n * dim, 1.0f, x, false, out);
    sfa_learn_linear_forward(l, w, n, y, true, out);
    return;
  }
  sfa_learn_linear_forward(l, w, n, y, false, before);
  sfa_learn_norm_forward(l, post_norm, n, 1, dim, before, out);
  l->device->add(l->ctx, n, dim, out, x);
}

static void turn(sfa_learner *l, int32_t index, int64_t n, int32_t n_heads, bool back, float *x) {
  const sfa_model_config *c = &l->config;
  int kind = c->layer_kinds[index];
  if (c->rope_pairs)
    l->device->rope(l->ctx, n, n_heads, c->head_dim, c->rope_pairs, false, l->rope_cos[kind], back ? l->rope_back[kind] : l->rope_sin[kind],
                    x, (int64_t)n_heads * c->head_dim);
}

static sfa_status project(sfa_learner *l, int32_t index, int64_t n, sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  const sfa_learn_layer *layer = &l->layers[index];
  bool normed = layer->q_norm.weight != NULL;
  sfa_learn_linear_forward(l, &layer->q, n, l->normed, false, normed ? saved->raw_q : saved->q);
  sfa_learn_linear_forward(l, &layer->k, n, l->normed, false, normed ? saved->raw_k : saved->k);
  sfa_learn_linear_forward(l, &layer->v, n, l->normed, false, saved->v);
  if (normed) {
    sfa_learn_norm_forward(l, &layer->q_norm, n, c->n_heads, c->head_dim, saved->raw_q, saved->q);
    sfa_learn_norm_forward(l, &layer->k_norm, n, c->n_kv_heads, c->head_dim, saved->raw_k, saved->k);
  }
  if (l->sparsity.pre_rope)
    SFA_TRY(sfa_learn_keep(l, n, index, saved));
  turn(l, index, n, c->n_heads, false, saved->q);
  turn(l, index, n, c->n_kv_heads, false, saved->k);
  return l->sparsity.pre_rope ? SFA_OK : sfa_learn_keep(l, n, index, saved);
}

sfa_status sfa_learn_layer_forward(sfa_learner *l, const sfa_learn_batch *batch, int32_t index, sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  const sfa_learn_layer *layer = &l->layers[index];
  const float *x = sfa_learn_stream(l, index);
  int64_t n = batch->n_tokens;
  sfa_learn_norm_forward(l, &layer->attention_norm, n, 1, c->hidden_dim, x, l->normed);
  SFA_TRY(project(l, index, n, saved));
  SFA_TRY(sfa_learn_attend(l, batch, index, saved));
  add_sub_layer(l, &layer->o, &layer->post_attention_norm, n, saved->attended, x, saved->projected, saved->middle);

  sfa_learn_norm_forward(l, &layer->ffn_norm, n, 1, c->hidden_dim, saved->middle, l->normed);
  sfa_learn_linear_forward(l, layer->gate.weight ? &layer->gate : &layer->up, n, l->normed, false, saved->gate);
  if (saved->up)
    sfa_learn_linear_forward(l, &layer->up, n, l->normed, false, saved->up);
  l->device->activate(l->ctx, c->family->activation, n, c->ffn_dim, saved->gate, c->ffn_dim, saved->up, c->ffn_dim, l->activated,
                      c->ffn_dim);
  add_sub_layer(l, &layer->down, &layer->post_ffn_norm, n, l->activated, saved->middle, saved->down, sfa_learn_stream(l, index + 1));
  return SFA_OK;
}

/* ---- Backward --------------------------------------------------------------------------------------------------------------------- */

/* The gradient before the norm after a sub-layer. */
static const float *through_post_norm(sfa_learner *l, const sfa_learn_norm *norm, int64_t n, const float *before) {
  if (!norm->weight)
    return l->d_stream;
  sfa_learn_norm_backward(l, norm, n, 1, l->config.hidden_dim, before, l->d_stream, l->d_normed, false);
  return l->d_normed;
}

static void feed_forward_backward(sfa_learner *l, int32_t index, int64_t n, sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  const sfa_learn_layer *layer = &l->layers[index];
  int32_t dim = c->hidden_dim, ffn = c->ffn_dim;
  const float *d_down = through_post_norm(l, &layer->post_ffn_norm, n, saved->down);
  l->device->activate(l->ctx, c->family->activation, n, ffn, saved->gate, ffn, saved->up, ffn, l->activated, ffn);
  sfa_learn_linear_backward(l, &layer->down, n, l->activated, d_down, false, l->activated);
  l->training->activate_backward(l->ctx, c->family->activation, n, ffn, saved->gate, ffn, saved->up, ffn, l->activated, ffn, saved->gate,
                                 ffn, saved->up, ffn);
  sfa_learn_norm_forward(l, &layer->ffn_norm, n, 1, dim, saved->middle, l->normed);
  sfa_learn_linear_backward(l, layer->gate.weight ? &layer->gate : &layer->up, n, l->normed, saved->gate, false, l->d_normed);
  if (saved->up)
    sfa_learn_linear_backward(l, &layer->up, n, l->normed, saved->up, true, l->d_normed);
  sfa_learn_norm_backward(l, &layer->ffn_norm, n, 1, dim, saved->middle, l->d_normed, l->d_stream, true);
}

/* d_attended += d head_loss: 2 (o - t) / sum t^2. */
static void add_head_gradient(sfa_learner *l, int64_t n, int32_t index, const float *attended, const float *target, float head_scale) {
  int64_t n_elements = n * sfa_learn_attended_dim(&l->config);
  const double *size = l->heads_off + 2 * index + 1, factor = 2.0 * (double)head_scale;
  l->training->add_share(l->ctx, n_elements, factor, size, attended, l->d_attended);
  l->training->add_share(l->ctx, n_elements, -factor, size, target, l->d_attended);
}

sfa_status sfa_learn_layer_backward(sfa_learner *l, const sfa_learn_batch *batch, int32_t index, sfa_learn_saved *saved, float head_scale) {
  const sfa_model_config *c = &l->config;
  const sfa_learn_layer *layer = &l->layers[index];
  const float *x = sfa_learn_stream(l, index);
  int64_t n = batch->n_tokens;
  feed_forward_backward(l, index, n, saved);

  const float *d_projected = through_post_norm(l, &layer->post_attention_norm, n, saved->projected);
  sfa_learn_linear_backward(l, &layer->o, n, saved->attended, d_projected, false, l->d_attended);
  if (head_scale > 0 && batch->head_targets[index])
    add_head_gradient(l, n, index, saved->attended, batch->head_targets[index], head_scale);
  SFA_TRY(sfa_learn_attend_backward(l, batch, index, saved));
  turn(l, index, n, c->n_heads, true, l->d_q);
  turn(l, index, n, c->n_kv_heads, true, l->d_k);
  if (l->sparsity.pre_rope) {
    l->training->keep_where(l->ctx, n * sfa_learn_q_dim(c), saved->kept_q, l->d_q); /* what top-k before rope left out */
    l->training->keep_where(l->ctx, n * sfa_learn_k_dim(c), saved->kept_k, l->d_k);
  }
  if (layer->q_norm.weight) {
    sfa_learn_norm_backward(l, &layer->q_norm, n, c->n_heads, c->head_dim, saved->raw_q, l->d_q, l->d_q, false);
    sfa_learn_norm_backward(l, &layer->k_norm, n, c->n_kv_heads, c->head_dim, saved->raw_k, l->d_k, l->d_k, false);
  }
  sfa_learn_norm_forward(l, &layer->attention_norm, n, 1, c->hidden_dim, x, l->normed);
  sfa_learn_linear_backward(l, &layer->q, n, l->normed, l->d_q, false, l->d_normed);
  sfa_learn_linear_backward(l, &layer->k, n, l->normed, l->d_k, true, l->d_normed);
  sfa_learn_linear_backward(l, &layer->v, n, l->normed, l->d_v, true, l->d_normed);
  sfa_learn_norm_backward(l, &layer->attention_norm, n, 1, c->hidden_dim, x, l->d_normed, l->d_stream, true);
  return SFA_OK;
}
