"""Which method suits my images? Several methods, one budget, several seeds, one table.

    python compare.py --tiny --data shapes --gflop 20000 --seeds 0 1          a first look
    python compare.py --tiny --data PATH --gflop 2000000                      your images, in train/CLASS and test/CLASS
    python compare.py --tiny --rows FILE --equal epochs --epochs 4            your own rows, equally many epochs

Each row is a command line. The rows are the eight of ROWS, or the lines of FILE, with a name or without: "no contrast =
mclim.py --contrast none". Flags that --help does not list go to every row; where a row has the same flag, its own wins.

The budget is compute, so that the table is the same on a fast and on a slow machine: --gflop is what one run may spend
on forward and backward passes, as eval_speed.gflop_per_image counts them. Each row takes as many steps as that pays
for. With --equal epochs every row trains for --epochs instead.

Each run is an ordinary run folder in --out, trained, then evaluated by eval_linear.py on the same --images. If it was
stopped or killed, the same command continues; seeds and rows may be added. Do not start it twice for one --out.
table.txt, .csv and .png have means, deviations over seeds, and p against the --baseline row by Student's t, two-sided,
the variance pooled over all rows. A star marks p < 0.01; among many rows and scores chance reaches it too.
"""
import csv, dataclasses, gc, importlib, json, math, os, pathlib, re, shlex, shutil, signal, statistics, sys, time

from matplotlib.figure import Figure

import eval_linear
from common import (RESUMABLE, Parser, UserError, answer, check, command_line, init_encoders, load_data, read_facts,
                    start_processes)
from eval_speed import gflop_per_image

ROWS = """
MAE = mvmae.py --targets one --lam 0 --mask 0.75 --norm-pixels
MCLim = mclim.py
Multi-View MAE = mvmae.py
CMAE = cmae.py
MACRL = macrl.py
CAMAE = camae.py
SimMIM's form = mclim.py --contrast none --head linear --no-norm-pixels --no-freeze-patch
contrast alone = camae.py --no-mim --freeze-patch
"""
SCORES = {"knn_top1": "kNN %", "linear_top1": "linear %", "attentive_top1": "attentive %", "rank": "effective rank"}
SAME = "data images store img patch dim depth heads batch"  # these have one value in all rows, unless a row names them
Job = dataclasses.make_dataclass("Job", "row method cfg folder steps gflop".split())  # a run, and what it takes in all


def read_rows(text):
    """Lines "NAME = METHOD.py FLAGS" or "METHOD.py FLAGS" → {name, or the line: (the same as part of a folder's name,
    method, flags)}. Empty lines and those that begin with # are passed over. Raises UserError."""
    rows = {}
    for line in map(str.strip, text.splitlines()):
        if line and not line.startswith("#"):
            parts = re.fullmatch(r"(?:(.+?)\s*=\s*)?(mclim|mvmae|cmae|macrl|camae)\.py(\s.*)?", line)
            paired = parts and re.fullmatch(r"""([^"']|"[^"]*"|'[^']*')*""", parts[3] or "")  # quotes come in pairs
            check(paired, "--rows", line, "must read NAME = METHOD.py FLAGS")
            short = re.sub(r"\W+", "-", (parts[1] or line).lower()).strip("-")
            check(short not in ["", *(row[0] for row in rows.values())], "--rows", line,
                  "needs a name that differs from all others in letters or digits")
            rows[parts[1] or line] = short, parts[2], shlex.split(parts[3] or "")
    check(rows, "--rows", "nothing", "is in it; a line must read NAME = METHOD.py FLAGS")
    return rows


def plan(rows, flags, args):
    """The jobs, all rows with one seed, then with the next. Raises UserError for what can be known before training."""
    compute, configs, sizes, jobs = args.equal == "compute", {}, {}, []
    for name, (_, method, own) in rows.items():
        for word in [*flags, *own]:
            check(word.split("=")[0] not in ["--seed", "--out", "--resume", "--steps", *["--epochs"] * compute], word,
                  f"of {name}", "compare.py sets it, by --seeds, --out, --gflop; --epochs go with --equal epochs")
        module = importlib.import_module(method)
        try:
            configs[name] = command_line(method, module.Config, module.TINY, [*flags, *own])
        except UserError as error:
            raise UserError(f"row {name}: {error}") from error
    for field in SAME.split() + ["epochs"] * (not compute):
        found = {name: getattr(configs[name], field) for name, (*_, own) in rows.items()
                 if f"--{field}" not in [word.split("=")[0] for word in own]}
        told = ", ".join(f"{value} in {name}" for name, value in found.items())
        check(len(set(found.values())) < 2, f"--{field}", told, "must be one value for all rows: add it, or --tiny")
    for name, (short, method, own) in rows.items():
        cfg = configs[name]
        start_processes(cfg.device)
        init_encoders(eval_linear.model_class(importlib.import_module(method))(cfg), cfg.init)
        what = cfg.data, cfg.images, cfg.store or cfg.img
        if what not in sizes:
            train, test = load_data(cfg)
            check(test is not None and (test[1] >= 0).any() and len(train[1][train[1] >= 0].unique()) > 1, "--data",
                  cfg.data, "must have labels and a test split, in folders train/CLASS and test/CLASS")
            sizes[what] = len(train[0])
        check(cfg.batch <= sizes[what], "--batch", cfg.batch, f"there are only {sizes[what]} training images")
        cost = gflop_per_image(cfg) * cfg.batch  # of a step
        steps = int(args.gflop / cost) if compute else cfg.epochs * (sizes[what] // cfg.batch)
        check(steps >= 1, "--gflop", args.gflop, f"pays for no step of {name}, which takes {cost:.2f}")
        print(f"{name}: {steps:,} steps of {cost:.4g} GFLOP; {method}.py {' '.join([*flags, *own])}", flush=True)
        for seed in args.seeds:
            folder = pathlib.Path(args.out, f"{short}-{seed}")
            run = dataclasses.replace(cfg, seed=seed, out=str(folder), steps=steps * compute)
            jobs.append(Job(name, method, run, folder, steps, steps * cost))
            check_folder(jobs[-1])
    return sorted(jobs, key=lambda job: args.seeds.index(job.cfg.seed))


def check_folder(job):
    """Raises UserError where the folder of a job holds anything but this very run, or its first moments."""
    if job.folder.is_dir() and {file.name for file in job.folder.iterdir()} - {"config.part"}:
        saved = read_facts(job.folder, job.method, type(job.cfg))["config"]
        for name, value in dataclasses.asdict(job.cfg).items():
            check(name in RESUMABLE | {"out"} or value == saved[name], f"--{name.replace('_', '-')}", value,
                  f"{job.folder} was started with {saved[name]!r}; name another --out")


def trained(job):
    """How many steps a run has made, by its metrics.csv, and the seconds that they took."""
    file, step, seconds = job.folder / "metrics.csv", 0, 0.0
    for row in csv.DictReader(file.read_text().splitlines() if file.exists() else []):
        if row.get("images_per_second"):
            seconds += (int(row["step"]) - step) * job.cfg.batch / float(row["images_per_second"])
            step = int(row["step"])
    return step, seconds


def read_scores(job):
    """What a run that is trained and evaluated is worth, {score of SCORES: value}; None of any other."""
    try:
        report = json.loads((job.folder / "eval_linear.json").read_text())
        found = {**report["percent"]["trained encoder"], "rank": report["effective_rank"]["trained encoder"]}
        whole = pathlib.Path(report["checkpoint"]).name == job.folder.name and trained(job)[0] >= job.steps
        return {score: found[score] for score in SCORES} if whole and report["images"] == job.cfg.images else None
    except (FileNotFoundError, ValueError, KeyError):  # not there, half written, or without the attentive probe
        return None


def run_job(job):
    """Trains and evaluates a run; returns its scores. Raises UserError, FloatingPointError, SystemExit on a signal."""
    cfg = job.cfg
    if (job.folder / "last.pt").exists() or (job.folder / "previous.pt").exists():
        (job.folder / "eval_linear.json").unlink(missing_ok=True)  # of an earlier step
        cfg = dataclasses.replace(cfg, resume=str(job.folder))
    elif job.folder.exists():
        shutil.rmtree(job.folder)  # the first moments of this run: it has no checkpoint yet
    importlib.import_module(job.method).train(cfg)
    gc.collect()  # this model leaves the device before the next comes
    asked = ["--images", str(cfg.images), "--root", cfg.root, "--device", cfg.device]
    if status := eval_linear.main([str(job.folder), *asked, "--amp" if cfg.amp else "--no-amp"]):
        raise SystemExit(status)
    return read_scores(job)


def student_p(t, df):
    """P(|T| > |t|) of Student's t with df degrees of freedom, an integer: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(abs(t), math.sqrt(df))
    term = math.sin(angle) * (math.cos(angle) if df % 2 else 1.0)
    total = term * (df > 1)
    for k in range(df % 2 + 1, df - 2, 2):
        term *= math.cos(angle) ** 2 * k / (k + 1)
        total += term
    return max(0.0, 1 - (2 / math.pi * (angle + total) if df % 2 else total))


def compare_with(values, baseline):
    """{row: scores of its seeds}, the name of one of them → {row: p}, by the variance pooled over all rows; NaN for the
    baseline itself, and for all rows if it has no finished run or no row varies between its seeds."""
    df, p = sum(len(scores) - 1 for scores in values.values()), dict.fromkeys(values, math.nan)
    squares = sum((x - statistics.mean(scores)) ** 2 for scores in values.values() for x in scores)
    if squares > 0 and baseline in values:
        for name in set(values) - {baseline}:
            gap = statistics.mean(values[name]) - statistics.mean(values[baseline])
            error = math.sqrt(squares / df * (1 / len(values[name]) + 1 / len(values[baseline])))
            p[name] = student_p(gap / error, df)
    return p


def write_table(out, jobs, results, baseline):
    """Writes table.txt, .csv and .png to the folder `out`, of `results`: folder → scores. Returns the text."""
    done = [job for job in jobs if job.folder in results]
    rows = {job.row: job for job in done}
    single = {score: {row: [results[job.folder][score] for job in done if job.row == row] for row in rows}
              for score in SCORES}
    width, records = max(map(len, rows)) + 2, []
    lines = [f"{'':{width}}seeds  {''.join(f'{title:25}' for title in SCORES.values())}     GFLOP   seconds"]
    for row, job in rows.items():
        seconds = [trained(job)[1] for job in done if job.row == row]
        record, cells = {"row": row, "seeds": len(seconds)}, ""
        for score, title in SCORES.items():
            values, chance = single[score][row], compare_with(single[score], baseline)[row]
            mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan
            told = "" if math.isnan(chance) else f"p {chance:.2g}{'*' * (chance < 0.01)}"
            cells += f"{mean:.2f}{f' ± {deviation:.2f}' * (len(values) > 1)} {told}".ljust(25)
            record |= {title: round(mean, 4), f"{title} deviation": round(deviation, 4), f"{title} p": chance}
        records.append({**record, "GFLOP": round(job.gflop, 3), "seconds": round(statistics.mean(seconds), 1)})
        lines.append(f"{row:{width}}{len(seconds):5}  {cells}{job.gflop:10,.0f}{records[-1]['seconds']:10,.0f}")
    text = "\n".join([*lines, "", f"Mean ± standard deviation over seeds; p against {baseline}, * where it is below "
                      "0.01; GFLOP and seconds of one training.", ""])
    pathlib.Path(out, "table.txt").write_text(text, encoding="utf-8")
    with open(pathlib.Path(out, "table.csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([records[0], *(record.values() for record in records)])
    draw_table(pathlib.Path(out, "table.png"), single, baseline)
    return text


def draw_table(file, single, baseline):
    """Draws `single`, score → row → values: runs as dots, mean and deviation below; a line at the baseline's mean."""
    rows = list(single["rank"])
    figure = Figure(figsize=(12, 0.42 * len(rows) + 1.1), layout="constrained")
    for axis, (score, values) in zip(figure.subplots(1, len(single), sharey=True), single.items()):
        for place, row in enumerate(rows):
            axis.plot(values[row], [place - 0.14] * len(values[row]), "o", color=f"C{place % 10}", alpha=0.6, mew=0)
            axis.errorbar(statistics.mean(values[row]), place + 0.2, color=f"C{place % 10}", fmt="D", ms=4, capsize=3,
                          xerr=statistics.stdev(values[row]) if len(values[row]) > 1 else None)
        axis.axvline(statistics.mean(values.get(baseline, [math.nan])), color="grey", linestyle=":", zorder=0)
        axis.set(title=SCORES[score], yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def compare(args, flags):
    """Does what args ask; flags go to every row. Raises UserError, SystemExit, FloatingPointError at the end."""
    check(os.environ.get("WORLD_SIZE", "1") == "1", "torchrun", "compare.py", "runs alone; its runs take one GPU")
    check(args.gflop is None if args.equal == "epochs" else 0 < (args.gflop or 0) < math.inf, "--gflop", args.gflop,
          "must be a number above 0; with --equal epochs it is left out")
    check(len(set(args.seeds)) == len(args.seeds), "--seeds", args.seeds, "must differ")
    rows = read_rows(pathlib.Path(args.rows).read_text("utf-8", "replace") if args.rows else ROWS)
    baseline = args.baseline or next(iter(rows))
    check(baseline in rows, "--baseline", baseline, f"is none of the rows: {', '.join(rows)}")
    jobs, began = plan(rows, flags, args), time.time()
    results = {job.folder: scores for job in jobs if (scores := read_scores(job))}
    left = []  # GFLOP, before each run
    try:
        for job in [job for job in jobs if job.folder not in results]:
            left.append(sum(job.gflop * (1 - trained(job)[0] / job.steps) for job in jobs))
            seconds = (time.time() - began) / (left[0] - left[-1]) * left[-1] if left[0] > left[-1] else 0
            told = f"{left[-1]:,.0f} GFLOP left" + f", about {seconds / 60:,.0f} minutes" * (seconds > 0)
            print(f"\nrun {len(results) + 1} of {len(jobs)}: {job.row}, seed {job.cfg.seed}; {told}", flush=True)
            try:
                results[job.folder] = run_job(job)
                write_table(args.out, jobs, results, baseline)
            except FloatingPointError as error:
                print(f"{job.folder}: {error}", file=sys.stderr)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # its Run's handler would only note a ^C
    except (KeyboardInterrupt, SystemExit) as stop:
        print("compare.py: stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(getattr(stop, "code", 130)) from stop
    if results:
        print(f"\n{write_table(args.out, jobs, results, baseline)}written: table.txt, .csv, .png in {args.out}")
    if len(results) < len(jobs):
        raise FloatingPointError(f"{len(jobs) - len(results)} of {len(jobs)} runs are not in the table, as told above")


def main(argv=None):
    """The command line; returns the exit status of `answer`."""
    parser = Parser("compare.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    epilog="All other flags go to every row: --tiny, --data, --images, …")
    parser.add_argument("--rows", default="", help="a file of rows, NAME = METHOD.py FLAGS (default: eight)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--gflop", type=float, help="what the training of one run may spend, in 10^9 operations")
    parser.add_argument("--equal", choices=("compute", "epochs"), default="compute", help="(default: compute)")
    parser.add_argument("--baseline", default="", help="the row that p compares with (default: the first)")
    parser.add_argument("--out", default="runs/compare", help="folder of all runs (default: runs/compare)")
    return answer("compare.py", lambda: compare(*parser.parse_known_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
