"""Evaluates the frozen encoder of a run: kNN, linear and attentive probe, effective rank.

    python eval_linear.py RUN                    a run folder or a file of weights/
    python eval_linear.py RUN --baselines        also the untrained encoder and raw pixels
    python eval_linear.py RUN --protocol mae     the linear probe of MAE's published code

All labelled images are used, as central crops. The last epoch of a probe counts.
kNN: the 20 training images with the highest cosine vote, each with weight exp(cosine / 0.07).
Linear probe: a linear layer on `features`, standardised by the training images.
Attentive probe: a learned query q weighs the standardised `tokens` x_t of an image by
softmax(q·x_t / √D), and a linear layer takes their weighted mean, arXiv 2506.10178. All tokens are
held in half precision: 15 GB for 50,000 images of 196 × 768; see --no-attentive.
Effective rank of the training features: near 1, the encoder has collapsed.

--protocol mae replaces both probes by that of MAE's main_linprobe.py, which CAMAE §IV-A cites:
random crops and flips in each epoch, BatchNorm before the linear layer, LARS. What differs: the
run's pooling, where MAE takes the class token; crops of stored squares of 8/7 of the image size;
torchvision's random crops, where MAE clips a box that does not fit; central crops are resized
linearly, where MAE's are bicubic.

Writes eval_linear.json and confusion.png beside the checkpoint (of a file: NAME-FILE; with
--data: NAME-DATA).
"""
import argparse
import dataclasses
import importlib
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from augment import central_crop, normalize, random_hflip, random_resized_crop
from common import (Batches, autocast, effective_rank, extract_features, knn_accuracy,
                    load_checkpoint, load_data, report_errors, require, start_processes)
from images import UserError
from plots import denormalize, plot_confusion

RECIPES = {"linear": {"lr": 2e-3, "wd": 1e-4, "batch": 256, "epochs": 100, "min_steps": 0},
           "attentive": {"lr": 5e-2, "wd": 1e-4, "batch": 256, "epochs": 10, "min_steps": 2000}}
MAE = {"batch": 16384, "epochs": 90.0, "lr": 0.1, "warmup": 10.0}  # of --protocol mae


def load_model(run, trained=True, seed=None):
    """(model, cfg) of a run folder or of a file with "method", "config" and "model". Fields that
    the config lacks take their defaults. trained=False: random weights from `seed`, by default the
    run's. Raises UserError."""
    state = load_checkpoint(run)
    method = state["method"]
    try:
        module = importlib.import_module(method)
        Config, Model, saved = module.Config, module.Model, state["config"]
    except (ImportError, AttributeError, KeyError) as error:
        raise UserError(f"{run}: no model of {method}.py: {error}") from error
    known = {field.name for field in dataclasses.fields(Config)} & set(saved)
    if known < set(saved):
        print(f"{run}: {method}.py no longer has {', '.join(sorted(set(saved) - known))}")
    cfg = Config(**{name: saved[name] for name in known})
    torch.manual_seed(cfg.seed if seed is None else seed)
    model = Model(cfg)
    if trained:
        load_checkpoint(run, model=model)
    return model, cfg


class RawPixels(nn.Module):
    """A baseline: pixels in 0…1, shrunk to at most 32×32."""
    def features(self, x):
        side = min(32, x.shape[2])
        pixels = F.interpolate(denormalize(x), (side, side), mode="bilinear", antialias=True)
        return pixels.flatten(1).to(x.device)


# Probes. N training images, Q test images, T tokens of an image, D the width of their features.

def standardization(x):
    """Mean and scale (D,) of x (…, D): (x - mean) * scale has deviation 1. A feature that does not
    vary, except by rounding, has scale 0."""
    std, mean = torch.std_mean(x.flatten(0, -2), 0)
    return mean, torch.where(std > 1e-4 * std.max(), 1 / std, 0)


@torch.no_grad()
def extract_tokens(encoder, images, img, device, amp=True, like=None):
    """Tokens of central crops, float16 (N, T, D), standardised by `like`, by default the mean and
    scale of 250 of the images; and these two."""
    def encode(ids):
        x = normalize(central_crop(images[ids].to(device), img))
        with autocast(device, amp):
            return encoder.tokens(x).float()
    N = len(images)
    few = encode(torch.linspace(0, N - 1, min(N, 250)).long())
    mean, scale = like or standardization(few)
    tokens = torch.empty(N, *few.shape[1:], dtype=torch.float16, device=device)
    for ids in torch.arange(N).split(250):
        tokens[ids] = ((encode(ids) - mean) * scale).half()
    return tokens, (mean, scale)


def cosine_lr(step, steps, warmup, peak):
    """Learning rate of step 0 … steps - 1: linear to `peak` in `warmup` steps, then a half cosine
    to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_probe(probe, inputs, labels, recipe, loss=F.cross_entropy):
    """Trains `probe` by AdamW on inputs[ids], labels[ids]. Returns it without gradients."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=recipe["lr"], weight_decay=recipe["wd"])
    per_epoch = math.ceil(len(inputs) / recipe["batch"])
    epochs = max(recipe["epochs"], math.ceil(recipe["min_steps"] / per_epoch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for _ in range(epochs):
        for ids in torch.randperm(len(inputs)).split(recipe["batch"]):
            optimizer.zero_grad()
            loss(probe(inputs[ids].float()), labels[ids]).backward()
            optimizer.step()
            schedule.step()
    return probe.requires_grad_(False)


def linear_probe(features, labels, queries, classes, seed=0):
    """Scores (Q, classes) of `queries` (Q, D) after training on `features` (N, D)."""
    torch.manual_seed(seed)
    mean, scale = standardization(features)
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(layer.weight)
    train_probe(layer, (features - mean) * scale, labels, RECIPES["linear"])
    return layer((queries - mean) * scale)


class AttentiveProbe(nn.Module):
    """Tokens (B, T, D) → scores (B, classes)."""
    def __init__(self, dim, classes):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))  # at the start all tokens weigh the same
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        weights = (x @ self.query / x.shape[2] ** 0.5).softmax(1)  # (B, T)
        return self.head((weights[:, None] @ x)[:, 0])


def attentive_probe(tokens, labels, queries, classes, seed=0):
    """Scores (Q, classes) of `queries` (Q, T, D) after training on `tokens` (N, T, D)."""
    torch.manual_seed(seed)
    probe = AttentiveProbe(tokens.shape[2], classes).to(labels.device)
    train_probe(probe, tokens, labels, RECIPES["attentive"])
    return torch.cat([probe(x.float()) for x in queries.split(250)])


class LARS(torch.optim.SGD):
    """SGD that multiplies the gradient of a matrix by 0.001 · ‖matrix‖ / ‖gradient‖, arXiv
    1708.03888. Vectors are not scaled, as in MoCo v3 and MAE."""
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            ratio = 0.001 * p.norm() / p.grad.norm()
            if p.ndim > 1 and 0 < ratio < torch.inf:
                p.grad *= ratio
        super().step()


def mae_probe(encoder, train, queries, args, img, device, amp=True, seed=0):
    """Scores (Q, classes) of the features `queries` (Q, D) after training on random crops."""
    batches = Batches(train, args.batch, seed, device)
    steps = max(1, round(args.epochs * len(batches)))
    warmup = round(args.warmup * len(batches))
    peak = args.lr * args.batch / 256
    torch.manual_seed(seed)
    D = queries.shape[1]
    probe = nn.Sequential(nn.BatchNorm1d(D, eps=1e-6, affine=False),
                          nn.Linear(D, len(train.classes))).to(device)
    nn.init.trunc_normal_(probe[1].weight, std=0.01)
    nn.init.zeros_(probe[1].bias)
    optimizer = LARS(probe.parameters(), peak, momentum=0.9)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine_lr(step, steps, warmup, peak)
        batch, rows = batches[step], []
        for ids in torch.arange(len(batch)).split(512):  # 16,384 may not fit in memory
            x = random_hflip(random_resized_crop(batch[ids], img, kernel="bicubic"))
            with torch.no_grad(), autocast(device, amp):
                rows.append(encoder.features(normalize(x)).float())
        loss = F.cross_entropy(probe(torch.cat(rows)), batch.labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe.eval().requires_grad_(False)(queries)


# The program

def accuracy(scores, labels, k=1):
    """Percentage of the rows of scores (Q, classes) whose k highest include the label. Raises
    FloatingPointError if a score is not finite."""
    if not scores.isfinite().all():
        raise FloatingPointError("a score is not finite; try --no-amp")
    hit = (scores.topk(k).indices == labels[:, None]).any(1)
    return 100 * hit.double().mean().item()


def labelled(images):
    """The labelled ones of Images."""
    known = images.labels >= 0
    return images if known.all() else images[known]


def classify(encoder, features, queries, train, test, args, seed, how):
    """{"linear": scores (Q, classes), …}. how: img, device, amp."""
    labels, classes = train.labels.to(features.device), len(train.classes)
    if args.protocol == "mae":
        return {"linear": mae_probe(encoder, train, queries, args, *how, seed)}
    scores = {"linear": linear_probe(features, labels, queries, classes, seed)}
    if args.attentive and hasattr(encoder, "tokens"):
        tokens, own = extract_tokens(encoder, train, *how)
        asked, _ = extract_tokens(encoder, test, *how, own)
        scores["attentive"] = attentive_probe(tokens, labels, asked, classes, seed)
    return scores


def evaluate(args):
    """Evaluates as the command line says."""
    typed = [f"--{name}" for name in MAE if name in args]
    require(args.protocol == "mae" or not typed, f"{', '.join(typed)}: only with --protocol mae")
    if args.protocol == "mae":
        args = argparse.Namespace(**{**MAE, **vars(args)})
        require(0 <= args.warmup < args.epochs, f"--warmup {args.warmup} must be below --epochs")
        require(args.batch > 0 and args.lr > 0, "--batch and --lr must be positive")
    device, _, _ = start_processes(args.device)
    model, cfg = load_model(args.run)
    cfg = dataclasses.replace(cfg, data=args.data or cfg.data, root=args.root or cfg.root,
                              images=args.images)
    train, test = load_data(cfg)
    if test and len(train.classes) > 1 and (train.labels >= 0).any():
        train, test = labelled(train), labelled(test)
        print(f"{cfg.data}: {len(test):,} test images among {len(train):,} training images")
    else:
        test = None
        print(f"{cfg.data}: {len(train):,} training images. kNN and probes need labelled training "
              "and test images: try another --data")

    encoders = {"trained encoder": model.encoder}
    if args.baselines:
        encoders["untrained encoder"] = load_model(args.run, trained=False)[0].encoder
        encoders["raw pixels"] = RawPixels()
    how = (cfg.img, device, args.amp)
    percent, ranks, guesses = {}, {}, []
    for name, encoder in encoders.items():
        features = extract_features(encoder.to(device).eval(), train, *how)
        percent[name], line = {}, name
        if name != "raw pixels":
            ranks[name] = round(effective_rank(features), 2)
            line += f", effective rank {ranks[name]}"
        if test:
            queries = extract_features(encoder, test, *how)
            labels, truth = train.labels.to(device), test.labels.to(device)
            scores = classify(encoder, features, queries, train, test, args, cfg.seed, how)
            found = {"knn_top1": 100 * knn_accuracy(features, labels, queries, truth)}
            for kind in scores:
                for k in (1, 5) if len(train.classes) > 5 else (1,):
                    found[f"{kind}_top{k}"] = accuracy(scores[kind], truth, k)
            guesses.append(scores["linear"].argmax(1).cpu())
            percent[name] = {column: round(value, 2) for column, value in found.items()}
        for column, value in percent[name].items():
            line += f", {column.replace('_', ' ')} {value} %"
        print(line, flush=True)

    run = Path(args.run)
    folder, suffix = (run, "") if run.is_dir() else (run.parent, f"-{run.stem}")
    suffix += "-mae" if args.protocol == "mae" else ""
    suffix += f"-{Path(args.data).resolve().name}" if args.data else ""
    report = {**vars(args), "data": cfg.data, "percent": percent, "effective_rank": ranks}
    (folder / f"eval_linear{suffix}.json").write_text(json.dumps(report, indent=1) + "\n")
    if test:
        plot_confusion(folder / f"confusion{suffix}.png", test.labels, guesses[0], train.classes,
                       "linear probe")
    print(f"written: {folder}/eval_linear{suffix}.json")


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser("eval_linear.py", usage="%(prog)s RUN [--flag value ...]",
                                     description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("run", metavar="RUN", help="a run folder or a checkpoint")
    add("--data", default="", help="instead of the run's")
    add("--root", default="", help="where data sets are, instead of the run's")
    add("--images", type=int, default=0, help="number of training images; 0: all")
    add("--baselines", action="store_true", help="also the untrained encoder and raw pixels")
    add("--attentive", action=boolean, default=True, help="the attentive probe")
    add("--protocol", choices=("own", "mae"), default="own", help="which probes")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--amp", action=boolean, default=True, help="bfloat16 where it is fast")
    for name, value in MAE.items():
        add(f"--{name}", type=type(value), default=argparse.SUPPRESS,
            help=f"of --protocol mae ({value})")
    return parser


def main(argv=None):
    """Evaluates as the flags `argv` say."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with report_errors(parser):
        evaluate(args)


if __name__ == "__main__":
    main()
