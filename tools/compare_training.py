#!/usr/bin/env python3
"""compare_training.py SFA TEXT [--steps 50] [--families llama,qwen3,...]

Trains tiny models of every family with `sfa train` and with PyTorch (Hugging Face's model, torch.optim.AdamW, clip_grad_norm_) from the
same weights over the same tokens, and compares the losses of every step. Exit status 1 if one differs by more than 1e-3.
SFA is the command, TEXT a text of a few hundred kB. Needs torch and transformers.
"""
import argparse
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM

BASE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu")
FAMILIES = {
    "llama": dict(BASE, model_type="llama"),
    "llama_untied": dict(BASE, model_type="llama", tie_word_embeddings=False),
    "qwen2": {k: v for k, v in dict(BASE, model_type="qwen2").items() if k != "head_dim"},
    "qwen3": dict(BASE, model_type="qwen3"),
    "gpt2": dict(model_type="gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=128, activation_function="gelu_new",
                 layer_norm_epsilon=1e-5, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0),
    "gemma3": dict({k: v for k, v in BASE.items() if k != "hidden_act"}, model_type="gemma3_text", hidden_activation="gelu_pytorch_tanh",
                   sliding_window=16, sliding_window_pattern=2, query_pre_attn_scalar=16, rope_local_base_freq=10000.0, rms_norm_eps=1e-6,
                   layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=None, final_logit_softcapping=None,
                   bos_token_id=0, pad_token_id=0),
}
RECIPE = dict(sequences=3, accumulate=2, sequence_len=48, learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=5, decay="cosine",
              weight_decay=0.1, clip_norm=1.0, seed=11, log_every=1, validate_every=0, checkpoint_every=0, sparse_attention_config=None)
MASK = (1 << 64) - 1


def hash_word(h, word):
    """base/hash.h"""
    h = ((h ^ word) * 0x9E3779B97F4A7C15) & MASK
    return h ^ (h >> 32)


def shuffle(key, n, i):
    """train/batches.c: the i-th window in the order of a key."""
    half = 1
    while half < 32 and 1 << (2 * half) < n:
        half += 1
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            left, right = right, left ^ (hash_word(hash_word(hash_word(key, r), right), 0) & mask)
        i = left << half | right
        if i < n:
            return i


def read_shard(path):
    """The ids of a shard (docs/LAYOUTS.md)."""
    data = pathlib.Path(path).read_bytes()
    id_bytes, = struct.unpack_from("<I", data, 16)
    n_tokens, = struct.unpack_from("<Q", data, 40)
    return struct.unpack_from(f"<{n_tokens}{'H' if id_bytes == 2 else 'I'}", data, 128)


def rate(step, steps):
    r = RECIPE
    if step < r["warmup_steps"]:
        return r["learning_rate"] * (step + 1) / r["warmup_steps"]
    x = (step - r["warmup_steps"]) / (steps - r["warmup_steps"])
    return r["learning_rate"] + (r["final_learning_rate"] - r["learning_rate"]) * (0.5 - 0.5 * math.cos(math.pi * x))


def train_torch(folder, ids, steps):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=RECIPE["weight_decay"]), dict(params=vectors, weight_decay=0.0)],
                                  betas=(0.9, 0.95), eps=1e-8)
    length, per_batch, batches = RECIPE["sequence_len"], RECIPE["sequences"], RECIPE["accumulate"]
    n_windows = (len(ids) - 1) // length
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.zero_grad()
        total = 0.0
        for b in range(batches):
            rows, targets = [], []
            for s in range(per_batch):
                index = (step * batches + b) * per_batch + s
                window = shuffle(hash_word(hash_word(0, RECIPE["seed"]), index // n_windows), n_windows, index % n_windows)
                rows.append(ids[window * length:(window + 1) * length])
                targets.append(ids[window * length + 1:(window + 1) * length + 1])
            logits = model(torch.tensor(rows), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten()) / batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip_norm"])
        optimizer.step()
        losses.append(total)
    return losses


def run(*command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: {result.stderr}")


def compare(sfa, folder, shards, ids, name, steps):
    recipe, out = folder / f"{name}.json", folder / name
    recipe.write_text(json.dumps(dict(RECIPE, model=FAMILIES[name], steps=steps)))
    run(sfa, "train", "--config", recipe, "--data", shards, "-o", out)
    ours = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    theirs = train_torch(out / "initial", ids, steps)
    worst = max(abs(a - b) for a, b in zip(ours, theirs))
    good = len(ours) == steps and worst <= 1e-3
    print(f"{name:14s} {steps} steps: loss {ours[0]:.4f} to {ours[-1]:.4f}, PyTorch {theirs[-1]:.4f}, largest difference {worst:.2e}"
          f"{'' if good else '  TOO LARGE'}", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sfa", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--families", default=",".join(FAMILIES))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        run(args.sfa, "tokenizer", "train", args.text, "--vocab", 400, "-o", folder / "tokenizer")
        run(args.sfa, "data", args.text, "--tokenizer", folder / "tokenizer", "-o", folder / "shards")
        ids = read_shard(folder / "shards" / "train_00000.shard")
        good = [compare(args.sfa, folder, folder / "shards" / "train", ids, name, args.steps) for name in args.families.split(",")]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
