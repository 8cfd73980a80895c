#!/usr/bin/env python3
"""Compares `sfa eval` with lm-evaluation-harness, item by item, on one model and the same rows.

usage: compare_lm_eval.py --sfa BUILD/bin/sfa --model DIR --data DIR [--tasks hellaswag,...] [--limit 200] [--work DIR] [--context N]
                          [--batch N]
       compare_lm_eval.py --make-model DIR --tokenizer FILE [--context 2048] [--hidden 64] [--bos TOKEN]   a tiny random Llama around a tokenizer
       compare_lm_eval.py --golden DIR      writes tests/golden/eval again: the harness' numbers on its rows and model (made by
                                            --make-model with bytes-llama3, --bos "<|endoftext|>", --context 384, --hidden 32)

--data holds hellaswag*.jsonl, piqa*.jsonl, ... (docs/EVALUATION.md has the forms); the first file that begins like the task is taken, and
gsm8k*train*.jsonl for worked examples. The harness runs its own task definitions: this script only puts rows into the form that those read
from the hub, and points them at the local file. (HellaSwag rows that were cleaned already get a definition without the cleaning.) Both run
in float32. Exit status 1 if an answer differs, or a log-likelihood by more than --tolerance.

Needs lm-eval 0.4, transformers, torch, tokenizers."""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

TASKS = ["hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "lambada", "gsm8k", "pubmedqa"]
OWN_FILE = {"hellaswag": "hellaswag/hellaswag.yaml", "piqa": "piqa/piqa.yaml", "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_easy.yaml",
            "winogrande": "winogrande/default.yaml", "openbookqa": "openbookqa/openbookqa.yaml", "lambada": "lambada/lambada_openai.yaml",
            "gsm8k": "gsm8k/gsm8k.yaml", "pubmedqa": "pubmedqa/pubmedqa.yaml"}


def make_model(folder, tokenizer_path, context, hidden, bos):
    """A random Llama of 2 layers; weights large enough that its choices differ."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = pathlib.Path(tokenizer_path)
    if path.is_dir():  # GPT-2's two files
        from transformers import GPT2TokenizerFast
        names = [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")]
        vocab, merges = next((path / a, path / b) for a, b in names if (path / a).exists())
        tokenizer = GPT2TokenizerFast(vocab=str(vocab), merges=str(merges))
    else:
        tokens = Tokenizer.from_file(str(path))
        if bos:  # every text begins with this token
            tokens.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokens.token_to_id(bos))])
        known = {name: token for token, name in (("<s>", "bos_token"), ("</s>", "eos_token"), ("<|endoftext|>", "eos_token"))
                 if tokens.token_to_id(token) is not None}
        known.update({"bos_token": bos} if bos else {})
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, clean_up_tokenization_spaces=False, **known)
    torch.manual_seed(1)
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=max(len(tokenizer), 8), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=context, bos_token_id=first, eos_token_id=last,
                         pad_token_id=last, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- The rows as the harness' definitions read them ---------------------------------------------------------------------------------

def question(row):
    """ARC's and OpenBookQA's rows as the hub has them."""
    asked, choices = row.get("question", row.get("question_stem")), row.get("choices")
    if isinstance(asked, dict):
        asked, choices = asked["stem"], asked["choices"]
    if isinstance(choices, list):
        labels = [c["label"] if isinstance(c, dict) else chr(ord("A") + i) for i, c in enumerate(choices)]
        choices = {"text": [c["text"] if isinstance(c, dict) else c for c in choices], "label": labels}
    key = row["answerKey"] if "answerKey" in row else choices["label"][int(row["label"])]
    return {"question": asked, "question_stem": asked, "choices": choices, "answerKey": key}


def hub_row(task, row):
    if task in ("arc_easy", "arc_challenge", "openbookqa"):
        return question(row)
    if task == "winogrande" and "sentence" not in row:
        return {"sentence": row["question"], "option1": row["choices"][0], "option2": row["choices"][1], "answer": str(row["label"] + 1)}
    if task == "pubmedqa" and "QUESTION" not in row:
        return {"QUESTION": row["question"], "CONTEXTS": row["contexts"], "final_decision": row["final_decision"]}
    if task == "piqa":
        return {**row, "label": int(row["label"])}
    return row


def find_data(data, task, part=""):
    found = sorted(p for p in pathlib.Path(data).glob(f"{task}*.jsonl") if part in p.name and (part or "train" not in p.name))
    return found[0] if found else None


def write_task(work, task, path, shots_path, limit):
    import lm_eval
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()][:limit]
    files = {"test": work / f"{task}.rows.jsonl"}
    parts = [(files["test"], rows)]
    if shots_path:
        files["train"] = work / f"{task}.train.jsonl"
        parts.append((files["train"], [json.loads(line) for line in shots_path.read_text(encoding="utf-8").split("\n") if line.strip()]))
    for name, some in parts:
        name.write_text("".join(json.dumps(hub_row(task, r)) + "\n" for r in some), encoding="utf-8")
    own = pathlib.Path(lm_eval.__file__).parent / "tasks" / OWN_FILE[task]
    lines = [f"task: local_{task}", "dataset_path: json", "dataset_name: null", "test_split: test", "validation_split: null",
             "training_split: " + ("train" if shots_path else "null"), "fewshot_split: " + ("train" if shots_path else "null"),
             "dataset_kwargs:", "  data_files:"] + [f"    {part}: {file}" for part, file in files.items()]
    if task == "hellaswag" and "ctx_a" not in rows[0]:
        lines += ["output_type: multiple_choice", 'doc_to_text: "{{ctx}}"', 'doc_to_target: "{{label}}"', 'doc_to_choice: "endings"',
                  "metric_list:", "  - metric: acc", "  - metric: acc_norm"]
    else:
        lines.insert(0, f"include: {own}")
    if not shots_path:
        lines.append("num_fewshot: 0")
    (work / f"local_{task}.yaml").write_text("\n".join(lines) + "\n")


# ---- The two runs ----------------------------------------------------------------------------------------------------------------------

def run_harness(work, tasks, model, context, batch=1):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=batch, max_length=context)
    manager = TaskManager(include_path=str(work), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[f"local_{t}" for t in tasks], task_manager=manager, bootstrap_iters=0)


def run_sfa(sfa, task, model, path, shots_path, limit, context):
    command = [sfa, "eval", task, "-m", str(model), "-f", str(path), "--limit", str(limit), "--json", "--weights", "f32", "--attention",
               "dense", "--precision", "f32", "--cache-k", "f32", "--cache-v", "f32"]
    command += ["--shots-file", str(shots_path)] if shots_path else ["--shots", "0"]
    command += ["-c", str(context)] if context else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


METRICS = {"gsm8k": {"exact_match,strict-match": "exact_match_strict", "exact_match,flexible-extract": "exact_match_flexible"},
           "lambada": {"perplexity,none": "perplexity", "acc,none": "acc"},
           "winogrande": {"acc,none": "acc"}, "pubmedqa": {"acc,none": "acc"}}


def compare(task, harness, ours, tolerance):
    """Prints a line a task; returns the number of items that differ."""
    samples, settings = harness["samples"][f"local_{task}"], ours["settings"][0]
    items, different, largest = settings["items"], set(), 0.0
    for sample in samples:
        item = items[sample["doc_id"]]
        if task == "gsm8k":
            name = "exact_match_strict" if sample["filter"] == "strict-match" else "exact_match_flexible"
            same = sample["resps"][0][0] == item["answer"] and sample["exact_match"] == item[name]
        else:
            theirs = [(float(r[0][0]), str(r[0][1]) == "True") for r in sample["resps"]]
            errors = [abs(a - b) / max(1.0, abs(a)) for (a, _), b in zip(theirs, item["loglik"])]
            largest = max(largest, *errors)
            same = len(theirs) == len(item["loglik"]) and max(errors) <= tolerance
            same = same and [g for _, g in theirs] == [bool(g) for g in item["greedy"]]
            same = same and all(sample[m] == item[m] for m in ("acc", "acc_norm") if m in sample)
        if not same:
            different.add(sample["doc_id"])
    totals, equal = harness["results"][f"local_{task}"], True
    shown = []
    for theirs, mine in METRICS.get(task, {"acc,none": "acc", "acc_norm,none": "acc_norm"}).items():
        a, b = totals[theirs], settings["scores"][mine]["value"]
        equal &= abs(a - b) <= tolerance * max(1, abs(a))
        shown.append(f"{mine} {a:.4f} / {b:.4f}")
        error = totals.get(theirs.replace(",", "_stderr,"))
        if isinstance(error, float) and mine != "perplexity":
            equal &= abs(error - settings["scores"][mine]["stderr"]) <= tolerance
    print(f"{task:14} {len(items):5} items, {len(different)} differ {sorted(different)[:10] if different else ''}; largest relative error of a log-likelihood {largest:.1e}; "
          f"harness / sfa: {', '.join(shown)}{'' if equal else '  SUMS DIFFER'}", flush=True)
    return len(different) + (not equal)


# ---- Golden files ----------------------------------------------------------------------------------------------------------------------

ANSWERS = [  # an answer and what was wanted: the number that is read out of it
    ("He has 12 pens.\n#### 12", "He has 12.\n#### 12"), ("#### 1,080.", "#### 1080"), ("so $5 in all", "#### 5"), ("-3 or -4", "#### -4"),
    ("#### -7 and #### 8", "#### -7"), ("no number", "#### 0"), ("it is 3.50.", "#### 3.50"), ("1 2 3...", "#### 3"), ("#### $18", "#### 18"),
    ("18 dollars", "#### 18"), ("####18", "#### 18"), ("", "#### 1"), ("$,.", "#### 1"), ("--5", "#### -5"), ("#### .", "####  "),
    ("a-1b", "#### -1"), ("1,000,000.", "#### 1,000,000"), ("#### #### 4", "#### 4")]
SUMMARIES = [
    ("Few features are enough.", ["Few features are enough, and faster.", "Sums of few features keep quality."]),
    ("the the the cat", ["the cat sat on the mat"]), ("", ["nothing"]), ("A-b c_d É 12!", ["a b c d e 12"]), ("one", ["one"]),
    ("of sums keep quality features few", ["Sums of few features keep quality."]), ("x", [""])]


def write_judges(path):
    """How the harness reads numbers, and how rouge_score counts words (no stemming)."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    from rouge_score.rouge_scorer import RougeScorer
    filters = RegexFilter(r"#### (\-?[0-9\.\,]+)"), RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    cases = []
    for answer, wanted in ANSWERS:
        read = [f.apply([[answer]], [{}])[0][0] for f in filters]
        cases.append({"answer": answer, "wanted": [wanted], "scores": [float(exact_match_hf_evaluate(
            [r], [wanted], regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"], ignore_case=True)["exact_match"]) for r in read]})
    for answer, wanted in SUMMARIES:
        scores = [scorer.score(w, answer) for w in wanted]
        cases.append({"answer": answer, "wanted": wanted, "scores": [max(s[m].fmeasure for s in scores) for m in ("rouge1", "rouge2", "rougeL")]})
    path.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")


def write_golden(root):
    work = pathlib.Path(tempfile.mkdtemp())
    for task in TASKS:
        write_task(work, task, find_data(root, task), find_data(root, task, "train") if task == "gsm8k" else None, None)
    harness = run_harness(work, TASKS, root / "model", None)
    lines = [f'"{task}": ' + json.dumps(golden(task, harness)) for task in TASKS]
    lines.append('"ppl": ' + json.dumps(perplexities(root)))
    (root / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    write_judges(root / "judges.json")


def perplexities(root):
    """The loop of Hugging Face's guide, over the text of the fixture's questions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(root / "model"), AutoTokenizer.from_pretrained(root / "model")
    ids = tokenizer((root / "gsm8k_train.jsonl").read_text(), return_tensors="pt").input_ids
    found = []
    for window, stride in ((64, 24), (64, 64), (50, 1), (384, 200)):
        total, count, scored = 0.0, 0, 0
        for begin in range(0, ids.shape[1], stride):
            end = min(begin + window, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, :-(end - scored)] = -100
            with torch.no_grad():
                loss = model(ids[:, begin:end], labels=labels).loss
            n = int((labels[:, 1:] != -100).sum())
            if n:
                total, count = total + float(loss) * n, count + n
            scored = end
            if end == ids.shape[1]:
                break
        found.append({"window": window, "stride": stride, "nll": total / count, "n": count})
    return found


def golden(task, harness):
    """Numbers per item, and the sums."""
    samples = harness["samples"][f"local_{task}"]
    if task == "gsm8k":
        items = {s["doc_id"]: {"answer": s["resps"][0][0]} for s in samples}
        for s in samples:
            items[s["doc_id"]]["exact_match_strict" if s["filter"] == "strict-match" else "exact_match_flexible"] = s["exact_match"]
        items = [items[i] for i in sorted(items)]
    else:
        items = [{"loglik": [float(r[0][0]) for r in s["resps"]], "greedy": [int(str(r[0][1]) == "True") for r in s["resps"]]}
                 for s in sorted(samples, key=lambda s: s["doc_id"])]
    found = harness["results"][f"local_{task}"]
    scores = {}
    for theirs, mine in METRICS.get(task, {"acc,none": "acc", "acc_norm,none": "acc_norm"}).items():
        error = found.get(theirs.replace(",", "_stderr,"))
        scores[mine] = {"value": found[theirs], "stderr": error if isinstance(error, float) else None}
    return {"items": items, "scores": scores}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sfa")
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--context", type=int)
    parser.add_argument("--batch", type=int, default=1, help="of the harness; another one rounds differently")
    parser.add_argument("--tolerance", type=float, default=2e-5)
    parser.add_argument("--golden", type=pathlib.Path)
    parser.add_argument("--make-model", type=pathlib.Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--bos")
    parser.add_argument("--hidden", type=int, default=64)
    o = parser.parse_args()
    if o.golden:
        return write_golden(o.golden)
    if o.make_model:
        return make_model(o.make_model, o.tokenizer, o.context or 2048, o.hidden, o.bos)
    work = o.work or pathlib.Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    for old in work.glob("local_*.yaml"):
        old.unlink()
    tasks, files = [], {}
    for task in o.tasks.split(","):
        path, shots = find_data(o.data, task), find_data(o.data, task, "train") if task == "gsm8k" else None
        if not path:
            print(f"{task:14} no {task}*.jsonl in {o.data}")
            continue
        tasks.append(task)
        files[task] = path, shots
        write_task(work, task, path, shots, o.limit)
    harness = run_harness(work, tasks, o.model, o.context, o.batch)
    bad = 0
    for task in tasks:
        bad += compare(task, harness, run_sfa(o.sfa, task, o.model, *files[task], o.limit, o.context), o.tolerance)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
