#!/usr/bin/env python3
"""A second reader of document indexes, made from docs/LAYOUTS.md alone: checks every rule of that page and every checksum, decodes all
codes and values, and prints what it found as one JSON document. Plain Python.

    tools/read_index.py FILE [--row LAYER HEAD TOKEN]      --row: one key (with zeros where it was cut) and one value in full
"""
import argparse
import json
import math
import pathlib
import struct
import sys

MASK = (1 << 64) - 1
F32, BF16, F16, I8, I4, E4M3 = 1, 2, 3, 4, 5, 6
SCALED = (I8, I4, E4M3)
NAMES = {F32: "f32", BF16: "bf16", F16: "f16", I8: "int8", I4: "int4", E4M3: "fp8"}


class Damaged(Exception):
    pass


def check(condition: bool, what: str) -> None:
    if not condition:
        raise Damaged(what)


def checksum(data: bytes) -> int:
    h = 0
    padded = data + bytes(-len(data) % 8)
    for word in (*struct.unpack(f"<{len(padded) // 8}Q", padded), len(data)):
        h = (h ^ word) * 0x9E3779B97F4A7C15 & MASK
        h ^= h >> 32
    return h


def align(at: int, to: int) -> int:
    return -(-at // to) * to


def sealed(data: bytes, at: int, n: int) -> bool:
    """n bytes whose last 8 are the checksum of the others"""
    return at + n <= len(data) and checksum(data[at : at + n - 8]) == struct.unpack_from("<Q", data, at + n - 8)[0]


def e4m3(x: int) -> float:
    """The number of a byte: sign, 4 bits of exponent, 3 of fraction"""
    exponent, fraction = x >> 3 & 15, x & 7
    number = math.nan if x & 127 == 127 else (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return -number if x & 128 else number


def elements(data: bytes, at: int, n: int, kind: int, scale: float) -> list[float]:
    """n stored numbers as floats"""
    if kind == F32:
        return list(struct.unpack_from(f"<{n}f", data, at))
    if kind == BF16:
        return [struct.unpack("<f", struct.pack("<I", x << 16))[0] for x in struct.unpack_from(f"<{n}H", data, at)]
    if kind == F16:
        return list(struct.unpack_from(f"<{n}e", data, at))
    if kind == I8:
        return [x * scale for x in struct.unpack_from(f"<{n}b", data, at)]
    if kind == E4M3:
        return [e4m3(x) * scale for x in data[at : at + n]]
    return [(((data[at + i // 2] >> 4 * (i % 2)) & 15) - 8) * scale for i in range(n)]


def element_bytes(n: int, kind: int) -> int:
    return {F32: 4 * n, BF16: 2 * n, F16: 2 * n, I8: n, I4: n // 2, E4M3: n}[kind]


class Layer:
    """Where the arrays of a page lie."""

    def __init__(self, settings: dict, k: int, k_q: int, k_type: int, v_type: int, page_bytes: int):
        self.k, self.k_q, self.k_type, self.v_type, self.page_bytes = k, k_q, k_type, v_type, page_bytes
        self.D, self.E, self.G = settings["D"], settings["E"], settings["G"]
        self.id_bytes = 1 if self.D <= 256 else 2
        self.width = k or self.D
        rows = {
            "ids": k * self.id_bytes,
            "k": element_bytes(self.width, k_type),
            "k_scales": 2 if k_type in SCALED else 0,
            "v": element_bytes(self.E, v_type),
            "v_scales": 2 if v_type in SCALED else 0,
        }
        self.row_bytes, self.at, end = rows, {}, 0
        for name, row in rows.items():
            self.at[name] = end
            end += align(64 * row, 64)
        self.head_bytes = end
        check(page_bytes == 64 + self.G * end, f"a page of {page_bytes} bytes, not of {64 + self.G * end}")

    def row(self, page: bytes, head: int, name: str, row: int) -> int:
        return 64 + head * self.head_bytes + self.at[name] + row * self.row_bytes[name]

    def scale(self, page: bytes, head: int, name: str, row: int) -> float:
        return struct.unpack_from("<e", page, self.row(page, head, name, row))[0] if self.row_bytes[name] else 1.0

    def key(self, page: bytes, head: int, row: int) -> list[float]:
        scale = self.scale(page, head, "k_scales", row)
        values = elements(page, self.row(page, head, "k", row), self.width, self.k_type, scale)
        if not self.k:
            return values
        ids = struct.unpack_from(f"<{self.k}{'B' if self.id_bytes == 1 else 'H'}", page, self.row(page, head, "ids", row))
        check(all(a < b for a, b in zip(ids, ids[1:])) and ids[-1] < self.D, f"the features {ids} of a key")
        dense = [0.0] * self.D
        for i, value in zip(ids, values):
            dense[i] = value
        return dense

    def value(self, page: bytes, head: int, row: int) -> list[float]:
        return elements(page, self.row(page, head, "v", row), self.E, self.v_type, self.scale(page, head, "v_scales", row))

    def check_page(self, page: bytes, n_rows: int) -> None:
        """Rows that can be decoded; zeros everywhere else."""
        used = bytearray(self.page_bytes)
        for head in range(self.G):
            for row in range(n_rows):
                check(all(map(math.isfinite, self.key(page, head, row) + self.value(page, head, row))), "a number that is not finite")
            for name, n in self.row_bytes.items():
                at = self.row(page, head, name, 0)
                used[at : at + n * n_rows] = b"\1" * (n * n_rows)
        check(not any(byte for byte, u in zip(page, used) if not u), "something beside the rows of a page")


class Index:
    def __init__(self, data: bytes):
        self.data = data
        check(len(data) >= 12288 and data[:8] == b"SFAINDEX", "not an index")
        version, order, settings_bytes, settings_sum = struct.unpack_from("<IIQQ", data, 8)
        check(version == 1 and order == 0x01020304, f"version {version}, byte order {order:#x}")
        check(sealed(data, 0, 64), "the header")
        self.read_slot()
        check(12288 + settings_bytes <= self.bytes, "the size of the settings")
        settings = data[12288 : 12288 + settings_bytes]
        check(checksum(settings) == settings_sum, "the settings")
        self.read_settings(settings)
        self.read_segments(align(12288 + settings_bytes, 64))

    def read_slot(self) -> None:
        best = (0,)
        for i in range(2):
            slot = struct.unpack_from("<8Q", self.data, 4096 * (i + 1))
            if sealed(self.data, 4096 * (i + 1), 64) and slot[0] % 2 == i and slot[0] > best[0]:
                best = slot
        check(best[0] > 0, "both slots")
        self.sequence, self.bytes, self.newest, self.n_tokens, self.n_sources = best[:5]
        check(self.bytes <= len(self.data), "cut short")

    def read_settings(self, s: bytes) -> None:
        model, tokenizer, page_format, page_len, L, G, D, E, weights, vocab, name_bytes = struct.unpack_from("<QQ8IQ", s, 0)
        check(page_format == 1 and page_len == 64 and len(s) == 64 + 24 * L + name_bytes, "the settings' sizes")
        self.settings = {"D": D, "E": E, "G": G}
        self.vocab, self.model, self.name = vocab, model, s[64 + 24 * L :].decode()
        self.layers = [Layer(self.settings, *struct.unpack_from("<4IQ", s, 64 + 24 * i)) for i in range(L)]

    def read_segments(self, first_at: int) -> None:
        chain, at, limit = [], self.newest, self.bytes
        while at:
            check(at >= first_at and at % 64 == 0 and self.data[at : at + 8] == b"SFASEGMT" and sealed(self.data, at, 128), "a segment")
            head = struct.unpack_from("<9Q", self.data, at + 8)
            check(at < limit and head[7] <= limit, "the end of a segment")
            chain.append((at, head))
            limit, at = at, head[0]
        self.tokens, self.sources, self.pages, self.n_segments = [], [], {}, len(chain)
        for at, head in reversed(chain):
            self.read_segment(at, head)
        check(len(self.tokens) == self.n_tokens and len(self.sources) == self.n_sources, "the counts of a slot")
        check(all(0 <= t < self.vocab for t in self.tokens), "a token")
        byte = token = 0
        for source in self.sources:
            check(source["first_byte"] >= byte and source["first_token"] >= token, "the order of sources")
            byte, token = source["first_byte"] + source["bytes"], source["first_token"] + source["tokens"]
        check(token <= self.n_tokens, "the end of the last source")

    def read_segment(self, start: int, head: tuple) -> None:
        _, first_token, n_tokens, first_source, n_sources, n_name_bytes, pages_at, end, meta_sum = head
        check(first_token == len(self.tokens) and first_source == len(self.sources), "the order of segments")
        check(checksum(self.data[start + 128 : pages_at]) == meta_sum, "the list of a segment")
        at = start + 128
        self.tokens += struct.unpack_from(f"<{n_tokens}i", self.data, at)
        at = align(at + 4 * n_tokens, 8)
        names = self.data[at + 32 * n_sources : at + 32 * n_sources + n_name_bytes].split(b"\0")
        check(len(names) == n_sources + 1 and names[-1] == b"", "the names of sources")
        for i in range(n_sources):
            first_byte, n_bytes, token, tokens = struct.unpack_from("<4Q", self.data, at + 32 * i)
            self.sources.append(
                {"name": names[i].decode(errors="replace"), "first_byte": first_byte, "bytes": n_bytes, "first_token": token, "tokens": tokens}
            )
        at = align(at + 32 * n_sources + n_name_bytes, 8)
        first_page = first_token // 64
        n_pages = -(-(first_token + n_tokens) // 64) - first_page
        sums = struct.unpack_from(f"<{len(self.layers) * n_pages}Q", self.data, at)
        check(align(at + 8 * len(sums), 64) == pages_at, "where the pages begin")
        at = pages_at
        for i, layer in enumerate(self.layers):
            for p in range(n_pages):
                page = self.data[at : at + layer.page_bytes]
                check(checksum(page) == sums[i * n_pages + p], f"page {first_page + p} of layer {i}")
                layer.check_page(page, min(64, first_token + n_tokens - 64 * (first_page + p)))
                self.pages[i, first_page + p] = page
                at += layer.page_bytes
        check(at == end, "the end of a segment")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--row", nargs=3, type=int, metavar=("LAYER", "HEAD", "TOKEN"))
    args = parser.parse_args()
    try:
        index = Index(pathlib.Path(args.file).read_bytes())
    except (Damaged, struct.error, UnicodeDecodeError) as why:
        print(f"read_index.py: {args.file}: {why}", file=sys.stderr)
        return 1
    found = {
        "model": index.name,
        "fingerprint": f"{index.model:016x}",
        "tokens": index.n_tokens,
        "bytes": index.bytes,
        "segments": index.n_segments,
        "commits": index.sequence,
        "layers": len(index.layers),
        "kv_heads": index.settings["G"],
        "head_dim": index.settings["D"],
        "k": max(layer.k for layer in index.layers),
        "k_q": max(layer.k_q for layer in index.layers),
        "ids": index.tokens,
        "sources": index.sources,
        "types": [[NAMES[layer.k_type], NAMES[layer.v_type]] for layer in index.layers],
    }
    if args.row:
        i, head, token = args.row
        layer, page = index.layers[i], index.pages[i, token // 64]
        found["key"], found["value"] = layer.key(page, head, token % 64), layer.value(page, head, token % 64)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
