/* device/training_tmpl.c: backward passes, losses and the optimizer, row by row. Included after rows_tmpl.c, whose lanes and sums it uses.
 */

/* The first n lanes, the others `rest`. */
static inline lanes lanes_first(lanes a, int32_t n, float rest) {
  float x[16];
  for (int i = 0; i < 16; i++)
    x[i] = rest;
  lanes_store_some(x, a, n);
  return lanes_load(x);
}

/* y = xh w (+ b), xh = r (x - mean), r = 1 / sqrt(mean of squares + eps); g = dy w:
 *     dx = r (g - mean(g) - xh mean(g xh)), without the centre: r (g - xh mean(g xh));   dw += dy xh, db += dy */
static void norm_backward(const sfa_norm_backward *t, const float *x, const float *d_out, float *d_x, float *d_weight, float *d_bias) {
  int32_t dim = t->dim;
  lanes total = lanes_set(0.0f), squares = lanes_set(0.0f), along = lanes_set(0.0f), sum = lanes_set(0.0f);
  if (t->center)
    FOR_LANES(dim) total = lanes_add(total, LOAD(x));
  float mean = t->center ? sum_lanes(total) / (float)dim : 0.0f;
  lanes shift = lanes_set(mean);
  FOR_LANES(dim) {
    lanes v = lanes_sub(LOAD(x), shift);
    v = n == 16 ? v : lanes_first(v, n, 0.0f); /* lanes beyond dim hold 0, not -mean */
    squares = lanes_fma(v, v, squares);
    lanes g = lanes_mul(LOAD(d_out), LOAD(t->weight));
    along = lanes_fma(g, v, along);
    sum = lanes_add(sum, g);
  }
  float r = 1.0f / sqrtf(sum_lanes(squares) / (float)dim + t->eps);
  lanes factor = lanes_set(r), pull = lanes_set(r * r * sum_lanes(along) / (float)dim);
  lanes level = lanes_set(t->center ? sum_lanes(sum) / (float)dim : 0.0f);
  FOR_LANES(dim) {
    lanes v = lanes_sub(LOAD(x), shift), dy = LOAD(d_out);
    lanes g = lanes_sub(lanes_mul(dy, LOAD(t->weight)), level);
    lanes dx = lanes_mul(factor, lanes_sub(g, lanes_mul(v, pull)));
    if (d_weight)
      STORE(d_weight, lanes_fma(dy, lanes_mul(v, factor), LOAD(d_weight)));
    if (d_bias)
      STORE(d_bias, lanes_add(dy, LOAD(d_bias)));
    STORE(d_x, t->add ? lanes_add(LOAD(d_x), dx) : dx);
  }
}

/* silu x = x s, s = sigmoid(x): derivative s (1 + x (1 - s)). gelu x = x s(2u), 2u = x (a + b x^2): s + x s (1 - s) (a + 3 b x^2). */
static void activate_backward(sfa_activation act, int32_t dim, const float *x, const float *up, const float *d_out, float *d_x,
                              float *d_up) {
  lanes a = lanes_set(0x1.988454p+0f), b = lanes_set(0x1.2444f2p-4f), b3 = lanes_set(3.0f * 0x1.2444f2p-4f), one = lanes_set(1.0f);
  FOR_LANES(dim) {
    lanes v = LOAD(x), u = v, slope = one, dy = LOAD(d_out);
    if (act == SFA_ACT_GELU_TANH) {
      lanes square = lanes_mul(v, v);
      u = lanes_mul(v, lanes_fma(square, b, a));
      slope = lanes_fma(square, b3, a);
    }
    lanes s = times_sigmoid(one, u);
    lanes steep = lanes_mul(lanes_mul(v, slope), lanes_sub(one, s));
    lanes derivative = lanes_fma(s, steep, s);
    if (up) {
      lanes other = LOAD(up);
      STORE(d_up, lanes_mul(dy, lanes_mul(v, s)));
      dy = lanes_mul(dy, other);
    }
    STORE(d_x, lanes_mul(dy, derivative));
  }
}

static void scale(int32_t dim, float factor, const float *x, bool add, float *out) {
  lanes f = lanes_set(factor);
  FOR_LANES(dim) STORE(out, add ? lanes_fma(f, LOAD(x), LOAD(out)) : lanes_mul(f, LOAD(x)));
}

/* The largest of x and the sum of e^((x - largest) * sharpness). */
static float soften(int32_t dim, const float *x, float sharpness, float *sum) {
  lanes most = lanes_set(-INFINITY), total = lanes_set(0.0f), by = lanes_set(sharpness);
  FOR_LANES(dim) most = lanes_max(n == 16 ? LOAD(x) : lanes_first(LOAD(x), n, -INFINITY), most);
  float peaks[16], largest = -INFINITY;
  lanes_store(peaks, most);
  for (int lane = 0; lane < 16; lane++)
    largest = peaks[lane] > largest ? peaks[lane] : largest;
  lanes shift = lanes_set(largest);
  FOR_LANES(dim) {
    lanes e = exp_lanes(lanes_mul(lanes_sub(LOAD(x), shift), by));
    total = lanes_add(total, n == 16 ? e : lanes_first(e, n, 0.0f));
  }
  *sum = sum_lanes(total);
  return largest;
}

static void loss(const sfa_loss *t, int64_t row) {
  int32_t dim = t->n_classes, target = t->targets[row];
  float *x = t->logits + row * dim, sum;
  const float *teacher = t->teacher ? t->teacher + row * dim : NULL;
  if (t->softcap > 0)
    softcap(dim, t->softcap, x);
  t->losses[row] = 0.0f;
  if (teacher)
    t->divergences[row] = 0.0f;
  if (target < 0) {
    if (t->backward)
      memset(x, 0, (size_t)dim * sizeof *x);
    return;
  }
  float largest = soften(dim, x, 1.0f, &sum);
  t->losses[row] = logf(sum) + largest - x[target];
  lanes shift = lanes_set(largest), share = lanes_set(t->target_scale / sum);
  /* Of the teacher and of x, at the temperature. */
  float cool = teacher ? 1.0f / t->temperature : 0.0f, sum_t = 1.0f, sum_x = 1.0f, peak = 0.0f, peak_x = 0.0f;
  if (teacher) {
    peak = soften(dim, teacher, cool, &sum_t);
    peak_x = soften(dim, x, cool, &sum_x);
  }
  lanes by = lanes_set(cool), shift_t = lanes_set(peak), shift_x = lanes_set(peak_x), inverse_t = lanes_set(1.0f / sum_t);
  lanes inverse_x = lanes_set(1.0f / sum_x), pull = lanes_set(t->teacher_scale * t->temperature), apart = lanes_set(0.0f);
  lanes cap = lanes_set(t->softcap > 0 ? 1.0f / t->softcap : 0.0f), one = lanes_set(1.0f);
  float at_target = t->softcap > 0 ? 1.0f - x[target] / t->softcap * (x[target] / t->softcap) : 1.0f;
  if (teacher)
    FOR_LANES(dim) {
      lanes d_t = lanes_mul(lanes_sub(LOAD(teacher), shift_t), by), d_x = lanes_mul(lanes_sub(LOAD(x), shift_x), by);
      lanes p = lanes_mul(exp_lanes(d_t), inverse_t);
      apart = lanes_add(apart, n == 16 ? lanes_mul(p, lanes_sub(d_t, d_x)) : lanes_first(lanes_mul(p, lanes_sub(d_t, d_x)), n, 0.0f));
    }
  if (teacher)
    t->divergences[row] = sum_lanes(apart) - logf(sum_t) + logf(sum_x);
  if (!t->backward)
    return;
  FOR_LANES(dim) {
    lanes v = LOAD(x), g = lanes_mul(exp_lanes(lanes_sub(v, shift)), share);
    if (teacher) {
      lanes p = lanes_mul(exp_lanes(lanes_mul(lanes_sub(LOAD(teacher), shift_t), by)), inverse_t);
      lanes q = lanes_mul(exp_lanes(lanes_mul(lanes_sub(v, shift_x), by)), inverse_x);
      g = lanes_fma(pull, lanes_sub(q, p), g);
    }
    lanes y = lanes_mul(v, cap);
    STORE(x, lanes_mul(g, lanes_sub(one, lanes_mul(y, y))));
  }
  x[target] -= t->target_scale * at_target;
}

static double square_sum(int32_t count, const float *x) {
  double sums[16] = {0}, sum = 0;
  FOR_LANES(count) for (int lane = 0; lane < n; lane++) sums[lane] += (double)x[i + lane] * (double)x[i + lane];
  for (int lane = 0; lane < 16; lane++)
    sum += sums[lane];
  return sum;
}

static void adamw(const sfa_adamw *t, int32_t count, const float *gradient, float *m, float *v, float *value) {
  lanes clip = lanes_set(t->clip ? t->clip->factor : 1.0f), beta1 = lanes_set(1.0f - t->beta1), beta2 = lanes_set(t->beta2),
        rest = lanes_set(1.0f - t->beta2);
  lanes keep = lanes_set(1.0f - t->rate * t->decay), step = lanes_set(-t->rate / t->correction1), eps = lanes_set(t->eps);
  lanes level = lanes_set(1.0f / sqrtf(t->correction2));
  FOR_LANES(count) {
    lanes g = lanes_mul(LOAD(gradient), clip), first = LOAD(m), second = LOAD(v);
    first = lanes_fma(beta1, lanes_sub(g, first), first);
    second = lanes_fma(rest, lanes_mul(g, g), lanes_mul(beta2, second));
    STORE(m, first);
    STORE(v, second);
    lanes size = lanes_add(lanes_mul(lanes_sqrt(second), level), eps);
    STORE(value, lanes_fma(step, lanes_div(first, size), lanes_mul(LOAD(value), keep)));
  }
}
