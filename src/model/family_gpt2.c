/* GPT-2: learned positions, LayerNorm, biases everywhere, q, k and v in one product, a plain two-layer feed-forward. */
#include "model/families.h"

static const char *const tensors[SFA_ROLE_COUNT] = {
    [SFA_ROLE_EMBEDDING] = "wte",       [SFA_ROLE_POSITIONS] = "wpe",           [SFA_ROLE_FINAL_NORM] = "ln_f",
    [SFA_ROLE_HEAD] = "lm_head",        [SFA_ROLE_ATTENTION_NORM] = "h.*.ln_1", [SFA_ROLE_QKV] = "h.*.attn.c_attn",
    [SFA_ROLE_O] = "h.*.attn.c_proj",   [SFA_ROLE_FFN_NORM] = "h.*.ln_2",       [SFA_ROLE_UP] = "h.*.mlp.c_fc",
    [SFA_ROLE_DOWN] = "h.*.mlp.c_proj",
};

static const char *const numbers[SFA_NUMBER_COUNT] = {
    [SFA_NUMBER_LAYERS] = "n_layer",      [SFA_NUMBER_HIDDEN] = "n_embd",
    [SFA_NUMBER_FFN] = "n_inner",         [SFA_NUMBER_HEADS] = "n_head",
    [SFA_NUMBER_HEAD_DIM] = "head_dim",   [SFA_NUMBER_VALUE_DIM] = "v_head_dim",
    [SFA_NUMBER_CONTEXT] = "n_positions", [SFA_NUMBER_NORM_EPS] = "layer_norm_epsilon",
};

const sfa_family sfa_family_gpt2 = {
    .name = "gpt2",
    .gguf = {"gpt2"},
    .model_types = {"gpt2"},
    .tensors = tensors,
    .tensor_prefixes = {"transformer.", ""},
    .numbers = numbers,
    .config_prefixes = {""},
    .gguf_norm_eps = "attention.layer_norm_epsilon",
    .activations = {"gelu_new", "gelu_pytorch_tanh"},
    .activation_key = "activation_function",
    .activation = SFA_ACT_GELU_TANH,
    .layer_norm = true,
    .biased = true,
    .conv1d = true,
};
