/* GPUs: which there are, what is chosen and what refused on them, and one that is lost. */
#include "cuda_check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Which there are ------------------------------------------------------------------------------------------------------- */

static sfa_status open_gpu(int32_t index, sfa_context **ctx, char why[512]) {
  const sfa_context_options o = {
      .struct_size = sizeof o, .device = SFA_DEVICE_CUDA, .device_index = index, .why = why, .why_bytes = sizeof(char[512])};
  return sfa_context_create(&o, ctx);
}

static sfa_status plan_for(sfa_context *ctx, sfa_attention_options o, sfa_attention_report *report) {
  sfa_attention_plan *plan = NULL;
  o.struct_size = sizeof o;
  *report = (sfa_attention_report){.struct_size = sizeof *report};
  sfa_status status = sfa_attention_plan_create(ctx, &o, &plan);
  if (status == SFA_OK)
    status = sfa_attention_plan_report(plan, report);
  sfa_attention_plan_destroy(plan);
  return status;
}

static void expect_no_gradients(cuda_check *t, const sfa_attention_options *o) {
  sfa_attention_plan *plan = NULL;
  if (!cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, o, &plan), "plan"))
    return;
  size_t bytes = sfa_attention_workspace_bytes(plan), back_bytes = sfa_attention_backward_workspace_bytes(plan);
  float *rows = device_of(t, NULL, (size_t)(o->max_seqlen_k * o->n_heads * o->head_dim) * sizeof *rows);
  void *workspace = device_of(t, NULL, bytes > back_bytes ? bytes : back_bytes);
  sfa_attention_args args = {
      .struct_size = sizeof args, .q.data = rows, .k.data = rows, .v.data = rows, .out = rows, .lse = rows, .workspace = workspace};
  sfa_attention_grad_args grad = {
      .struct_size = sizeof grad, .forward = &args, .d_out = rows, .d_q = rows, .d_k = rows, .d_v = rows, .workspace = workspace};
  sfa_status status = sfa_attention_backward(plan, &grad);
  cuda_expect(t, status == SFA_ERROR_UNSUPPORTED && strstr(sfa_context_error(t->gpu), "9.0"), "gradients: %s: %s", sfa_status_name(status),
              sfa_context_error(t->gpu));
  sfa_memory_free(t->gpu, rows), sfa_memory_free(t->gpu, workspace);
  sfa_attention_plan_destroy(plan);
}

bool cuda_has_hopper(sfa_context *ctx) {
  const sfa_attention_options o = {.n_heads = 1, .head_dim = 64, .max_seqlen_q = 1, .max_seqlen_k = 1, .policy = SFA_POLICY_SP_BF16};
  sfa_attention_report report;
  return plan_for(ctx, o, &report) == SFA_OK;
}

/* On a GPU without Hopper's kernels bf16 is what tensor cores multiply; the other ways of theirs, and gradients, are refused by name. */
static void check_older(cuda_check *t, sfa_context *ctx, const sfa_device_info *gpu) {
  static const sfa_policy of_hopper[] = {SFA_POLICY_SP_BF16, SFA_POLICY_INT8, SFA_POLICY_SP_INT8};
  sfa_context *const first = t->gpu;
  sfa_attention_report report;
  char wanted[64];
  cuda_call c = {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 90, .max_seqlen_k = 130, .k_q = 8, .k_k = 8, .causal = 1}, .seed = 70};
  snprintf(wanted, sizeof wanted, "compute capability %d.%d", gpu->compute_major, gpu->compute_minor);
  t->gpu = ctx;
  cuda_call_fill(&c);
  cuda_call_reference(&c, false);
  for (size_t i = 0; i < sizeof of_hopper / sizeof *of_hopper; i++) {
    c.o.policy = of_hopper[i];
    sfa_status status = plan_for(ctx, c.o, &report);
    cuda_expect(t, status == SFA_ERROR_UNSUPPORTED && strstr(sfa_context_error(ctx), wanted), "GPU %d, policy %s: %s: %s", gpu->index,
                sfa_policy_name(of_hopper[i]), sfa_status_name(status), sfa_context_error(ctx));
  }
  for (int i = 0; i < 2; i++) {
    char what[64];
    c.o.policy = i ? SFA_POLICY_BF16 : SFA_POLICY_AUTO;
    snprintf(what, sizeof what, "GPU %d, %s", gpu->index, sfa_policy_name(c.o.policy));
    if (cuda_call_run(t, &c))
      cuda_expect_close(t, what, c.n_q * c.o.n_heads * c.o.head_dim_v, c.out, c.ref, c.naive);
  }
  expect_no_gradients(t, &c.o);
  cuda_call_free(&c);
  t->gpu = first;
}

/* Every GPU of the list: a context can be made on it, or the list says why not; so for the numbers beyond. */
void cuda_check_devices(cuda_check *t) {
  enum { MOST = 16 };
  sfa_device_info gpus[MOST], one[2] = {0};
  int32_t n = 0, again = 0;
  char why[512] = "";
  sfa_context *ctx = NULL;
  if (!cuda_ok(t, t->cpu, sfa_device_list(t->cpu, MOST, gpus, &n), "sfa_device_list"))
    return;
  cuda_ok(t, t->cpu, sfa_device_list(t->cpu, 1, one, &again), "sfa_device_list of one");
  cuda_expect(t, n >= 1 && again == n && one[0].index == 0 && !one[1].name[0], "%d GPUs, and %d with room for one", n, again);
  for (int32_t i = 0; i < n && i < MOST; i++) {
    const sfa_device_info *gpu = &gpus[i];
    bool new_enough = gpu->compute_major >= 8;
    sfa_status status = open_gpu(i, &ctx, why);
    cuda_expect(t,
                gpu->kind == SFA_DEVICE_CUDA && gpu->index == i && gpu->name[0] && gpu->n_processors > 0 && gpu->free_bytes > 0 &&
                    gpu->free_bytes <= gpu->memory_bytes,
                "GPU %d: \"%s\", %d processors, %lld of %lld bytes", i, gpu->name, gpu->n_processors, (long long)gpu->free_bytes,
                (long long)gpu->memory_bytes);
    cuda_expect(t, gpu->is_usable == new_enough && (gpu->why[0] == 0) == new_enough, "GPU %d of %d.%d is usable %d, because \"%s\"", i,
                gpu->compute_major, gpu->compute_minor, gpu->is_usable, gpu->why);
    if (new_enough) {
      cuda_expect(t, status == SFA_OK && sfa_context_device(ctx) == SFA_DEVICE_CUDA, "GPU %d: %s: %s", i, sfa_status_name(status), why);
      if (status == SFA_OK && gpu->compute_major * 10 + gpu->compute_minor != 90)
        check_older(t, ctx, gpu);
      sfa_context_destroy(ctx);
    } else
      cuda_expect(t, status == SFA_ERROR_UNSUPPORTED && strstr(why, gpu->why) && strstr(why, gpu->name) && strstr(why, "8.0 or later"),
                  "GPU %d: %s: %s", i, sfa_status_name(status), why);
  }
  sfa_status status = open_gpu(n, &ctx, why);
  snprintf(one[0].why, sizeof one[0].why, "device_index is %d: the driver shows %d GPU", n, n);
  cuda_expect(t, status == SFA_ERROR_DEVICE && strstr(why, one[0].why), "GPU %d of %d: %s: %s", n, n, sfa_status_name(status), why);
}

/* ---- What is chosen --------------------------------------------------------------------------------------------------------- */

/* Few query rows of a kv head, eps, f32 and heads beyond the tensor cores read keys where they are; else tensor cores multiply bf16. */
void cuda_check_choices(cuda_check *t) {
  const struct {
    const char *what;
    sfa_policy wanted;
    sfa_attention_options o;
  } cases[] = {
      {"64 rows", SFA_POLICY_KEYS, {.n_heads = 8, .n_kv_heads = 2, .head_dim = 64, .max_seqlen_q = 16, .max_seqlen_k = 99}},
      {"68 rows", SFA_POLICY_BF16, {.n_heads = 8, .n_kv_heads = 2, .head_dim = 64, .max_seqlen_q = 17, .max_seqlen_k = 99}},
      {"65 rows", SFA_POLICY_BF16, {.n_heads = 2, .head_dim = 256, .max_seqlen_q = 65, .max_seqlen_k = 99, .k_q = 8, .k_k = 8}},
      {"eps", SFA_POLICY_KEYS, {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 99, .max_seqlen_k = 99, .k_k = 8, .eps = 0.1f}},
      {"f32", SFA_POLICY_KEYS, {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 99, .max_seqlen_k = 99, .precision = SFA_PRECISION_F32}},
      {"wide", SFA_POLICY_KEYS, {.n_heads = 2, .head_dim = 264, .max_seqlen_q = 99, .max_seqlen_k = 99}},
      {"wide values", SFA_POLICY_KEYS, {.n_heads = 2, .head_dim = 64, .head_dim_v = 264, .max_seqlen_q = 99, .max_seqlen_k = 99}},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    sfa_attention_report report;
    if (cuda_ok(t, t->gpu, plan_for(t->gpu, cases[i].o, &report), cases[i].what))
      cuda_expect(t, report.policy == cases[i].wanted, "%s: %s (%s) instead of %s", cases[i].what, sfa_policy_name(report.policy),
                  report.reason, sfa_policy_name(cases[i].wanted));
  }
}

/* ---- Refusals -------------------------------------------------------------------------------------------------------- */

static void refused_plan(cuda_check *t, sfa_attention_options o, sfa_status wanted, const char *text) {
  sfa_attention_plan *plan = NULL;
  o.struct_size = sizeof o;
  sfa_status status = sfa_attention_plan_create(t->gpu, &o, &plan);
  cuda_expect(t, status == wanted && !plan && strstr(sfa_context_error(t->gpu), text), "%s, \"%s\": wanted %s, \"%s\"",
              sfa_status_name(status), sfa_context_error(t->gpu), sfa_status_name(wanted), text);
  sfa_attention_plan_destroy(plan);
}

/* A plan of one device does not read a cache of the other, whose memory it could not. */
static void refused_mix(cuda_check *t, sfa_context *ctx, const sfa_cache *cache) {
  sfa_attention_options o = {.struct_size = sizeof o, .n_heads = 1, .head_dim = 64, .max_seqlen_q = 1, .max_seqlen_k = 64, .k_k = 8};
  sfa_attention_plan *plan = NULL;
  if (!cache || !cuda_ok(t, ctx, sfa_attention_plan_create(ctx, &o, &plan), "plan"))
    return;
  void *memory = NULL;
  cuda_ok(t, ctx, sfa_memory_alloc(ctx, sfa_attention_workspace_bytes(plan) + 256, &memory), "workspace");
  sfa_attention_args args = {.struct_size = sizeof args, .q.data = memory, .out = memory, .workspace = memory};
  sfa_status status = sfa_attention_run_cached(plan, &args, cache, 0, &(int32_t){0});
  cuda_expect(t, status == SFA_ERROR_ARGUMENT && strstr(sfa_context_error(ctx), "one context"), "a cache of another device: %s: %s",
              sfa_status_name(status), sfa_context_error(ctx));
  sfa_memory_free(ctx, memory);
  sfa_attention_plan_destroy(plan);
}

/* What is the CPU's alone is refused with a text that says so. */
void cuda_check_refusals(cuda_check *t) {
  sfa_attention_options good = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 100, .max_seqlen_k = 100, .k_q = 8, .k_k = 8}, o;
  static const sfa_policy of_cpu[] = {SFA_POLICY_TILES, SFA_POLICY_HALF_CODES, SFA_POLICY_HALF_DENSE, SFA_POLICY_POSTINGS};
  for (size_t i = 0; i < sizeof of_cpu / sizeof *of_cpu; i++) {
    o = good;
    o.policy = of_cpu[i];
    refused_plan(t, o, SFA_ERROR_UNSUPPORTED, "CPU");
  }
  o = good;
  o.head_dim = 264;
  o.policy = SFA_POLICY_BF16;
  refused_plan(t, o, SFA_ERROR_UNSUPPORTED, "264");
  o = good;
  o.precision = SFA_PRECISION_F32;
  o.policy = SFA_POLICY_BF16;
  refused_plan(t, o, SFA_ERROR_UNSUPPORTED, "SFA_PRECISION_F32");
  o = good;
  o.policy = SFA_POLICY_PAPER;
  o.from_cache = 1;
  refused_plan(t, o, SFA_ERROR_UNSUPPORTED, "from_cache");
  o = good;
  o.max_seqlen_k = (int64_t)1 << 40;
  refused_plan(t, o, SFA_ERROR_ARGUMENT, "max_seqlen_k");
  void *memory = device_of(t, NULL, 4096);
  sfa_codes codes;
  cuda_ok(t, t->gpu, sfa_codes_place(t->gpu, 4, 64, 8, SFA_F32, memory, &codes), "sfa_codes_place");
  int64_t row_ptr[5];
  int32_t col[32];
  float val[32];
  cuda_expect(t, sfa_codes_to_csr(t->gpu, &codes, row_ptr, col, val) == SFA_ERROR_UNSUPPORTED, "compressed rows of device memory");
  sfa_keep_options keep = {.struct_size = sizeof keep, .k = 4, .gumbel_scale = 1};
  cuda_expect(t, sfa_rows_keep(t->gpu, &keep, 2, 1, 64, memory, 0) == SFA_ERROR_UNSUPPORTED, "noise on the device");
  sfa_cache_options co = {.struct_size = sizeof co, .n_layers = 1, .n_kv_heads = 1, .head_dim = 64, .k = (const int32_t[]){8}};
  sfa_cache *cache = NULL;
  sfa_postings *postings = NULL;
  if (cuda_ok(t, t->gpu, sfa_cache_create(t->gpu, &co, &cache), "sfa_cache_create"))
    cuda_expect(t, sfa_postings_create(cache, 0, &postings) == SFA_ERROR_UNSUPPORTED, "an index of device memory");
  cuda_expect(t, cache && sfa_cache_advance(cache, 0, 1) == SFA_ERROR_ARGUMENT, "advancing beyond what was reserved");
  refused_mix(t, t->cpu, cache);
  sfa_cache *host_cache = NULL;
  if (cuda_ok(t, t->cpu, sfa_cache_create(t->cpu, &co, &host_cache), "sfa_cache_create"))
    refused_mix(t, t->gpu, host_cache);
  sfa_cache_destroy(host_cache);
  o = good;
  o.struct_size = sizeof o;
  o.policy = SFA_POLICY_PAPER;
  o.n_kv_heads = 1;
  o.k_dtype = SFA_I8;
  sfa_attention_plan *plan = NULL;
  if (cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, &o, &plan), "plan")) {
    void *workspace = device_of(t, NULL, sfa_attention_workspace_bytes(plan)), *int8_memory = device_of(t, NULL, 4096 * 8);
    float *rows = device_of(t, NULL, 100 * 2 * 64 * sizeof *rows); /* q, v and out */
    sfa_codes int8_codes;
    cuda_ok(t, t->gpu, sfa_codes_place(t->gpu, 200, 64, 8, SFA_I8, int8_memory, &int8_codes), "sfa_codes_place");
    sfa_attention_args args = {
        .struct_size = sizeof args, .q.data = rows, .v.data = rows, .k_codes = &int8_codes, .out = rows, .workspace = workspace};
    sfa_status status = sfa_attention_run(plan, &args);
    cuda_expect(t, status == SFA_ERROR_UNSUPPORTED && strstr(sfa_context_error(t->gpu), "SFA_BF16"), "Algorithm 1 over int8 codes: %s: %s",
                sfa_status_name(status), sfa_context_error(t->gpu));
    args.k_codes = NULL;
    status = cache ? sfa_attention_run_cached(plan, &args, cache, 0, &(int32_t){0}) : SFA_OK;
    cuda_expect(t, status == SFA_ERROR_UNSUPPORTED && strstr(sfa_context_error(t->gpu), "pages"), "Algorithm 1 over a cache: %s: %s",
                sfa_status_name(status), sfa_context_error(t->gpu));
    sfa_memory_free(t->gpu, workspace), sfa_memory_free(t->gpu, int8_memory), sfa_memory_free(t->gpu, rows);
  }
  sfa_attention_plan_destroy(plan);
  sfa_cache_destroy(cache);
  sfa_memory_free(t->gpu, memory);
}

/* ---- A GPU that is lost ---------------------------------------------------------------------------------------------------- */

static void expect_lost(cuda_check *t, sfa_status status, const char *what) {
  const char *text = sfa_context_error(t->gpu);
  cuda_expect(t, status == SFA_ERROR_DEVICE && strstr(text, "illegal memory access") && strstr(text, "start it anew"), "%s: %s: %s", what,
              sfa_status_name(status), text);
}

/* Kernels read an address that is nobody's: this process gets nothing more from the GPU, and every call says so. */
int cuda_lose_gpu(cuda_check *t) {
  t->test = "lost";
  sfa_attention_options o = {.struct_size = sizeof o, .n_heads = 2, .head_dim = 64, .max_seqlen_q = 70, .max_seqlen_k = 70, .k_k = 8};
  sfa_attention_plan *plan = NULL;
  if (!cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, &o, &plan), "plan"))
    return 1;
  void *x = device_of(t, NULL, 70 * 2 * 64 * sizeof(float)), *workspace = device_of(t, NULL, sfa_attention_workspace_bytes(plan)), *more;
  sfa_attention_args args = {.struct_size = sizeof args, .k.data = x, .v.data = x, .out = x, .workspace = workspace};
  args.q.data = (void *)(uintptr_t)4096;
  (void)sfa_attention_run(plan, &args); /* whether it is told here depends on how far the GPU is */
  expect_lost(t, sfa_stream_wait(t->gpu), "sfa_stream_wait");
  args.q.data = x;
  expect_lost(t, sfa_attention_run(plan, &args), "sfa_attention_run");
  expect_lost(t, sfa_memory_alloc(t->gpu, 1000, &more), "sfa_memory_alloc");
  expect_lost(t, sfa_stream_wait(t->gpu), "sfa_stream_wait, once more");
  sfa_memory_free(t->gpu, x), sfa_memory_free(t->gpu, workspace);
  sfa_attention_plan_destroy(plan);
  sfa_context_destroy(t->gpu);
  sfa_context_destroy(t->cpu);
  return t->n_failures > 0;
}

void cuda_check_lost(cuda_check *t) {
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    execl("/proc/self/exe", "cuda_check", "--lose", (char *)NULL);
    _exit(2);
  }
  int status = 0;
  cuda_expect(t, child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
              "the process that loses the GPU ends with status %x", status);
  cuda_ok(t, t->gpu, sfa_stream_wait(t->gpu), "a wait beside a process that lost the GPU");
}
