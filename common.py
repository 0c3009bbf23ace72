"""What no paper is about: command line, processes, schedule, kNN, checkpoints, log.

Data sets and augmentation stand in images.py, pictures in pictures.py; a method file takes all from here.
"""
import argparse, csv, dataclasses, datetime, errno, gc, inspect, json, math, os, pathlib, re, shlex, shutil, signal
import subprocess, sys, time, typing

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

from images import (Batches, UserError, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, central_crop,
                    check, class_names, color_jitter, crop_boxes, crop_resize, denormalize, gaussian_blur, load_images,
                    normalize, random_grayscale, random_hflip, random_resized_crop, resize)
from pictures import draw_curves, draw_images

RESUMABLE = {  # these may change when a run is resumed
    "resume", "run", "tiny", "root", "device", "compile", "workers", "knn_every", "log_every", "test_every"}


# Command line

class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def command_line(method, Config, TINY, argv=None):
    """The Config that `argv` asks for: a field is a flag (`run`: a bare word), its comment the help, its Literal the
    choices.

    What is typed goes over TINY with --tiny, over the run's own config with --resume. Raises UserError.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    about = inspect.getdoc(sys.modules[Config.__module__]).split("\n\n")[0]
    parser = Parser(f"{method}.py", description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, kind in typing.get_type_hints(Config).items():
        form = ({"nargs": "?", "metavar": "RUN"} if name == "run" else
                {"action": argparse.BooleanOptionalAction} if kind is bool else
                {"choices": typing.get_args(kind)} if typing.get_origin(kind) is typing.Literal else
                {"type": kind, "metavar": kind.__name__.upper()})
        text = f"{comments[name]} (default: {getattr(Config, name)!r}, tiny: {getattr(TINY, name)!r})"
        word = name if name == "run" else "--" + name.replace("_", "-")
        parser.add_argument(word, help=text.replace("%", "%%"), **form)
    typed = vars(parser.parse_intermixed_args(argv))
    if "resume" not in typed:
        return dataclasses.replace(TINY if typed.get("tiny") else Config(), **typed)
    run = pathlib.Path(typed["resume"])
    saved = read_facts(run, method, Config)["config"]
    for name, value in typed.items():
        check(name in RESUMABLE or value == saved[name], f"--{name.replace('_', '-')}", value,
              f"{run} was started with {saved[name]!r}, and a resumed run keeps what shapes its result")
    return Config(**{**saved, **typed, "out": str(run)})


def read_facts(run, method, Config):
    """What config.json of a run of `method` holds. Raises UserError where there is none, or another method's."""
    check((run / "config.json").is_file(), "--resume", run, "is not the folder of a run: it holds no config.json")
    try:
        facts = json.loads((run / "config.json").read_text())
        theirs, names = facts["method"], set(facts["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {run}: its config.json is broken ({error})") from error
    check(theirs == method, "--resume", run, f"is a run of {theirs}.py")
    ours = {field.name for field in dataclasses.fields(Config)}
    check(names == ours, "--resume", run, f"was started by another {method}.py: {sorted(names ^ ours)} differ")
    return facts


def launch(method, Config, TINY, train, argv=None):
    """Runs a method's command line. Returns the exit status of `answer`."""
    return answer(f"{method}.py", lambda: train(command_line(method, Config, TINY, argv)))


def answer(program, job):
    """Runs job(). Returns the exit status: 2, one line on standard error says what the user can mend; 1, the loss blew
    up; 130, ^C."""
    try:
        job()
        return 0
    except UserError as error:
        line, status = str(error), 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        line, status = f"{error}{'; the last checkpoint is still good' if full else ''}", 2
    except torch.OutOfMemoryError:
        line, status = "out of GPU memory: lower --batch, --img, --dim or --depth, or take --device cpu", 2
    except FloatingPointError as error:
        line, status = str(error), 1
    except KeyboardInterrupt:
        line, status = "stopped before anything was saved", 130
    finally:
        if dist.is_initialized():
            gc.collect()  # the model goes first: its averaging still holds the group
            dist.destroy_process_group()
    print(f"{program}: {line}", file=sys.stderr)
    return status


def check_least(cfg, least, names):
    """Raises UserError where one of the fields `names` is below `least`, or not finite."""
    for name in names.split():
        check(least <= getattr(cfg, name) < math.inf, "--" + name.replace("_", "-"), getattr(cfg, name),
              f"must be at least {least}")


def check_training(cfg):
    """Raises UserError where a field that every training has is out of range."""
    check_least(cfg, 1, "epochs batch log_every")
    check_least(cfg, 0, "wd warmup workers seed")
    check(cfg.warmup < cfg.epochs, "--warmup", cfg.warmup, f"must be below --epochs {cfg.epochs}")
    check(cfg.seed < 2 ** 32, "--seed", cfg.seed, "must be below 2^32")
    check(0 < cfg.lr < math.inf, "--lr", cfg.lr, "must be above 0 (the rate for a batch of 256)")


def check_config(cfg):
    """Raises UserError where a field that every method has is out of range."""
    check_training(cfg)
    check_least(cfg, 1, "img patch dim depth heads")
    check_least(cfg, 0, "knn_every")
    check(cfg.img % cfg.patch == 0, "--patch", cfg.patch, f"must divide --img {cfg.img}")
    check(cfg.dim % (4 * cfg.heads) == 0, "--dim", cfg.dim, f"must be a multiple of 4 times --heads {cfg.heads}")


# Processes and numerics

Here = typing.NamedTuple("Here", [("rank", int), ("world", int), ("device", torch.device)])  # where this process runs


def start_processes(device="auto"):
    """Joins torchrun's processes, if it started this one, and picks the device. Raises UserError without CUDA."""
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available() and device != "cpu"
    check(cuda or device != "cuda", "--device", device, "no CUDA GPU is at hand; cpu and auto will run")
    if cuda:
        torch.cuda.set_device(local)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12))
    return Here(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"))


def autocast(device, amp=True):
    """bfloat16 autocast where the device computes in bfloat16, else float32."""
    cpu = torch.cpu.get_capabilities()
    able = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(amp and able))


def seed_step(seed, step, rank=0):
    """Makes all random numbers of a step a function of (seed, step, rank): a resumed run draws the same."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def cosine_lr(step, steps, warmup, peak):
    """Learning rate of step 0 … steps - 1: a line up to `peak` over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def param_groups(model, wd):
    """AdamW's groups of what is trained: no weight decay on biases and norms (one-dimensional), tokens, positions."""
    groups = [{"params": [], "weight_decay": wd}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim < 2 or "token" in name or "pos" in name]["params"].append(p)
    return groups


# Evaluation

@torch.no_grad()
def extract_features(encoder, images, img, here, amp=True, aspect=None):
    """encoder.features of uint8 images (N, 3, S, S), of width over height `aspect` (N,), cropped by central_crop to
    img×img: float32 (N, D) on the device."""
    rows = []
    for ids in torch.arange(len(images)).split(250):
        x = central_crop(images[ids].to(here.device), img, None if aspect is None else aspect[ids])
        with autocast(here.device, amp):
            rows.append(encoder.features(normalize(x)).float())
    return torch.cat(rows)


def knn_votes(features, labels, queries, k=20, tau=0.07):
    """(Q, classes): the k rows of `features` (N, D) nearest by cosine vote for their labels, by exp(cosine / tau)."""
    bank, votes = F.normalize(features.float(), dim=1), []
    for q in F.normalize(queries.float(), dim=1).split(500):
        similarity, nearest = (q @ bank.T).topk(min(k, len(bank)))                         # (500, k)
        vote = torch.zeros(len(q), int(labels.max()) + 1, device=q.device)
        votes.append(vote.scatter_add(1, labels[nearest], (similarity / tau).exp()))
    return torch.cat(votes)


def knn_accuracy(features, labels, queries, query_labels, k=20, tau=0.07):
    """Top-1, 0…1, of weighted k-nearest-neighbour classification of `queries` (Q, D)."""
    return (knn_votes(features, labels, queries, k, tau).argmax(1) == query_labels).double().mean().item()


def online_knn(encoder, train, test, cfg, here):
    """knn_accuracy on the same 5,000 and 1,000 labelled images of load_images' triples `train` and `test` each time."""
    parts = []
    for (images, labels, aspect), n in ((train, 5_000), (test, 1_000)):
        ids = (labels >= 0).nonzero().flatten()
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:n]]
        parts.append(extract_features(encoder, images[ids], cfg.img, here, cfg.amp, aspect[ids]))
        parts.append(labels[ids].to(here.device))
    return knn_accuracy(*parts)


# The run on disk

def git_commit():
    """The commit of these files, "" outside a repository."""
    ask = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def save_file(state, file):
    """Writes `state` beside `file`, then moves it over, so that `file` is always whole. Raises UserError, disk full."""
    part = file.with_suffix(".part")
    try:
        torch.save(state, part)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{file}: can't be written ({error}); the checkpoint before is still good") from error
    os.replace(part, file)


def save_checkpoint(file, method, cfg, step, **parts):
    """Writes the state of `parts` (model, optimizer, …) to `file`; the one before becomes previous.pt beside it."""
    file, state = pathlib.Path(file), {"method": method, "config": dataclasses.asdict(cfg), "step": step}
    new = file.with_suffix(".new")
    save_file({**state, **{name: part.state_dict() for name, part in parts.items()}}, new)
    if file.exists():
        os.replace(file, file.with_name("previous.pt"))
    os.replace(new, file)


def load_checkpoint(file, method=None, **parts):
    """Reads a file of save_checkpoint, or a run's newest, into `parts`; returns it. Raises UserError if it can't."""
    file = pathlib.Path(file)
    file = file / ("last.pt" if (file / "last.pt").exists() else "previous.pt") if file.is_dir() else file
    check(file.is_file(), "checkpoint", file, "does not exist")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, EOF, runtime: torch names no narrower one
        raise UserError(f"checkpoint {file}: is truncated or no checkpoint ({type(error).__name__}); if it "
                        "is a run's last.pt, delete it: previous.pt, the one before, is then taken") from error
    check(isinstance(state, dict) and "method" in state, "checkpoint", file, "is not a last.pt of this project")
    check(method in (None, state["method"]), "checkpoint", file, f"is of {state['method']}, not of {method}")
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"checkpoint {file}: does not fit: {' '.join(str(error).split())[:300]}") from error
    return state


class Run:
    """The folder of a run: config, metrics, curves, pictures, checkpoints; only the first process writes.

    After SIGINT or SIGTERM the loop finishes its step, `save` saves, and `stopped` is true. `columns`: what is
    written once an epoch by `write`. Raises UserError for an --out that holds something.
    """
    def __init__(self, method, cfg, here, per_epoch, columns=("knn",)):
        self.folder = pathlib.Path(cfg.out or time.strftime(f"runs/{method}-%Y%m%d-%H%M%S"))
        self.method, self.cfg, self.here, self.per_epoch, self.columns = method, cfg, here, per_epoch, columns
        self.rows, self.sums, self.signal, self.drawn, self.logged, self.leaving, self.stopped = [], {}, 0, 0, 0, 0, 0
        if not cfg.resume and here.rank == 0:
            check(not self.folder.exists() or self.folder.is_dir() and not any(self.folder.iterdir()), "--out",
                  self.folder, "must be new or empty; --resume goes on with a run")
            self.folder.mkdir(parents=True, exist_ok=True)
            facts = {"method": method, "config": dataclasses.asdict(cfg), "command": shlex.join(sys.argv),
                     "git": git_commit(), "python": sys.version.split()[0], "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "processes": here.world, "device": str(here.device)}
            (self.folder / "config.part").write_text(json.dumps(facts, indent=1) + "\n")
            os.replace(self.folder / "config.part", self.folder / "config.json")
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, self.stop)
        self.began = self.clock = time.time()

    def stop(self, sign, frame):
        """Notes a signal for `log`; a second one ends the program at once."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.signal = sign

    def resume(self, **parts):
        """The step to go on from, 0 in a new run. Reads the checkpoint into `parts`, and the metrics up to it."""
        if not self.cfg.resume:
            return 0
        started = json.loads((self.folder / "config.json").read_text())["processes"]
        check(started == self.here.world, "--resume", self.folder, f"was started with {started} processes")
        self.logged = load_checkpoint(self.folder, self.method, **parts)["step"]
        with open(self.folder / "metrics.csv", newline="") as file:
            whole = [row for row in csv.DictReader(file) if None not in row.values()]
        for row in whole if self.here.rank == 0 else ():
            if int(row["step"]) <= self.logged:
                self.write(row)
        return self.logged

    def write(self, row):
        """Adds a row, column → value, to metrics.csv; the first one of this process begins the file anew."""
        with open(self.folder / "metrics.csv", "a" if self.rows else "w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0] if self.rows else row)
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)

    def log(self, step, losses, lr):
        """Sums a step's terms; every --log-every steps, at the end of an epoch and after a signal, writes their means.

        The one place where the loop waits for the device. Raises FloatingPointError when a term is not finite.
        """
        for name, value in losses.items():
            total, n = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value.detach(), n + 1
        self.leaving = self.signal > 0 and self.here.world == 1  # several processes agree on it below
        if step % self.cfg.log_every and step % self.per_epoch and not self.leaving:
            return
        means, self.sums = {name: float(total) / n for name, (total, n) in self.sums.items()}, {}
        terms = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"loss not finite by step {step}: {terms}; last good checkpoint: {self.last()}")
        if self.here.world > 1:
            asked = torch.tensor(self.signal, device=self.here.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.signal, self.leaving = int(asked), bool(asked)
        pace = (time.time() - self.clock) / (step - self.logged)
        if self.here.rank == 0:
            speed, epoch, epochs = self.cfg.batch * self.here.world / pace, step / self.per_epoch, self.cfg.epochs
            row = {"step": step, "epoch": round(epoch, 4), "lr": lr, **dict.fromkeys(self.columns, "")}
            self.write({**row, **means, "images_per_second": round(speed, 1)})
            left = datetime.timedelta(seconds=round((epochs - epoch) * self.per_epoch * pace))
            line = f"epoch {epoch:.2f}/{epochs}  step {step}  {terms}  {speed:,.0f} images/s  {left} left"
            print(f"\r\033[K{line}" if sys.stdout.isatty() else f"{line}\n", end="", flush=True)
        self.logged, self.clock = step, time.time()

    def last(self):
        """The newest checkpoint on disk, or "none yet"."""
        return next((str(f) for f in (self.folder / "last.pt", self.folder / "previous.pt") if f.exists()), "none yet")

    def save(self, step, train, test, model, **parts):
        """At the end of an epoch or after a signal: encoder.pt, kNN check and pictures if due, then the checkpoint.

        train, test: (images, labels) of load_images, or None for neither kNN nor images in the pictures; parts: what
        else the checkpoint holds. Pictures are drawn at most once a minute, and at the end. Raises FloatingPointError
        if a weight is not finite.
        """
        epoch, rest = divmod(step, self.per_epoch)
        if rest and not self.leaving:
            return
        if self.here.rank == 0:
            if not all(p.isfinite().all() for p in model.parameters()):
                raise FloatingPointError(f"a weight is not finite at step {step}; last good checkpoint: {self.last()}")
            save_file(model.encoder.state_dict(), self.folder / "encoder.pt")
            if train is not None and not rest and self.cfg.knn_every and epoch % self.cfg.knn_every == 0:
                knn = online_knn(model.encoder, train, test, self.cfg, self.here)
                self.write({"step": step, "epoch": epoch, "knn": knn})
                print(f"{chr(10) * sys.stdout.isatty()}kNN top-1 after epoch {epoch}: {100 * knn:.1f} %", flush=True)
            if self.leaving or epoch == self.cfg.epochs or time.time() - self.drawn > 60:
                if test is not None:
                    eight = torch.randperm(len(test[0]), generator=torch.Generator().manual_seed(0))[:8]
                    images = normalize(resize(test[0][eight].to(self.here.device), self.cfg.img))
                    masked, prediction = model.reconstruct(images)
                    draw_images(self.folder / "reconstruction.png",
                                {"original": images, "masked": masked, model.restored: prediction})
                draw_curves(self.folder / "curves.png", self.rows)
                self.drawn = time.time()
            save_checkpoint(self.folder / "last.pt", self.method, self.cfg, step, model=model, **parts)
        self.stopped, self.clock = self.leaving, time.time()

    def finish(self, following="eval_linear.py"):
        """Says where everything is and which program is next; returns the folder, or exits with 128 + the signal."""
        for sign, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(sign, usual)
        if self.here.rank == 0:
            seconds, cuda = round(time.time() - self.began), self.here.device.type == "cuda"
            peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory" if cuda else ""
            following = f"{self.method}.py --resume" if self.stopped else following
            python = min(sys.executable, os.path.relpath(sys.executable), key=len)
            print(f"{chr(10) * sys.stdout.isatty()}{'stopped' if self.stopped else 'done'} after "
                  f"{datetime.timedelta(seconds=seconds)}{peak}; pictures, metrics, checkpoints: {self.folder}")
            if following:
                print(f"next: {python} {following} {shlex.quote(str(self.folder))}")
        if self.stopped:
            raise SystemExit(128 + self.signal)
        return self.folder
