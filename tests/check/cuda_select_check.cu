/* cuda_select_check: select and gather of the CUDA backend against the CPU's own functions on the same input: every byte must agree.
 * Prints what differs, then the time of a million rows. Exit status 1 if anything differed.
 *
 *     cuda_select_check [--check-only [FIRST [LAST]] | --time-only]     of 720 cases the FIRST (0) to the LAST
 */
extern "C" {
#include "base/half.h"
#include "code/code.h"
}
#include "cuda/cuda_stages.h"
#include "cuda_check_tools.cuh"

static void *device_memory(size_t bytes, const void *from) { return device_copy(bytes, from, 0x5a); }

/* What one case is. */
typedef struct check_case {
  const char *name;
  int32_t n_sequences, heads, dim, k, pages;
  sfa_dtype x, store, rows;                                /* store, rows: SFA_DTYPE_DEFAULT for none */
  int32_t n_pairs, interleaved, norm, two_of_four, values; /* values: 0 normal, 1 few levels, 2 odd ones */
  int32_t unaligned, rows_f32;
} check_case;

static float odd_value(int32_t row) {
  static const float odd[] = {0.0f, -0.0f, 1e-40f, -1e-40f, 1.0f, -1.0f, 3.5f, 65504.0f, 1e-3f, 6e-8f};
  const uint32_t draw = next_bits() % 64;
  if (row % 5 == 3 && draw == 0)
    return INFINITY;
  if (row % 5 == 4 && draw < 2)
    return NAN;
  if (row % 7 == 6)
    return draw & 1 ? 0.0f : -0.0f;
  return odd[draw % 10];
}

/* The row as the CPU selects from it. */
static void reference_row(const sfa_kernels *kernels, const check_case *c, const float *x, const float *weight, const float *cos,
                          const float *sin, int64_t line, float *out) {
  memcpy(out, x, (size_t)c->dim * sizeof *out);
  if (c->norm) { /* device/rows_tmpl.c */
    float lanes[16] = {0};
    for (int32_t f = 0; f < c->dim; f++)
      lanes[f % 16] = fmaf(x[f], x[f], lanes[f % 16]);
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; i++)
        lanes[i] += lanes[i + width];
    const float factor = 1.0f / sqrtf(lanes[0] / (float)c->dim + 1e-6f);
    for (int32_t f = 0; f < c->dim; f++)
      out[f] = x[f] * factor * weight[f];
  }
  if (c->n_pairs)
    kernels->rotate_rows(1, c->dim, out, c->dim, cos + line * c->n_pairs, sin + line * c->n_pairs, 0, 2 * c->n_pairs, c->interleaved, out,
                         c->dim);
  for (int32_t four = 0; c->two_of_four && four < c->dim; four += 4) {
    bool loses[4];
    for (int i = 0; i < 4; i++) {
      int n_before = 0;
      for (int j = 0; j < 4; j++) {
        const uint32_t a = sfa_bits_of(out[four + j]) & 0x7fffffffu, b = sfa_bits_of(out[four + i]) & 0x7fffffffu;
        n_before += a > b || (a == b && j < i);
      }
      loses[i] = n_before >= 2;
    }
    for (int i = 0; i < 4; i++)
      if (loses[i])
        out[four + i] = 0;
  }
}

static int64_t n_differ;

/* f32, or the upper half of one: NaN is NaN, whatever its bits. */
static bool both_nan(const char *what, uint32_t a, uint32_t b) {
  const bool f32 = strstr(what, "f32"), bf16 = strstr(what, "bf16");
  return (f32 && isnan(sfa_float_of(a)) && isnan(sfa_float_of(b))) ||
         (bf16 && isnan(sfa_f32_from_bf16((uint16_t)a)) && isnan(sfa_f32_from_bf16((uint16_t)b)));
}

static void compare(const check_case *c, const char *what, const void *got, const void *want, size_t element, int64_t n, int64_t row) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t a = 0, b = 0;
    memcpy(&a, (const char *)got + i * element, element);
    memcpy(&b, (const char *)want + i * element, element);
    if (a == b || both_nan(what, a, b))
      continue;
    if (n_differ++ < 40)
      printf("%s: %s of row %lld, element %lld: %08x, expected %08x\n", c->name, what, (long long)row, (long long)i, a, b);
    return;
  }
}

static void run_case(const sfa_kernels *kernels, const check_case *c) {
  const int64_t differ_before = n_differ;
  const int32_t D = c->dim, H = c->heads, B = c->n_sequences, k = c->k ? c->k : D;
  const int64_t longest = D > 2000 ? 9 : 150;
  int32_t cu[17] = {0}, first_token[16], first_line[16];
  for (int32_t b = 0; b < B; b++) {
    cu[b + 1] = cu[b] + (B == 1 ? (int32_t)longest : (int32_t)(next_bits() % longest) * (b != 1)); /* the second one is empty */
    first_token[b] = b == 0 ? 0 : (int32_t)(next_bits() % 200);
    first_line[b] = (int32_t)(next_bits() % 100);
  }
  const int64_t tokens = cu[B], n_rows = tokens * H, lines = 300 + longest, pad = c->unaligned ? 1 : 0;
  const int64_t row_stride = D + (c->unaligned ? 3 : 8), token_stride = row_stride * H;
  float *x = (float *)malloc((size_t)n_rows * D * 4 + 4);
  unsigned char *raw = (unsigned char *)calloc((size_t)(n_rows * row_stride + 8), 4);
  for (int64_t row = 0; row < n_rows; row++)
    for (int32_t f = 0; f < D; f++) {
      float v = c->values == 0 ? normal() : c->values == 1 ? (float)((int)(next_bits() % 9) - 4) * 0.25f : odd_value((int32_t)row);
      if (c->x == SFA_BF16)
        v = sfa_f32_from_bf16(sfa_bf16_from_f32(v));
      x[row * D + f] = v;
      const int64_t at = pad + row * row_stride + f;
      if (c->x == SFA_BF16)
        ((uint16_t *)raw)[at] = sfa_bf16_from_f32(v);
      else
        ((float *)raw)[at] = v;
    }
  float *weight = (float *)malloc((size_t)D * 4), *cos_of = (float *)malloc((size_t)lines * D * 4),
        *sin_of = (float *)malloc((size_t)lines * D * 4);
  for (int32_t f = 0; f < D; f++)
    weight[f] = 1 + 0.1f * normal();
  for (int64_t i = 0; i < lines * c->n_pairs; i++) {
    const double angle = 6.28 * uniform();
    cos_of[i] = (float)cos(angle), sin_of[i] = (float)sin(angle);
  }

  sfa_cuda_select s = {};
  s.tokens.n_sequences = B, s.tokens.max_seqlen = longest, s.tokens.cu_seqlens = (int32_t *)device_memory(sizeof cu, cu);
  s.n_heads = H, s.dim = D, s.k = c->k;
  void *raw_at = device_memory((size_t)(n_rows * row_stride + 8) * 4, raw);
  s.x.data = (char *)raw_at + pad * (c->x == SFA_BF16 ? 2 : 4);
  s.x.dtype = c->x, s.x.token_stride = token_stride, s.x.head_stride = row_stride;
  if (c->norm)
    s.norm_weight = (float *)device_memory((size_t)D * 4, weight), s.norm_eps = 1e-6f;
  if (c->n_pairs) {
    s.rope_cos = (float *)device_memory((size_t)lines * D * 4, cos_of), s.rope_sin = (float *)device_memory((size_t)lines * D * 4, sin_of);
    s.n_pairs = c->n_pairs, s.rope_interleaved = c->interleaved;
    s.first_line = (int32_t *)device_memory(sizeof first_line, first_line);
  }
  s.two_of_four = c->two_of_four;

  /* the store: a page is [head][ids, values, scales][64 rows], as a cache has it; without pages every sequence has `max_pages` of them in a
   * row */
  const sfa_row_format format = {D, c->k, c->store};
  const int32_t width = sfa_row_width(&format), max_pages = 8;
  const size_t ids_bytes = sfa_align64(64 * sfa_row_ids_bytes(&format)), values_bytes = sfa_align64(64 * sfa_row_values_bytes(&format));
  const size_t head_bytes = ids_bytes + values_bytes + 128, page_bytes = 64 + H * head_bytes, store_bytes = page_bytes * B * max_pages;
  unsigned char *store = NULL, *pages[128], *got = (unsigned char *)malloc(store_bytes);
  int32_t page_of[128];
  if (c->store) {
    store = (unsigned char *)device_memory(store_bytes, NULL);
    CUDA_TRY(cudaMemset(store, 0, store_bytes));  /* tokens before the first one are gathered as well */
    for (int32_t p = 0; p < B * max_pages; p++) { /* pages of a table in any order */
      page_of[p] = c->pages ? B * max_pages - 1 - p : p;
      pages[p] = store + page_of[p] * page_bytes;
    }
    s.has_store = 1;
    s.store.format = format;
    sfa_kv_stream stream = {store, 64, head_bytes, page_bytes, c->k};
    if (c->pages) {
      s.store.pages = (unsigned char *const *)device_memory(sizeof pages, pages), s.store.max_pages = max_pages;
      stream.base = NULL, stream.tile_bytes = 0;
    } else
      s.store.sequence_bytes = (int64_t)(page_bytes * max_pages);
    s.store.ids = stream;
    stream.offset += ids_bytes, stream.row_stride = width;
    s.store.values = stream;
    stream.offset += values_bytes, stream.row_stride = 1;
    s.store.scales = stream;
    s.first_token = (int32_t *)device_memory(sizeof first_token, first_token);
  }
  const int64_t words = (D + 31) / 32;
  if (c->rows) {
    s.rows.data = device_memory((size_t)n_rows * D * 2 + 64, NULL);
    s.rows.dtype = c->rows, s.rows.token_stride = (int64_t)H * D, s.rows.head_stride = D;
    s.row_scales = (float *)device_memory((size_t)n_rows * 4 + 4, NULL);
    if (c->rows_f32)
      s.rows_f32 = (float *)device_memory((size_t)n_rows * D * 4 + 4, NULL);
    s.support = (uint32_t *)device_memory((size_t)(n_rows * words) * 4 + 4, NULL);
  }
  const int32_t zero = 0;
  s.n_bad = (int32_t *)device_memory(4, &zero);
  const char *text = sfa_cuda_select_run(&s, NULL);
  if (text) {
    printf("%s: %s\n", c->name, text);
    exit(2);
  }
  CUDA_TRY(cudaDeviceSynchronize());
  float *rows_f32 = (float *)malloc((size_t)n_rows * D * 4 + 4), *row_scales = (float *)malloc((size_t)n_rows * 4 + 4);
  unsigned char *rows = (unsigned char *)malloc((size_t)n_rows * D * 2 + 4);
  uint32_t *support = (uint32_t *)malloc((size_t)(n_rows * words) * 4 + 4);
  if (c->store)
    CUDA_TRY(cudaMemcpy(got, store, store_bytes, cudaMemcpyDeviceToHost));
  if (c->rows) {
    CUDA_TRY(cudaMemcpy(rows, s.rows.data, (size_t)n_rows * D * 2, cudaMemcpyDeviceToHost));
    if (c->rows_f32)
      CUDA_TRY(cudaMemcpy(rows_f32, s.rows_f32, (size_t)n_rows * D * 4, cudaMemcpyDeviceToHost));
    CUDA_TRY(cudaMemcpy(row_scales, s.row_scales, (size_t)n_rows * 4, cudaMemcpyDeviceToHost));
    CUDA_TRY(cudaMemcpy(support, s.support, (size_t)(n_rows * words) * 4, cudaMemcpyDeviceToHost));
  }
  int32_t n_bad = 0;
  CUDA_TRY(cudaMemcpy(&n_bad, s.n_bad, 4, cudaMemcpyDeviceToHost));

  /* gathered back: keys of each sequence from token 0 to its end */
  int32_t n_keys[16], max_keys = 0;
  unsigned char *gathered = NULL;
  float *gathered_scales = NULL;
  for (int32_t b = 0; b < B; b++) {
    n_keys[b] = first_token[b] + cu[b + 1] - cu[b];
    max_keys = n_keys[b] > max_keys ? n_keys[b] : max_keys;
  }
#ifndef WITHOUT_GATHER
  if (c->store && c->rows) {
    sfa_cuda_gather g = {};
    g.store = s.store, g.n_sequences = B, g.n_heads = H, g.n_keys = (int32_t *)device_memory(sizeof n_keys, n_keys), g.max_keys = max_keys;
    const size_t n = (size_t)B * max_keys * H;
    g.rows.data = device_memory(n * D * 2 + 64, NULL), g.rows.dtype = c->rows, g.rows.token_stride = (int64_t)H * D, g.rows.head_stride = D;
    g.row_scales = (float *)device_memory(n * 4, NULL);
    text = sfa_cuda_gather_run(&g, NULL);
    if (text) {
      printf("%s: gather: %s\n", c->name, text);
      exit(2);
    }
    CUDA_TRY(cudaDeviceSynchronize());
    gathered = (unsigned char *)malloc(n * D * 2), gathered_scales = (float *)malloc(n * 4);
    CUDA_TRY(cudaMemcpy(gathered, g.rows.data, n * D * 2, cudaMemcpyDeviceToHost));
    CUDA_TRY(cudaMemcpy(gathered_scales, g.row_scales, n * 4, cudaMemcpyDeviceToHost));
    cudaFree((void *)g.n_keys), cudaFree(g.rows.data), cudaFree(g.row_scales);
  }
#endif

  float *dense = (float *)malloc((size_t)D * 4), *kept = (float *)malloc((size_t)D * 4), *whole = (float *)malloc((size_t)D * 4);
  unsigned char *ids = (unsigned char *)malloc((size_t)D * 2), *values = (unsigned char *)malloc((size_t)D * 4);
  unsigned char *row_out = (unsigned char *)malloc((size_t)D * 2);
  uint32_t *bits = (uint32_t *)malloc((size_t)words * 4);
  const sfa_row_format plain = {D, k, SFA_F32};
  const sfa_row_format stored = {D, c->k, c->store ? c->store : SFA_F32};
  void *scratch = malloc(sfa_code_scratch_bytes(&plain, 1) + sfa_code_scratch_bytes(&stored, 1));
  int32_t bad_expected = 0;
  for (int32_t b = 0; b < B; b++)
    for (int64_t t = 0; t < cu[b + 1] - cu[b]; t++)
      for (int32_t h = 0; h < H; h++) {
        const int64_t token = cu[b] + t, row = token * H + h;
        reference_row(kernels, c, x + row * D, weight, cos_of, sin_of, first_line[b] + t, dense);
        const sfa_row_source source = {dense, SFA_F32, D, NULL, 0};
        uint16_t scale = 0;
        const sfa_row_store to = {ids, values, &scale};
        const bool bad = sfa_code_rows(kernels, 1, &source, &stored, &to, scratch, NULL) != 0;
        bad_expected += bad;
        if (bad)
          continue;
        if (c->store) {
          const int64_t at = first_token[b] + t;
          const unsigned char *block = got + page_of[b * max_pages + at / 64] * page_bytes + 64 + h * head_bytes;
          const size_t id_bytes = sfa_id_bytes(D);
          if (c->k)
            compare(c, "ids", block + at % 64 * c->k * id_bytes, ids, id_bytes, c->k, row);
          compare(c, "values", block + ids_bytes + at % 64 * sfa_row_values_bytes(&format), values, 1,
                  (int64_t)sfa_row_values_bytes(&format), row);
          if (sfa_has_scales(c->store))
            compare(c, "scale", block + ids_bytes + values_bytes + at % 64 * 2, &scale, 2, 1, row);
        }
        if (!c->rows)
          continue;
        /* the rows that were stored, dense: numbers, of int8 and int4 whole ones, and a unit */
        const bool is_whole = c->store == SFA_I8 || c->store == SFA_I4;
        const float unit = c->store && sfa_has_scales(c->store) ? sfa_f32_from_f16(scale) : 1.0f;
        kernels->load_rows(1, width * (c->store != 0) + D * (c->store == 0 && c->k == 0) + k * (c->store == 0 && c->k != 0), stored.dtype,
                           values, width, NULL, kept, D);
        for (int32_t f = 0; f < D; f++)
          whole[f] = c->k ? 0.0f : kept[f];
        memset(bits, 0, (size_t)words * 4);
        for (int32_t u = 0; u < (c->k ? c->k : D); u++) {
          const int32_t f = c->k ? sfa_id_at(ids, D, u) : u;
          if (c->k)
            whole[f] = kept[u];
          bits[f / 32] |= 1u << f % 32;
        }
        compare(c, "support", support + row * words, bits, 4, words, row);
        float scale_f32 = unit;
        for (int32_t f = 0; f < D; f++)
          dense[f] = whole[f] * unit;
        if (c->rows_f32 && unit == unit)
          compare(c, "rows_f32", rows_f32 + row * D, dense, 4, D, row);
        const int64_t key = ((int64_t)b * max_keys + first_token[b] + t) * H + h;
        if (c->rows == SFA_BF16) {
          if (unit == unit) {
            for (int32_t f = 0; f < D; f++)
              ((uint16_t *)row_out)[f] = sfa_bf16_from_f32(dense[f]);
            compare(c, "bf16 rows", rows + row * D * 2, row_out, 2, D, row);
            if (gathered)
              compare(c, "gathered bf16", gathered + key * D * 2, row_out, 2, D, row);
          } else if ((((const uint16_t *)(void *)rows)[row * D + (c->k ? sfa_id_at(ids, D, 0) : 0)] & 0x7fff) <= 0x7f80)
            n_differ++, printf("%s: row %lld should be NaN\n", c->name, (long long)row);
        } else {
          if (is_whole)
            for (int32_t f = 0; f < D; f++)
              row_out[f] = (unsigned char)(int8_t)whole[f];
          else {
            uint16_t q_scale = 0;
            kernels->quantize_i8(1, D, dense, D, (int8_t *)row_out, D, &q_scale);
            scale_f32 = sfa_f32_from_f16(q_scale);
          }
          compare(c, "int8 rows", rows + row * D, row_out, 1, D, row);
          if (scale_f32 == scale_f32)
            compare(c, "row scale", row_scales + row, &scale_f32, 4, 1, row);
          else if (!isnan(row_scales[row]))
            n_differ++, printf("%s: scale of row %lld should be NaN\n", c->name, (long long)row);
          if (gathered) {
            compare(c, "gathered int8", gathered + key * D, row_out, 1, D, row);
            if (scale_f32 == scale_f32)
              compare(c, "gathered scale", gathered_scales + key, &scale_f32, 4, 1, row);
          }
        }
      }
  if (c->store && n_bad != bad_expected)
    n_differ++, printf("%s: %d bad rows counted, expected %d\n", c->name, n_bad, bad_expected);
  if (n_differ != differ_before)
    printf("DIFFERS %s: D %d k %d H %d B %d x %d store %d rows %d pairs %d/%d norm %d 2:4 %d values %d unaligned %d\n", c->name, D, c->k, H,
           B, c->x, c->store, c->rows, c->n_pairs, c->interleaved, c->norm, c->two_of_four, c->values, c->unaligned);
  free(x), free(raw), free(weight), free(cos_of), free(sin_of), free(got), free(rows_f32), free(row_scales), free(rows), free(support);
  free(dense), free(kept), free(whole), free(ids), free(values), free(row_out), free(bits), free(scratch), free(gathered),
      free(gathered_scales);
  void *device[] = {(void *)s.tokens.cu_seqlens,
                    raw_at,
                    (void *)s.norm_weight,
                    (void *)s.rope_cos,
                    (void *)s.rope_sin,
                    (void *)s.first_line,
                    store,
                    (void *)s.store.pages,
                    (void *)s.first_token,
                    s.rows.data,
                    s.row_scales,
                    s.rows_f32,
                    s.support,
                    s.n_bad};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++)
    cudaFree(device[i]);
}

static void check(const sfa_kernels *kernels, const check_wish *wish) {
  static const int32_t dims[] = {8, 16, 40, 64, 72, 128, 136, 192, 256, 264, 520, 4096};
  static const sfa_dtype stores[] = {SFA_I8, SFA_BF16, SFA_F16, SFA_F32, SFA_I4, SFA_E4M3};
  int32_t n_cases = 0, number = 0;
  for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
    for (int32_t variant = 0; variant < 60; variant++, number++) {
      if (number < wish->first || number > wish->last)
        continue;
      begin_case(number);
      const int32_t D = dims[d];
      const int32_t ks[] = {0, 1, D / 8, 8, D / 4, D / 2, D, 3, 16 <= D ? 16 : 5, D - 1};
      check_case c = {};
      c.name = "select";
      c.dim = D;
      c.k = ks[variant % 10];
      c.heads = 1 + variant % 3;
      c.n_sequences = 1 + variant % 4;
      c.pages = variant / 2 % 2;
      c.x = variant % 2 ? SFA_BF16 : SFA_F32;
      c.store = variant % 11 == 10 ? SFA_DTYPE_DEFAULT : stores[variant / 3 % (c.k ? 4 : 6)];
      c.rows = variant % 4 == 3 ? SFA_I8 : variant % 7 == 6 ? SFA_DTYPE_DEFAULT : SFA_BF16;
      c.norm = variant % 5 == 1;
      c.n_pairs = variant % 6 == 2 ? D / 2 : variant % 6 == 5 ? D / 4 : 0;
      c.interleaved = variant / 6 % 2;
      c.two_of_four = variant % 9 == 4 && c.k > 0 && c.k <= D / 2;
      c.values = c.norm || c.n_pairs ? variant / 12 % 2 : variant / 5 % 3;
      c.unaligned = variant % 13 == 12;
      c.rows_f32 = variant / 4 % 2;
      if (!c.store && !c.rows)
        continue;
      run_case(kernels, &c);
      n_cases++;
    }
  printf("%d cases, %lld rows or counts differ\n", n_cases, (long long)n_differ);
}

static int by_size(const void *a, const void *b) { return *(const float *)a < *(const float *)b ? -1 : 1; }

/* A million rows; x is larger than the L2 from D = 64 on. */
static void time_rows(int32_t D, int32_t k, sfa_dtype x_type, sfa_dtype store, sfa_dtype rows, int32_t heads, int rope, int norm,
                      int support = 0) {
  const int64_t n = 1 << 20, tokens = n / heads;
  const size_t element = x_type == SFA_BF16 ? 2 : 4;
  uint16_t *x = (uint16_t *)malloc((size_t)n * D * element);
  enum { POOL = 1 << 21 };
  float *pool = (float *)malloc(POOL * sizeof *pool);
  for (int32_t i = 0; i < POOL; i++)
    pool[i] = normal();
  for (int64_t row = 0; row < n; row++) {
    const float *from = pool + next_bits() % (POOL - D);
    for (int32_t f = 0; f < D; f++)
      if (element == 2)
        x[row * D + f] = sfa_bf16_from_f32(from[f]);
      else
        ((float *)x)[row * D + f] = from[f];
  }
  free(pool);
  sfa_cuda_select s = {};
  s.tokens.n_sequences = 1, s.tokens.max_seqlen = tokens, s.n_heads = heads, s.dim = D, s.k = k;
  s.x.data = device_memory((size_t)n * D * element, x), s.x.dtype = x_type, s.x.token_stride = (int64_t)heads * D, s.x.head_stride = D;
  float *lines = NULL, *weight = NULL;
  if (rope) {
    lines = (float *)device_memory((size_t)tokens * D / 2 * 4, NULL);
    s.rope_cos = s.rope_sin = lines, s.n_pairs = D / 2;
  }
  if (norm)
    s.norm_weight = weight = (float *)device_memory((size_t)D * 4, NULL), s.norm_eps = 1e-6f;
  void *ids = NULL, *values = NULL, *scales = NULL;
  size_t bytes = (size_t)n * D * element;
  if (store) {
    const size_t value_bytes = sfa_stored_bytes(store, k ? k : D);
    s.has_store = 1;
    s.store.format = (sfa_row_format){D, k, store};
    ids = device_memory((size_t)n * k + 4, NULL), values = device_memory((size_t)n * value_bytes, NULL),
    scales = device_memory((size_t)n * 2, NULL);
    const int64_t width = k ? k : D;
    s.store.ids = (sfa_kv_stream){(unsigned char *)ids, 0, (size_t)k, (size_t)(64 * heads * k), heads * k};
    s.store.values = (sfa_kv_stream){(unsigned char *)values, 0, value_bytes, 64 * heads * value_bytes, heads * width};
    s.store.scales = (sfa_kv_stream){(unsigned char *)scales, 0, 2, (size_t)(128 * heads), heads};
    bytes += (size_t)n * (k + value_bytes + (store == SFA_I8 ? 2 : 0));
  }
  if (rows) {
    s.rows.data = device_memory((size_t)n * D * 2, NULL), s.rows.dtype = rows, s.rows.token_stride = (int64_t)heads * D,
    s.rows.head_stride = D;
    s.row_scales = (float *)device_memory((size_t)n * 4, NULL);
    bytes += (size_t)n * D * (rows == SFA_BF16 ? 2 : 1);
  }
  if (support)
    s.support = (uint32_t *)device_memory((size_t)n * ((D + 31) / 32) * 4, NULL), bytes += (size_t)n * D / 8;
  cudaEvent_t start, stop;
  CUDA_TRY(cudaEventCreate(&start));
  CUDA_TRY(cudaEventCreate(&stop));
  float times[21];
  for (int i = -3; i < 21; i++) {
    CUDA_TRY(cudaEventRecord(start, NULL));
    sfa_cuda_select_run(&s, NULL);
    CUDA_TRY(cudaEventRecord(stop, NULL));
    CUDA_TRY(cudaEventSynchronize(stop));
    if (i >= 0)
      CUDA_TRY(cudaEventElapsedTime(&times[i], start, stop));
  }
  qsort(times, 21, sizeof *times, by_size);
  printf("D %3d k %3d x %s store %d rows %d heads %2d%s%s%s: %.3f ms (%.3f..%.3f), %.0f GB/s, 4.2 TB/s would take %.3f ms\n", D, k,
         element == 2 ? "bf16" : "f32 ", store, rows, heads, rope ? " rope" : "", norm ? " norm" : "", support ? " support" : "", times[10],
         times[2], times[18], (double)bytes / times[10] * 1e-6, (double)bytes / 4.2e9);
  fflush(stdout);
  free(x);
  void *device[] = {s.x.data, ids, values, scales, s.rows.data, s.row_scales, s.support, lines, weight};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++)
    cudaFree(device[i]);
}

int main(int argc, char **argv) {
  const check_wish wish = wish_of(argc, argv);
  const sfa_kernels *kernels = sfa_kernel_select(SFA_ISA_SCALAR);
  int n_devices = 0;
  if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
    printf("no GPU: skipped\n");
    return 77;
  }
  if (wish.cases)
    check(kernels, &wish);
  fflush(stdout);
  if (wish.times) {
    const sfa_dtype none = SFA_DTYPE_DEFAULT;
    time_rows(64, 8, SFA_BF16, SFA_BF16, none, 1, 0, 0);
    time_rows(128, 8, SFA_BF16, SFA_BF16, none, 1, 0, 0);
    time_rows(128, 8, SFA_BF16, SFA_I8, none, 1, 0, 0);
    time_rows(128, 8, SFA_BF16, SFA_I8, none, 8, 0, 0);
    time_rows(256, 8, SFA_BF16, SFA_BF16, none, 1, 0, 0);
    time_rows(128, 16, SFA_BF16, SFA_I8, none, 8, 0, 0);
    time_rows(128, 8, SFA_BF16, none, SFA_BF16, 8, 0, 0);
    time_rows(128, 16, SFA_BF16, SFA_I8, SFA_BF16, 8, 0, 0);
    time_rows(128, 16, SFA_F32, SFA_I8, SFA_BF16, 8, 1, 0);
    time_rows(128, 16, SFA_F32, SFA_I8, SFA_BF16, 8, 1, 1);
    time_rows(64, 16, SFA_F32, SFA_I8, none, 8, 1, 0);
    time_rows(128, 0, SFA_F32, SFA_I8, none, 8, 0, 0);
    time_rows(64, 16, SFA_BF16, none, SFA_BF16, 32, 0, 0, 1);
    time_rows(128, 16, SFA_BF16, none, SFA_BF16, 32, 0, 0, 1);
    time_rows(256, 16, SFA_BF16, none, SFA_BF16, 32, 0, 0, 1);
  }
  return n_differ ? 1 : 0;
}
