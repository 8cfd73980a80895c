/* The input is a tokenizer.json, and after a line "%%" the tokenizer_config.json beside it. */
#include "fuzz_case.h"

#include "text/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  const uint8_t *rest, *line = fuzz_find_line(data, bytes, &rest);
  fuzz_write("tokenizer.json", data, line ? (size_t)(line - data) : bytes);
  fuzz_remove("tokenizer_config.json");
  if (line)
    fuzz_write("tokenizer_config.json", rest, (size_t)(data + bytes - rest));
  sfa_tokenizer *tokenizer;
  sfa_status status = sfa_tokenizer_from_json(fuzz_context(), fuzz_path("tokenizer.json"), &tokenizer);
  fuzz_tokenizer(status, tokenizer);
  return 0;
}
