/* device/rows_tmpl.c: what is done to one row of activations. Included after a lanes_<isa>.h.
 *
 * Sums run in 16 lanes (element i in lane i mod 16) and are joined as a tree, on every instruction set.
 */

static inline float sum_lanes(lanes a) {
  float x[16];
  lanes_store(x, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++)
      x[i] += x[i + width];
  return x[0];
}

static inline float max_lanes(lanes a) {
  float x[16], largest = 0.0f;
  lanes_store(x, a);
  for (int i = 0; i < 16; i++)
    largest = x[i] > largest ? x[i] : largest;
  return largest;
}

/* body sees `i`, `n` (of 16) and loads and stores with these. */
#define FOR_LANES(dim) for (int32_t i = 0, n = (dim) < 16 ? (dim) : 16; i < (dim); i += 16, n = (dim)-i < 16 ? (dim)-i : 16)
#define LOAD(p) (n == 16 ? lanes_load((p) + i) : lanes_load_some((p) + i, n))
#define STORE(p, a) (n == 16 ? lanes_store((p) + i, a) : lanes_store_some((p) + i, a, n))

/* e^x within 2 ulp; x is held to [-87, 88]. NaN stays. */
static inline lanes exp_lanes(lanes x) {
  x = lanes_max(lanes_set(-87.0f), lanes_min(lanes_set(88.0f), x));
  lanes magic = lanes_set(0x1.8p23f), shifted = lanes_fma(x, lanes_set(0x1.715476p+0f), magic);
  lanes n = lanes_sub(shifted, magic);
  lanes r = lanes_fma(n, lanes_set(-0x1.62e4p-1f), x); /* ln 2 in two parts: n times the first is exact */
  r = lanes_fma(n, lanes_set(-0x1.7f7d1cp-20f), r);
  lanes p = lanes_set(0x1.6c16c2p-10f); /* 1/720, 1/120, 1/24, 1/6, 1/2, 1, 1 */
  p = lanes_fma(p, r, lanes_set(0x1.111112p-7f));
  p = lanes_fma(p, r, lanes_set(0x1.555556p-5f));
  p = lanes_fma(p, r, lanes_set(0x1.555556p-3f));
  p = lanes_fma(p, r, lanes_set(0.5f));
  p = lanes_fma(p, r, lanes_set(1.0f));
  p = lanes_fma(p, r, lanes_set(1.0f));
  return lanes_scale2(p, shifted);
}

/* 1 / (1 + e^-x) times y. */
static inline lanes times_sigmoid(lanes y, lanes x) {
  lanes one = lanes_set(1.0f);
  return lanes_div(y, lanes_add(one, exp_lanes(lanes_sub(lanes_set(0.0f), x))));
}

static void quantize(int32_t dim, int32_t n_blocks, const float *x, int8_t *q, float *scale, int32_t *sum, float *scale_sum) {
  const float largest_q = 127 << SFA_PLANE_BITS;
  for (int32_t b = 0; b < n_blocks; b++) {
    lanes part[2], largest = lanes_set(0.0f), not_finite = lanes_set(0.0f);
    for (int half = 0; half < 2; half++) {
      int32_t i = b * SFA_BLOCK + half * 16, n = dim - i < 0 ? 0 : dim - i < 16 ? dim - i : 16;
      part[half] = n > 0 ? LOAD(x) : lanes_set(0.0f);
      largest = lanes_max(largest, lanes_abs(part[half]));
      not_finite = lanes_fma(part[half], lanes_set(0.0f), not_finite); /* NaN for NaN and inf */
    }
    float magnitude = max_lanes(largest), inverse = 0.0f;
    scale[b] = magnitude / largest_q;
    if (!(sum_lanes(not_finite) == 0.0f))
      scale[b] = NAN, part[0] = part[1] = lanes_set(0.0f);
    else if (magnitude > 0x1p-100f)
      inverse = largest_q / magnitude;
    else
      scale[b] = 0.0f;
    int8_t *high = q + b * SFA_PLANES * SFA_BLOCK, *low = high + SFA_BLOCK;
    for (int half = 0; half < 2; half++)
      lanes_store_planes(high + half * 16, low + half * 16, lanes_mul(part[half], lanes_set(inverse)));
    int32_t total = 0;
    for (int i = 0; i < SFA_BLOCK; i++)
      total += high[i] * (1 << SFA_PLANE_BITS) + low[i];
    sum[b] = total;
    scale_sum[b] = scale[b] * (float)total;
  }
}

static void rms_norm(int32_t dim, const float *x, const float *weight, float eps, float *out) {
  lanes squares = lanes_set(0.0f);
  FOR_LANES(dim) {
    lanes v = LOAD(x);
    squares = lanes_fma(v, v, squares);
  }
  lanes factor = lanes_set(1.0f / sqrtf(sum_lanes(squares) / (float)dim + eps));
  FOR_LANES(dim) STORE(out, lanes_mul(lanes_mul(LOAD(x), factor), LOAD(weight)));
}

static void layer_norm(int32_t dim, const float *x, const float *weight, const float *bias, float eps, float *out) {
  lanes total = lanes_set(0.0f), squares = lanes_set(0.0f);
  FOR_LANES(dim) total = lanes_add(total, LOAD(x));
  float mean = sum_lanes(total) / (float)dim;
  lanes shift = lanes_set(mean);
  FOR_LANES(dim) STORE(out, lanes_sub(LOAD(x), shift));
  FOR_LANES(dim) { /* from memory, so that the lanes beyond dim are 0 */
    lanes v = LOAD(out);
    squares = lanes_fma(v, v, squares);
  }
  lanes factor = lanes_set(1.0f / sqrtf(sum_lanes(squares) / (float)dim + eps));
  FOR_LANES(dim) {
    lanes v = lanes_mul(lanes_mul(LOAD(out), factor), LOAD(weight));
    STORE(out, bias ? lanes_add(v, LOAD(bias)) : v);
  }
}

/* silu x = x sigmoid(x); gelu x = x / 2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
static void activate(sfa_activation act, int32_t dim, const float *x, const float *up, float *out) {
  lanes a = lanes_set(0x1.988454p+0f), b = lanes_set(0x1.2444f2p-4f); /* 2 sqrt(2 / pi), and times 0.044715 */
  FOR_LANES(dim) {
    lanes v = LOAD(x), u = v;
    if (act == SFA_ACT_GELU_TANH)
      u = lanes_mul(v, lanes_fma(lanes_mul(v, v), b, a));
    v = times_sigmoid(v, u);
    STORE(out, up ? lanes_mul(v, LOAD(up)) : v);
  }
}

/* tanh y = 2 sigmoid(2y) - 1. */
static void softcap(int32_t dim, float cap, float *x) {
  lanes scale = lanes_set(2.0f / cap), one = lanes_set(1.0f);
  FOR_LANES(dim) {
    lanes y = times_sigmoid(lanes_set(2.0f), lanes_mul(LOAD(x), scale));
    STORE(x, lanes_mul(lanes_set(cap), lanes_sub(y, one)));
  }
}
