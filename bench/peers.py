#!/usr/bin/env python3
"""Times other software beside sfa, on the same shapes and with as many threads. `sfa bench ... --peers` starts it and talks to it.

usage: peers.py THREADS

Standard input, a line at a time; each is answered by one line on standard output:
    {"bench": "attention" | "decode" | "model", ...}   a case: {"engines": [{"name", "version", "setup_ms"}, ...], "missing": [TEXT, ...]}
    run N                                               engine N, counted over all cases: its milliseconds, or "error TEXT"
    forget                                              drops all engines: "ok"
With "device": "cuda" the engines are those of peers_cuda.py, which also does "topk" and attention with "backward".
Packages that are not installed are told in "missing" and left out. Each engine times itself, and its set-up is not in the time.
SFA_LLAMA_CACHES in the environment ("f16,q8_0" without it) names the types of cache that llama.cpp is run with."""
import json
import os
import re
import sys
import time

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(THREADS)  # before the libraries are loaded
os.environ.pop("OMP_WAIT_POLICY", None)  # sfa sets it for itself

BLOCK = 512  # query rows whose scores stand in memory at once, where a library has no fused attention


class Engine:
    """run does the work once; it may return the milliseconds that it took, for work that a clock of the processor cannot time. setup_ms is
    what building took where that is a result: the prefill of a model."""

    def __init__(self, name, version, run, setup_ms=None):
        self.name, self.version, self.run, self.setup_ms = name, version, run, setup_ms


def load(module, missing):
    try:
        return __import__(module)
    except ImportError:
        missing.append(f"the Python package {module} is not installed")
        return None


def torch_threads(torch):
    torch.set_num_threads(THREADS)
    return torch.inference_mode()


def multiplies_bf16():
    """Whether the processor has bf16 products; without them oneDNN emulates them, ten times slower than f32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(file.read().split())
    except OSError:
        return True


def onednn_version(torch):
    found = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


# ---- One head of attention: n queries, n keys ------------------------------------------------------------------------------------------


def torch_attention(torch, case, dtype):
    shape = (1, 1, case["n"], case["head_dim"])
    with torch_threads(torch):
        q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))

    def run():
        with torch.inference_mode():
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=case["causal"])

    return Engine("PyTorch SDPA", torch.__version__, run)


def onednn_products(torch, case, dtype):
    """The two matrix products of attention alone, without a softmax between them: what a library of matrix products leaves at most."""
    n, dim = case["n"], case["head_dim"]
    with torch_threads(torch):
        q, k, v = (torch.randn(n, dim).to(dtype) for _ in range(3))
        weights = torch.rand(min(BLOCK, n), n).to(dtype)
        v_rows = v.t().contiguous()
        blocks = [(first, n if not case["causal"] else min(n, first + BLOCK)) for first in range(0, n, BLOCK)]
        # Tensors of oneDNN's own kind make sure that it is oneDNN which multiplies; linear(x, w) is x w^T.
        q_blocks = [q[first:first + BLOCK].to_mkldnn() for first, _ in blocks]
        weight_blocks = [weights[: min(BLOCK, n - first), :keys].contiguous().to_mkldnn() for first, keys in blocks]
        linear = torch.nn.functional.linear
        keys_of = {keys: (k[:keys].contiguous(), v_rows[:, :keys].contiguous()) for _, keys in blocks}

    def run():
        with torch.inference_mode():
            for (_, keys), q_block, weight_block in zip(blocks, q_blocks, weight_blocks):
                linear(q_block, keys_of[keys][0])
                linear(weight_block, keys_of[keys][1])

    return Engine("oneDNN, QK and PV only", onednn_version(torch), run)


def blas_attention(numpy, case):
    n, dim = case["n"], case["head_dim"]
    random = numpy.random.default_rng(1)
    q, k, v = (random.standard_normal((n, dim), numpy.float32) for _ in range(3))
    scale = numpy.float32(dim ** -0.5)

    def run():
        out = numpy.empty_like(q)
        for first in range(0, n, BLOCK):
            last = min(n, first + BLOCK)
            keys = last if case["causal"] else n
            scores = q[first:last] * scale @ k[:keys].T
            if case["causal"]:
                scores[:, first:][numpy.triu_indices(last - first, 1)] = -numpy.inf
            scores -= scores.max(1, keepdims=True)
            numpy.exp(scores, scores)
            out[first:last] = scores @ v[:keys] / scores.sum(1, keepdims=True)

    blas = numpy.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    name = "OpenBLAS" if "openblas" in blas.get("name", "") else blas.get("name", "BLAS")
    return Engine(f"{name} through numpy", blas.get("version", "unknown"), run)


def attention(case, missing):
    engines = []
    torch = load("torch", missing)
    if torch:
        dtype = torch.bfloat16 if case["dtype"] == "bf16" else torch.float32
        engines.append(torch_attention(torch, case, dtype))
        if case["dtype"] == "f32" or multiplies_bf16():
            engines.append(onednn_products(torch, case, dtype))
        else:
            missing.append("oneDNN is left out for bf16: this processor has no bf16 products")
    numpy = load("numpy", missing)
    if numpy and case["dtype"] == "f32":
        engines.append(blas_attention(numpy, case))
    return engines


# ---- A decode step ------------------------------------------------------------------------------------------------------------------------


def torch_decode(torch, case, dtype, name):
    """The queries of a group are rows of one matrix, so that each key and value is read once for all of them."""
    heads, groups, dim, n_q = case["heads"], case["kv_heads"], case["head_dim"], case["n_q"]
    rows = heads // groups * n_q
    with torch_threads(torch):
        sequences = []
        for length in case["lengths"]:
            q = torch.randn(1, groups, rows, dim).to(dtype)
            k, v = torch.empty(1, groups, length, dim, dtype=dtype), torch.empty(1, groups, length, dim, dtype=dtype)
            for first in range(0, length, 65536):  # without an f32 copy of all of it
                k[:, :, first:first + 65536].normal_()
                v[:, :, first:first + 65536].normal_()
            mask = None
            if n_q > 1:  # query t of T sees the first length - T + 1 + t keys
                seen = torch.arange(length)[None, :] <= torch.arange(length - n_q, length)[:, None]
                mask = seen.repeat(heads // groups, 1)
            sequences.append((q, k, v, mask))

    def run():
        with torch.inference_mode():
            for q, k, v, mask in sequences:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Engine(name, torch.__version__, run)


def decode(case, missing):
    torch = load("torch", missing)
    if not torch:
        return []
    engines = [torch_decode(torch, case, torch.bfloat16, "PyTorch SDPA bf16")]
    if sum(case["lengths"]) * case["kv_heads"] * case["head_dim"] * 8 < 1 << 30:
        engines.append(torch_decode(torch, case, torch.float32, "PyTorch SDPA f32"))
    return engines


# ---- A model: prefill, then steps at a depth -------------------------------------------------------------------------------------------------


def llama_model(llama_cpp, case, cache_type, name):
    tokens, steps = case["tokens"], case["steps"]
    model = llama_cpp.Llama(case["model"], n_ctx=max(256, len(tokens)), n_batch=512, n_ubatch=512, n_threads=THREADS, n_threads_batch=THREADS,
                            flash_attn=True, type_k=cache_type, type_v=cache_type, verbose=False)
    prompt = tokens[: len(tokens) - steps]
    model.eval(tokens[:8])  # warms up
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    setup_ms = 1e3 * (time.perf_counter() - start)

    def run():
        model.n_tokens = len(prompt)  # eval forgets what the cache has beyond
        for token in tokens[len(prompt):]:
            model.eval([token])

    return Engine(name, llama_cpp.__version__, run, setup_ms)


def model(case, missing):
    llama_cpp = load("llama_cpp", missing)
    if not llama_cpp:
        return []
    if not case["model"].endswith(".gguf"):
        missing.append("llama.cpp reads GGUF files only")
        return []
    types = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
    return [llama_model(llama_cpp, case, types[cache], f"llama.cpp, {cache} cache") for cache in LLAMA_CACHES]


# ---- On a GPU ------------------------------------------------------------------------------------------------------------------------------


def on_cuda(case, missing):
    torch = load("torch", missing)
    if not torch:
        return []
    if not torch.cuda.is_available():
        missing.append("PyTorch finds no GPU")
        return []
    import peers_cuda

    return peers_cuda.BENCHES[case["bench"]](case, Engine, missing)


# ---- The conversation ----------------------------------------------------------------------------------------------------------------------


def answer(line, engines):
    if line.startswith("{"):
        missing = []
        case = json.loads(line)
        on_cpu = {"attention": attention, "decode": decode, "model": model}
        added = (on_cuda if case.get("device") == "cuda" else on_cpu[case["bench"]])(case, missing)
        engines.extend(added)
        return json.dumps({"engines": [{"name": e.name, "version": e.version, "setup_ms": e.setup_ms} for e in added], "missing": missing})
    if line == "forget":
        engines.clear()
        return "ok"
    start = time.perf_counter()
    own_ms = engines[int(line.split()[1])].run()
    return repr(1e3 * (time.perf_counter() - start) if own_ms is None else own_ms)


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    engines = []
    for line in sys.stdin:
        try:
            reply = answer(line.strip(), engines)
        except Exception as error:  # whatever a library throws: the benchmark goes on without it
            reply = "error " + " ".join(f"{type(error).__name__}: {error}".split())
        replies.write(reply + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
