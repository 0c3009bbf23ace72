"""How good is what was learned: kNN, a linear and an attentive probe on the frozen encoder of any method's run.

    python eval_linear.py runs/mclim-DATE-TIME                 a run, or one of its checkpoints (last.pt, previous.pt)
    python eval_linear.py RUN --baselines                      beside it the untrained encoder and raw pixels
    python eval_linear.py RUN --data stl10                     on another set than it was trained on
    python eval_linear.py RUN --seeds 3                        probes from three seeds: mean ± standard deviation

All images that have a label are used (with --images N those among N training images), without augmentation, by the
usual central crop.
kNN: the 20 training images of the highest cosine vote for their classes, each with the weight exp(cosine / 0.07).
Linear probe: `features` standardised by the training images' mean and deviation, then one linear layer.
Attentive probe: `tokens` of the last block, standardised; a learned query q weighs an image's N tokens x_n by
softmax(q·x_n / √D), and a linear layer reads their weighted mean. (Projections to keys and values would add nothing:
the query and the linear layer can hold them.) At the start q is 0 and weighs all tokens alike. Masked modelling spreads
what it knows over the tokens, and a probe of an average misses some of it (arXiv 2506.10178). The training images'
tokens are held in memory, in half precision, if they take at most 16 GB (50,000 images of 196 × 768 take 15), and so
are the test images'; otherwise they are computed anew at each step.
Either probe follows its fixed recipe below; the last epoch counts, no choice is made on the test images.
Effective rank: of the training images' features, how many directions they spread over (arXiv 2210.02885); without
labels it is all there is to compute. Near 1 all features lie along one direction: the contrast has collapsed.
Writes eval_linear.json and confusion.png (with --data, eval_linear-DATA.json and confusion-DATA.png) beside the
checkpoint.
"""
import argparse, functools, importlib, itertools, json, os, pathlib, shutil, statistics, sys, time
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Parser, UserError, answer, autocast, central_crop, check, class_names, cosine_lr, effective_rank,
                    extract_features, knn_votes, load_checkpoint, load_data, normalize, resize, start_processes)
from pictures import draw_confusion

RECIPES = {"kNN": {"k": 20, "similarity": "cosine", "temperature": 0.07},
           "linear": {"optimizer": "AdamW", "lr": 2e-3, "weight_decay": 1e-4, "batch": 256, "epochs": 100,
                      "schedule": "cosine"},
           "attentive": {"optimizer": "AdamW", "lr": 5e-2, "weight_decay": 1e-4, "batch": 256, "epochs": 10,
                         "least_steps": 2_000, "schedule": "cosine"}}
HELD = 16e9  # bytes of tokens that are held in memory, at most


def model_class(module):
    """The model of a method's file: the class that bears its name, whatever the case."""
    return next(value for name, value in vars(module).items() if name.lower() == module.__name__)


def build_model(method, config, file, seed=None):
    """The untrained model of a method's `config` (a dict), from `seed` (None: its own), and its Config. Raises
    UserError, which names the `file` that these were read from."""
    check(pathlib.Path(__file__).with_name(f"{method}.py").exists(), "checkpoint", file, f"is of an unknown {method}")
    module = importlib.import_module(method)
    check(hasattr(module, "Encoder"), "checkpoint", file, f"is of {method}.py, not of a pre-training")
    try:
        cfg = module.Config(**config)
    except TypeError as error:
        raise UserError(f"checkpoint {file}: its settings are not those of this {method}.py ({error})") from error
    torch.manual_seed(cfg.seed if seed is None else seed)
    return model_class(module)(cfg), cfg


def load_model(file, trained=True, seed=None):
    """The model of a checkpoint, or with trained=False the same from `seed` (None: its own), and its Config. Raises
    UserError."""
    state = load_checkpoint(file)
    model, cfg = build_model(state["method"], state["config"], file, seed)
    if trained:
        load_checkpoint(file, state["method"], model=model)
    return model, cfg


class Tokens:
    """`tokens[ids]`: the patch tokens float32 (B, N, D) of the images `ids` (B,), standardised in each of the D.

    encode: ids (B,) → tokens (B, N, D); n: how many images there are; like: other Tokens, whose mean and deviation are
    taken (else those of 1,000 images). Tokens are held in memory, in half precision, if they take at most HELD bytes;
    else they are computed anew each time.
    """
    def __init__(self, encode, n, like=None):
        self.encode, self.n, self.held = encode, n, None
        few = encode(torch.linspace(0, n - 1, 1 if like else min(n, 1_000)).long()).float()  # evenly spaced
        self.mean, self.std = (like.mean, like.std) if like else (few.mean((0, 1)), few.std((0, 1)).clamp(min=1e-6))
        self.shape, self.gigabytes = (n, *few.shape[1:]), 2 * n * few[0].numel() / 1e9
        if self.gigabytes <= HELD / 1e9:
            free = torch.cuda.mem_get_info(few.device)[0] / 1e9 if few.is_cuda else 0
            place = few.device if 3 * self.gigabytes < free else "cpu"  # a GPU that has room, else the host
            self.held = torch.empty(self.shape, dtype=torch.float16, device=place)
            for ids in torch.arange(n).split(250):
                self.held[ids.to(place)] = self.standardised(ids).half().to(place)

    def standardised(self, ids):
        return (self.encode(ids).float() - self.mean) / self.std

    def __getitem__(self, ids):
        if self.held is None:
            return self.standardised(ids)
        return self.held[ids.to(self.held.device)].to(self.mean.device).float()

    def __len__(self):
        return self.n

    def __str__(self):
        place = "held in half precision" if self.held is not None else "too many to hold, computed at each step"
        return f"{self.shape[0]:,} × {self.shape[1]} × {self.shape[2]} tokens, {self.gigabytes:.1f} GB, {place}"


def tokens_of(encoder, parts, img, here, amp=True):
    """Two Tokens, of the training and of the test images, `parts` of load_data, cropped to img×img, and two tensors,
    encoder.features of both (N, D) and (Q, D), which the same pass gives; None where the Tokens are not held."""
    @torch.no_grad()
    def encode(images, aspect, features, ids):  # fills `features`, too: wholly where all tokens are held
        tokens = []
        for part in ids.split(250):
            x = normalize(central_crop(images[part].to(here.device), img, aspect[part]))
            encoder.forward = functools.lru_cache(1)(encoder.forward)  # tokens and features of x by one pass
            with autocast(here.device, amp):
                tokens.append(encoder.tokens(x))
                features[part.to(here.device)] = encoder.features(x).float()
            del encoder.forward  # the class's is back
        return torch.cat(tokens)
    (known, _, aspect), (asked, _, asked_aspect) = parts
    with torch.no_grad():
        width = encoder.features(torch.zeros(1, 3, img, img, device=here.device)).shape[1]
    features = [torch.empty(len(images), width, device=here.device) for images in (known, asked)]
    own = Tokens(lambda ids: encode(known, aspect, features[0], ids), len(known))
    other = Tokens(lambda ids: encode(asked, asked_aspect, features[1], ids), len(asked), like=own)
    return (own, other), [None if part.held is None else rows for part, rows in zip((own, other), features)]


def raw_pixels(images, img, here, aspect):
    """What an encoder of img×img pixels sees of uint8 images (N, 3, S, S), shrunk to a side of at most 32:
    (N, 3 · side · side), on the device."""
    rows = []
    for ids in torch.arange(len(images)).split(250):
        x = central_crop(images[ids].to(here.device), min(img, images.shape[2]), aspect[ids])
        rows.append(resize(x, min(32, x.shape[2])).flatten(1))
    return torch.cat(rows)


def train_probe(probe, inputs, labels, recipe, loss=F.cross_entropy, progress=""):
    """Trains `probe` on inputs[ids] and labels[ids] as `recipe` says, with more epochs where these have fewer than its
    least_steps; returns it in evaluation."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=recipe["lr"], weight_decay=recipe["weight_decay"], fused=True)
    per_epoch, step = -(-len(inputs) // recipe["batch"]), 0
    epochs = max(recipe["epochs"], -(-recipe.get("least_steps", 0) // per_epoch))
    for epoch in range(epochs):
        for ids in torch.randperm(len(inputs)).split(recipe["batch"]):
            optimizer.param_groups[0]["lr"] = cosine_lr(step, epochs * per_epoch, 0, recipe["lr"])
            optimizer.zero_grad()
            loss(probe(inputs[ids]), labels[ids]).backward()
            optimizer.step()
            step += 1
        if sys.stdout.isatty():
            line = f"{progress}, epoch {epoch + 1} of {epochs}"[:shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", flush=True)
    return probe.eval().requires_grad_(False)


def linear_probe(features, labels, queries, classes, seed=0, progress=""):
    """Class scores (Q, classes) of `queries` (Q, D) by a linear layer trained on `features` (N, D), labels (N,)."""
    torch.manual_seed(seed)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    features, queries = (features - mean) / std, (queries - mean) / std
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(layer.weight)
    return train_probe(layer, features, labels, RECIPES["linear"], progress=f"{progress}: linear probe")(queries)


class AttentiveProbe(nn.Module):
    """Tokens (B, N, D) → class scores (B, classes): a linear layer of their mean, weighted by softmax(q·x_n / √D)."""
    def __init__(self, dim, classes):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        weights = (x @ self.query / x.shape[2] ** 0.5).softmax(1)  # (B, N)
        return self.head((weights[:, None] @ x)[:, 0])


def attentive_probe(tokens, labels, queries, classes, seed=0, progress=""):
    """Class scores (Q, classes) of `queries`, Q of Tokens, by an AttentiveProbe trained on `tokens`, N of them, and
    labels (N,)."""
    torch.manual_seed(seed)
    probe = AttentiveProbe(tokens.shape[2], classes).to(labels.device)
    train_probe(probe, tokens, labels, RECIPES["attentive"], progress=f"{progress}: attentive probe on {tokens}")
    return torch.cat([probe(queries[ids]) for ids in torch.arange(len(queries)).split(250)])


def top(scores, labels, k):
    """The share in percent of rows of scores (Q, classes) whose k best, above -inf, hold the label."""
    best, classes = scores.topk(min(k, scores.shape[1]))
    hit = ((classes == labels[:, None]) & (best > -torch.inf)).any(1)
    return round(100 * hit.double().mean().item(), 2)


def labelled_only(part):
    """A triple of load_images without the images that have no label; None for None, or where none has one."""
    if part is None or (part[1] < 0).all():
        return None
    return tuple(x[part[1] >= 0] for x in part) if (part[1] < 0).any() else part


def beside(run, name, data):
    """Where an evaluation is written: `name` beside the checkpoint, with `data` in it if that is not "": a set's name,
    or the end of a folder's path, so that cifar10 and data/cifar10 differ."""
    folder, name, where = pathlib.Path(run), pathlib.Path(name), pathlib.Path(data)
    suffix = "-" + "-".join(where.resolve().parts[-2:] if where.is_dir() else [data]) if data else ""
    return (folder if folder.is_dir() else folder.parent) / f"{name.stem}{suffix}{name.suffix}"


def measure(bank, labels, asked, truth, tokens, classes, seeds, name):
    """{column: its figures in percent, one of kNN, one for each of `seeds` of a probe}, and the class (Q,) that the
    first linear probe chooses.

    bank (N, D), asked (Q, D): features of the labelled images and of those in question; tokens: the same as two Tokens,
    or None for no attentive probe.
    """
    votes = knn_votes(bank, labels, asked)
    votes = votes.masked_fill(votes == 0, -torch.inf)  # a class without a vote is no guess
    found, guess = {"knn_top1": [top(votes, truth, 1)], "knn_top5": [top(votes, truth, 5)]}, None
    for seed in seeds:
        scores = {"linear": linear_probe(bank, labels, asked, classes, seed, name)}
        guess = scores["linear"].argmax(1) if guess is None else guess
        if tokens:
            scores["attentive"] = attentive_probe(tokens[0], labels, tokens[1], classes, seed, name)
        for probe, k in itertools.product(scores, (1, 5)):
            found.setdefault(f"{probe}_top{k}", []).append(top(scores[probe], truth, k))
    return found, guess


def evaluate(args):
    """Does what the command line asks and returns what is written to eval_linear.json. Raises UserError."""
    check(args.seeds >= 1, "--seeds", args.seeds, "must be at least 1")
    check(args.images >= 0, "--images", args.images, "must be at least 0")
    check(os.environ.get("WORLD_SIZE", "1") == "1", "torchrun", "eval_linear.py", "runs alone, on one device")
    began, here = time.time(), start_processes(args.device)
    model, cfg = load_model(args.run)
    data, root = args.data or cfg.data, args.root or cfg.root
    parts = load_data(replace(cfg, data=data, root=root, images=args.images))
    known = [labelled_only(part) for part in parts]
    probed = all(known) and len(known[0][1].unique()) > 1
    if probed:
        names, parts = class_names(data, root), known
        labels, truth = (part[1].to(here.device) for part in parts)
        print(f"{cfg.data} → {data}: {len(labels):,} training images, {len(truth):,} test images, {len(names)} "
              f"classes, probes from {args.seeds} seed{'s' * (args.seeds > 1)}")
        for name, recipe in RECIPES.items():
            print(f"{name + ':':10} {', '.join(f'{k} {v}' for k, v in recipe.items())}", flush=True)
    else:
        parts = parts[:1]
        print(f"{cfg.data} → {data}: {len(parts[0][0]):,} training images. Their effective rank needs no labels; kNN "
              "and probes need labelled training and test images of two classes or more, in a folder train/CLASS/IMAGE "
              "and test/CLASS/IMAGE: name such a set with --data", flush=True)

    encoders = {"trained encoder": model.encoder}
    if args.baselines:
        encoders |= {"untrained encoder": load_model(args.run, trained=False)[0].encoder, "raw pixels": None}
    rows, each, ranks, guesses = {}, {}, {}, []
    heads = "".join(f"{kind + ' top-1':>17}{'top-5':>14}" for kind in ("kNN", "linear", "attentive"))
    print(f"{'':18}{heads * probed}{'rank':>8}")
    for name, encoder in encoders.items():
        tokens = None  # those of the encoder before leave the memory
        if encoder is None:
            features = [raw_pixels(images, cfg.img, here, aspect) for images, _, aspect in parts]
        else:
            encoder.to(here.device).eval()
            tokens, features = (tokens_of(encoder, parts, cfg.img, here, args.amp) if probed and args.attentive else
                                (None, [None] * len(parts)))
            features = [extract_features(encoder, images, cfg.img, here, args.amp, aspect) if done is None else done
                        for done, (images, _, aspect) in zip(features, parts)]
            ranks[name] = round(effective_rank(features[0]), 2)
        found = {}
        if probed:
            seeds = range(cfg.seed, cfg.seed + args.seeds)
            found, guess = measure(features[0], labels, features[1], truth, tokens, len(names), seeds, name)
            guesses.append(guess.cpu())
        rows[name] = {column: round(statistics.mean(values), 2) for column, values in found.items()}
        each[name] = {column: values for column, values in found.items() if len(values) > 1}
        told = "".join(f"{spread(found.get(f'{kind}_top{k}')):>{width}}" for kind in ("knn", "linear", "attentive")
                       for k, width in ((1, 17), (5, 14)))
        print(f"{chr(13) + chr(27) + '[K' if sys.stdout.isatty() else ''}{name:18}"
              f"{told * probed}{ranks.get(name, '-'):>8}", flush=True)

    report = {"checkpoint": str(args.run), "data": data, "images": args.images, "recipes": RECIPES,
              "percent": rows, "of each seed": each, "effective_rank": ranks, "seconds": round(time.time() - began, 1)}
    file, picture = (beside(args.run, name, args.data) for name in ("eval_linear.json", "confusion.png"))
    file.write_text(json.dumps(report, indent=1) + "\n")
    if probed:
        draw_confusion(picture, truth.cpu(), guesses[0], names, "linear probe")
    print(f"{report['seconds']} s; written: {file}{f' and {picture.name}' * probed}")
    return report


def spread(values):
    """"mean ± standard deviation" of figures, the figure alone if there is one, "-" if there is none."""
    deviation = f" ± {statistics.stdev(values):.2f}" if values and len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}" if values else "-"


def main(argv=None):
    """The command line; returns the exit status of `answer`."""
    parser = Parser("eval_linear.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="the folder of a run, or one of its checkpoints")
    parser.add_argument("--data", default="", help="another data set than the run's: a name or a folder")
    parser.add_argument("--root", default="", help="where data sets are kept, if not where the run had them")
    parser.add_argument("--baselines", action="store_true", help="also the untrained encoder and raw pixels")
    parser.add_argument("--images", type=int, default=0, help="take so many training images, a fixed choice; 0 for all")
    parser.add_argument("--seeds", type=int, default=1, help="probes from so many seeds (default: 1)")
    parser.add_argument("--attentive", action=argparse.BooleanOptionalAction, default=True,
                        help="the attentive probe, which takes the longest")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 where it is there")
    return answer("eval_linear.py", lambda: evaluate(parser.parse_args(argv)), "take --device cpu")


if __name__ == "__main__":
    sys.exit(main())
