"""Shared code that belongs to no paper: flags, processes, batches, kNN, checkpoints, runs."""
import argparse
import contextlib
import csv
import dataclasses
import datetime
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from augment import central_crop, normalize
from images import Images, UserError, load_images
from plots import plot_curves, plot_images


def require(condition, message):
    """Raises UserError unless `condition` holds."""
    if not condition:
        raise UserError(message)


# Flags

# May be given beside --resume.
RESUMABLE = ("resume", "root", "device", "compile", "log_every", "eval_every", "workers")


@dataclasses.dataclass
class RunConfig:
    """Settings of a run that belong to no paper. A method's Config adds its own."""
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes or a folder
    root: str = "data"  # where data sets are downloaded and folders decoded
    images: int = 0  # train on this many images, the same in every run; 0: all
    out: str = ""  # folder of the run, new or empty; default: runs/METHOD-DATE-TIME
    resume: str = ""  # folder of a run to continue
    init: str = ""  # initial encoder: a run, a checkpoint or timm's
    seed: int = 0  # seed of all random numbers
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    amp: bool = True  # bfloat16 autocast where the device is fast in it
    compile: bool = False  # torch.compile the model
    log_every: int = 20  # steps between rows of metrics.csv
    eval_every: int = 10  # epochs between evaluations; 0: never
    tiny: bool = False  # small model and images

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and field.default >= 0:
                require(0 <= value < 2 ** 32, f"{flag(field.name)} {value} must be in [0, 2^32)")
        for name in ("epochs", "batch", "lr", "img", "patch", "dim", "depth", "heads", "log_every",
                     "decoder_dim", "decoder_heads"):
            require(getattr(self, name, 1) > 0, f"{flag(name)} must be positive")


def flag(name):
    return "--" + name.replace("_", "-")


def make_parser(file, doc, Config, TINY):
    """One flag for each field of Config. The comment behind a field is its help."""
    parser = argparse.ArgumentParser(
        Path(file).name, usage="%(prog)s [--flag value ...]", description=doc.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    source = "".join(inspect.getsource(base) for base in (RunConfig, Config))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
    kinds = typing.get_type_hints(Config)
    own = Config.__annotations__
    for field in sorted(dataclasses.fields(Config), key=lambda field: field.name not in own):
        kind, tiny = kinds[field.name], getattr(TINY, field.name)
        default = f"default: {field.default}" + (f", tiny: {tiny}" if tiny != field.default else "")
        text = comments.get(field.name, "") + (f" ({default})" if field.default != "" else "")
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            options = {"choices": typing.get_args(kind)}
        elif kind in (int, float, str):
            options = {"type": kind, "metavar": kind.__name__.upper()}
        else:
            raise TypeError(f"{field.name}: a flag is int, float, str, bool or Literal, not {kind}")
        parser.add_argument(flag(field.name), help=text.replace("%", "%%"), **options)
    return parser


def make_config(typed, Config, TINY, method):
    """The Config of the flags given, over TINY with --tiny, over a run's with --resume. If
    --epochs is given and --warmup is not, the warm-up is at most a fifth of it."""
    if "resume" not in typed:
        base = TINY if typed.get("tiny") else Config()
        if "epochs" in typed:
            typed.setdefault("warmup", min(base.warmup, typed["epochs"] / 5))
        return dataclasses.replace(base, **typed)
    saved = read_config(typed["resume"], method)["config"]
    known = {field.name for field in dataclasses.fields(Config)}
    for name in sorted(known ^ set(saved)):
        print(f"{flag(name)}: {'new, takes its default' if name in known else 'is gone'}")
    saved = {name: value for name, value in saved.items() if name in known}
    for name, value in typed.items():
        require(name in RESUMABLE or value == saved.get(name), f"{flag(name)} {value}: "
                f"{typed['resume']} was started with {saved.get(name)}, and a resumed run keeps it")
    if find_checkpoints(typed["resume"]):
        saved.pop("init", None)  # the checkpoint has the weights
    return Config(**{**saved, **typed, "out": typed["resume"]})


def read_config(folder, method):
    """config.json of a run of `method`. Raises UserError."""
    try:
        facts = json.loads(Path(folder, "config.json").read_text())
        require(method == facts["method"], f"{folder} is a run of {facts['method']}.py")
        return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not the folder of a run: config.json: {error}") from error


@contextlib.contextmanager
def report_errors(parser):
    """Ends the program with one line and status 2 after a UserError or OSError, 1 after a
    FloatingPointError."""
    try:
        yield
    except (UserError, OSError) as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def run_program(file, doc, Config, TINY, train, argv=None):
    """Runs train(Config of the flags `argv`)."""
    parser = make_parser(file, doc, Config, TINY)
    typed = vars(parser.parse_args(argv))
    with report_errors(parser):
        folder = train(make_config(typed, Config, TINY, Path(file).stem))
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"next: python eval_linear.py {folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


# Processes and numerics

def start_processes(device="auto"):
    """(device, rank, world) of this process; joins the others if torchrun started it."""
    cuda = torch.cuda.is_available() and device != "cpu"
    require(cuda or device != "cuda", "--device cuda: no CUDA GPU is available")
    rank, world, local_rank = 0, 1, 0
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if all(name in os.environ for name in names):
        rank, world, local_rank = (int(os.environ[name]) for name in names)
    require(not cuda or local_rank < torch.cuda.device_count(), "--nproc-per-node exceeds the GPUs")
    device = torch.device(f"cuda:{local_rank}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # full float32
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12),
                                device_id=device if cuda else None)
    return device, rank, world


def seed_step(seed, step, rank=0):
    """Makes the random numbers of a step depend on (seed, step, rank) alone: exact resume."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def use_bfloat16(device, amp=True):
    """Whether to compute in bfloat16: with --amp, on devices that have it natively."""
    if device.type == "cuda":
        return amp and torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    return bool(amp and (cpu.get("amx_bf16") or cpu.get("avx512_bf16")))


def autocast(device, amp=True):
    """bfloat16 autocast if `use_bfloat16`, else none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(device, amp))


# Batches

def fixed_choice(n, count):
    """`count` of n ids, or all, always the same."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]


def load_data(cfg):
    """Training and test Images of a Config; None for a missing test split."""
    side = round(cfg.img * 8 / 7)
    train, test = (load_images(cfg.data, split, side, cfg.root, cfg.seed)
                   for split in ("train", "test"))
    if cfg.images:
        require(cfg.images <= len(train), f"--images {cfg.images}: there are {len(train)}")
        train = train[fixed_choice(len(train), cfg.images)]
    return train, test


class Batches:
    """`batches[step]`: Images of a step, with only the pixels on the device. An epoch is a
    permutation that (seed, epoch) determines; the last incomplete batch is dropped.

    The pixels stay on the GPU if they take less than a quarter of its free memory.
    """
    def __init__(self, images, batch, seed, device, rank=0, world=1):
        require(batch * world <= len(images), f"--batch {batch}: there are {len(images)} training "
                f"images; try --batch {len(images) // world}")
        self.images, self.batch, self.seed = images, batch, seed
        self.device, self.rank, self.world = device, rank, world
        self.epoch = self.order = None
        if device.type == "cuda" and images.pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            self.images = images.to(device)

    def __len__(self):
        return len(self.images) // (self.batch * self.world)

    def ids(self, step):
        """Ids of the images of batches[step], int64 (B,)."""
        epoch, i = divmod(step, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.images), generator=generator)
        start = (i * self.world + self.rank) * self.batch
        return self.order[start:start + self.batch]

    def __getitem__(self, step):
        ids = self.ids(step)
        pixels = self.images.pixels[ids.to(self.images.pixels.device, non_blocking=True)]
        if pixels.device != self.device:
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return Images(pixels, self.images.labels[ids], self.images.aspect[ids])


# Evaluation

@torch.no_grad()
def extract_features(encoder, images, img, device, amp=True):
    """encoder.features of the central crops of Images: float32 (N, D) on the device."""
    rows = []
    for ids in torch.arange(len(images)).split(250):
        x = normalize(central_crop(images[ids].to(device), img))
        with autocast(device, amp):
            rows.append(encoder.features(x).float())
    return torch.cat(rows)


def knn_accuracy(features, labels, queries, query_labels, k=20, tau=0.07):
    """Top-1 accuracy in 0…1 of `queries` (Q, D): the k rows of `features` (N, D) with the highest
    cosine vote for their labels, each with weight exp(cosine / tau)."""
    bank, correct = F.normalize(features.float(), dim=1), 0
    for q, truth in zip(queries.split(500), query_labels.split(500)):
        cosine, nearest = (F.normalize(q.float(), dim=1) @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(q), int(labels.max()) + 1, device=q.device)
        votes.scatter_add_(1, labels[nearest], (cosine / tau).exp())
        correct += (votes.argmax(1) == truth).sum().item()
    return correct / len(queries)


def effective_rank(features):
    """RankMe, arXiv 2210.02885: exp of the entropy of the singular values of (N, D), each as a
    fraction of their sum. 1 … min(N, D)."""
    if not features.isfinite().all():
        raise FloatingPointError("features are not finite")
    sigma = torch.linalg.svdvals(features.float())
    p = sigma / sigma.sum().clamp(min=1e-12) + 1e-7
    return torch.special.entr(p).sum().exp().item()


# Checkpoints

def save_file(state, file, previous=None):
    """Saves beside `file` and moves the result over it; the old file becomes `previous`."""
    part = file.with_suffix(".part")
    try:
        torch.save(state, part)
    except RuntimeError as error:  # a full disk
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {file}: {error}") from error
    if previous and file.exists():
        os.replace(file, previous)
    os.replace(part, file)


def read_file(file):
    """What torch.save wrote. Raises UserError if the file is missing or damaged."""
    require(os.path.isfile(file), f"{file}: no such file")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                require(archive.testzip() is None, "a checksum is wrong")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} is damaged or not a checkpoint: {repr(error)[:99]}") from error


def save_checkpoint(folder, method, step, cfg, **parts):
    """Writes the state of `parts` after `step` steps to last.pt; the old one is previous.pt."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"method": method, "step": step, "config": dataclasses.asdict(cfg)}
    save_file(state, Path(folder, "last.pt"), Path(folder, "previous.pt"))


def find_checkpoints(run):
    """Those of last.pt and previous.pt that exist."""
    files = Path(run, "last.pt"), Path(run, "previous.pt")
    return [file for file in files if file.exists()]


def load_checkpoint(path, **parts):
    """Loads a checkpoint, or the newest one of a run folder, into `parts`. Returns all it holds:
    "method", "step", "config" and the state dict of each part. Raises UserError."""
    files = find_checkpoints(path) if Path(path).is_dir() else [Path(path)]
    require(files, f"{path} holds no checkpoint")
    state = read_file(files[0])
    require(isinstance(state, dict) and "method" in state, f"{files[0]} is not a run's checkpoint")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{files[0]} does not fit: {reason}") from error
    return state


def load_encoder(encoder, path):
    """Loads the encoder of a run, a checkpoint, an encoder.pt or a timm ViT. Raises UserError."""
    path = Path(path)
    state = read_file(path / "encoder.pt" if path.is_dir() else path)
    try:
        state = state.get("model", state)  # of a checkpoint, or of MAE's published files
        own = {name[8:]: state[name] for name in state if name.startswith("encoder.")}
        timm = {name: state[name] for name in state if not name.startswith("head.")}
        encoder.load_state_dict(own or timm)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"--init {path}: {' '.join(str(error).split())[:300]}") from error


# The run

class Run:
    """The folder of a run; only the first process writes. `start`: the first step to do.

    After Ctrl-C or SIGTERM the next log sets `interrupted`.
    """
    def __init__(self, file, cfg, batches, steps, **parts):
        self.method, self.cfg, self.parts = Path(file).stem, cfg, parts
        self.folder = Path(cfg.out or time.strftime(f"runs/{self.method}-%Y%m%d-%H%M%S"))
        self.per_epoch, self.steps, self.start, self.step = len(batches), steps, 0, 0
        self.device, self.rank, self.world = batches.device, batches.rank, batches.world
        self.rows, self.columns, self.sums, self.count = [], [], {}, 0
        self.signal, self.interrupted = 0, False
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                                capture_output=True).stdout.strip() if shutil.which("git") else ""
        facts = {"method": self.method, "config": dataclasses.asdict(cfg),
                 "images": len(batches.images), "processes": self.world,
                 "precision": "bfloat16" if use_bfloat16(self.device, cfg.amp) else "float32",
                 "command": shlex.join(sys.argv), "torch": torch.__version__, "git": commit}
        if cfg.resume:
            saved = read_config(self.folder, self.method)
            for name in ("images", "processes"):
                require(saved[name] == facts[name], f"--resume {self.folder}: it was started with "
                        f"{saved[name]} {name}; there are {facts[name]}")
            if find_checkpoints(self.folder):
                self.start = self.step = load_checkpoint(self.folder, **parts)["step"]
                with open(self.folder / "metrics.csv", newline="") as table:
                    whole = [row for row in csv.DictReader(table) if None not in row.values()]
                self.rows = [row for row in whole if int(row["step"]) <= self.start]
        elif self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            require(not any(self.folder.iterdir()),
                    f"--out {self.folder} is not empty; --resume continues a run")
            (self.folder / "config.json").write_text(json.dumps(facts, indent=1) + "\n")
        if self.rank == 0:
            size = sum(p.numel() for p in parts["model"].parameters()) / 1e6
            print(f"{self.method} on {self.device}: {size:.1f} M parameters, steps "
                  f"{self.start:,} to {steps:,}, folder {self.folder}", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        self.began = self.clock = time.time()
        self.drawn = 0

    def stop(self, number, frame):
        """Notes a signal. With one process a second one ends the program."""
        if self.world == 1:
            signal.signal(number, signal.SIG_DFL)
        if self.rank == 0 and not self.signal:
            os.write(2, b"\nstopping after this step\n")
        self.signal = number

    def write(self, row):
        """Appends a row to metrics.csv, or rewrites it if the row has a new column."""
        self.rows.append(row)
        file = self.folder / "metrics.csv"
        if set(row) <= set(self.columns):
            with open(file, "a", newline="") as table:
                csv.DictWriter(table, self.columns).writerow(row)
            return
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        part = file.with_suffix(".part")
        with open(part, "w", newline="") as table:
            writer = csv.DictWriter(table, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, file)

    def log(self, step, losses):
        """Writes the mean losses every --log-every steps. Raises FloatingPointError."""
        self.step = step + 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1
        in_epoch = self.step % self.per_epoch  # 0 at its end
        due = in_epoch % self.cfg.log_every == 0 or self.step == self.steps
        if not due and not (self.signal and self.world == 1):
            return
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        if not all(math.isfinite(value) for value in means.values()):
            raise FloatingPointError(f"by step {self.step} the loss is not finite: {means}")
        signals = torch.tensor(self.signal, device=self.device)
        if self.world > 1:
            dist.all_reduce(signals, dist.ReduceOp.MAX)
        self.interrupted = bool(signals)
        self.signal = self.signal or int(signals)
        if self.rank == 0:
            pace = (time.time() - self.clock) / self.count
            speed = self.cfg.batch * self.world / pace
            left = datetime.timedelta(seconds=round((self.steps - self.step) * pace))
            epoch, lr = self.step / self.per_epoch, self.parts["optimizer"].param_groups[0]["lr"]
            first, *others = [f"{name} {value:.4f}" for name, value in means.items()]
            print(f"epoch {epoch:.2f}/{self.cfg.epochs:g}  {first}  {speed:,.0f} images/s  "
                  f"{left} left  {'  '.join(others)}", flush=True)
            self.write({"step": self.step, "epoch": epoch, "lr": lr, **means,
                        "images_per_second": round(speed, 1)})
        self.sums, self.count, self.clock = {}, 0, time.time()

    def epoch_done(self, step):
        """Whether an epoch or the training ends here, or Ctrl-C ends it."""
        return (step + 1) % self.per_epoch == 0 or step + 1 == self.steps or self.interrupted

    def save(self, step):
        """Writes encoder.pt, then last.pt."""
        if self.rank == 0:
            weights = self.parts["model"].encoder.state_dict()
            save_file({name: weights[name].cpu() for name in weights}, self.folder / "encoder.pt")
            save_checkpoint(self.folder, self.method, step + 1, self.cfg, **self.parts)
        self.clock = time.time()

    def evaluate(self, train, test):
        """Effective rank of 2,000 training images, and kNN of 1,000 test images among 5,000, if
        both sets are labelled. Every --eval-every epochs, and at the end."""
        every = self.cfg.eval_every * self.per_epoch
        due = every > 0 and (self.step == self.steps or self.step % every == 0)
        if self.rank > 0 or not due:
            return

        def features(images, count, labelled=False):
            ids = (images.labels >= 0).nonzero()[:, 0] if labelled else torch.arange(len(images))
            images = images[ids[fixed_choice(len(ids), count)]]
            encoder, cfg = self.parts["model"].encoder, self.cfg
            return (extract_features(encoder, images, cfg.img, self.device, cfg.amp),
                    images.labels.to(self.device))

        rank = effective_rank(features(train, 2000)[0])
        row = {"step": self.step, "epoch": self.step / self.per_epoch, "rank": rank}
        text = f"epoch {row['epoch']:g}: effective rank {rank:.1f}"
        if test and (train.labels >= 0).any():
            bank, queries = features(train, 5000, True), features(test, 1000, True)
            row["knn"] = knn_accuracy(*bank, *queries)
            text += (f", kNN top-1 {100 * row['knn']:.1f} % ({len(queries[0]):,} test images "
                     f"among {len(bank[0]):,} training images)")
        self.write(row)
        print(text, flush=True)
        self.clock = time.time()

    def draw(self, images):
        """curves.png and reconstruction.png, at most once a minute and at the end."""
        if self.rank > 0 or (self.step < self.steps and time.time() < self.drawn + 60):
            return
        batch = images[fixed_choice(len(images), 8)].to(self.device)
        x = normalize(central_crop(batch, self.cfg.img))
        masked, prediction = self.parts["model"].reconstruct(x)
        plot_images(self.folder / "reconstruction.png",
                    {"original": x, "masked": masked, "reconstruction": prediction})
        plot_curves(self.folder / "curves.png", self.rows)
        self.drawn = self.clock = time.time()

    def finish(self):
        """Returns the folder. After a signal: exits with 128 + signal."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.rank == 0:
            text = "done:" if self.step == self.steps else "stopped; continue with --resume"
            passed = datetime.timedelta(seconds=round(time.time() - self.began))
            print(f"{text} {self.folder} ({passed})", flush=True)
        if self.signal:
            raise SystemExit(128 + self.signal)
        return self.folder
