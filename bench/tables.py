#!/usr/bin/env python3
"""Makes the tables of docs/BENCHMARKS.md from what bench/run left in bench/results.

usage: tables.py NAME [--write FILE]

Prints Markdown; with --write it takes the place of what stands between the lines "<!-- tables -->" and "<!-- end of tables -->" of FILE.
Bars, where a table has any, are those of the project's plan; a value below its bar is marked with (*)."""
import csv
import os
import sys

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")


def rows(name, part):
    """Lines of NAME-PART.csv with numbers as numbers."""
    try:
        with open(os.path.join(RESULTS, f"{name}-{part}.csv"), newline="", encoding="utf-8") as file:
            return [{key: number(value) for key, value in line.items()} for line in csv.DictReader(file)]
    except OSError:
        return []


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def pick(lines, **wanted):
    return [line for line in lines if all(line[key] == value for key, value in wanted.items())]


def command(lines):
    """The commands behind a table, once each, without where they wrote."""
    seen = []
    for line in lines:
        words, kept = line["command"].replace(os.path.expanduser("~"), "~").split(), []
        while words:
            word = words.pop(0)
            if word in ("--csv", "--plot"):
                words.pop(0)
            else:
                kept.append(word)
        if " ".join(kept) not in seen:
            seen.append(" ".join(kept))
    return "".join(f"`{text}`  \n" for text in seen)


def table(head, body):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in body]) + "\n"


def measured(body, labels):
    """The lines of a table in which anything stands behind the labels."""
    return [line for line in body if any(cell not in ("", "-") for cell in line[labels:])]


def against(value, bar):
    if value is None or value == "":
        return "-"
    return f"{value:.2f}" + (f" ({bar:g}){'' if value >= bar else ' (*)'}" if bar else "")


def one(lines, key):
    return lines[-1][key] if lines else None


# ---- Attention ------------------------------------------------------------------------------------------------------------------------

SDPA_BARS = {("bf16", 16): (2.5, 2.2, 2.2), ("bf16", 8): (3.0, 3.0, 2.8), ("f32", 16): (1.6, 1.75, 2.0), ("f32", 8): (1.9, 2.1, 2.3)}
SDPA_SHORT_BARS = {(2048, 64): 2.6, (2048, 128): 2.6, (2048, 256): 2.4, (1024, 128): 2.0}
READY_BARS = {("avx512", 8): (1.4, 1.45, 1.5), ("avx512", 16): (1.25, 1.4, 1.45), ("avx2", 8): (None, 1.5, None)}
DIMS = (64, 128, 256)


def sdpa(lines):
    part = [line for line in pick(lines, n=8192, ready=0, supports="uniform") if line["threads"] > 1]
    body = []
    for dtype in ("bf16", "f32"):
        for k in (16, 8):
            for causal in (0, 1):
                cells = [against(one(pick(part, dtype=dtype, k=k, causal=causal, head_dim=dim, engine="PyTorch SDPA"), "times_sfa"),
                                 SDPA_BARS[dtype, k][i]) for i, dim in enumerate(DIMS)]
                body.append([dtype, str(k), "causal" if causal else "full"] + cells)
    body, text = measured(body, 3), ""
    if body:
        text += "### Against PyTorch, 8192 tokens, all in\n\nTime of `scaled_dot_product_attention` over SFA's, in the same rounds; in brackets the bar.\n\n"
        text += table(["type", "k", "mask"] + [f"d {dim}" for dim in DIMS], body)
    body = measured([[engine, str(k)] + [against(one(pick(part, dtype="f32", k=k, causal=0, head_dim=dim, engine=engine), "times_sfa"), None) for dim in DIMS]
                     for engine in ("dense twin", "OpenBLAS through numpy", "oneDNN, QK and PV only") for k in (16, 8)], 2)
    if body:
        text += "\nThe same runs against the others, f32, full: the dense twin; numpy over OpenBLAS (products, softmax in numpy); oneDNN's two products alone, without a softmax.\n\n"
        text += table(["engine", "k"] + [f"d {dim}" for dim in DIMS], body)
    return text + "\n" + command(part) if text else ""


def lengths(lines):
    part = [line for line in lines if line["dtype"] == "bf16" and line["threads"] > 1 and line["k"] == 8 and line["ready"] == 0]
    body = []
    for n in (1024, 2048, 4096, 8192, 16384, 32768):
        for dim in DIMS:
            for causal in (0, 1):
                cells = pick(part, n=n, head_dim=dim, causal=causal)
                if cells and n != 8192 or cells and dim == 128 and causal:
                    bar = SDPA_SHORT_BARS.get((n, dim))
                    body.append([f"{n}", f"{dim}", "causal" if causal else "full",
                                 against(one(pick(cells, engine="PyTorch SDPA"), "times_sfa"), bar),
                                 against(one(pick(cells, engine="dense twin"), "times_sfa"), None),
                                 f"{100 * (one(pick(cells, engine='SFA'), 'topk_ms') or 0) / (one(pick(cells, engine='SFA'), 'ms') or 1):.0f} %"])
    if not body:
        return ""
    text = "### By length, bf16, k = 8, all in\n\n"
    return text + table(["tokens", "d", "mask", "PyTorch / SFA", "dense twin / SFA", "top-k of SFA's time"], body)


def ready(lines):
    part = pick(lines, ready=1, n=4096)
    body = []
    for isa in ("avx512", "avx2", "amx"):
        for k in (8, 16):
            cells = [one(pick(part, isa=isa, k=k, head_dim=dim, engine="dense twin"), "times_sfa") for dim in DIMS]
            shares = [one(pick(part, isa=isa, k=k, head_dim=dim, engine="dense twin"), "share_of_peak") for dim in DIMS]
            if any(cells):
                bars = READY_BARS.get((isa, k), (None, None, None))
                body.append([isa, str(k)] + [against(cell, bar) for cell, bar in zip(cells, bars)] +
                            [" / ".join(f"{100 * share:.0f} %" if share else "-" for share in shares)])
    if not body:
        return ""
    text = "### Codes ready, f32, 4096 tokens, one thread: dense twin over SFA\n\n"
    head = ["kernels", "k"] + [f"d {dim}" for dim in DIMS] + ["dense twin's share of the peak multiply rate, d 64 / 128 / 256"]
    return text + table(head, body) + "\n" + command(part)


def overlap(lines):
    part = pick(lines, supports="skewed", engine="SFA")
    body = [[f"{line['head_dim']:.0f}", f"{line['k']:.0f}", f"{line['overlap_random']:.2f}", f"{line['overlap']:.2f}",
             f"{line['pair_multiply_adds'] - line['head_dim']:.0f}", f"{line['head_dim']:.0f}",
             f"{100 * line['kv_bytes'] / line['dense_kv_bytes']:.0f} %"] for line in part]
    if not body:
        return ""
    text = "### Multiply-adds of a score, skewed supports\n\n"
    head = ["d", "k", "shared by random supports, k^2 / d", "really shared", "done", "dense", "KV bytes of dense (f32)"]
    return text + table(head, body) + "\n" + command(part)


# ---- Decode ----------------------------------------------------------------------------------------------------------------------------

STEP_BARS = {"SFA k 16 int8, V bf16": 1.6, "SFA k 16 int8, V int8": 2.7, "SFA k 16 int8, V int4": 4.0}
TOKENS = {65536: "64k", 1048576: "1M"}


def ms(line):
    return f"{line['ms']:.3f}" if line["ms"] < 10 else f"{line['ms']:.1f}"


def decode_line(line, bar=None):
    share = f"{100 * line['share_of_reads']:.0f} %" if line["share_of_reads"] != "" else "-"
    rate = f"{1e-9 * line['bytes_per_s']:.1f}" if line["bytes_per_s"] != "" else "-"
    size = f"{line['token_bytes']:.0f}" if line["token_bytes"] != "" else "-"
    return [TOKENS.get(line["n"], f"{line['n']:.0f}"), line["engine"], ms(line), against(line["times_dense"], bar), size, rate, share]


DECODE_HEAD = ["tokens", "engine", "ms", "times as fast as dense bf16 (bar)", "bytes a token", "GB/s", "of plain reads of as much"]


def decode(lines):
    whole = [line for line in lines if line["head_dim_v"] == line["head_dim"]]
    steps = [line for line in whole if line["threads"] == 1 and line["score_sd"] == "" and line["kv_heads"] == 1]
    text = "### A step, one head of d = 128, one thread, skewed supports\n\n" + table(DECODE_HEAD, [decode_line(line, STEP_BARS.get(line["engine"])) for line in steps])
    for n in TOKENS:
        dense8, sparse = pick(steps, n=n, engine="dense int8, V int8"), pick(steps, n=n, engine="SFA k 16 int8, V int8")
        if dense8 and sparse:
            text += f"\nAgainst the own dense int8 step, k = 16, V int8, {TOKENS[n]}: {against(one(dense8, 'ms') / one(sparse, 'ms'), 1.4)}.\n"
    text += "\n" + command(steps)
    if not steps:
        text = ""
    scores = [line for line in lines if line["head_dim_v"] < line["head_dim"]]
    if scores:
        text += "\n### Little but scores: the same with values of 32 numbers\n\nScores without softmax and values: the kernels' own table, below.\n\n"
        text += table(DECODE_HEAD, [decode_line(line) for line in scores]) + "\n" + command(scores)
    dropping = [line for line in whole if line["score_sd"] != ""]
    body = []
    for line in dropping:
        bar = 3.2 if line["eps"] not in ("", 0.0) else None
        extra = [f"{line['dropped']:.5f}" if line["dropped"] != "" else "-", f"{100 * line['least_kept']:.0f} %" if line["least_kept"] != "" else "-"]
        body.append(decode_line(line, bar) + extra)
    if dropping:
        text += "\n### eps = 0.01, scores spread by 2.3: values left out with a certificate\n\n"
        text += table(DECODE_HEAD + ["dropped mass", "least rows to keep"], body) + "\n" + command(dropping)
    others = [line for line in whole if line["threads"] > 1]
    if not others:
        return text
    text += "\n### Groups, several queries, batches, a million tokens of 8 heads; all threads\n\n"
    body = [[f"{line['batch']:.0f} x {TOKENS.get(line['n'], line['n'])}", f"{line['heads']:.0f} / {line['kv_heads']:.0f}", f"{line['n_q']:.0f}"] +
            decode_line(line)[1:] for line in others]
    return text + table(["sequences", "heads q / kv", "queries"] + DECODE_HEAD[1:], body) + "\n" + command(others)


# ---- Top-k, model --------------------------------------------------------------------------------------------------------------------------


def topk(lines):
    body = []
    for line in pick(lines, engine="SFA"):
        other = pick(lines, engine="quickselect", head_dim=line["head_dim"], k=line["k"], dtype=line["dtype"], k_dtype=line["k_dtype"], isa=line["isa"])
        bar = line["head_dim"] == 128 and line["k"] == 8 and line["isa"] != "avx2" and line["dtype"] == line["k_dtype"] == "f32"
        body.append([f"{line['head_dim']:.0f}", f"{line['k']:.0f}", line["dtype"], line["k_dtype"], line["isa"],
                     f"{line['row_ns']:.0f}" + (f" (45){'' if line['row_ns'] <= 45 else ' (*)'}" if bar else ""),
                     f"{one(other, 'row_ns'):.0f}", against(one(other, "times_sfa"), 20 if bar else None), f"{1e-9 * line['read_bytes_per_s']:.1f}"])
    text = "### Top-k, with rounding where codes are int8, 4096 rows, one thread\n\n"
    return text + table(["d", "k", "rows", "codes", "kernels", "ns a row", "quickselect, ns", "times", "GB/s read"], body) + "\n" + command(lines)


def model(lines):
    """A table for each run: the caches of llama.cpp have runs of their own, and a ratio has both sides from one."""
    text = "### A model beside llama.cpp, its flash attention on, as many threads\n\n"
    for run in dict.fromkeys(line["command"] for line in lines):
        mine = pick(lines, command=run)
        text += table(["tokens", "engine", "prefill, tokens/s", "decode, tokens/s", "ms a step", "of it for depth, ms", "attention by our clock, ms"],
                      [[f"{line['depth']:.0f}", line["engine"] + (f" ({line['cache']})" if line["cache"] else ""),
                        f"{line['prefill_tokens_per_s']:.0f}", f"{line['decode_tokens_per_s']:.1f}", f"{line['step_ms']:.1f}",
                        f"{line['depth_ms']:.1f}" if line["depth_ms"] != "" else "",
                        f"{line['attention_ms']:.1f}" if line["attention_ms"] != "" else ""] for line in mine])
        deep = max(line["depth"] for line in mine)
        ours = pick(mine, depth=deep, engine="SFA k 16")
        for cache, bar in (("f16", 2.0), ("q8_0", 1.2)):
            theirs = pick(mine, depth=deep, engine=f"llama.cpp, {cache} cache")
            if ours and theirs:
                text += (f"\nAgainst its {cache} cache at {deep:.0f} tokens: attention, as step({deep:.0f}) - step(64), "
                         f"{against(theirs[0]['depth_ms'] / ours[0]['depth_ms'], bar)} times as fast; "
                         f"whole step {against(theirs[0]['step_ms'] / ours[0]['step_ms'], 1.0 if cache == 'f16' else None)} times.\n")
        text += "\n" + command(mine) + "\n"
    return text


def check(name):
    """What sfa_check printed the last time, as it is."""
    try:
        with open(os.path.join(RESULTS, f"{name}.txt"), encoding="utf-8") as file:
            sections = file.read().split("\n[")
    except OSError:
        return ""
    printed = {}
    for section in sections:
        head, _, body = section.partition("\n")
        title = head.partition("s] ")[2]
        if title.startswith("sfa_check"):
            printed[title] = f"### `{title}`\n\n```\n{body.strip()}\n```\n\n"
    return "".join(printed.values())


def make(name):
    attention, text = rows(name, "attention"), ""
    for part, lines, makers in (("attention", attention, (sdpa, lengths, ready, overlap)), ("decode", rows(name, "decode"), (decode,)),
                                ("topk", rows(name, "topk"), (topk,)), ("model", rows(name, "model"), (model,))):
        for maker in makers if lines else ():
            section = maker(lines)
            text += section + "\n" if section else ""
        if lines and os.path.exists(os.path.join(RESULTS, f"{name}-{part}.png")):
            text += f"![{part}](../bench/results/{name}-{part}.png)\n\n"
    length = f"{name}-attention-length.png"
    if os.path.exists(os.path.join(RESULTS, length)):
        text += f"![time over SFA's by length](../bench/results/{length})\n\n"
    return (text + check(name)).rstrip() + "\n"


def main(usage, make, kind):
    """Prints what make(NAME) gives, or writes it between the lines of FILE that say `kind` and "end of" it."""
    if len(sys.argv) not in (2, 4) or len(sys.argv) == 4 and sys.argv[2] != "--write":
        sys.exit(usage)
    text = make(sys.argv[1])
    if len(sys.argv) == 2:
        print(text, end="")
        return
    with open(sys.argv[3], encoding="utf-8") as file:
        document = file.read()
    begin, end = f"<!-- {kind} -->\n", f"<!-- end of {kind} -->\n"
    if begin not in document or end not in document:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {sys.argv[3]} has no lines {begin.strip()} and {end.strip()}")
    document = document[: document.index(begin) + len(begin)] + "\n" + text + "\n" + document[document.index(end):]
    with open(sys.argv[3], "w", encoding="utf-8") as file:
        file.write(document)


if __name__ == "__main__":
    main(__doc__, make, "tables")
