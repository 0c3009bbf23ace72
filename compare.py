"""Trains several methods with one budget and several seeds, and compares them.

    python compare.py --tiny --data shapes --gflop 20000 --seeds 0    a first look
    python compare.py --tiny --data PATH --gflop 2000000              your images with classes
    python compare.py --tiny --data PATH --rows FILE --epochs 4       your own rows

A line of FILE reads NAME = METHOD.py FLAGS, for example MAE = mvmae.py --targets one --lam 0.
Without --rows each method file of this folder is a row. Other flags go to every row; a row's own
take precedence. --gflop is the compute of a run, in 10⁹ operations of forward and backward; with
--epochs, epochs are equal instead.

Each run is a folder in --out, evaluated by eval_linear.py. After Ctrl-C the same command
continues; rows and seeds may be added. table.txt, .csv and .png have mean, standard deviation and
p against --baseline: Student's t, two-sided, with the variance pooled over all rows.
"""
import argparse
import csv
import dataclasses
import json
import math
import re
import signal
import statistics
import sys
from collections import namedtuple
from pathlib import Path

import torch

import eval_linear
from common import RESUMABLE, Batches, load_data, read_config, require
from images import UserError
from speed import config_of, gflop_per_image, load_method
from matplotlib.figure import Figure  # after plots

SCORES = {"knn_top1": "kNN %", "linear_top1": "linear %", "attentive_top1": "attentive %",
          "rank": "effective rank"}
Job = namedtuple("Job", "row module cfg folder steps")  # a run


def read_rows(text):
    """Lines "NAME = METHOD.py FLAGS" → {NAME: (METHOD.py, flags)}. Raises UserError."""
    rows = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, command = line.partition(" = ")
        require(command.split(), f"--rows: {line!r} must read NAME = METHOD.py FLAGS")
        require(folder_name(name) not in ["", *map(folder_name, rows)],
                f"--rows: {line!r} needs another name")
        rows[name.strip()] = command.split()[0], command.split()[1:]
    require(rows, "--rows: the file has no rows")
    return rows


def folder_name(row):
    return re.sub(r"\W+", "-", row.lower()).strip("-")


def plan(rows, flags, args):
    """The jobs: all rows with the first seed, then with the next. Raises UserError."""
    compute, jobs, costs = args.gflop is not None, [], {}
    for row, (method, own) in rows.items():
        fixed = ["--seed", "--out", "--resume"] + (["--epochs"] if compute else [])
        require(not {word.split("=")[0] for word in [*flags, *own]} & {*fixed},
                f"row {row}: compare.py sets {', '.join(fixed)}")
        module = load_method(method)
        try:
            cfg = config_of(module, [*flags, *own])
            train, test = load_data(cfg)
            require(test is not None and len(train.classes) > 1, f"--data {cfg.data}: expected "
                    "classes in train/CLASS/IMAGE and test/CLASS/IMAGE")
            per_epoch = len(Batches(train, cfg.batch, cfg.seed, torch.device("cpu")))
        except UserError as error:
            raise UserError(f"row {row}: {error}") from error
        cost = gflop_per_image(module, cfg) * cfg.batch  # of a step
        costs[row] = cost * per_epoch
        steps = int(args.gflop / cost) if compute else max(1, round(cfg.epochs * per_epoch))
        require(steps > 0, f"--gflop {args.gflop} is less than a step of {row}, {cost:.4g}")
        print(f"{row}: {steps:,} steps of {cost:.4g} GFLOP, {steps / per_epoch:.3g} epochs")
        for seed in set(args.seeds):
            folder = Path(args.out, f"{folder_name(row)}-{seed}")
            budget = {"epochs": steps / per_epoch} if compute else {}
            cfg = config_of(module, [*flags, *own], seed=seed, out=str(folder), **budget)
            if (folder / "config.json").exists():
                saved = read_config(folder, module.__name__)["config"]
                for name, value in dataclasses.asdict(cfg).items():
                    require(name in (*RESUMABLE, "out") or value == saved.get(name),
                            f"{folder} is a run with another {name}: choose another --out")
                cfg = dataclasses.replace(cfg, resume=str(folder))
            jobs.append(Job(row, module, cfg, folder, steps))
    if not compute and not any(word.split("=")[0] == "--epochs" for word in flags):
        row = max(costs, key=costs.get)
        budget = float(f"{10 * costs[row]:.2g}")
        raise UserError(f"add --gflop {budget:.0f}, which pays for 10 epochs of {row}")
    return sorted(jobs, key=lambda job: args.seeds.index(job.cfg.seed))


def read_scores(job):
    """Scores of a run, or None if it is not trained and evaluated."""
    try:
        with open(job.folder / "metrics.csv", newline="") as file:
            trained = str(job.steps) in [row["step"] for row in csv.DictReader(file)]
        file = job.folder / "eval_linear.json"
        newest = file.stat().st_mtime >= (job.folder / "last.pt").stat().st_mtime
        report = json.loads(file.read_text())
        found = report["percent"]["trained encoder"]
        found["rank"] = report["effective_rank"]["trained encoder"]
        ours = {"run": str(job.folder), "images": job.cfg.images, "attentive": True}
        done = trained and newest and ours.items() <= report.items()
        return {name: found.get(name, math.nan) for name in SCORES} if done else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def run_job(job):
    """Trains a run, or continues it, and evaluates it. Returns its scores."""
    cfg = job.cfg
    try:
        job.module.train(cfg)
    finally:  # after an error Run's handlers are still set
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    eval_linear.evaluate(eval_linear.build_parser().parse_args([
        str(job.folder), "--images", str(cfg.images), "--root", cfg.root, "--device", cfg.device,
        "--amp" if cfg.amp else "--no-amp"]))
    return read_scores(job)


# The table. values: row → scores of its runs

def student_p(t, df):
    """P(|T| > |t|) with df degrees of freedom. Abramowitz and Stegun, 26.7.3 and 26.7.4"""
    angle = math.atan2(abs(t), math.sqrt(df))
    term = math.sin(angle) * (math.cos(angle) if df % 2 else 1.0)
    total = term if df > 1 else 0.0
    for k in range(df % 2 + 1, df - 2, 2):
        term *= math.cos(angle) ** 2 * k / (k + 1)
        total += term
    return max(0.0, 1 - (2 / math.pi * (angle + total) if df % 2 else total))


def pooled_deviation(values):
    """(standard deviation pooled over the rows, its degrees of freedom)."""
    df = sum(len(scores) - 1 for scores in values.values())
    squares = sum((x - statistics.mean(scores)) ** 2 for scores in values.values() for x in scores)
    return math.sqrt(squares / df) if df else math.nan, df


def p_value(values, row, baseline):
    """p of a row against the baseline; NaN for the baseline and without variance."""
    deviation, df = pooled_deviation(values)
    if row == baseline or baseline not in values or not deviation > 0:
        return math.nan
    gap = statistics.mean(values[row]) - statistics.mean(values[baseline])
    error = deviation * math.sqrt(1 / len(values[row]) + 1 / len(values[baseline]))
    return student_p(gap / error, df)


def spread(scores):
    """Mean and standard deviation; NaN for one score."""
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else math.nan


def write_table(out, jobs, results, baseline):
    """Writes table.txt, .csv, .png of `results`, folder → scores. Returns the text."""
    done = [job for job in jobs if job.folder in results]
    rows = list(dict.fromkeys(job.row for job in done))
    scores = {title: {row: [results[job.folder][score] for job in done if job.row == row]
                      for row in rows} for score, title in SCORES.items()}
    width = max(map(len, [*rows, "pooled deviation"])) + 2
    lines, records = [" " * width + "seeds  " + "".join(f"{title:25}" for title in scores)], []
    for row in rows:
        seeds = len(scores["effective rank"][row])
        records.append({"row": row, "seeds": seeds})
        line = f"{row:{width}}{seeds:5}  "
        for title, values in scores.items():
            (mean, deviation), p = spread(values[row]), p_value(values, row, baseline)
            records[-1] |= {title: mean, f"{title} deviation": deviation, f"{title} p": p}
            cell = f"{mean:.2f}" + (f" ± {deviation:.2f}" if seeds > 1 else "")
            cell += "" if math.isnan(p) else f" p {p:.2g}{'*' if p < 0.01 else ''}"
            line += f"{cell:25}"
        lines.append(line.rstrip())
    pooled = [pooled_deviation(values) for values in scores.values()]
    if pooled[0][1]:  # a row has two seeds
        lines += [f"{'pooled deviation':{width + 7}}" + "".join(f"{s:<25.2f}" for s, _ in pooled),
                  "", "Mean ± standard deviation over seeds. p: two-sided Student's t against "
                  f"{baseline}, variance", f"pooled over all rows, {pooled[0][1]} degrees of "
                  "freedom; * p < 0.01, uncorrected."]
    text = "\n".join(lines) + "\n"
    Path(out, "table.txt").write_text(text, encoding="utf-8")
    with open(Path(out, "table.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    draw_table(Path(out, "table.png"), scores, baseline)
    return text


def draw_table(file, scores, baseline):
    """Draws runs, means and standard deviations; the dotted line is the baseline's mean."""
    rows = list(scores["effective rank"])
    figure = Figure(figsize=(12, 0.4 * len(rows) + 1.1), layout="constrained")
    for axis, (title, values) in zip(figure.subplots(1, len(scores), sharey=True), scores.items()):
        for y, row in enumerate(rows):
            mean, deviation = spread(values[row])
            axis.plot(values[row], [y - 0.15] * len(values[row]), "o", color=f"C{y % 10}")
            axis.errorbar(mean, y + 0.15, xerr=deviation, fmt="D", color=f"C{y % 10}", capsize=3)
            if row == baseline:
                axis.axvline(mean, color="grey", linestyle=":", zorder=0)
        axis.set(title=title, ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), rows, parse_math=False)
    figure.savefig(file, dpi=100)


# The program

def compare(args, flags):
    """Runs the comparison; `flags` go to every row. Returns how many runs failed."""
    if args.rows:
        rows = read_rows(Path(args.rows).read_text("utf-8"))
    else:
        rows = {file.stem: (file.name, []) for file in sorted(Path(__file__).parent.glob("*.py"))
                if "\nModel = " in file.read_text("utf-8")}
    baseline = args.baseline or next(iter(rows))
    require(baseline in rows, f"--baseline {baseline}: the rows are {', '.join(rows)}")
    jobs = plan(rows, flags, args)
    results = {job.folder: scores for job in jobs if (scores := read_scores(job))}
    for i, job in enumerate(jobs, 1):
        if job.folder in results:
            continue
        print(f"\nrun {i} of {len(jobs)}: {job.row}, seed {job.cfg.seed}", flush=True)
        try:
            results[job.folder] = run_job(job)
            write_table(args.out, jobs, results, baseline)
        except FloatingPointError as error:
            print(f"compare.py: {job.folder}: {error}", file=sys.stderr)
    if results:
        print("\n" + write_table(args.out, jobs, results, baseline))
        print(f"written: table.txt, .csv and .png in {args.out}")
    return len(jobs) - len(results)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser("compare.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="a file of rows (default: all method files)")
    parser.add_argument("--gflop", type=int, help="budget of a run, 10⁹ operations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--baseline", help="a row (default: the first)")
    parser.add_argument("--out", default="runs/compare", help="default: runs/compare")
    args, flags = parser.parse_known_args(argv)
    try:
        failed = compare(args, flags)
    except (UserError, OSError) as error:
        parser.error(str(error))
    except (KeyboardInterrupt, SystemExit) as stop:
        code = getattr(stop, "code", 130)
        if code > 128:
            print("compare.py: stopped; the same command continues", file=sys.stderr)
        raise SystemExit(code) from None
    if failed:
        parser.exit(1, f"compare.py: {failed} runs failed and are not in the table\n")


if __name__ == "__main__":
    main()
