/* 02_generate: a language model that reads a text with sparse feature attention and goes on with it.
 *
 *     example_02_generate MODEL TEXT [K]
 *
 * MODEL is a GGUF file, a Hugging Face directory or a llama2.c .bin. K features of each query and key are kept; without K attention is
 * dense. The library prints nothing and ends nothing: all it says is in the status and in sfa_context_error. */
#include <sfa/engine.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TOKENS = 64 };

/* Draws tokens one by one: each is shown, then appended to the session, which gives the logits of the next. */
static sfa_status generate(const sfa_tokenizer *tokenizer, sfa_session *session, sfa_sampler *sampler, int32_t previous, float *logits) {
  for (int i = 0; i < MOST_TOKENS; i++) {
    int32_t token = sfa_sampler_next(sampler, logits);
    if (sfa_tokenizer_is_end(tokenizer, token))
      break;
    char piece[512];
    size_t n = sfa_tokenizer_decode(tokenizer, previous, token, 0, piece, sizeof piece);
    fwrite(piece, 1, n < sizeof piece ? n : sizeof piece, stdout);
    fflush(stdout);
    sfa_status status = sfa_session_append(session, &token, 1, logits);
    if (status != SFA_OK)
      return status;
    previous = token;
  }
  putchar('\n');
  return SFA_OK;
}

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s MODEL TEXT [K]\n", argv[0]);
    return 2;
  }
  const char *text = argv[2];
  sfa_context *ctx = NULL;
  sfa_model *model = NULL;
  sfa_session *session = NULL;
  sfa_sampler *sampler = NULL;
  int32_t *ids = NULL;
  size_t n_ids = 0;
  float *logits = NULL;

  sfa_status status = sfa_context_create(NULL, &ctx);
  if (status == SFA_OK)
    status = sfa_model_open(ctx, argv[1], NULL, &model);
  const sfa_tokenizer *tokenizer = status == SFA_OK ? sfa_model_tokenizer(model) : NULL;
  if (tokenizer) {
    sfa_model_info info;
    sfa_model_describe(model, &info);
    sfa_attention_choice attention = {.struct_size = sizeof attention, .sparse = argc > 3, .k = argc > 3 ? atoi(argv[3]) : 0};
    sfa_session_options options = {.struct_size = sizeof options, .attention = &attention};
    sfa_sampler_options greedy = {.struct_size = sizeof greedy};
    logits = malloc((size_t)info.vocab_size * sizeof *logits);
    status = logits ? sfa_session_create(model, &options, &session) : SFA_ERROR_MEMORY;
    if (status == SFA_OK)
      status = sfa_sampler_create(ctx, &greedy, info.vocab_size, &sampler);
    if (status == SFA_OK)
      status = sfa_tokenizer_encode(tokenizer, text, strlen(text), SFA_TOKENIZE_SPECIAL, &ids, &n_ids);
    if (status == SFA_OK) /* the prompt: all tokens at once, logits of the last */
      status = sfa_session_append(session, ids, (int64_t)n_ids, logits);
    if (status == SFA_OK)
      status = generate(tokenizer, session, sampler, ids[n_ids - 1], logits);
  }

  int failed = status != SFA_OK || !tokenizer;
  if (failed)
    fprintf(stderr, "failed (%s): %s\n", sfa_status_name(status), tokenizer || status ? sfa_context_error(ctx) : "no tokenizer");
  if (ids)
    sfa_free_ids(ctx, ids);
  free(logits);
  sfa_sampler_destroy(sampler);
  sfa_session_destroy(session);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
  return failed;
}
