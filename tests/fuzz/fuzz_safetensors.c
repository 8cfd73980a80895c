/* The input is a directory: config.json, then after a line "%%" model.safetensors; or with two such lines config.json,
 * model.safetensors.index.json and a part called "part". */
#include "fuzz_case.h"

#include <string.h>

static const char separator[] = "\n%%\n";
enum { SEPARATOR_BYTES = sizeof separator - 1 };

static const uint8_t *find_separator(const uint8_t *data, size_t bytes) { return memmem(data, bytes, separator, SEPARATOR_BYTES); }

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  const uint8_t *end = data + bytes, *first = find_separator(data, bytes);
  if (!first)
    return 0;
  const uint8_t *rest = first + SEPARATOR_BYTES, *second = find_separator(rest, (size_t)(end - rest));
  fuzz_write("config.json", data, (size_t)(first - data));
  if (second) {
    fuzz_remove("model.safetensors");
    fuzz_write("model.safetensors.index.json", rest, (size_t)(second - rest));
    rest = second + SEPARATOR_BYTES;
  }
  fuzz_write(second ? "part" : "model.safetensors", rest, (size_t)(end - rest));
  sfa_weights_close(fuzz_open(fuzz_path("")));
  return 0;
}
