/* sfa/sfa.h: sparse feature attention. An introduction, and the headers of libsfa in one include.
 *
 * Attention compares every query with every key in all D dimensions of a head. Sparse feature attention keeps the K entries of largest
 * magnitude of each query and key row, drops the rest, and takes the exact softmax over every key with the full values: nothing is
 * skipped along the sequence. What it buys: QK^T costs K instead of D steps a pair, and a cached key K ids and K small numbers.
 * What it costs: a model that was not trained for it loses accuracy, the more the smaller K is.
 *
 * Seven things, in the order in which a program meets them:
 *     context   threads, allocator, error text. Everything is made from one                                   sfa/base.h
 *     codes     the kept features of rows, as arrays: select, densify, export as CSR or CSC                   sfa/attention.h
 *     plan      one shape and one choice of masks, sparsity and storage; then run it, as often as wanted      sfa/attention.h
 *     backward  gradients of a plan's call                                                                    sfa/backward.h
 *     cache     keys as codes and values of earlier tokens, in pages: append, truncate, fork, attend          sfa/cache.h
 *               or the same pages in memory of the caller: store rows by slot, attend by block table          sfa/cache.h
 *     planner   which way a plan takes, what it should cost, and costs measured on this machine               sfa/plan.h
 *     device    the same on a GPU: its memory, its stream, which ones there are                               sfa/stream.h
 * and beside the cache postings, an inverted index over its codes, and the search for a query's best keys     sfa/postings.h
 * Language models on top of these (files, tokenizers, sessions) are another library: sfa/engine.h, libsfa_engine.
 *
 * A whole program, examples/01_attention.c:
 *
 *     #include <sfa/sfa.h>
 *
 *     #include <math.h>
 *     #include <stdio.h>
 *     #include <stdlib.h>
 *
 *     enum { T = 1024, H = 8, G = 2, D = 64 }; // tokens, query heads, key/value heads (each serves H / G query heads), head dim
 *
 *     static float *random_rows(size_t n) { // uniform in -1 .. 1
 *       float *x = malloc(n * sizeof *x);
 *       for (size_t i = 0; x && i < n; i++)
 *         x[i] = (float)rand() / (float)RAND_MAX * 2 - 1;
 *       return x;
 *     }
 *
 *     // Causal self-attention that keeps k features of each query and key row; k = 0 keeps all of them.
 *     static sfa_status attend(sfa_context *ctx, int k, const float *q, const float *key, const float *v, float *out) {
 *       sfa_attention_options options = {.struct_size = sizeof options, .n_heads = H, .n_kv_heads = G, .head_dim = D};
 *       options.max_seqlen_q = options.max_seqlen_k = T;
 *       options.k_q = options.k_k = k;
 *       options.causal = 1;
 *       sfa_attention_plan *plan = NULL;
 *       sfa_status status = sfa_attention_plan_create(ctx, &options, &plan); // checks everything; run can no longer run out of memory
 *       if (status != SFA_OK)
 *         return status;
 *       void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
 *       sfa_attention_args args = {.struct_size = sizeof args, .q.data = q, .k.data = key, .v.data = v, .out = out};
 *       args.workspace = workspace;
 *       status = workspace ? sfa_attention_run(plan, &args) : SFA_ERROR_MEMORY;
 *       free(workspace);
 *       sfa_attention_plan_destroy(plan);
 *       return status;
 *     }
 *
 *     int main(void) {
 *       sfa_context *ctx = NULL;
 *       if (sfa_context_create(NULL, &ctx) != SFA_OK)
 *         return 1;
 *       float *q = random_rows(T * H * D), *key = random_rows(T * G * D), *v = random_rows(T * G * D); // [token][head][dim]
 *       float *dense = random_rows(T * H * D), *sparse = random_rows(T * H * D);
 *       int ok = q && key && v && dense && sparse && attend(ctx, 0, q, key, v, dense) == SFA_OK;
 *       for (int k = 8; ok && k <= D; k *= 2) {
 *         ok = attend(ctx, k, q, key, v, sparse) == SFA_OK;
 *         float most = 0;
 *         for (size_t i = 0; i < T * H * D; i++)
 *           most = fmaxf(most, fabsf(sparse[i] - dense[i]));
 *         printf("k = %2d of %d: largest difference to dense %g\n", k, D, most);
 *         ok = ok && (k < D || most == 0); // all features kept is dense attention, bit for bit
 *       }
 *       if (!ok)
 *         fprintf(stderr, "failed: %s\n", sfa_context_error(ctx));
 *       free(q), free(key), free(v), free(dense), free(sparse);
 *       sfa_context_destroy(ctx);
 *       return !ok;
 *     }
 *
 * Build it:  cc 01_attention.c $(pkg-config --cflags --libs sfa)      or with CMake: find_package(sfa) and link sfa::sfa.
 *
 * Every call that can fail returns an sfa_status; sfa_context_error has the text that says what to do. Nothing here ends the process,
 * prints, or keeps state outside the context.
 */
#ifndef SFA_SFA_H
#define SFA_SFA_H

#include <sfa/attention.h>
#include <sfa/backward.h>
#include <sfa/base.h>
#include <sfa/cache.h>
#include <sfa/plan.h>
#include <sfa/postings.h>
#include <sfa/stream.h>

#endif
