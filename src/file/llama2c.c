/* llama2.c's legacy .bin: seven int32, then float32 tensors back to back. It has no magic number: a file is one if its size is exactly what
 * its header says. Tensors get the names, and the header the keys, that Hugging Face uses for a Llama. */
#include "file/weights_build.h"

#include <stdio.h>
#include <string.h>

enum { HEADER_BYTES = 7 * 4 };

typedef struct header {
  int64_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
  bool shared_head; /* vocab_size is positive: the embedding is the output layer too */
} header;

/* Sizes that a tensor's shape is made of. */
enum size { NONE, DIM, HIDDEN, KV, VOCAB, ROPE };

/* The file, in order. per_layer: [n_layers] tensors one after the other. The rope tables are computed anew, not read. */
static const struct {
  const char *name; /* NULL: skipped */
  bool per_layer;
  enum size rows, columns; /* rows NONE: a vector */
} parts[] = {
    {"model.embed_tokens.weight", false, VOCAB, DIM},
    {"input_layernorm.weight", true, NONE, DIM},
    {"self_attn.q_proj.weight", true, DIM, DIM},
    {"self_attn.k_proj.weight", true, KV, DIM},
    {"self_attn.v_proj.weight", true, KV, DIM},
    {"self_attn.o_proj.weight", true, DIM, DIM},
    {"post_attention_layernorm.weight", true, NONE, DIM},
    {"mlp.gate_proj.weight", true, HIDDEN, DIM},
    {"mlp.down_proj.weight", true, DIM, HIDDEN},
    {"mlp.up_proj.weight", true, HIDDEN, DIM},
    {"model.norm.weight", false, NONE, DIM},
    {NULL, false, NONE, ROPE}, /* cos [seq_len][head_dim / 2] */
    {NULL, false, NONE, ROPE}, /* sin */
    {"lm_head.weight", false, VOCAB, DIM},
};
enum { N_PARTS = sizeof parts / sizeof *parts };

static bool part_is_there(const header *h, size_t part) { return part != N_PARTS - 1 || !h->shared_head; }

/* All sizes positive and consistent? */
static bool read_header(const sfa_map *map, header *h) {
  int32_t v[7];
  if (map->bytes < HEADER_BYTES)
    return false;
  memcpy(v, map->data, sizeof v);
  if (v[5] == INT32_MIN)
    return false;
  *h = (header){v[0], v[1], v[2], v[3], v[4], v[5] < 0 ? -v[5] : v[5], v[6], v[5] > 0};
  return h->dim > 0 && h->hidden_dim > 0 && h->n_layers > 0 && h->n_heads > 0 && h->n_kv_heads > 0 && h->vocab_size > 0 && h->seq_len > 0 &&
         h->dim % h->n_heads == 0 && h->n_heads % h->n_kv_heads == 0 && (h->dim / h->n_heads) % 2 == 0;
}

static size_t size_of(const header *h, enum size size) {
  const int64_t head_dim = h->dim / h->n_heads;
  const int64_t sizes[] = {[NONE] = 1,
                           [DIM] = h->dim,
                           [HIDDEN] = h->hidden_dim,
                           [KV] = h->n_kv_heads * head_dim,
                           [VOCAB] = h->vocab_size,
                           [ROPE] = h->seq_len * (head_dim / 2)};
  return (size_t)sizes[size];
}

bool sfa_llama2c_is(const sfa_map *map) {
  header h;
  size_t total = HEADER_BYTES, part_bytes;
  if (!read_header(map, &h))
    return false;
  for (size_t i = 0; i < N_PARTS; i++)
    if (part_is_there(&h, i) &&
        (!sfa_mul_size(size_of(&h, parts[i].rows), size_of(&h, parts[i].columns), &part_bytes) ||
         !sfa_mul_size(part_bytes, sizeof(float), &part_bytes) ||
         (parts[i].per_layer && !sfa_mul_size(part_bytes, (size_t)h.n_layers, &part_bytes)) || !sfa_add_size(total, part_bytes, &total)))
      return false;
  return total == map->bytes;
}

static sfa_status add_tensors(sfa_weights *weights, const sfa_weights_file *file, const header *h) {
  uint64_t offset = HEADER_BYTES;
  for (size_t i = 0; i < N_PARTS; i++) {
    if (!part_is_there(h, i))
      continue;
    const int64_t shape[2] = {(int64_t)size_of(h, parts[i].rows), (int64_t)size_of(h, parts[i].columns)};
    for (int64_t layer = 0; layer < (parts[i].per_layer ? h->n_layers : 1); layer++) {
      char text[96];
      const char *name;
      sfa_tensor *tensor;
      if (parts[i].name) {
        if (parts[i].per_layer)
          snprintf(text, sizeof text, "model.layers.%lld.%s", (long long)layer, parts[i].name);
        else
          snprintf(text, sizeof text, "%s", parts[i].name);
        SFA_TRY(sfa_arena_text(weights->ctx, &weights->arena, text, strlen(text), &name));
        bool vector = parts[i].rows == NONE;
        SFA_TRY(sfa_weights_add_tensor(weights, file, name, SFA_TENSOR_F32, vector ? 1 : 2, vector ? shape + 1 : shape, offset, &tensor));
      }
      offset += (uint64_t)(shape[0] * shape[1]) * sizeof(float);
    }
  }
  return SFA_OK;
}

sfa_status sfa_llama2c_read(sfa_weights *weights, const sfa_weights_file *file) {
  header h;
  if (!read_header(&file->map, &h))
    return sfa_fail(weights->ctx, SFA_ERROR_FORMAT, "%s is not a llama2.c model: download it again", file->name);
  const struct {
    const char *key;
    double value;
  } numbers[] = {{"hidden_size", (double)h.dim},
                 {"intermediate_size", (double)h.hidden_dim},
                 {"num_hidden_layers", (double)h.n_layers},
                 {"num_attention_heads", (double)h.n_heads},
                 {"num_key_value_heads", (double)h.n_kv_heads},
                 {"head_dim", (double)(h.dim / h.n_heads)},
                 {"vocab_size", (double)h.vocab_size},
                 {"max_position_embeddings", (double)h.seq_len},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 10000}};
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    SFA_TRY(sfa_weights_add_number(weights, file->name, numbers[i].key, numbers[i].value));
  SFA_TRY(sfa_weights_add_string(weights, file->name, "model_type", "llama2c"));
  SFA_TRY(sfa_weights_add_string(weights, file->name, "hidden_act", "silu"));
  SFA_TRY(sfa_weights_add_bool(weights, file->name, "tie_word_embeddings", h.shared_head));
  SFA_TRY(sfa_weights_add_bool(weights, file->name, "rope_interleaved", true)); /* pairs (2i, 2i + 1), not (i, i + d/2) */
  return add_tensors(weights, file, &h);
}
