/* The kernels in AVX2 with FMA and F16C: the shared texts over simd_avx2.h. */
#include "kernel/kernel_table.h"
#include "kernel/simd_avx2.h"
#include "kernel/stored_rows.h"
#include <math.h>
#include <string.h>

#include "kernel/convert_tmpl.c"
#include "kernel/drop_tmpl.c"
#include "kernel/expand_tmpl.c"
#include "kernel/lists_tmpl.c"
#include "kernel/norm_tmpl.c"
#include "kernel/score_tmpl.c"
#include "kernel/softmax_tmpl.c"
#include "kernel/topk_tmpl.c"
#include "kernel/value_tmpl.c"

#include "kernel/backward_tmpl.c"

#include "kernel/keys_avx2.c"
#include "kernel/keys_tmpl.c"
#include "kernel/value_keys_tmpl.c"

static void topk_bf16(int64_t n_rows, const uint16_t *x, int64_t row_stride, int32_t D, int32_t K, uint8_t *ids, float *values) {
  topk_converted(n_rows, x, row_stride, D, K, ids, values);
}

#define SFA_SLOT(name) .name = name,
const sfa_kernels sfa_kernels_avx2 = {
    .isa = SFA_ISA_AVX2,
#include "kernel/kernel_list.def"
};
