"""Prefill attention of the CUDA backend beside cuDNN and FlashAttention-2 (PyTorch) on one GPU.

    nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 -Isrc -Iinclude -shared -Xcompiler -fPIC -o prefill.so src/cuda/prefill_sm90*.cu
    python3 bench/cuda_prefill.py prefill.so [--only WORDS] [--repeats N] > bench/results/MACHINE-prefill.csv
    python3 bench/cuda_prefill.py prefill.so --errors > bench/results/MACHINE-prefill-errors.csv

    nvcc -gencode=arch=compute_80,code=compute_80 -std=c++17 -O3 -Isrc -Iinclude -shared -Xcompiler -fPIC -o portable.so src/cuda/prefill_portable.cu
    python3 bench/cuda_prefill.py portable.so --portable > bench/results/MACHINE-portable.csv      the same by mma.sync, here as code of sm_80

Every line is one shape: all are fed the same top-k codes written out as rows, and take turns, one call each, so that clocks and heat are
shared; medians of CUDA event times, the spread is (largest - smallest) / median of the middle half. Rows are made before: top-k is timed
by itself. "ratio" is the time of cuDNN, in the better of its two layouts, over ours.

With --errors, in place of times, || out - truth || / || truth || with truth in double: of the codes as bf16 rows, which everyone is fed, and
for int8 also of the numbers that remain of them (as_stored): int8 queries, and int8 keys after a tile has taken one scale t for all its
keys. "key_bound" is the largest | key - stored key | over t / 2, which docs/NUMERICS.md bounds by 1.
"""
import argparse, ctypes, math, os
import torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

P, I32, I64, F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
SFA_F32, SFA_BF16, SFA_I8 = 1, 2, 4  # sfa_dtype
POLICIES = {"bf16": 7, "sp_bf16": 8, "int8": 9, "sp_int8": 10}


class Tokens(ctypes.Structure):
    _fields_ = [("n_sequences", I32), ("max_seqlen", I64), ("cu_seqlens", P), ("n_tokens", I64)]


class Rows(ctypes.Structure):
    _fields_ = [("data", P), ("dtype", I32), ("token_stride", I64), ("head_stride", I64)]


class Scores(ctypes.Structure):
    _fields_ = [("softmax_scale", F32), ("softcap", F32), ("causal", I32), ("window_left", I64), ("window_right", I64),
                ("n_sink_tokens", I64), ("sink_logit", P), ("alibi_slopes", P)]


class Prefill(ctypes.Structure):
    _fields_ = [("policy", I32), ("n_heads", I32), ("n_kv_heads", I32), ("head_dim", I32), ("head_dim_v", I32), ("q_tokens", Tokens),
                ("k_tokens", Tokens), ("k_lens", P), ("k_ends", P), ("q", Rows), ("k", Rows), ("q_scales", P), ("k_scales", P), ("v", Rows),
                ("scores", Scores), ("out", Rows), ("lse", P)]


def rows(x, dtype):
    return Rows(x.data_ptr(), dtype, x.stride(0), x.stride(1))


def top_k(x, k, two_of_four=False):
    if two_of_four:
        groups = x.view(*x.shape[:-1], -1, 4)
        best = groups.abs().topk(2, -1).indices
        x = torch.zeros_like(groups).scatter(-1, best, groups.gather(-1, best)).view(x.shape)
    best = x.abs().topk(k, -1).indices
    return torch.zeros_like(x).scatter(-1, best, x.gather(-1, best))


def int8(x):
    scale = (x.abs().amax(-1) / 127).half().float() * (1 + 2**-10)
    scale = scale.half().float()
    return (x / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--portable", action="store_true")
    args = parser.parse_args()
    library = ctypes.CDLL(os.path.abspath(args.library))
    library.run = library.sfa_cuda_prefill_portable_run if args.portable else library.sfa_cuda_prefill_run
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [P, P]
    library.policies = ["bf16"] if args.portable else POLICIES
    if args.errors:
        print("machine,d,n,heads,causal,k,sharpness,way,error,over_cudnn,error_as_stored,key_bound", flush=True)
        for d in (64, 128, 256):
            for causal in (0, 1):
                for sharpness in (1, 6):
                    errors(library, d, causal, sharpness)
        return
    print("machine,d,n,heads,causal,k,two_of_four,way,ms,spread,tflops,ratio_cudnn,ratio_fa2,difference", flush=True)
    shapes = [(d, n, heads, causal, k) for d, n, heads in ((128, 32768, 8), (256, 32768, 4), (64, 32768, 8), (128, 8192, 32), (256, 8192, 16),
              (128, 131072, 2)) for causal in (0, 1) for k in (8, 16)]
    if args.portable:
        shapes = [(d, n, heads, causal, 16) for d, n, heads in ((64, 8192, 32), (128, 8192, 32), (256, 8192, 32), (128, 32768, 8)) for causal in (0, 1)]
    for d, n, heads, causal, k in shapes:
        if args.only and f"d{d}n{n}c{causal}k{k}" not in args.only.split(","):
            continue
        bench(library, d, n, heads, causal, k, args.repeats)


def draw(d, n, heads, k, sharpness=1):
    """Codes of queries (as they are, and 2 of 4 at most) and of keys, values; bf16 rows [n][heads][d]."""
    random = lambda: torch.randn(n, heads, d, device="cuda")
    q, k_rows, v = random() * sharpness, top_k(random(), k).bfloat16(), random().bfloat16()
    return {0: top_k(q, k).bfloat16(), 1: top_k(q, k, True).bfloat16()}, k_rows, v


def calls(library, queries, k_rows, v, causal):
    """{(policy, 2 of 4): a function that runs it}, their outputs, and what int8 ways read: (q, k, their scales)."""
    n, heads, d = v.shape
    k_int8, k_scale = int8(k_rows.float())
    stream = torch.cuda.current_stream().cuda_stream
    ways, outs, stored = {}, {}, {}
    tokens = Tokens(1, n, None, n)
    scores = Scores(1 / math.sqrt(d), 0, causal, -1, -1, 0, None, None)
    for name in library.policies:
        for capped in (0, 1) if name.startswith("sp") else (0,):
            q, k, scales, dtype = queries[capped], k_rows, (), SFA_BF16
            if "int8" in name:
                q, q_scale = int8(q.float())
                k, scales, dtype = k_int8.clone(), (q_scale, k_scale.clone()), SFA_I8  # a run gives every tile of keys one scale
                stored[name, capped] = q, k, scales
            out = torch.full((n, heads, d), float("nan"), device="cuda", dtype=torch.bfloat16)
            call = Prefill(POLICIES[name], heads, heads, d, d, tokens, tokens, None, None, rows(q, dtype), rows(k, dtype),
                           *([x.data_ptr() for x in scales] or [None, None]), rows(v, SFA_BF16), scores, rows(out, SFA_BF16), None)

            def way(call=call, alive=(q, k, scales)):
                refused = library.run(ctypes.byref(call), stream)
                assert not refused, refused

            ways[name, capped], outs[name, capped] = way, out
    return ways, outs, stored


def peer(backend, q, k, v, causal):
    def way():
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal))
    return way


def errors(library, d, causal, sharpness, n=3000, heads=2, k=16):
    torch.manual_seed(d + causal)
    queries, k_rows, v = draw(d, n, heads, k, sharpness)
    ways, outs, stored = calls(library, queries, k_rows, v, causal)
    by_head = lambda x: x.double().transpose(0, 1)

    def truth(q, k):
        s = by_head(q) @ by_head(k).transpose(1, 2) / math.sqrt(d)
        if causal:
            s.masked_fill_(torch.ones(n, n, device="cuda", dtype=torch.bool).triu(1), -math.inf)
        return s.softmax(-1) @ by_head(v)

    def show(name, out, exact, bounds=",,"):
        error = ((by_head(out) - exact).norm() / exact.norm()).item()
        print(f"h200,{d},{n},{heads},{causal},{k},{sharpness},{name},{error:.3e},{error / dense:.3f}{bounds}", flush=True)

    exact = truth(queries[0], k_rows)
    turned = [x.transpose(0, 1)[None] for x in (queries[0], k_rows, v)]
    peers = {name: peer(backend, *turned, causal)()[0].transpose(0, 1)
             for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION))}
    dense = ((by_head(peers["cudnn"]) - exact).norm() / exact.norm()).item()
    for name, out in peers.items():
        show(name, out, exact)
    for name in library.policies:
        way, out, bounds = ways[name, 0], outs[name, 0], ",,"
        if (name, 0) in stored:
            q, k_now, (q_scale, k_scale) = stored[name, 0]
            before = k_now.double() * k_scale[..., None]
            way()
            after, t = k_now.double() * k_scale[..., None], k_scale[..., None]
            remains = truth(q.double() * q_scale[..., None], after)
            bounds = f",{((by_head(out) - remains).norm() / remains.norm()).item():.3e},{((after - before).abs() / (t / 2)).max().item():.3f}"
        else:
            way()
        show(name, out, exact, bounds)


def bench(library, d, n, heads, causal, k, repeats):
    torch.manual_seed(d + n + causal + k)
    queries, k_rows, v = draw(d, n, heads, k)
    ways, outs, _ = calls(library, queries, k_rows, v, causal)
    turned = [x.transpose(0, 1)[None] for x in (queries[0], k_rows, v)]
    packed = [x.contiguous() for x in turned]
    ways["cudnn rows", 0] = peer(SDPBackend.CUDNN_ATTENTION, *turned, causal)
    ways["cudnn heads", 0] = peer(SDPBackend.CUDNN_ATTENTION, *packed, causal)
    ways["fa2", 0] = peer(SDPBackend.FLASH_ATTENTION, *turned, causal)
    times = {way: [] for way in ways}
    for repeat in range(repeats + 2):
        for name, way in ways.items():
            if name[0] == "fa2" and repeat > 4 and len(library.policies) > 1:
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            way()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 2:
                times[name].append(begin.elapsed_time(end))
    median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    cudnn = min(median["cudnn rows", 0], median["cudnn heads", 0])
    reference = ways["cudnn rows", 0]()[0].transpose(0, 1)
    operations = 4 * n * n * d * heads * (0.5 if causal else 1)
    for name, ms in median.items():
        t = sorted(times[name])
        spread = (t[len(t) * 3 // 4] - t[len(t) // 4]) / ms
        difference = ""
        if name in outs and name[1] == 0:
            out = outs[name].float()
            difference = "%.1e" % ((out - reference.float()).norm() / reference.float().norm()).item()
        print(f"h200,{d},{n},{heads},{causal},{k},{name[1]},{name[0]},{ms:.3f},{spread:.3f},{operations / ms / 1e9:.0f},{cudnn / ms:.3f},"
              f"{median['fa2', 0] / ms:.2f},{difference}", flush=True)


if __name__ == "__main__":
    main()
