#!/usr/bin/env python3
"""A model of SmolLM2-135M's shape with random weights, for speed on a GPU, and where a step's time goes.

    bench/cuda_model.py make DIR                  writes DIR/config.json and DIR/model.safetensors (bf16, 269 MB)
    sfa bench model -m DIR --device cuda --depth 64,8192 --steps 200
    ncu --clock-control none --cache-control none --graph-profiling node --metrics gpu__time_duration.sum --csv \\
        sfa bench model -m DIR --device cuda --depth 8192 --steps 4 --attention dense > FILE
    bench/cuda_model.py profile FILE              the kernels of a step: how many, and their time

ncu runs kernels one by one: what it sums up is the time inside kernels. A step's clock less that is the time between them.
"""
import collections
import csv
import json
import os
import struct
import sys

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, DIM, VOCAB, CONTEXT = 576, 1536, 30, 9, 3, 64, 49152, 8192


def tensors():
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", (HIDDEN,)
        yield name + "self_attn.q_proj.weight", (HEADS * DIM, HIDDEN)
        yield name + "self_attn.k_proj.weight", (KV_HEADS * DIM, HIDDEN)
        yield name + "self_attn.v_proj.weight", (KV_HEADS * DIM, HIDDEN)
        yield name + "self_attn.o_proj.weight", (HIDDEN, HEADS * DIM)
        yield name + "post_attention_layernorm.weight", (HIDDEN,)
        yield name + "mlp.gate_proj.weight", (FFN, HIDDEN)
        yield name + "mlp.up_proj.weight", (FFN, HIDDEN)
        yield name + "mlp.down_proj.weight", (HIDDEN, FFN)


def make(folder):
    import numpy

    rng = numpy.random.default_rng(1)
    header, at = {}, 0
    for name, shape in tensors():
        n = 2 * int(numpy.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape in tensors():
            values = rng.standard_normal(shape, dtype=numpy.float32) * 0.04 if len(shape) == 2 else numpy.ones(shape, numpy.float32)
            file.write((values.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=1)


def launches(path):
    """(kernel, blocks, ns) of every launch."""
    with open(path, newline="") as file:
        lines = [line for line in csv.reader(file) if line and (line[0] == "ID" or line[0].isdigit())]
    column = {name: i for i, name in enumerate(lines[0])}
    for line in lines[1:]:
        kernel = line[column["Kernel Name"]].split("(")[0].replace("void ", "").split("<")[0]
        yield kernel, line[column["Grid Size"]], float(line[column["Metric Value"]].replace(",", ""))


def blocks_of(grid):
    return int(grid.strip("()").split(",")[0])


def profile(path):
    """A step is what lies between two heads: few_kernel, which runs for a few tokens only, with the most blocks."""
    found = list(launches(path))
    most = max((blocks_of(grid) for kernel, grid, _ in found if kernel == "few_kernel"), default=0)
    ends = [i for i, (kernel, grid, _) in enumerate(found) if kernel == "few_kernel" and blocks_of(grid) == most]
    steps = [found[a + 1 : b + 1] for a, b in zip(ends, ends[1:])]
    if not steps:
        sys.exit(f"{path} has no two steps of one token")
    step = min(steps, key=len)  # without a prompt between
    total, count = collections.Counter(), collections.Counter()
    for kernel, grid, ns in step:
        total[kernel, grid] += ns
        count[kernel, grid] += 1
    print(f"# a step of {len(step)} kernels, {sum(total.values()) / 1e3:.1f} us inside them")
    print("kernel,blocks,launches,us_each,us_a_step")
    for (kernel, grid), ns in total.most_common():
        n = count[kernel, grid]
        print(f"{kernel},{' x '.join(grid.strip('()').split(', '))},{n},{ns / n / 1e3:.2f},{ns / 1e3:.1f}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("make", "profile"):
        sys.exit(__doc__)
    {"make": make, "profile": profile}[sys.argv[1]](sys.argv[2])
