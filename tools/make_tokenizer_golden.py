#!/usr/bin/env python3
"""Golden tokenizers and texts, by Hugging Face's tokenizers (pip install tokenizers gguf): tests/golden/tokenizer/<name>/

Trained here, on the book in examples/data: small tokenizers of every structure that the engine reads. Cut out of real ones, where their
files are given: the tokens that the texts need, so that the ids are those of the whole (GPT-2, Qwen3), or stand for them one to one
(SmolLM2, Phi-3 in GGUF). cases.jsonl has a line for each text: "text" (or "hex", if it is not UTF-8), "plain" (no special tokens parsed or
added), "parsed" (parsed and added), "decoded" of plain. SHA256SUMS says which bytes a run writes.

    tools/make_tokenizer_golden.py [--gpt2 DIR] [--qwen3 DIR] [--smollm2 GGUF] [--phi3 GGUF] [DIRECTORY]

--gpt2: encoder.json, vocab.bpe; --qwen3: tokenizer.json, tokenizer_config.json; --phi3: llama.cpp's ggml-vocab-phi-3.gguf, its .inp and .out
beside it. What is not given stays as it is.
"""
import argparse
import hashlib
import json
import pathlib
import random
import re

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOOK = ROOT / "examples/data/the_time_machine.txt"
META = "\u2581"
ByteLevel, Split, Chain = pre_tokenizers.ByteLevel, pre_tokenizers.Split, pre_tokenizers.Sequence
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL

# ---- Texts ---------------------------------------------------------------------------------------------------------------------

POOLS = [
    list("abcdefghijklmnopqrstuvwxyz"), list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), list("0123456789"), [" "], list(" \t\n\r"),
    list("!?.,;:'\"-_()[]{}<>|/\\@#$%^&*+=~`"),
    ["the ", "and ", "Hello", "world", " don't", " I'll", "'S", "'LL", "\u2019s", "ing", "  ", "   ", "\n\n", "\r\n", "\t\t", " \n"],
    list("éèüßñøåçÀÖſ\u212a\u212bΩ"),
    ["e\u0301", "a\u030a", "o\u0308\u0323", "\u0323\u0307", "\u0301", "\u0345\u0313", "\u1e9b\u0323", "\uac00\u11a8", "\u1100\u1161\u11a8",
     "\u0958", "\u2126", "\ufb01", "\u3300"],
    [chr(c) for c in range(0x4E00, 0x4E20)], list("こんにちはカタカナｶﾞ한국어조선말"), list("Приветмир"), list("مرحبا١٢٣४५६½²Ⅷ๓"),
    ["😀", "👨\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "🇩🇪", "🚀", "☃", "♥\ufe0f"],
    ["\u00a0", "\u2003", "\u3000", "\u2028", "\u0085", "\u200b", "\u200d", "\ufeff", "\u180e", "\x00", "\x1c", "\x7f", "\u00ad"],
    [META, META * 2, "<0x0A>", "<0xE2>", "Ġ", "Ċ"], [chr(c) for c in (0x10FFFF, 0xE000, 0xFFFF, 0xFFFD, 0x20000, 0x378)],
]
SPECIALS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "[MASK]", "<|x|>", "<|xy|>",
            "foo bar", "solo", "<", "<|"]
FIXED = ["", " ", "a", "Hello, world!", "  leading and trailing  ", "The Time Traveller (for so it will be convenient to speak of him)",
         "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "<s>[INST] hi [/INST] yes</s>", "a [MASK] b", "<|x|>  rest", "solo solos, solo",
         "x" * 300, " " * 100 + "x", "\n" * 50, "1234567890 12,345.678"]


def random_text(rng):
    pools = rng.sample(POOLS, rng.randint(1, 6))
    parts = []
    for _ in range(rng.choice([1, 2, 3, 5, 8, 20])):
        piece = rng.choice(SPECIALS) if rng.random() < 0.06 else rng.choice(rng.choice(pools))
        parts.append(piece * rng.choice([2, 3, 7, 30]) if rng.random() < 0.1 else piece)
    return "".join(parts)


def broken_bytes(rng, text):
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        if data and rng.random() < 0.5:
            del data[rng.randrange(len(data))]
        else:
            data.insert(rng.randint(0, len(data)), rng.choice([0x80, 0xBF, 0xC0, 0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0xF5, 0xFF]))
    return bytes(data)


def texts(name, n=40):
    rng = random.Random(name)
    out = FIXED + [random_text(rng) for _ in range(n)]
    return [t.encode() for t in out] + [broken_bytes(rng, random_text(rng)) for _ in range(8)]


# ---- Writing -------------------------------------------------------------------------------------------------------------------

def write_cases(folder, cases):
    """cases: (bytes, plain, parsed, decoded)"""
    with open(folder / "cases.jsonl", "w", encoding="ascii", newline="\n") as file:
        for data, plain, parsed, decoded in cases:
            try:
                line = {"text": data.decode()} if b"\0" not in data else {"hex": data.hex()}
            except UnicodeDecodeError:
                line = {"hex": data.hex()}
            file.write(json.dumps({**line, "plain": plain, "parsed": parsed, "decoded": decoded.encode().hex()}, separators=(",", ":")) + "\n")


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def hugging_face_cases(tokenizer, all_texts):
    cases = []
    for data in all_texts:
        text = data.decode("utf-8", "replace")
        tokenizer.encode_special_tokens = True
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = False
        parsed = tokenizer.encode(text).ids
        cases.append((data, plain, parsed, tokenizer.decode(plain, skip_special_tokens=True)))
    return cases


# ---- Trained here ----------------------------------------------------------------------------------------------------------------

CHATML_TOKENS = [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
ADDED = [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False),
         AddedToken("[MASK]", lstrip=True, normalized=False, special=True), AddedToken("<|x|>", rstrip=True, normalized=False),
         AddedToken("<|xy|>", normalized=True), AddedToken("foo bar", normalized=True), AddedToken("solo", single_word=True, normalized=False)]


def corpus():
    rng = random.Random("corpus")
    return [BOOK.read_text(encoding="utf-8")] + [random_text(rng) for _ in range(500)]


def byte_level(pre_tokenizer, normalizer=None, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=CHATML_TOKENS, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(ADDED)
    return tokenizer


def sentence_piece(normalizer, pre_tokenizer, decoder, post_processor=None):
    """Merges over characters with U+2581 for the space, byte tokens for the rest; trained word by word, as SentencePiece does."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    letters = sorted("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'é中" + META)
    trained.train_from_iterator(corpus()[:1], trainers.BpeTrainer(vocab_size=250, initial_alphabet=letters, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + sorted(model["vocab"], key=model["vocab"].get)
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(names)}, merges=[tuple(m) for m in model["merges"]], byte_fallback=True,
                                     fuse_unk=True, unk_token="<unk>"))
    tokenizer.decoder = decoder
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if post_processor:
        tokenizer.post_processor = post_processor
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names[:3]])
    tokenizer.add_tokens(ADDED)
    return tokenizer


def trained():
    space = normalizers.Replace(" ", META)
    plain_decoder = decoders.Sequence([decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse()])
    strip_decoder = decoders.Sequence([decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bos = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    both = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    digits = pre_tokenizers.Digits(individual_digits=True)
    tail = ByteLevel(add_prefix_space=False, use_regex=False)
    yield "bytes-prefix", byte_level(ByteLevel(add_prefix_space=True))
    yield "bytes-digits", byte_level(Chain([digits, ByteLevel(add_prefix_space=False, use_regex=True)]))
    yield "bytes-qwen", byte_level(Chain([Split(Regex(QWEN2), "isolated"), tail]), normalizers.NFC())
    yield "bytes-llama3", byte_level(Chain([Split(Regex(LLAMA3), "isolated"), tail]), ignore_merges=True)
    yield "bytes-splits", byte_level(Chain([Split(Regex(r"\s+"), "merged_with_next"), Split("a", "contiguous"), pre_tokenizers.Punctuation("merged_with_previous"),
                                            Split("e", "merged_with_previous", invert=True), tail]), normalizers.Sequence([normalizers.NFKD(), normalizers.Strip()]))
    yield "bytes-words", byte_level(Chain([pre_tokenizers.Whitespace(), tail]), normalizers.NFKC())
    yield "pieces-llama", sentence_piece(normalizers.Sequence([normalizers.Prepend(META), space]), None, strip_decoder, bos)
    yield "pieces-gemma", sentence_piece(space, Split(" ", "merged_with_previous"), plain_decoder, both)
    yield "pieces-meta", sentence_piece(normalizers.Replace(Regex(" {2,}"), " "), pre_tokenizers.Metaspace(prepend_scheme="first"), strip_decoder)


# ---- Cut out of real ones --------------------------------------------------------------------------------------------------------

def cut_model(model, tokenizer, all_texts):
    """Keeps the tokens and merges that the texts take part in: a merge that never happens changes nothing by being absent."""
    added = tokenizer.get_added_tokens_decoder().values()
    cuts = ["|".join(re.escape(t.content) for t in added if every or not t.special) for every in (True, False)]
    ranks = {tuple(m.split(" ") if isinstance(m, str) else m): i for i, m in enumerate(model["merges"])}
    used, keep = set(), set(ByteLevel.alphabet())
    for data in all_texts:
        text = data.decode("utf-8", "replace")
        if tokenizer.normalizer:
            text = tokenizer.normalizer.normalize_str(text)
        pieces = [p for cut in cuts for p in (re.split(cut, text) if cut else [text])]
        for word in (w for piece in pieces for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(piece)):
            parts = list(word)
            while len(parts) > 1:
                rank, at = min((ranks.get((parts[i], parts[i + 1]), 1 << 60), i) for i in range(len(parts) - 1))
                if rank == 1 << 60:
                    break
                used.add(rank)
                parts[at:at + 2] = ["".join(parts[at:at + 2])]
                keep.add(parts[at])
    merges = [model["merges"][i] for i in sorted(used)]
    return {t: i for t, i in model["vocab"].items() if t in keep}, merges


def vector_texts(name):
    rng = random.Random(name)
    return [t.encode() for t in FIXED] + [random_text(rng).encode() for _ in range(60)] + [BOOK.read_text(encoding="utf-8")[4000:6000].encode()]


def make_gpt2(folder, source):
    vocab = json.loads((source / "encoder.json").read_text(encoding="utf-8"))
    merges = [line for line in (source / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:] if line]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    all_texts = vector_texts("gpt2")
    small, used = cut_model({"vocab": vocab, "merges": merges}, tokenizer, all_texts)
    write_json(folder / "vocab.json", {**small, "<|endoftext|>": vocab["<|endoftext|>"]})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(used) + "\n", encoding="utf-8")
    write_cases(folder, hugging_face_cases(tokenizer, all_texts))


def make_qwen3(folder, source):
    whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    all_texts = vector_texts("qwen3")
    whole["model"]["vocab"], whole["model"]["merges"] = cut_model(whole["model"], tokenizer, all_texts)
    write_json(folder / "tokenizer.json", whole)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {k: config[k] for k in ("add_bos_token", "bos_token", "eos_token", "chat_template")})
    write_cases(folder, hugging_face_cases(tokenizer, all_texts))


def write_gguf(path, fields, arrays):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)](key, value)
    for key, value in arrays.items():
        writer.add_array(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def read_gguf(path, *names):
    fields = gguf.GGUFReader(path).fields
    return [fields[n if "." in n else f"tokenizer.ggml.{n}"].contents() for n in names]


def make_smollm2(folder, source):
    tokens, types, merges, chat = read_gguf(source, "tokens", "token_type", "merges", "tokenizer.chat_template")
    vocab = {t: i for i, t in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = Chain([pre_tokenizers.Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types) if kind == 3])
    all_texts = vector_texts("smollm2")
    small, used = cut_model({"vocab": vocab, "merges": merges}, tokenizer, all_texts)
    keep = [i for i, t in enumerate(tokens) if types[i] == 3 or t in small]
    new = {old: i for i, old in enumerate(keep)}
    write_gguf(folder / "tokenizer.gguf",
               {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": new[1], "tokenizer.ggml.eos_token_id": new[2],
                "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": chat},
               {"tokens": [tokens[i] for i in keep], "token_type": [types[i] for i in keep], "merges": used})
    write_cases(folder, [(d, [new[i] for i in plain], [new[i] for i in parsed], decoded)
                         for d, plain, parsed, decoded in hugging_face_cases(tokenizer, all_texts)])


def sentence_piece_ids(text, ids, scores, made):
    """Best score first, the leftmost of equals; `made` gathers every token on the way."""
    parts = list(text)
    made.update(p for p in parts if p in ids)
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at:at + 2] = ["".join(parts[at:at + 2])]
        made.add(parts[at])
    return [i for p in parts for i in ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()])]


def make_phi3(folder, source):
    """llama.cpp's own cases, whose ids the search above must find, too."""
    tokens, scores, types = read_gguf(source, "tokens", "scores", "token_type")
    inputs = pathlib.Path(f"{source}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = [[int(i) for i in line.split()] for line in pathlib.Path(f"{source}.out").read_text().split("\n")]
    ids, made = {t: i for i, t in enumerate(tokens)}, {META}
    for text, expected in zip(inputs, outputs):
        assert not text or sentence_piece_ids((META + text.replace(" ", META)), ids, scores, made) == expected, text
    keep = [i for i, t in enumerate(tokens) if t in made or types[i] in (2, 3, 4, 6)]
    new = {old: i for i, old in enumerate(keep)}
    write_gguf(folder / "tokenizer.gguf",
               {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.bos_token_id": new[1], "tokenizer.ggml.eos_token_id": new[32000],
                "tokenizer.ggml.unknown_token_id": new[0], "tokenizer.ggml.add_bos_token": True},
               {"tokens": [tokens[i] for i in keep], "scores": [scores[i] for i in keep], "token_type": [types[i] for i in keep]})
    cases = []
    for text, expected in zip(inputs, outputs):
        plain = [new[i] for i in expected]
        cases.append((text.encode(), plain, [new[1]] + plain, text))
    write_cases(folder, cases)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = {"gpt2": make_gpt2, "qwen3": make_qwen3, "smollm2": make_smollm2, "phi3": make_phi3}
    for name in real:
        parser.add_argument(f"--{name}", type=pathlib.Path)
    parser.add_argument("directory", nargs="?", type=pathlib.Path, default=ROOT / "tests/golden/tokenizer")
    options = parser.parse_args()
    for name, tokenizer in trained():
        folder = options.directory / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
        write_cases(folder, hugging_face_cases(tokenizer, texts(name)))
    for name, make in real.items():
        source = getattr(options, name)
        if source:
            folder = options.directory / name
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, source)
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(options.directory)}\n"
            for p in sorted(options.directory.rglob("*")) if p.suffix in (".json", ".jsonl", ".gguf", ".txt") and p.name != "chat.jsonl"]
    (options.directory / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
