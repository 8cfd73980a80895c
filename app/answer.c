/* Tokens drawn one after another, shown as whole characters, and what the session tells of its work. */
#include "app.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

const char *stop_name(stop_reason reason) {
  static const char *const names[] = {"end", "length", "context", "interrupted"};
  return names[reason];
}

int sampler_open(app *a, sfa_sampler **sampler) {
  const app_options *o = a->o;
  a->seed = o->seed >= 0 ? (uint64_t)o->seed : ((uint64_t)time(NULL) << 16 ^ (uint64_t)getpid()) & 0xffffffffffu;
  sfa_sampler_options sampling = {.struct_size = sizeof sampling,
                                  .temperature = (float)o->temp,
                                  .top_k = (int32_t)o->top_k,
                                  .top_p = (float)o->top_p,
                                  .min_p = (float)o->min_p,
                                  .repetition_penalty = (float)o->repeat_penalty,
                                  .seed = a->seed};
  return sfa_sampler_create(a->ctx, &sampling, a->info.vocab_size, sampler) == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
}

/* Appends the text of `id` (or the end of all text) to the answer. */
static int add_text(const app *a, utf8_stream *stream, int32_t previous, int32_t id, bool final, bool print, text_buffer *text) {
  char bytes[512], whole[3 * sizeof bytes + 3];
  size_t n = final ? 0 : sfa_tokenizer_decode(a->tokenizer, previous, id, 0, bytes, sizeof bytes);
  n = utf8_push(stream, bytes, n < sizeof bytes ? n : sizeof bytes, final, whole);
  if (!text_append(text, whole, n))
    return app_fail("out of memory for the answer");
  if (!print || !n)
    return EXIT_OK;
  fwrite(whole, 1, n, stdout);
  return app_flush();
}

int answer_generate(app *a, sfa_sampler *sampler, float *logits, int32_t previous, int64_t n_most, bool print, app_answer *out) {
  utf8_stream stream = {0};
  int status = EXIT_OK;
  for (out->stop = STOP_LENGTH; out->ids.n < n_most; previous = out->pending) {
    out->pending = sfa_sampler_next(sampler, logits);
    if (sfa_tokenizer_is_end(a->tokenizer, out->pending)) {
      out->stop = STOP_END;
      break;
    }
    if (!list_append(&out->ids, out->pending))
      return app_fail("out of memory for the answer");
    if ((status = add_text(a, &stream, previous, out->pending, false, print, &out->text)) != EXIT_OK)
      return status;
    if (out->ids.n == n_most)
      break;
    if (interrupted() || sfa_session_len(a->session) >= a->context_len) {
      out->stop = interrupted() ? STOP_INTERRUPTED : STOP_CONTEXT;
      break;
    }
    if (sfa_session_append(a->session, &out->pending, 1, logits) != SFA_OK)
      return app_fail_status(a->ctx);
  }
  return add_text(a, &stream, previous, -1, true, print, &out->text);
}

void answer_free(app_answer *answer) {
  free(answer->ids.values);
  free(answer->text.bytes);
  *answer = (app_answer){0};
}

static double per_second(int64_t n, int64_t ns) { return ns > 0 ? 1e9 * (double)n / (double)ns : 0; }

static double attention_share(const sfa_session_stats *s) {
  int64_t all = s->prefill_ns + s->decode_ns;
  return all > 0 ? (double)(s->prefill_attention_ns + s->decode_attention_ns) / (double)all : 0;
}

cJSON *stats_json(const app *a) {
  sfa_session_stats s;
  sfa_session_stats_read(a->session, &s);
  const struct {
    const char *name;
    double value;
  } members[] = {
      {"prefill_tokens", (double)s.prefill_tokens},
      {"prefill_s", 1e-9 * (double)s.prefill_ns},
      {"prefill_tokens_per_s", per_second(s.prefill_tokens, s.prefill_ns)},
      {"decode_tokens", (double)s.decode_tokens},
      {"decode_s", 1e-9 * (double)s.decode_ns},
      {"decode_tokens_per_s", per_second(s.decode_tokens, s.decode_ns)},
      {"attention_share", attention_share(&s)},
      {"kv_bytes", (double)s.kv_bytes},
      {"index_bytes", (double)s.index_bytes},
      {"dropped_most", (double)s.dropped_most},
  };
  cJSON *stats = cJSON_CreateObject();
  for (size_t i = 0; i < sizeof members / sizeof *members; i++)
    cJSON_AddNumberToObject(stats, members[i].name, members[i].value);
  cJSON_AddStringToObject(stats, "prefill_policy", sfa_policy_name(s.prefill_policy));
  return stats;
}

void stats_print(const app *a) {
  sfa_session_stats s;
  sfa_session_stats_read(a->session, &s);
  char bytes[32], name[96], index_bytes[32], index[64] = "", dropped[64] = "";
  if (s.index_bytes)
    snprintf(index, sizeof index, " and %s of the index", human_bytes((double)s.index_bytes, index_bytes));
  if (a->choice.eps > 0)
    snprintf(dropped, sizeof dropped, ", at most %.2e of the softmax left out", (double)s.dropped_most);
  fprintf(stderr,
          "[prefill %lld tokens, %.1f tokens/s; decode %lld tokens, %.1f tokens/s; attention %.0f %% of the time, prompts by %s; KV "
          "cache %s%s; %s%s]\n",
          (long long)s.prefill_tokens, per_second(s.prefill_tokens, s.prefill_ns), (long long)s.decode_tokens,
          per_second(s.decode_tokens, s.decode_ns), 100 * attention_share(&s), sfa_policy_name(s.prefill_policy),
          human_bytes((double)s.kv_bytes, bytes), index, app_attention_name(a, name, sizeof name), dropped);
}
