/* Checks of score_codes, score_dense, score_adjust and score_mask. */
#include "check.h"
#include "oracle.h"
#include <math.h>
#include <string.h>

static const int head_dims[] = {8, 24, 64, 72, 128, 256, 264, 512};
static const int widths[] = {16, 32, 48, 64, 80, 96, 112, 128};
static const int key_counts[] = {1, 2, 5, 63, SFA_KEY_TILE};
enum { N_HEAD_DIMS = 8, N_WIDTHS = 8, N_KEY_COUNTS = 5 };

/* Errors of S [n_keys][W] against products in double, beside those of plain float sums. keys [n_keys][D] dense, zeros where not kept. */
static void judge_scores(check *c, const float *S, const float *keys, const float *key_scale, const float *Qt, int n_keys, int D, int W) {
  check_errors errors = {0};
  for (int j = 0; j < n_keys; j++)
    for (int i = 0; i < W; i++) {
      double truth = 0;
      float naive = 0;
      for (int u = 0; u < D; u++) {
        truth += (double)keys[(int64_t)j * D + u] * (double)Qt[(int64_t)u * W + i];
        naive += keys[(int64_t)j * D + u] * Qt[(int64_t)u * W + i];
      }
      check_errors_add(&errors, S[(int64_t)j * W + i], key_scale ? naive * key_scale[j] : naive,
                       key_scale ? truth * (double)key_scale[j] : truth);
    }
  check_errors_judge(c, "scores", &errors, 2);
}

static void codes_case(check *c, check_kind kind, int D, int K, int W, int n_keys) {
  check_begin(c, "score_codes", "%s D %d K %d W %d n_keys %d", check_kind_name(kind), D, K, W, n_keys);
  const int id_bytes = D <= 256 ? 1 : 2;
  const int64_t n = (int64_t)n_keys * W;
  const float *x = check_rows(c, kind, (int64_t)n_keys * D),
              *Qt = check_rows(c, kind == CHECK_TIES ? CHECK_TIES : CHECK_NORMAL, (int64_t)D * W);
  void *ids = check_memory(c, (size_t)(n_keys * K * id_bytes));
  float *values = check_floats(c, (int64_t)n_keys * K), *S = check_floats(c, n), *plain = check_floats(c, n);
  const float *key_scale = check_pick(c, 2) ? check_rows(c, CHECK_NORMAL, n_keys) : NULL;
  c->plain->topk(n_keys, x, D, D, K, ids, values);
  c->kernels->score_codes(n_keys, K, ids, id_bytes, values, key_scale, Qt, W, S);
  c->plain->score_codes(n_keys, K, ids, id_bytes, values, key_scale, Qt, W, plain);
  check_bits(c, "S", S, plain, n);
  if (kind == CHECK_NORMAL || kind == CHECK_TIES) {
    float *kept = check_floats(c, (int64_t)n_keys * D);
    memset(kept, 0, (size_t)n_keys * (size_t)D * sizeof *kept);
    for (int j = 0; j < n_keys; j++) {
      int chosen[512];
      oracle_topk(x + (int64_t)j * D, D, K, chosen);
      for (int u = 0; u < K; u++)
        kept[(int64_t)j * D + chosen[u]] = x[(int64_t)j * D + chosen[u]];
    }
    judge_scores(c, S, kept, key_scale, Qt, n_keys, D, W);
  }
  if (K == D) { /* the dense twin's bits */
    c->kernels->score_dense(n_keys, D, x, D, key_scale, Qt, W, plain);
    check_bits(c, "dense twin", S, plain, n);
  }
  check_end(c);
}

static void check_score_codes(check *c) {
  for (int d = 0; d < N_HEAD_DIMS; d++)
    for (int w = 0; w < N_WIDTHS; w++)
      for (int k = 0; k < N_KEY_COUNTS; k++) {
        const int D = head_dims[d], kept[] = {1, D < 16 ? D : 16, check_range(c, 1, D), D};
        if (c->quick && (d + w + k) % 3)
          continue;
        codes_case(c, (check_kind)check_pick(c, CHECK_KINDS), D, kept[check_pick(c, 4)], widths[w], key_counts[k]);
        codes_case(c, CHECK_NORMAL, D, kept[check_pick(c, 4)], widths[w], check_range(c, 1, SFA_KEY_TILE));
      }
}

static void dense_case(check *c, check_kind kind, int D, int W, int n_keys) {
  check_begin(c, "score_dense", "%s D %d W %d n_keys %d", check_kind_name(kind), D, W, n_keys);
  const int64_t n = (int64_t)n_keys * W, stride = D + check_pick(c, 2) * 5;
  const float *keys = check_rows(c, kind, (n_keys - 1) * stride + D), *Qt = check_rows(c, CHECK_NORMAL, (int64_t)D * W);
  const float *key_scale = check_pick(c, 2) ? check_rows(c, CHECK_NORMAL, n_keys) : NULL;
  float *S = check_floats(c, n), *plain = check_floats(c, n);
  c->kernels->score_dense(n_keys, D, keys, stride, key_scale, Qt, W, S);
  c->plain->score_dense(n_keys, D, keys, stride, key_scale, Qt, W, plain);
  check_bits(c, "S", S, plain, n);
  if (kind == CHECK_NORMAL && stride == D)
    judge_scores(c, S, keys, key_scale, Qt, n_keys, D, W);
  check_end(c);
}

static void check_score_dense(check *c) {
  for (int d = 0; d < N_HEAD_DIMS; d++)
    for (int w = 0; w < N_WIDTHS; w++)
      for (int k = 0; k < N_KEY_COUNTS; k++) {
        if (c->quick && (d + w + k) % 3)
          continue;
        dense_case(c, (check_kind)check_pick(c, CHECK_KINDS), head_dims[d], widths[w], key_counts[k]);
        dense_case(c, CHECK_NORMAL, head_dims[d], widths[w], check_range(c, 1, SFA_KEY_TILE));
      }
}

static void adjust_case(check *c, check_kind kind, int W, int n_keys, int with_softcap, int with_slope) {
  check_begin(c, "score_adjust", "%s W %d n_keys %d softcap %d slope %d", check_kind_name(kind), W, n_keys, with_softcap, with_slope);
  const int64_t n = (int64_t)n_keys * W;
  const float softcap = with_softcap ? 1.0f + 50.0f * (float)sfa_rng_uniform(&c->rng) : 0.0f;
  const float *x = check_rows(c, kind, n), *slope = check_rows(c, CHECK_NORMAL, W);
  float *S = check_floats(c, n), *plain = check_floats(c, n);
  int32_t *pos = check_memory(c, (size_t)W * sizeof *pos);
  for (int i = 0; i < W; i++)
    pos[i] = check_range(c, -100, 100000);
  memcpy(S, x, (size_t)n * sizeof *x);
  memcpy(plain, x, (size_t)n * sizeof *x);
  c->kernels->score_adjust(n_keys, W, softcap, with_slope ? slope : NULL, pos, S);
  c->plain->score_adjust(n_keys, W, softcap, with_slope ? slope : NULL, pos, plain);
  check_bits(c, "S", S, plain, n);
  if (kind != CHECK_NAN && kind != CHECK_INF && kind != CHECK_DENORMAL) {
    check_errors errors = {0};
    for (int64_t at = 0; at < n; at++) {
      const int i = (int)(at % W), j = (int)(at / W);
      double truth = with_softcap ? softcap * 1.4426950408889634074 * tanh(x[at]) : x[at];
      float naive = with_softcap ? softcap * 1.44269504f * tanhf(x[at]) : x[at];
      if (with_slope) {
        truth += (double)slope[i] * (j - pos[i]);
        naive += slope[i] * (float)(j - pos[i]);
      }
      check_errors_add(&errors, S[at], naive, truth);
    }
    check_errors_judge(c, "adjusted", &errors, 2);
  }
  check_end(c);
}

/* tanh alone over its whole range: relative error in ulp of the result. */
static void tanh_case(check *c) {
  check_begin(c, "score_adjust", "tanh to 2 ulp");
  enum { n_keys = SFA_KEY_TILE, W = 128, n = n_keys * W };
  float *x = check_floats(c, n), *S = check_floats(c, n);
  for (int i = 0; i < n; i++)
    x[i] = S[i] = ldexpf(1.0f + (float)sfa_rng_uniform(&c->rng), check_range(c, -20, 5)) * (check_pick(c, 2) ? 1.0f : -1.0f);
  const float cap = 0x1.62e43p-1f; /* ln 2: the factor softcap * log2 e is 1 up to rounding */
  c->kernels->score_adjust(n_keys, W, cap, NULL, NULL, S);
  for (int i = 0; i < n; i++) {
    double truth = tanh(x[i]), ulp = ldexp(1, ilogb(truth) - 23);
    if (!(fabs(S[i] - truth) <= 3 * ulp)) /* 2, and 1 for the factor */
      check_fail(c, "tanh(%.9g) = %.9g, must be %.9g", (double)x[i], (double)S[i], truth);
  }
  check_end(c);
}

static void check_score_adjust(check *c) {
  tanh_case(c);
  for (int w = 0; w < N_WIDTHS; w++)
    for (int kind = 0; kind < CHECK_KINDS; kind++)
      for (int mode = 1; mode < 4; mode++)
        adjust_case(c, (check_kind)kind, widths[w], key_counts[check_pick(c, N_KEY_COUNTS)], mode & 1, mode >> 1);
}

static void check_score_mask(check *c) {
  for (int w = 0; w < N_WIDTHS; w++)
    for (int k = 0; k < N_KEY_COUNTS; k++)
      for (int always = -1; always < 3; always++) {
        const int W = widths[w], n_keys = key_counts[k], n_always = always == 2 ? n_keys : always;
        const int64_t n = (int64_t)n_keys * W;
        check_begin(c, "score_mask", "W %d n_keys %d n_always %d", W, n_keys, n_always);
        const float *x = check_rows(c, CHECK_NAN, n);
        float *S = check_floats(c, n), *expected = check_floats(c, n);
        int32_t *lo = check_memory(c, (size_t)W * sizeof *lo), *hi = check_memory(c, (size_t)W * sizeof *hi);
        for (int i = 0; i < W; i++) {
          lo[i] = check_pick(c, 4) ? check_range(c, -5, n_keys + 5) : INT32_MIN;
          hi[i] = check_pick(c, 4) ? check_range(c, -5, n_keys + 5) : INT32_MAX;
        }
        memcpy(S, x, (size_t)n * sizeof *x);
        for (int64_t at = 0; at < n; at++) {
          const int i = (int)(at % W), j = (int)(at / W);
          expected[at] = (lo[i] <= j || j < n_always) && j <= hi[i] ? x[at] : -INFINITY;
        }
        c->kernels->score_mask(n_keys, W, lo, hi, n_always, S);
        check_bits(c, "S", S, expected, n);
        check_end(c);
      }
}

const check_entry check_scores_entries[] = {{"score_codes", check_score_codes},
                                            {"score_dense", check_score_dense},
                                            {"score_adjust", check_score_adjust},
                                            {"score_mask", check_score_mask},
                                            {NULL, NULL}};
