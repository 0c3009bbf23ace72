"""Collects the finished runs of the long comparison; README.md has the commands of the runs.

    python -m results.long.report

For each row of rows.txt and each seed in runs/long: copies config.json and metrics.csv to
results/long/ROW-SEED and adds a line to scores.csv. Fine-tunings need no run there. Writes the
models of seed 0 to weights/ and the picture knn.png.
"""
import csv
import json
import shutil
from pathlib import Path

import torch

from common import load_checkpoint
from compare import folder_name, read_rows
from matplotlib.figure import Figure  # after plots, which sets the backend

ROOT = Path(__file__).parents[2]
COPIES = {"F2": "encoder", "T2": "T1", "M_E": "encoder", "M_P": "projection", "f_xi": "encoder",
          "g_xi": "g", "momentum_encoder": "encoder", "momentum_projector": "projector"}
PROBES = ("knn", "linear", "attentive")
FINETUNED = {"finetune_all": "all", "finetune_1_percent": "0.01"}  # column → end of the folder
FIELDS = ("row", "seed", "commit", "precision", *PROBES, "rank", *FINETUNED)


def export_model(run, file):
    """Writes the model of a run to `file` in half precision, for load_model.

    Momentum copies are replaced by the networks that they are averages of, which torch.save then
    stores once.
    """
    state = load_checkpoint(run)
    half = {name: value.half() for name, value in state["model"].items()}
    for name in half:
        part, _, parameter = name.partition(".")
        if part in COPIES:
            half[name] = half[f"{COPIES[part]}.{parameter}"]
    config = {**state["config"], "data": "cifar10", "out": "", "resume": ""}  # for any machine
    torch.save({"method": state["method"], "config": config, "model": half}, file)


def probe_scores(run, encoder="trained encoder"):
    """kNN, linear and attentive top-1 in percent, and effective rank, from eval_linear.json. Empty
    if it lacks `encoder`."""
    report = json.loads((run / "eval_linear.json").read_text())
    if encoder not in report["percent"]:
        return {}
    percent = {name: report["percent"][encoder][f"{name}_top1"] for name in PROBES}
    return {**percent, "rank": report["effective_rank"][encoder]}


def finetune_scores(row, seed):
    """Top-1 in percent of the fine-tunings ROW-SEED-all and ROW-SEED-0.01 that exist."""
    files = {name: ROOT / f"runs/long/{folder_name(row)}-{seed}-{labels}/eval_finetune.json"
             for name, labels in FINETUNED.items()}
    return {name: json.loads(file.read_text())["percent"]["top1"]
            for name, file in files.items() if file.exists()}


def read_knn(metrics):
    """Epochs, and kNN top-1 in percent after each, from metrics.csv."""
    with open(metrics, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line.get("knn")]
    return [float(line["epoch"]) for line in lines], [100 * float(line["knn"]) for line in lines]


def draw_knn(out, rows):
    """Draws kNN over epochs of seed 0 of all rows that are collected."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        metrics = out / f"{folder_name(row)}-0" / "metrics.csv"
        if metrics.exists():
            axes.plot(*read_knn(metrics), marker=".", label=row)
    axes.set(xlabel="epoch", ylabel="kNN top-1 in %, 1,000 test images")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(out / "knn.png", dpi=120)


def collect(run, row, scores):
    """Copies the log of a finished run and adds its scores and those of its untrained encoder."""
    facts = json.loads((run / "config.json").read_text())
    seed, out = str(facts["config"]["seed"]), ROOT / "results/long" / run.name
    out.mkdir(exist_ok=True)
    for name in ("config.json", "metrics.csv"):
        shutil.copy(run / name, out)
    own = {"row": row, "seed": seed, "commit": facts["git"][:7], "precision": facts["precision"]}
    scores[row, seed] = {**scores.get((row, seed), {}), **own, **probe_scores(run)}
    line = scores.setdefault(("random weights", seed), {"row": "random weights", "seed": seed,
                                                        "precision": facts["precision"]})
    if not line.get("rank"):  # the probes of the first row that has them
        line.update(probe_scores(run, "untrained encoder"))


def is_finished(run):
    """Whether a run has been trained and evaluated by eval_linear.py."""
    metrics, facts = run / "metrics.csv", json.loads((run / "config.json").read_text())
    return ((run / "eval_linear.json").exists()
            and facts["config"]["epochs"] in read_knn(metrics)[0])


def main():
    """Reads runs/long; writes results/long and weights. Runs that are not finished are left out."""
    out = ROOT / "results/long"
    rows, scores = read_rows((out / "rows.txt").read_text()), {}
    if (out / "scores.csv").exists():
        with open(out / "scores.csv", newline="") as file:
            scores = {(line["row"], line["seed"]): line for line in csv.DictReader(file)}
    for row in rows:
        for run in sorted((ROOT / "runs/long").glob(f"{folder_name(row)}-[0-9]")):
            if not is_finished(run):
                continue
            collect(run, row, scores)
            if run.name.endswith("-0"):
                export_model(run, ROOT / "weights" / f"{folder_name(row)}.pt")
    for key in scores:
        scores[key].update(finetune_scores(*key))
    with open(out / "scores.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(scores[key] for key in sorted(scores))
    draw_knn(out, rows)


if __name__ == "__main__":
    main()
