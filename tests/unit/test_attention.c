/* Attention through the public API: against the definition in double, and the promises about bits. */
#include "attention_call.h"

/* ---- Against the definition -------------------------------------------------------------------------------------------------------- */

static void definition(void **state) {
  (void)state;
  for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++) {
    sfa_context *ctx = new_context(2, (sfa_isa)isa);
    for (int i = 0; i < N_SHAPES; i++) {
      call c = shape_call(i);
      run_ok(ctx, &c);
      expect_exact(shapes[i].name, &c);
      free_call(&c);
    }
    sfa_context_destroy(ctx);
  }
}

/* ---- Promises about bits ------------------------------------------------------------------------------------------------------------ */

/* Another instruction set, other numbers of threads on the best one: the bits of plain C on one thread. */
static void machine_does_not_matter(void **state) {
  (void)state;
  sfa_context *reference = new_context(1, SFA_ISA_SCALAR);
  for (int i = 0; i < N_SHAPES; i++) {
    call want = shape_call(i);
    run_ok(reference, &want);
    for (int isa = SFA_ISA_SCALAR + 1; isa <= (int)sfa_isa_best(); isa++)
      for (int32_t n_threads = isa == (int)sfa_isa_best() ? 3 : 1; n_threads > 0; n_threads--) {
        sfa_context *ctx = new_context(n_threads, (sfa_isa)isa);
        call c = shape_call(i);
        run_ok(ctx, &c);
        expect_same(shapes[i].name, &want, &c);
        free_call(&c);
        sfa_context_destroy(ctx);
      }
    free_call(&want);
  }
  sfa_context_destroy(reference);
}

/* Algorithm 1 of the paper over every shape with codes on both sides: the bits of the tile loop. */
static void paper(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  int n_same = 0;
  for (int i = 0; i < N_SHAPES; i++) {
    call tiles = shape_call(i), lists = shape_call(i);
    tiles.o.policy = SFA_POLICY_TILES;
    lists.o.policy = SFA_POLICY_PAPER;
    run_ok(ctx, &tiles);
    const sfa_attention_options *o = &lists.o;
    if (o->k_q > 0 && o->k_q < o->head_dim && o->k_k > 0 && o->k_k < o->head_dim) {
      run_ok(ctx, &lists);
      expect_same(shapes[i].name, &tiles, &lists);
      n_same++;
    } else {
      assert_int_equal(run(ctx, &lists), SFA_ERROR_UNSUPPORTED);
      assert_non_null(strstr(sfa_context_error(ctx), "policy paper: it walks codes of queries and keys"));
    }
    free_call(&tiles);
    free_call(&lists);
  }
  assert_true(n_same >= 10);
  sfa_context_destroy(ctx);
}

/* A sequence alone, in a batch, packed with others, and its last rows asked for without the first: the same bits. */
static void company_does_not_matter(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  static const int32_t cu_q[] = {0, 3, 3, 43, 60}, cu_k[] = {0, 70, 90, 130, 130}; /* no queries; no keys */
  for (int i = 0; i < N_SHAPES; i++)
    for (int packed = 0; packed < 2; packed++) {
      sfa_attention_options o = shapes[i].o;
      o.n_sequences = 4;
      if (packed) {
        o.max_seqlen_q = 40;
        o.max_seqlen_k = 70;
      }
      call c = new_call(o, 7);
      c.a.sink_logit = shapes[i].sink ? sink_logits : NULL;
      c.a.alibi_slopes = shapes[i].alibi ? alibi_slopes : NULL;
      c.a.cu_seqlens_q = packed ? cu_q : NULL;
      c.a.cu_seqlens_k = packed ? cu_k : NULL;
      run_ok(ctx, &c);
      for (int32_t b = 0; b < 4; b++) {
        int64_t T, q0 = range(c.a.cu_seqlens_q, o.max_seqlen_q, b, &T);
        for (int64_t n = T; n > 0; n = n > 40 ? 40 : n > 1 ? 1 : 0) {
          call alone = sequence_of(&c, b, n);
          run_ok(ctx, &alone);
          expect_rows(shapes[i].name, &c, q0 + T - n, &alone);
          free_call(&alone);
        }
      }
      free_call(&c);
    }
  sfa_context_destroy(ctx);
}

/* Decode shares out spans of keys where prefill takes them one after the other: the same bits, over three spans and a window. */
static void spans(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int window = 0; window < 2; window++) {
    sfa_attention_options o = {.n_heads = 2,
                               .n_kv_heads = 1,
                               .head_dim = 8,
                               .max_seqlen_q = 2600,
                               .max_seqlen_k = 9000,
                               .k_k = 4,
                               .causal = 1,
                               .has_window = window,
                               .window_size = {4500, 0},
                               .n_sink_tokens = 2};
    call c = new_call(o, 5);
    c.a.sink_logit = sink_logits;
    run_ok(ctx, &c);
    for (int64_t n = 5; n > 0; n -= 4) {
      call last = sequence_of(&c, 0, n);
      run_ok(ctx, &last);
      expect_rows("spans", &c, 2600 - n, &last);
      expect_exact("spans", &last);
      free_call(&last);
    }
    free_call(&c);
  }
  sfa_context_destroy(ctx);
}

/* Keeping all features is dense attention. */
static void all_features_are_dense(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int i = 0; i < N_SHAPES; i++) {
    sfa_attention_options o = shapes[i].o;
    o.k_q = o.k_k = 0;
    call dense = new_call(o, 3);
    run_ok(ctx, &dense);
    int32_t D = o.head_dim;
    for (int which = 0; which < 3; which++) {
      o.k_q = which == 0 ? 0 : D;
      o.k_k = D;
      call c = new_call(o, 3);
      sfa_codes q_codes, k_codes;
      void *q_memory = memory(sfa_codes_bytes(c.n_q * c.o.n_heads, D, D, SFA_F32));
      void *k_memory = memory(sfa_codes_bytes(c.n_k * c.o.n_kv_heads, D, D, o.k_dtype ? o.k_dtype : SFA_F32));
      if (which == 2) { /* codes of all features are codes, not dense rows: another path */
        assert_int_equal(sfa_codes_place(ctx, c.n_q * c.o.n_heads, D, D, SFA_F32, q_memory, &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, c.q, SFA_F32, D, &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_place(ctx, c.n_k * c.o.n_kv_heads, D, D, o.k_dtype ? o.k_dtype : SFA_F32, k_memory, &k_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, c.k, SFA_F32, D, &k_codes), SFA_OK);
        c.a.q_codes = &q_codes;
        c.a.k_codes = &k_codes;
      }
      run_ok(ctx, &c);
      expect_same(shapes[i].name, &dense, &c);
      free(q_memory);
      free(k_memory);
      free_call(&c);
    }
    free_call(&dense);
  }
  sfa_context_destroy(ctx);
}

/* Codes made before give what run makes itself. */
static void given_codes(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  static const sfa_dtype types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8};
  static const int32_t dims[] = {64, 264}; /* ids of one and of two bytes */
  for (int t = 0; t < 4; t++)
    for (int d = 0; d < 2; d++)
      for (int32_t G = 1; G <= 2; G++) {
        sfa_attention_options o = {.n_heads = 4,
                                   .n_kv_heads = G,
                                   .head_dim = dims[d],
                                   .n_sequences = 2,
                                   .max_seqlen_q = 50,
                                   .max_seqlen_k = 80,
                                   .k_q = 9,
                                   .k_k = 12,
                                   .k_dtype = types[t],
                                   .causal = 1};
        call inside = new_call(o, 11), before = new_call(o, 11);
        run_ok(ctx, &inside);
        sfa_codes q_codes, k_codes;
        int64_t n_q = before.n_q * 4, n_k = before.n_k * G;
        void *q_memory = memory(sfa_codes_bytes(n_q, dims[d], 9, SFA_F32)), *k_memory = memory(sfa_codes_bytes(n_k, dims[d], 12, types[t]));
        assert_int_equal(sfa_codes_place(ctx, n_q, dims[d], 9, SFA_F32, q_memory, &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, before.q, SFA_F32, dims[d], &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_place(ctx, n_k, dims[d], 12, types[t], k_memory, &k_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, before.k, SFA_F32, dims[d], &k_codes), SFA_OK);
        before.a.q_codes = &q_codes;
        before.a.k_codes = &k_codes;
        before.a.q.data = before.a.k.data = NULL;
        run_ok(ctx, &before);
        expect_same("given codes", &inside, &before);
        ((uint8_t *)k_codes.ids)[0] = 255; /* not ascending, or no feature at all */
        assert_int_equal(run(ctx, &before), SFA_ERROR_ARGUMENT);
        free(q_memory);
        free(k_memory);
        free_call(&inside);
        free_call(&before);
      }
  sfa_context_destroy(ctx);
}

/* ---- Merge ----------------------------------------------------------------------------------------------------------------- */

/* Attention over the first and over the last keys, joined, is attention over all; a part without keys changes nothing. */
static void merge(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_attention_options o = {.n_heads = 2, .head_dim = 32, .max_seqlen_q = 70, .max_seqlen_k = 200, .k_q = 8, .k_k = 8};
  call whole = new_call(o, 51), a = new_call(o, 51), b = new_call(o, 51), none = new_call(o, 51);
  a.o.max_seqlen_k = 80;
  b.o.max_seqlen_k = 120;
  none.o.max_seqlen_k = 0;
  b.a.k.data = b.k + 80 * 2 * 32;
  b.a.v.data = b.v + 80 * 2 * 32;
  a.a.sink_logit = sink_logits; /* in one of the two */
  whole.a.sink_logit = sink_logits;
  run_ok(ctx, &a);
  run_ok(ctx, &b);
  run_ok(ctx, &none);
  assert_int_equal(sfa_attention_merge(ctx, 140, 32, a.out, a.lse, none.out, none.lse), SFA_OK);
  assert_int_equal(sfa_attention_merge(ctx, 140, 32, none.out, none.lse, b.out, b.lse), SFA_OK);
  assert_int_equal(sfa_attention_merge(ctx, 140, 32, a.out, a.lse, none.out, none.lse), SFA_OK);
  memcpy(whole.out, a.out, out_bytes(&whole));
  memcpy(whole.lse, a.lse, lse_bytes(&whole));
  expect_exact("merge", &whole);
  float out[8] = {0}, lse = -INFINITY; /* nothing joined with nothing */
  assert_int_equal(sfa_attention_merge(ctx, 1, 8, out, &lse, out, &lse), SFA_OK);
  assert_true(lse == -INFINITY && out[0] == 0);
  assert_int_equal(sfa_attention_merge(ctx, -1, 8, out, &lse, out, &lse), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_merge(ctx, 1, 12, out, &lse, out, &lse), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_merge(ctx, 1, 8, NULL, &lse, out, &lse), SFA_ERROR_ARGUMENT);
  free_call(&whole);
  free_call(&a);
  free_call(&b);
  free_call(&none);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(definition),  cmocka_unit_test(machine_does_not_matter),
      cmocka_unit_test(paper),       cmocka_unit_test(company_does_not_matter),
      cmocka_unit_test(spans),       cmocka_unit_test(all_features_are_dense),
      cmocka_unit_test(given_codes), cmocka_unit_test(merge),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
