#!/usr/bin/env python3
"""compare_policies.py SFA MODEL TEXT WINDOW POLICIES SETTINGS [OPTION...]: what the policies of prompts cost a model in losses.

Runs `SFA eval nll --json` over windows of WINDOW tokens that do not overlap, once for each setting and policy, and prints the mean loss and its
difference from that of the first policy, paired by window, with the standard error of the mean difference. POLICIES: bf16,sp-bf16,int8. SETTINGS:
as in `sfa eval --compare`, own for what the file says: own,dense,32/all,16. OPTIONs go to sfa: --device cuda.
"""
import json
import math
import subprocess
import sys


def losses(sfa, model, text, window, policy, setting, options):
    """Of all tokens but the first, in nats."""
    k, _, queries = setting.partition("/")
    how = {"own": [], "dense": ["--attention", "dense"]}.get(setting, ["--sfa-k", k] + (["--sfa-kq", queries] if queries else []))
    command = [sfa, "eval", "nll", "-m", model, "-f", text, "-c", window, "--stride", window, "--json", "--policy", policy] + how + options
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(command)}: exit {run.returncode}")
    return json.loads(run.stdout)["nll"]


def main():
    if len(sys.argv) < 7:
        sys.exit(__doc__)
    sfa, model, text, window, policies, settings = sys.argv[1:7]
    print(f"{'setting':>10} {'policy':>10} {'loss':>9} {'difference':>11} {'+-':>9} {'largest of a window':>20}")
    for setting in settings.split(","):
        first = None
        for policy in policies.split(","):
            nll = losses(sfa, model, text, window, policy, setting, sys.argv[7:])
            w = int(window)
            means = [sum(nll[i : i + w]) / w for i in range(0, len(nll) - w + 1, w)] or [sum(nll) / len(nll)]
            first = first or means
            apart = [a - b for a, b in zip(means, first)]
            n, mean = len(apart), sum(apart) / len(apart)
            error = math.sqrt(sum((x - mean) ** 2 for x in apart) / (n * (n - 1))) if n > 1 else math.nan
            print(f"{setting:>10} {policy:>10} {sum(means) / n:9.4f} {mean:+11.5f} {error:9.5f} {max(apart, key=abs):+20.5f}", flush=True)


if __name__ == "__main__":
    main()
