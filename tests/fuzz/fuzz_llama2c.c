/* The input is a llama2.c model. It has no magic number but its exact size, which a fuzzer would hardly ever hit: where the sizes in the
 * header are small, the file is also tried at the length that they ask for. */
#include "fuzz_case.h"

#include <string.h>
#include <unistd.h>

static size_t length_by_header(const uint8_t *data) {
  int32_t h[7];
  memcpy(h, data, sizeof h);
  for (int i = 0; i < 7; i++)
    if (h[i] == 0 || h[i] < -64 || h[i] > 64 || (h[i] < 0 && i != 5))
      return 0;
  const size_t dim = (size_t)h[0], hidden = (size_t)h[1], layers = (size_t)h[2], head_dim = dim / (size_t)h[3],
               kv = (size_t)h[4] * head_dim;
  const size_t vocab = (size_t)(h[5] < 0 ? -h[5] : h[5]), half = head_dim / 2;
  size_t floats = vocab * dim + layers * (2 * dim + 2 * dim * dim + 2 * kv * dim + 3 * dim * hidden) + dim + 2 * (size_t)h[6] * half;
  return sizeof h + 4 * (h[5] < 0 ? floats + vocab * dim : floats);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  fuzz_write("model.bin", data, bytes);
  sfa_weights_close(fuzz_open(fuzz_path("model.bin")));
  const size_t fitted = bytes >= 28 ? length_by_header(data) : 0;
  if (fitted && truncate(fuzz_path("model.bin"), (off_t)fitted) == 0)
    sfa_weights_close(fuzz_open(fuzz_path("model.bin")));
  return 0;
}
