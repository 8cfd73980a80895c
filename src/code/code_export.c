/* Codes -> dense rows, CSR and CSC: for tests, other libraries and the eye. None of this is on the attention path. */
#include "code/code.h"

#include "base/half.h"

#include <string.h>

int32_t sfa_code_id(const sfa_codes *codes, int64_t row, int32_t u) { return sfa_id_at(codes->ids, codes->head_dim, row * codes->k + u); }

float sfa_code_value(const sfa_codes *codes, int64_t row, int32_t u) {
  int64_t at = row * codes->k + u;
  switch (codes->dtype) {
  case SFA_I8: return (float)((const int8_t *)codes->values)[at] * sfa_f32_from_f16(codes->scales[row]);
  case SFA_F16: return sfa_f32_from_f16(((const uint16_t *)codes->values)[at]);
  case SFA_BF16: return sfa_f32_from_bf16(((const uint16_t *)codes->values)[at]);
  default: return ((const float *)codes->values)[at];
  }
}

/* Runs over all ids of a call's codes: first as one long row, which compilers make vectors of. There the ids fall from the end of a row to
 * the beginning of the next as well; so the rows are fine if that is the only kind of fall. */
#define FIND_BAD_ROW(type)                                                                                                                 \
  do {                                                                                                                                     \
    const type *all = codes->ids;                                                                                                          \
    int64_t n = codes->n_rows, k = codes->k, n_falls = 0, n_bad = 0;                                                                       \
    for (int64_t from = 1; from < n * k; from += 128) { /* few enough for a count in a byte */                                             \
      int64_t end = from + 128 < n * k ? from + 128 : n * k;                                                                               \
      uint8_t falls = 0;                                                                                                                   \
      for (int64_t i = from; i < end; i++)                                                                                                 \
        falls = (uint8_t)(falls + (all[i] <= all[i - 1]));                                                                                 \
      n_falls += falls;                                                                                                                    \
    }                                                                                                                                      \
    for (int64_t row = 0; row < n; row++) {                                                                                                \
      n_falls -= row > 0 && all[row * k] <= all[row * k - 1];                                                                              \
      n_bad += all[row * k + k - 1] >= codes->head_dim;                                                                                    \
    }                                                                                                                                      \
    for (int64_t row = 0; row < n && n_falls + n_bad > 0; row++) {                                                                         \
      const type *ids = all + row * k;                                                                                                     \
      bool bad = ids[k - 1] >= codes->head_dim;                                                                                            \
      for (int64_t u = 1; u < k; u++)                                                                                                      \
        bad |= ids[u] <= ids[u - 1];                                                                                                       \
      if (bad)                                                                                                                             \
        return row;                                                                                                                        \
    }                                                                                                                                      \
  } while (0)

int64_t sfa_code_bad_row(const sfa_codes *codes) {
  if (sfa_id_bytes(codes->head_dim) == 1) {
    FIND_BAD_ROW(uint8_t);
  } else {
    FIND_BAD_ROW(uint16_t);
  }
  return -1;
}

void sfa_code_densify(const sfa_codes *codes, float *out, int64_t row_stride) {
  for (int64_t row = 0; row < codes->n_rows; row++) {
    float *to = out + row * row_stride;
    memset(to, 0, (size_t)codes->head_dim * sizeof(float));
    for (int32_t u = 0; u < codes->k; u++)
      to[sfa_code_id(codes, row, u)] = sfa_code_value(codes, row, u);
  }
}

void sfa_code_csr(const sfa_codes *codes, int64_t *row_ptr, int32_t *col, float *val) {
  row_ptr[0] = 0;
  for (int64_t row = 0; row < codes->n_rows; row++) {
    for (int32_t u = 0; u < codes->k; u++) {
      col[row * codes->k + u] = sfa_code_id(codes, row, u);
      val[row * codes->k + u] = sfa_code_value(codes, row, u);
    }
    row_ptr[row + 1] = (row + 1) * codes->k;
  }
}

void sfa_code_csc(const sfa_codes *codes, int64_t *col_ptr, int64_t *row_out, float *val) {
  int32_t D = codes->head_dim;
  memset(col_ptr, 0, ((size_t)D + 1) * sizeof *col_ptr);
  for (int64_t row = 0; row < codes->n_rows; row++)
    for (int32_t u = 0; u < codes->k; u++)
      col_ptr[sfa_code_id(codes, row, u) + 1]++;
  for (int32_t c = 0; c < D; c++)
    col_ptr[c + 1] += col_ptr[c];
  for (int64_t row = 0; row < codes->n_rows; row++) /* col_ptr[c] is the next free place of column c, so it ends at c's end, */
    for (int32_t u = 0; u < codes->k; u++) {
      int64_t at = col_ptr[sfa_code_id(codes, row, u)]++;
      row_out[at] = row;
      val[at] = sfa_code_value(codes, row, u);
    }
  memmove(col_ptr + 1, col_ptr, (size_t)D * sizeof *col_ptr); /* which is where c + 1 begins */
  col_ptr[0] = 0;
}
