/* code/code.h: dense rows to stored rows (top-k codes or rounded rows), and codes to other formats. docs/MATH.md 1. */
#ifndef SFA_CODE_H
#define SFA_CODE_H

#include "backend/backend.h"
#include "kernel/kernel.h"

#include <string.h>

/* Contract: sfa_backend.encode. */
size_t sfa_code_scratch_bytes(const sfa_row_format *format, int64_t n_rows);
int64_t sfa_code_rows(const sfa_kernels *kernels, int64_t n_rows, const sfa_row_source *x, const sfa_row_format *format,
                      const sfa_row_store *out, void *scratch, int64_t *stage_ns);

/* Rows x [n][dim] as f32, normed and turned. Rows lie `line_step` (1, or 0: all of one token) lines of the rope apart. */
void sfa_code_load(const sfa_kernels *kernels, int64_t n_rows, const sfa_row_source *x, int32_t dim, int64_t line_step, float *out);

/* Whether kernels->topk_bf16 takes the rows as they are. */
static inline bool sfa_code_from_bf16(const sfa_row_source *x, int32_t dim) {
  return x->dtype == SFA_BF16 && !x->rope && !x->norm && dim <= 256;
}

/* Codes as dense rows: rows [n_rows][D] become zero but for values [n_rows][K] at ids [n_rows][K]. */
static inline void sfa_code_write_out(int64_t n_rows, int32_t D, int32_t K, const void *ids, const float *values, float *rows) {
  memset(rows, 0, (size_t)n_rows * (size_t)D * sizeof *rows);
  for (int64_t i = 0; i < n_rows; i++)
    for (int64_t at = i * K; at < (i + 1) * K; at++)
      rows[i * D + sfa_id_at(ids, D, at)] = values[at];
}

/* Value u of a row in f32, and its feature. */
float sfa_code_value(const sfa_codes *codes, int64_t row, int32_t u);
int32_t sfa_code_id(const sfa_codes *codes, int64_t row, int32_t u);
/* -1, or the first row with an id that is not a feature (>= head_dim) or not above the one before it. */
int64_t sfa_code_bad_row(const sfa_codes *codes);

/* Public contracts in sfa/attention.h; codes are checked. */
void sfa_code_densify(const sfa_codes *codes, float *out, int64_t row_stride);
void sfa_code_csr(const sfa_codes *codes, int64_t *row_ptr, int32_t *col, float *val);
void sfa_code_csc(const sfa_codes *codes, int64_t *col_ptr, int64_t *row, float *val);

#endif
