"""How good is what was learned: kNN and a linear probe on the frozen encoder of any method's run.

    python eval_linear.py runs/mclim-DATE-TIME                 a run, or one of its checkpoints (last.pt, previous.pt)
    python eval_linear.py RUN --baselines                      beside it the untrained encoder and raw pixels
    python eval_linear.py RUN --data stl10                     on another set than it was trained on

`features` of all images are computed once, without augmentation. kNN: the 20 nearest training images by cosine vote
with weight exp(cosine / 0.07). Linear probe: features standardised by the training images' mean and deviation, then
one linear layer, by the fixed recipe below; the last epoch counts, no choice is made on the test images.
Writes eval_linear.json and confusion.png (with --data, eval_linear-DATA.json and confusion-DATA.png) beside the
checkpoint.
"""
import argparse, importlib, json, pathlib, sys, time

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Parser, UserError, answer, check, class_names, cosine_lr, extract_features, knn_votes,
                    load_checkpoint, load_images, resize, start_processes)
from pictures import draw_confusion

RECIPE = {"optimizer": "AdamW", "lr": 2e-3, "weight_decay": 1e-4, "batch": 256, "epochs": 100, "schedule": "cosine",
          "kNN": "k 20, cosine, temperature 0.07"}


def model_class(module):
    """The model of a method's file: the class that bears its name, whatever the case."""
    return next(value for name, value in vars(module).items() if name.lower() == module.__name__)


def load_model(file, trained=True, seed=None):
    """The model of a checkpoint, or with trained=False the same from `seed` (None: its own), and its Config. Raises
    UserError."""
    state = load_checkpoint(file)
    method = state["method"]
    check(pathlib.Path(__file__).with_name(f"{method}.py").exists(), "checkpoint", file, f"is of an unknown {method}")
    module = importlib.import_module(method)
    check(hasattr(module, "Encoder"), "checkpoint", file, f"is of {method}.py, not of a pre-training")
    try:
        cfg = module.Config(**state["config"])
    except TypeError as error:
        raise UserError(f"checkpoint {file}: its settings are not those of this {method}.py ({error})") from error
    torch.manual_seed(cfg.seed if seed is None else seed)
    model = model_class(module)(cfg)
    if trained:
        load_checkpoint(file, method, model=model)
    return model, cfg


def linear_probe(features, labels, queries, classes, seed=0, progress=""):
    """Class scores (Q, classes) of `queries` (Q, D) by a linear layer trained on `features` (N, D), labels (N,)."""
    torch.manual_seed(seed)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    features, queries = (features - mean) / std, (queries - mean) / std
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"], fused=True)
    per_epoch = -(-len(features) // RECIPE["batch"])
    for epoch in range(RECIPE["epochs"]):
        order = torch.randperm(len(features), device=features.device)
        for i, ids in enumerate(order.split(RECIPE["batch"])):
            step = epoch * per_epoch + i
            optimizer.param_groups[0]["lr"] = cosine_lr(step, RECIPE["epochs"] * per_epoch, 0, RECIPE["lr"])
            optimizer.zero_grad()
            F.cross_entropy(layer(features[ids]), labels[ids]).backward()
            optimizer.step()
        if sys.stdout.isatty():
            print(f"\r\033[K{progress}: linear probe, epoch {epoch + 1} of {RECIPE['epochs']}", end="", flush=True)
    return layer(queries).detach()


def top(scores, labels, k):
    """The share in percent of rows of scores (Q, classes) whose k best, above -inf, hold the label."""
    best, classes = scores.topk(min(k, scores.shape[1]))
    hit = ((classes == labels[:, None]) & (best > -torch.inf)).any(1)
    return round(100 * hit.double().mean().item(), 2)


def evaluate(args):
    """Does what the command line asks and returns what is written to eval_linear.json. Raises UserError."""
    began, here = time.time(), start_processes(args.device)
    model, cfg = load_model(args.run)
    data, root = args.data or cfg.data, args.root or cfg.root
    train, test = (load_images(data, split, cfg.img, root, cfg.workers, cfg.seed) for split in ("train", "test"))
    (images, labels), (queries, truth) = ((x[y >= 0], y[y >= 0].to(here.device)) if (y < 0).any() else
                                          (x, y.to(here.device)) for x, y, _ in (train, test))
    names = class_names(data, root)
    print(f"{cfg.data} → {data}: {len(images):,} training images, {len(queries):,} test images, {len(names)} classes\n"
          f"probe: {', '.join(f'{k} {v}' for k, v in RECIPE.items())}", flush=True)

    def features(model):
        model.to(here.device).eval()
        return [extract_features(model.encoder, x, cfg.img, here, args.amp) for x in (images, queries)]

    def pixels():
        side = min(32, images.shape[2])
        return [torch.cat([resize(part, side).flatten(1) for part in x.split(250)]).to(here.device)
                for x in (images, queries)]

    subjects = {"trained encoder": lambda: features(model)}
    if args.baselines:
        subjects["untrained encoder"] = lambda: features(load_model(args.run, trained=False)[0])
        subjects["raw pixels"] = pixels
    rows = {}
    print(f"{'':18} {'kNN top-1':>10} {'top-5':>7} {'linear top-1':>13} {'top-5':>7}")
    for name, subject in subjects.items():
        bank, asked = subject()
        votes = knn_votes(bank, labels, asked)
        votes = votes.masked_fill(votes == 0, -torch.inf)  # a class without a vote is no guess
        scores = linear_probe(bank, labels, asked, len(names), cfg.seed, name)
        if not rows:
            guess = scores.argmax(1).cpu()
        row = [top(votes, truth, 1), top(votes, truth, 5), top(scores, truth, 1), top(scores, truth, 5)]
        rows[name] = dict(zip(("knn_top1", "knn_top5", "linear_top1", "linear_top5"), row))
        print(f"{chr(13) + chr(27) + '[K' if sys.stdout.isatty() else ''}{name:18} {row[0]:10} {row[1]:7} {row[2]:13} "
              f"{row[3]:7}", flush=True)

    folder = pathlib.Path(args.run) if pathlib.Path(args.run).is_dir() else pathlib.Path(args.run).parent
    suffix = f"-{pathlib.Path(data).name}" if args.data else ""
    report = {"checkpoint": str(args.run), "data": data, "recipe": RECIPE, "percent": rows,
              "seconds": round(time.time() - began, 1)}
    (folder / f"eval_linear{suffix}.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_confusion(folder / f"confusion{suffix}.png", truth.cpu(), guess, names, "linear probe")
    print(f"{report['seconds']} s; written: eval_linear{suffix}.json and confusion{suffix}.png in {folder}")
    return report


def main(argv=None):
    """The command line; returns the exit status of `answer`."""
    parser = Parser("eval_linear.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="the folder of a run, or one of its checkpoints")
    parser.add_argument("--data", default="", help="another data set than the run's: a name or a folder")
    parser.add_argument("--root", default="", help="where data sets are kept, if not where the run had them")
    parser.add_argument("--baselines", action="store_true", help="also the untrained encoder and raw pixels")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 where it is there")
    return answer("eval_linear.py", lambda: evaluate(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
