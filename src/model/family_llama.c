/* Llama (SmolLM2, TinyLlama, Llama 2 and 3), and what has its shape: Mistral (a window over all layers), and Qwen2 (biases of q, k, v). */
#include "model/families.h"

static const char *const tensors[SFA_ROLE_COUNT] = {
    [SFA_ROLE_EMBEDDING] = "embed_tokens",
    [SFA_ROLE_FINAL_NORM] = "norm",
    [SFA_ROLE_HEAD] = "lm_head",
    [SFA_ROLE_ATTENTION_NORM] = "layers.*.input_layernorm",
    [SFA_ROLE_Q] = "layers.*.self_attn.q_proj",
    [SFA_ROLE_K] = "layers.*.self_attn.k_proj",
    [SFA_ROLE_V] = "layers.*.self_attn.v_proj",
    [SFA_ROLE_O] = "layers.*.self_attn.o_proj",
    [SFA_ROLE_FFN_NORM] = "layers.*.post_attention_layernorm",
    [SFA_ROLE_GATE] = "layers.*.mlp.gate_proj",
    [SFA_ROLE_UP] = "layers.*.mlp.up_proj",
    [SFA_ROLE_DOWN] = "layers.*.mlp.down_proj",
};

const sfa_family sfa_family_llama = {
    .name = "llama",
    .gguf = {"llama"},
    .model_types = {"llama", "mistral", "llama2c"},
    .tensors = tensors,
    .tensor_prefixes = {"model.", ""},
    .numbers = sfa_config_numbers,
    .config_prefixes = {""},
    .gguf_norm_eps = "attention.layer_norm_rms_epsilon",
    .activations = {"silu", "swish"},
    .activation_key = "hidden_act",
    .activation = SFA_ACT_SILU,
    .gguf_interleaved = true,
    .default_rope_base = 10000.0,
};

/* Qwen2's GGUF keeps q and k as Hugging Face has them. */
const sfa_family sfa_family_qwen2 = {
    .name = "qwen2",
    .gguf = {"qwen2"},
    .model_types = {"qwen2"},
    .tensors = tensors,
    .tensor_prefixes = {"model.", ""},
    .numbers = sfa_config_numbers,
    .config_prefixes = {""},
    .gguf_norm_eps = "attention.layer_norm_rms_epsilon",
    .activations = {"silu"},
    .activation_key = "hidden_act",
    .activation = SFA_ACT_SILU,
    .default_rope_base = 10000.0,
};
