#!/usr/bin/env python3
"""Tokens a second of training: PyTorch on the CPU beside ours, the same model, batch and optimizer (f32, AdamW, clipping to norm 1).

    tools/compare_training_speed.py BUILD [--threads 2] [--model 2m] [--rounds 5]

On a machine that is busy otherwise, --cpu counts the seconds of processors (best with --threads 1, where nobody waits for anybody).

PyTorch runs transformers' Llama with scaled dot-product attention. Rounds of the engines take turns; medians and their ratios are
printed: ours dense to PyTorch dense, ours with K features to ours dense.
"""
import argparse
import pathlib
import statistics
import subprocess
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# hidden, layers, heads, kv heads, head_dim, ffn, vocabulary, sequences, length, k
MODELS = {
    "2m": (192, 6, 6, 2, 32, 512, 4096, 8, 256, 8),
    "4m": (256, 6, 4, 2, 64, 704, 4096, 8, 256, 16),
    "d128": (256, 4, 2, 2, 128, 704, 4096, 1, 4096, 16),
    "30m": (512, 8, 8, 4, 64, 1408, 16384, 4, 512, 16),
}


class Torch:
    def __init__(self, model, n_sequences, length, clock):
        self.clock = clock
        self.model = model.train()
        ids = torch.randint(0, model.config.vocab_size, (n_sequences, length + 1))
        self.tokens, self.targets = ids[:, :-1], ids[:, 1:].reshape(-1)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def steps(self, n):
        start = self.clock()
        for _ in range(n):
            self.optimizer.zero_grad(set_to_none=True)
            logits = self.model(self.tokens).logits
            torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), self.targets).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return self.clock() - start


class Ours:
    def __init__(self, build, folder, threads, n_sequences, length, steps, k, column):
        self.column = column
        command = [f"{build}/bin/time_learning", folder, str(threads), str(n_sequences), str(length), str(steps), str(k)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def steps(self, n):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline().split()[self.column])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, default="4m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden, layers, heads, kv_heads, head_dim, ffn, vocab, n_sequences, length, k = MODELS[args.model]
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=length, tie_word_embeddings=True, attn_implementation="sdpa"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engines = {"PyTorch dense": Torch(model, n_sequences, length, time.process_time if args.cpu else time.perf_counter),
                   "ours dense": Ours(args.build, folder, args.threads, n_sequences, length, args.steps, 0, int(args.cpu)),
                   f"ours k = {k}": Ours(args.build, folder, args.threads, n_sequences, length, args.steps, k, int(args.cpu))}
        seconds = {name: [] for name in engines}
        for engine in engines.values():
            engine.steps(args.steps)
        for _ in range(args.rounds):
            for name, engine in engines.items():
                seconds[name].append(engine.steps(args.steps))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters / 1e6:.1f}M parameters, {n_sequences} x {length} tokens a step, {args.threads} threads, {args.rounds} rounds")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        rate = n_sequences * length * args.steps / medians[name]
        print(f"{name:14} {rate:9.0f} tokens/s   median {medians[name] * 1e3:8.1f} ms   {min(times) * 1e3:.1f} .. {max(times) * 1e3:.1f}")
    names = list(engines)
    print(f"ours dense / PyTorch dense: {medians[names[0]] / medians[names[1]]:.2f}x    sparse / ours dense: {medians[names[1]] / medians[names[2]]:.2f}x")


if __name__ == "__main__":
    main()
