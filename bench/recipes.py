#!/usr/bin/env python3
"""bench/recipes.py OUT [--png FILE]: the table of the runs that bench/recipes made, as Markdown, and their curves.

A row is a recipe: the last held-out loss of each seed, mean and standard deviation (n - 1), the difference to `dense` of the same seed,
and the bytes that a key takes in the cache. Runs of a seed begin with the same weights and see the same tokens, so recipes are compared seed by
seed. A difference is called separated where its mean is above two standard deviations of the differences of the seeds, and t, that is
mean / (sd / sqrt(n)), above the value that chance passes once in 20 times with so few seeds.
"""
import argparse
import json
import math
import pathlib
import re
import statistics
import subprocess

ORDER = ["dense", "short", "scratch", "dense_first", "k_only"]
PAIRS = [("dense_first", "scratch"), ("k_only", "dense_first"), ("dense_first", "short"), ("k_only", "short"), ("dense_first", "dense")]


def read(folder):
    """Held-out losses [(tokens, loss)], the last training line and the recipe of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    held = [(x["tokens"], x["validation_loss"]) for x in lines if "validation_loss" in x]
    return {"held": held, "lines": lines, "recipe": json.loads((folder / "recipe.json").read_text())}


def key_bytes(recipe):
    """Bytes of a key and head: dense in bf16, codes as ids and int8 with a scale."""
    sparse = recipe["sparse_attention_config"]
    return 2 * sparse["k"] + 2 if sparse else 2 * recipe["model"]["head_dim"]


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else math.nan


# Two-sided, 95 %, of n - 1 degrees of freedom: n = 2, 3, ...
T_LIMITS = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def compare(runs, a, b):
    """A line on loss(a) - loss(b) over the seeds that both have."""
    seeds = sorted(set(runs[a]) & set(runs[b]))
    differences = [runs[a][s]["held"][-1][1] - runs[b][s]["held"][-1][1] for s in seeds]
    mean, n = statistics.mean(differences), len(seeds)
    sd = spread(differences)
    t, limit = (mean / (sd / math.sqrt(n)), T_LIMITS[n - 2]) if 1 < n < 11 else (math.nan, math.nan)
    verdict = "one seed" if n < 2 else "separated" if abs(mean) > 2 * sd and abs(t) > limit else "not separated"
    return f"| {a} - {b} | {mean:+.4f} | {', '.join(f'{d:+.4f}' for d in differences)} | {sd:.4f} | {t:+.1f} (limit {limit:.2f}) | {verdict} |"


def plot(runs, png):
    top = min(run["held"][-1][1] for seeds in runs.values() for run in seeds.values()) + 0.75  # the first steps would hide the rest
    script = ["set terminal pngcairo size 1200,700", f"set output '{png}'", "set grid", "set key outside right", "set xlabel 'million tokens'",
              "set ylabel 'held-out loss, nats a token'", "set autoscale xfix", f"set yrange [*:{top}]"]
    curves = []
    for index, (name, seeds) in enumerate(runs.items()):
        for number, (seed, run) in enumerate(sorted(seeds.items())):
            block = f"$r{index}_{seed}"
            script += [f"{block} << EOD"] + [f"{t * 1e-6} {loss}" for t, loss in run["held"]] + ["EOD"]
            title = f"title '{name}'" if number == 0 else "notitle"
            curves.append(f"{block} with lines linewidth 2 linecolor {index + 1} dashtype {number + 1} {title.replace('_', '-')}")
    subprocess.run(["gnuplot"], input="\n".join(script + ["plot " + ", ".join(curves), ""]), text=True, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--png")
    options = parser.parse_args()
    runs = {}
    for name in ORDER:
        for folder in sorted(options.out.glob(f"{name}-*")):
            seed = re.fullmatch(rf"{name}-(\d+)", folder.name)
            if seed and folder.is_dir():
                runs.setdefault(name, {})[int(seed[1])] = read(folder)
    print("| recipe | bytes of a key | tokens, million | held-out loss by seed | mean | sd | against dense, same seed |\n|---|---|---|---|---|---|---|")
    for name, seeds in runs.items():
        losses = [run["held"][-1][1] for run in seeds.values()]
        gaps = [run["held"][-1][1] - runs["dense"][s]["held"][-1][1] for s, run in seeds.items() if s in runs.get("dense", {}) and name != "dense"]
        tokens = min(run["held"][-1][0] for run in seeds.values()) * 1e-6
        recipe = next(iter(seeds.values()))["recipe"]
        print(f"| {name} | {key_bytes(recipe)} | {tokens:.2f} | {', '.join(f'{x:.4f}' for x in losses)} | {statistics.mean(losses):.4f} | "
              f"{spread(losses):.4f} | {', '.join(f'{x:+.4f}' for x in gaps)} |")
    print("\n| difference | mean | by seed | sd | t | |\n|---|---|---|---|---|---|")
    for a, b in PAIRS:
        if a in runs and b in runs:
            print(compare(runs, a, b))
    if options.png:
        plot(runs, options.png)


if __name__ == "__main__":
    main()
