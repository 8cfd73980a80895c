/* The tensors of a model file by role: their names, their shapes. */
#include "model/model_parts.h"

#include <stdio.h>
#include <string.h>

const char *sfa_role_name(const sfa_tensor_names *names, bool gguf, sfa_role role, int32_t layer, const char *suffix,
                          char out[SFA_NAME_BYTES]) {
  const char *name = gguf ? sfa_gguf_tensors[role] : names->config->family->tensors[role];
  const char *star = strchr(name, '*');
  if (star)
    snprintf(out, SFA_NAME_BYTES, "%s%.*s%d%s%s", names->prefix, (int)(star - name), name, layer, star + 1, suffix);
  else
    snprintf(out, SFA_NAME_BYTES, "%s%s%s", names->prefix, name, suffix);
  return out;
}

const sfa_tensor *sfa_role_find(const sfa_tensor_names *names, sfa_role role, int32_t layer, const char *suffix) {
  char name[SFA_NAME_BYTES];
  if (!names->config->family->tensors[role])
    return NULL;
  return sfa_weights_find(names->weights, sfa_role_name(names, names->config->is_gguf, role, layer, suffix, name));
}

sfa_status sfa_role_require(const sfa_tensor_names *names, sfa_role role, int32_t layer, const char *suffix, const sfa_tensor **out) {
  char name[SFA_NAME_BYTES];
  *out = sfa_role_find(names, role, layer, suffix);
  if (!*out)
    return sfa_fail(names->ctx, SFA_ERROR_FORMAT, "the model file has no tensor %s, which %s models need: download it again",
                    sfa_role_name(names, names->config->is_gguf, role, layer, suffix, name), names->config->family->name);
  return SFA_OK;
}

/* Found without the prefix of the other tensors, or not there: then it is the embedding. */
const sfa_tensor *sfa_role_find_head(const sfa_tensor_names *names) {
  static const char *const prefixes[] = {"", "language_model."};
  const sfa_tensor *t = NULL;
  for (size_t i = 0; !t && i < sizeof prefixes / sizeof *prefixes; i++) {
    sfa_tensor_names bare = *names;
    bare.prefix = prefixes[i];
    t = sfa_role_find(&bare, SFA_ROLE_HEAD, 0, ".weight");
  }
  return t;
}

/* The prefix under which the embedding is found; the usual one if it is not. */
sfa_tensor_names sfa_tensor_names_of(sfa_context *ctx, const sfa_weights *weights, const sfa_model_config *config) {
  sfa_tensor_names names = {ctx, weights, config, ""};
  const char *const *prefixes = config->family->tensor_prefixes;
  if (config->is_gguf)
    return names;
  for (size_t i = 0; i < sizeof config->family->tensor_prefixes / sizeof(char *) && prefixes[i]; i++) {
    names.prefix = prefixes[i];
    if (sfa_role_find(&names, SFA_ROLE_EMBEDDING, 0, ".weight"))
      return names;
  }
  names.prefix = prefixes[0];
  return names;
}

sfa_status sfa_tensor_check_shape(sfa_context *ctx, const sfa_tensor *t, int64_t rows, int64_t n) {
  bool fits = rows ? t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == n : t->n_elements == n;
  if (fits)
    return SFA_OK;
  char found[96] = "", expected[48];
  size_t used = 0;
  for (int32_t d = 0; d < t->n_dims && used < sizeof found; d++)
    used += (size_t)snprintf(found + used, sizeof found - used, "%s%lld", d ? " x " : "", (long long)t->shape[d]);
  if (rows)
    snprintf(expected, sizeof expected, "%lld x %lld", (long long)rows, (long long)n);
  else
    snprintf(expected, sizeof expected, "%lld", (long long)n);
  return sfa_fail(ctx, SFA_ERROR_FORMAT, "tensor %s has shape %s, expected %s: the file's tensors do not fit its metadata", t->name, found,
                  expected);
}

bool sfa_role_is_norm(sfa_role role) {
  switch (role) {
  case SFA_ROLE_FINAL_NORM:
  case SFA_ROLE_ATTENTION_NORM:
  case SFA_ROLE_Q_NORM:
  case SFA_ROLE_K_NORM:
  case SFA_ROLE_POST_ATTENTION_NORM:
  case SFA_ROLE_FFN_NORM:
  case SFA_ROLE_POST_FFN_NORM: return true;
  default: return false;
  }
}

sfa_role_shape sfa_role_shape_of(const sfa_model_config *c, sfa_role role) {
  int64_t hidden = c->hidden_dim, q = (int64_t)c->n_heads * c->head_dim, k = (int64_t)c->n_kv_heads * c->head_dim;
  int64_t v = (int64_t)c->n_kv_heads * c->head_dim_v, attended = (int64_t)c->n_heads * c->head_dim_v;
  switch (role) {
  case SFA_ROLE_EMBEDDING:
  case SFA_ROLE_HEAD: return (sfa_role_shape){c->vocab_size, hidden};
  case SFA_ROLE_POSITIONS: return (sfa_role_shape){c->context_len, hidden};
  case SFA_ROLE_Q: return (sfa_role_shape){q, hidden};
  case SFA_ROLE_K: return (sfa_role_shape){k, hidden};
  case SFA_ROLE_V: return (sfa_role_shape){v, hidden};
  case SFA_ROLE_QKV: return (sfa_role_shape){q + k + v, hidden};
  case SFA_ROLE_O: return (sfa_role_shape){hidden, attended};
  case SFA_ROLE_GATE:
  case SFA_ROLE_UP: return (sfa_role_shape){c->ffn_dim, hidden};
  case SFA_ROLE_DOWN: return (sfa_role_shape){hidden, c->ffn_dim};
  case SFA_ROLE_Q_NORM:
  case SFA_ROLE_K_NORM: return (sfa_role_shape){c->head_dim, 1};
  default: return (sfa_role_shape){hidden, 1};
  }
}
