"""Decode of the CUDA backend beside cuDNN and a flash-decoding kernel in Triton (PyTorch) on one GPU.

    nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 -Isrc -Iinclude -shared -Xcompiler -fPIC -o decode.so src/cuda/decode*.cu
    python3 bench/cuda_decode.py decode.so [--only WORDS] [--rounds N] > bench/results/MACHINE-decode.csv

One query token, 8 kv heads, head dim 128. Keys are codes with skewed supports as on trained models (docs/BENCHMARKS.md), the peers get the rows before
top-k in bf16 (what they hold changes nothing in their time). A time is a CUDA graph's over several sets of buffers, more than the L2 holds,
divided by the sets; all engines of a shape take turns, medians, the spread is (largest - smallest) / median of the middle half. "ratio" is
the better peer's time over ours, "dense_ratio" that of our own kernel over dense int8 keys and values. With eps the softmax is sharpened
until the wanted share of rows of V survives; "kept" is the share that any kernel has to read at least, "dropped" the largest mass that a
head lost, "error" the largest difference from the softmax in f32 relative to the largest value.
"""
import argparse, ctypes, math, sys
import torch, torch.nn.functional as F
import triton, triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

P, I32, I64, F32, SIZE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_size_t
SFA_F32, SFA_BF16, SFA_I8, SFA_E4M3 = 1, 2, 4, 6  # sfa_dtype
DTYPES = {torch.bfloat16: SFA_BF16, torch.int8: SFA_I8, torch.float8_e4m3fn: SFA_E4M3}
G, D, PAGE = 8, 128, 64


class Rows(ctypes.Structure):
    _fields_ = [("data", P), ("dtype", I32), ("token_stride", I64), ("head_stride", I64)]


class Scores(ctypes.Structure):
    _fields_ = [("softmax_scale", F32), ("softcap", F32), ("causal", I32), ("window_left", I64), ("window_right", I64),
                ("n_sink_tokens", I64), ("sink_logit", P), ("alibi_slopes", P)]


class Format(ctypes.Structure):
    _fields_ = [("dim", I32), ("k", I32), ("dtype", I32)]


class Stream(ctypes.Structure):
    _fields_ = [("base", P), ("offset", SIZE), ("head_bytes", SIZE), ("tile_bytes", SIZE), ("row_stride", I64)]


class Store(ctypes.Structure):
    _fields_ = [("pages", P), ("max_pages", I64), ("sequence_bytes", I64), ("format", Format), ("ids", Stream), ("values", Stream),
                ("scales", Stream)]


class Decode(ctypes.Structure):
    _fields_ = [("n_sequences", I32), ("n_queries", I32), ("n_heads", I32), ("n_kv_heads", I32), ("head_dim", I32), ("head_dim_v", I32),
                ("q", Rows), ("rope_cos", P), ("rope_sin", P), ("n_pairs", I32), ("rope_interleaved", I32), ("k_q", I32), ("k", Store),
                ("v", Store), ("n_keys", P), ("max_keys", I64), ("scores", Scores), ("eps", F32), ("out", P), ("lse", P), ("dropped", P), ("between", P), ("workspace", P)]


# ---- A peer: flash decoding -------------------------------------------------------------------------------------------------------------
@triton.jit
def split_kernel(q_at, k_at, v_at, out_at, sums_at, n, share, scale, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    split, head, n_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, dims, keys = tl.arange(0, 16), tl.arange(0, DIM), tl.arange(0, BLOCK)
    q = tl.load(q_at + (head * GROUP + rows)[:, None] * DIM + dims[None, :], mask=(rows < GROUP)[:, None], other=0.0)
    m = tl.full([16], -1e30, tl.float32)
    l = tl.zeros([16], tl.float32)
    o = tl.zeros([16, DIM], tl.float32)
    base = head.to(tl.int64) * n * DIM
    for first in range(split * share, tl.minimum(n, (split + 1) * share), BLOCK):
        at = base + (first + keys).to(tl.int64)[:, None] * DIM + dims[None, :]
        k, v = tl.load(k_at + at), tl.load(v_at + at)
        s = tl.dot(q, tl.trans(k)) * scale
        raised = tl.maximum(m, tl.max(s, 1))
        p, factor = tl.exp2(s - raised[:, None]), tl.exp2(m - raised)
        l = l * factor + tl.sum(p, 1)
        o = o * factor[:, None] + tl.dot(p.to(tl.bfloat16), v)
        m = raised
    part = (head * n_splits + split) * 16 + rows
    tl.store(out_at + part[:, None] * DIM + dims[None, :], o, mask=(rows < GROUP)[:, None])
    tl.store(sums_at + part * 2, m, mask=rows < GROUP)
    tl.store(sums_at + part * 2 + 1, l, mask=rows < GROUP)


@triton.jit
def merge_kernel(out_at, sums_at, to, n_splits, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    head, row = tl.program_id(0), tl.program_id(1)
    dims, splits = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, SPLITS)
    part = (head * n_splits + splits) * 16 + row
    m = tl.load(sums_at + part * 2, mask=splits < n_splits, other=-1e30)
    l = tl.load(sums_at + part * 2 + 1, mask=splits < n_splits, other=0.0)
    factor = tl.exp2(m - tl.max(m, 0))
    o = tl.load(out_at + part[:, None] * DIM + dims[None, :], mask=(splits < n_splits)[:, None], other=0.0)
    tl.store(to + (head * GROUP + row) * DIM + dims, (tl.sum(o * factor[:, None], 0) / tl.sum(l * factor, 0)).to(tl.bfloat16))


def flash_decoding(q, k, v, n, group, n_splits, block, warps, stages):
    share = -(-(-(-n // n_splits)) // block) * block
    n_splits = -(-n // share)
    out, sums = torch.empty(G * n_splits * 16 * D, device="cuda"), torch.empty(G * n_splits * 32, device="cuda")
    to = torch.empty(G * group, D, device="cuda", dtype=torch.bfloat16)

    def run():
        split_kernel[(n_splits, G)](q, k, v, out, sums, n, share, 1.4427 / math.sqrt(D), GROUP=group, DIM=D, BLOCK=block, num_warps=warps,
                                    num_stages=stages)
        merge_kernel[(G, group, 4)](out, sums, to, n_splits, GROUP=group, DIM=D, SPLITS=triton.next_power_of_2(n_splits), COLUMNS=32)

    return run


# ---- Rows, codes, calls -------------------------------------------------------------------------------------------------------------------
def skewed_rows(n):
    scale = ((torch.arange(D, device="cuda") + 0.5) / D + 0.25) ** -1.2
    x = torch.randn(G, n, D, device="cuda", dtype=torch.bfloat16)
    for g in range(G):
        x[g] *= scale[torch.randperm(D, device="cuda")].bfloat16()
    return x


def int8_rows(x):
    values, scales = torch.empty(x.shape, device="cuda", dtype=torch.int8), torch.empty(x.shape[:-1], device="cuda", dtype=torch.float16)
    for g in range(G):
        scales[g] = (x[g].float().abs().amax(-1) / 127 * (1 + 2**-10)).half()
        values[g] = (x[g].float() / scales[g].float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return values, scales


def fp8_rows(x):
    values, scales = torch.empty(x.shape, device="cuda", dtype=torch.float8_e4m3fn), torch.empty(x.shape[:-1], device="cuda", dtype=torch.float16)
    for g in range(G):
        scales[g] = torch.exp2(torch.ceil(torch.log2(x[g].float().abs().amax(-1) / 448))).half()
        values[g] = (x[g].float() / scales[g].float()[:, None]).to(torch.float8_e4m3fn)
    return values, scales


def codes(x, k):
    ids, values = torch.empty(*x.shape[:-1], k, device="cuda", dtype=torch.uint8), torch.empty(*x.shape[:-1], k, device="cuda", dtype=x.dtype)
    for g in range(G):
        for first in range(0, x.shape[1], 1 << 18):
            part = x[g, first : first + (1 << 18)]
            best = part.abs().topk(k, -1).indices.sort(-1).values
            ids[g, first : first + (1 << 18)] = best.to(torch.uint8)
            values[g, first : first + (1 << 18)] = part.gather(-1, best)
    return (ids, *int8_rows(values))


def stream(x, width, element):
    if x is None:
        return Stream()
    return Stream(x.data_ptr(), 0, x.shape[1] * width * element, PAGE * width * element, width)


def store(ids, values, scales):
    k = 0 if ids is None else ids.shape[-1]
    element = values.element_size()
    return Store(None, 0, 0, Format(D, k, DTYPES[values.dtype]), stream(ids, k, 1), stream(values, k or D, element),
                 stream(scales, 1, 2))


class Call:
    def __init__(self, library, q, keys, values, n, group, scale, eps):
        self.library, self.keep = library, (q, keys, values)
        self.lengths = torch.tensor([n], device="cuda", dtype=torch.int32)
        self.out, self.lse, self.dropped = (torch.full(s, math.nan, device="cuda") for s in ((G * group, D), (G * group,), (G * group,)))
        self.args = Decode(1, 1, G * group, G, D, D, Rows(q.data_ptr(), SFA_BF16, G * group * D, D), None, None, 0, 0, 0, store(*keys),
                           store(None, *values), self.lengths.data_ptr(), n, Scores(scale, 0, 1, -1, -1, 0, None, None), eps, self.out.data_ptr(),
                           self.lse.data_ptr(), self.dropped.data_ptr(), None)
        self.workspace = torch.full((library.sfa_cuda_decode_workspace_bytes(ctypes.byref(self.args)),), 255, device="cuda", dtype=torch.uint8)
        self.args.workspace = self.workspace.data_ptr()

    def __call__(self):
        refused = self.library.sfa_cuda_decode_run(ctypes.byref(self.args), torch.cuda.current_stream().cuda_stream)
        if refused:
            sys.exit(refused.decode())


# ---- Times ----------------------------------------------------------------------------------------------------------------------------------
def graph_of(calls):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph, calls  # whose buffers the graph works on


def microseconds(graph, n):
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    graph[0].replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e3 / n


def race(graphs, n_sets, rounds):
    times = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            t = microseconds(graph, n_sets)
            if turn >= 2:
                times[name].append(t)
    result = {}
    for name, t in times.items():
        t.sort()
        middle = t[len(t) // 4 : len(t) - len(t) // 4]
        result[name] = (t[len(t) // 2], (middle[-1] - middle[0]) / t[len(t) // 2])
    return result


def best_flash_decoding(q, ks, vs, n, group):
    best = None
    for n_splits in (16, 33, 66) if n < 1 << 17 else (33, 66, 132):
        for block, warps, stages in ((64, 4, 3), (128, 8, 3)):
            graph = graph_of([flash_decoding(q, k, v, n, group, n_splits, block, warps, stages) for k, v in zip(ks, vs)])
            t = sorted(microseconds(graph, len(ks)) for _ in range(4))[1]
            if best is None or t < best[0]:
                best = (t, graph, f"triton {n_splits} splits of {block}")
    return best[1]


# ---- What is right --------------------------------------------------------------------------------------------------------------------------
def products(q, keys, group):
    """q.k [G][group][n] in f32, of the stored keys."""
    ids, values, scales = keys
    out = torch.empty(G, group, values.shape[1], device="cuda")
    for g in range(G):
        rows = values[g].float() * scales[g].float()[:, None] if scales is not None else values[g].float()
        for r in range(group):
            row = q[g * group + r].float()
            out[g, r] = (row[ids[g].long()] * rows).sum(-1) if ids is not None else rows @ row
    return out


def kept_share(s, eps):
    """Share of rows that some head of a group must keep."""
    kept = 0.0
    for g in range(G):
        p = torch.softmax(s[g].double(), -1)
        order = p.sort(-1)
        keep = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order.indices, order.values.cumsum(-1) > eps)
        kept += keep.any(0).float().mean().item() / G
    return kept


def sharpness(s, eps, want):
    low, high = 0.01, 300.0
    for _ in range(16):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kept_share(s * middle, eps) > want else (low, middle)
    return math.sqrt(low * high)


def expected(s, values):
    out = torch.empty(G, s.shape[1], D, device="cuda")
    for g in range(G):
        rows = values[0][g].float() * (values[1][g].float()[:, None] if values[1] is not None else 1)
        out[g] = torch.softmax(s[g].double(), -1).float() @ rows
    return out.view(-1, D)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--only", default="", help="shapes whose line begins with one of these words, comma separated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--lengths", default="32768,131072,1048576")
    parser.add_argument("--groups", default="1,4")
    options = parser.parse_args()
    library = ctypes.CDLL(options.library)
    library.sfa_cuda_decode_run.restype, library.sfa_cuda_decode_run.argtypes = ctypes.c_char_p, [P, P]
    library.sfa_cuda_decode_workspace_bytes.restype, library.sfa_cuda_decode_workspace_bytes.argtypes = SIZE, [P]
    torch.manual_seed(1)
    print("form,n,group,k,values,eps,kept,us,spread,cudnn_us,triton_us,ratio,dense_us,dense_ratio,GB_per_s,dropped,error", flush=True)
    for n in map(int, options.lengths.split(",")):
        n_sets = max(2, min(12, (1 << 28) // (n * G * 34)))
        rows = [skewed_rows(n) for _ in range(n_sets)]
        vs = [torch.randn(G, n, D, device="cuda", dtype=torch.bfloat16) for _ in range(n_sets)]
        vs8, ks8 = [int8_rows(v) for v in vs], [(None, *int8_rows(x)) for x in rows]
        keys = {k: [codes(x, k) for x in rows] for k in (8, 16)}
        values = {"bf16": [(v, None) for v in vs], "int8": vs8, "fp8": [fp8_rows(v) for v in vs]}
        for group in map(int, options.groups.split(",")):
            q = torch.randn(G * group, D, device="cuda", dtype=torch.bfloat16)
            scale = 1 / math.sqrt(D)
            graphs = {}
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                graphs["cudnn"] = graph_of([lambda x=x, v=v: F.scaled_dot_product_attention(q[None, :, None], x[None], v[None], enable_gqa=group > 1)
                                            for x, v in zip(rows, vs)])
            graphs["triton"] = best_flash_decoding(q, rows, vs, n, group)
            graphs["dense"] = graph_of([Call(library, q, k, v, n, group, scale, 0.0) for k, v in zip(ks8, vs8)])
            shapes, calls = [], {}
            for form, k, dtype, share in (("exact", 16, "bf16", 1), ("exact", 16, "int8", 1), ("exact", 8, "bf16", 1), ("exact", 8, "int8", 1),
                                          ("exact", 16, "fp8", 1), ("exact", 8, "fp8", 1), ("eps", 16, "fp8", 0.5),
                                          ("eps", 16, "int8", 0.5), ("eps", 8, "bf16", 0.001), ("eps", 8, "bf16", 0.06)):
                if options.only and form not in options.only.split(","):
                    continue
                s = products(q, keys[k][0], group) * scale
                sharp = sharpness(s, options.eps, share) if form == "eps" else 1.0
                eps = options.eps if form == "eps" else 0.0
                line = [Call(library, q, key, value, n, group, scale * sharp, eps) for key, value in zip(keys[k], values[dtype])]
                kept = kept_share(s * sharp, eps) if form == "eps" else 1.0
                line[0]()
                torch.cuda.synchronize()
                want = expected(s * sharp, values[dtype][0])
                largest = vs[0].float().abs().amax().item()
                error = (line[0].out - want).abs().amax().item() / largest
                lse = (line[0].lse - torch.logsumexp((s * sharp).double(), -1).float().view(-1)).abs().amax().item()
                if not error <= 2.1 * max(eps, 1e-4) or not lse <= 1e-2:
                    print(f"wrong: {form} n {n} group {group} k {k} {dtype}: error {error} lse {lse}", flush=True)
                name = f"{form} {k} {dtype} {share}"
                graphs[name], calls[name] = graph_of(line), line
                nbytes = G * n * (2 * k + 2 + kept * (2 * D if dtype == "bf16" else D + 2))
                shapes.append((name, form, k, dtype, eps, kept, error, line[0].dropped.amax().item(), nbytes))
                del s
            times = race(graphs, n_sets, options.rounds)
            peer, dense = min(times["cudnn"][0], times["triton"][0]), times["dense"][0]
            for name, form, k, dtype, eps, kept, error, dropped, nbytes in shapes:
                t, spread = times[name]
                print(f"{form},{n},{group},{k},{dtype},{eps:g},{kept:.4f},{t:.1f},{spread:.3f},{times['cudnn'][0]:.1f},{times['triton'][0]:.1f},"
                      f"{peer / t:.2f},{dense:.1f},{dense / t:.2f},{nbytes / t / 1e3:.0f},{dropped:.2e},{error:.1e}", flush=True)
            del graphs, calls
        del rows, vs, vs8, ks8, keys, values
        torch.cuda.empty_cache()


main()
