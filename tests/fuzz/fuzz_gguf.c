/* The input is a GGUF file: its tensors, its metadata, and the tokenizer that it may hold. */
#include "fuzz_case.h"

#include "text/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  fuzz_write("model.gguf", data, bytes);
  sfa_weights *weights = fuzz_open(fuzz_path("model.gguf"));
  if (weights) {
    sfa_tokenizer *tokenizer;
    sfa_status status = sfa_tokenizer_from_gguf(fuzz_context(), weights, &tokenizer);
    sfa_weights_close(weights);
    fuzz_tokenizer(status, tokenizer);
  }
  return 0;
}
