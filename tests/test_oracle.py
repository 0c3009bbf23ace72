"""Losses of 20 steps of each method, and the gradient norm of every tenth, as tests/oracle.json
records them: float32, one thread, 80 generated images in batches of 8."""
import csv
import functools
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
from conftest import slow

ORACLE = Path(__file__).with_name("oracle.json")


def run(method, settings, out):
    """Trains for 20 steps. Returns {name: 20 values}; "gradient" has those of steps 10 and 20."""
    norms = []

    def measure(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads if g is not None]).norm().item())

    module = importlib.import_module(method)
    cfg = module.Config(**settings, data="shapes", images=80, out=str(out), device="cpu",
                        amp=False, log_every=1, eval_every=0)
    handle = register_optimizer_step_pre_hook(measure)
    try:
        module.train(cfg)
    finally:
        handle.remove()
    with open(Path(out, "metrics.csv"), newline="") as table:
        rows = list(csv.DictReader(table))
    names = set(rows[0]) - {"step", "epoch", "lr", "images_per_second"}
    losses = {name: [float(row[name]) for row in rows if row[name]] for name in names}
    return {**{name: values for name, values in losses.items() if len(values) == 20},
            "gradient": norms[9::10]}


NAMES = [pytest.param(name, marks=slow if name in ("mclim-swin", "mclim-hivit") else ())
         for name in json.loads(ORACLE.read_text())]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_equal_the_recorded_ones(name, tmp_path, monkeypatch):
    known = json.loads(ORACLE.read_text())[name]
    monkeypatch.setattr(common, "load_images", functools.cache(common.load_images))
    monkeypatch.setattr(common.Run, "draw", lambda run, images: None)
    found = run(known["method"], known["settings"], tmp_path)
    assert found.keys() == known["values"].keys()
    worst = max(abs(a - b) / abs(b) for term, values in known["values"].items()
                for a, b in zip(found[term], values, strict=True))
    print(f"{name}: largest relative difference {worst:.1e}")
    assert math.isfinite(worst) and worst < 1e-3
