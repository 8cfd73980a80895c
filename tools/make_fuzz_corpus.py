#!/usr/bin/env python3
"""Seeds of the fuzz targets: tiny valid files of every format, and a few liars. Writes tests/fuzz/corpus/<target>/seed_*; what fuzzing
found before lies beside them as found_*. Plain Python.

    tools/make_fuzz_corpus.py [DIRECTORY]
"""
import json
import pathlib
import struct
import sys

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
# number: (elements, bytes) of a block
TENSOR_TYPES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144), 13: (256, 176),
                14: (256, 210), 30: (1, 2)}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + PACK[kind], value)


def key(name: str, kind: int, value) -> bytes:
    if isinstance(value, list):
        return text(name) + struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(scalar(kind, v) for v in value)
    return text(name) + struct.pack("<I", kind) + scalar(kind, value)


def gguf(keys: list, tensors: list, version: int = 3, alignment: int = 32) -> bytes:
    """tensors: (name, dims innermost first, type number)"""
    infos, data = b"", b""
    for name, dims, kind in tensors:
        data += bytes(-len(data) % alignment)
        infos += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        n = 1
        for dim in dims:
            n *= dim
        block_len, block_bytes = TENSOR_TYPES[kind]
        data += bytes((37 * i + 11) % 251 for i in range(n // block_len * block_bytes))
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + infos
    return head + bytes(-len(head) % alignment) + data


def byte_level() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


BYTES = byte_level()
SPACE = BYTES[32]
MERGES = ["h e", "l l", "he ll", "hell o", f"{SPACE} a", "a b"]
BPE_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, *(m.replace(" ", "") for m in MERGES)]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "h", "e", "l", "o", "he", "ll", "\u2581a", "hello"]


def gguf_bpe(pre: str) -> bytes:
    return gguf([key("general.architecture", STRING, "llama"), key("tokenizer.ggml.model", STRING, "gpt2"),
                 key("tokenizer.ggml.pre", STRING, pre), key("tokenizer.ggml.tokens", STRING, BPE_TOKENS),
                 key("tokenizer.ggml.token_type", I32, [3] * 3 + [1] * (len(BPE_TOKENS) - 3)), key("tokenizer.ggml.merges", STRING, MERGES),
                 key("tokenizer.ggml.bos_token_id", U32, 1), key("tokenizer.ggml.eos_token_id", U32, 2),
                 key("tokenizer.ggml.add_bos_token", BOOL, False),
                 key("tokenizer.chat_template", STRING, "{% for message in messages %}{{'<|im_start|>' + message['role']}}{% endfor %}")], [])


def gguf_spm() -> bytes:
    n = len(SPM_TOKENS)
    return gguf([key("tokenizer.ggml.model", STRING, "llama"), key("tokenizer.ggml.tokens", STRING, SPM_TOKENS),
                 key("tokenizer.ggml.scores", F32, [-float(i) for i in range(n)]),
                 key("tokenizer.ggml.token_type", I32, [2, 3, 3] + [6] * 256 + [1] * (n - 259)), key("tokenizer.ggml.bos_token_id", U32, 1),
                 key("tokenizer.ggml.eos_token_id", U32, 2), key("tokenizer.ggml.add_space_prefix", BOOL, True)], [])


def gguf_seeds() -> dict[str, bytes]:
    every_value = [key(f"k{kind}", kind, 1) for kind in PACK] + [key("text", STRING, "x"), key("texts", STRING, ["", "a\0b", "\u00e9"])]
    every_array = [key(f"a{kind}", kind, [0, 1]) for kind in PACK]
    every_tensor = [(f"t{kind}", [block_len * 2, 2], kind) for kind, (block_len, _) in TENSOR_TYPES.items()]
    good = gguf([key("general.alignment", U32, 64)], [("a", [4, 3], 0), ("b", [1, 1, 1, 5], 1)], alignment=64)
    return {"values": gguf(every_value, []), "arrays": gguf(every_array, [], version=2), "tensors": gguf([], every_tensor), "aligned": good,
            "cut": good[:-1], "bpe": gguf_bpe("smollm"), "bpe_qwen2": gguf_bpe("qwen2"), "spm": gguf_spm(),
            "counts": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 61), "split": gguf([key("split.count", U16, 2)], [])}


def safetensors(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, n_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    return text(json.dumps(header, separators=(",", ":"))) + bytes(i % 256 for i in range(at))


def safetensors_seeds() -> dict[str, bytes]:
    config = json.dumps({"model_type": "llama", "hidden_size": 8, "rms_norm_eps": 1e-6, "tie": True, "pad": None, "eos_token_id": [1, 2],
                         "layer_types": ["full_attention"], "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}, "mixed": [1, "a", {"b": []}]})
    model = safetensors({"a": ("F32", [2, 2], 16), "b": ("F16", [3], 6), "c": ("BF16", [1, 1, 2, 1], 4), "h.0.attn.bias": ("BOOL", [2], 2),
                         "s": ("F32", [], 4)})
    index = json.dumps({"weight_map": {"a": "part", "b": "part"}})
    line = b"\n%%\n"
    return {"single": config.encode() + line + model, "parts": config.encode() + line + index.encode() + line + model,
            "f64": b"{}" + line + safetensors({"a": ("F64", [1], 8)}), "gap": b"{}" + line + model + b"\0",
            "deep": b'{"a":' * 500 + b"1" + b"}" * 500 + line + model, "outside": b"{}" + line + b'{"weight_map":{"a":"../x"}}' + line}


def llama2c(header: tuple[int, ...]) -> bytes:
    dim, hidden, layers, heads, kv_heads, vocab, seq = header
    head_dim = dim // heads
    n = abs(vocab) * dim * (2 if vocab < 0 else 1) + dim + 2 * seq * (head_dim // 2)
    n += layers * (2 * dim + 2 * dim * dim + 2 * kv_heads * head_dim * dim + 3 * dim * hidden)
    return struct.pack("<7i", *header) + b"".join(struct.pack("<f", i) for i in range(n))


def llama2c_seeds() -> dict[str, bytes]:
    return {"shared": llama2c((4, 6, 2, 2, 1, 3, 5)), "unshared": llama2c((2, 1, 1, 1, 1, -2, 1)),
            "wrapping": struct.pack("<7i", *[2**30] * 3, 1, 1, 2**30, 2**30) + bytes(100), "header": struct.pack("<7i", 4, 6, 2, 2, 1, 3, 5)}


def tokenizer_json(model: dict, **parts) -> bytes:
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, t in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": None,
             "post_processor": None, "decoder": None, "model": model}
    return json.dumps({**whole, **parts}, ensure_ascii=False, separators=(",", ":")).encode()


def tokenizer_json_seeds() -> dict[str, bytes]:
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
           "byte_fallback": False, "ignore_merges": False, "vocab": {t: i for i, t in enumerate(BPE_TOKENS)}, "merges": MERGES}
    pairs = {**bpe, "ignore_merges": True, "merges": [m.split(" ") for m in MERGES]}
    spm = {**bpe, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": {t: i for i, t in enumerate(SPM_TOKENS)},
           "merges": ["h e", "l l", "\u2581 a"]}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    regex = "(?i:'s|'t|'re)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},
                                                   {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    chat = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'}}{% endfor %}"
    config = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>", "special": True}, "add_bos_token": True, "chat_template": chat}
    return {"config": tokenizer_json(bpe, pre_tokenizer=level, decoder=level) + b"\n%%\n" + json.dumps(config).encode(),
            "gpt2": tokenizer_json(bpe, pre_tokenizer=level, decoder=level),
            "smollm": tokenizer_json(bpe, pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, level]}, decoder=level),
            "qwen": tokenizer_json(pairs, normalizer={"type": "NFC"}, decoder=level, post_processor=template,
                                   pre_tokenizer={"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]}),
            "llama": tokenizer_json(spm, normalizer=prepend, post_processor=template),
            "gemma": tokenizer_json(spm, normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                                    pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}),
            "metaspace": tokenizer_json(spm, pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}),
            "empty": b"{}"}


def tokenizer_bin_seeds() -> dict[str, bytes]:
    tokens = [(t.replace("\u2581", " ").encode(), -float(i)) for i, t in enumerate(SPM_TOKENS)]
    good = struct.pack("<i", max(len(t) for t, _ in tokens)) + b"".join(struct.pack("<fi", s, len(t)) + t for t, s in tokens)
    return {"small": good, "cut": good[:-1], "length": good[:8] + struct.pack("<i", 2**31 - 1) + good[12:], "negative": good[:8] + b"\xff" * 4}


def checksum(data: bytes) -> int:
    """docs/LAYOUTS.md, of the document index"""
    h = 0
    padded = data + bytes(-len(data) % 8)
    for word in (*struct.unpack(f"<{len(padded) // 8}Q", padded), len(data)):
        h = (h ^ word) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        h ^= h >> 32
    return h


def sealed(data: bytes) -> bytes:
    return data + struct.pack("<Q", checksum(data))


def index(commits: list[int], sources: list[tuple], layers: list[tuple] = [(2, 2, 4, 2, 192), (0, 0, 2, 4, 256)], vocab: int = 100) -> bytes:
    """commits: tokens of each state; sources: (segment, name, first token, tokens)"""
    settings = struct.pack("<QQ8IQQ", 1, 2, 1, 64, len(layers), 1, 8, 8, 1, vocab, 4, 0)
    settings += b"".join(struct.pack("<4IQ", *layer) for layer in layers) + b"tiny"
    header = sealed(b"SFAINDEX" + struct.pack("<IIQQ", 1, 0x01020304, len(settings), checksum(settings)) + bytes(24))
    slots, body, at, before, first, first_source = [bytes(64)] * 2, settings, 12288 + len(settings), 0, 0, 0
    for sequence, total in enumerate(commits, 1):
        body += bytes(-at % 64)
        at += -at % 64
        own = [s for s in sources if s[0] == sequence]
        names = b"".join(s[1] + b"\0" for s in own)
        meta = b"".join(struct.pack("<i", i * 7 % vocab) for i in range(first, total))
        meta += bytes(-len(meta) % 8) + b"".join(struct.pack("<4Q", 10 * s[2], 9 * s[3], s[2], s[3]) for s in own) + names
        n_pages = -(-total // 64) - first // 64
        pages = [bytes((i * 31 + p * 17 + j) % 256 for j in range(layer[4])) for i, layer in enumerate(layers) for p in range(n_pages)]
        meta += bytes(-len(meta) % 8) + b"".join(struct.pack("<Q", checksum(p)) for p in pages)
        meta += bytes(-len(meta) % 64)
        pages_at = at + 128 + len(meta)
        end = pages_at + sum(map(len, pages))
        counts = (before, first, total - first, first_source, len(own), len(names), pages_at, end)
        body += sealed(b"SFASEGMT" + struct.pack("<9Q", *counts, checksum(meta)) + bytes(40)) + meta + b"".join(pages)
        first_source += len(own)
        slots[sequence % 2] = sealed(struct.pack("<7Q", sequence, end, at, total, first_source, 0, 0))
        before, at, first = at, end, total
    return header.ljust(4096, b"\0") + slots[0].ljust(4096, b"\0") + slots[1].ljust(4096, b"\0") + body


def index_seeds() -> dict[str, bytes]:
    two = index([70, 130], [(1, b"a.txt", 1, 60), (2, b"b.txt", 61, 69)])
    return {"one": index([3], [(1, b"book", 0, 3)], layers=[(1, 1, 4, 4, 64)]), "two": two, "many": index([1, 2, 64, 65, 65, 66], []),
            "cut": two[:-1], "begun": two[:4096] + bytes(8192) + two[12288:], "raw": b"\0" + two[1:]}


def shard(ids: list[int], vocab: int = 500, end: int = 3, documents: int = 1, last: int = 1) -> bytes:
    """docs/LAYOUTS.md, token shards"""
    id_bytes = 2 if vocab <= 65536 else 4
    data = struct.pack(f"<{len(ids)}{'H' if id_bytes == 2 else 'I'}", *ids)
    size = 65536 * id_bytes
    sums = b"".join(struct.pack("<Q", checksum(data[at:at + size])) for at in range(0, len(data), size))
    header = b"SFASHARD" + struct.pack("<6I6Q", 1, 0x01020304, id_bytes, vocab, end, last, 77, len(ids), documents, 0, 0, checksum(sums))
    return sealed(header + bytes(40)) + data + bytes(-len(data) % 8) + sums


def shard_seeds() -> dict[str, bytes]:
    small = shard([*range(4, 30), 3, 7, 8, 3], documents=2)
    return {"small": small, "wide": shard([69999, 3], vocab=70000), "cut": small[:-1], "foreign_id": shard([500, 3]),
            "not_last": shard([5, 3], last=0), "blocks": shard([i % 500 for i in range(65540)] + [3])}


def main() -> None:
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent / "tests/fuzz/corpus"
    targets = {"gguf": gguf_seeds(), "safetensors": safetensors_seeds(), "llama2c": llama2c_seeds(), "tokenizer_json": tokenizer_json_seeds(),
               "tokenizer_bin": tokenizer_bin_seeds(), "index": index_seeds(), "shard": shard_seeds()}
    for target, seeds in targets.items():
        (out / target).mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (out / target / f"seed_{name}").write_bytes(data)
        print(f"{target}: {len(seeds)} seeds, {sum(map(len, seeds.values()))} bytes")


if __name__ == "__main__":
    main()
