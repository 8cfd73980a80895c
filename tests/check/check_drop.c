/* Checks of count_depths and drop_keys, the slots that leave values out. */
#include "check.h"
#include <math.h>
#include <string.h>

/* Weights from 0 to 1 over many octaves, with exact powers, zeros and (at times) a NaN. */
static float *weights(check *c, int n) {
  float *P = check_floats(c, n);
  for (int i = 0; i < n; i++) {
    const int kind = check_pick(c, 8);
    P[i] = kind == 0 ? 0.0f : kind == 1 ? ldexpf(1, -check_pick(c, 45)) : exp2f(-fabsf(check_normal(c)) * (kind < 5 ? 3 : 20));
  }
  if (!check_pick(c, 8))
    P[check_pick(c, n)] = NAN;
  return P;
}

static void check_count_depths(check *c) {
  for (int i = 0; i < (c->quick ? 100 : 1000); i++) {
    check_begin(c, "count_depths", "case %d", i);
    const float *P = weights(c, SFA_KEY_TILE), factor = check_pick(c, 3) ? exp2f(-(float)check_pick(c, 60) / 7) : 1.0f;
    uint32_t depths[SFA_N_DEPTHS], expected[SFA_N_DEPTHS], before = (uint32_t)check_pick(c, 1000);
    for (int d = 0; d < SFA_N_DEPTHS; d++)
      depths[d] = expected[d] = before;
    for (int j = 0; j < SFA_KEY_TILE; j++) { /* depth d: from the d-th edge below 1 up to the next; eight equal steps an octave */
      const float weight = P[j] * factor;
      int d = 0;
      while (d < SFA_N_DEPTHS - 1 && weight < ldexp((8 - d % 8 + 8) % 8 / 8.0 + 1, -((d + 7) / 8)))
        d++;
      expected[d]++;
    }
    c->kernels->count_depths(P, factor, depths);
    check_bytes(c, "depths", depths, expected, sizeof depths);
    check_end(c);
  }
}

static void check_drop_keys(check *c) {
  for (int i = 0; i < (c->quick ? 200 : 2000); i++) {
    const int n_rows = check_range(c, 1, SFA_KEYS_ROWS), most_kept = check_pick(c, 2) ? SFA_KEY_TILE : check_pick(c, SFA_KEY_TILE);
    check_begin(c, "drop_keys", "rows %d most kept %d", n_rows, most_kept);
    float *P = weights(c, n_rows * SFA_KEY_TILE), *same = check_floats(c, n_rows * SFA_KEY_TILE), *factor = check_floats(c, n_rows),
          *limit = check_floats(c, n_rows), *sums = check_floats(c, n_rows), *expected = check_floats(c, n_rows);
    const float depth = check_pick(c, 2) ? 1 : 12; /* so that few or many leave */
    for (int row = 0; row < n_rows; row++) {
      factor[row] = exp2f(-(float)check_pick(c, 4));
      limit[row] = check_pick(c, 30) ? exp2f(-depth * fabsf(check_normal(c))) : check_pick(c, 2) ? 0.0f : INFINITY;
      sums[row] = expected[row] = 0;
    }
    memcpy(same, P, (size_t)(n_rows * SFA_KEY_TILE) * sizeof *P);
    const int n_kept = c->kernels->drop_keys(n_rows, factor, limit, most_kept, P, sums);
    const int n_expected = c->plain->drop_keys(n_rows, factor, limit, most_kept, same, expected);
    if (n_kept != n_expected)
      check_fail(c, "%d keys stay, expected %d", n_kept, n_expected);
    check_bits(c, "P", P, same, n_rows * SFA_KEY_TILE);
    check_bits(c, "sums", sums, expected, n_rows);
    int n_nonzero = 0; /* by the definition: a key that stays has some row at or above its limit */
    for (int j = 0; j < SFA_KEY_TILE && n_kept <= most_kept; j++) {
      bool stays = false, any = false;
      for (int row = 0; row < n_rows; row++) {
        stays |= !(P[row * SFA_KEY_TILE + j] * factor[row] < limit[row]);
        any |= P[row * SFA_KEY_TILE + j] != 0.0f;
      }
      n_nonzero += any;
      if (any && !stays)
        check_fail(c, "key %d should have left", j);
    }
    if (n_kept <= most_kept && n_nonzero > n_kept)
      check_fail(c, "%d keys have weights, %d stay", n_nonzero, n_kept);
    check_end(c);
  }
}

const check_entry check_drop_entries[] = {{"count_depths", check_count_depths}, {"drop_keys", check_drop_keys}, {NULL, NULL}};
