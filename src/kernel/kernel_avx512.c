/* The kernels in AVX-512 (F, BW, DQ, VL, CD): the shared texts over simd_avx512.h. */
#include "kernel/kernel_table.h"
#include "kernel/simd_avx512.h"
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

#include "kernel/lookup_avx512.h"

#include "kernel/topk_avx512.c"

#include "kernel/keys_avx512.c"
#include "kernel/keys_tmpl.c"
#include "kernel/value_keys_tmpl.c"

#define SFA_SLOT(name) .name = name,
const sfa_kernels sfa_kernels_avx512 = {
    .isa = SFA_ISA_AVX512,
#include "kernel/kernel_list.def"
};
