"""What no paper is about: command line, processes, schedule, data, log.

Images are in images.py; checkpoints, kNN and effective rank in weights.py. A method file imports all of it from here.
"""
import argparse, csv, dataclasses, datetime, gc, inspect, json, math, os, pathlib, re, shlex, shutil, signal, subprocess
import sys, time, typing

import torch
import torch.distributed as dist
import torchvision

from images import (Batches, UserError, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, central_crop,
                    check, class_names, color_jitter, crop_boxes, crop_resize, denormalize, gaussian_blur, load_images,
                    normalize, random_grayscale, random_hflip, random_resized_crop, resize)
from pictures import draw_curves, draw_images, reconstruction_rows
from weights import (autocast, check_features, cosine_lr, effective_rank, extract_features, fixed_choice, init_encoders,
                     keep_memory, knn_accuracy, knn_votes, load_checkpoint, newest, online_knn, param_groups, recompute,
                     save_checkpoint, save_file, timm_call)

RESUMABLE = {  # these may change when a run is resumed
    "resume", "tiny", "root", "device", "compile", "recompute", "workers", "knn_every", "log_every", "test_every"}


# Command line

class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def command_line(method, Config, TINY, argv=None):
    """The Config that `argv` asks for: a field is a flag (`run`: a bare word), its comment the help, its Literal the
    choices; a comment above fields is the heading of a group.

    What is typed goes over TINY with --tiny, over the run's own config with --resume. A warm-up that is not typed is at
    most a fifth of the epochs. Raises UserError.
    """
    about, kinds = inspect.getdoc(sys.modules[Config.__module__]), typing.get_type_hints(Config)
    examples = re.findall(rf"^ +((?:python|torchrun).*{method}\.py.*)", about, re.M)[:2]
    parser = Parser(f"{method}.py", usage=f"%(prog)s{' RUN' * ('run' in kinds)} [--flag value …]", allow_abbrev=False,
                    description=about.split("\n\n")[0], epilog="\n  ".join(["examples:", *examples]),
                    formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for heading, name, text in re.findall(r"^    (?:# (.+)|(\w+): .*?  # (.*))$", inspect.getsource(Config), re.M):
        if heading:
            group = parser.add_argument_group(heading)
            continue
        kind, default, tiny = kinds[name], getattr(Config, name), getattr(TINY, name)
        form = ({"nargs": "?", "metavar": "RUN"} if name == "run" else
                {"action": argparse.BooleanOptionalAction} if kind is bool else
                {"choices": typing.get_args(kind)} if typing.get_origin(kind) is typing.Literal else
                {"type": kind, "metavar": kind.__name__.upper()})
        text += f" (default: {default}{f', tiny: {tiny}' * (tiny != default and name != 'tiny')})" * (default != "")
        word = name if name == "run" else "--" + name.replace("_", "-")
        group.add_argument(word, help=text.replace("%", "%%"), **form)
    typed = vars(parser.parse_intermixed_args(argv))
    if "resume" not in typed:
        base = TINY if typed.get("tiny") else Config()
        typed.setdefault("warmup", min(base.warmup, typed.get("epochs", base.epochs) / 5))
        return dataclasses.replace(base, **typed)
    run = pathlib.Path(typed["resume"])
    saved = read_facts(run, method, Config)["config"]
    for name, value in typed.items():
        check(name in RESUMABLE or value == saved[name], {"run": "RUN"}.get(name, f"--{name.replace('_', '-')}"), value,
              f"{run} was started with {saved[name]!r}, and a resumed run keeps what shapes its result")
    return Config(**{**saved, **typed, "out": str(run)})


def read_facts(run, method, Config):
    """What config.json of a run of `method` holds. Raises UserError where there is none, or another method's."""
    check((run / "config.json").is_file(), "--resume", run, "is not the folder of a run: it holds no config.json")
    try:
        facts = json.loads((run / "config.json").read_text())
        theirs, names, _ = facts["method"], set(facts["config"]), int(facts["processes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {run}: its config.json is broken ({error})") from error
    check(theirs == method, "--resume", run, f"is a run of {theirs}.py")
    ours = {field.name for field in dataclasses.fields(Config)}
    check(names == ours, "--resume", run, f"was started by another {method}.py: {sorted(names ^ ours)} differ")
    return facts


def launch(method, Config, TINY, train, argv=None):
    """Runs a method's command line. Returns the exit status of `answer`."""
    smaller = "lower --batch" + ", --img, --dim or --depth, or add --recompute" * hasattr(Config, "recompute")
    return answer(f"{method}.py", lambda: train(command_line(method, Config, TINY, argv)), smaller)


def answer(program, job, smaller="lower --batch"):
    """Runs job(). Returns the exit status: 2, one line on standard error says what to mend (`smaller`: where a GPU's
    memory is full); 1, the loss blew up; 130, ^C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has it not
            stream.reconfigure(errors="replace")  # a file on Windows may know no Greek letters
    line, status, stop = "", 0, None
    try:
        job()
    except SystemExit as error:  # --help, or a signal, which all processes get
        stop = error
    except (UserError, OSError) as error:
        line, status = str(error), 2
    except RuntimeError as error:  # torch's, cuBLAS's or NCCL's
        if not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        line, status = f"out of GPU memory: {smaller}", 2
    except FloatingPointError as error:
        line, status = str(error), 1
    except KeyboardInterrupt:
        line, status = "stopped; what was saved before, if anything, is still there", 130
    if line:
        print(f"{program}: {line}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        if line:  # NCCL would wait here for the other processes, which wait for this one; torchrun ends them
            os._exit(status)
        gc.collect()  # the model goes first: its averaging still holds the group
        dist.destroy_process_group()
    if stop:
        raise stop
    return status


def check_each(cfg, names, ok, right):
    """Raises UserError, which says what is `right`, where ok(value) is false of one of the fields `names`."""
    for name in names.split():
        check(ok(getattr(cfg, name)), "--" + name.replace("_", "-"), getattr(cfg, name), right)


def check_least(cfg, least, names):
    """Raises UserError where one of the fields `names` is below `least`, or not finite."""
    check_each(cfg, names, lambda value: least <= value < math.inf, f"must be at least {least}")


def check_above(cfg, low, names):
    """Raises UserError where one of the fields `names` is not above `low`, or not finite."""
    check_each(cfg, names, lambda value: low < value < math.inf, f"must be above {low}")


def check_share(cfg, names):
    """Raises UserError where one of the fields `names` is no share or probability, 0…1."""
    check_each(cfg, names, lambda value: 0 <= value <= 1, "must lie between 0 and 1")


def check_training(cfg):
    """Raises UserError where a field that every training has is out of range."""
    check_least(cfg, 1, "epochs batch log_every")
    check_least(cfg, 0, "wd warmup workers seed")
    check_above(cfg, 0, "lr")
    check(cfg.warmup < cfg.epochs, "--warmup", cfg.warmup, f"must be below --epochs {cfg.epochs}")
    check(cfg.seed < 2 ** 32, "--seed", cfg.seed, "must be below 2^32")


def check_config(cfg):
    """Raises UserError where a field that every method has, or one of a decoder, is out of range."""
    check_training(cfg)
    check_least(cfg, 1, "img patch dim depth heads")
    check_least(cfg, 0, "knn_every images store steps")
    check(cfg.img % cfg.patch == 0, "--patch", cfg.patch, f"must divide --img {cfg.img}")
    check(cfg.dim % (4 * cfg.heads) == 0, "--dim", cfg.dim, f"must be a multiple of 4 times --heads {cfg.heads}")
    if hasattr(cfg, "decoder_dim"):
        check_least(cfg, 1, "decoder_depth decoder_dim decoder_heads")
        check(cfg.decoder_dim % (4 * cfg.decoder_heads) == 0, "--decoder-dim", cfg.decoder_dim,
              f"must be a multiple of 4 times --decoder-heads {cfg.decoder_heads}")


def check_mask(cfg):
    """Raises UserError unless --mask leaves some of the N patches masked and some visible."""
    N = (cfg.img // cfg.patch) ** 2
    check(0 < cfg.mask < 1 and 0 < round(cfg.mask * N) < N, "--mask", cfg.mask,
          f"must lie between 0 and 1 and leave some of {N} patches masked and some visible")


# Processes and numerics

Here = typing.NamedTuple("Here", [("rank", int), ("world", int), ("device", torch.device)])  # where this process runs


def start_processes(device="auto"):
    """Joins torchrun's processes, if it started this one, and picks the device. Raises UserError if cuda is missing."""
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available() and device != "cpu"
    check(cuda or device != "cuda", "--device", device, "no CUDA GPU is at hand; cpu and auto will run")
    keep_memory()
    if cuda:
        check(local < (n := torch.cuda.device_count()), "--nproc-per-node", world, f"there are only {n} GPUs")
        torch.cuda.set_device(local)
        torch.cuda.empty_cache()  # of a run before in this process
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in convolutions, too; bfloat16 is as before
    if world > 1 and not dist.is_initialized():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save yet: ^C ends them all without a word
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12),
                                device_id=torch.device("cuda", local) if cuda else None)
    return Here(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"))


def seed_step(seed, step, rank=0):
    """Makes all random numbers of a step a function of (seed, step, rank): a resumed run draws the same."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def schedule(cfg, per_epoch):
    """Steps of the whole training and of its warm-up. --steps, if given, is the whole, and a fifth of it the longest
    warm-up."""
    steps, warmup = getattr(cfg, "steps", 0), round(cfg.warmup * per_epoch)
    return (steps, min(warmup, steps // 5)) if steps else (cfg.epochs * per_epoch, warmup)


def load_data(cfg):
    """The training and the test images of a Config, each as load_images gives it; None for test images where there are
    none. --images takes a fixed choice. Raises UserError."""
    side = cfg.store or round(cfg.img * 8 / 7)
    train, test = (load_images(cfg.data, split, side, cfg.root, cfg.workers, cfg.seed) for split in ("train", "test"))
    if cfg.images:
        check(cfg.images <= len(train[0]), "--images", cfg.images, f"there are only {len(train[0])} training images")
        train = tuple(part[fixed_choice(len(part), cfg.images)] for part in train)
    return train, test


# The run on disk

def git_commit():
    """The commit of these files, with "-dirty" behind it if they were changed since; "" outside a repository."""
    here, ask = pathlib.Path(__file__).parent, "git describe --always --dirty --abbrev=40 --exclude=*".split()
    return subprocess.run(ask, cwd=here, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


class Run:
    """The folder of a run: config, metrics, curves, pictures, checkpoints; only the first process writes.

    After SIGINT or SIGTERM the loop finishes its step, `save` saves, and `stopped` is true. `columns`: what is
    written once an epoch by `write`. Raises UserError for an --out that holds something."""
    def __init__(self, method, cfg, here, per_epoch, columns=("knn", "rank")):
        self.folder = pathlib.Path(cfg.out or time.strftime(f"runs/{method}-%Y%m%d-%H%M%S"))
        self.method, self.cfg, self.here, self.per_epoch, self.columns = method, cfg, here, per_epoch, columns
        self.steps, self.warmup = schedule(cfg, per_epoch)
        self.rows, self.sums, self.asked, self.leaving, self.stopped, self.live = [], {}, math.inf, False, False, False
        self.signal = self.first_step = self.logged_step = self.drawn_time = self.warned = 0
        if here.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=bool(cfg.out))
            held = {f.name for f in self.folder.iterdir()} - {"config.part"}
            check(cfg.resume or not held, "--out", self.folder, "must be new or empty; --resume goes on with a run")
            for left in self.folder.glob("*.part"):  # by a crash
                left.unlink()
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, self.stop)
        self.start_time = self.clock = self.shown_time = time.time()

    def stop(self, sign, frame):
        """Notes a signal for `log`. Another one, a second later, ends the program; torchrun sends each twice."""
        if time.time() > self.asked + 1:
            signal.signal(sign, signal.SIG_DFL)
            signal.raise_signal(sign)
        elif not self.signal and self.here.rank == 0:
            when = "after this step" if self.here.world == 1 else "at the next row of metrics.csv"
            os.write(2, f"\nstopping {when}\n".encode())  # print may be at work just now
        self.signal, self.asked, self.live = sign, min(self.asked, time.time()), False

    def resume(self, **parts):
        """The step to go on from, 0 in a new run, whose config.json it writes. Reads the checkpoint into `parts`, and
        the metrics up to it. Says what is about to be done."""
        cfg, (rank, world, device), model = self.cfg, self.here, parts["model"]
        if cfg.resume:
            started = read_facts(self.folder, self.method, type(cfg))["processes"]
            check(started == world, "--resume", self.folder, f"was started with {started} processes: "
                  + self.command(f"{self.method}.py --resume", started))
            self.first_step = self.logged_step = load_checkpoint(self.folder, self.method, **parts)["step"]
            with open(self.folder / "metrics.csv", newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]
        if rank == 0:
            if cfg.resume:
                self.write(*(row for row in whole if int(row["step"]) <= self.first_step))
            else:
                facts = {"method": self.method, "config": dataclasses.asdict(cfg), "command": shlex.join(sys.argv),
                         "git": git_commit(), "python": sys.version.split()[0], "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "timm": timm_call(cfg, model.encoder),
                         "processes": world, "device": str(device)}
                (self.folder / "config.part").write_text(json.dumps(facts, indent=1) + "\n")
                os.replace(self.folder / "config.part", self.folder / "config.json")
            with autocast(device, cfg.amp):
                precision = "bfloat16" if torch.is_autocast_enabled(device.type) else "float32"
            place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
            size, own = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.encoder))
            self.tell(f"{self.method} on {place}, {precision}; {size:.1f} M parameters, {own:.1f} M in the encoder; "
                      f"{self.per_epoch * cfg.batch * world:,} images and {self.per_epoch:,} steps an epoch, "
                      f"{self.steps:,} steps in all, {self.warmup:,} of them warm-up; folder {self.folder}")
        return self.first_step

    def tell(self, line, live=False):
        """Prints a line. On a terminal a live one is cut to its width, and the next live one takes its place."""
        live = live and sys.stdout.isatty()
        if live:
            print(f"\r\033[K{line[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(f"{chr(10) * self.live}{line}", flush=True)
        self.live = live

    def command(self, program, processes=1):
        """What to type so that so many processes of `program` take up this run."""
        here, drives = pathlib.Path(__file__), {pathlib.Path(p).drive for p in (sys.executable, __file__, os.getcwd())}
        near = os.path.relpath if len(drives) == 1 else str  # Windows has no path from one drive to another
        python = min(sys.executable, near(sys.executable), key=len)
        many = f"-m torch.distributed.run --nproc-per-node {processes} " if processes > 1 else ""  # torchrun
        return f"{python} {many}{near(here.with_name(program))} {shlex.quote(str(self.folder))}"

    def write(self, *rows):
        """Adds rows, column → value, to metrics.csv; the first ones of this process make the file anew."""
        file, anew = self.folder / "metrics.csv", not self.rows
        self.rows += rows
        try:
            with open(file.with_suffix(".part") if anew else file, "a", newline="") as out:
                writer = csv.DictWriter(out, self.rows[0])
                if anew:
                    writer.writeheader()
                writer.writerows(rows)
            if anew:
                os.replace(file.with_suffix(".part"), file)
        except OSError as error:
            raise OSError(f"{error}; {newest(self.folder)}") from error

    def log(self, step, losses, lr):
        """Sums a step's terms; writes and shows their means every --log-every steps of an epoch, at its end, and after
        a signal. Shows them after the first step and every ten seconds, too. Within an epoch the loop waits for the
        device only here. Raises FloatingPointError when a term is not finite."""
        for name, value in losses.items():
            total, n = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value.detach(), n + 1)
        self.leaving, first = self.signal > 0 and self.here.world == 1, step == self.first_step + 1
        due = step % self.per_epoch % self.cfg.log_every == 0 or step == self.steps or self.leaving
        if not (due or first or time.time() > self.shown_time + 10):
            return
        means = {name: float(total) / n for name, (total, n) in self.sums.items()}
        terms = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"loss not finite by step {step}: {terms}; {newest(self.folder)}")
        if due and self.here.world > 1:  # several processes agree on leaving
            asked = torch.tensor(self.signal, device=self.here.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.signal, self.leaving = int(asked), bool(asked)
        pace = (time.time() - self.clock) / (step - self.logged_step)
        if self.here.rank == 0:
            epoch, epochs, left = step / self.per_epoch, self.steps / self.per_epoch, (self.steps - step) * pace
            speed = self.cfg.batch * self.here.world / pace
            self.tell(f"epoch {epoch:.2f}/{epochs:.4g}  step {step}  {terms}  {speed:,.0f} images/s  "
                      f"{datetime.timedelta(seconds=round(left))} left", live=True)
            if due:
                row = {"step": step, "epoch": round(epoch, 4), "lr": lr, **dict.fromkeys(self.columns, "")}
                self.write({**row, **means, "images_per_second": round(speed, 3)})
            if not first and left > 86_400 and self.here.device.type == "cpu" and not (self.warned or self.cfg.tiny):
                self.tell(f"at this pace it takes {left / 86_400:.1f} days on this CPU; --tiny is made for CPUs")
                self.warned = True
        self.shown_time = time.time()
        if due or first:
            self.sums, self.logged_step, self.clock = {} if due else self.sums, step, time.time()

    def save(self, step, train, test, model, **parts):
        """At an epoch's or the training's end or after a signal: encoder.pt, check_features if due, the checkpoint,
        pictures if due.

        train, test: load_images' triples; test None: no test images; both None: fine-tuning. parts: what else is saved.
        Pictures are drawn at most once a minute, and at the end. Raises FloatingPointError if a weight is not finite.
        """
        epoch, rest = divmod(step, self.per_epoch)
        if rest and step < self.steps and not self.leaving:
            return
        if self.here.rank == 0:
            if not all(p.isfinite().all() for p in model.parameters()):
                raise FloatingPointError(f"a weight is not finite at step {step}; {newest(self.folder)}")
            save_file({name: w.cpu() for name, w in model.encoder.state_dict().items()}, self.folder / "encoder.pt")
            if train is not None and not rest and self.cfg.knn_every and epoch % self.cfg.knn_every == 0:
                found = check_features(model.encoder, train, test, self.cfg, self.here)
                self.write({"step": step, "epoch": epoch, **found})
                knn = f"kNN top-1 {100 * found['knn']:.1f} %" if "knn" in found else (
                    "no kNN without training images of two classes and labelled test images")
                self.tell(f"after epoch {epoch}: effective rank {found['rank']:.1f}, {knn}")
            save_checkpoint(self.folder / "last.pt", self.method, self.cfg, step, model=model, **parts)
            if self.leaving or step == self.steps or time.time() - self.drawn_time > 60:
                images, _, aspect = test or train or (None, None, None)
                if images is not None:
                    ids = fixed_choice(len(images), 8)
                    x = normalize(central_crop(images[ids].to(self.here.device), self.cfg.img, aspect[ids]))
                    draw_images(self.folder / "reconstruction.png", reconstruction_rows(model, x))
                draw_curves(self.folder / "curves.png", self.rows)
                self.drawn_time = time.time()
        self.stopped, self.clock, self.logged_step = self.leaving, time.time(), step

    def finish(self, following=("eval_linear.py", "eval_finetune.py", "show.py")):
        """Says where everything is and which programs are next; returns the folder, or exits with 128 + the signal."""
        for sign, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(sign, usual)
        if self.here.rank == 0:
            seconds, cuda = round(time.time() - self.start_time), self.here.device.type == "cuda"
            peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory allocated" if cuda else ""
            self.tell(f"{'stopped' if self.stopped else 'done'} after {datetime.timedelta(seconds=seconds)}{peak}; "
                      f"pictures, metrics, checkpoints: {self.folder}")
            again = self.command(f"{self.method}.py --resume", self.here.world)
            for line in [again] if self.stopped else map(self.command, following):
                print(f"next: {line}")
        if self.stopped:
            raise SystemExit(128 + self.signal)
        return self.folder
