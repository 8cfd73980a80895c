/* dump_logits MODEL auto|f32|bf16|int8 IDS OUT: the logits after each token as f32 [T][vocab], with keys and values cached in f32.
 * IDS holds little-endian int32. For the scripts in tools/ that compare with other implementations. */
#include <sfa/engine.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const sfa_context *ctx) {
  fprintf(stderr, "dump_logits: %s\n", sfa_context_error(ctx));
  return 1;
}

/* One token a step: whatever is to be seen in prefill is to be seen here, the bits are the same. */
static int dump(sfa_context *ctx, const sfa_model *model, FILE *ids, FILE *out) {
  sfa_model_info info;
  sfa_model_describe(model, &info);
  const sfa_attention_choice choice = {.struct_size = sizeof choice, .cache_k = SFA_F32, .cache_v = SFA_F32};
  const sfa_session_options options = {.struct_size = sizeof options, .attention = &choice};
  sfa_session *session;
  if (sfa_session_create(model, &options, &session) != SFA_OK)
    return fail(ctx);
  size_t vocab_size = (size_t)info.vocab_size;
  float *logits = malloc(vocab_size * sizeof *logits);
  int32_t token;
  int result = logits ? 0 : 1;
  while (result == 0 && fread(&token, sizeof token, 1, ids) == 1) {
    if (sfa_session_append(session, &token, 1, logits) != SFA_OK)
      result = fail(ctx);
    else if (fwrite(logits, sizeof *logits, vocab_size, out) != vocab_size)
      result = 1;
  }
  free(logits);
  sfa_session_destroy(session);
  return result;
}

int main(int argc, char **argv) {
  static const char *const formats[] = {"auto", "f32", "bf16", "int8"};
  sfa_model_options options = {.struct_size = sizeof options};
  int format = 0;
  while (argc == 5 && format < 4 && strcmp(argv[2], formats[format]) != 0)
    format++;
  if (argc != 5 || format == 4) {
    fprintf(stderr, "usage: dump_logits MODEL auto|f32|bf16|int8 IDS OUT\n");
    return 2;
  }
  options.weights = (sfa_weight_format)format;
  sfa_context *ctx;
  sfa_model *model;
  if (sfa_context_create(NULL, &ctx) != SFA_OK)
    return 1;
  int result = 1;
  FILE *ids = fopen(argv[3], "rb"), *out = fopen(argv[4], "wb");
  if (!ids || !out) {
    fprintf(stderr, "dump_logits: cannot open %s or %s\n", argv[3], argv[4]);
  } else if (sfa_model_open(ctx, argv[1], &options, &model) != SFA_OK) {
    fail(ctx);
  } else {
    result = dump(ctx, model, ids, out);
    sfa_model_close(model);
  }
  if (ids)
    fclose(ids);
  if (out && fclose(out) != 0)
    result = 1;
  sfa_context_destroy(ctx);
  return result;
}
