/* The input is llama2.c's tokenizer.bin. */
#include "fuzz_case.h"

#include "text/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  sfa_tokenizer *tokenizer;
  fuzz_write("tokenizer.bin", data, bytes);
  sfa_status status = sfa_tokenizer_from_llama2c(fuzz_context(), fuzz_path("tokenizer.bin"), &tokenizer);
  fuzz_tokenizer(status, tokenizer);
  return 0;
}
