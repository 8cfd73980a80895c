/* How the heads of a model use their features, over a text: counts over all keys, and the softmax of a few queries. */
#include "engine/look.h"
#include "engine/session.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_QUERIES = 16, N_MASSES = 3, READ_LEN = 256 };
static const double masses[N_MASSES] = {0.9, 0.99, 0.999};

typedef struct inspection {
  sfa_session *session;
  sfa_look look;
  int64_t n_tokens;
  int32_t n_queries;
  int32_t *query_use;      /* [n_layers][G][D] sampled queries that keep each feature */
  int32_t *n_sampled;      /* [n_layers][G] */
  float *scores, *weights; /* [n_tokens] */
  sfa_head_report *heads;
} inspection;

/* Position of sampled query i: evenly over the second half. */
static int64_t sample_at(const inspection *in, int64_t i) {
  int64_t half = in->n_tokens / 2, rest = in->n_tokens - half;
  return half + (2 * i + 1) * rest / (2 * in->n_queries);
}

static int falling(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x < y) - (x > y);
}

/* Adds the share of keys that hold each mass; weights are sorted on the way. */
static void add_keys_for(float *weights, int64_t n, float keys_for[N_MASSES]) {
  qsort(weights, (size_t)n, sizeof *weights, falling);
  double sum = 0;
  int64_t i = 0;
  for (int level = 0; level < N_MASSES; level++) {
    while (i < n && sum < masses[level])
      sum += (double)weights[i++];
    keys_for[level] += (float)((double)i / (double)n);
  }
}

static sfa_status sample(void *user, const sfa_probe *probe) {
  inspection *in = user;
  const sfa_model_heads *h = &in->look.heads;
  int32_t group = h->n_heads / h->n_kv_heads;
  sfa_probe here = {.cache = NULL};
  for (int64_t i = 0; i < in->n_queries; i++) {
    int64_t token = sample_at(in, i) - probe->first;
    if (token < 0 || token >= probe->n_tokens)
      continue;
    if (!here.cache)
      SFA_TRY(sfa_look_bring(&in->look, in->session->forward, probe, &here));
    for (int32_t head = 0; head < h->n_heads; head++) {
      int64_t row = (int64_t)probe->layer * h->n_kv_heads + head / group;
      SFA_TRY(sfa_look_query(&in->look, &here, (int32_t)token, head));
      SFA_TRY(sfa_look_weights(&in->look, &here, (int32_t)token, head, NULL, in->scores, in->weights));
      int32_t n_kept = 0; /* zeros fill the slots that a head with a smaller k does not need */
      for (int32_t u = 0; u < in->look.code.k; u++)
        if (((const float *)in->look.code.values)[u] != 0.0f) {
          in->query_use[row * h->head_dim + sfa_look_feature(in->look.code.ids, h->head_dim, u)]++;
          n_kept++;
        }
      in->n_sampled[row]++;
      in->heads[row].k_queries = n_kept > in->heads[row].k_queries ? n_kept : in->heads[row].k_queries;
      add_keys_for(in->weights, probe->first + token + 1, in->heads[row].keys_for);
    }
  }
  return SFA_OK;
}

/* Keys of a head that keep each feature: use [D]. */
static sfa_status count_keys(const inspection *in, const sfa_cache *cache, int32_t cache_layer, int32_t kv_head, int32_t *use) {
  int32_t D = in->look.heads.head_dim, K = sfa_cache_k(cache, cache_layer);
  if (!K) {
    for (int32_t u = 0; u < D; u++)
      use[u] = (int32_t)in->n_tokens;
    return SFA_OK;
  }
  void *ids;
  float *values;
  SFA_TRY(sfa_alloc_zero(in->session->ctx, (size_t)READ_LEN * (size_t)K, 2, "ids of keys", &ids));
  sfa_status status = sfa_alloc_zero(in->session->ctx, (size_t)READ_LEN * (size_t)K, sizeof *values, "values of keys", (void **)&values);
  for (int64_t first = 0; status == SFA_OK && first < in->n_tokens; first += READ_LEN) {
    int64_t n = in->n_tokens - first < READ_LEN ? in->n_tokens - first : READ_LEN;
    status = sfa_cache_read_keys(cache, 0, cache_layer, kv_head, first, n, ids, values);
    for (int64_t i = 0; status == SFA_OK && i < n * K; i++) {
      int32_t feature = sfa_look_feature(ids, D, i);
      if (feature < D && values[i] != 0.0f) /* beyond D in a damaged file alone; zeros: see above */
        use[feature]++;
    }
  }
  sfa_free(in->session->ctx, ids);
  sfa_free(in->session->ctx, values);
  return status;
}

static void report(const inspection *in, int64_t row, const int32_t *use) {
  const sfa_model_heads *h = &in->look.heads;
  sfa_head_report *r = &in->heads[row];
  const int32_t *query_use = in->query_use + row * h->head_dim;
  double n_keys = (double)in->n_tokens, n_queries = in->n_sampled[row], sum = 0, squares = 0, overlap = 0;
  r->layer = (int32_t)(row / h->n_kv_heads);
  r->kv_head = (int32_t)(row % h->n_kv_heads);
  for (int32_t u = 0; u < h->head_dim; u++) {
    r->n_dead += use[u] == 0;
    r->hottest = use[u] > use[r->hottest] ? u : r->hottest;
    sum += use[u];
    squares += (double)use[u] * use[u];
    overlap += query_use[u] / n_queries * (use[u] / n_keys); /* the mean of a sum is the sum of the means */
  }
  r->k_keys = (int32_t)lrint(sum / n_keys);
  r->hottest_share = (float)(use[r->hottest] / n_keys);
  r->effective = (float)(sum * sum / squares);
  r->overlap = (float)overlap;
  for (int level = 0; level < N_MASSES; level++)
    r->keys_for[level] = (float)(r->keys_for[level] / n_queries);
}

static sfa_status inspect(inspection *in, const int32_t *tokens, int32_t *use) {
  const sfa_model_heads *h = &in->look.heads;
  sfa_context *ctx = in->session->ctx;
  size_t n_rows = (size_t)h->n_layers * (size_t)h->n_kv_heads, n = (size_t)in->n_tokens, D = (size_t)h->head_dim;
  int32_t *counts = NULL;
  SFA_TRY(sfa_alloc_zero(ctx, n_rows * D, sizeof(int32_t), "feature counts", (void **)&in->query_use));
  SFA_TRY(sfa_alloc_zero(ctx, n_rows, sizeof(int32_t), "query counts", (void **)&in->n_sampled));
  SFA_TRY(sfa_alloc_zero(ctx, n, sizeof(float), "the scores of a head", (void **)&in->scores));
  SFA_TRY(sfa_alloc_zero(ctx, n, sizeof(float), "the weights of a head", (void **)&in->weights));
  SFA_TRY(sfa_session_append_probed(in->session, tokens, in->n_tokens, sample, in));
  SFA_TRY(sfa_alloc_zero(ctx, D, sizeof *counts, "feature counts", (void **)&counts));
  sfa_status status = SFA_OK;
  for (size_t row = 0; status == SFA_OK && row < n_rows; row++) {
    int32_t cache_layer, layer = (int32_t)row / h->n_kv_heads;
    const sfa_cache *cache = sfa_forward_cache(in->session->forward, layer, &cache_layer);
    memset(counts, 0, D * sizeof *counts);
    status = count_keys(in, cache, cache_layer, (int32_t)row % h->n_kv_heads, counts);
    report(in, (int64_t)row, counts);
    if (use)
      memcpy(use + row * D, counts, D * sizeof *use);
  }
  sfa_free(ctx, counts);
  return status;
}

sfa_status sfa_session_inspect(sfa_session *session, const int32_t *tokens, int64_t n_tokens, int32_t n_queries, sfa_head_report *heads,
                               int32_t *use) {
  if (!session)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = session->ctx;
  SFA_REQUIRE(ctx, heads, "heads is NULL: it wants room for a report of every layer and kv head");
  SFA_REQUIRE(ctx, sfa_session_len(session) == 0, "the session holds %lld tokens: inspect reads its text into an empty one",
              (long long)sfa_session_len(session));
  SFA_REQUIRE(ctx, n_tokens >= 2, "a text of %lld tokens: at least 2 are wanted", (long long)n_tokens);
  SFA_REQUIRE(ctx, n_queries >= 0, "n_queries is %d: it must not be negative, 0 is %d", n_queries, DEFAULT_QUERIES);
  inspection in = {.session = session, .n_tokens = n_tokens, .heads = heads};
  in.n_queries = (int32_t)sfa_min64(n_queries ? n_queries : DEFAULT_QUERIES, n_tokens - n_tokens / 2);
  sfa_status status = sfa_look_open(&in.look, session->model);
  if (status == SFA_OK) {
    memset(heads, 0, (size_t)in.look.heads.n_layers * (size_t)in.look.heads.n_kv_heads * sizeof *heads);
    status = inspect(&in, tokens, use);
  }
  void *memory[] = {in.query_use, in.n_sampled, in.scores, in.weights};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
    sfa_free(ctx, memory[i]);
  return sfa_look_close(&in.look, status);
}
