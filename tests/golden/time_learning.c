/* time_learning MODEL THREADS SEQUENCES LENGTH STEPS K: for tools/compare_training_speed.py. Trains on random tokens, once for every line
 * on standard input, and prints for each the seconds, the processor seconds and the loss of STEPS steps: forward, backward, clipping to
 * norm 1, AdamW. K > 0: every layer keeps K features of queries and keys. */
#include "model/learn.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct trained {
  float *m, *v;
} trained;

static int run(sfa_context *ctx, char **argv) {
  int32_t n_sequences = atoi(argv[3]), length = atoi(argv[4]), n_steps = atoi(argv[5]), k = atoi(argv[6]), n = n_sequences * length;
  sfa_learn_options options = {.max_tokens = n};
  sfa_weights *weights;
  sfa_learner *learner;
  if (sfa_weights_open(ctx, argv[1], &weights) != SFA_OK || sfa_learner_create(ctx, weights, &options, &learner) != SFA_OK)
    return 1;
  const sfa_training *ops = sfa_learner_training(learner);
  sfa_learner_shape shape = sfa_learner_shape_of(learner);
  int32_t *ids = malloc(((size_t)n + 1) * sizeof *ids), *cu = malloc(((size_t)n_sequences + 1) * sizeof *cu);
  int32_t n_heads = shape.n_layers * shape.n_kv_heads, *ks = malloc((size_t)n_heads * sizeof *ks);
  trained *states = malloc((size_t)sfa_learner_count(learner) * sizeof *states);
  for (int32_t i = 0; i <= n; i++)
    ids[i] = rand() % shape.vocab_size;
  for (int32_t i = 0; i <= n_sequences; i++)
    cu[i] = i * length;
  for (int32_t i = 0; i < n_heads; i++)
    ks[i] = k;
  for (int32_t i = 0; i < sfa_learner_count(learner); i++) {
    states[i].m = calloc((size_t)sfa_learner_parameter(learner, i)->n, sizeof(float));
    states[i].v = calloc((size_t)sfa_learner_parameter(learner, i)->n, sizeof(float));
  }
  const sfa_learn_sparsity sparsity = {.k_keys = ks, .k_queries = ks};
  const sfa_learn_batch batch = {.n_tokens = n,
                                 .n_sequences = n_sequences,
                                 .tokens = ids,
                                 .targets = ids + 1,
                                 .cu_seqlens = cu,
                                 .backward = true,
                                 .loss_scale = 1.0f / (float)n};
  sfa_clip clip;
  sfa_adamw how = {
      .rate = 1e-4f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f, .correction1 = 0.1f, .correction2 = 0.05f, .clip = &clip};
  double *squares = malloc((size_t)sfa_learner_count(learner) * sizeof *squares);
  char line[64];
  if (sfa_learner_sparsity(learner, &sparsity) != SFA_OK)
    return 1;
  while (fgets(line, sizeof line, stdin)) {
    sfa_learn_result result = {0};
    int64_t start = sfa_now_ns();
    clock_t cpu = clock();
    for (int32_t step = 0; step < n_steps; step++) {
      sfa_learner_clear(learner);
      if (sfa_learner_run(learner, &batch, &result) != SFA_OK)
        return 1;
      for (int32_t i = 0; i < sfa_learner_count(learner); i++)
        ops->square_sum(ctx, sfa_learner_parameter(learner, i)->n, sfa_learner_parameter(learner, i)->gradient, &squares[i]);
      ops->clip(ctx, sfa_learner_count(learner), squares, 1, &clip);
      for (int32_t i = 0; i < sfa_learner_count(learner); i++) {
        sfa_parameter *p = sfa_learner_parameter(learner, i);
        ops->adamw(ctx, &how, p->n, p->gradient, states[i].m, states[i].v, p->value);
      }
    }
    printf("%.6f %.6f %.4f\n", (double)(sfa_now_ns() - start) * 1e-9, (double)(clock() - cpu) / CLOCKS_PER_SEC,
           result.loss_sum / (double)result.n_scored);
    fflush(stdout);
  }
  return 0;
}

int main(int argc, char **argv) {
  sfa_context *ctx;
  sfa_context_options options = {.struct_size = sizeof options};
  if (argc != 7) {
    fprintf(stderr, "usage: time_learning MODEL THREADS SEQUENCES LENGTH STEPS K\n");
    return 2;
  }
  options.n_threads = atoi(argv[2]);
  if (sfa_context_create(&options, &ctx) != SFA_OK)
    return 1;
  int failed = run(ctx, argv);
  if (failed)
    fprintf(stderr, "%s\n", sfa_context_error(ctx));
  sfa_context_destroy(ctx);
  return failed;
}
