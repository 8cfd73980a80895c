/* The members of a recipe as one table, and the schedules that they define. */
#include "train/recipe.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef enum kind { WHOLE, REAL, WORD, SWITCH } kind;

typedef struct member {
  const char *name;
  kind kind;
  size_t offset;
  double fallback, min, max;
  const char *words; /* of WORD, separated by | */
  bool is_free;      /* may change when a training goes on: it changes no weight */
} member;

#define AT(field) offsetof(sfa_recipe, field)
#define BIG 1e12

static const member members[] = {
    {"steps", WHOLE, AT(steps), 1000, 1, BIG, 0, false},
    {"sequences", WHOLE, AT(sequences), 8, 1, 1 << 20, 0, false},
    {"accumulate", WHOLE, AT(accumulate), 1, 1, 1 << 20, 0, false},
    {"sequence_len", WHOLE, AT(sequence_len), 256, 1, 1 << 24, 0, false},
    {"document_mask", SWITCH, AT(document_mask), 0, 0, 1, 0, false},
    {"seed", WHOLE, AT(seed), 1, 0, 0x1p53, 0, false},
    {"learning_rate", REAL, AT(learning_rate), 1e-3, 0, BIG, 0, false},
    {"final_learning_rate", REAL, AT(final_learning_rate), 0, 0, BIG, 0, false},
    {"warmup_steps", WHOLE, AT(warmup_steps), 100, 0, BIG, 0, false},
    {"decay", WORD, AT(decay), SFA_DECAY_COSINE, 0, 0, "cosine|linear|wsd", false},
    {"decay_part", REAL, AT(decay_part), 0.2, 0, 1, 0, false},
    {"beta1", REAL, AT(beta1), 0.9, 0, 0.99999, 0, false},
    {"beta2", REAL, AT(beta2), 0.95, 0, 0.9999999, 0, false},
    {"epsilon", REAL, AT(epsilon), 1e-8, 0, 1, 0, false},
    {"weight_decay", REAL, AT(weight_decay), 0.1, 0, 1e3, 0, false},
    {"clip_norm", REAL, AT(clip_norm), 1, 0, BIG, 0, false},
    {"k_schedule", WORD, AT(k_schedule), SFA_K_DENSE_FIRST, 0, 0, "dense_first|fixed", false},
    {"dense_until", REAL, AT(dense_until), 0.4, 0, 1, 0, false},
    {"k_final_from", REAL, AT(k_final_from), 0.7, 0, 1, 0, false},
    {"gumbel_scale", REAL, AT(gumbel_scale), 0, 0, 2, 0, false},
    {"train", WORD, AT(trained), SFA_TRAIN_ALL, 0, 0, "all|qk", false},
    {"loss_weight", REAL, AT(loss_weight), 1, 0, BIG, 0, false},
    {"head_weight", REAL, AT(head_weight), 0, 0, BIG, 0, false},
    {"teacher_weight", REAL, AT(teacher_weight), 0, 0, BIG, 0, false},
    {"temperature", REAL, AT(temperature), 1, 0.01, 100, 0, false},
    {"bf16_products", SWITCH, AT(bf16_products), 0, 0, 1, 0, false},
    {"activation_checkpointing", SWITCH, AT(checkpointing), 0, 0, 1, 0, true},
    {"log_every", WHOLE, AT(log_every), 10, 1, BIG, 0, true},
    {"validate_every", WHOLE, AT(validate_every), 200, 0, BIG, 0, true},
    {"validation_windows", WHOLE, AT(validation_windows), 64, 1, BIG, 0, true},
    {"checkpoint_every", WHOLE, AT(checkpoint_every), 500, 0, BIG, 0, true},
    {"keep_checkpoints", WHOLE, AT(keep_checkpoints), 2, 1, BIG, 0, true},
    {"weights", WORD, AT(weights), SFA_EXPORT_F32, 0, 0, "f32|bf16", true},
};
enum { N_MEMBERS = sizeof members / sizeof *members };
/* Members that hold objects; "data" is what the shards are, set by the trainer. */
static const char *const objects[] = {"model", "sparse_attention_config", "data"};
enum { N_OBJECTS = sizeof objects / sizeof *objects };

/* ---- Reading ---------------------------------------------------------------------------------------------------------------------- */

static const member *find_member(const char *name) {
  for (const member *m = members; m < members + N_MEMBERS; m++)
    if (strcmp(m->name, name) == 0)
      return m;
  return NULL;
}

static bool is_object_name(const char *name) {
  for (int i = 0; i < N_OBJECTS; i++)
    if (strcmp(objects[i], name) == 0)
      return true;
  return false;
}

/* Index of the word, or -1. */
static int find_word(const char *words, const char *text) {
  size_t len = strlen(text);
  int index = 0;
  for (const char *at = words; at; index++) {
    const char *end = strchr(at, '|');
    if ((end ? (size_t)(end - at) : strlen(at)) == len && memcmp(at, text, len) == 0)
      return index;
    at = end ? end + 1 : NULL;
  }
  return -1;
}

/* The word of that index, as a JSON string. */
static cJSON *word_json(const char *words, int index) {
  char word[32];
  for (; index; index--)
    words = strchr(words, '|') + 1;
  snprintf(word, sizeof word, "%.*s", (int)strcspn(words, "|"), words);
  return cJSON_CreateString(word);
}

static sfa_status fail_value(sfa_context *ctx, const member *m, const cJSON *value) {
  char *text = cJSON_PrintUnformatted(value), range[96];
  if (m->kind == WORD)
    snprintf(range, sizeof range, "one of %s", m->words);
  else if (m->kind == SWITCH)
    snprintf(range, sizeof range, "true or false");
  else
    snprintf(range, sizeof range, "a%s number from %.10g to %.10g", m->kind == WHOLE ? " whole" : "", m->min, m->max);
  sfa_fail(ctx, SFA_ERROR_ARGUMENT, "the recipe's \"%s\" is %.60s; it must be %s", m->name, text ? text : "something else", range);
  cJSON_free(text);
  return SFA_ERROR_ARGUMENT;
}

static sfa_status read_member(sfa_context *ctx, const member *m, const cJSON *value, sfa_recipe *recipe) {
  void *place = (char *)recipe + m->offset;
  if (m->kind == SWITCH) {
    if (!cJSON_IsBool(value))
      return fail_value(ctx, m, value);
    *(bool *)place = cJSON_IsTrue(value);
  } else if (m->kind == WORD) {
    int index = cJSON_IsString(value) ? find_word(m->words, value->valuestring) : -1;
    if (index < 0)
      return fail_value(ctx, m, value);
    *(int64_t *)place = index;
  } else {
    double x = cJSON_IsNumber(value) ? value->valuedouble : NAN;
    if (!(x >= m->min && x <= m->max) || (m->kind == WHOLE && x != floor(x)))
      return fail_value(ctx, m, value);
    if (m->kind == WHOLE)
      *(int64_t *)place = (int64_t)x;
    else
      *(double *)place = x;
  }
  return SFA_OK;
}

static cJSON *fallback_json(const member *m) {
  switch (m->kind) {
  case SWITCH: return cJSON_CreateBool(m->fallback != 0);
  case WORD: return word_json(m->words, (int)m->fallback);
  default: return cJSON_CreateNumber(m->fallback);
  }
}

sfa_status sfa_recipe_put(sfa_context *ctx, sfa_recipe *recipe, const char *name, cJSON *item) {
  cJSON_DeleteItemFromObjectCaseSensitive(recipe->json, name);
  if (item && cJSON_AddItemToObject(recipe->json, name, item))
    return SFA_OK;
  cJSON_Delete(item);
  return sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for the recipe's \"%s\"", name);
}

/* Lays the members of a text over those before. */
static sfa_status lay_over(sfa_context *ctx, const char *text, sfa_recipe *recipe) {
  cJSON *over;
  SFA_TRY(sfa_json_parse(ctx, "the recipe", text, strlen(text), &over));
  sfa_status status = SFA_OK;
  for (cJSON *item = over->child, *next; item && status == SFA_OK; item = next) {
    next = item->next;
    if (*item->string == '_') /* a remark */
      continue;
    if (!find_member(item->string) && !is_object_name(item->string))
      status = sfa_fail(ctx, SFA_ERROR_ARGUMENT, "a recipe has no member \"%.60s\"; docs/TRAINING.md lists them", item->string);
    else if (is_object_name(item->string) && !cJSON_IsObject(item) && !cJSON_IsNull(item))
      status = sfa_fail(ctx, SFA_ERROR_ARGUMENT, "the recipe's \"%s\" must be an object { } or null", item->string);
    else
      status = sfa_recipe_put(ctx, recipe, item->string, cJSON_Duplicate(item, true));
  }
  cJSON_Delete(over);
  return status;
}

static sfa_status read_members(sfa_context *ctx, sfa_recipe *recipe) {
  for (const member *m = members; m < members + N_MEMBERS; m++) {
    const cJSON *value = cJSON_GetObjectItemCaseSensitive(recipe->json, m->name);
    if (!value) {
      SFA_TRY(sfa_recipe_put(ctx, recipe, m->name, fallback_json(m)));
      value = cJSON_GetObjectItemCaseSensitive(recipe->json, m->name);
    }
    SFA_TRY(read_member(ctx, m, value, recipe));
  }
  SFA_REQUIRE(ctx, recipe->dense_until <= recipe->k_final_from,
              "the recipe's \"dense_until\" is %g, behind \"k_final_from\" %g: k falls between the two", recipe->dense_until,
              recipe->k_final_from);
  return SFA_OK;
}

sfa_status sfa_recipe_read(sfa_context *ctx, const char *const *texts, int64_t n_texts, sfa_recipe *recipe) {
  *recipe = (sfa_recipe){.json = cJSON_CreateObject()};
  sfa_status status = recipe->json ? SFA_OK : sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for a recipe");
  for (int64_t i = 0; i < n_texts && status == SFA_OK; i++)
    status = lay_over(ctx, texts[i], recipe);
  if (status == SFA_OK)
    status = read_members(ctx, recipe);
  if (status != SFA_OK)
    sfa_recipe_free(recipe);
  return status;
}

void sfa_recipe_free(sfa_recipe *recipe) {
  cJSON_Delete(recipe->json);
  recipe->json = NULL;
}

/* ---- Comparing -------------------------------------------------------------------------------------------------------------------- */

static sfa_status fail_differs(sfa_context *ctx, const char *where, const char *name, const cJSON *before, const cJSON *now) {
  char *old = cJSON_PrintUnformatted(before), *new = cJSON_PrintUnformatted(now);
  sfa_fail(
      ctx, SFA_ERROR_ARGUMENT,
      "%s was made with \"%s\" %.100s, now it is %.100s: a training goes on with the recipe that it began with; to train with another, "
      "name another folder",
      where, name, old ? old : "absent", new ? new : "absent");
  cJSON_free(old);
  cJSON_free(new);
  return SFA_ERROR_ARGUMENT;
}

static sfa_status match_member(sfa_context *ctx, const cJSON *now, const cJSON *before, const char *name, const char *where) {
  const cJSON *a = cJSON_GetObjectItemCaseSensitive(now, name), *b = cJSON_GetObjectItemCaseSensitive(before, name);
  return (!a && !b) || (a && b && cJSON_Compare(a, b, true)) ? SFA_OK : fail_differs(ctx, where, name, b, a);
}

sfa_status sfa_recipe_match(sfa_context *ctx, const sfa_recipe *now, const cJSON *before, const char *where) {
  cJSON *whole = cJSON_Duplicate(before, true);
  for (const member *m = members; m < members + N_MEMBERS && whole; m++) /* one older than a member was made as by its default */
    if (!cJSON_GetObjectItemCaseSensitive(whole, m->name))
      cJSON_AddItemToObject(whole, m->name, fallback_json(m));
  cJSON *a = sfa_json_exact(now->json), *b = whole ? sfa_json_exact(whole) : NULL;
  sfa_status status = a && b ? SFA_OK : sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for comparing recipes");
  for (int i = 0; i < N_OBJECTS && status == SFA_OK; i++)
    status = match_member(ctx, a, b, objects[i], where);
  for (const member *m = members; m < members + N_MEMBERS && status == SFA_OK; m++)
    if (!m->is_free)
      status = match_member(ctx, a, b, m->name, where);
  cJSON_Delete(whole);
  cJSON_Delete(a);
  cJSON_Delete(b);
  return status;
}

/* ---- Sparsity --------------------------------------------------------------------------------------------------------------------- */

typedef struct grid {
  sfa_context *ctx;
  int32_t n_layers, n_heads, head_dim;
} grid;

/* One number; head_dim and 0 both keep all. */
static sfa_status read_k(const grid *g, const char *name, const cJSON *item, int32_t *k) {
  double x = cJSON_IsNumber(item) ? item->valuedouble : NAN;
  if (!(x >= 0 && x <= g->head_dim) || x != floor(x))
    return sfa_fail(
        g->ctx, SFA_ERROR_ARGUMENT,
        "sparse_attention_config's \"%s\" holds what is no whole number from 0 to the head_dim %d; it takes one number, a list of "
        "one for each of the %d layers, or of lists of one for each of their %d kv heads",
        name, g->head_dim, g->n_layers, g->n_heads);
  *k = (int32_t)x == g->head_dim ? 0 : (int32_t)x;
  return SFA_OK;
}

/* n entries of a list, or one for all of them. */
static const cJSON *entry(const cJSON *item, int32_t index) { return cJSON_IsArray(item) ? cJSON_GetArrayItem(item, index) : item; }

static sfa_status check_len(const grid *g, const char *name, const cJSON *item, int32_t n, const char *what) {
  if (cJSON_IsArray(item) && cJSON_GetArraySize(item) != n)
    return sfa_fail(g->ctx, SFA_ERROR_ARGUMENT, "sparse_attention_config's \"%s\" lists %d %s but the model has %d", name,
                    cJSON_GetArraySize(item), what, n);
  return SFA_OK;
}

/* out [n_layers][n_heads] */
static sfa_status read_ks(const grid *g, const char *name, const cJSON *item, int32_t *out) {
  SFA_TRY(check_len(g, name, item, g->n_layers, "layers"));
  for (int32_t layer = 0; layer < g->n_layers; layer++) {
    const cJSON *heads = entry(item, layer);
    SFA_TRY(check_len(g, name, heads, g->n_heads, "kv heads"));
    for (int32_t head = 0; head < g->n_heads; head++)
      SFA_TRY(read_k(g, name, entry(heads, head), &out[layer * g->n_heads + head]));
  }
  return SFA_OK;
}

/* Layers that "layers" leaves out become dense. */
static sfa_status keep_layers(const grid *g, const cJSON *layers, sfa_recipe_sparsity *s) {
  if (!layers || (cJSON_IsString(layers) && strcmp(layers->valuestring, "all") == 0))
    return SFA_OK;
  const cJSON *item;
  bool is_list = cJSON_IsArray(layers) != 0;
  cJSON_ArrayForEach(item, layers) is_list &= cJSON_IsNumber(item) && item->valuedouble >= 0 && item->valuedouble < g->n_layers;
  if (!is_list)
    return sfa_fail(g->ctx, SFA_ERROR_ARGUMENT, "sparse_attention_config's \"layers\" must be \"all\" or list layers from 0 to %d",
                    g->n_layers - 1);
  for (int32_t layer = 0; layer < g->n_layers; layer++) {
    bool listed = false;
    cJSON_ArrayForEach(item, layers) listed |= item->valuedouble == layer;
    for (int32_t head = 0; head < g->n_heads && !listed; head++)
      s->k_keys[layer * g->n_heads + head] = s->k_queries[layer * g->n_heads + head] = 0;
  }
  return SFA_OK;
}

static sfa_status read_sparsity(const grid *g, const cJSON *config, sfa_recipe_sparsity *s) {
  const size_t n = (size_t)g->n_layers * (size_t)g->n_heads;
  const cJSON *k = cJSON_GetObjectItemCaseSensitive(config, "k"), *k_q = cJSON_GetObjectItemCaseSensitive(config, "k_q");
  const cJSON *order = cJSON_GetObjectItemCaseSensitive(config, "order");
  SFA_REQUIRE(g->ctx, k, "sparse_attention_config says no \"k\", the features kept of a key");
  SFA_TRY(sfa_alloc_zero(g->ctx, n, sizeof *s->k_keys, "kept features of keys", (void **)&s->k_keys));
  SFA_TRY(sfa_alloc_zero(g->ctx, n, sizeof *s->k_queries, "kept features of queries", (void **)&s->k_queries));
  SFA_TRY(read_ks(g, "k", k, s->k_keys));
  SFA_TRY(read_ks(g, k_q ? "k_q" : "k", k_q ? k_q : k, s->k_queries));
  s->pre_rope = cJSON_IsString(order) && strcmp(order->valuestring, "pre_rope") == 0;
  if (order && !s->pre_rope && !(cJSON_IsString(order) && strcmp(order->valuestring, "post_rope") == 0))
    return sfa_fail(g->ctx, SFA_ERROR_ARGUMENT, "sparse_attention_config's \"order\" must be \"post_rope\" or \"pre_rope\"");
  s->two_of_four = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(config, "two_of_four"));
  for (size_t i = 0; i < n; i++) /* dense keys go with dense queries */
    s->k_queries[i] = s->k_keys[i] ? s->k_queries[i] : 0;
  return keep_layers(g, cJSON_GetObjectItemCaseSensitive(config, "layers"), s);
}

sfa_status sfa_recipe_sparsity_read(sfa_context *ctx, const sfa_recipe *recipe, int32_t n_layers, int32_t n_kv_heads, int32_t head_dim,
                                    sfa_recipe_sparsity *sparsity) {
  const cJSON *config = cJSON_GetObjectItemCaseSensitive(recipe->json, "sparse_attention_config");
  const grid g = {ctx, n_layers, n_kv_heads, head_dim};
  *sparsity = (sfa_recipe_sparsity){0};
  if (!cJSON_IsObject(config))
    return SFA_OK;
  sfa_status status = read_sparsity(&g, config, sparsity);
  if (status != SFA_OK)
    sfa_recipe_sparsity_free(ctx, sparsity);
  return status;
}

void sfa_recipe_sparsity_free(sfa_context *ctx, sfa_recipe_sparsity *sparsity) {
  sfa_free(ctx, sparsity->k_keys);
  sfa_free(ctx, sparsity->k_queries);
  *sparsity = (sfa_recipe_sparsity){0};
}

/* ---- Schedules -------------------------------------------------------------------------------------------------------------------- */

double sfa_recipe_rate(const sfa_recipe *r, int64_t step) {
  if (step < r->warmup_steps)
    return r->learning_rate * (double)(step + 1) / (double)r->warmup_steps;
  const double first =
      r->decay == SFA_DECAY_WSD ? fmax((double)r->warmup_steps, (1 - r->decay_part) * (double)r->steps) : (double)r->warmup_steps;
  const double length = (double)r->steps - first;
  const double x = length > 0 ? fmin(1, fmax(0, ((double)step - first) / length)) : 0;
  const double fallen = r->decay == SFA_DECAY_COSINE ? 0.5 - 0.5 * cos(M_PI * x) : x;
  return r->learning_rate + (r->final_learning_rate - r->learning_rate) * fallen;
}

int32_t sfa_recipe_k(const sfa_recipe *r, int64_t step, int32_t k, int32_t head_dim) {
  const double done = (double)step / (double)r->steps;
  if (k == 0 || r->k_schedule == SFA_K_FIXED || done >= r->k_final_from)
    return k;
  if (done < r->dense_until)
    return 0;
  const double x = (done - r->dense_until) / (r->k_final_from - r->dense_until);
  const int32_t now = (int32_t)lround(head_dim * pow((double)k / head_dim, x));
  return now >= head_dim ? 0 : now > k ? now : k;
}
