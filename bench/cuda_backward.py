"""Gradients of the CUDA backend beside cuDNN's, deterministic and not, on one GPU.

    nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 -Isrc -Iinclude -shared -Xcompiler -fPIC -o backward.so src/cuda/backward.cu
    pip install nvidia-cudnn-frontend        # PyTorch refuses cuDNN where determinism is asked for; cuDNN's own front end does not
    python3 bench/cuda_backward.py backward.so [--repeats N] > bench/results/MACHINE-backward.csv

All are fed the same top-k codes written out as rows, and out and lse of cuDNN's forward, and take turns, one call each, so that clocks and
heat are shared; medians of CUDA event times with the smallest and the largest. "ratio" is the time of deterministic cuDNN over ours,
"difference" || ours - cuDNN's || / || cuDNN's || of dq, dk and dv.
"""
import argparse, ctypes, math, os
import cudnn, torch
from cuda_prefill import I32, P, SFA_BF16, Rows, Scores, Tokens, rows, top_k
from peers_cuda import Graph


class Gradient(ctypes.Structure):
    _fields_ = [("rows", Rows), ("values", P), ("k", I32), ("support", P)]


class Backward(ctypes.Structure):
    _fields_ = [("n_heads", I32), ("n_kv_heads", I32), ("head_dim", I32), ("head_dim_v", I32), ("q_tokens", Tokens), ("k_tokens", Tokens),
                ("q", Rows), ("k", Rows), ("v", Rows), ("out", Rows), ("d_out", Rows), ("lse", P), ("d_lse", P), ("scores", Scores),
                ("d_q", Gradient), ("d_k", Gradient), ("d_v", Gradient), ("d_sink_logit", P), ("workspace", P)]


def bench(library, handle, d, n, heads, causal, repeats):
    torch.manual_seed(d + n + causal)
    draw = lambda: torch.randn(n, heads, d, device="cuda")
    q, k, v, d_out = top_k(draw(), 16).bfloat16(), top_k(draw(), 16).bfloat16(), draw().bfloat16(), draw().bfloat16()
    turn = lambda x: x.transpose(0, 1)[None].contiguous()
    back = lambda x: x[0].transpose(0, 1).contiguous()
    tq, tk, tv, td = [turn(x) for x in (q, k, v, d_out)]
    to, stats, scale = torch.empty_like(tq), torch.empty(1, heads, n, 1, device="cuda"), 1 / math.sqrt(d)
    forward = Graph(handle)
    nodes = forward.graph.sdpa(name="forward", q=forward.bind(tq), k=forward.bind(tk), v=forward.bind(tv), generate_stats=True, attn_scale=scale,
                               use_causal_mask=bool(causal))
    forward.give(nodes[0], to)
    forward.give(nodes[1], stats)
    ways = {"cudnn forward": forward.build()}
    ways["cudnn forward"]()
    gradients = {}
    for name, deterministic in (("cudnn", False), ("cudnn deterministic", True)):
        graph = Graph(handle)
        operands = [graph.bind(x) for x in (tq, tk, tv, to, td, stats)]
        gradients[name] = [torch.empty_like(x) for x in (tq, tk, tv)]
        nodes = graph.graph.sdpa_backward(name="backward", q=operands[0], k=operands[1], v=operands[2], o=operands[3], dO=operands[4],
                                          stats=operands[5], attn_scale=scale, use_causal_mask=bool(causal),
                                          use_deterministic_algorithm=deterministic)
        for node, x in zip(nodes, gradients[name]):
            graph.give(node, x)
        ways[name] = graph.build()

    out, lse, ours = back(to), back(stats).squeeze(-1), [torch.full_like(x, float("nan")) for x in (q, k, v)]
    tokens = Tokens(1, n, None, n)
    call = Backward(heads, heads, d, d, tokens, tokens, *[rows(x, SFA_BF16) for x in (q, k, v, out, d_out)], lse.data_ptr(), None,
                    Scores(scale, 0, causal, -1, -1, 0, None, None), *[Gradient(rows(x, SFA_BF16)) for x in ours], None, None)
    workspace = torch.empty(library.sfa_cuda_backward_workspace_bytes(ctypes.byref(call)), dtype=torch.uint8, device="cuda")
    call.workspace = workspace.data_ptr()
    stream = torch.cuda.current_stream().cuda_stream

    def way():
        refused = library.sfa_cuda_backward_run(ctypes.byref(call), stream)
        assert not refused, refused

    ways["ours"] = way
    times = {name: [] for name in ways}
    for repeat in range(repeats + 2):
        for name, way in ways.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            way()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 2:
                times[name].append(begin.elapsed_time(end))
    median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    apart = [(x.float() - back(y).float()).norm() / y.float().norm() for x, y in zip(ours, gradients["cudnn deterministic"])]
    operations = n * n * d * heads * (0.5 if causal else 1)
    for name, ms in median.items():
        tflops = operations * (4 if name == "cudnn forward" else 10) / ms / 1e9
        difference = " ".join("%.1e" % x for x in apart) if name == "ours" else ""
        print(f"h200,{d},{n},{heads},{causal},{name},{ms:.3f},{min(times[name]):.3f},{max(times[name]):.3f},{tflops:.0f},"
              f"{median['cudnn deterministic'] / ms:.3f},{difference}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args()
    library = ctypes.CDLL(os.path.abspath(args.library))
    library.sfa_cuda_backward_workspace_bytes.restype, library.sfa_cuda_backward_workspace_bytes.argtypes = ctypes.c_size_t, [P]
    library.sfa_cuda_backward_run.restype, library.sfa_cuda_backward_run.argtypes = ctypes.c_char_p, [P, P]
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    print("machine,d,n,heads,causal,way,ms,ms_min,ms_max,tflops,ratio,difference", flush=True)
    for d, n, heads in ((64, 8192, 32), (128, 8192, 32), (256, 8192, 16), (64, 32768, 8), (128, 32768, 8), (256, 32768, 4)):
        for causal in (0, 1):
            bench(library, handle, d, n, heads, causal, args.repeats)


if __name__ == "__main__":
    main()
