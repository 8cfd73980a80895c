/* model/families.h: what distinguishes one model family from another, as data. family_<name>.c hold one table each. */
#ifndef SFA_FAMILIES_H
#define SFA_FAMILIES_H

#include "device/device.h"

#include <stdbool.h>

/* The tensors of a decoder. Biases carry the name of their weight, ".bias" instead of ".weight". */
typedef enum sfa_role {
  SFA_ROLE_EMBEDDING,
  SFA_ROLE_POSITIONS, /* learned positions, added to the embedding */
  SFA_ROLE_FINAL_NORM,
  SFA_ROLE_HEAD, /* absent: the embedding ("tied") */
  SFA_ROLE_ATTENTION_NORM,
  SFA_ROLE_Q,
  SFA_ROLE_K,
  SFA_ROLE_V,
  SFA_ROLE_QKV, /* the three in one */
  SFA_ROLE_Q_NORM,
  SFA_ROLE_K_NORM,
  SFA_ROLE_O,
  SFA_ROLE_POST_ATTENTION_NORM, /* of what attention adds to the stream */
  SFA_ROLE_FFN_NORM,
  SFA_ROLE_GATE,
  SFA_ROLE_UP,
  SFA_ROLE_DOWN,
  SFA_ROLE_POST_FFN_NORM,
  SFA_ROLE_COUNT
} sfa_role;

/* Numbers that every model file states in some way. */
typedef enum sfa_number {
  SFA_NUMBER_LAYERS,
  SFA_NUMBER_HIDDEN,
  SFA_NUMBER_FFN,
  SFA_NUMBER_HEADS,
  SFA_NUMBER_KV_HEADS,
  SFA_NUMBER_HEAD_DIM,
  SFA_NUMBER_VALUE_DIM, /* of a head; absent: head_dim */
  SFA_NUMBER_CONTEXT,
  SFA_NUMBER_NORM_EPS,
  SFA_NUMBER_WINDOW,
  SFA_NUMBER_COUNT
} sfa_number;

typedef struct sfa_family {
  const char *name;
  const char *gguf[3];        /* general.architecture; NULL ends */
  const char *model_types[4]; /* config.json's model_type; NULL ends */

  /* Names by role in Hugging Face files, without prefix and ".weight"; "*" is the layer. A role that is NULL here does not exist in this
   * family, in GGUF neither. */
  const char *const *tensors;
  const char *tensor_prefixes[4]; /* tried on the embedding; NULL ends, "" is a prefix too */
  const char *const *numbers;     /* keys in config.json by sfa_number; NULL: not there */
  const char *config_prefixes[2]; /* tried on the number of layers */
  const char *gguf_norm_eps;      /* key without the architecture */
  const char *activations[3];     /* what config.json may call the activation; NULL ends */
  const char *activation_key;

  sfa_activation activation;
  bool layer_norm;          /* LayerNorm with bias, else RMSNorm */
  bool biased;              /* every linear layer has a bias, else those that the file has */
  bool conv1d;              /* Hugging Face stores weights as [in][out] */
  bool norm_plus_one;       /* Hugging Face stores norm weights minus 1 */
  bool scale_embedding;     /* by sqrt(hidden_dim) */
  bool gguf_interleaved;    /* GGUF rotates pairs (2p, 2p + 1): q and k were permuted for it */
  bool local_pattern;       /* sliding and global layers alternate by a pattern */
  double default_rope_base; /* 0: no rotary positions */
  double default_local_base;
  int32_t default_pattern;      /* every so many-th layer is global */
  int32_t deep_scale_by_hidden; /* a model of so many layers scales scores by hidden_dim / n_heads instead of head_dim (GGUF lacks a key) */
} sfa_family;

extern const sfa_family sfa_family_llama, sfa_family_qwen2, sfa_family_qwen3, sfa_family_gpt2, sfa_family_gemma3;

/* NULL where no family has that name; known: a text that lists those there are. */
const sfa_family *sfa_family_of_gguf(const char *architecture);
const sfa_family *sfa_family_of_model_type(const char *model_type);
extern const char sfa_families_known[];

extern const char *const sfa_gguf_tensors[SFA_ROLE_COUNT];
extern const char *const sfa_gguf_numbers[SFA_NUMBER_COUNT]; /* after "<architecture>." */
/* Names that Llama, Qwen and Gemma share in config.json. */
extern const char *const sfa_config_numbers[SFA_NUMBER_COUNT];

#endif
