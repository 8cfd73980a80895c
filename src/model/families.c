/* The list of families, and the names that they share. */
#include "model/families.h"

#include <string.h>

static const sfa_family *const families[] = {&sfa_family_llama, &sfa_family_qwen2, &sfa_family_qwen3, &sfa_family_gpt2, &sfa_family_gemma3};
enum { N_FAMILIES = sizeof families / sizeof *families };

const char sfa_families_known[] = "Llama (Mistral too), Qwen2, Qwen3, GPT-2, Gemma 3";

static bool among(const char *const *names, size_t n, const char *name) {
  for (size_t i = 0; i < n && names[i]; i++)
    if (strcmp(names[i], name) == 0)
      return true;
  return false;
}

const sfa_family *sfa_family_of_gguf(const char *architecture) {
  for (size_t i = 0; i < N_FAMILIES; i++)
    if (among(families[i]->gguf, sizeof families[i]->gguf / sizeof *families[i]->gguf, architecture))
      return families[i];
  return NULL;
}

const sfa_family *sfa_family_of_model_type(const char *model_type) {
  for (size_t i = 0; i < N_FAMILIES; i++)
    if (among(families[i]->model_types, sizeof families[i]->model_types / sizeof *families[i]->model_types, model_type))
      return families[i];
  return NULL;
}

const char *const sfa_gguf_tensors[SFA_ROLE_COUNT] = {
    [SFA_ROLE_EMBEDDING] = "token_embd",
    [SFA_ROLE_POSITIONS] = "position_embd",
    [SFA_ROLE_FINAL_NORM] = "output_norm",
    [SFA_ROLE_HEAD] = "output",
    [SFA_ROLE_ATTENTION_NORM] = "blk.*.attn_norm",
    [SFA_ROLE_Q] = "blk.*.attn_q",
    [SFA_ROLE_K] = "blk.*.attn_k",
    [SFA_ROLE_V] = "blk.*.attn_v",
    [SFA_ROLE_QKV] = "blk.*.attn_qkv",
    [SFA_ROLE_Q_NORM] = "blk.*.attn_q_norm",
    [SFA_ROLE_K_NORM] = "blk.*.attn_k_norm",
    [SFA_ROLE_O] = "blk.*.attn_output",
    [SFA_ROLE_POST_ATTENTION_NORM] = "blk.*.post_attention_norm",
    [SFA_ROLE_FFN_NORM] = "blk.*.ffn_norm",
    [SFA_ROLE_GATE] = "blk.*.ffn_gate",
    [SFA_ROLE_UP] = "blk.*.ffn_up",
    [SFA_ROLE_DOWN] = "blk.*.ffn_down",
    [SFA_ROLE_POST_FFN_NORM] = "blk.*.post_ffw_norm",
};

const char *const sfa_gguf_numbers[SFA_NUMBER_COUNT] = {
    [SFA_NUMBER_LAYERS] = "block_count",
    [SFA_NUMBER_HIDDEN] = "embedding_length",
    [SFA_NUMBER_FFN] = "feed_forward_length",
    [SFA_NUMBER_HEADS] = "attention.head_count",
    [SFA_NUMBER_KV_HEADS] = "attention.head_count_kv",
    [SFA_NUMBER_HEAD_DIM] = "attention.key_length",
    [SFA_NUMBER_VALUE_DIM] = "attention.value_length",
    [SFA_NUMBER_CONTEXT] = "context_length",
    [SFA_NUMBER_WINDOW] = "attention.sliding_window",
};

const char *const sfa_config_numbers[SFA_NUMBER_COUNT] = {
    [SFA_NUMBER_LAYERS] = "num_hidden_layers",     [SFA_NUMBER_HIDDEN] = "hidden_size",
    [SFA_NUMBER_FFN] = "intermediate_size",        [SFA_NUMBER_HEADS] = "num_attention_heads",
    [SFA_NUMBER_KV_HEADS] = "num_key_value_heads", [SFA_NUMBER_HEAD_DIM] = "head_dim",
    [SFA_NUMBER_VALUE_DIM] = "v_head_dim",         [SFA_NUMBER_CONTEXT] = "max_position_embeddings",
    [SFA_NUMBER_NORM_EPS] = "rms_norm_eps",        [SFA_NUMBER_WINDOW] = "sliding_window",
};
