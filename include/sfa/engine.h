/* sfa/engine.h: real language models on libsfa: open a model file, tokenize, run a session, sample, score. Link libsfa_engine.
 *
 * A model is immutable and may be shared by sessions; a session is one mutable timeline of tokens with its KV cache. Tokenizers, chat
 * templates and model families are found in the model's own files.
 */
#ifndef SFA_ENGINE_H
#define SFA_ENGINE_H

#include <sfa/attention.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Tokenizer --------------------------------------------------------------------------------------------------------------- */

typedef struct sfa_tokenizer sfa_tokenizer;

/* path: a GGUF file, a tokenizer.json or a directory that holds one (or GPT-2's vocab.json and merges.txt), a llama2.c tokenizer.bin. */
SFA_API sfa_status sfa_tokenizer_open(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer);
SFA_API void sfa_tokenizer_close(sfa_tokenizer *tokenizer);
SFA_API int32_t sfa_tokenizer_vocab_size(const sfa_tokenizer *tokenizer);

enum {
  SFA_TOKENIZE_SPECIAL = 1, /* add the tokens that the model wants around a text (BOS, ...) */
  SFA_TOKENIZE_PARSE = 2    /* texts of special tokens inside the input ("<|im_start|>") become those tokens */
};
/* UTF-8 text to ids. Malformed UTF-8 is read as U+FFFD, one for each maximal part, as Python's errors="replace" does. *ids is allocated
 * with the context's allocator (sfa_free_ids); *n_ids its length. */
SFA_API sfa_status sfa_tokenizer_encode(const sfa_tokenizer *tokenizer, const char *text, size_t text_bytes, uint32_t flags, int32_t **ids,
                                        size_t *n_ids);
SFA_API void sfa_free_ids(sfa_context *ctx, int32_t *ids);
/* The bytes of one token as they continue a text after `previous` (-1: at the start); a token may hold a part of a character. Special
 * tokens give 0 bytes unless keep_special. The space that SentencePiece puts before a text is left out after -1 and after BOS. Returns the
 * number of bytes; at most `capacity` of them are written (no terminator). */
SFA_API size_t sfa_tokenizer_decode(const sfa_tokenizer *tokenizer, int32_t previous, int32_t id, int keep_special, char *out,
                                    size_t capacity);
/* -1 where the model has none. */
SFA_API int32_t sfa_tokenizer_bos(const sfa_tokenizer *tokenizer);
/* 1 if the model ends its turn or text with this token. */
SFA_API int sfa_tokenizer_is_end(const sfa_tokenizer *tokenizer, int32_t id);

typedef struct sfa_chat_message {
  const char *role; /* "system", "user" or "assistant" */
  const char *content;
} sfa_chat_message;

/* 1 if the model's files carry a chat template of a family that is known here. */
SFA_API int sfa_tokenizer_has_chat(const sfa_tokenizer *tokenizer);
/* Writes the conversation as the model was trained on it, ending with the opening of the assistant's turn. The text has special tokens
 * inside: encode it with SFA_TOKENIZE_PARSE. *text is allocated by the context (sfa_free_text), NUL-terminated.
 * first: 0 continues a conversation that the model has already in its cache, up to and with the token that ended its last turn (no BOS,
 * no default system message; the text starts with what the template puts behind that token). */
SFA_API sfa_status sfa_chat_format(const sfa_tokenizer *tokenizer, const sfa_chat_message *messages, int32_t n_messages, int first,
                                   char **text);
SFA_API void sfa_free_text(sfa_context *ctx, char *text);

/* ---- Model ------------------------------------------------------------------------------------------------------------------- */

typedef enum sfa_weight_format {
  SFA_WEIGHTS_AUTO = 0, /* the fastest on this machine whose error is within that of the file's own format */
  SFA_WEIGHTS_F32 = 1,  /* the reference: dequantised, all products in f32 */
  SFA_WEIGHTS_BF16 = 2,
  SFA_WEIGHTS_INT8 = 3
} sfa_weight_format;

typedef struct sfa_model_options {
  size_t struct_size;        /* sizeof(sfa_model_options) */
  sfa_weight_format weights; /* of the linear layers in memory */
  const char *tokenizer;     /* path; NULL: in or beside the model file. A model without a tokenizer opens, model_tokenizer is NULL */
  const char *adapter;       /* a directory that sfa finetune made: tensors and settings laid over those of the model; NULL: none */
} sfa_model_options;

typedef struct sfa_model sfa_model;

/* path: a GGUF file, a directory with config.json and *.safetensors, or a llama2.c .bin. options may be NULL. */
SFA_API sfa_status sfa_model_open(sfa_context *ctx, const char *path, const sfa_model_options *options, sfa_model **model);
SFA_API void sfa_model_close(sfa_model *model);
SFA_API const sfa_tokenizer *sfa_model_tokenizer(const sfa_model *model);

typedef struct sfa_model_info {
  const char *family; /* "llama", "qwen3", "gpt2", "gemma3" */
  const char *name;   /* as the file says, or "" */
  const char *format; /* "gguf", "safetensors", "llama2.c" */
  int32_t n_layers, n_heads, n_kv_heads, head_dim, head_dim_v, hidden_dim, intermediate_dim, vocab_size;
  int64_t context_len; /* trained context in tokens */
  int64_t n_parameters;
  int64_t file_bytes;
  int64_t n_tensors;
  int32_t is_instruct;       /* 1: has a chat template */
  sfa_weight_format weights; /* in memory */
  int32_t sfa_k, sfa_k_q;    /* sparse_attention_config of the file; sfa_k = 0: a dense model */
} sfa_model_info;

SFA_API void sfa_model_describe(const sfa_model *model, sfa_model_info *info);

typedef struct sfa_tensor_info {
  const char *name;
  const char *type; /* "F32", "Q4_K", ... */
  int32_t n_dims;
  int64_t shape[4]; /* outermost first */
  int64_t bytes;
} sfa_tensor_info;

/* index 0..n_tensors-1; returns 0 beyond. */
SFA_API int sfa_model_tensor(const sfa_model *model, int64_t index, sfa_tensor_info *info);

/* ---- Attention choice -------------------------------------------------------------------------------------------------------- */

typedef struct sfa_attention_choice {
  size_t struct_size;        /* sizeof(sfa_attention_choice) */
  int32_t sparse;            /* 0: dense, 1: SFA */
  int32_t k;                 /* kept features of a key; 0: as the model says, else 16; capped at the head dim */
  int32_t k_q;               /* of a query; 0: as the model says, else k; -1: all (q dense, K-only) */
  int32_t layers;            /* which layers are sparse: 0 all, 1 those with global attention, 2 those in layer_list */
  const int32_t *layer_list; /* layers = 2: indices from 0 */
  int32_t n_layer_list;
  sfa_dtype cache_k;       /* 0: SFA_I8 for codes; for dense keys SFA_F32 if the file's weights are f32, else SFA_BF16 */
  sfa_dtype cache_v;       /* 0: SFA_F32 if the file's weights are f32, else SFA_BF16 */
  const sfa_costs *costs;  /* of this machine, for the planner (sfa/plan.h); NULL: those in the source */
  sfa_precision precision; /* SFA_PRECISION_F32: the same bits on every CPU and however a prompt is cut */
  float eps;               /* softmax mass that a decode step may leave out of each head, 0 to 0.5, with a certificate */
  sfa_policy policy;       /* how prompts are attended to, in steps of several tokens; a step of one token is the planner's. 0: the
                            * planner's choice; on a GPU SFA_POLICY_INT8 for codes of int8 with heads beyond 64, of a model that
                            * learned to attend by them (docs/RESULTS.md), else BF16. SFA_ERROR_UNSUPPORTED where a layer cannot
                            * be done so. It changes how scores round, not what is stored: an index is read with any */
} sfa_attention_choice;

/* KV bytes a token under a choice, over all layers. */
SFA_API sfa_status sfa_model_kv_bytes(const sfa_model *model, const sfa_attention_choice *choice, size_t *bytes);

/* ---- Session ----------------------------------------------------------------------------------------------------------------- */

/* Called between chunks of a long prefill; done of total tokens. Return non-zero to stop (SFA_ERROR_CANCELLED). */
typedef int (*sfa_progress_fn)(void *user, int64_t done, int64_t total);

typedef struct sfa_session_options {
  size_t struct_size;                    /* sizeof(sfa_session_options) */
  const sfa_attention_choice *attention; /* NULL: dense */
  int64_t context_len;                   /* most tokens, up to the model's; 0: that */
  int32_t chunk_len;                     /* prefill tokens a step; 0: 512. The result does not depend on it (on a GPU,
                                          * or with 16-bit arithmetic on AMX machines: but for rounding) */
  sfa_progress_fn progress;              /* NULL: none */
  void *progress_user;
} sfa_session_options;

typedef struct sfa_session sfa_session;

SFA_API sfa_status sfa_session_create(const sfa_model *model, const sfa_session_options *options, sfa_session **session);
SFA_API void sfa_session_destroy(sfa_session *session);
/* Tokens in the timeline. */
SFA_API int64_t sfa_session_len(const sfa_session *session);

/* Appends tokens and runs the model over them. logits: [vocab_size] of the last one, or NULL. SFA_ERROR_RANGE: beyond context_len or a
 * token id outside the vocabulary. On failure the timeline is as before. */
SFA_API sfa_status sfa_session_append(sfa_session *session, const int32_t *tokens, int64_t n_tokens, float *logits);

/* Appends tokens and scores each position against the token that follows it. next: the token after the last one, or -1.
 * nll: [n_tokens] natural log loss of tokens[i + 1] (the last: of next; NaN if next = -1). argmax: [n_tokens] most likely next tokens,
 * ties to the lower id. Either output may be NULL. No [T][vocab] array is made. */
SFA_API sfa_status sfa_session_score(sfa_session *session, const int32_t *tokens, int64_t n_tokens, int32_t next, float *nll,
                                     int32_t *argmax);
/* Forgets the tokens from new_len on. */
SFA_API sfa_status sfa_session_truncate(sfa_session *session, int64_t new_len);

typedef struct sfa_session_stats {
  int64_t prefill_tokens, decode_tokens;             /* tokens that came in calls of several, of one */
  int64_t prefill_ns, decode_ns;                     /* wall time of those calls */
  int64_t prefill_attention_ns, decode_attention_ns; /* of it in attention: top-k, packing, scores, values */
  int64_t kv_bytes;                                  /* the session's own pages in use */
  int64_t index_bytes;                               /* pages in use that lie in an index file */
  float dropped_most;                                /* the largest mass that a head left out in a decode step; 0 without eps */
  sfa_policy prefill_policy;                         /* how prompts are attended to, in the first sparse layer, else in the first */
} sfa_session_stats;

SFA_API void sfa_session_stats_read(const sfa_session *session, sfa_session_stats *stats);

/* ---- Looking inside (docs/MATH.md 2: with codes, a score is a sum over few features, each with a name) -------------------------- */

enum { SFA_MAX_REASONS = 8 };

/* A feature that a query and a key share, and its part of their score: softmax_scale * q_u * k_u. */
typedef struct sfa_reason {
  int32_t feature;
  float part;
} sfa_reason;

/* A token that the explained one attends to. */
typedef struct sfa_explained_token {
  int64_t position;
  float mass;                          /* softmax weight, mean over the heads asked for */
  int32_t layer, head;                 /* of these the one that gives it most weight */
  float weight, score;                 /* there; the score before a softcap */
  int32_t n_shared;                    /* features that the two share there */
  int32_t n_reasons;                   /* min(n_shared, SFA_MAX_REASONS) */
  sfa_reason reasons[SFA_MAX_REASONS]; /* the largest parts, by magnitude */
} sfa_explained_token;

typedef struct sfa_explain_options {
  size_t struct_size;            /* sizeof(sfa_explain_options) */
  const int32_t *layers, *heads; /* [n_layers], [n_heads] numbers from 0; NULL: all */
  int32_t n_layers, n_heads;
} sfa_explain_options;

/* Why the session's last token looks where it looks: its attention, read from the stored keys. (For an earlier token truncate first.) The
 * last token is run twice more; the timeline stays as it is, also where a step of that fails, unless the step that puts the token back
 * fails as well: the session then ends before it. tokens [n_top], n_top up to 65536: the largest masses, falling, ties to the earlier;
 * *n_tokens = min(n_top, length). mass: [length] of every token, adding up to 1, or NULL. options may be NULL. Cost: two decode steps, for
 * every head the scores of all keys, for each token told those of its head once more, and length * n_top moves at worst, where masses rise
 * along the text; 20 bytes a token while it runs. From 65536 tokens on, layers with sparse queries over int8 codes keep an inverted index
 * (sfa/postings.h) in the session for the next question. */
SFA_API sfa_status sfa_session_explain(sfa_session *session, const sfa_explain_options *options, int64_t n_top, sfa_explained_token *tokens,
                                       int64_t *n_tokens, float *mass);

/* How a kv head uses its features, over a text. */
typedef struct sfa_head_report {
  int32_t layer, kv_head;
  int32_t k_keys, k_queries; /* kept features; D where dense */
  int32_t n_dead;            /* features that no key keeps */
  int32_t hottest;           /* the feature that most keys keep */
  float hottest_share;       /* and their share */
  float effective;           /* features used, as participation ratio (sum n_u)^2 / sum n_u^2 */
  float overlap;     /* features that a query and a key share, mean over sampled queries and all keys; k_queries k_keys / D if even */
  float keys_for[3]; /* share of the keys that hold 0.9, 0.99, 0.999 of the softmax, mean over sampled queries */
} sfa_head_report;

/* Reads a text into an empty session and reports on every layer and kv head. n_queries: tokens sampled evenly from the second half whose
 * queries are followed; 0: 16. heads: [n_layers][G]. use: [n_layers][G][D] keys that keep each feature, or NULL. */
SFA_API sfa_status sfa_session_inspect(sfa_session *session, const int32_t *tokens, int64_t n_tokens, int32_t n_queries,
                                       sfa_head_report *heads, int32_t *use);
/* The session's tokens, [sfa_session_len]; valid until the session changes. */
SFA_API const int32_t *sfa_session_tokens(const sfa_session *session);

/* ---- Document index ----------------------------------------------------------------------------------------------------------- */

/* A session in a file: tokens, and the cache pages that a model made of them, as docs/LAYOUTS.md has them. Sessions use the pages where
 * they lie, in a read-only mapping that all processes share; so opening takes milliseconds at any length. The file only grows: what is
 * appended goes behind what is there, and becomes part of the index with the last write of a commit. Readers need no lock; writers exclude
 * each other. A file must not be cut or overwritten by others while it is open. */

/* A part of the document, for people: a file of a folder, a book. Parts are in order and do not overlap. */
typedef struct sfa_index_source {
  const char *name;
  int64_t first_byte, n_bytes;   /* of the document's text, headings included */
  int64_t first_token, n_tokens; /* of the index */
} sfa_index_source;

typedef struct sfa_index sfa_index;

/* Reads everything but the pages, and checks it. SFA_ERROR_FORMAT: not an index, cut short or damaged; another version. */
SFA_API sfa_status sfa_index_open(sfa_context *ctx, const char *path, sfa_index **index);
SFA_API void sfa_index_close(sfa_index *index);

typedef struct sfa_index_info {
  const char *model_name;
  uint64_t model, tokenizer; /* fingerprints */
  sfa_weight_format weights; /* in memory, when the pages were made */
  int32_t n_layers, n_kv_heads, head_dim, vocab_size;
  int32_t n_sparse_layers, k, k_q; /* k, k_q: the largest of a layer; k_q = 0: dense queries */
  sfa_dtype k_dtype, v_dtype;      /* of the first sparse layer, else of the first */
  int64_t n_tokens, n_sources, n_segments, n_commits;
  int64_t bytes, page_bytes; /* of the file; of the pages in use */
} sfa_index_info;

SFA_API void sfa_index_describe(const sfa_index *index, sfa_index_info *info);
/* [n_tokens], as long as the index is open. */
SFA_API const int32_t *sfa_index_tokens(const sfa_index *index);
/* number 0 .. n_sources - 1; returns 0 beyond. The name lives as long as the index. */
SFA_API int sfa_index_source_at(const sfa_index *index, int64_t number, sfa_index_source *source);
/* Reads all pages and compares their checksums, at the speed of memory or of the disk. SFA_ERROR_FORMAT names the first damaged one. */
SFA_API sfa_status sfa_index_verify(const sfa_index *index);

typedef struct sfa_index_writer sfa_index_writer;

/* Opens a file for commits, or makes one, and keeps other writers out until it is closed: SFA_ERROR_IO where one is at work. Nothing is
 * written yet; a new file that got no commit is removed with the writer. */
SFA_API sfa_status sfa_index_writer_open(sfa_context *ctx, const char *path, sfa_index_writer **writer);
SFA_API void sfa_index_writer_close(sfa_index_writer *writer);
/* 1: the file holds nothing yet, it is empty or its first commit was never finished. */
SFA_API int sfa_index_writer_is_new(const sfa_index_writer *writer);

/* A session that begins with the tokens of an index, as if they had been appended: the same bits follow. The model and the options must be
 * those that the index was made by: SFA_ERROR_ARGUMENT says what differs. The pages are not looked at: damaged ones give wrong scores,
 * never a fault, and sfa_index_verify is for files that came a long way. SFA_ERROR_RANGE: more tokens than the context. */
SFA_API sfa_status sfa_session_load(const sfa_model *model, const sfa_session_options *options, const char *path, sfa_session **session);
/* Commits the session's tokens and pages: all of them into a new file, else what follows the file's own. SFA_ERROR_ARGUMENT: the file was
 * made by another model or other options, or its tokens are not the first of the session. sources: the whole list, none beyond the
 * session's tokens; what ends before the end of the file's last source is left out, and what begins before it is told of from there on. On
 * failure the file holds what it held. Costs one write of the new pages, and two waits for the disk. */
SFA_API sfa_status sfa_session_save(const sfa_session *session, sfa_index_writer *writer, const sfa_index_source *sources,
                                    int64_t n_sources);

/* ---- Sampler ----------------------------------------------------------------------------------------------------------------- */

typedef struct sfa_sampler_options {
  size_t struct_size;       /* sizeof(sfa_sampler_options) */
  float temperature;        /* 0: greedy */
  int32_t top_k;            /* 0: off */
  float top_p;              /* 0 or 1: off */
  float min_p;              /* 0: off */
  float repetition_penalty; /* 0 or 1: off; as CTRL and llama.cpp: logit / p if positive, * p if negative */
  int32_t repetition_last;  /* tokens looked back on; 0: 64 */
  uint64_t seed;
} sfa_sampler_options;

typedef struct sfa_sampler sfa_sampler;

SFA_API sfa_status sfa_sampler_create(sfa_context *ctx, const sfa_sampler_options *options, int32_t vocab_size, sfa_sampler **sampler);
SFA_API void sfa_sampler_destroy(sfa_sampler *sampler);
/* Order: repetition penalty, top-k, top-p, min-p, temperature, draw. logits [vocab_size] are changed in place. Remembers the token. */
SFA_API int32_t sfa_sampler_next(sfa_sampler *sampler, float *logits);
/* Tells the sampler of a token that it did not draw (the prompt's). */
SFA_API void sfa_sampler_accept(sfa_sampler *sampler, int32_t token);

#ifdef __cplusplus
}
#endif
#endif
