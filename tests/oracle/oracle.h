/* oracle.h: the maths of docs/MATH.md, written naively, to hold the product against. It includes nothing of the product: its own types,
 * its own roundings, loops that follow the formulas. Every function exists in double (the truth) and, where errors are compared, in
 * float (what naive code in the input type would give). */
#ifndef ORACLE_H
#define ORACLE_H

#include <stdint.h>

enum { ORACLE_F32 = 1, ORACLE_BF16 = 2, ORACLE_F16 = 3, ORACLE_I8 = 4, ORACLE_I4 = 5, ORACLE_E4M3 = 6 };

/* The k features of largest magnitude of x [d], ascending: NaN above all, ties to the lower feature. */
void oracle_topk(const float *x, int d, int k, int *ids);

/* x [n] rounded in place to a storage type and back. */
void oracle_round(float *x, int n, int storage);
/* One row to whole numbers of at most `most` (127, or 7 for int4): returns the scale (NaN for a row with inf or NaN, -1 where f16 has
 * none). values may be NULL. */
double oracle_whole(const float *x, int n, int most, int *values);
double oracle_i8(const float *x, int n, int *values);
/* One row to e4m3 numbers and a power of two, which is returned like that. */
double oracle_e4m3(const float *x, int n, double *values);
/* One query row that meets int8 keys of n_terms slots, in place: rounded to multiples of the least 2^e, e >= -100, of which it takes no
 * more than 32767, and so few that 32 slots' products with int8 numbers add up to 2^24 at most. NaN where an entry is NaN or reaches 2^100.
 */
void oracle_round_query(float *x, int n, int n_terms);
/* An f16 number from its bits. */
double oracle_f16(unsigned bits);

typedef struct oracle_problem {
  int n_queries, n_keys, n_heads, n_kv_heads, head_dim, head_dim_v;
  int k_q, k_k;                  /* kept features; 0: all */
  int k_storage, v_storage;      /* with ORACLE_I8 keys the kept features of a query are rounded too */
  double softmax_scale, softcap; /* 0: 1 / sqrt(head_dim); 0: none */
  int causal, has_window;
  long window_left, window_right, n_sink_tokens;
  long n_keys_behind; /* that a sequence has beside these, at its end; less than 0: it ends before the last of these */
  /* Other natural orders of the same sums, with other roundings: how well one of them fares is luck. */
  int scale_first, features_backwards;
  /* Gradients: the operands of the five products, times this, are rounded to bf16, as code for matrix instructions has them. 0: they are
   * not. What units they come in is luck as well. */
  double short_products;
  const float *sink_logit, *alibi_slopes; /* [n_heads] or NULL */
  const float *q;                         /* [n_queries][n_heads][head_dim] */
  const float *k;                         /* [n_keys][n_kv_heads][head_dim] */
  const float *v;                         /* [n_keys][n_kv_heads][head_dim_v] */
} oracle_problem;

/* 1 if query t may see key j. */
int oracle_sees(const oracle_problem *problem, long t, long j);

/* out [n_queries][n_heads][head_dim_v], lse [n_queries][n_heads]. */
void oracle_attention_f64(const oracle_problem *problem, double *out, double *lse);
void oracle_attention_f32(const oracle_problem *problem, float *out, float *lse);

/* Gradients of sum(out * d_out) + sum(lse * d_lse), straight through selection and rounding. Shapes are those of q, k and v; sink_logit
 * [n_heads] is 0 without sinks. d_lse may be NULL. */
typedef struct oracle_grad_f64 {
  double *q, *k, *v, *sink_logit;
} oracle_grad_f64;
typedef struct oracle_grad_f32 {
  float *q, *k, *v, *sink_logit;
} oracle_grad_f32;
void oracle_backward_f64(const oracle_problem *problem, const float *d_out, const float *d_lse, oracle_grad_f64 *grad);
void oracle_backward_f32(const oracle_problem *problem, const float *d_out, const float *d_lse, oracle_grad_f32 *grad);

#endif
