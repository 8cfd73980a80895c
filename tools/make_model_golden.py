#!/usr/bin/env python3
"""Golden models: for every family a tiny random one in Hugging Face's layout and as GGUF, and its logits by Hugging Face transformers.

    tools/make_model_golden.py [DIRECTORY]            (default: tests/golden)

Writes models/<name>/{config.json, model.safetensors, model.gguf, ids.i32, logits.f32} and MANIFEST (SHA-256). ids are [T] int32, logits
[T][vocab] float32, computed in double: every conversion to float32 inside transformers is patched away, so that the rounding of one
machine's float32 kernels does not reach the files and every run writes the same bytes. models/stories260K gets its logits the same way.

Made with torch 2.x, transformers 5.23, gguf 0.19, safetensors; other versions may write config.json differently.
"""
import contextlib
import hashlib
import json
import math
import pathlib
import shutil
import struct
import sys

import gguf
import numpy as np
import torch
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

N_TOKENS = 80
VOCAB = 200


@contextlib.contextmanager
def all_in_double():
    """torch.float32 where transformers asks for it becomes float64."""
    tensor_to, tensor_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def widened(dtype):
        return torch.float64 if dtype == torch.float32 else dtype

    def to(self, *args, **kwargs):
        args = [widened(a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: widened(v) if k == "dtype" else v for k, v in kwargs.items()}
        return tensor_to(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.float = lambda self: self.double()
    torch.nn.functional.softmax = lambda x, dim=None, dtype=None, **rest: softmax(x, dim=dim, dtype=widened(dtype), **rest)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = tensor_to, tensor_float, softmax
        torch.set_default_dtype(torch.float32)


def double_logits(model_class, config, state, ids):
    with all_in_double(), torch.no_grad():
        config._attn_implementation = "eager"
        model = model_class(config).double().eval()
        missing, unexpected = model.load_state_dict({k: v.double() for k, v in state.items()}, strict=False)
        assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy().astype("<f4")


def random_state(model, seed):
    """Weights that make a lively model: attention far from uniform, norms and biases away from 1 and 0."""
    random = np.random.RandomState(seed)
    state = {}
    for name, parameter in sorted(model.state_dict().items()):
        values = random.standard_normal(tuple(parameter.shape))
        if "norm" in name or "ln_" in name:
            is_shift = name.endswith("bias") or "gemma" in type(model).__name__.lower()
            values = 0.2 * values + (0.0 if is_shift else 1.0)
        elif name.endswith("bias"):
            values *= 0.2
        elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            values *= 0.6
        else:
            values *= 1.6 / math.sqrt(parameter.shape[-1])
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def save_ids(folder, seed):
    ids = np.random.RandomState(seed + 1000).randint(0, VOCAB, N_TOKENS).astype("<i4")
    ids.tofile(folder / "ids.i32")
    return ids


def interleaved(weight, n_heads):
    """Rows of q and k in the order of llama's GGUF: rotated pairs side by side."""
    rows = weight.shape[0]
    return weight.reshape(n_heads, 2, rows // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def llama3_divisors(config, head_dim):
    """rope_freqs.weight, as llama.cpp's converter computes it."""
    rope = config.rope_parameters
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for wave in 2 * np.pi / frequencies:
        if wave < original / high:
            divisors.append(1.0)
        elif wave > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(divisors, np.float32)


BLOCK_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down"}
GEMMA_BLOCK_NAMES = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
                     "post_feedforward_layernorm": "post_ffw_norm"}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "transformer.wte": "token_embd",
             "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}


def gguf_name(name, family):
    stem, suffix = name.rsplit(".", 1)
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{suffix}"
    layer, block = stem.split(".", 3)[2:]
    names = BLOCK_NAMES | (GEMMA_BLOCK_NAMES if family == "gemma3" else {})
    return f"blk.{layer}.{names[block]}.{suffix}"


def save_gguf(path, family, config, state):
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_name(f"golden {family}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if family == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if family in ("qwen3", "gemma3"):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_divisors(config, config.head_dim))
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_array("gemma3.attention.sliding_window_pattern", [kind == "sliding_attention" for kind in config.layer_types])
        writer.add_float32("gemma3.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for name, tensor in state.items():
        value = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            value = interleaved(value, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if family == "gpt2" and value.ndim == 2 and ".h." in name:
            value = value.T
        if family == "gemma3" and "norm" in name:
            value = value + 1
            if "q_norm" in name:  # GGUF has no query_pre_attn_scalar: scores are divided by sqrt(head_dim)
                value = value * np.float32(math.sqrt(config.head_dim / config.query_pre_attn_scalar))
        writer.add_tensor(gguf_name(name, family), np.ascontiguousarray(value.astype(np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def old_spelling(folder):
    """config.json as transformers 4 wrote it: rope_theta and rope_scaling."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(root, name, seed, model_class, config, dtype, family, old_config=False):
    folder = root / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config._attn_implementation = "eager"
    model = model_class(config)
    state = {k: v.to(dtype).to(torch.float32) for k, v in random_state(model, seed).items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if old_config:
        old_spelling(folder)
    if family:
        save_gguf(folder / "model.gguf", family, config, state)
    ids = save_ids(folder, seed)
    double_logits(model_class, config, state, ids).tofile(folder / "logits.f32")


def make_stories(root):
    """The trained llama2.c checkpoint in the repository: a Llama that rotates pairs (2p, 2p + 1)."""
    folder = root / "models" / "stories260K"
    raw = (folder / "stories260K.bin").read_bytes()
    dim, ffn, n_layers, n_heads, n_kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    head_dim = dim // n_heads
    kv_dim = n_kv_heads * head_dim
    numbers = np.frombuffer(raw, "<f4", offset=28)
    shapes = [("embed", (vocab, dim)), ("input_layernorm", (n_layers, dim)), ("self_attn.q_proj", (n_layers, dim, dim)),
              ("self_attn.k_proj", (n_layers, kv_dim, dim)), ("self_attn.v_proj", (n_layers, kv_dim, dim)),
              ("self_attn.o_proj", (n_layers, dim, dim)), ("post_attention_layernorm", (n_layers, dim)),
              ("mlp.gate_proj", (n_layers, ffn, dim)), ("mlp.down_proj", (n_layers, dim, ffn)), ("mlp.up_proj", (n_layers, ffn, dim)),
              ("norm", (dim,))]
    state, used = {}, 0
    for name, shape in shapes:
        size = math.prod(shape)
        value = numbers[used: used + size].reshape(shape)
        used += size
        if name in ("embed", "norm"):
            state["model.embed_tokens.weight" if name == "embed" else "model.norm.weight"] = torch.from_numpy(value.copy())
            continue
        for layer in range(n_layers):
            part = value[layer]
            if "q_proj" in name or "k_proj" in name:
                heads = part.shape[0] // head_dim
                part = part.reshape(heads, head_dim // 2, 2, dim).swapaxes(1, 2).reshape(part.shape)
            state[f"model.layers.{layer}.{name}.weight"] = torch.from_numpy(part.copy())
    config = LlamaConfig(vocab_size=vocab, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=n_layers, num_attention_heads=n_heads,
                         num_key_value_heads=n_kv_heads, max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    # "Once upon a time, there was a little girl named Lily." and how the model goes on.
    ids = np.asarray([1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337, 410, 408, 419,
                      292, 411, 322, 265, 282, 295, 433, 426, 385, 328, 432, 358, 394, 261, 370, 432, 352, 266, 268, 388, 426, 338, 391,
                      266, 267, 337, 335, 312, 432, 398, 312, 286, 267, 414, 270, 333, 415, 426], "<i4")
    ids.tofile(folder / "ids.i32")
    double_logits(LlamaForCausalLM, config, state, ids).tofile(folder / "logits.f32")


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent / "tests" / "golden")
    torch.set_num_threads(1)
    common = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=72, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
                  pad_token_id=None)
    make(root, "llama", 1, LlamaForCausalLM, LlamaConfig(
        **common, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
        rope_parameters={"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32}), torch.bfloat16, "llama", old_config=True)
    make(root, "qwen2", 2, Qwen2ForCausalLM, Qwen2Config(
        **common, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), torch.float32, None)
    make(root, "qwen3", 3, Qwen3ForCausalLM, Qwen3Config(
        **common, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}), torch.float16, "qwen3")
    make(root, "gpt2", 4, GPT2LMHeadModel, GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=6, n_positions=128, bos_token_id=0, eos_token_id=1), torch.float32, "gpt2")
    make(root, "gemma3", 5, Gemma3ForCausalLM, Gemma3TextConfig(
        **common, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
        query_pre_attn_scalar=24, layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=8.0,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                         "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 4.0}}), torch.float32, "gemma3")
    make_stories(root)
    files = sorted(p for p in (root / "models").rglob("*") if p.is_file())
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(root).as_posix()}\n" for p in files]
    (root / "MANIFEST").write_text("".join(lines))


if __name__ == "__main__":
    main()
