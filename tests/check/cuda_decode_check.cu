/* Decode on a GPU against the definition in double precision (docs/MATH.md 2, 3, 7): random shapes, types, layouts, lengths and masks; rows
 * that nobody may read are full of NaN; every case runs twice and must give the same bits.
 *
 *     cuda_decode_check [--check-only | cases [seed]]
 */
#include "cuda/cuda_stages.h"

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

static uint64_t state;
static uint32_t draw(uint32_t n) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)((state >> 33) % n);
}
static float uniform(void) { return ((float)draw(1 << 24) + 0.5f) / (float)(1 << 24); }
static float normal(void) { return sqrtf(-2 * logf(uniform())) * cosf(6.2831853f * uniform()); }

static void check(cudaError_t error, const char *what) {
  if (error != cudaSuccess) {
    printf("%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
  }
}

static float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
static float half_value(uint16_t h) {
  int exponent = h >> 10 & 31, fraction = h & 1023;
  float x = exponent ? ldexpf((float)(fraction + 1024), exponent - 25) : ldexpf((float)fraction, -24);
  return exponent == 31 ? NAN : h >> 15 ? -x : x;
}

static double e4m3_value(unsigned x) {
  unsigned exponent = x >> 3 & 15, fraction = x & 7;
  double value = (x & 127) == 127 ? NAN : exponent ? ldexp(8 + fraction, (int)exponent - 10) : ldexp(fraction, -9);
  return x >> 7 ? -value : value;
}

/* Stores x as an element of a row; of int8, int4 and e4m3 any number but NaN. */
static void put(unsigned char *row, sfa_dtype dtype, int at, float x) {
  if (dtype == SFA_F32)
    memcpy(row + 4 * at, &x, 4);
  else if (dtype == SFA_BF16)
    ((uint16_t *)row)[at] = (uint16_t)(bits_of(x) >> 16);
  else if (dtype == SFA_F16) /* a coarse f16: sign, exponent 14..16, 10 bits */
    ((uint16_t *)row)[at] = (uint16_t)((x < 0) << 15 | (14 + draw(3)) << 10 | draw(1024));
  else if (dtype == SFA_I8)
    ((int8_t *)row)[at] = (int8_t)((int)draw(255) - 127);
  else if (dtype == SFA_E4M3)
    row[at] = (unsigned char)(draw(2) << 7 | draw(127));
  else
    row[at / 2] = (unsigned char)(at % 2 ? (row[at / 2] & 15) | (1 + draw(15)) << 4 : 1 + draw(15));
}
static double value_at(const unsigned char *row, sfa_dtype dtype, int at) {
  switch (dtype) {
  case SFA_F32: return ((const float *)row)[at];
  case SFA_BF16: return float_of((uint32_t)((const uint16_t *)row)[at] << 16);
  case SFA_F16: return half_value(((const uint16_t *)row)[at]);
  case SFA_I8: return ((const int8_t *)row)[at];
  case SFA_E4M3: return e4m3_value(row[at]);
  default: return (row[at / 2] >> 4 * (at % 2) & 15) - 8;
  }
}

/* A store on both sides: host bytes at the same distances as device bytes. */
struct side {
  sfa_cuda_store store;
  std::vector<unsigned char> host;
  unsigned char *device;
  unsigned char **device_pages;
  std::vector<int64_t> page_at; /* [B][max_pages] */
  size_t sequence_bytes;
};

static size_t align64(size_t n) { return (n + 63) / 64 * 64; }

static const unsigned char *row_of(const side &s, const sfa_kv_stream &stream, size_t element_bytes_x2, int b, int g, int64_t token) {
  size_t at = s.store.pages ? (size_t)s.page_at[(size_t)(b * s.store.max_pages + token / 64)] : (size_t)b * s.sequence_bytes;
  at += stream.offset + (size_t)g * stream.head_bytes + (s.store.pages ? 0 : (size_t)(token / 64) * stream.tile_bytes);
  if (!s.store.pages)
    at += (size_t)(stream.base - s.device);
  return s.host.data() + at + (size_t)(token % 64) * (size_t)stream.row_stride * element_bytes_x2 / 2;
}

static size_t twice(sfa_dtype dtype) { return sfa_stored_bytes(dtype, 2); }

/* Rows of a format, random in every byte that may be read, NaN elsewhere. spread: of the row scales. */
static void make_side(side *s, sfa_row_format format, int n_sequences, int n_heads, int64_t max_keys, const std::vector<int32_t> &lengths,
                      bool paged, float spread) {
  int width = format.k ? format.k : format.dim;
  size_t id_bytes = format.dim <= 256 ? 1 : 2, ids = format.k ? (size_t)format.k * id_bytes : 0,
         values = (size_t)width * twice(format.dtype) / 2;
  bool scaled = sfa_has_scales(format.dtype);
  s->store = {};
  s->store.format = format;
  int64_t n_pages = (max_keys + 63) / 64;
  sfa_kv_stream *streams[3] = {&s->store.ids, &s->store.values, &s->store.scales};
  size_t bytes[3] = {ids, values, scaled ? (size_t)2 : 0}, elements[3] = {(size_t)format.k, (size_t)width, 1};
  if (paged) {
    size_t head = 0;
    for (int i = 0; i < 3; i++) {
      streams[i]->offset = 64 + head;
      streams[i]->row_stride = (int64_t)elements[i];
      head += align64(64 * bytes[i]);
    }
    for (int i = 0; i < 3; i++)
      streams[i]->head_bytes = head;
    size_t page = 64 + head * (size_t)n_heads, total = (size_t)n_sequences * (size_t)n_pages;
    s->host.assign(page * (total + 1), 0xff);
    s->store.max_pages = n_pages;
    s->page_at.resize(total);
    for (size_t i = 0; i < total; i++)
      s->page_at[i] = (int64_t)(page * ((i * 7 + 3) % (total + (total % 7 == 0))));
  } else {
    size_t at = 0;
    size_t starts[3];
    for (int i = 0; i < 3; i++) {
      starts[i] = at;
      at += align64(bytes[i] * (size_t)n_heads * (size_t)(n_pages * 64));
      streams[i]->head_bytes = bytes[i];
      streams[i]->row_stride = (int64_t)elements[i] * n_heads;
      streams[i]->tile_bytes = bytes[i] * (size_t)n_heads * 64;
    }
    s->sequence_bytes = at;
    s->store.sequence_bytes = (int64_t)at;
    s->host.assign(at * (size_t)n_sequences, 0xff);
    for (int i = 0; i < 3; i++)
      streams[i]->base = (const unsigned char *)starts[i];
  }
  check(cudaMalloc((void **)&s->device, s->host.size() + 64), "memory");
  if (paged) {
    std::vector<unsigned char *> pages(s->page_at.size());
    for (size_t i = 0; i < pages.size(); i++)
      pages[i] = s->device + s->page_at[i];
    check(cudaMalloc((void **)&s->device_pages, pages.size() * sizeof(void *) + 8), "pages");
    check(cudaMemcpy(s->device_pages, pages.data(), pages.size() * sizeof(void *), cudaMemcpyHostToDevice), "pages");
    s->store.pages = s->device_pages;
  } else {
    s->device_pages = NULL;
    for (int i = 0; i < 3; i++)
      streams[i]->base = s->device + (size_t)(uintptr_t)streams[i]->base;
  }
  for (int b = 0; b < n_sequences; b++)
    for (int g = 0; g < n_heads; g++)
      for (int64_t token = 0; token < lengths[(size_t)b]; token++) {
        unsigned char *row = (unsigned char *)row_of(*s, s->store.values, twice(format.dtype), b, g, token);
        for (int i = 0; i < width; i++)
          put(row, format.dtype, i, normal());
        if (format.k) {
          unsigned char *id = (unsigned char *)row_of(*s, s->store.ids, 2 * id_bytes, b, g, token);
          for (int i = 0, u = 0; i < format.k; u++)
            if (draw((uint32_t)(format.dim - u)) < (uint32_t)(format.k - i)) {
              if (id_bytes == 1)
                id[i++] = (unsigned char)u;
              else
                ((uint16_t *)id)[i++] = (uint16_t)u;
            }
        }
        if (scaled) {
          uint16_t *scale = (uint16_t *)row_of(*s, s->store.scales, 4, b, g, token);
          *scale = (uint16_t)((format.dtype == SFA_I4 ? 13 : 9) << 10 | draw(1024)); /* about 1/4 and 1/64 */
          if (spread > 1 && draw(4) == 0)
            *scale = (uint16_t)(*scale - 0x1000);
        }
      }
  check(cudaMemcpy(s->device, s->host.data(), s->host.size(), cudaMemcpyHostToDevice), "rows");
}

static void free_side(side *s) {
  cudaFree(s->device);
  cudaFree(s->device_pages);
}

static const char *dtype_name(sfa_dtype dtype) {
  static const char *const names[] = {"-", "f32", "bf16", "f16", "i8", "i4", "e4m3"};
  return names[dtype];
}

static double worst_out, worst_lse;
static int n_dropping, n_flat;

static bool sees(const sfa_cuda_decode &args, int64_t position, int64_t j) {
  const sfa_cuda_scores &c = args.scores;
  return (!c.causal || j <= position) && (c.window_right < 0 || j <= position + c.window_right) &&
         (c.window_left < 0 || j >= position - c.window_left || j < c.n_sink_tokens);
}

/* NaN in one column of all keys of a head: its rows that see a key have NaN there, and all other numbers the bits they had. */
static bool nan_stays(const sfa_cuda_decode &args, const std::vector<int32_t> &lengths, side *v, const std::vector<float> &before) {
  std::vector<float> after(before.size());
  size_t E = (size_t)args.head_dim_v;
  int b = (int)draw((uint32_t)args.n_sequences), g = (int)draw((uint32_t)args.n_kv_heads), column = (int)draw((uint32_t)E);
  for (int64_t j = 0; j < lengths[(size_t)b]; j++)
    ((unsigned char *)row_of(*v, v->store.values, 2, b, g, j))[column] = (unsigned char)(draw(2) ? 0x7f : 0xff);
  check(cudaMemcpy(v->device, v->host.data(), v->host.size(), cudaMemcpyHostToDevice), "rows");
  const char *refused = sfa_cuda_decode_run(&args, 0);
  check(cudaMemcpy(after.data(), args.out, after.size() * 4, cudaMemcpyDeviceToHost), refused ? refused : "NaN");
  for (size_t i = 0; i < after.size(); i++) {
    size_t r = i / E;
    int h = (int)(r % (size_t)args.n_heads), t = (int)(r / (size_t)args.n_heads) % args.n_queries;
    bool own = (int)(r / (size_t)args.n_heads) / args.n_queries == b && h / (args.n_heads / args.n_kv_heads) == g;
    if (!own || (int)(i % E) != column) {
      if (memcmp(&before[i], &after[i], 4) == 0)
        continue;
    } else {
      int64_t position = lengths[(size_t)b] - args.n_queries + t, j = 0;
      while (j < lengths[(size_t)b] && !sees(args, position, j))
        j++;
      if (j == lengths[(size_t)b] || isnan(after[i]))
        continue;
    }
    printf("NaN in column %d of sequence %d head %d: row %zu column %zu is %.7g, was %.7g\n", column, b, g, r, i % E, after[i], before[i]);
    return false;
  }
  return true;
}

/* One random case; returns whether it is right. */
static bool run_case(int number) {
  static const int dims[] = {64, 128, 128, 256, 40, 512}, groups[] = {1, 1, 2, 3, 4, 4, 7, 8, 16}, tokens[] = {1, 1, 1, 2, 3, 5, 8};
  static const int lengths_of[] = {0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 255, 257, 1000, 2049};
  static const int kept[] = {8, 16, 16, 24, 32, 5};
  static const sfa_dtype key_types[] = {SFA_I8, SFA_I8, SFA_I8, SFA_BF16, SFA_F16, SFA_F32};
  static const sfa_dtype value_types[] = {SFA_I8, SFA_BF16, SFA_E4M3, SFA_E4M3, SFA_I8, SFA_BF16, SFA_I4, SFA_F32, SFA_F16};
  sfa_cuda_decode args = {};
  int group = groups[draw(9)], n_kv = 1 + (int)draw(3), n_seq = 1 + (int)draw(3);
  args.n_sequences = n_seq;
  args.n_queries = tokens[draw(7)];
  args.n_kv_heads = n_kv;
  args.n_heads = n_kv * group;
  bool common = draw(2); /* what the form with eps is made for */
  args.head_dim = dims[common ? draw(3) : draw(6)];
  args.head_dim_v = draw(4) ? args.head_dim : dims[common ? draw(3) : draw(6)];
  sfa_row_format kf = {args.head_dim, draw(5) || common ? kept[common ? draw(3) : draw(6)] : 0, key_types[common ? 0 : draw(6)]};
  sfa_row_format vf = {args.head_dim_v, 0, value_types[common ? draw(4) : draw(9)]};
  args.k_q = draw(3) ? 0 : 1 + (int)draw((uint32_t)args.head_dim);
  std::vector<int32_t> lengths((size_t)n_seq);
  int64_t longest = 1;
  for (int b = 0; b < n_seq; b++) {
    lengths[(size_t)b] = draw(3) ? lengths_of[draw(14)] : (int32_t)draw(1500);
    longest = lengths[(size_t)b] > longest ? lengths[(size_t)b] : longest;
  }
  int64_t room = longest + (draw(2) ? draw(3000) : 0), n_pairs = (int64_t)n_seq * n_kv * ((group * args.n_queries + 3) / 4);
  args.max_keys = room + (draw(3) ? 0 : 4096 * (2 + 1056 / n_pairs)); /* now and then so large that splits of calls with eps are long */
  float sharp = draw(3) == 0 ? 8.f : draw(3) == 0 ? 0.05f : 1.f;
  args.scores.softmax_scale = sharp / sqrtf((float)args.head_dim);
  args.scores.causal = draw(4) != 0;
  args.scores.window_left = draw(4) ? -1 : (int64_t)draw(300);
  args.scores.window_right = draw(5) ? -1 : (int64_t)draw(3);
  args.scores.n_sink_tokens = draw(3) ? 0 : (int64_t)draw(70);
  args.scores.softcap = draw(5) ? 0.f : 4.f;
  args.eps = draw(2) ? 0.f : draw(2) ? 1e-3f : 0.05f;
  bool bf16_q = draw(2), paged = draw(2), alibi = !draw(5), sinks = !draw(4), flat = sharp < 0.1f && !alibi && !sinks;

  side k, v;
  make_side(&k, kf, n_seq, n_kv, room, lengths, paged, 1);
  make_side(&v, vf, n_seq, n_kv, room, lengths, paged, 2);
  args.k = k.store;
  args.v = v.store;
  size_t n_rows = (size_t)n_seq * (size_t)args.n_queries * (size_t)args.n_heads, D = (size_t)args.head_dim, E = (size_t)args.head_dim_v;
  std::vector<float> q(n_rows * D), slopes((size_t)args.n_heads), sink((size_t)args.n_heads);
  std::vector<uint16_t> q16(n_rows * D);
  for (size_t i = 0; i < q.size(); i++) {
    q[i] = draw(20) ? normal() : 1.5f; /* ties */
    if (bf16_q)
      q[i] = float_of(bits_of(q[i]) & 0xffff0000u);
    q16[i] = (uint16_t)(bits_of(q[i]) >> 16);
  }
  for (size_t h = 0; h < slopes.size(); h++)
    slopes[h] = 0.1f / (float)(h + 1), sink[h] = normal() * 3;
  void *dq;
  float *dout, *dlse, *ddropped, *dslopes, *dsink;
  int32_t *dlen;
  check(cudaMalloc(&dq, q.size() * 4), "q");
  check(cudaMemcpy(dq, bf16_q ? (void *)q16.data() : (void *)q.data(), q.size() * (bf16_q ? 2 : 4), cudaMemcpyHostToDevice), "q");
  check(cudaMalloc(&dout, n_rows * E * 4), "out");
  check(cudaMalloc(&dlse, n_rows * 4), "lse");
  check(cudaMalloc(&ddropped, n_rows * 4), "dropped");
  check(cudaMalloc(&dslopes, slopes.size() * 4), "slopes");
  check(cudaMalloc(&dsink, sink.size() * 4), "sinks");
  check(cudaMalloc(&dlen, lengths.size() * 4), "lengths");
  check(cudaMemcpy(dslopes, slopes.data(), slopes.size() * 4, cudaMemcpyHostToDevice), "slopes");
  check(cudaMemcpy(dsink, sink.data(), sink.size() * 4, cudaMemcpyHostToDevice), "sinks");
  check(cudaMemcpy(dlen, lengths.data(), lengths.size() * 4, cudaMemcpyHostToDevice), "lengths");
  args.q = {dq, bf16_q ? SFA_BF16 : SFA_F32, (int64_t)args.n_heads * args.head_dim, args.head_dim};
  args.n_keys = dlen;
  args.scores.alibi_slopes = alibi ? dslopes : NULL;
  args.scores.sink_logit = sinks ? dsink : NULL;
  args.out = dout;
  args.lse = dlse;
  args.dropped = ddropped;
  size_t workspace = sfa_cuda_decode_workspace_bytes(&args);
  check(cudaMalloc(&args.workspace, workspace + 256), "workspace");

  std::vector<float> out[2], lse[2], dropped(n_rows);
  bool right = true;
  for (int run = 0; run < 2 && right; run++) {
    out[run].resize(n_rows * E);
    lse[run].resize(n_rows);
    cudaMemset(dout, 0xff, n_rows * E * 4);
    cudaMemset(dlse, 0xff, n_rows * 4);
    cudaMemset(ddropped, 0xff, n_rows * 4);
    cudaMemset(args.workspace, 0xff, workspace);
    const char *refused = sfa_cuda_decode_run(&args, 0);
    cudaError_t error = cudaDeviceSynchronize();
    if (refused || error != cudaSuccess) {
      printf("case %d: %s\n", number, refused ? refused : cudaGetErrorString(error));
      right = false;
    }
    cudaMemcpy(out[run].data(), dout, n_rows * E * 4, cudaMemcpyDeviceToHost);
    cudaMemcpy(lse[run].data(), dlse, n_rows * 4, cudaMemcpyDeviceToHost);
    cudaMemcpy(dropped.data(), ddropped, n_rows * 4, cudaMemcpyDeviceToHost);
  }
  if (right && (memcmp(out[0].data(), out[1].data(), n_rows * E * 4) || memcmp(lse[0].data(), lse[1].data(), n_rows * 4))) {
    printf("case %d: two runs differ\n", number);
    right = false;
  }

  std::vector<double> s, o(E);
  for (size_t r = draw(1 + (uint32_t)n_rows / 60); r < n_rows && right; r += 1 + n_rows / 60) { /* some 60 rows of a large case */
    int h = (int)(r % (size_t)args.n_heads), t = (int)(r / (size_t)args.n_heads) % args.n_queries,
        b = (int)(r / (size_t)args.n_heads) / args.n_queries, g = h / group;
    std::vector<float> row(q.begin() + (long)(r * D), q.begin() + (long)((r + 1) * D));
    if (args.k_q && args.k_q < args.head_dim) {
      std::vector<float> all = row;
      for (int u = 0; u < args.head_dim; u++) {
        int larger = 0;
        for (int w = 0; w < args.head_dim; w++)
          larger += fabsf(all[(size_t)w]) > fabsf(all[(size_t)u]) || (fabsf(all[(size_t)w]) == fabsf(all[(size_t)u]) && w < u);
        if (larger >= args.k_q)
          row[(size_t)u] = 0;
      }
    }
    int64_t n = lengths[(size_t)b], position = n - args.n_queries + t;
    double m = sinks ? sink[(size_t)h] : -INFINITY, l = 0, largest_v = 0;
    s.assign((size_t)n, -INFINITY);
    for (int64_t j = 0; j < n; j++) {
      const sfa_cuda_scores &c = args.scores;
      if (!sees(args, position, j))
        continue;
      const unsigned char *key = row_of(k, k.store.values, twice(kf.dtype), b, g, j);
      const unsigned char *id = kf.k ? row_of(k, k.store.ids, args.head_dim <= 256 ? 2 : 4, b, g, j) : NULL;
      double x = 0;
      for (int i = 0; i < (kf.k ? kf.k : kf.dim); i++)
        x += value_at(key, kf.dtype, i) * row[(size_t)(!id ? i : args.head_dim <= 256 ? id[i] : ((const uint16_t *)id)[i])];
      if (kf.dtype == SFA_I8)
        x *= half_value(*(const uint16_t *)row_of(k, k.store.scales, 4, b, g, j));
      x *= c.softmax_scale;
      if (c.softcap > 0)
        x = c.softcap * tanh(x / c.softcap);
      if (alibi)
        x += slopes[(size_t)h] * (double)(j - position);
      s[(size_t)j] = x;
      m = x > m ? x : m;
    }
    o.assign(E, 0);
    if (sinks)
      l = exp(sink[(size_t)h] - m);
    for (int64_t j = 0; j < n; j++) {
      if (s[(size_t)j] == -INFINITY)
        continue;
      double p = exp(s[(size_t)j] - m), unit = 1;
      l += p;
      if (sfa_has_scales(vf.dtype))
        unit = half_value(*(const uint16_t *)row_of(v, v.store.scales, 4, b, g, j));
      const unsigned char *value = row_of(v, v.store.values, twice(vf.dtype), b, g, j);
      for (size_t e = 0; e < E; e++) {
        double x = value_at(value, vf.dtype, (int)e) * unit;
        o[e] += p * x;
        largest_v = fabs(x) > largest_v ? fabs(x) : largest_v;
      }
    }
    double want_lse = l > 0 ? m + log(l) : -INFINITY, limit = 1e-4;
    double lse_error = want_lse == lse[0][r] ? 0 : fabs(want_lse - lse[0][r]) / (1 + fabs(want_lse));
    worst_lse = lse_error > worst_lse ? lse_error : worst_lse;
    if (!(lse_error <= limit)) {
      printf("case %d row %zu (b %d t %d h %d): lse %.7g instead of %.7g\n", number, r, b, t, h, lse[0][r], want_lse);
      right = false;
    }
    for (size_t e = 0; e < E && right; e++) {
      double want = l > 0 ? o[e] / l : 0, error = fabs(want - out[0][r * E + e]) / (largest_v + 1e-30);
      if (largest_v == 0)
        error = out[0][r * E + e] == 0 ? 0 : NAN;
      if (dropped[r] == 0)
        worst_out = error > worst_out ? error : worst_out;
      if (!(error <= limit + 2 * dropped[r])) {
        printf("case %d row %zu (b %d t %d h %d) column %zu: %.7g instead of %.7g, values up to %.3g\n", number, r, b, t, h, e,
               out[0][r * E + e], want, largest_v);
        right = false;
      }
    }
    n_dropping += dropped[r] > 0;
    n_flat += flat && args.eps > 0;
    if (flat && dropped[r] != 0) { /* nearly all would be kept, so all are */
      printf("case %d row %zu: dropped %.6g of a flat softmax\n", number, r, dropped[r]);
      right = false;
    }
    if (right && !(dropped[r] >= 0 && dropped[r] <= args.eps)) {
      printf("case %d row %zu (b %d t %d h %d): dropped %.6g with eps %.6g\n", number, r, b, t, h, dropped[r], args.eps);
      right = false;
    }
  }
  if (right && vf.dtype == SFA_E4M3)
    right = nan_stays(args, lengths, &v, out[0]);
  if (!right) {
    printf(
        "  case %d: B %d T %d H %d G %d D %d E %d k %d %s v %s k_q %d q %s %s causal %d window %d %d sinks %d softcap %g alibi %d logit %d "
        "scale %.3g eps %g max_keys %d lengths",
        number, n_seq, args.n_queries, args.n_heads, n_kv, args.head_dim, args.head_dim_v, kf.k, dtype_name(kf.dtype), dtype_name(vf.dtype),
        args.k_q, bf16_q ? "bf16" : "f32", paged ? "pages" : "arrays", args.scores.causal, (int)args.scores.window_left,
        (int)args.scores.window_right, (int)args.scores.n_sink_tokens, args.scores.softcap, alibi, sinks, args.scores.softmax_scale,
        args.eps, (int)args.max_keys);
    for (int32_t length : lengths)
      printf(" %d", length);
    printf("\n");
  }
  free_side(&k);
  free_side(&v);
  cudaFree(dq), cudaFree(dout), cudaFree(dlse), cudaFree(ddropped), cudaFree(dslopes), cudaFree(dsink), cudaFree(dlen),
      cudaFree(args.workspace);
  check(cudaDeviceSynchronize(), "device");
  return right;
}

int main(int argc, char **argv) {
  bool brief = argc > 1 && !strcmp(argv[1], "--check-only");
  int cases = argc > 1 && !brief ? atoi(argv[1]) : 150, wrong = 0, n_devices = 0;
  uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  if (cudaGetDeviceCount(&n_devices) != cudaSuccess || !n_devices) {
    printf("no GPU: skipped\n");
    return 77;
  }
  printf("decode: %d cases, seed %llu\n", cases, (unsigned long long)seed);
  for (int i = 0; i < cases && wrong < 12; i++) {
    state = seed * 1000003 + (uint64_t)i * 7919;
    draw(2);
    wrong += !run_case(i);
    fflush(stdout);
  }
  printf("%d wrong; largest error of out %.2e of the largest value, of lse %.2e; %d rows left keys out, %d of a flat softmax did not\n",
         wrong, worst_out, worst_lse, n_dropping, n_flat);
  if (cases >= 150 && (n_dropping == 0 || n_flat == 0)) {
    printf("of %d cases none left keys out, or none kept all\n", cases);
    wrong++;
  }
  return wrong != 0;
}
