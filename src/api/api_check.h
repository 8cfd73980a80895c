/* api/api_check.h: checks that several public functions share. Each sets the context's error text. */
#ifndef SFA_API_CHECK_H
#define SFA_API_CHECK_H

#include <sfa/postings.h>

#include "base/context.h"

/* That the context's arrays are the host's; what: is there for them only. */
sfa_status sfa_check_here(sfa_context *ctx, const char *what);
/* A head dimension, number of heads, or the like: "must be a multiple of 8 from 8 to 65536". */
sfa_status sfa_check_head_dim(sfa_context *ctx, const char *name, int32_t dim);
/* 0..dim. */
sfa_status sfa_check_kept(sfa_context *ctx, const char *name, int32_t k, int32_t dim);
/* A storage type of keys; of values, which may be SFA_I4 or SFA_E4M3 as well. */
sfa_status sfa_check_dtype(sfa_context *ctx, const char *name, sfa_dtype dtype);
sfa_status sfa_check_value_dtype(sfa_context *ctx, const char *name, sfa_dtype dtype);
/* A view of codes: shape, type, pointers, alignment; not the ids. */
sfa_status sfa_check_codes(sfa_context *ctx, const char *name, const sfa_codes *codes);
/* Ids of codes that came from outside: features of the head, ascending. */
sfa_status sfa_check_code_ids(sfa_context *ctx, const char *name, const sfa_codes *codes);
/* Dense rows of max_seqlen tokens a sequence: *out is *rows with its defaults filled in. */
sfa_status sfa_check_rows(sfa_context *ctx, const char *name, const sfa_rows *rows, int32_t n_heads, int32_t dim, int64_t max_seqlen,
                          sfa_rows *out);
/* The same for values. */
sfa_status sfa_check_values(sfa_context *ctx, const sfa_rows *rows, int32_t n_heads, int32_t dim, int64_t max_seqlen, sfa_rows *out);
/* A layer, a sequence of a cache; name: of the argument. */
sfa_status sfa_check_cache_layer(sfa_context *ctx, const sfa_cache *cache, int32_t layer);
sfa_status sfa_check_cache_sequence(sfa_context *ctx, const char *name, const sfa_cache *cache, int32_t sequence);
/* An index over this layer of the cache; NULL is one. */
sfa_status sfa_check_postings(const sfa_postings *postings, const sfa_cache *cache, int32_t layer);

#endif
