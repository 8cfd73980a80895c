/* Gemma 3 (text): a norm before and after attention and feed-forward, QK-norm, five sliding layers to one global with rope bases of
 * their own, embeddings times sqrt(hidden_dim). */
#include "model/families.h"

static const char *const tensors[SFA_ROLE_COUNT] = {
    [SFA_ROLE_EMBEDDING] = "embed_tokens",
    [SFA_ROLE_FINAL_NORM] = "norm",
    [SFA_ROLE_HEAD] = "lm_head",
    [SFA_ROLE_ATTENTION_NORM] = "layers.*.input_layernorm",
    [SFA_ROLE_Q] = "layers.*.self_attn.q_proj",
    [SFA_ROLE_K] = "layers.*.self_attn.k_proj",
    [SFA_ROLE_V] = "layers.*.self_attn.v_proj",
    [SFA_ROLE_Q_NORM] = "layers.*.self_attn.q_norm",
    [SFA_ROLE_K_NORM] = "layers.*.self_attn.k_norm",
    [SFA_ROLE_O] = "layers.*.self_attn.o_proj",
    [SFA_ROLE_POST_ATTENTION_NORM] = "layers.*.post_attention_layernorm",
    [SFA_ROLE_FFN_NORM] = "layers.*.pre_feedforward_layernorm",
    [SFA_ROLE_GATE] = "layers.*.mlp.gate_proj",
    [SFA_ROLE_UP] = "layers.*.mlp.up_proj",
    [SFA_ROLE_DOWN] = "layers.*.mlp.down_proj",
    [SFA_ROLE_POST_FFN_NORM] = "layers.*.post_feedforward_layernorm",
};

const sfa_family sfa_family_gemma3 = {
    .name = "gemma3",
    .gguf = {"gemma3"},
    .model_types = {"gemma3_text", "gemma3"},
    .tensors = tensors,
    .tensor_prefixes = {"model.", "language_model.model.", "model.language_model.", ""},
    .numbers = sfa_config_numbers,
    .config_prefixes = {"", "text_config."},
    .gguf_norm_eps = "attention.layer_norm_rms_epsilon",
    .activations = {"gelu_pytorch_tanh"},
    .activation_key = "hidden_activation",
    .activation = SFA_ACT_GELU_TANH,
    .norm_plus_one = true,
    .scale_embedding = true,
    .local_pattern = true,
    .default_rope_base = 1000000.0,
    .default_local_base = 10000.0,
    .default_pattern = 6,
    .deep_scale_by_hidden = 62,
};
