"""Flags, batches, kNN, checkpoints and the run folder; and what every method must do."""
import csv
import dataclasses
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import eval_linear
import mvmae
from augment import central_crop, normalize
from common import Batches, Run, RunConfig, UserError, load_checkpoint, load_encoder
from conftest import METHODS, ROOT, build, every_method, normal, program, slow, small, status
from images import Images, load_images

CPU = torch.device("cpu")


def parse(arguments, Config=mvmae.Config, TINY=mvmae.TINY, file=mvmae.__file__):
    typed = vars(common.make_parser(file, "A method.", Config, TINY).parse_args(arguments.split()))
    return common.make_config(typed, Config, TINY, Path(file).stem)


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as table:
        return list(csv.DictReader(table))


# Flags

@dataclasses.dataclass
class Plain(RunConfig):
    epochs: float = 5
    warmup: float = 2.0
    tau: float = 0.1
    wide: bool = False  # width in % of something


def test_flags_are_the_fields_with_or_without_a_comment(capsys):
    cfg = parse("--tau 0.5 --wide --no-amp --out x", Plain, Plain(tau=0.2, tiny=True))
    assert (cfg.tau, cfg.wide, cfg.amp, cfg.out, cfg.seed) == (0.5, True, False, "x", 0)
    assert parse("--tiny", Plain, Plain(tau=0.2, tiny=True)).tau == 0.2
    with pytest.raises(SystemExit):
        parse("--help", Plain, Plain(tau=0.2, tiny=True))
    text = " ".join(capsys.readouterr().out.split())
    assert "width in % of something (default: False)" in text
    assert text.index("--tau") < text.index("--data") and "(default: 0.1, tiny: 0.2)" in text
    assert all("--" + field.name.replace("_", "-") in text for field in dataclasses.fields(Plain))


def test_a_field_of_another_type_is_an_error():
    @dataclasses.dataclass
    class Listed(RunConfig):
        sizes: list = None
    with pytest.raises(TypeError, match="sizes"):
        common.make_parser("x.py", "X", Listed, Listed())


def test_an_untyped_warm_up_is_at_most_a_fifth_of_typed_epochs():
    assert parse("--epochs 4", Plain, Plain()).warmup == 0.8
    assert parse("", Plain, Plain()).warmup == 2.0
    assert parse("--warmup 3", Plain, Plain()).warmup == 3


def test_resume_takes_the_runs_config_and_new_fields_take_their_defaults(tmp_path, capsys):
    saved = {**dataclasses.asdict(mvmae.TINY), "tau": 0.3, "gone": 1, "init": "old.pt"}
    del saved["pool"]
    (tmp_path / "config.json").write_text(json.dumps({"method": "mvmae", "config": saved}))
    cfg = parse(f"--resume {tmp_path} --log-every 7")
    assert (cfg.tau, cfg.dim, cfg.log_every, cfg.pool) == (0.3, 192, 7, "mean")
    assert cfg.out == str(tmp_path) and cfg.init == "old.pt"
    (tmp_path / "previous.pt").touch()
    assert parse(f"--resume {tmp_path}").init == ""
    said = capsys.readouterr().out
    assert "--pool: new, takes its default" in said and "--gone: is gone" in said
    with pytest.raises(UserError, match="--batch 99.* was started with 128"):
        parse(f"--resume {tmp_path} --batch 99")
    with pytest.raises(UserError, match="is a run of mvmae.py"):
        parse(f"--resume {tmp_path}", file="other.py")


BAD = {
    "flag": ("--nope 1", "--nope"),
    "choice": ("--device tpu", "--device"),
    "negative": ("--lr -1", "--lr"),
    "not finite": ("--wd inf", "--wd"),
    "no rows": ("--log-every 0", "--log-every must be positive"),
    "mask": ("--mask 1.5", "--mask"),
    "patch": ("--tiny --patch 5", "--patch 5"),
    "batch": ("--batch 1", "--batch 1"),
    "warm-up": ("--epochs 1 --warmup 1", "--warmup"),
    "large batch": ("--tiny --data shapes --batch 9999", "try --batch 5000"),
    "many images": ("--tiny --data shapes --images 9999", "--images 9999"),
    "no data": ("--data nowhere", "--data nowhere"),
    "cuda": ("--device cuda", "--device cuda"),
    "out": ("--tiny --data shapes --out {tmp}", "--out"),
    "no run": ("--resume {tmp}", "config.json"),
    "init": ("--tiny --data shapes --init {tmp}/no.pt", "no.pt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_status_2(case, tmp_path, capsys):
    arguments, words = BAD[case]
    (tmp_path / "something").touch()
    flags = f"--out {tmp_path}/run {arguments.format(tmp=tmp_path)}".split()
    assert status(mvmae, *flags) == 2
    usage, line = capsys.readouterr().err.strip().split("\n")
    assert usage.startswith("usage") and words in line
    assert [file.name for file in tmp_path.iterdir()] == ["something"]


def test_a_loss_that_is_not_finite_ends_with_the_step_and_status_1(tmp_path, capsys, monkeypatch):
    forward = mvmae.MVMAE.forward

    def broken(self, *views):
        return {name: value * math.nan for name, value in forward(self, *views).items()}
    monkeypatch.setattr(mvmae.MVMAE, "forward", broken)
    flags = "--tiny --data shapes --images 64 --batch 32 --dim 24 --log-every 1 --out".split()
    assert status(mvmae, *flags, tmp_path / "run") == 1
    line = capsys.readouterr().err
    assert "step 1" in line and "contrast" in line


@pytest.mark.parametrize("method, changes, words", [
    ("cmae", {"crop_every": 0}, "--crop-every"), ("cmae", {"alpha": 0.0}, "--alpha"),
    ("cmae", {"k": 1.5}, "--k"), ("cmae", {"batch": 1}, "--batch"),
    ("cmae", {"lam_ctr": 0.0, "lam_loc": 0.0, "lam_con": 0.0}, "--lam-ctr"),
    ("camae", {"contrast": False, "mim": False}, "--no-contrast --no-mim"),
    ("camae", {"eps": 0.0}, "--eps"), ("camae", {"batch": 1}, "--batch"),
    ("macrl", {"mask_w": 0.8}, "--mask-w"), ("macrl", {"mask_w": 0.0}, "--mask-w"),
    ("macrl", {"batch": 1}, "--batch"), ("macrl", {"lam_c": 0.0, "lam_r": 0.0}, "--lam-c"),
    ("macrl", {"tau": 0.0}, "--tau"), ("macrl", {"out_dim": 0}, "--out-dim"),
    ("macrl", {"crop_min_w": 0.0}, "--crop-min-w"), ("macrl", {"gray_s": 1.5}, "--gray-s"),
    ("macrl", {"decoder_dim": 50}, "--decoder-dim"),
    ("mclim", {"mask": 0.01}, "some of 16 blocks masked"), ("mclim", {"batch": 1}, "no negatives"),
    ("mclim", {"lam": 0.0, "contrast": "none"}, "--lam"), ("mclim", {"img": 18}, "--img 18"),
    ("mclim", {"crop_min": 0.95}, "--crop-min"), ("mclim", {"jitter": 80.0}, "--jitter"),
    ("mclim", {"backbone": "swin", "dim": 96}, "multiple of 192")], ids=str)
def test_a_setting_that_cannot_work_names_its_flag(method, changes, words):
    with pytest.raises(UserError, match=words):
        small(method, **changes)


def test_a_process_without_torchrun_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.start_processes("cpu") == (CPU, 0, 1)


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc-per-node exceeds"):
        common.start_processes()


def test_a_notebooks_backend_does_not_matter(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    done = program("-c", "import show")
    assert done.returncode == 0, done.stderr
    for name in ("eval_dense", "compare"):  # eval_linear imports plots, which sets the backend
        imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert imports.index("eval_linear") < imports.index("matplotlib"), name


# Batches

def test_batches_cover_an_epoch_and_are_shared_between_processes():
    pixels = torch.arange(103, dtype=torch.uint8)[:, None, None, None].expand(103, 3, 2, 2)
    images = Images(pixels, aspect=torch.arange(103.0))
    alone = Batches(images, 10, 0, CPU)
    epoch = [alone[step] for step in range(10)]
    ids = torch.cat([batch.aspect for batch in epoch])
    assert torch.equal(ids.byte(), torch.cat([batch.pixels[:, 0, 0, 0] for batch in epoch]))
    assert len(alone) == 10 and len(ids.unique()) == 100
    assert not torch.equal(ids, torch.cat([alone[step].aspect for step in range(10, 20)]))
    two = [Batches(images, 5, 0, CPU, rank, 2) for rank in (0, 1)]
    for step in (0, 7, 13):
        halves = torch.cat([half[step].aspect for half in two])
        assert torch.equal(halves, alone[step].aspect)


def test_random_numbers_depend_on_seed_step_and_rank():
    def draw(*key):
        common.seed_step(*key)
        return torch.rand(1).item()
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1000, 9)]
    assert len({draw(*key) for key in keys}) == 5 and draw(0, 1, 0) == draw(0, 1, 0)


def test_a_fixed_choice_of_images_is_loaded_at_eight_sevenths_of_the_views():
    train, test = common.load_data(small("mvmae", images=7))
    assert len(train) == 7 and len(test) == 1000 and train.pixels.shape[2] == 18
    assert torch.equal(train.labels, load_images("shapes", "train", 18).labels[
        common.fixed_choice(5000, 7)])


# Evaluation

def test_knn_is_the_weighted_vote_of_the_nearest():
    bank, labels, queries = normal(30, 4), torch.arange(30) % 3, normal(8, 4, seed=1)
    truth = []
    for q in queries:
        cosine = [(q @ b / q.norm() / b.norm()).item() for b in bank]
        votes = [0.0] * 3
        for j in sorted(range(30), key=lambda j: -cosine[j])[:5]:
            votes[labels[j]] += math.exp(cosine[j] / 0.07)
        truth.append(votes.index(max(votes)))
    truth = torch.tensor(truth)
    assert common.knn_accuracy(bank, labels, queries, truth, k=5) == 1
    wrong = (truth + (torch.arange(8) < 2)) % 3
    assert common.knn_accuracy(bank, labels, queries, wrong, k=5) == 0.75


def test_effective_rank_is_rankmes():
    features = normal(40, 6)
    sigma = torch.linalg.svd(features.double())[1].tolist()
    p = [value / sum(sigma) + 1e-7 for value in sigma]
    expected = math.exp(-sum(v * math.log(v) for v in p))
    assert common.effective_rank(features) == pytest.approx(expected, rel=1e-4)
    assert common.effective_rank(normal(40, 1) @ normal(1, 6)) == pytest.approx(1, abs=1e-3)
    with pytest.raises(FloatingPointError):
        common.effective_rank(features * torch.nan)


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    assert common.autocast(torch.device("cuda")) is native
    assert not common.autocast(torch.device("cuda"), amp=False)


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16", "avx2"])
def test_a_cpu_without_bfloat16_instructions_computes_in_float32(monkeypatch, capability):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert common.use_bfloat16(CPU) is (capability != "avx2")
    assert common.use_bfloat16(CPU, amp=False) is False


def test_images_are_cropped_in_float32_under_autocast(monkeypatch):
    images = load_images("shapes", "test", 18)[torch.arange(4)]
    expected = normalize(central_crop(images, 16))
    for module in (common, eval_linear):
        monkeypatch.setattr(module, "autocast",
                            lambda device, amp: torch.autocast("cpu", torch.bfloat16))
    seen = SimpleNamespace(features=lambda x: x.flatten(1), tokens=lambda x: x.flatten(2).mT)
    assert torch.equal(common.extract_features(seen, images, 16, CPU), expected.flatten(1))
    tokens, _ = eval_linear.extract_tokens(seen, images, 16, CPU, like=(0, 1))
    assert torch.equal(tokens, expected.flatten(2).mT.half())


# Checkpoints

@pytest.fixture
def saved(tmp_path):
    """A run folder with one checkpoint, and its model."""
    model = build(small("mvmae", dim=24, depth=1))
    common.save_checkpoint(tmp_path, "mvmae", 1, model.cfg, model=model)
    return tmp_path, model


def test_a_flipped_bit_is_found(saved):
    folder, model = saved
    whole, found = (folder / "last.pt").read_bytes(), 0
    for place in torch.randint(8 * len(whole), (30,)).tolist():
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (folder / "last.pt").write_bytes(flipped)
        try:
            state = load_checkpoint(folder)["model"]
        except UserError as error:
            assert "last.pt is damaged" in str(error)
            found += 1
        else:  # between the entries of the file
            assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert found >= 25


def test_previous_is_the_checkpoint_before(saved):
    folder, model = saved
    common.save_checkpoint(folder, "mvmae", 2, model.cfg, model=model)
    assert load_checkpoint(folder)["step"] == 2
    (folder / "last.pt").unlink()
    assert load_checkpoint(folder, model=model)["step"] == 1
    assert load_checkpoint(folder / "previous.pt")["config"]["dim"] == 24


def test_a_checkpoint_that_does_not_fit_is_named(saved):
    folder, _ = saved
    with pytest.raises(UserError, match="last.pt does not fit"):
        load_checkpoint(folder, model=build(small("mvmae", dim=36, depth=1)))
    torch.save({"a": 1}, folder / "last.pt")
    with pytest.raises(UserError, match="is not a run's checkpoint"):
        load_checkpoint(folder)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_checkpoint(folder.parent)


def test_a_full_disk_leaves_the_last_checkpoint(saved):
    folder, model = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="last.pt"):
            common.save_checkpoint(folder, "mvmae", 2, model.cfg, model=model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(folder)["step"] == 1 and not list(folder.glob("*.part"))


def test_an_encoder_is_loaded_from_runs_checkpoints_and_timm(saved, tmp_path):
    folder, model = saved
    state = model.encoder.state_dict()
    torch.save(state, folder / "encoder.pt")
    torch.save({**state, "head.weight": torch.zeros(9, 24)}, tmp_path / "timm.pth")
    torch.save({"model": state}, tmp_path / "mae.pth")
    for file in (folder, folder / "last.pt", folder / "encoder.pt", tmp_path / "timm.pth",
                 tmp_path / "mae.pth"):
        encoder = build(small("mvmae", dim=24, depth=1, seed=5)).encoder
        load_encoder(encoder, file)
        assert all(torch.equal(v, state[n]) for n, v in encoder.state_dict().items())


def test_an_encoder_that_does_not_fit_is_named(saved, tmp_path):
    folder, model = saved
    deeper = build(small("mvmae", dim=24, depth=2)).encoder
    with pytest.raises(UserError, match="blocks.1"):
        load_encoder(deeper, folder / "last.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("tensor.pt", "text.pt", "missing.pt"):
        with pytest.raises(UserError, match=name) as error:
            load_encoder(model.encoder, tmp_path / name)
        assert "\n" not in str(error.value)


# Runs

@pytest.fixture
def run(tmp_path):
    """A Run of 10 steps an epoch, 20 steps in all."""
    cfg = small("mvmae", epochs=2, log_every=4, eval_every=1, out=str(tmp_path / "run"))
    model = build(cfg)
    optimizer = torch.optim.AdamW(model.parameters())
    images = load_images("shapes", "train", 18)[torch.arange(160)]
    yield Run("here/mine.py", cfg, Batches(images, 16, 0, CPU), 20, model=model,
              optimizer=optimizer)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def losses(value):
    return {"loss": torch.tensor(float(value)), "contrast": torch.tensor(0.0)}


def test_rows_are_means_over_the_steps_since_the_last_row(run):
    for step in range(20):
        run.log(step, losses(step))
    found = [(int(row["step"]), float(row["loss"])) for row in rows_of(run.folder)]
    assert found == [(4, 1.5), (8, 5.5), (10, 8.5), (14, 11.5), (18, 15.5), (20, 18.5)]


def test_new_columns_may_come_at_any_row(run):
    run.log(3, losses(1))
    run.write({"step": 4, "epoch": 0.4, "new": 7})
    run.log(7, losses(2))
    first, second, third = rows_of(run.folder)
    assert (first["new"], second["new"], third["new"]) == ("", "7", "")
    assert (first["loss"], second["loss"], third["loss"]) == ("1.0", "", "2.0")


def test_an_epoch_is_done_at_its_end_and_at_the_last_step(run):
    run.steps = 15
    assert [step for step in range(15) if run.epoch_done(step)] == [9, 14]


@pytest.mark.parametrize("step", [1, 19])
def test_the_first_signal_finishes_the_step_and_the_second_ends_the_program(run, step, capfd):
    run.log(0, losses(1))
    assert not run.interrupted and not run.epoch_done(0)
    signal.raise_signal(signal.SIGTERM)
    run.log(step, losses(1))
    assert run.interrupted and run.epoch_done(step)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(SystemExit) as stop:
        run.finish()
    assert stop.value.code == 128 + signal.SIGTERM
    assert ("--resume" in capfd.readouterr().out) == (step < 19)


def test_encoder_pt_is_never_older_than_last_pt(run, monkeypatch):
    def killed(*args, **parts):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save(0)
    assert (run.folder / "encoder.pt").exists() and not (run.folder / "last.pt").exists()


@pytest.mark.parametrize("kind", ["no test images", "no labels", "half the labels", "labels"])
def test_evaluation_measures_knn_where_there_are_labels(run, kind):
    train = load_images("shapes", "train", 18)[torch.arange(40)]
    test = None if kind == "no test images" else load_images("shapes", "test", 18)[torch.arange(20)]
    if kind == "no labels":
        train = Images(train.pixels)
    elif kind == "half the labels":
        train.labels[::2] = -1
    run.log(9, losses(1))
    run.evaluate(train, test)
    row, encoder, known = rows_of(run.folder)[-1], run.parts["model"].encoder, train.labels >= 0
    x, y = (common.extract_features(encoder, part, 16, CPU, False)
            for part in (train, test or train))
    assert float(row["rank"]) == pytest.approx(common.effective_rank(x), rel=1e-3)
    assert bool(row.get("knn")) == (kind in ("half the labels", "labels"))
    if row.get("knn"):
        assert float(row["knn"]) == pytest.approx(
            common.knn_accuracy(x[known], train.labels[known], y, test.labels))


def test_another_number_of_images_is_refused_at_resume(run):
    cfg = dataclasses.replace(run.cfg, resume=str(run.folder))
    images = load_images("shapes", "train", 18)[torch.arange(150)]
    with pytest.raises(UserError, match="started with 160 images; there are 150"):
        Run("mine.py", cfg, Batches(images, 15, 0, CPU), 20, **run.parts)
    images = load_images("shapes", "train", 18)[torch.arange(160)]
    with pytest.raises(UserError, match="started with 1 processes; there are 2"):
        Run("mine.py", cfg, Batches(images, 8, 0, CPU, 0, 2), 20, **run.parts)


def weights(folder):
    state = load_checkpoint(folder)
    moments = {f"{i}.{name}": value for i, entry in state["optimizer"]["state"].items()
               for name, value in entry.items()}
    return {**state["model"], **moments}


def assert_same_end(folder, whole):
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    rows = [[{name: value for name, value in row.items() if name != "images_per_second"}
             for row in rows_of(place)] for place in (folder, whole)]
    assert rows[0] == rows[1] and not list(folder.glob("*.part"))


@slow
def test_a_process_killed_at_three_moments_ends_in_the_same_weights(tmp_path):
    flags = ("--tiny --data shapes --img 16 --dim 48 --depth 2 --images 480 --batch 16 "
             "--epochs 16 --eval-every 0 --log-every 7").split()
    done = program("mvmae.py", *flags, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    arguments, moments = [*flags, "--out", tmp_path / "killed"], random.Random(0)
    saved = tmp_path / "killed" / "previous.pt"
    for _ in range(3):
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        command = [sys.executable, "mvmae.py", *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   stdout=subprocess.DEVNULL)
        while process.poll() is None and (not saved.exists() or saved.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(0.2 * moments.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        arguments = ["--resume", tmp_path / "killed"]
    with open(tmp_path / "killed" / "metrics.csv", "a") as table:
        table.write("9,0")  # a row that was cut off
    done = program("mvmae.py", "--resume", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@slow
def test_ctrl_c_under_torchrun_saves(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", "29651", "mvmae.py", "--tiny", "--data", "shapes", "--img", "16",
               "--dim", "48", "--depth", "1", "--batch", "16", "--epochs", "1000", "--eval-every",
               "0", "--log-every", "3", "--out", str(tmp_path / "run")]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   stdout=said, stderr=said, start_new_session=True)
    while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.wait(timeout=120)
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "run" / "last.pt").exists()
    assert "stopped; continue with --resume" in said, said
    assert 'mvmae.py", line' not in said and 'common.py", line' not in said, said


LONE = """
import mvmae, torch.distributed as dist
from common import require, run_program, start_processes

def train(cfg):
    require(start_processes("cpu")[1] == 0, "only one process knows this")
    dist.barrier()

run_program(__file__, "X", mvmae.Config, mvmae.TINY, train)
"""


@slow
def test_a_process_that_fails_alone_ends_all(tmp_path):
    (tmp_path / "lone.py").write_text(LONE)
    done = program("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                   "29653", tmp_path / "lone.py")
    assert done.returncode != 0 and "lone.py: error: only one process knows this" in done.stderr


# What every method must do

VARIANTS = [(method, {}) for method in METHODS] + [
    ("mclim", {"backbone": "swin", "img": 32, "dim": 192, "depth": 1}),
    ("mclim", {"backbone": "hivit", "img": 32, "dim": 192, "depth": 1}),
    ("cmae", {"decoder": "hybrid-conv", "location_from": "content", "heat": "features"}),
    ("macrl", {"keys": "momentum", "bank": 20, "blur_s": 0.5}), ("camae", {"predictor": True})]


BACKBONES = [(method, {}) for method in METHODS] + [
    ("mclim", {"backbone": backbone, "dim": 192}) for backbone in ("swin", "hivit")]


@pytest.mark.parametrize("method, changes", BACKBONES)
def test_features_are_the_mean_of_tokens_or_the_class_token(method, changes):
    encoder, x = build(small(method, **changes)).encoder, normal(4, 3, 16, 16)
    features, tokens = encoder.features(x), encoder.tokens(x)
    assert features.dtype == torch.float32 and torch.equal(features, encoder.features(x))
    if method == "mclim":
        assert tokens.shape == (4, (16 // encoder.stride) ** 2, encoder.dim)
    else:
        assert tokens.shape == (4, 16, 48)
    assert torch.equal(tokens, encoder(x)[:, -tokens.shape[1]:])
    expected = encoder(x)[:, 0] if method == "camae" else tokens.mean(1)
    assert torch.allclose(features, expected, atol=1e-6)


@every_method
def test_a_vit_has_timms_names_and_norms(method):
    encoder = build(small(method, depth=1)).encoder
    block = {f"blocks.0.{part}.{kind}" for kind in ("weight", "bias")
             for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
    others = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight",
              "norm.bias"}
    assert set(encoder.state_dict()) - {"cls_token"} == block | others
    assert all(getattr(module, "eps", 1e-6) == 1e-6 for module in encoder.modules())


@pytest.mark.parametrize("method, changes", BACKBONES)
def test_reconstruction_shows_what_was_masked(method, changes):
    model, x = build(small(method, **changes)), normal(4, 3, 16, 16)
    masked, prediction = model.reconstruct(x)
    visible, N = masked == x, getattr(model, "N_b", 16)  # blocks of MCLim, patches
    assert visible.float().mean().item() == pytest.approx(1 - round(model.cfg.mask * N) / N)
    assert (masked[~visible] == 0).all() and torch.allclose(prediction[visible], x[visible])
    assert not torch.allclose(prediction[~visible], x[~visible])


@every_method
def test_views_are_normalized_and_differ(method):
    images = load_images("shapes", "train", 18)[torch.arange(64)]
    module = sys.modules[type(small(method)).__module__]
    view1, view2 = module.views(images, small(method))[:2]
    assert view1.shape == view2.shape == (64, 3, 16, 16) and view1.dtype == torch.float32
    assert not torch.equal(view1, view2)
    assert -2.2 <= view1.min() < -0.5 and 1 < view1.max() <= 2.7


@pytest.mark.parametrize("method, M", [("cmae", 0), ("camae", 0), ("macrl", 0), ("macrl", 4)])
def test_info_nce_has_the_batch_and_the_bank_as_negatives(method, M):
    q, k, bank = normal(5, 7), normal(5, 7, seed=1), normal(M, 7, seed=2)

    def score(a, b):
        return math.exp(a @ b / (a.norm() * b.norm()) / 0.2)
    terms = [-math.log(score(q[i], k[i]) / sum(score(q[i], b) for b in [*k, *bank]))
             for i in range(5)]
    info_nce_loss = importlib.import_module(method).info_nce_loss
    arguments = (q, k, bank, 0.2) if method == "macrl" else (q, k, 0.2)
    loss = info_nce_loss(*arguments)
    assert loss.item() == pytest.approx(sum(terms) / 5, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce_loss(*arguments), loss)


@pytest.mark.parametrize("method, changes, moments, copies", [
    ("mclim", {}, (0.9, 0.95), {"F2": "encoder", "T2": "T1"}),
    ("cmae", {}, (0.9, 0.95), {"M_E": "encoder", "M_P": "projection"}),
    ("cmae", {"lam_ctr": 0.0}, (1, 1), {"M_E": "encoder", "M_P": "projection"}),
    ("macrl", {"keys": "momentum"}, (0.9, 0.95), {"f_xi": "encoder", "g_xi": "g"}),
    ("camae", {}, (0.9, 0.95), {"momentum_encoder": "encoder",
                                "momentum_projector": "projector"})])
def test_momentum_networks_start_equal_and_follow(method, changes, moments, copies, tmp_path,
                                                  monkeypatch):
    """Two steps from a given encoder; the momentum rises along a cosine to 1."""
    states, log = [], Run.log

    def keep(run, step, losses):
        model = run.parts["model"]
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        log(run, step, losses)

    monkeypatch.setattr(Run, "log", keep)
    monkeypatch.setattr(Run, "draw", lambda *_: None)
    init = build(small(method, seed=7)).encoder.state_dict()
    torch.save(init, tmp_path / "encoder.pt")
    cfg = small(method, images=32, warmup=0, lr=0.01, momentum=0.9, out=str(tmp_path / "run"),
                init=str(tmp_path / "encoder.pt"), **changes)
    importlib.import_module(method).train(cfg)
    start = build(cfg)
    start.encoder.load_state_dict(init)
    for copy, online in copies.items():
        for name, average in start.get_submodule(online).named_parameters():
            for state, m in zip(states, moments, strict=True):
                average = m * average + (1 - m) * state[f"{online}.{name}"]
                assert torch.allclose(state[f"{copy}.{name}"], average, atol=1e-6), name
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(states[-1][f"encoder.{name}"], init[name])


@pytest.mark.parametrize("method, changes", VARIANTS)
def test_a_step_waits_for_nothing_and_stays_on_its_device(method, changes, no_autocast):
    cfg = small(method, **changes)
    model = build(cfg).to("meta")
    images = load_images("shapes", "train", round(cfg.img * 8 / 7))[torch.arange(8)].to("meta")
    views = sys.modules[type(cfg).__module__].views(images, cfg)
    assert all(view.device.type == "meta" for view in views)
    model(*views)["loss"].backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        views[0].sum().item()


@every_method
def test_views_need_few_copies_to_the_device(method):
    """Counted as copies of CPU tensors to the meta device."""
    cfg = small(method)
    images = load_images("shapes", "train", 18)[torch.arange(8)].to("meta")
    copies = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
                copies.append((kwargs or {}).get("device"))
            return func(*args, **(kwargs or {}))
    with Count():
        sys.modules[type(cfg).__module__].views(images, cfg)
    assert 1 <= sum(device is not None and device.type == "meta" for device in copies) <= 12


@slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("method", ["mvmae", "camae"])
def test_a_compiled_run_has_the_losses_of_the_uncompiled(method, tmp_path):
    flags = ("--tiny --data shapes --img 16 --dim 48 --depth 2 --images 64 --batch 16 --epochs 2 "
             "--eval-every 0 --log-every 1 --no-amp").split()
    runs = {"plain": [], "compiled": ["--compile"]}
    for name, more in runs.items():
        done = program(f"{method}.py", *flags, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    plain, compiled = ([float(row["loss"]) for row in rows_of(tmp_path / name) if row["loss"]]
                       for name in runs)
    assert len(plain) == 8 and compiled == pytest.approx(plain, rel=1e-4)
