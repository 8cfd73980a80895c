/* The tasks as data: how a row of each becomes an item, what is measured. Prompts are those of lm-evaluation-harness' task files of the
 * same names; scitldr, kv, listops and niah are not among those, docs/EVALUATION.md defines them. */
#include "eval/eval_task.h"

#include <string.h>

#include "text/utf8.h"

void sfa_eval_item_clear(eval_item *item) {
  sfa_bytes text = item->text;
  sfa_ids ids = item->ids;
  text.len = ids.len = 0;
  *item = (eval_item){.text = text, .ids = ids};
}

void sfa_eval_item_free(sfa_context *ctx, eval_item *item) {
  sfa_free(ctx, item->text.data);
  sfa_free(ctx, item->ids.data);
  *item = (eval_item){0};
}

/* ---- Building texts: add_bytes as often as wanted, then add_end ------------------------------------------------------------------- */

static sfa_status add_bytes(const eval_row *row, eval_item *item, const char *text, size_t n) {
  return sfa_bytes_append(row->ctx, &item->text, text, n);
}

static sfa_status add_end(const eval_row *row, eval_item *item) { return add_bytes(row, item, "", 1); }

/* A whole text of three parts; *place is where it begins. */
static sfa_status add_text(const eval_row *row, eval_item *item, const char *before, const char *text, const char *after, size_t *place) {
  *place = item->text.len;
  SFA_TRY(add_bytes(row, item, before, strlen(before)));
  SFA_TRY(add_bytes(row, item, text, strlen(text)));
  SFA_TRY(add_bytes(row, item, after, strlen(after)));
  return add_end(row, item);
}

static int32_t count_chars(const char *text) {
  int32_t n = 0;
  for (; *text; text++)
    n += ((uint8_t)*text & 0xc0) != 0x80;
  return n;
}

/* A choice, behind the space that the harness puts before it. */
static sfa_status add_choice(const eval_row *row, eval_item *item, const char *choice) {
  item->n_chars[item->n_answers] = count_chars(choice);
  return add_text(row, item, " ", choice, "", &item->answers[item->n_answers++]);
}

static sfa_status add_choices(const eval_row *row, eval_item *item, const char *const *choices, int32_t n) {
  for (int32_t i = 0; i < n; i++)
    SFA_TRY(add_choice(row, item, choices[i]));
  return SFA_OK;
}

/* ---- HellaSwag ------------------------------------------------------------------------------------------------------------------- */

/* Replaces every `from` in place; `to` is not longer. */
static void replace_all(char *text, const char *from, const char *to) {
  size_t n_from = strlen(from), n_to = strlen(to);
  char *out = text;
  while (*text) {
    bool found = strncmp(text, from, n_from) == 0;
    memmove(out, found ? to : text, found ? n_to : 1);
    out += found ? n_to : 1;
    text += found ? n_from : 1;
  }
  *out = '\0';
}

/* "[...]" of one line goes: marks of the WikiHow part. */
static void remove_brackets(char *text) {
  char *out = text;
  while (*text) {
    const char *stop = *text == '[' ? text + strcspn(text, "]\n") : text;
    if (*stop == ']')
      text += stop + 1 - text;
    else
      *out++ = *text++;
  }
  *out = '\0';
}

/* The harness' preprocess() on the text from `place` to the end. */
static void clean(eval_item *item, size_t place) {
  char *text = (char *)item->text.data + place;
  const uint8_t *inner = (const uint8_t *)text;
  size_t n = strlen(text);
  sfa_utf8_trim(&inner, &n);
  memmove(text, inner, n);
  text[n] = '\0';
  replace_all(text, " [title]", ". ");
  remove_brackets(text);
  replace_all(text, "  ", " ");
  item->text.len = place + strlen(text) + 1;
}

static sfa_status make_hellaswag(const eval_row *row, eval_item *item) {
  const char *context, *activity, *a, *b, *endings[SFA_EVAL_MAX_CHOICES];
  int32_t n;
  SFA_TRY(sfa_eval_row_texts(row, "endings", SFA_EVAL_MAX_CHOICES, endings, &n));
  SFA_TRY(sfa_eval_row_index(row, "label", 0, n, &item->gold));
  if (!sfa_eval_row_find(row, "ctx_a")) { /* cleaned already */
    SFA_TRY(sfa_eval_row_text(row, "ctx", &context));
    SFA_TRY(add_text(row, item, "", context, "", &item->contexts[0]));
    return add_choices(row, item, endings, n);
  }
  SFA_TRY(sfa_eval_row_text(row, "activity_label", &activity));
  SFA_TRY(sfa_eval_row_text(row, "ctx_a", &a));
  SFA_TRY(sfa_eval_row_text(row, "ctx_b", &b));
  SFA_TRY(add_text(row, item, activity, ": ", a, &item->contexts[0]));
  item->text.data[item->text.len - 1] = ' ';
  SFA_TRY(sfa_utf8_capitalize(row->ctx, (const uint8_t *)b, strlen(b), &item->text));
  SFA_TRY(add_end(row, item));
  clean(item, item->contexts[0]);
  for (int32_t i = 0; i < n; i++) {
    SFA_TRY(add_choice(row, item, endings[i]));
    clean(item, item->answers[i] + 1);
    item->n_chars[i] = count_chars(sfa_eval_item_text(item, item->answers[i] + 1));
  }
  return SFA_OK;
}

/* ---- Questions with choices ------------------------------------------------------------------------------------------------------ */

static sfa_status make_piqa(const eval_row *row, eval_item *item) {
  const char *goal, *solutions[2];
  SFA_TRY(sfa_eval_row_text(row, "goal", &goal));
  SFA_TRY(sfa_eval_row_text(row, "sol1", &solutions[0]));
  SFA_TRY(sfa_eval_row_text(row, "sol2", &solutions[1]));
  SFA_TRY(sfa_eval_row_index(row, "label", 0, 2, &item->gold));
  SFA_TRY(add_text(row, item, "Question: ", goal, "\nAnswer:", &item->contexts[0]));
  return add_choices(row, item, solutions, 2);
}

typedef struct question {
  const char *stem;
  const char *choices[SFA_EVAL_MAX_CHOICES], *labels[SFA_EVAL_MAX_CHOICES]; /* labels may be NULL */
  int32_t n, gold;
} question;

static const char *text_of(const cJSON *member) { return cJSON_IsString(member) ? member->valuestring : NULL; }

/* Choices as ["text"], as [{"text", "label"}] or as {"text": [], "label": []}. */
static bool read_choices(const cJSON *choices, question *q) {
  const cJSON *texts = cJSON_IsObject(choices) ? cJSON_GetObjectItemCaseSensitive(choices, "text") : choices, *element;
  const cJSON *labels = cJSON_IsObject(choices) ? cJSON_GetObjectItemCaseSensitive(choices, "label") : NULL;
  if (!cJSON_IsArray(texts) || cJSON_GetArraySize(texts) > SFA_EVAL_MAX_CHOICES)
    return false;
  cJSON_ArrayForEach(element, texts) {
    bool named = cJSON_IsObject(element);
    q->choices[q->n] = text_of(named ? cJSON_GetObjectItemCaseSensitive(element, "text") : element);
    q->labels[q->n] = text_of(named ? cJSON_GetObjectItemCaseSensitive(element, "label") : cJSON_GetArrayItem(labels, q->n));
    if (!q->choices[q->n++])
      return false;
  }
  return q->n > 0;
}

static sfa_status read_question(const eval_row *row, question *q) {
  *q = (question){.gold = -1};
  const cJSON *asked = sfa_eval_row_find(row, "question"), *choices = sfa_eval_row_find(row, "choices");
  asked = asked ? asked : sfa_eval_row_find(row, "question_stem");
  if (cJSON_IsObject(asked)) {
    choices = cJSON_GetObjectItemCaseSensitive(asked, "choices");
    asked = cJSON_GetObjectItemCaseSensitive(asked, "stem");
  }
  q->stem = text_of(asked);
  if (!q->stem)
    return sfa_eval_row_fail(row, "no question");
  if (!read_choices(choices, q))
    return sfa_eval_row_fail(row, "no list of 1 to %d choices", SFA_EVAL_MAX_CHOICES);
  const char *key = text_of(sfa_eval_row_find(row, "answerKey"));
  if (!key)
    return sfa_eval_row_index(row, "label", 0, q->n, &q->gold);
  key += strspn(key, " ");
  for (int32_t i = 0; i < q->n && q->gold < 0; i++)
    if (q->labels[i] && strcmp(q->labels[i], key) == 0)
      q->gold = i;
  return q->gold >= 0 ? SFA_OK : sfa_eval_row_fail(row, "\"answerKey\" is the label of no choice");
}

static sfa_status make_arc(const eval_row *row, eval_item *item) {
  question q;
  SFA_TRY(read_question(row, &q));
  item->gold = q.gold;
  SFA_TRY(add_text(row, item, "Question: ", q.stem, "\nAnswer:", &item->contexts[0]));
  return add_choices(row, item, q.choices, q.n);
}

static sfa_status make_openbookqa(const eval_row *row, eval_item *item) {
  question q;
  SFA_TRY(read_question(row, &q));
  item->gold = q.gold;
  SFA_TRY(add_text(row, item, "", q.stem, "", &item->contexts[0]));
  return add_choices(row, item, q.choices, q.n);
}

/* The blank is filled with each option, and what follows it is scored: "partial" scoring. */
static sfa_status make_winogrande(const eval_row *row, eval_item *item) {
  const char *sentence, *options[2];
  if (sfa_eval_row_find(row, "sentence")) {
    SFA_TRY(sfa_eval_row_text(row, "sentence", &sentence));
    SFA_TRY(sfa_eval_row_text(row, "option1", &options[0]));
    SFA_TRY(sfa_eval_row_text(row, "option2", &options[1]));
    SFA_TRY(sfa_eval_row_index(row, "answer", 1, 2, &item->gold));
  } else {
    question q;
    SFA_TRY(read_question(row, &q));
    if (q.n != 2)
      return sfa_eval_row_fail(row, "%d choices, not 2", q.n);
    sentence = q.stem;
    options[0] = q.choices[0];
    options[1] = q.choices[1];
    item->gold = q.gold;
  }
  const char *blank = strchr(sentence, '_');
  if (!blank)
    return sfa_eval_row_fail(row, "the sentence has no blank \"_\"");
  const uint8_t *rest = (const uint8_t *)blank + 1;
  size_t n_rest = strlen(blank + 1);
  sfa_utf8_trim(&rest, &n_rest);
  item->has_contexts = true;
  for (int32_t i = 0; i < 2; i++) {
    item->contexts[i] = item->text.len;
    SFA_TRY(add_bytes(row, item, sentence, (size_t)(blank - sentence)));
    SFA_TRY(add_bytes(row, item, options[i], strlen(options[i]) + 1));
    item->n_chars[i] = 1; /* acc alone is told: what is scored is the same text */
    item->answers[item->n_answers++] = item->text.len;
    SFA_TRY(add_bytes(row, item, " ", 1));
    SFA_TRY(add_bytes(row, item, (const char *)rest, n_rest));
    SFA_TRY(add_end(row, item));
  }
  return SFA_OK;
}

static sfa_status make_pubmedqa(const eval_row *row, eval_item *item) {
  static const char *const decisions[] = {"yes", "no", "maybe"};
  const char *passages[SFA_EVAL_MAX_CHOICES], *asked, *decision;
  bool upper = sfa_eval_row_find(row, "QUESTION") != NULL;
  int32_t n;
  SFA_TRY(sfa_eval_row_texts(row, upper ? "CONTEXTS" : "contexts", SFA_EVAL_MAX_CHOICES, passages, &n));
  SFA_TRY(sfa_eval_row_text(row, upper ? "QUESTION" : "question", &asked));
  SFA_TRY(sfa_eval_row_text(row, "final_decision", &decision));
  for (item->gold = 0; item->gold < 3 && strcmp(decision, decisions[item->gold]) != 0;)
    item->gold++;
  if (item->gold == 3)
    return sfa_eval_row_fail(row, "\"final_decision\" is neither yes, no nor maybe");
  item->contexts[0] = item->text.len;
  for (int32_t i = 0; i < n; i++) {
    SFA_TRY(add_bytes(row, item, i ? "\n" : "Abstract: ", i ? 1 : 10));
    SFA_TRY(add_bytes(row, item, passages[i], strlen(passages[i])));
  }
  size_t place;
  SFA_TRY(add_text(row, item, "\nQuestion: ", asked, "\nAnswer:", &place));
  return add_choices(row, item, decisions, 3);
}

/* A line "expression<tab>value"; ten choices, each behind the tab. */
static sfa_status make_listops(const eval_row *row, eval_item *item) {
  const char *tab = strchr(row->text, '\t');
  if (!tab || tab == row->text || tab[1] < '0' || tab[1] > '9' || tab[2])
    return sfa_eval_row_fail(row, "it is another text");
  item->gold = tab[1] - '0';
  for (const char *at = row->text; at < tab; at++) { /* parentheses of the published files carry nothing: their bracketing is in [ ] */
    bool skipped = *at == '(' || *at == ')' || (*at == ' ' && (at[1] == '(' || at[1] == ')'));
    SFA_TRY(add_bytes(row, item, at, !skipped && (*at != ' ' || item->text.len)));
  }
  SFA_TRY(add_end(row, item));
  for (int32_t i = 0; i < 10; i++) {
    const char digit[] = {(char)('0' + i), '\0'};
    item->n_chars[i] = 1;
    SFA_TRY(add_text(row, item, "\t", digit, "", &item->answers[item->n_answers++]));
  }
  return SFA_OK;
}

/* ---- One continuation, and answers that are generated ------------------------------------------------------------------------------ */

/* The last word, as text.split(" ") finds it. */
static sfa_status make_lambada(const eval_row *row, eval_item *item) {
  const char *text;
  SFA_TRY(sfa_eval_row_text(row, "text", &text));
  const char *space = strrchr(text, ' '), *word = space ? space + 1 : text;
  SFA_TRY(add_bytes(row, item, text, space ? (size_t)(space - text) : 0));
  SFA_TRY(add_end(row, item));
  return add_choice(row, item, word);
}

static sfa_status make_gsm8k(const eval_row *row, eval_item *item) {
  const char *asked, *answer;
  SFA_TRY(sfa_eval_row_text(row, "question", &asked));
  SFA_TRY(sfa_eval_row_text(row, "answer", &answer));
  SFA_TRY(add_text(row, item, "Question: ", asked, "\nAnswer:", &item->contexts[0]));
  return add_choice(row, item, answer);
}

static sfa_status make_scitldr(const eval_row *row, eval_item *item) {
  const cJSON *sentences = sfa_eval_row_find(row, "source"), *sentence;
  const char *summaries[SFA_EVAL_MAX_CHOICES];
  int32_t n;
  if (!cJSON_IsArray(sentences) || !cJSON_GetArraySize(sentences))
    return sfa_eval_row_fail(row, "\"source\" is %s", sentences ? "no list of sentences" : "missing");
  SFA_TRY(sfa_eval_row_texts(row, "target", SFA_EVAL_MAX_CHOICES, summaries, &n));
  cJSON_ArrayForEach(sentence, sentences) {
    if (!cJSON_IsString(sentence))
      return sfa_eval_row_fail(row, "\"source\" holds something that is no text");
    SFA_TRY(add_bytes(row, item, " ", sentence != sentences->child));
    SFA_TRY(add_bytes(row, item, sentence->valuestring, strlen(sentence->valuestring)));
  }
  SFA_TRY(add_bytes(row, item, "\nTL;DR:", sizeof "\nTL;DR:"));
  return add_choices(row, item, summaries, n);
}

/* The prompt of "Lost in the Middle". */
static sfa_status make_kv(const eval_row *row, eval_item *item) {
  const cJSON *records = sfa_eval_row_find(row, "ordered_kv_records"), *record;
  const char *key, *value;
  int32_t n = cJSON_IsArray(records) ? cJSON_GetArraySize(records) : 0, place = -1, at = 0;
  SFA_TRY(sfa_eval_row_text(row, "key", &key));
  SFA_TRY(sfa_eval_row_text(row, "value", &value));
  static const char head[] = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{";
  SFA_TRY(add_bytes(row, item, head, sizeof head - 1));
  for (record = n ? records->child : NULL; record; record = record->next, at++) {
    const char *pair[] = {text_of(cJSON_GetArrayItem(record, 0)), text_of(cJSON_GetArrayItem(record, 1))};
    if (!pair[0] || !pair[1])
      return sfa_eval_row_fail(row, "record %d of \"ordered_kv_records\" is no pair of texts", at);
    place = strcmp(pair[0], key) == 0 ? at : place;
    const char *const parts[] = {at ? ",\n \"" : "\"", pair[0], "\": \"", pair[1], "\""};
    for (int i = 0; i < 5; i++)
      SFA_TRY(add_bytes(row, item, parts[i], strlen(parts[i])));
  }
  if (place < 0)
    return sfa_eval_row_fail(row, "\"ordered_kv_records\" does not hold the key");
  item->depth = n > 1 ? (double)place / (n - 1) : 0;
  size_t tail;
  SFA_TRY(add_text(row, item, "}\n\nKey: \"", key, "\"\nCorresponding value:", &tail));
  return add_choice(row, item, value);
}

/* ---- The table ------------------------------------------------------------------------------------------------------------------- */

#define QUESTION_FORM                                                                                                                      \
  "{\"question\", \"choices\": [...], \"label\"}, or {\"question\": {\"stem\", \"choices\": [{\"text\", \"label\"}]}, \"answerKey\"}"

static const eval_task tasks[] = {
    {.name = "hellaswag",
     .way = EVAL_CHOICES,
     .make = make_hellaswag,
     .is_json = true,
     .metrics = {"acc", "acc_norm"},
     .row_form = "{\"ctx\", \"endings\": [...], \"label\"}, or with \"activity_label\", \"ctx_a\", \"ctx_b\" for \"ctx\""},
    {.name = "piqa",
     .way = EVAL_CHOICES,
     .make = make_piqa,
     .is_json = true,
     .metrics = {"acc", "acc_norm"},
     .row_form = "{\"goal\", \"sol1\", \"sol2\", \"label\"}"},
    {.name = "arc_easy", .way = EVAL_CHOICES, .make = make_arc, .is_json = true, .metrics = {"acc", "acc_norm"}, .row_form = QUESTION_FORM},
    {.name = "arc_challenge",
     .way = EVAL_CHOICES,
     .make = make_arc,
     .is_json = true,
     .metrics = {"acc", "acc_norm"},
     .row_form = QUESTION_FORM},
    {.name = "openbookqa",
     .way = EVAL_CHOICES,
     .make = make_openbookqa,
     .is_json = true,
     .metrics = {"acc", "acc_norm"},
     .row_form = QUESTION_FORM},
    {.name = "winogrande",
     .way = EVAL_CHOICES,
     .make = make_winogrande,
     .is_json = true,
     .metrics = {"acc"},
     .row_form =
         "{\"sentence\", \"option1\", \"option2\", \"answer\"}, or {\"question\", \"choices\": [2], \"label\"}, with a blank \"_\""},
    {.name = "pubmedqa",
     .way = EVAL_CHOICES,
     .make = make_pubmedqa,
     .is_json = true,
     .metrics = {"acc"},
     .row_form = "{\"question\", \"contexts\": [...], \"final_decision\"}"},
    {.name = "listops",
     .way = EVAL_CHOICES,
     .make = make_listops,
     .metrics = {"acc"},
     .row_form = "an expression, a tab, and its value from 0 to 9"},
    {.name = "lambada",
     .way = EVAL_LIKELIHOOD,
     .make = make_lambada,
     .is_json = true,
     .metrics = {"perplexity", "acc"},
     .row_form = "{\"text\"}"},
    {.name = "gsm8k",
     .way = EVAL_GENERATION,
     .make = make_gsm8k,
     .is_json = true,
     .metrics = {"exact_match_strict", "exact_match_flexible"},
     .row_form = "{\"question\", \"answer\"}",
     .n_shots = 5,
     .n_generate = 256,
     .stops = {"Question:", "</s>", "<|im_end|>"},
     .judge = sfa_eval_judge_number},
    {.name = "scitldr",
     .way = EVAL_GENERATION,
     .make = make_scitldr,
     .is_json = true,
     .metrics = {"rouge1", "rouge2", "rougeL"},
     .row_form = "{\"source\": [...], \"target\": [...]}",
     .n_generate = 64,
     .stops = {"\n"},
     .judge = sfa_eval_judge_rouge},
    {.name = "kv",
     .way = EVAL_GENERATION,
     .make = make_kv,
     .is_json = true,
     .has_depth = true,
     .metrics = {"acc"},
     .row_form = "{\"ordered_kv_records\": [[key, value], ...], \"key\", \"value\"}",
     .n_generate = 64,
     .judge = sfa_eval_judge_contains},
    {.name = "niah", .way = EVAL_GENERATION, .has_depth = true, .metrics = {"found"}, .n_generate = 16, .judge = sfa_eval_judge_contains},
};

int32_t sfa_eval_task_metrics(const eval_task *task) {
  int32_t n = 0;
  while (n < SFA_EVAL_MAX_METRICS && task->metrics[n])
    n++;
  return n;
}

const eval_task *sfa_eval_task_find(const char *name) {
  for (size_t i = 0; i < sizeof tasks / sizeof *tasks; i++)
    if (strcmp(tasks[i].name, name) == 0)
      return &tasks[i];
  return NULL;
}
