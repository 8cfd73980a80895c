#!/usr/bin/env python3
"""Golden gradients: of the golden models of every family by PyTorch autograd through Hugging Face transformers, in double.

    tools/make_gradient_golden.py [DIRECTORY]         (default: tests/golden)

For models/<name> writes gradients/<name>_<case>.txt and gradients/SHA256SUMS. The batch is the model's ids.i32 as two sequences of 50 and 30
tokens; every token but the last of a sequence and each with t % 7 = 3 is scored by its successor. Case "dense" is the model as it is; case
"sfa" keeps only the k entries of largest magnitude of every query and key after RoPE, and passes the gradient of those alone
(straight-through); k differs by layer and, where a line of the file says so, by kv head. Case "pre" chooses before RoPE, "two" keeps at most two
of each aligned four.

Steps of AdamW (f32 as PyTorch runs it, clipped to norm 1, decay on matrices only) give gradients/<name>_<case>_steps.txt: the mean loss before
each of 50 steps.

A file has the sum of the losses, the numbers of scored tokens, k of keys and queries [n_layers][n_kv_heads] (0: all), and for each tensor:
    name, norm, four sums with signs from sign(p, i), number of samples, samples at i * n / count
"""
import hashlib
import pathlib
import sys

import numpy as np
import torch
from make_model_golden import all_in_double
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

LENGTHS = [50, 30]
N_SUMS, N_SAMPLES = 4, 24

# k of keys and of queries by layer; a list in a list: by kv head.
CASES = {
    ("llama", "dense"): ([0, 0, 0], [0, 0, 0]),
    ("llama", "sfa"): ([3, 0, [2, 5]], [3, 4, [2, 5]]),
    ("qwen2", "dense"): ([0, 0], [0, 0]),
    ("qwen2", "sfa"): ([4, 3], [0, 3]),
    ("qwen3", "dense"): ([0, 0], [0, 0]),
    ("qwen3", "sfa"): ([8, 12], [0, 8]),
    ("qwen3", "pre"): ([8, 8], [6, 6]),
    ("qwen3", "two"): ([8, 12], [0, 8]),
    ("gpt2", "dense"): ([0, 0], [0, 0]),
    ("gpt2", "sfa"): ([3, 4], [3, 0]),
    ("gemma3", "dense"): ([0, 0, 0, 0], [0, 0, 0, 0]),
    ("gemma3", "sfa"): ([5, 6, 0, 6], [5, 0, 0, 4]),
}
STEPS = [("qwen2", "dense"), ("gpt2", "dense"), ("qwen3", "sfa")]


def by_head(ks, n_kv_heads):
    return [k if isinstance(k, list) else [k] * n_kv_heads for k in ks]


def largest(x, k):
    return torch.zeros_like(x).scatter(-1, x.abs().topk(k, dim=-1).indices, 1.0)


def keep_largest(x, ks, two_of_four=False):
    """x [1][heads][tokens][dim], ks a list of the heads; 0 keeps all. The mask is a constant: straight-through."""
    rows = []
    for head, k in enumerate(ks):
        row = x[:, head]
        if k:
            fixed = row.detach()
            if two_of_four:
                fixed = fixed * largest(fixed.unflatten(-1, (-1, 4)), 2).flatten(-2)
            row = row * largest(fixed, k)
        rows.append(row)
    return torch.stack(rows, dim=1)


def make_sparse(model, k_keys, k_queries, case):
    """Puts top-k between RoPE and the products, where every family calls its module's eager_attention_forward; or before RoPE."""
    module = sys.modules[type(model).__module__]
    name = "apply_rotary_pos_emb" if case == "pre" else "eager_attention_forward"
    dense = getattr(module, name)

    def sparse(layer, query, key, value, *rest, **named):
        group = query.shape[1] // key.shape[1]
        query = keep_largest(query, [k for k in k_queries[layer.layer_idx] for _ in range(group)], case == "two")
        key = keep_largest(key, k_keys[layer.layer_idx], case == "two")
        return dense(layer, query, key, value, *rest, **named)

    def sparse_before(query, key, *rest, **named):  # the same for every layer
        return dense(keep_largest(query, [k_queries[0][0]] * query.shape[1]), keep_largest(key, [k_keys[0][0]] * key.shape[1]), *rest, **named)

    setattr(module, name, sparse_before if case == "pre" else sparse)
    return lambda: setattr(module, name, dense)


def signs(p, n):
    i = np.arange(n, dtype=np.uint32)
    mixed = (i + np.uint32(1)) * np.uint32(2654435761) ^ np.uint32(p * 40503 + 12345)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(2246822519)
    return np.where(mixed >> np.uint32(31), -1.0, 1.0)


def tensor_line(name, gradient):
    g = gradient.numpy().reshape(-1)
    count = min(len(g), N_SAMPLES)
    numbers = [np.linalg.norm(g)] + [float(g @ signs(p, len(g))) for p in range(N_SUMS)]
    samples = [g[i * len(g) // count] for i in range(count)]
    return " ".join([name] + [f"{x:.9g}" for x in numbers] + [str(count)] + [f"{x:.9g}" for x in samples]) + "\n"


def open_model(root, name, case):
    """The model, what takes its sparsity back, and k of keys and queries."""
    folder = root / "models" / name
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    n_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    k_keys, k_queries = (by_head(ks, n_kv_heads) for ks in CASES[name, case])
    state = load_file(folder / "model.safetensors")
    dtype = torch.get_default_dtype()
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    missing, unexpected = model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=False)
    assert not unexpected and all(key == "lm_head.weight" for key in missing), (missing, unexpected)
    model.tie_weights()
    return model, make_sparse(model, k_keys, k_queries, case), k_keys, k_queries


def batch_loss(model, ids):
    loss, n_scored, first = 0.0, 0, 0
    for length in LENGTHS:
        part = torch.from_numpy(ids[first:first + length])[None]
        logits = model(part).logits[0]
        scored = [t for t in range(length - 1) if t % 7 != 3]
        loss = loss + torch.nn.functional.cross_entropy(logits[scored], part[0][[t + 1 for t in scored]], reduction="sum")
        n_scored += len(scored)
        first += length
    return loss, n_scored


def read_ids(root, name):
    return np.fromfile(root / "models" / name / "ids.i32", "<i4").astype(np.int64)


def make(root, name, case):
    with all_in_double():
        model, restore, k_keys, k_queries = open_model(root, name, case)
        loss, n_scored = batch_loss(model, read_ids(root, name))
        loss.backward()
        restore()
    lines = [f"loss {loss.item():.12g} {n_scored}\n"]
    lines += [f"{title} {sum(map(len, ks))} {' '.join(str(k) for layer in ks for k in layer)}\n"
              for title, ks in (("k_keys", k_keys), ("k_queries", k_queries))]
    parameters = [(key, p.grad) for key, p in sorted(model.named_parameters()) if p.grad is not None]
    lines.append(f"tensors {len(parameters)}\n")
    return "".join(lines + [tensor_line(key, gradient) for key, gradient in parameters])


def make_steps(root, name, case):
    model, restore, _, _ = open_model(root, name, case)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
                                   {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss, n_scored = batch_loss(model, read_ids(root, name))
        (loss / n_scored).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item() / n_scored)
    restore()
    return "".join(f"{loss:.6f}\n" for loss in losses)


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent / "tests" / "golden")
    torch.set_num_threads(1)
    out = root / "gradients"
    out.mkdir(exist_ok=True)
    sums = []
    texts = {f"{name}_{case}.txt": make(root, name, case) for name, case in CASES}
    texts |= {f"{name}_{case}_steps.txt": make_steps(root, name, case) for name, case in STEPS}
    for name, text in texts.items():
        path = out / name
        path.write_text(text)
        sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    (out / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
