/* The settings that `sfa eval --compare` names. */
#include "eval_settings.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of a name behind an @. */
static bool read_policy(const char *name, sfa_policy *policy) {
  for (int p = SFA_POLICY_AUTO; p <= SFA_POLICY_SP_INT8; p++)
    if (strcmp(name, sfa_policy_name((sfa_policy)p)) == 0) {
      *policy = (sfa_policy)p;
      return true;
    }
  return false;
}

/* "dense", "K", "K/KQ" or "K/all", in the list's words; c->policy is read already. */
static bool read_features(const char *word, eval_setting *setting) {
  char *end;
  sfa_attention_choice *c = &setting->choice;
  c->sparse = strcmp(word, "dense") != 0;
  if (!c->sparse) {
    c->k = c->k_q = 0;
    c->cache_k = SFA_DTYPE_DEFAULT; /* what --cache-k says is meant for codes */
    snprintf(setting->name, sizeof setting->name, "dense");
    return true;
  }
  long k = strtol(word, &end, 10), k_q = 0;
  if (end == word || k < 1 || k > 65536)
    return false;
  if (*end == '/') {
    const char *second = end + 1;
    k_q = strcmp(second, "all") == 0 ? -1 : strtol(second, &end, 10);
    if (k_q != -1 && (end == second || *end || k_q < 1 || k_q > 65536))
      return false;
  } else if (*end)
    return false;
  c->k = (int32_t)k;
  c->k_q = (int32_t)k_q;
  int used = snprintf(setting->name, sizeof setting->name, k_q == -1 ? "K-only k=%ld" : "SFA k=%ld", k);
  if (k_q > 0)
    snprintf(setting->name + used, sizeof setting->name - (size_t)used, ", k_q=%ld", k_q);
  return true;
}

/* Those, with "@POLICY" or without: then as --policy says, which is meant for codes. */
static bool read_setting(const char *text, size_t n, eval_setting *setting) {
  char word[32];
  if (n == 0 || n >= sizeof word)
    return false;
  memcpy(word, text, n);
  word[n] = '\0';
  sfa_policy *policy = &setting->choice.policy;
  char *at = strchr(word, '@');
  if (at) {
    *at = '\0';
    if (!read_policy(at + 1, policy))
      return false;
  } else if (strcmp(word, "dense") == 0)
    *policy = SFA_POLICY_AUTO;
  if (!read_features(word, setting))
    return false;
  const size_t used = strlen(setting->name);
  if (*policy)
    snprintf(setting->name + used, sizeof setting->name - used, ", %s", sfa_policy_name(*policy));
  return true;
}

int eval_settings_read(const app *a, eval_settings *s) {
  const char *list = a->o->compare;
  *s = (eval_settings){0};
  if (!list) {
    s->n = 1;
    s->all[0].choice = a->choice;
    app_attention_name(a, s->all[0].name, sizeof s->all[0].name);
  }
  for (const char *at = list; at;) {
    const char *comma = strchr(at, ',');
    if (s->n == EVAL_MOST_SETTINGS)
      return app_usage("--compare takes at most %d settings", EVAL_MOST_SETTINGS);
    eval_setting *setting = &s->all[s->n++];
    setting->choice = a->choice;
    if (!read_setting(at, comma ? (size_t)(comma - at) : strlen(at), setting))
      return app_usage(
          "--compare cannot be \"%s\"; it takes a list of dense, K, K/KQ and K/all, as in dense,16,16/all, each with @POLICY or without",
          list);
    at = comma ? comma + 1 : NULL;
  }
  for (int i = 0; i < s->n; i++)
    if (sfa_model_kv_bytes(a->model, &s->all[i].choice, &s->all[i].token_bytes) != SFA_OK)
      return app_usage("%s", sfa_context_error(a->ctx));
  return EXIT_OK;
}

void eval_settings_free(const app *a, eval_settings *s) {
  for (int i = 0; i < s->n; i++) {
    for (int64_t r = 0; r < s->all[i].n_done; r++)
      sfa_free_text(a->ctx, s->all[i].results[r].text);
    free(s->all[i].results);
    free(s->all[i].position_nll);
    free(s->all[i].position_n);
  }
}

int eval_open_session(app *a, const eval_setting *setting, int64_t context_len, sfa_progress_fn fn, void *user) {
  sfa_session_destroy(a->session);
  a->session = NULL;
  sfa_session_options options = {.struct_size = sizeof options,
                                 .attention = &setting->choice,
                                 .context_len = context_len,
                                 .chunk_len = (int32_t)a->o->chunk,
                                 .progress = fn,
                                 .progress_user = user};
  return sfa_session_create(a->model, &options, &a->session) == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
}
