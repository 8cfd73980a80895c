"""Prefill attention of the CUDA backend beside cuDNN and FlashAttention-2 (PyTorch) on one GPU.

    nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 -Isrc -Iinclude -shared -Xcompiler -fPIC -o prefill.so src/cuda/prefill_sm90*.cu
    python3 bench/cuda_prefill.py prefill.so [--only WORDS] [--repeats N] > bench/results/MACHINE-prefill.csv

Every line is one shape: all are fed the same top-k codes written out as rows, and take turns, one call each, so that clocks and heat are
shared; medians of CUDA event times, the spread is (largest - smallest) / median of the middle half. Rows are made before: top-k is timed
by itself. "ratio" is the time of cuDNN, in the better of its two layouts, over ours.
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
                ("k_tokens", Tokens), ("k_lens", P), ("q", Rows), ("k", Rows), ("q_scales", P), ("k_scales", P), ("v", Rows),
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
    args = parser.parse_args()
    library = ctypes.CDLL(os.path.abspath(args.library))
    library.sfa_cuda_prefill_run.restype = ctypes.c_char_p
    library.sfa_cuda_prefill_run.argtypes = [P, P]
    print("machine,d,n,heads,causal,k,two_of_four,way,ms,spread,tflops,ratio_cudnn,ratio_fa2,difference", flush=True)
    shapes = [(d, n, heads, causal, k) for d, n, heads in ((128, 32768, 8), (256, 32768, 4), (64, 32768, 8), (128, 8192, 32), (256, 8192, 16),
              (128, 131072, 2)) for causal in (0, 1) for k in (8, 16)]
    for d, n, heads, causal, k in shapes:
        if args.only and f"d{d}n{n}c{causal}k{k}" not in args.only.split(","):
            continue
        bench(library, d, n, heads, causal, k, args.repeats)


def bench(library, d, n, heads, causal, k, repeats):
    torch.manual_seed(d + n + causal + k)
    draw = lambda: torch.randn(n, heads, d, device="cuda")
    q_dense, k_rows, v = draw(), top_k(draw(), k).bfloat16(), draw().bfloat16()
    queries = {0: top_k(q_dense, k).bfloat16(), 1: top_k(q_dense, k, True).bfloat16()}
    del q_dense
    k_int8, k_scale = int8(k_rows.float())
    stream = torch.cuda.current_stream().cuda_stream
    keep, ways, outs = [], {}, {}
    tokens = Tokens(1, n, None, n)
    scores = Scores(1 / math.sqrt(d), 0, causal, -1, -1, 0, None, None)
    for name, policy in POLICIES.items():
        for capped in (0, 1) if name.startswith("sp") else (0,):
            out = torch.full((n, heads, d), float("nan"), device="cuda", dtype=torch.bfloat16)
            if "int8" in name:
                q_rows, q_scale = int8(queries[capped].float())
                own, own_scale = k_int8.clone(), k_scale.clone()  # a run gives every tile of them one scale
                call = Prefill(policy, heads, heads, d, d, tokens, tokens, None, rows(q_rows, SFA_I8), rows(own, SFA_I8), q_scale.data_ptr(),
                               own_scale.data_ptr(), rows(v, SFA_BF16), scores, rows(out, SFA_BF16), None)
                keep.append((q_rows, q_scale, own, own_scale))
            else:
                call = Prefill(policy, heads, heads, d, d, tokens, tokens, None, rows(queries[capped], SFA_BF16), rows(k_rows, SFA_BF16), None, None,
                               rows(v, SFA_BF16), scores, rows(out, SFA_BF16), None)

            def way(call=call):
                refused = library.sfa_cuda_prefill_run(ctypes.byref(call), stream)
                assert not refused, refused

            ways[name, capped], outs[name, capped] = way, out

    def peer(backend, q, kk, vv):
        def way():
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, kk, vv, is_causal=bool(causal))
        return way

    turned = [x.transpose(0, 1)[None] for x in (queries[0], k_rows, v)]
    packed = [x.contiguous() for x in turned]
    ways["cudnn rows", 0] = peer(SDPBackend.CUDNN_ATTENTION, *turned)
    ways["cudnn heads", 0] = peer(SDPBackend.CUDNN_ATTENTION, *packed)
    ways["fa2", 0] = peer(SDPBackend.FLASH_ATTENTION, *turned)
    times = {way: [] for way in ways}
    for repeat in range(repeats + 2):
        for name, way in ways.items():
            if name[0] == "fa2" and repeat > 4:
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
