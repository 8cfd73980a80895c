/* Conversations as text, against what Jinja makes of the families' templates (tests/golden/tokenizer/chat.jsonl). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "text_files.h"
#include "weights_files.h"

#define GOLDEN SFA_TEST_DATA "/golden/tokenizer/"

static sfa_context *ctx;

static int group_setup(void **state) {
  size_t bytes;
  temp_begin(state);
  char *text = read_whole(GOLDEN "pieces-llama/tokenizer.json", &bytes);
  write_whole(in_temp("tokenizer.json"), text, bytes);
  free(text);
  return sfa_context_create(NULL, &ctx) == SFA_OK ? 0 : 1;
}

static int group_teardown(void **state) {
  sfa_context_destroy(ctx);
  return temp_end(state);
}

/* A tokenizer with <s> and </s>, and this template. */
static sfa_tokenizer *with_template(const char *chat_template) {
  cJSON *config = cJSON_CreateObject();
  cJSON_AddStringToObject(config, "bos_token", "<s>");
  cJSON_AddStringToObject(config, "eos_token", "</s>");
  if (chat_template)
    cJSON_AddStringToObject(config, "chat_template", chat_template);
  char *text = cJSON_PrintUnformatted(config), path[512];
  snprintf(path, sizeof path, "%s/tokenizer_config.json", temp_dir);
  write_whole(path, text, strlen(text));
  free(text);
  cJSON_Delete(config);
  sfa_tokenizer *t;
  if (sfa_tokenizer_open(ctx, temp_dir, &t) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  return t;
}

static int32_t read_messages(const cJSON *line, sfa_chat_message *messages) {
  const cJSON *list = cJSON_GetObjectItem(line, "messages");
  int32_t n = cJSON_GetArraySize(list) / 2;
  for (int32_t i = 0; i < n; i++)
    messages[i] = (sfa_chat_message){cJSON_GetArrayItem(list, 2 * i)->valuestring, cJSON_GetArrayItem(list, 2 * i + 1)->valuestring};
  return n;
}

static void check_conversation(const cJSON *line, void *user) {
  (void)user;
  sfa_tokenizer *t = with_template(text_of(line, "template"));
  sfa_chat_message messages[8];
  int32_t n = read_messages(line, messages);
  assert_true(sfa_tokenizer_has_chat(t));
  char *text;
  if (sfa_chat_format(t, messages, n, 1, &text) != SFA_OK)
    fail_msg("%s: %s", text_of(line, "family"), sfa_context_error(ctx));
  if (strcmp(text, text_of(line, "text")) != 0)
    fail_msg("%s: expected\n%s\ngot\n%s", text_of(line, "family"), text_of(line, "text"), text);
  sfa_free_text(ctx, text);
  sfa_tokenizer_close(t);
}

static void templates(void **state) {
  (void)state;
  assert_int_equal(each_line(GOLDEN "chat.jsonl", check_conversation, NULL), 63);
}

/* The start of a conversation, the model's words with the token that ends them, and the continuation are together the whole. */
static void check_continuation(const cJSON *line, void *user) {
  int *n_checked = user;
  sfa_chat_message messages[8];
  int32_t n = read_messages(line, messages);
  if (n != 3 || strcmp(messages[1].role, "assistant") != 0)
    return;
  /* What goes around the model's words: Llama 2's template has a space before them, and one before the token that ends them. */
  static const char *const around[][3] = {{"smollm2", "", "<|im_end|>"}, {"qwen2.5", "", "<|im_end|>"},  {"qwen3", "", "<|im_end|>"},
                                          {"zephyr", "", "</s>"},        {"phi3", "", "<|end|>"},        {"llama2", " ", " </s>"},
                                          {"llama3", "", "<|eot_id|>"},  {"llama3.1", "", "<|eot_id|>"}, {"gemma3", "", "<end_of_turn>"}};
  size_t k = 0;
  while (k < sizeof around / sizeof *around && strcmp(around[k][0], text_of(line, "family")) != 0)
    k++;
  assert_true(k < sizeof around / sizeof *around);
  messages[1].content = "Hello!";
  sfa_tokenizer *t = with_template(text_of(line, "template"));
  char *whole, *first, *next, joined[4096];
  assert_int_equal(sfa_chat_format(t, messages, 3, 1, &whole), SFA_OK);
  assert_int_equal(sfa_chat_format(t, messages, 1, 1, &first), SFA_OK);
  assert_int_equal(sfa_chat_format(t, messages + 2, 1, 0, &next), SFA_OK);
  snprintf(joined, sizeof joined, "%s%sHello!%s%s", first, around[k][1], around[k][2], next);
  assert_string_equal(joined, whole);
  sfa_free_text(ctx, whole);
  sfa_free_text(ctx, first);
  sfa_free_text(ctx, next);
  sfa_tokenizer_close(t);
  ++*n_checked;
}

static void continuations(void **state) {
  (void)state;
  int n_checked = 0;
  each_line(GOLDEN "chat.jsonl", check_continuation, &n_checked);
  assert_int_equal(n_checked, 9);
}

/* Of a real file: the text, encoded, has the tokens of the turns. */
static void smollm2_tokens(void **state) {
  (void)state;
  sfa_tokenizer *t;
  assert_int_equal(sfa_tokenizer_open(ctx, GOLDEN "smollm2/tokenizer.gguf", &t), SFA_OK);
  char *text;
  assert_int_equal(sfa_chat_format(t, &(sfa_chat_message){"user", "Hello"}, 1, 1, &text), SFA_OK);
  assert_string_equal(text, "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
                            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n");
  int32_t *ids, n_starts = 0, n_ends = 0;
  size_t n;
  assert_int_equal(sfa_tokenizer_encode(t, text, strlen(text), SFA_TOKENIZE_PARSE, &ids, &n), SFA_OK);
  for (size_t i = 0; i < n; i++) {
    n_starts += ids[i] == 1;
    n_ends += ids[i] == 2;
  }
  assert_int_equal(n_starts, 3);
  assert_int_equal(n_ends, 2);
  assert_int_equal(ids[0], 1);
  sfa_free_ids(ctx, ids);
  sfa_free_text(ctx, text);
  sfa_tokenizer_close(t);
}

static void refusals(void **state) {
  (void)state;
  static const sfa_chat_message user = {"user", "x"}, odd = {"tool", "x"}, empty = {"user", NULL};
  char *text;
  sfa_tokenizer *t = with_template(NULL);
  assert_false(sfa_tokenizer_has_chat(t));
  assert_int_equal(sfa_chat_format(t, &user, 1, 1, &text), SFA_ERROR_UNSUPPORTED);
  assert_null(text);
  sfa_tokenizer_close(t);
  t = with_template("{{ messages[0].content }}");
  assert_false(sfa_tokenizer_has_chat(t));
  assert_int_equal(sfa_chat_format(t, &user, 1, 1, &text), SFA_ERROR_UNSUPPORTED);
  sfa_tokenizer_close(t);
  t = with_template("<|im_start|><|im_end|>");
  assert_int_equal(sfa_chat_format(t, &odd, 1, 1, &text), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "tool"));
  assert_int_equal(sfa_chat_format(t, &empty, 1, 1, &text), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_chat_format(t, NULL, 1, 1, &text), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_chat_format(t, &user, -1, 1, &text), SFA_ERROR_ARGUMENT);
  assert_null(text);
  assert_int_equal(sfa_chat_format(t, NULL, 0, 1, &text), SFA_OK);
  assert_string_equal(text, "<|im_start|>assistant\n");
  sfa_free_text(ctx, text);
  sfa_tokenizer_close(t);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(templates), cmocka_unit_test(continuations), cmocka_unit_test(smollm2_tokens),
                                     cmocka_unit_test(refusals)};
  return cmocka_run_group_tests_name("chat", tests, group_setup, group_teardown);
}
