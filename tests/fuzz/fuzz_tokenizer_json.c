/* The input is a tokenizer.json. */
#include "fuzz_case.h"

#include "text/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  sfa_tokenizer *tokenizer;
  fuzz_write("tokenizer.json", data, bytes);
  sfa_status status = sfa_tokenizer_from_json(fuzz_context(), fuzz_path("tokenizer.json"), &tokenizer);
  fuzz_tokenizer(status, tokenizer);
  return 0;
}
