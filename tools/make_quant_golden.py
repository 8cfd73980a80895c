#!/usr/bin/env python3
"""Golden vectors of the tensor formats, by the gguf package (pip install gguf numpy): tests/golden/quant/<type>.bin

A file is n_blocks blocks of the format, then what gguf.quants.dequantize makes of them as n_blocks * block_len little-endian float32. Input
numbers come from SHA-256 in counter mode, so that every run on every machine writes the same bytes; SHA256SUMS beside them says which.

    tools/make_quant_golden.py [DIRECTORY]
"""
import hashlib
import pathlib
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type, quants

QUANTISED_HERE = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]
# The package only reads these: random blocks with scales of a sane size. Offsets in a block of its half-precision numbers.
RANDOM_BLOCKS = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}


def random_bytes(seed: str, n: int) -> np.ndarray:
    chunks = (hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(n // 32 + 1))
    return np.frombuffer(b"".join(chunks)[:n], dtype=np.uint8)


def random_floats(seed: str, n: int) -> np.ndarray:
    """Uniform in [-1, 1)."""
    return (random_bytes(seed, 4 * n).view("<u4").astype(np.float64) / 2**31 - 1).astype(np.float32)


def quantised(kind: Type) -> np.ndarray:
    """Blocks of ordinary size, of zeros, of large numbers, of numbers whose scale is a subnormal half, of positive numbers, of one number."""
    x = random_floats(kind.name, 8 * 32).reshape(8, 32)
    x[1] = 0
    x[2] *= 5000
    x[3] *= 2e-5
    x[4] = abs(x[4]) + 1
    x[5] = 0.75
    return np.asarray(quants.quantize(x.reshape(1, -1), kind)).view(np.uint8).reshape(-1)


def random_blocks(kind: Type) -> np.ndarray:
    n_blocks, block_bytes = 4, GGML_QUANT_SIZES[kind][1]
    blocks = random_bytes(kind.name, n_blocks * block_bytes).reshape(n_blocks, block_bytes).copy()
    scales = random_floats(kind.name + " scales", n_blocks * 2).reshape(n_blocks, 2) * np.float32(0.01)
    for i, at in enumerate(RANDOM_BLOCKS[kind]):
        blocks[:, at : at + 2] = scales[:, i].astype("<f2").reshape(n_blocks, 1).view(np.uint8)
    return blocks.reshape(-1)


def main() -> None:
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent / "tests/golden/quant"
    out.mkdir(parents=True, exist_ok=True)
    sums = []
    for kind in [*QUANTISED_HERE, *RANDOM_BLOCKS]:
        blocks = quantised(kind) if kind in QUANTISED_HERE else random_blocks(kind)
        typed = blocks.view("<f2") if kind == Type.F16 else blocks
        values = np.asarray(quants.dequantize(typed.reshape(1, -1), kind), dtype="<f4").reshape(-1)
        data = blocks.tobytes() + values.tobytes()
        name = kind.name.lower() + ".bin"
        (out / name).write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    (out / "SHA256SUMS").write_text("".join(sums))
    print("".join(sums), end="")


if __name__ == "__main__":
    main()
