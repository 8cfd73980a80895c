"""What peers.py times on an NVIDIA GPU: PyTorch's cuDNN and FlashAttention-2, a flash-decoding in Triton tuned for each case, torch.topk.

Every engine is a function that enqueues its work on the current stream. Times are of CUDA events around `calls` of them, over rotating sets
of inputs where one set would fit the L2 cache; decode steps are replayed from a CUDA graph, so that no launch gap is counted."""
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
try:
    import cudnn  # nvidia-cudnn-frontend: PyTorch refuses cuDNN where determinism is asked for
except ImportError:
    cudnn = None

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "PyTorch FA2": SDPBackend.FLASH_ATTENTION}
DEVICE = "cuda"


def version(name):
    return str(torch.backends.cudnn.version()) if name.startswith("cuDNN") else torch.__version__


def normal(*shape):
    """Standard normal bf16, a million rows at a time: no f32 copy of all of it."""
    out = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)
    for piece in out.view(-1, shape[-1]).split(1 << 20):
        piece.normal_()
    return out


def keep(x, k):
    """Rows with all but their k largest features 0, in place: what SFA multiplies, as dense operands."""
    if k:
        for piece in x.view(-1, x.shape[-1]).split(1 << 20):
            kept = piece.abs().topk(k, dim=-1).indices
            piece.copy_(torch.zeros_like(piece).scatter_(1, kept, piece.gather(1, kept)))
    return x


def event_ms(run, calls):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def timed(run, calls=1):
    for _ in range(3):
        run()
    return functools.partial(event_ms, run, calls)


def replayed(runs):
    """Milliseconds of one of `runs`, which are captured one after the other."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    return lambda: event_ms(graph.replay, 1) / len(runs)


# ---- Attention of many queries ---------------------------------------------------------------------------------------------------------


def products(case):
    """Milliseconds that a large product of matrices needs for the multiply-adds of the case: the ceiling of any dense way."""
    side = 8192
    flops = 4 * case["n"] ** 2 * case["head_dim"] * case["heads"] * (0.5 if case["causal"] else 1) * (3.5 if case.get("backward") else 1)
    a, b = normal(side, side), normal(side, side)
    run = timed(lambda: torch.matmul(a, b), 4)
    return lambda: run() * flops / (2 * side ** 3)


class Graph:
    """One of cuDNN's: bind tensors to its nodes, build it, run it."""

    def __init__(self, handle):
        self.handle, self.bound = handle, {}
        self.graph = cudnn.pygraph(io_data_type=cudnn.data_type.BFLOAT16, intermediate_data_type=cudnn.data_type.FLOAT,
                                   compute_data_type=cudnn.data_type.FLOAT, handle=handle)

    def bind(self, x):
        node = self.graph.tensor_like(x)
        self.bound[node] = x
        return node

    def give(self, node, x):
        dtype = cudnn.data_type.FLOAT if x.dtype == torch.float32 else cudnn.data_type.BFLOAT16
        node.set_output(True).set_dim(x.size()).set_stride(x.stride()).set_data_type(dtype)
        self.bound[node] = x

    def build(self):
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        workspace = torch.empty(max(self.graph.get_workspace_size(), 1), dtype=torch.uint8, device=DEVICE)
        return lambda: self.graph.execute(self.bound, workspace, handle=self.handle)


def deterministic_cudnn(q, k, v, d_out, causal):
    """cuDNN's forward and its deterministic backward, one after the other."""
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    out, stats = torch.empty_like(q), torch.empty(*q.shape[:-1], 1, device=DEVICE)
    options = {"attn_scale": q.shape[-1] ** -0.5, "use_causal_mask": causal}
    forward, backward = Graph(handle), Graph(handle)
    nodes = forward.graph.sdpa(name="forward", q=forward.bind(q), k=forward.bind(k), v=forward.bind(v), generate_stats=True, **options)
    for node, x in zip(nodes, (out, stats)):
        forward.give(node, x)
    bound = [backward.bind(x) for x in (q, k, v, out, d_out, stats)]
    nodes = backward.graph.sdpa_backward(name="backward", **dict(zip(("q", "k", "v", "o", "dO", "stats"), bound)),
                                         use_deterministic_algorithm=True, **options)
    for node, x in zip(nodes, (q, k, v)):
        backward.give(node, torch.empty_like(x))
    steps = forward.build(), backward.build()
    return lambda: [step() for step in steps]


def attention(case, engine, missing):
    """[1][H][n][D], causal or full; with "backward" a forward and a backward together, gradients of all three."""
    shape = (1, case["heads"], case["n"], case["head_dim"])
    q, k, v = keep(normal(*shape), case["k"]), keep(normal(*shape), case["k"]), normal(*shape)
    backward = case.get("backward", False)
    d_out = normal(*shape) if backward else None
    engines = []
    ways = {}
    for name, backend in BACKENDS.items():
        for deterministic in (False, True) if backward else (False,):
            operands = [x.detach().requires_grad_(backward) for x in (q, k, v)]

            def run(operands=operands, backend=backend, deterministic=deterministic):
                torch.use_deterministic_algorithms(deterministic)
                try:
                    with sdpa_kernel([backend]):
                        out = F.scaled_dot_product_attention(*operands, is_causal=case["causal"])
                    if backward:
                        torch.autograd.grad(out, operands, d_out)
                finally:
                    torch.use_deterministic_algorithms(False)

            ways[name + ", deterministic" * deterministic] = lambda run=run: run
    if backward and cudnn:
        ways["cuDNN, deterministic"] = lambda: deterministic_cudnn(q, k, v, d_out, case["causal"])
    for name, make in ways.items():
        try:
            engines.append(engine(name, version(name), timed(make())))
        except Exception as error:  # cuDNN's front end has errors of its own
            missing.append(f"{name} does not take this case: {str(error).splitlines()[0]}")
    engines.append(engine("products alone, cuBLAS", torch.version.cuda, products(case)))
    return engines


# ---- A decode step -----------------------------------------------------------------------------------------------------------------------

if triton:

    @triton.jit
    def step_parts(Q, K, V, Out, State, n, span, scale, GROUP: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr):
        """Softmax state and unnormalised output of the group's queries over one span of one kv head's keys."""
        part, head, n_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
        rows, features, keys = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, KEYS)
        q = tl.load(Q + (head * GROUP + rows)[:, None] * D + features[None, :], mask=(rows < GROUP)[:, None], other=0.0)
        most, total, out = tl.full([16], -1e30, tl.float32), tl.zeros([16], tl.float32), tl.zeros([16, D], tl.float32)
        base = head.to(tl.int64) * n * D
        for first in range(part * span, tl.minimum(n, (part + 1) * span), KEYS):
            at = base + (first + keys).to(tl.int64)[:, None] * D + features[None, :]
            seen = (first + keys) < n
            scores = tl.dot(q, tl.trans(tl.load(K + at, mask=seen[:, None], other=0.0))) * scale
            scores = tl.where(seen[None, :], scores, -1e30)
            higher = tl.maximum(most, tl.max(scores, 1))
            weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
            values = tl.load(V + at, mask=seen[:, None], other=0.0)
            total, most = total * shrink + tl.sum(weights, 1), higher
            out = out * shrink[:, None] + tl.dot(weights.to(tl.bfloat16), values)
        row = (head * n_parts + part) * 16 + rows
        tl.store(Out + row[:, None] * D + features[None, :], out, mask=(rows < GROUP)[:, None])
        tl.store(State + row * 2, most, mask=rows < GROUP)
        tl.store(State + row * 2 + 1, total, mask=rows < GROUP)

    @triton.jit
    def step_joined(Parts, State, Out, n_parts, GROUP: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
        head, row = tl.program_id(0), tl.program_id(1)
        parts, features = tl.arange(0, PARTS), tl.arange(0, D)
        at = (head * n_parts + parts) * 16 + row
        most = tl.load(State + at * 2, mask=parts < n_parts, other=-1e30)
        total = tl.load(State + at * 2 + 1, mask=parts < n_parts, other=0.0)
        weights = tl.exp2(most - tl.max(most, 0))
        out = tl.load(Parts + at[:, None] * D + features[None, :], mask=(parts < n_parts)[:, None], other=0.0)
        joined = tl.sum(out * weights[:, None], 0) / tl.sum(weights * total, 0)
        tl.store(Out + (head * GROUP + row) * D + features, joined.to(tl.bfloat16))


def flash_decoding(sets, case):
    """The fastest of a few splits and tiles, after a check against PyTorch."""
    n, kv_heads, dim = case["lengths"][0], case["kv_heads"], case["head_dim"]
    group = case["heads"] // kv_heads
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    best = None
    for per_head in (processors // 8, processors // 4, processors // 2, processors):
        for keys, warps, stages in ((64, 4, 3), (128, 4, 3), (128, 8, 3), (64, 4, 4)):
            span = triton.cdiv(triton.cdiv(n, per_head), keys) * keys
            n_parts = triton.cdiv(n, span)
            parts = torch.empty(kv_heads * n_parts * 16 * dim, device=DEVICE)
            state = torch.empty(kv_heads * n_parts * 32, device=DEVICE)
            out = torch.empty(kv_heads * group, dim, device=DEVICE, dtype=torch.bfloat16)

            def step(q, k, v, n_parts=n_parts, span=span, keys=keys, warps=warps, stages=stages, parts=parts, state=state, out=out):
                step_parts[(n_parts, kv_heads)](q, k, v, parts, state, n, span, 1.4426950408889634 * dim ** -0.5, GROUP=group, D=dim,
                                                KEYS=keys, num_warps=warps, num_stages=stages)
                step_joined[(kv_heads, group)](parts, state, out, n_parts, GROUP=group, D=dim, PARTS=triton.next_power_of_2(n_parts))

            try:
                run = replayed([functools.partial(step, *s) for s in sets])
                ms = min(run() for _ in range(3))
            except Exception:  # a tile that does not fit this GPU's shared memory
                continue
            if best is None or ms < best[0]:
                best = ms, run, out
    if best is None:
        raise RuntimeError("no configuration runs")
    best[1]()
    truth = F.scaled_dot_product_attention(*sets[-1], enable_gqa=True)
    error = ((best[2].float() - truth.float().view_as(best[2])).norm() / truth.float().norm()).item()
    if not error < 2e-2:
        raise RuntimeError(f"its result is off by {error}")
    return best[1]


def decode(case, engine, missing):
    """One query a head over n keys of G heads, dense bf16."""
    if len(set(case["lengths"])) > 1 or case["n_q"] > 1:
        missing.append("peers decode one query a sequence, and sequences of one length")
        return []
    n, batch, kv_heads, dim = case["lengths"][0], len(case["lengths"]), case["kv_heads"], case["head_dim"]
    n_sets = max(2, min(8, (1 << 30) // (n * batch * kv_heads * dim * 4)))
    q = normal(batch, case["heads"], 1, dim)
    sets = [(q, normal(batch, kv_heads, n, dim), normal(batch, kv_heads, n, dim)) for _ in range(n_sets)]
    grouped = case["heads"] != kv_heads
    engines = []
    for name, backend in BACKENDS.items():
        def run(s, backend=backend):
            with sdpa_kernel([backend]):
                F.scaled_dot_product_attention(*s, enable_gqa=grouped)

        try:
            engines.append(engine(name, version(name), replayed([functools.partial(run, s) for s in sets])))
        except RuntimeError as error:
            missing.append(f"{name} does not take this case: {str(error).splitlines()[0]}")
    if not triton:
        missing.append("the Python package triton is not installed")
    elif batch == 1:
        try:
            engines.append(engine("Triton flash-decoding", triton.__version__, flash_decoding(sets, case)))
        except RuntimeError as error:
            missing.append(f"Triton flash-decoding: {error}")
    return engines


# ---- Top-k -------------------------------------------------------------------------------------------------------------------------------


def topk(case, engine, missing):
    del missing
    x = normal(case["n"], case["head_dim"])
    return [engine("torch.topk", torch.__version__, timed(lambda: torch.topk(x.abs(), case["k"], dim=-1, sorted=False)))]


BENCHES = {"attention": attention, "decode": decode, "topk": topk}
