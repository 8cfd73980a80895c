#!/usr/bin/env python3
"""Compares the logits of a Llama-family GGUF here with those of Hugging Face transformers on the dequantised tensors, and of llama.cpp.

usage: compare_smollm2.py --dump BUILD/bin/dump_logits --model FILE.gguf --text FILE [--tokens 512] [--work DIR]

Prints for each: largest error relative to the largest logit, mean KL from the reference's distribution, top-1 agreement, mean NLL.
Needs torch, transformers, gguf, numpy; llama_cpp where it is installed."""
import argparse
import os
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
BLOCK_NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
               "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
               "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def field(reader, key):
    return reader.fields[key].contents()


def rotate_half_order(weight, n_heads):
    """GGUF orders the rows of q and k for rotation in pairs (2p, 2p + 1); transformers wants (p, p + D / 2)."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def load_reference(reader):
    n_heads, n_kv_heads = field(reader, "llama.attention.head_count"), field(reader, "llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = NAMES.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{BLOCK_NAMES[part]}.weight"
            if part in ("attn_q", "attn_k"):
                value = rotate_half_order(value, n_heads if part == "attn_q" else n_kv_heads)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(value))
    config = LlamaConfig(
        hidden_size=field(reader, "llama.embedding_length"), intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"), num_attention_heads=n_heads, num_key_value_heads=n_kv_heads,
        vocab_size=tensors["model.embed_tokens.weight"].shape[0], max_position_embeddings=field(reader, "llama.context_length"),
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "llama.rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in tensors, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        sys.exit(f"tensors do not fit: missing {missing}, unexpected {unexpected}")
    return model


def tokenize(path, text):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(os.path.dirname(path) or ".", gguf_file=os.path.basename(path))
    return tokenizer(text)["input_ids"]


def ours(dump, model, weights, ids, work):
    id_file, out_file = os.path.join(work, "ids.i32"), os.path.join(work, "logits.f32")
    np.asarray(ids, "<i4").tofile(id_file)
    subprocess.run([dump, model, weights, id_file, out_file], check=True)
    return np.fromfile(out_file, "<f4").reshape(len(ids), -1)


def llama_cpp_logits(model, ids):
    import llama_cpp
    llm = llama_cpp.Llama(model, n_ctx=len(ids) + 8, n_batch=len(ids), logits_all=True, verbose=False, type_k=0, type_v=0)
    llm.eval(list(map(int, ids)))
    return np.array(llm.scores[: len(ids)], np.float32)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def report(name, logits, reference, ids):
    log_p, log_q = log_softmax(reference), log_softmax(logits)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    nll = -log_q[np.arange(len(ids) - 1), ids[1:]].mean()
    error = np.abs(logits - reference).max() / np.abs(reference).max()
    top1 = (logits.argmax(-1) == reference.argmax(-1)).mean()
    print(f"{name:22s} max error {error:.2e}  KL {kl.mean():.3e} (max {kl.max():.2e})  top-1 {100 * top1:6.2f} %  NLL {nll:.5f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--work", default=None)
    args = parser.parse_args()
    with open(args.text, encoding="utf-8") as file:
        ids = np.asarray(tokenize(args.model, file.read(args.tokens * 16))[: args.tokens])
    reference_model = load_reference(gguf.GGUFReader(args.model))
    with torch.no_grad():
        reference = reference_model(torch.from_numpy(ids)[None]).logits[0].numpy()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for weights in ("f32", "auto", "int8", "bf16"):
            report(f"sfa {weights}", ours(args.dump, args.model, weights, ids, work), reference, ids)
    try:
        report("llama.cpp", llama_cpp_logits(args.model, ids), reference, ids)
    except ImportError:
        print("llama.cpp: the Python package llama_cpp is not installed; not compared")


if __name__ == "__main__":
    main()
