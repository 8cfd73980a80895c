/* query_table, score_keys, adjust_keys, softmax_keys: one or a few query rows, lanes are keys.
 *
 * Keys of int8 are score_whole's, which this file's includer has brought along (keys_<isa>.c); the other types are here. A key's sum is
 * one chain over its slots, so 64 keys are turned, V_LANES keys by 8 slots at a time, into vectors of one slot each: then a step is one
 * multiply-add of V_LANES keys by the query's value at that slot, one number for dense rows, looked up by id for codes. The tile's
 * vectors take turns block by block, which hides the chains' latency. */

/* ---- the query ---- */

/* A row's table begins with its step (0 where the keys are not int8); numbers follow at byte 64: f32, or as write_whole has it. */
V_INLINE float *table_row(const void *table, int32_t D, int32_t row) {
  return (float *)((char *)(uintptr_t)table + (size_t)row * sfa_query_table_bytes(D));
}

static void query_table(int32_t n_rows, int32_t D, const float *q, int64_t row_stride, const float *step, void *table) {
  for (int32_t i = 0; i < n_rows; i++, q += row_stride) {
    float *head = table_row(table, D, i);
    head[0] = step ? step[i] : 0.0f;
    if (step)
      write_whole(D, q, step[i], head + 16);
    else
      memcpy(head + 16, q, (size_t)D * sizeof *q);
  }
}

/* ---- scores ---- */

enum { KEY_VECTORS = SFA_KEY_TILE / V_LANES, SLOT_BLOCK = 32 };

/* `slots` more slots, a constant where this is inlined, of V_LANES keys. ids NULL: slot i is feature q[i]. */
V_INLINE void score_slots(const int slots, const vf *k, const vf *ids, const float *q, float *S) {
  vf sum = vf_load(S);
#pragma GCC unroll 8
  for (int i = 0; i < slots; i++)
    sum = vf_fma(k[i], ids ? vf_gather(q, vf_bits(ids[i])) : vf_set(q[i]), sum);
  vf_store(S, sum);
}

/* Dense bf16 as it lies, n features, a multiple of 16: pairs of them turned as if they were f32. Two vectors of keys side by side. */
static void score_pairs(const sfa_stored_rows *keys, int32_t n_rows, int32_t D, int32_t n, const void *table, float *S) {
  const float *rows[SFA_KEY_TILE];
  for (int32_t j = 0; j < SFA_KEY_TILE; j++)
    rows[j] = (const float *)((const uint16_t *)keys->values + (j < keys->n ? j : keys->n - 1) * keys->values_stride);
  /* Each step asks for its share of the next tile, line by line between multiply-adds: 2 V_LANES keys of 16 features are V_LANES lines. */
  const char *ahead = keys->next ? keys->next : keys->values;
  for (int32_t u = 0; u < n; u += 16)
    for (int32_t j = 0; j < keys->n; j += 2 * V_LANES, ahead += 64 * V_LANES) {
      vf a[8], b[8];
      vf_turn(rows + j, u / 2, a);
      vf_turn(rows + j + V_LANES, u / 2, b);
      for (int32_t i = 0; i < n_rows; i++) {
        const float *q = table_row(table, D, i) + 16 + u;
        float *s = S + (int64_t)i * SFA_KEY_TILE + j;
        vf sum_a = vf_load(s), sum_b = vf_load(s + V_LANES);
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
          if (i == 0)
            for (int line = 0; line < V_LANES / 8; line++)
              __builtin_prefetch(ahead + (p * V_LANES / 8 + line) * 64, 0, 2);
          sum_a = vf_fma(v_low_bf16(a[p]), vf_set(q[2 * p]), sum_a);
          sum_b = vf_fma(v_low_bf16(b[p]), vf_set(q[2 * p]), sum_b);
          sum_a = vf_fma(v_high_bf16(a[p]), vf_set(q[2 * p + 1]), sum_a);
          sum_b = vf_fma(v_high_bf16(b[p]), vf_set(q[2 * p + 1]), sum_b);
        }
        vf_store(s, sum_a);
        vf_store(s + V_LANES, sum_b);
      }
    }
}

/* Slots from `first` on of any type but int8, SLOT_BLOCK at a time through f32 and 32-bit ids. */
static void score_turned(const sfa_stored_rows *keys, int32_t n_rows, int32_t D, int32_t first, const void *table, float *S) {
  float values[SFA_KEY_TILE * SLOT_BLOCK];
  int32_t ids[SFA_KEY_TILE * SLOT_BLOCK] = {0};
  const size_t item = sfa_dtype_bytes(keys->dtype);
  for (int32_t u = first; u < keys->width; u += SLOT_BLOCK) {
    const int32_t n = keys->width - u < SLOT_BLOCK ? keys->width - u : SLOT_BLOCK;
    load_rows(keys->n, n, keys->dtype, (const char *)keys->values + (size_t)u * item, keys->values_stride, NULL, values, SLOT_BLOCK);
    for (int32_t j = 0; keys->ids && j < keys->n; j++) {
      const int64_t at = j * keys->ids_stride + u;
      for (int32_t i = 0; i < n; i++)
        if (D <= 256) {
          ids[j * SLOT_BLOCK + i] = ((const uint8_t *)keys->ids)[at + i];
        } else {
          const int32_t id = ((const uint16_t *)keys->ids)[at + i];
          ids[j * SLOT_BLOCK + i] = id < D ? id : D - 1;
        }
    }
    for (int32_t j = 0; j < keys->n; j += V_LANES) {
      const float *value_rows[V_LANES], *id_rows[V_LANES];
      for (int32_t i = 0; i < V_LANES; i++) {
        const int32_t row = j + i < keys->n ? j + i : keys->n - 1;
        value_rows[i] = values + row * SLOT_BLOCK;
        id_rows[i] = (const float *)(ids + row * SLOT_BLOCK);
      }
      for (int32_t at = 0; at < n; at += 8) {
        vf k[8], features[8];
        vf_turn(value_rows, at, k);
        if (keys->ids)
          vf_turn(id_rows, at, features);
        for (int32_t i = 0; i < n_rows; i++) {
          const float *q = table_row(table, D, i) + 16;
          float *s = S + (int64_t)i * SFA_KEY_TILE + j;
          if (n - at >= 8 && keys->ids)
            score_slots(8, k, features, q, s);
          else if (n - at >= 8)
            score_slots(8, k, NULL, q + u + at, s);
          else
            for (int32_t slot = 0; slot < n - at; slot++)
              score_slots(1, k + slot, keys->ids ? features + slot : NULL, keys->ids ? q : q + u + at + slot, s);
        }
      }
    }
  }
}

static void score_keys(const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table, float query_scale, float *S) {
  if (keys->dtype == SFA_I8) {
    score_whole(keys, n_rows, D, table, query_scale, S);
    return;
  }
  memset(S, 0, (size_t)n_rows * SFA_KEY_TILE * sizeof *S);
  if (keys->ids)
    sfa_next_prefetch(keys, 0, 1);
  const int32_t paired = keys->dtype == SFA_BF16 && !keys->ids ? D - D % 16 : 0;
  if (paired)
    score_pairs(keys, n_rows, D, paired, table, S);
  if (paired < keys->width)
    score_turned(keys, n_rows, D, paired, table, S);
}

static void adjust_keys(int32_t n_rows, int32_t n_keys, float softcap, const float *slope, const int32_t *pos, float *S) {
  const vf cap = vf_set(softcap * SFA_LOG2E);
  for (int32_t i = 0; i < n_rows; i++, S += SFA_KEY_TILE)
    for (int32_t j = 0; j < n_keys; j += V_LANES) {
      vf s = vf_load(S + j);
      if (softcap > 0)
        s = vf_mul(cap, vf_tanh(s));
      if (slope)
        s = vf_fma(vf_set(slope[i]), vi_to_float(vi_sub(vi_add(vi_iota(), vi_set(j)), vi_set(pos[i]))), s);
      vf_store(S + j, s);
    }
}

/* ---- weights ---- */

/* The weights of one row and what its state becomes, but for the sum over this tile. */
V_INLINE int weigh_keys(int32_t n_keys, float *S, float *m, float *l, float *alpha) {
  const vi count = vi_set(n_keys);
  vf s[KEY_VECTORS], most = vf_set(*m);
#pragma GCC unroll 8
  for (int v = 0; v < KEY_VECTORS; v++) {
    const vm real = vi_gt(count, vi_add(vi_iota(), vi_set(v * V_LANES)));
    s[v] = vf_select(real, vf_load(S + v * V_LANES), vf_set(-INFINITY));
    most = vf_max(s[v], most);
  }
  const float largest = vf_reduce_max(most) + 0.0f;
  const int empty = largest == -INFINITY;
  const float base = empty ? 0.0f : largest;
  const int same = empty || (*m == largest && largest < INFINITY); /* e2(0) is 1 */
  *alpha = same ? 1.0f : sfa_exp2(*m - base);
  *l *= *alpha;
  *m = largest;
#pragma GCC unroll 8
  for (int v = 0; v < KEY_VECTORS; v++)
    vf_store(S + v * V_LANES, vf_exp2(vf_sub(s[v], vf_set(base))));
  return *alpha != 1.0f;
}

/* Weights beyond n_keys are 0 by now. */
static int softmax_keys(int32_t n_rows, int32_t n_keys, float *S, float *m, float *l, float *alpha) {
  int changed = 0;
  for (int32_t i = 0; i < n_rows; i++, S += SFA_KEY_TILE) {
    changed |= weigh_keys(n_keys, S, m + i, l + i, alpha + i);
    float sums[4] = {0};
    for (int32_t j = 0; j < n_keys; j += 4)
      for (int a = 0; a < 4; a++)
        sums[a] += S[j + a];
    l[i] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return changed;
}
