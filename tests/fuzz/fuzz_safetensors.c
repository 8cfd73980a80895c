/* The input is a directory: config.json, then after a line "%%" model.safetensors; or with two such lines config.json,
 * model.safetensors.index.json and a part called "part". */
#include "fuzz_case.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  const uint8_t *end = data + bytes, *rest, *last;
  const uint8_t *first = fuzz_find_line(data, bytes, &rest);
  if (!first)
    return 0;
  const uint8_t *second = fuzz_find_line(rest, (size_t)(end - rest), &last);
  fuzz_write("config.json", data, (size_t)(first - data));
  if (second) {
    fuzz_remove("model.safetensors");
    fuzz_write("model.safetensors.index.json", rest, (size_t)(second - rest));
    fuzz_write("part", last, (size_t)(end - last));
  } else {
    fuzz_write("model.safetensors", rest, (size_t)(end - rest));
  }
  sfa_weights_close(fuzz_open(fuzz_path("")));
  return 0;
}
