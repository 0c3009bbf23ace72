"""Tests of what looks at a finished run: the linear probe, pictures."""
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image

import eval_linear, show
from test_smoke import MODULES, SMALL, every_method, few, folder, normal  # few and folder are fixtures


def test_linear_probe_separates_what_is_separable():
    labels = torch.arange(2000) % 3
    features = F.one_hot(labels, 5) * 0.5 + 0.02 * normal(2000, 5) + torch.tensor([0, 0, 0, 50.0, 0])
    scores = eval_linear.linear_probe(features, labels, features, 3)
    assert eval_linear.top(scores, labels, 1) == 100 and eval_linear.top(-scores, labels, 1) == 0


@every_method
def test_show_draws_any_checkpoint_and_the_users_own_images(few, folder, tmp_path, method, capsys):
    cfg = replace(SMALL[method], epochs=1, warmup=0, data="shapes", out=str(tmp_path / "run"))
    out = MODULES[method].train(cfg)
    assert show.main([str(out), "--count", "3"]) == 0
    plain = Image.open(out / "show.png")
    assert show.main([str(out), "--images", str(folder), "--count", "3", "--out", str(tmp_path / "own.png")]) == 0
    own = Image.open(tmp_path / "own.png")
    assert plain.size == own.size and plain.tobytes() != own.tobytes()
    assert show.main([str(out), "--images", str(tmp_path / "nowhere")]) == 2
    assert show.main([str(out), "--out", str(tmp_path / "no" / "folder" / "a.png")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "--images" in err and "--out" in err
