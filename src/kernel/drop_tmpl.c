/* count_depths, drop_keys: weights of a tile by size, and the small ones taken out. One text for scalar code and all vectors. */

#define DEPTH_ONE (127 * SFA_DEPTH_STEPS) /* upper bits of 1.0f */

static void count_depths(const float *P, float factor, uint32_t *depths) {
  const float least = sfa_float_of((uint32_t)(DEPTH_ONE - SFA_N_DEPTHS + 1) << 20); /* of the last depth */
  uint32_t bits[SFA_KEY_TILE];
#ifdef V_LANES
  for (int32_t j = 0; j < SFA_KEY_TILE; j += V_LANES) /* vf_min gives its second operand for a NaN */
    vi_store((int32_t *)bits + j, vf_bits(vf_max(vf_min(vf_mul(vf_load(P + j), vf_set(factor)), vf_set(1.0f)), vf_set(least))));
#else
  for (int32_t j = 0; j < SFA_KEY_TILE; j++) {
    float weight = P[j] * factor < 1.0f ? P[j] * factor : 1.0f;
    bits[j] = sfa_bits_of(weight > least ? weight : least);
  }
#endif
  for (int32_t j = 0; j < SFA_KEY_TILE; j++)
    depths[DEPTH_ONE - (bits[j] >> 20)]++;
}

#ifdef V_LANES
static int32_t drop_keys(int32_t n_rows, const float *factor, const float *limit, int32_t most_kept, float *P, float *sums) {
  enum { CHUNKS = SFA_KEY_TILE / V_LANES, WAYS = 16 / V_LANES };
  vf kept[CHUNKS]; /* 1 where a row keeps the key */
  int32_t n_kept = 0;
  for (int c = 0; c < CHUNKS; c++) {
    kept[c] = vf_zero();
    for (int32_t i = 0; i < n_rows; i++) {
      const vf weight = vf_mul(vf_load(P + i * SFA_KEY_TILE + c * V_LANES), vf_set(factor[i]));
      kept[c] = vf_max(kept[c], vf_select(vf_lt(weight, vf_set(limit[i])), vf_zero(), vf_set(1.0f)));
    }
    n_kept += __builtin_popcount(vm_bits(vf_ne(kept[c], vf_zero())));
  }
  if (n_kept > most_kept)
    return n_kept;
  for (int32_t i = 0; i < n_rows; i++) {
    vf left[WAYS];
    float lanes[16], sum = 0.0f;
    for (int w = 0; w < WAYS; w++)
      left[w] = vf_zero();
    for (int c = 0; c < CHUNKS; c++) {
      float *at = P + i * SFA_KEY_TILE + c * V_LANES;
      const vf p = vf_load(at);
      const vm stays = vf_ne(kept[c], vf_zero());
      left[c % WAYS] = vf_add(left[c % WAYS], vf_select(stays, vf_zero(), p));
      vf_store(at, vf_select(stays, p, vf_zero()));
    }
    for (int w = 0; w < WAYS; w++)
      vf_store(lanes + w * V_LANES, left[w]);
    for (int lane = 0; lane < 16; lane++)
      sum += lanes[lane];
    sums[i] = sum;
  }
  return n_kept;
}
#else
static int32_t drop_keys(int32_t n_rows, const float *factor, const float *limit, int32_t most_kept, float *P, float *sums) {
  int32_t kept[SFA_KEY_TILE] = {0}, n_kept = 0;
  for (int32_t j = 0; j < SFA_KEY_TILE; j++) {
    for (int32_t i = 0; i < n_rows; i++)
      kept[j] |= !(P[i * SFA_KEY_TILE + j] * factor[i] < limit[i]); /* NaN stays */
    n_kept += kept[j];
  }
  for (int32_t i = 0; i < n_rows && n_kept <= most_kept; i++) {
    float lanes[16] = {0}, sum = 0.0f;
    for (int32_t j = 0; j < SFA_KEY_TILE; j++)
      if (!kept[j]) {
        lanes[j % 16] += P[i * SFA_KEY_TILE + j];
        P[i * SFA_KEY_TILE + j] = 0.0f;
      }
    for (int32_t lane = 0; lane < 16; lane++)
      sum += lanes[lane];
    sums[i] = sum;
  }
  return n_kept;
}
#endif
