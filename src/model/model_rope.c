/* Rotation frequencies: theta^(-2p / D) for pair p, stretched as the model's long-context training did.
 *
 * Where they are said: GGUF rope.freq_base, rope.scaling.* and the tensor rope_freqs.weight (divisors, how Llama 3's scaling is stored);
 * config.json rope_theta and rope_scaling, or since transformers 5 rope_parameters, there by layer type in Gemma 3. */
#include "model/model_parts.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct rope_settings {
  const char *where; /* "rope_scaling.", "rope_parameters.", ...; keys of the scaling follow it */
  const char *type;  /* "default", "linear", "llama3" */
  double base, factor;
} rope_settings;

static bool setting(const sfa_weights *weights, const sfa_model_config *c, const rope_settings *s, const char *name, double *out) {
  char key[SFA_KEY_BYTES];
  snprintf(key, sizeof key, "%s%s", s->where, name);
  return sfa_config_number(weights, c, key, out);
}

static bool setting_type(const sfa_weights *weights, const sfa_model_config *c, rope_settings *s) {
  static const char *const names[] = {"rope_type", "type"};
  char key[SFA_KEY_BYTES];
  for (size_t i = 0; i < 2; i++) {
    snprintf(key, sizeof key, "%s%s", s->where, names[i]);
    if (sfa_config_string(weights, c, key, &s->type))
      return true;
  }
  return false;
}

/* Settings of one kind of layer. */
static rope_settings read_settings(const sfa_weights *weights, const sfa_model_config *c, sfa_layer_kind kind) {
  bool local = kind == SFA_LAYER_LOCAL && c->family->default_local_base > 0;
  rope_settings s = {.where = "", .type = "default", .factor = 1};
  s.base = local ? c->family->default_local_base : c->family->default_rope_base;
  if (c->is_gguf) {
    sfa_config_number(weights, c, local ? "rope.freq_base_swa" : "rope.freq_base", &s.base);
    s.where = "rope.scaling.";
    if (!local)
      setting_type(weights, c, &s);
  } else {
    const char *places[] = {local ? "rope_parameters.sliding_attention." : "rope_parameters.full_attention.", "rope_parameters."};
    for (size_t i = 0; i < 2; i++) {
      s.where = places[i];
      if (setting(weights, c, &s, "rope_theta", &s.base)) {
        setting_type(weights, c, &s);
        setting(weights, c, &s, "factor", &s.factor);
        return s;
      }
    }
    sfa_config_number(weights, c, local ? "rope_local_base_freq" : "rope_theta", &s.base);
    s.where = "rope_scaling.";
    if (!local)
      setting_type(weights, c, &s);
  }
  if (strcmp(s.type, "default") != 0)
    setting(weights, c, &s, "factor", &s.factor);
  return s;
}

/* Long waves are slowed by factor, short ones kept, those between blended (transformers, "llama3"). */
static sfa_status scale_llama3(sfa_context *ctx, const sfa_weights *weights, const sfa_model_config *c, const rope_settings *s,
                               double *frequencies) {
  double low = 0, high = 0, original = 0;
  if (!setting(weights, c, s, "low_freq_factor", &low) || !setting(weights, c, s, "high_freq_factor", &high) ||
      !setting(weights, c, s, "original_max_position_embeddings", &original) || !(low > 0 && high > low && original > 0))
    return sfa_fail(ctx, SFA_ERROR_FORMAT,
                    "%s%sof type llama3 wants low_freq_factor < high_freq_factor and original_max_position_embeddings, all above 0: the "
                    "model file is damaged",
                    c->prefix, s->where);
  for (int32_t p = 0; p < c->rope_pairs; p++) {
    double waves = original * frequencies[p] / 6.283185307179586; /* in the original context */
    double keep = waves < low ? 0 : waves > high ? 1 : (waves - low) / (high - low);
    frequencies[p] *= keep + (1 - keep) / s->factor;
  }
  return SFA_OK;
}

static sfa_status apply_divisors(sfa_context *ctx, const sfa_tensor *divisors, const sfa_model_config *c, double *frequencies) {
  if (divisors->type != SFA_TENSOR_F32 || divisors->n_elements != c->rope_pairs)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s has %lld elements of %s, expected %d of F32: the model file is damaged", divisors->name,
                    (long long)divisors->n_elements, sfa_tensor_type_name(divisors->type), c->rope_pairs);
  for (int32_t p = 0; p < c->rope_pairs; p++) {
    float divisor;
    memcpy(&divisor, (const uint8_t *)divisors->data + (size_t)p * sizeof divisor, sizeof divisor);
    frequencies[p] /= (double)divisor;
  }
  return SFA_OK;
}

static sfa_status fill_frequencies(sfa_context *ctx, const sfa_weights *weights, const sfa_model_config *c, sfa_layer_kind kind,
                                   double *frequencies) {
  rope_settings s = read_settings(weights, c, kind);
  if (!(s.base > 0 && s.factor > 0))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "rope base %g and factor %g must be above 0: the model file is damaged", s.base, s.factor);
  for (int32_t p = 0; p < c->rope_pairs; p++)
    frequencies[p] = pow(s.base, -(double)p / c->rope_pairs);
  const sfa_tensor *divisors = c->is_gguf && kind == SFA_LAYER_GLOBAL ? sfa_weights_find(weights, "rope_freqs.weight") : NULL;
  if (divisors)
    return apply_divisors(ctx, divisors, c, frequencies);
  if (strcmp(s.type, "llama3") == 0)
    return scale_llama3(ctx, weights, c, &s, frequencies);
  if (strcmp(s.type, "linear") == 0) {
    for (int32_t p = 0; p < c->rope_pairs; p++)
      frequencies[p] /= s.factor;
    return SFA_OK;
  }
  if (strcmp(s.type, "default") != 0 && strcmp(s.type, "none") != 0)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "rope scaling of type \"%.40s\" is not handled; default, linear and llama3 are", s.type);
  return SFA_OK;
}

sfa_status sfa_model_rope_read(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c) {
  if (c->family->default_rope_base <= 0)
    return SFA_OK;
  double rotated = c->head_dim, partial = 1;
  if (c->is_gguf)
    sfa_config_number(weights, c, "rope.dimension_count", &rotated);
  else if (sfa_config_number(weights, c, "partial_rotary_factor", &partial) ||
           sfa_config_number(weights, c, "rope_parameters.partial_rotary_factor", &partial))
    rotated = floor(c->head_dim * partial);
  if (!(rotated >= 2 && rotated <= c->head_dim) || fmod(rotated, 2) != 0)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%g of %d features of a head are rotated; it must be an even number of them", rotated,
                    c->head_dim);
  c->rope_pairs = (int32_t)rotated / 2;
  c->rope_interleaved = c->is_gguf && c->family->gguf_interleaved;
  sfa_config_bool(weights, c, "rope_interleaved", &c->rope_interleaved);
  for (int kind = 0; kind < SFA_LAYER_KINDS; kind++) {
    SFA_TRY(sfa_alloc_zero(ctx, (size_t)c->rope_pairs, sizeof(double), "rotation frequencies", (void **)&c->rope_frequencies[kind]));
    SFA_TRY(fill_frequencies(ctx, weights, c, (sfa_layer_kind)kind, c->rope_frequencies[kind]));
  }
  return SFA_OK;
}
