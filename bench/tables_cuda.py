#!/usr/bin/env python3
"""Makes the tables of docs/BENCHMARKS.md from what bench/run_cuda left in bench/results, as tables.py does for a processor.

usage: tables_cuda.py NAME [--write FILE]

With --write they stand between the lines "<!-- tables of a GPU -->" and "<!-- end of tables of a GPU -->" of FILE. Numbers in brackets are the
bars of the project's plan; a value below its bar is marked with (*)."""
import os

from tables import RESULTS, against, command, main, one, pick, rows, table

DIMS = (64, 128, 256)
PEERS = ("cuDNN", "PyTorch FA2")
LONG, SHORT = 32768, 8192


def mask(causal):
    return "causal" if causal else "full"


def cases(lines):
    """The distinct (n, d, causal, k), longest first."""
    keys = {(line["n"], line["head_dim"], line["causal"], line["k"]) for line in lines}
    return sorted(keys, key=lambda key: (-key[0], key[1], key[2], key[3]))


def ratio(ours, theirs):
    """Of medians in one run."""
    return theirs["ms"] / ours["ms"] if ours and theirs else None


def spread(lines):
    """How far the rounds of an engine lie apart, as a sentence."""
    shares = sorted((line["max_ms"] - line["min_ms"]) / line["ms"] for line in lines if line["ms"] and line["rounds"] > 1)
    if not shares:
        return ""
    half, most = (100 * shares[int(part * (len(shares) - 1))] for part in (0.5, 0.9))
    return f"Slowest less fastest round over the median: up to {half:.1f} % for half of all engines and cases, up to {most:.1f} % for nine in ten.\n\n"


# ---- Attention of many queries --------------------------------------------------------------------------------------------------------

# Times as fast as cuDNN: (full, causal) by width.
BARS = {LONG: {"SFA bf16": {d: (1.0, 1.0) for d in DIMS}, "SFA sp_bf16": {128: (1.10, 1.20), 256: (1.12, 1.12)},
               "SFA sp_int8": {128: (1.15, 1.3), 256: (1.3, 1.3)}},
        SHORT: {"SFA bf16": {d: (0.95, 0.95) for d in DIMS}, "SFA sp_bf16": {d: (1.05, 1.05) for d in DIMS},
                "SFA sp_int8": {d: (1.05, 1.05) for d in DIMS}}}
FA2_BARS = {128: 2.1, 256: 2.6}
WAYS = ("SFA bf16", "SFA sp_bf16", "SFA int8", "SFA sp_int8", "dense twin")


def attention(lines):
    ratios, rates = {}, []
    for n, d, causal, k in cases(lines):
        part = {line["engine"]: line for line in pick(lines, n=n, head_dim=d, causal=causal, k=k)}
        cudnn, ours = part.get("cuDNN"), [part.get(way) for way in WAYS]
        label = [f"{n:.0f}", f"{part['SFA bf16']['heads']:.0f}", f"{d:.0f}", mask(causal)]
        if n <= SHORT:  # the bars leave top-k out
            ours = [{**line, "ms": line["ms"] - (line["topk_ms"] or 0)} if line else None for line in ours]
        cells = [against(ratio(line, cudnn), BARS.get(n, {}).get(way, {}).get(d, (None, None))[int(causal)]) for way, line in zip(WAYS, ours)]
        fa2 = against(ratio(ours[WAYS.index("SFA sp_bf16")], part.get("PyTorch FA2")), FA2_BARS.get(d) if n >= LONG else None)
        share = f"{100 * part['SFA bf16']['topk_ms'] / part['SFA bf16']['ms']:.1f} %"
        ratios.setdefault(n <= SHORT, []).append(label + cells + [fa2, share])
        rates.append(label + [f"{line['dense_equivalent_tflops']:.0f} ({100 * line['share_of_products']:.0f} %)" if line else "-"
                              for line in [part.get(way) for way in WAYS + PEERS]])
    head, text = ["tokens", "heads", "d", "mask"], ""
    for short, title in ((False, "top-k and all packing in it"), (True, "shorter, top-k apart")):
        if short in ratios:
            text += f"### Many queries: time of cuDNN over ours, k = 16, {title}\n\n"
            text += table(head + list(WAYS) + ["FlashAttention-2 / sp_bf16", "top-k of bf16's whole time"], ratios[short]) + "\n"
    if not rates:
        return ""
    text += "TFLOP/s, counted as those of a dense attention, top-k in the time, and in brackets the share of what large bf16 products of cuBLAS reach in\n"
    text += "the same rounds (of random numbers; operands that are mostly zeros take less power, and clocks stay higher):\n\n"
    return text + table(head + list(WAYS) + list(PEERS), rates) + "\n" + spread(lines) + command(lines)


# ---- Gradients -------------------------------------------------------------------------------------------------------------------------

BACKWARD_BARS = {64: 0.9, 128: 0.9, 256: 1.2}


def backward(lines):
    body = []
    for n, d, causal, k in cases(lines):
        part = {line["engine"]: line for line in pick(lines, n=n, head_dim=d, causal=causal, k=k)}
        ours = part["SFA bf16"]
        body.append([f"{n:.0f}", f"{ours['heads']:.0f}", f"{d:.0f}", mask(causal), f"{ours['ms']:.2f}", f"{2 * ours['topk_ms']:.2f}", f"{ours['forward_ms']:.2f}",
                     f"{ours['dense_equivalent_tflops']:.0f} ({100 * ours['share_of_products']:.0f} %)",
                     against(ratio(ours, part.get("cuDNN, deterministic")), BACKWARD_BARS.get(d)),
                     against(ratio(ours, part.get("cuDNN")), None), against(ratio(ours, part.get("PyTorch FA2")), None),
                     against(ratio(ours, part.get("PyTorch FA2, deterministic")), None), against(ratio(ours, part.get("dense twin")), None)])
    if not body:
        return ""
    text = "### Forward and backward together, k = 16, deterministic, with top-k once on either way: time of others over ours\n\n"
    head = ["tokens", "heads", "d", "mask", "ms", "of it top-k, twice", "of it forward", "TFLOP/s (of products)", "cuDNN, deterministic", "cuDNN", "FlashAttention-2",
            "FlashAttention-2, deterministic", "dense twin"]
    return text + table(head, body) + "\n" + spread(lines) + command(lines)


# ---- Decode ----------------------------------------------------------------------------------------------------------------------------

TOKENS = {32768: "32k", 131072: "128k", 1048576: "1M"}
STEP_BARS = {(1048576, 1, 16, "bf16"): 1.45, (1048576, 4, 16, "bf16"): 1.3,
             **{(n, group, 16, "int8"): bar for n, bar in ((32768, 1.0), (131072, 2.2), (1048576, 2.6)) for group in (1, 4)}}
# By tokens, group and the spread of the scores that run_cuda gives.
EPS_BARS = {(1048576, 1, 3.09): 2.9, (1048576, 1, 4.53): 5.5, (131072, 1, 4.6): 3.6, (32768, 1, 4.75): 2.1, (1048576, 1, 6.84): 10, (131072, 1, 7.75): 6.3,
            (32768, 1, 8.8): 3, (1048576, 4, 5.93): 4.3, (1048576, 4, 9): 5}


def better_peer(part):
    times = [line for line in part if line["engine"] in ("cuDNN", "Triton flash-decoding")]
    return min(times, key=lambda line: line["ms"]) if times else None


def decode(lines):
    exact, dropping = [], []
    groups = sorted({(line["n"], line["heads"] / line["kv_heads"], line["score_sd"]) for line in lines}, key=lambda key: (key[1], key[0], str(key[2])))
    for n, group, sd in groups:
        part = [line for line in pick(lines, n=n, score_sd=sd) if line["heads"] / line["kv_heads"] == group]
        peer, dense8 = better_peer(part), one(pick(part, engine="dense int8, V int8"), "ms")
        for line in part:
            if line["k"] == "" or (sd != "" and not line["eps"]):
                continue
            times = ratio(line, peer)
            label = [TOKENS.get(n, f"{n:.0f}"), f"{group:.0f}"]
            speed = [f"{1000 * line['ms']:.1f}"]
            moved = [f"{1e-9 * line['bytes_per_s']:.0f}", f"{100 * line['share_of_reads']:.0f} %"]
            if sd == "":
                bar = STEP_BARS.get((n, group, line["k"], line["v_dtype"])) if line["k_dtype"] == "int8" else None
                over = against(dense8 / line["ms"], 1.3 if line["k"] == 16 and line["v_dtype"] == "int8" else None) if dense8 and line["k"] else "-"
                exact.append(label + [line["engine"]] + speed + [against(times, bar), over] + moved)
            elif line["eps"]:
                kept = f"{100 * line['least_kept']:.1f} %" if line["least_kept"] != "" else "-"
                dropping.append(label + [line["engine"], kept] + speed + [against(times, EPS_BARS.get((n, group, sd))), f"{line['dropped']:.5f}"])
    text = ""
    if exact:
        text += "### A step of decoding, 8 kv heads, d = 128, skewed supports: time of the better of cuDNN and flash-decoding over ours\n\n"
        text += table(["tokens", "group", "", "us", "times as fast", "as our dense int8", "GB/s", "of copies"], exact)
    if dropping:
        text += "\n### With eps = 0.001, scores spread so that that share of the rows holds all but eps\n\n"
        text += table(["tokens", "group", "", "least rows to keep", "us", "times as fast", "mass left out"], dropping)
    return text + "\n" + spread(lines) + command(lines) if text else ""


# ---- Top-k -----------------------------------------------------------------------------------------------------------------------------


def topk(lines):
    body = []
    for line in pick(lines, engine="SFA"):
        other = pick(lines, engine="torch.topk", head_dim=line["head_dim"], k=line["k"], k_dtype=line["k_dtype"])
        ms, bar = 1e-6 * line["row_ns"] * line["n"], 0.25 if line["head_dim"] == 128 and line["k"] == 8 else None
        body.append([f"{line['n']:.0f}", f"{line['head_dim']:.0f}", f"{line['k']:.0f}", line["k_dtype"],
                     f"{ms:.3f}" + (f" ({bar}){'' if ms <= bar else ' (*)'}" if bar else ""), against(one(other, "times_sfa"), None),
                     f"{1e-9 * line['read_bytes_per_s']:.0f}", f"{100 * line['share_of_copies']:.0f} %"])
    text = "### Top-k of bf16 rows\n\n"
    return text + table(["rows", "d", "k", "codes", "ms", "torch.topk over it", "GB/s read", "of copies"], body) + "\n" + command(lines) if body else ""


SECTIONS = ((attention, ("attention", "attention_short")), (backward, ("backward", "backward_long")),
            (decode, ("decode", "decode_group", "decode_eps", "decode_eps_group")), (topk, ("topk",)))


def make(name):
    text = ""
    for maker, parts in SECTIONS:
        text += maker([line for part in parts for line in rows(name, part)]) + "\n"
        for part in parts:
            if os.path.exists(os.path.join(RESULTS, f"{name}-{part}.png")):
                text += f"![{part}](../bench/results/{name}-{part}.png)\n\n"
    return text.strip() + "\n"


if __name__ == "__main__":
    main(__doc__, make, "tables of a GPU")
