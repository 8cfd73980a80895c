/* Conversations as text. Models carry their format as a Jinja template; the families' templates are few, so the template is recognised
 * and the conversation is written from a table, with no template engine. */
#include "text/tokenizer_build.h"
#include "text/utf8.h"

#include <string.h>

enum { SYSTEM, USER, ASSISTANT, N_ROLES };
static const char *const role_names[N_ROLES] = {"system", "user", "assistant"};

/* In the texts of the table, \1 stands for the BOS token and \2 for the EOS token. */
struct family {
  const char *marks[2];          /* a template that holds these is of this family */
  const char *start;             /* before everything, if the template speaks of bos_token */
  const char *open[N_ROLES];     /* before a message */
  const char *close[N_ROLES];    /* after it */
  const char *prompt;            /* opens the assistant's turn */
  const char *resume;            /* what of close[ASSISTANT] comes after the token that ends the model's turn */
  const char *system_in_user[2]; /* the system message stands inside the first user message, between these; open[SYSTEM] is NULL */
  bool trim;                     /* white space around a message goes */
  bool trim_whole;               /* with a system message inside: around both together */
};

static const struct family families[] = {
    /* SmolLM2, Qwen2, Qwen3 */
    {.marks = {"<|im_start|>", "<|im_end|>"},
     .start = "\1",
     .open = {"<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"},
     .close = {"<|im_end|>\n", "<|im_end|>\n", "<|im_end|>\n"},
     .prompt = "<|im_start|>assistant\n",
     .resume = "\n"},
    /* Llama 3 */
    {.marks = {"<|start_header_id|>", "<|eot_id|>"},
     .start = "\1",
     .open = {"<|start_header_id|>system<|end_header_id|>\n\n", "<|start_header_id|>user<|end_header_id|>\n\n",
              "<|start_header_id|>assistant<|end_header_id|>\n\n"},
     .close = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     .prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n",
     .resume = "",
     .trim = true},
    /* Gemma */
    {.marks = {"<start_of_turn>", "<end_of_turn>"},
     .start = "\1",
     .open = {NULL, "<start_of_turn>user\n", "<start_of_turn>model\n"},
     .close = {NULL, "<end_of_turn>\n", "<end_of_turn>\n"},
     .prompt = "<start_of_turn>model\n",
     .resume = "\n",
     .system_in_user = {"", "\n\n"},
     .trim = true},
    /* Llama 2 */
    {.marks = {"[INST]", "<<SYS>>"},
     .start = "",
     .open = {NULL, "\1[INST] ", " "},
     .close = {NULL, " [/INST]", " \2"},
     .prompt = "",
     .resume = "",
     .system_in_user = {"<<SYS>>\n", "\n<</SYS>>\n\n"},
     .trim = true,
     .trim_whole = true},
    /* Phi 3 */
    {.marks = {"<|user|>", "<|end|>"},
     .start = "\1",
     .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .close = {"<|end|>\n", "<|end|>\n", "<|end|>\n"},
     .prompt = "<|assistant|>\n",
     .resume = "\n"},
    /* TinyLlama, Zephyr */
    {.marks = {"<|user|>", "eos_token"},
     .start = "\1",
     .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .close = {"\2\n", "\2\n", "\2\n"},
     .prompt = "<|assistant|>\n",
     .resume = "\n"},
};

static const struct family *find_family(const char *chat_template) {
  for (size_t i = 0; chat_template && i < sizeof families / sizeof *families; i++)
    if (strstr(chat_template, families[i].marks[0]) && strstr(chat_template, families[i].marks[1]))
      return families + i;
  return NULL;
}

int sfa_tokenizer_has_chat(const sfa_tokenizer *t) { return find_family(t->chat_template) != NULL; }

/* ---- What a template says beside its family's form --------------------------------------------------------------------------------- */

/* Llama 3.1's template begins every system message with these lines; the date is the one that it has when none is passed in. */
#define LLAMA31_MARK "Cutting Knowledge Date"
static const char llama31_preamble[] = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";

/* The system message that a ChatML template writes where a conversation has none: a constant inside it. NULL if there is none. */
static const char *find_default_system(const char *chat_template, size_t *len) {
  static const char tag[] = "<|im_start|>system", end[] = "<|im_end|>";
  for (const char *at = chat_template; (at = strstr(at, tag)) != NULL;) {
    at += strlen(tag);
    const char *text = at + (*at == '\n' ? 1 : strncmp(at, "\\n", 2) == 0 ? 2 : 0); /* a newline, or its escape */
    *len = strcspn(text, "'\"{}<");                                                 /* not the constant's end, nor an expression */
    if (*len > 0 && strncmp(text + *len, end, strlen(end)) == 0)
      return text;
  }
  return NULL;
}

/* ---- Writing ----------------------------------------------------------------------------------------------------------------- */

struct writer {
  const sfa_tokenizer *t;
  const struct family *family;
  sfa_bytes out;
};

static sfa_status write_token(struct writer *w, int32_t id) {
  if (id < 0)
    return SFA_OK;
  const sfa_token *token = w->t->tokens + id;
  return sfa_bytes_append(w->t->ctx, &w->out, w->t->pieces.data + token->at, token->len);
}

/* A text of the table. */
static sfa_status write_form(struct writer *w, const char *form) {
  for (; *form; form++) {
    if (*form == '\1' || *form == '\2')
      SFA_TRY(write_token(w, *form == '\1' ? w->t->bos_id : w->t->eos_id));
    else
      SFA_TRY(sfa_bytes_append(w->t->ctx, &w->out, form, 1));
  }
  return SFA_OK;
}

static sfa_status write_content(struct writer *w, const char *text, size_t len) {
  if (w->family->trim)
    sfa_utf8_trim((const uint8_t **)&text, &len);
  return sfa_bytes_append(w->t->ctx, &w->out, text, len);
}

/* text is NULL where the conversation has no system message and the template no default one. */
static sfa_status write_system(struct writer *w, const char *text, size_t len) {
  bool preamble = strstr(w->t->chat_template, LLAMA31_MARK) != NULL;
  if (!w->family->open[SYSTEM] || (!text && !preamble))
    return SFA_OK;
  SFA_TRY(write_form(w, w->family->open[SYSTEM]));
  if (preamble)
    SFA_TRY(write_form(w, llama31_preamble));
  SFA_TRY(write_content(w, text ? text : "", len));
  return write_form(w, w->family->close[SYSTEM]);
}

/* A user message, behind the system message where the family has that inside it. */
static sfa_status write_user(struct writer *w, const char *content, const char *system) {
  if (!system)
    return write_content(w, content, strlen(content));
  size_t start = w->out.len;
  SFA_TRY(write_form(w, w->family->system_in_user[0]));
  SFA_TRY(sfa_bytes_append(w->t->ctx, &w->out, system, strlen(system)));
  SFA_TRY(write_form(w, w->family->system_in_user[1]));
  if (!w->family->trim_whole)
    return write_content(w, content, strlen(content));
  SFA_TRY(sfa_bytes_append(w->t->ctx, &w->out, content, strlen(content)));
  const uint8_t *whole = w->out.data + start; /* it starts with the form, so only its end can be white space */
  size_t len = w->out.len - start;
  sfa_utf8_trim(&whole, &len);
  w->out.len = start + len;
  return SFA_OK;
}

/* Earlier answers go without their thinking, as Qwen3's template has it. */
static const char *without_thinking(const sfa_tokenizer *t, const char *content) {
  static const char mark[] = "</think>";
  if (!strstr(t->chat_template, mark) || !strstr(content, mark))
    return content;
  for (const char *at = content; (at = strstr(at, mark)) != NULL;)
    content = at += strlen(mark);
  return content + strspn(content, "\n");
}

static sfa_status write_conversation(struct writer *w, const sfa_chat_message *messages, int32_t n_messages, int first) {
  const struct family *family = w->family;
  const char *system = NULL;
  if (!first) {
    SFA_TRY(write_form(w, family->resume));
  } else {
    if (strstr(w->t->chat_template, "bos_token"))
      SFA_TRY(write_form(w, family->start));
    if (n_messages == 0 || strcmp(messages[0].role, role_names[SYSTEM]) != 0) {
      size_t len = 0;
      const char *text = find_default_system(w->t->chat_template, &len);
      SFA_TRY(write_system(w, text, text ? len : 0));
    }
  }
  for (int32_t i = 0; i < n_messages; i++) {
    const char *content = messages[i].content;
    int role = 0;
    while (role < N_ROLES && strcmp(messages[i].role, role_names[role]) != 0)
      role++;
    SFA_REQUIRE(w->t->ctx, role < N_ROLES, "message %d has the role \"%.32s\"; system, user and assistant are known", i, messages[i].role);
    if (role == SYSTEM && !family->open[SYSTEM]) {
      system = content;
      continue;
    }
    if (role == SYSTEM) {
      SFA_TRY(write_system(w, content, strlen(content)));
      continue;
    }
    SFA_TRY(write_form(w, family->open[role]));
    if (role == USER) {
      SFA_TRY(write_user(w, content, system));
      system = NULL;
    } else {
      content = without_thinking(w->t, content);
      SFA_TRY(write_content(w, content, strlen(content)));
    }
    SFA_TRY(write_form(w, family->close[role]));
  }
  SFA_TRY(write_form(w, family->prompt));
  return sfa_bytes_append(w->t->ctx, &w->out, "", 1);
}

sfa_status sfa_chat_format(const sfa_tokenizer *t, const sfa_chat_message *messages, int32_t n_messages, int first, char **text) {
  if (!t || !text)
    return SFA_ERROR_ARGUMENT;
  *text = NULL;
  SFA_REQUIRE(t->ctx, n_messages >= 0 && (messages || n_messages == 0), "sfa_chat_format: %d messages at %p", n_messages,
              (const void *)messages);
  for (int32_t i = 0; i < n_messages; i++)
    SFA_REQUIRE(t->ctx, messages[i].role && messages[i].content, "sfa_chat_format: message %d has no role or no content", i);
  struct writer w = {.t = t, .family = find_family(t->chat_template)};
  if (!w.family)
    return sfa_fail(t->ctx, SFA_ERROR_UNSUPPORTED, "the model has %s; write the prompt by hand, without a chat format",
                    t->chat_template ? "a chat template that is not of a known family" : "no chat template");
  sfa_status status = write_conversation(&w, messages, n_messages, first);
  if (status != SFA_OK)
    sfa_free(t->ctx, w.out.data);
  else
    *text = (char *)w.out.data;
  return status;
}

void sfa_free_text(sfa_context *ctx, char *text) { sfa_free(ctx, text); }
