/* expand_add, scale_sums: the scores of an inverted index. One text for scalar code and all vectors.
 *
 * A feature's keys are the set bits of its bitmap and their values lie packed. Few bits: one after the other. Others, with AVX-512: 16
 * packed values are widened and spread to the lanes whose bits are set. 64 keys cost the same however many those are, and that is less than
 * the jump that a processor mispredicts where single bits run out: from one bit a word on. */

static inline void add_bits(int64_t n_words, const uint64_t *words, const int8_t *values, int32_t q, int32_t *sums) {
  for (int64_t w = 0; w < n_words; w++, sums += 64)
    for (uint64_t bits = words[w]; bits; bits &= bits - 1)
      sums[__builtin_ctzll(bits)] += q * *values++;
}

#ifdef V_EXPAND
/* sums [16] += q * the next values, at the lanes of mask. */
V_INLINE void add_lanes(vm mask, const int8_t *values, vi q, int32_t *sums) {
  vi_store(sums, vi_add(vi_load(sums), vi_mul_i16(vi_expand_i8(mask, values), q)));
}

static void expand_add(int64_t n_words, const uint64_t *words, int64_t n_values, const int8_t *values, int32_t q, int32_t *sums) {
  if (n_values < SFA_EXPAND_STEPS * n_words) {
    add_bits(n_words, words, values, q, sums);
    return;
  }
  const vi factor = vi_set(q & 0xffff);
  for (int64_t w = 0; w < n_words; w++, sums += 64) {
    const uint64_t bits = words[w];
    add_lanes((vm)bits, values, factor, sums);
    add_lanes((vm)(bits >> 16), values + __builtin_popcountll(bits & 0xffff), factor, sums + 16);
    add_lanes((vm)(bits >> 32), values + __builtin_popcountll(bits & 0xffffffff), factor, sums + 32);
    add_lanes((vm)(bits >> 48), values + __builtin_popcountll(bits << 16), factor, sums + 48);
    values += __builtin_popcountll(bits);
  }
}
#else
static void expand_add(int64_t n_words, const uint64_t *words, int64_t n_values, const int8_t *values, int32_t q, int32_t *sums) {
  (void)n_values;
  add_bits(n_words, words, values, q, sums);
}
#endif

/* n is a multiple of SFA_KEY_TILE. */
static void scale_sums(int64_t n, const int32_t *sums, float step, const uint16_t *scales, float query_scale, float *S) {
#ifdef V_LANES
  for (int64_t j = 0; j < n; j += V_LANES)
    vf_store(S + j, vf_mul(vf_mul(vi_to_float(vi_load(sums + j)), vf_set(step)), vf_mul(v_load_f16(scales + j), vf_set(query_scale))));
#else
  for (int64_t j = 0; j < n; j++)
    S[j] = (float)sums[j] * step * (sfa_f32_from_f16(scales[j]) * query_scale);
#endif
}
