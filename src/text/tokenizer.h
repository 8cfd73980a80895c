/* text/tokenizer.h: building a tokenizer from the three places it may come from. The public calls are in sfa/engine.h. */
#ifndef SFA_TOKENIZER_H
#define SFA_TOKENIZER_H

#include <sfa/engine.h>

#include "file/weights.h"

/* From GGUF metadata (tokenizer.ggml.*) of open weights; nothing of the weights is kept. SFA_ERROR_UNSUPPORTED names the model kind. */
sfa_status sfa_tokenizer_from_gguf(sfa_context *ctx, const sfa_weights *weights, sfa_tokenizer **tokenizer);
/* From tokenizer.json; tokenizer_config.json and generation_config.json beside it are read where they exist (BOS, EOS, chat template). */
sfa_status sfa_tokenizer_from_json(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer);
/* From llama2.c's tokenizer.bin; its vocabulary size is found from the file. */
sfa_status sfa_tokenizer_from_llama2c(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer);

#endif
