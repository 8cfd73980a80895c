/* sfa tokenize: a text as the model sees it. */
#include "app.h"

#include <stdio.h>
#include <stdlib.h>

/* "   42  'text'" a line; control characters and bytes that are no text as \xNN. */
static void print_token(const app *a, int32_t previous, int32_t id) {
  char bytes[512];
  size_t n = sfa_tokenizer_decode(a->tokenizer, previous, id, 1, bytes, sizeof bytes);
  printf("%8d  \"", id);
  for (size_t i = 0; i < n && i < sizeof bytes; i++) {
    unsigned char c = (unsigned char)bytes[i];
    if (c < 0x20 || c == 0x7f)
      printf("\\x%02x", c);
    else
      putchar(c);
  }
  printf("\"\n");
}

static int tokenize(app *a, const app_options *o) {
  if (!o->model && !o->tokenizer)
    return app_usage("tokenize wants a model or a tokenizer: -m or --tokenizer");
  char *text = NULL;
  size_t n;
  int32_t *ids = NULL;
  int64_t n_ids = 0;
  int status = app_open_tokenizer(a, o);
  if (!status)
    status = app_read_text(o, &text, &n);
  /* Special tokens written in the text are read as such in either case, as Hugging Face does. */
  if (!status)
    status = app_tokenize(a, text, n, SFA_TOKENIZE_PARSE | (o->no_special ? 0u : SFA_TOKENIZE_SPECIAL), &ids, &n_ids);
  if (!status && o->json) {
    cJSON *document = cJSON_CreateObject(), *list = cJSON_AddArrayToObject(document, "ids");
    for (int64_t i = 0; i < n_ids; i++)
      cJSON_AddItemToArray(list, cJSON_CreateNumber(ids[i]));
    status = app_print_json(document);
  } else if (!status) {
    for (int64_t i = 0; i < n_ids; i++)
      print_token(a, i ? ids[i - 1] : -1, ids[i]);
    printf("%lld tokens\n", (long long)n_ids);
    status = app_flush();
  }
  free(text);
  if (ids)
    sfa_free_ids(a->ctx, ids);
  return status;
}

int cmd_tokenize(const app_options *o) {
  app a = {0};
  int status = tokenize(&a, o);
  app_close(&a);
  return status;
}
