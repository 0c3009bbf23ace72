"""What a newcomer runs: python -m pytest -q test_smoke.py, one minute on two CPU cores.

Each method trains on generated shapes, its loss falls, a stopped run resumes exactly, its encoder
loads and is evaluated, a loss runs as pasted text, and two processes equal one of twice the batch.
"""
import csv
import dataclasses
import importlib
import inspect
import json
import os
import re
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for a GPU
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import common
import eval_linear

torch.set_num_threads(1)
METHODS = ("mclim", "mvmae", "cmae", "macrl", "camae")
OTHER_FORMS = [("mclim", {"target": "shared"}), ("mclim", {"target": "separate"}),
               ("macrl", {"keys": "momentum", "bank": 40}), ("camae", {"predictor": True})]


def small(method, **changes):
    """A Config of 16 patches of 4×4 pixels, 48 wide and 2 deep: 3 epochs of 4 steps."""
    sizes = {"data": "shapes", "images": 64, "img": 16, "dim": 48, "depth": 2, "batch": 16,
             "epochs": 3, "warmup": 0.5, "lr": 8e-3, "log_every": 1, "eval_every": 2,
             "device": "cpu", "amp": False}
    return dataclasses.replace(importlib.import_module(method).TINY, **{**sizes, **changes})


def build(method, **changes):
    torch.manual_seed(0)
    return importlib.import_module(method).Model(small(method, **changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of each method's run."""
    folders = {}
    for method in METHODS:
        out = tmp_path_factory.mktemp("runs") / method
        folders[method] = importlib.import_module(method).train(small(method, out=str(out)))
    return folders


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_its_folder_and_its_loss_falls(trained, method):
    folder = trained[method]
    names = {"config.json", "metrics.csv", "curves.png", "reconstruction.png", "last.pt",
             "previous.pt", "encoder.pt"}
    assert {file.name for file in folder.iterdir()} == names
    facts = json.loads((folder / "config.json").read_text())
    assert facts["method"] == method and facts["images"] == 64
    assert facts["precision"] == "float32"
    with open(folder / "metrics.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    values = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(values) == 12 and sum(values[-3:]) < 0.97 * sum(values[:3]), values
    assert [int(row["step"]) for row in rows if row["knn"]] == [8, 12]
    assert 0 < float(rows[-1]["knn"]) < 1 and float(rows[-1]["rank"]) > 1


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_resumes_exactly(trained, method, tmp_path, monkeypatch):
    class Killed(BaseException):
        """What no code catches."""

    def save_and_die(run, step):
        save(run, step)
        raise Killed

    save, module = common.Run.save, importlib.import_module(method)
    monkeypatch.setattr(common.Run, "draw", lambda run, images: None)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "save", save_and_die)
        module.train(small(method, out=str(tmp_path / "run")))
    module.main(["--resume", str(tmp_path / "run")])
    ours, theirs = (common.load_checkpoint(folder) for folder in (tmp_path / "run",
                                                                  trained[method]))
    assert ours["step"] == theirs["step"] == 12
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        assert torch.equal(value, ours["model"][name]), name


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_of_a_run_loads(trained, method):
    model, cfg = eval_linear.load_model(trained[method])
    encoder = build(method).encoder
    encoder.load_state_dict(torch.load(trained[method] / "encoder.pt", weights_only=True))
    x = torch.rand(2, 3, cfg.img, cfg.img)
    assert torch.equal(model.encoder.features(x), encoder.features(x))
    assert encoder.features(x).shape == (2, 48) and encoder.tokens(x).shape == (2, 16, 48)


def test_a_run_is_evaluated(trained):
    eval_linear.main([str(trained["mvmae"]), "--images", "64", "--device", "cpu"])
    report = json.loads((trained["mvmae"] / "eval_linear.json").read_text())
    assert 0 < report["percent"]["trained encoder"]["knn_top1"] < 100
    assert (trained["mvmae"] / "confusion.png").exists()


@pytest.mark.parametrize("method, name", [("mvmae", "nt_xent_loss"), ("camae", "info_nce_loss")])
def test_a_loss_runs_as_pasted_text(method, name):
    text = Path(f"{method}.py").read_text()
    pasted, = re.findall(rf"^def {name}\(.*?(?=^\S)", text, re.MULTILINE | re.DOTALL)
    space = {"torch": torch, "F": F}
    exec(pasted, space)
    z1, z2 = torch.rand(8, 5), torch.rand(8, 5)
    theirs = getattr(importlib.import_module(method), name)(z1, z2, 0.2)
    assert torch.equal(space[name](z1, z2, 0.2), theirs) and theirs > 0


# Two processes

def step(method, changes, rank, world):
    """Losses and gradients of this process's part of a batch of 12 images, with given masks."""
    torch.manual_seed(1)
    batch = [torch.randn(12, 3, 16, 16), torch.randn(12, 3, 16, 16)]
    model = build(method, **changes)
    masks, rows = {}, 24 if method == "mvmae" else 12  # Multi-View MAE masks both views at once
    for name in inspect.signature(model.forward).parameters:
        if name.startswith("mask"):
            ratio = getattr(model.cfg, name, model.cfg.mask)
            mask = torch.rand(rows, 16).argsort(1) < round(ratio * 16)
            part = mask.unflatten(0, (-1, world, 12 // world))[:, rank]
            masks[name] = part.flatten(0, 1)
    net = DistributedDataParallel(model) if world > 1 else model
    losses = net(*(view.chunk(world)[rank] for view in batch), **masks)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses["contrast"].detach(), gradients, dict(model.named_buffers())


def run_two(rank, port, file):
    """One of two processes: the steps of all methods; rank 1 writes them to `file`."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    forms = [(method, {}) for method in METHODS] + OTHER_FORMS
    results = [step(method, changes, rank, 2) for method, changes in forms]
    if rank == 1:
        torch.save(results, file)
    dist.destroy_process_group()


def test_two_processes_equal_one_of_twice_the_batch(tmp_path):
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.spawn(run_two, (port, str(tmp_path / "two.pt")), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for (method, changes), (contrast, gradients, buffers) in zip(
            [(method, {}) for method in METHODS] + OTHER_FORMS, two):
        expected, whole, kept = step(method, changes, 0, 1)
        assert contrast.item() == pytest.approx(expected.item(), rel=1e-5), method
        assert gradients.keys() == whole.keys()
        for name, gradient in whole.items():
            error = (gradient - gradients[name]).norm()
            assert error <= 1e-4 * gradient.norm() + 1e-7, (method, changes, name)
        for name, buffer in kept.items():  # MACRL's bank is one of them
            assert torch.allclose(buffer, buffers[name], atol=1e-6), (method, name)
