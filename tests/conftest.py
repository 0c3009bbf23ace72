"""What several test files use: small configurations, random tensors, command lines."""
import contextlib
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for a GPU
import pytest
import torch

import common

ROOT = Path(__file__).parents[1]
METHODS = ("mclim", "mvmae", "cmae", "macrl", "camae")
every_method = pytest.mark.parametrize("method", METHODS)
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes long; SLOW=1 runs it, as CI does")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Every test computes on one thread and starts with the same random numbers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def normal(*shape, seed=0):
    """Normally distributed numbers that do not depend on the order of tests."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(method, **changes):
    """A Config of 16 patches of 4×4 pixels, 48 wide and 2 deep, for `shapes`."""
    module = importlib.import_module(method)
    sizes = {"data": "shapes", "images": 64, "img": 16, "dim": 48, "depth": 2, "batch": 16,
             "epochs": 1, "warmup": 0.2, "eval_every": 0, "device": "cpu", "amp": False}
    return dataclasses.replace(module.TINY, **{**sizes, **changes})


def build(cfg):
    """The model of a Config, from its seed."""
    torch.manual_seed(cfg.seed)
    return sys.modules[type(cfg).__module__].Model(cfg)


def program(*args, cwd=ROOT):
    """Runs a command line of this project on one thread; returns the finished process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, text=True,
                          capture_output=True, timeout=600)


def status(module, *arguments):
    """The exit status of module.main, which ends with SystemExit."""
    with pytest.raises(SystemExit) as ended:
        module.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def untrained(tmp_path):
    """untrained("mvmae", …): a run folder with the checkpoint of an untrained model."""
    def folder(method, **changes):
        cfg, out = small(method, **changes), tmp_path / "run"
        out.mkdir(exist_ok=True)
        common.save_checkpoint(out, method, 1, cfg, model=build(cfg))
        return out
    return folder


@pytest.fixture
def no_autocast(monkeypatch):
    """Replaces torch.autocast, which the meta device lacks, by nothing."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
