"""Tests of eval_dense.py, show.py, compare.py and speed.py."""
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import common
import compare
import eval_dense
import eval_linear
import show
import speed
from augment import central_crop, normalize
from conftest import METHODS, ROOT, build, normal, small
from images import UserError, load_images
from plots import denormalize

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def untrained(tmp_path):
    """untrained("mvmae", …): a run folder with the checkpoint of an untrained model."""
    def folder(method, **changes):
        out = tmp_path / "run"
        out.mkdir(exist_ok=True)
        cfg = small(method, **changes)
        common.save_checkpoint(out, method, 1, cfg, model=build(cfg))
        return out
    return folder


# speed.py

def layers(tokens, *widths):
    """Operations of linear layers one after the other: a product and a sum are two."""
    return sum(2 * tokens * a * b for a, b in zip(widths, widths[1:]))


def blocks(tokens, dim, depth):
    """Operations of transformer blocks."""
    attention = layers(tokens, dim, 3 * dim) + 4 * tokens ** 2 * dim + layers(tokens, dim, dim)
    return depth * (attention + layers(tokens, dim, 4 * dim, dim))


def operations(cfg):
    """Operations of forward and backward for two images. Backward takes twice as many as forward,
    once for the patch embedding, whose input has no gradient, and none without gradient."""
    N, P, D = (cfg.img // cfg.patch) ** 2, 3 * cfg.patch ** 2, cfg.dim
    W = getattr(cfg, "decoder_dim", 0)
    method, patches = type(cfg).__module__, layers(N, P, D)
    V = N - round(cfg.mask * N)
    T = 1 + N  # with the class token

    def encode(tokens, frozen=False):
        return (1 if frozen else 2) * patches + 3 * blocks(tokens, D, cfg.depth)

    def encode_only(tokens):
        return patches + blocks(tokens, D, cfg.depth)

    def decode(V):
        return 3 * (layers(1 + V, D, W) + blocks(T, W, cfg.decoder_depth) + layers(T, W, P))

    if method == "mclim":
        head = layers(N, D, 4 * D, P) if cfg.head == "mlp" else layers(N, D, P)
        image = encode(N, cfg.freeze_patch) + 3 * head
        if cfg.contrast == "none":
            return 2 * image
        second = image if cfg.target == "shared" else encode_only(N) + head
        return 2 * (image + second) + 3 * layers(4, P, 4)
    if method == "mvmae":
        views = 1 if cfg.targets == "one" else 2
        similarities = 3 * layers(4, D, 4) if cfg.lam > 0 else 0
        return 2 * views * (encode(1 + V) + decode(V)) + similarities
    if method == "cmae":
        projection = layers(1, D, D, *[D] * (cfg.projection == "mlp"))
        contrast = 2 * encode_only(1 + N - V) + encode_only(1 + V) + 4 * projection
        own = blocks(T, W, cfg.decoder_depth)
        if cfg.decoder == "conv":  # 3×3 in each channel, then across them
            own = cfg.decoder_depth * (2 * 9 * N * W + layers(N, W, W))
        decoder = 3 * (layers(1 + V, D, W) + own + layers(T, W, P))
        location = 3 * layers(V, D, D, N)
        return 2 * (encode(1 + V) + contrast + location + decoder) + 2 * layers(2, D, 2)
    if method == "macrl":
        V_w, g = N - round(cfg.mask_w * N), layers(1, D, cfg.hidden, cfg.out_dim)
        both = encode(1 + V) + encode(1 + V_w) + decode(V) + decode(V_w)
        if cfg.keys == "shared":
            return 2 * (both + 6 * g) + 3 * layers(2, cfg.out_dim, 2 + cfg.bank)
        return 2 * (both + encode_only(1 + V_w) + 4 * g) + 2 * layers(2, cfg.out_dim, 2 + cfg.bank)
    g = layers(1, D, cfg.hidden, cfg.hidden, cfg.out_dim)
    contrast = 2 * (encode(T, cfg.freeze_patch) + encode_only(T) + 4 * g)
    attention_map = layers(T, D, 3 * D)
    mim = attention_map + encode(1 + V, cfg.freeze_patch) + decode(V)
    return 2 * (contrast + (mim if cfg.mim else 0)) + 4 * layers(2, cfg.out_dim, 2)


@pytest.mark.parametrize("method, flags", [
    *((method, {}) for method in METHODS),
    ("mclim", {"contrast": "none", "head": "linear", "freeze_patch": False}),
    ("mvmae", {"targets": "one", "lam": 0}), ("cmae", {"projection": "mlp"}),
    ("cmae", {"decoder": "conv", "heat": "features"}),
    ("macrl", {"keys": "momentum", "bank": 8}), ("camae", {"mim": False, "freeze_patch": True})],
    ids=str)
def test_gflop_of_a_step_equals_arithmetic(method, flags):
    cfg = small(method, depth=3, **flags)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert speed.gflop_per_image(cfg) == pytest.approx(operations(cfg) / 2 / 1e9, rel=1e-9)
    assert torch.rand(1) == expected  # counting leaves the random numbers as they were


def test_gflop_of_grouped_convolutions(monkeypatch):
    class Model(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=3))

        def forward(self, view1, view2):
            return {"loss": self.layers(view1).sum()}

    cfg = small("mvmae")
    monkeypatch.setattr(sys.modules["mvmae"], "Model", Model)
    first, second = 2 * 256 * 3 * 6, 2 * 256 * 2 * 9 * 6
    assert speed.gflop_per_image(cfg) * 1e9 == pytest.approx(2 * first + 3 * second)


def test_seconds_are_the_median_after_two_calls(monkeypatch):
    times = iter(np.cumsum([0, 90, 0, 80, 0, 2, 0, 9, 0, 3]))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    assert speed.seconds(lambda: None, torch.device("cpu")) == 3


@every_method
def test_speed_prints_rates_and_the_fraction_of_the_matrix_rate(method, monkeypatch, capsys):
    monkeypatch.setattr(speed, "seconds", lambda call, device: (call(), 2.0)[1])
    flags = "--img 16 --dim 48 --depth 2 --batch 6 --device cpu --no-amp".split()
    speed.main([method, "--tiny", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(method) and lines[0].endswith("float32")
    assert [line.split()[:3] for line in lines[1:5]] == [
        [name, "3.0", "images/s"] for name in ("reading", "views", "step", "together")]
    gflop, made, fraction, limit = map(float, re.findall(r"[\d.]+(?:e-\d+)?", lines[5]))
    cfg = speed.config_of(speed.load_method(method), ["--tiny", *flags])
    assert gflop == pytest.approx(speed.gflop_per_image(cfg), rel=1e-3)
    assert limit == pytest.approx(2 * 2048 ** 3 / 2e12, rel=1e-2)
    assert made == pytest.approx(3 * gflop / 1e3, rel=1e-2)
    assert fraction == pytest.approx(made / limit, abs=1e-3) and len(lines) == 6


def test_speed_compiles_and_takes_a_file_name(monkeypatch, capsys):
    monkeypatch.setattr(speed, "seconds", lambda call, device: 1.0)
    monkeypatch.setattr(torch, "compile", lambda model, options: compiled.append(model) or model)
    compiled = []
    speed.main(["mvmae.py", "--tiny", "--compile", "--batch", "2", "--device", "cpu"])
    assert len(compiled) == 1 and "compiled" in capsys.readouterr().out


# eval_dense.py

def test_mean_iou_equals_a_loop():
    truth, guess = torch.randint(4, (3, 5, 6)).byte(), torch.randint(5, (3, 5, 6)).byte()
    truth[0, :2] = 255
    iou = eval_dense.intersection_over_union(eval_dense.count_pixels(truth, guess, 6, 255))
    for c in range(6):
        both = either = occurs = 0
        for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist()):
            if t != 255:
                both, either = both + (t == g == c), either + (c in (t, g))
                occurs += t == c
        assert iou[c].item() == pytest.approx(both / either) if occurs else iou[c].isnan(), c
    assert iou[4].isnan() and not iou[3].isnan()


def test_pixel_loss_equals_a_loop_and_leaves_ignored_pixels_out():
    scores, truth = normal(2, 3, 4, 4), torch.randint(3, (2, 4, 4)).byte()
    for ignore in (255, 0):
        truth[0] = ignore
        terms = [-scores[b].log_softmax(0)[int(truth[b, i, j]), i, j]
                 for b in range(2) for i in range(4) for j in range(4) if truth[b, i, j] != ignore]
        loss = eval_dense.pixel_loss(scores, truth, ignore).item()
        assert loss == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5)
    assert eval_dense.pixel_loss(scores, torch.full((2, 4, 4), 7).byte(), 7) == 0


def test_dense_probe_puts_scores_where_their_tokens_are():
    probe = eval_dense.DenseProbe(2, 3, 12)
    nn.init.zeros_(probe.layer.bias)
    probe.layer.weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.zeros(1, 16, 2)
    x[0, 6, 0], x[0, 12, 1] = 9.0, 9.0  # row 1, column 2; row 3, column 0
    scores = probe(x)
    assert scores.shape == (1, 3, 12, 12)
    assert scores[0, 1].argmax() == 4 * 12 + 7 and scores[0, 2].argmax() in (10 * 12, 11 * 12)


def test_segmentation_learns_from_the_truth_and_not_from_colour(monkeypatch):
    monkeypatch.setattr(eval_dense, "RECIPE", {**eval_dense.RECIPE, "epochs": 4, "lr": 1e-2})
    monkeypatch.setattr(eval_dense, "COUNTS", {"training": 400, "validation": 200})
    (train, masks), (test, truth) = (eval_dense.load_shapes(split, 16, 0)
                                     for split in ("training", "validation"))
    assert masks.unique().tolist() == list(range(11))
    assert (masks[:, 0, 0] == 0).double().mean() > 0.9
    assert [truth[i].max().item() for i in range(20)] == [1 + i % 10 for i in range(20)]

    def mean_iou(prediction):
        counts = eval_dense.count_pixels(truth, prediction, 11, 255)
        return eval_dense.intersection_over_union(counts).nanmean().item()

    def colour(images, masks):
        return images.pixels.flatten(2).mT / 64 - 2

    def label(images, masks):
        return 3 * F.one_hot(masks.long().flatten(1), 11).float()

    found = [mean_iou(eval_dense.segment(tokens(train, masks), masks, tokens(test, truth), 11, 255))
             for tokens in (colour, label)]
    assert found[0] < mean_iou(0 * truth) + 0.02 and found[1] > 0.9, found


@pytest.fixture
def ade(tmp_path):
    """A folder in ADE20K's layout: 0 is "other", 1 red, 2 blue; one image is twice as wide."""
    for split, n in (("training", 6), ("validation", 4)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        for i in range(n):
            mask = np.zeros((24, 48 if i == 1 else 24), np.uint8)
            mask[:12, :-8], mask[12:, 8:] = 1, 2
            rgb = np.array([[90, 90, 90], [255, 0, 0], [0, 0, 255]], np.uint8)[mask]
            Image.fromarray(rgb).save(tmp_path / f"ade/images/{split}/{i}.jpg", quality=95)
            Image.fromarray(mask).save(tmp_path / f"ade/annotations/{split}/{i}.png")
    return tmp_path / "ade"


def test_annotations_keep_their_indices_and_positions(ade):
    images, masks = eval_dense.load_annotated(ade, "training", 24)
    assert images.pixels.shape == (6, 3, 24, 24) and masks.unique().tolist() == [0, 1, 2]
    red = (images.pixels[:, 0] > 200) & (images.pixels[:, 2] < 60)
    assert ((masks == 1) == red).double().mean() > 0.98
    assert (masks[1, :12] == 1).all() and (masks[0, 0, -8:] == 0).all()  # the central square
    assert eval_dense.load_annotated(ade, "training", 12)[1].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("data", ["shapes", "ade"])
def test_segmentation_reports_what_it_measured(untrained, ade, data, capsys, monkeypatch):
    monkeypatch.setattr(eval_dense, "RECIPE", {**eval_dense.RECIPE, "lr": 2e-2,
                                               "epochs": 1 if data == "shapes" else 60})
    monkeypatch.setattr(eval_dense, "COUNTS", {"training": 64, "validation": 32})
    run, seen, segment = untrained("mvmae"), {}, eval_dense.segment

    def spied(tokens, truth, queries, *rest):
        seen["prediction"] = segment(tokens, truth, queries, *rest)
        return seen["prediction"]

    monkeypatch.setattr(eval_dense, "segment", spied)
    flags = ["--baselines"] if data == "shapes" else ["--data", str(ade), "--ignore", "0"]
    eval_dense.main([str(run), *flags, "--no-amp"])
    name = "eval_dense" if data == "shapes" else "eval_dense-ade"
    told, report = capsys.readouterr().out, json.loads((run / f"{name}.json").read_text())
    assert Image.open(run / f"{name}.png").size[0] > 500
    rows = ["trained encoder", "untrained encoder", "raw patches"][:3 if data == "shapes" else 1]
    assert list(report["percent"]) == rows
    for row in rows:
        found = report["percent"][row]
        each = report["iou"][row].values()
        assert found["mean_iou"] == pytest.approx(sum(each) / len(each), abs=0.02)
        assert re.search(f"{row} +{found['mean_iou']:.2f} +{found['pixel_accuracy']:.2f}", told)
    if data == "ade":
        truth = eval_dense.load_annotated(ade, "validation", 16)[1]
        right = (seen["prediction"] == truth)[truth > 0].double().mean().item()
        assert found["pixel_accuracy"] == pytest.approx(100 * right, abs=0.01)
        assert set(report["iou"][rows[0]]) == {"1", "2"} and found["mean_iou"] > 60


@pytest.mark.parametrize("change, words", [
    (lambda ade: (ade / "annotations/validation/2.png").unlink(), "2.png"),
    (lambda ade: (ade / "annotations/training/2.png").write_bytes(b"no"), "cannot be read"),
    (lambda ade: Image.new("RGB", (24, 24)).save(ade / "annotations/training/2.png"), "RGB"),
    (lambda ade: Image.new("L", (24, 20)).save(ade / "annotations/training/2.png"), "(24, 20)"),
    (lambda ade: shutil.rmtree(ade / "images/training"), "images/training"),
    (lambda ade: [Image.new("L", Image.open(f).size).save(f)
                  for f in (ade / "annotations/training").iterdir()], "--ignore 0")])
def test_a_bad_folder_of_annotations_is_one_line(untrained, ade, change, words, capsys):
    change(ade)
    with pytest.raises(SystemExit) as stop:
        eval_dense.main([str(untrained("mvmae")), "--data", str(ade), "--ignore", "0"])
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


# show.py

@pytest.mark.parametrize("method, changes", [
    *((method, {}) for method in METHODS), ("mclim", {"backbone": "swin", "dim": 192, "img": 32}),
    ("mclim", {"backbone": "hivit", "dim": 192, "img": 32})], ids=str)
def test_attention_maps_equal_a_loop(method, changes):
    cfg = small(method, **changes)
    encoder, x, inputs = build(cfg).encoder, normal(2, 3, cfg.img, cfg.img), []
    layer = [module for module in encoder.modules() if hasattr(module, "qkv")][-1]
    forward = layer.forward
    layer.forward = lambda x: inputs.append(x) or forward(x)
    with torch.no_grad():
        maps = show.attention_maps(encoder, x)
    tokens, cls = inputs[0].reshape(2, -1, inputs[0].shape[-1]), hasattr(encoder, "cls_token")
    D, K = tokens.shape[2], maps.shape[1]
    d = D // K
    assert maps.shape[2] == encoder.tokens(x).shape[1] and K > 1
    for b in range(2):
        for k in range(K):
            rows = [slice(i * D + k * d, i * D + (k + 1) * d) for i in (0, 1)]
            W_q, W_k = (layer.qkv.weight[part] for part in rows)
            b_q, b_k = (layer.qkv.bias[part] for part in rows)
            query = W_q @ (tokens[b, 0] if cls else tokens[b].mean(0)) + b_q
            weights = [math.exp((query @ (W_k @ token + b_k)).item() / math.sqrt(d))
                       for token in tokens[b]]
            expected = torch.tensor(weights) / sum(weights)
            assert torch.allclose(maps[b, k], expected[1:] if cls else expected, atol=1e-5)
    if hasattr(encoder, "attention"):
        assert torch.allclose(maps, encoder.attention(x), atol=1e-5)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_principal_components_equal_a_singular_value_decomposition():
    x = torch.randn(5, 7, 12) * torch.linspace(3, 0.1, 12) + 4
    flat = x.flatten(0, 1).double()
    U, S, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    theirs, ours = (U * S)[:, :3], show.principal_components(x).flatten(0, 1).double()
    assert torch.allclose(ours * (ours * theirs).sum(0).sign(), theirs, atol=1e-3)


def test_attention_is_drawn_from_its_least_to_its_most():
    model, maps = build(small("mvmae")), torch.zeros(1, 2, 16)
    maps[0, :, 6] = torch.tensor([0.4, 0.2])
    (label, row), = show.attention_rows(model, normal(1, 3, 16, 16), maps).items()
    image = denormalize(row[0])
    assert "class token" in label and "2 heads" in label
    assert image[:, 4:8, 8:12].mean() > 0.6 and image[:, :4].max() < 0.05


@pytest.fixture
def photos(tmp_path):
    """A transparent image, one that must be turned and one whose name is no UTF-8."""
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 20))
    image.save(folder / "a.png")
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 20), "blue").save(folder / "b.jpg", exif=exif)
    Image.new("RGB", (20, 20)).save(folder / "c.png")
    os.rename(folder / "c.png", os.fsencode(folder) + b"/c\xff.png")
    return folder


def test_own_images_are_upright_on_white_and_whole(photos):
    images, names = show.read_folder(photos, 16, 8)
    assert names == ["a.png", "b.jpg", "c\\xff.png"] and images.aspect.tolist() == [2, 0.5, 1]
    assert images.pixels[0, :, 8, 2].tolist() == [255, 0, 0]
    assert images.pixels[0, :, 8, 13].tolist() == [255, 255, 255]
    (wholes,) = show.whole_rows(images).values()
    assert [tuple(whole.shape) for whole in wholes] == [(3, 8, 16), (3, 16, 8), (3, 16, 16)]
    red = torch.tensor([1.0, 0, 0])
    assert torch.allclose(denormalize(wholes[0])[:, 4, 2], red, atol=0.02)


LABELS = {"mclim": ["view 2", "mean query"], "mvmae": ["view 2", "class token"],
          "cmae": ["box of the", "view 2"], "camae": ["view 2", "mask of head\n3 of 3"],
          "macrl": ["branch s:\ntarget", "branch w:\nview", "branch w:\nreconstruction"]}


@every_method
def test_show_draws_test_images_and_the_users_own(untrained, photos, method, monkeypatch):
    drawn, draw = [], show.plot_images

    def draw_two(file, rows, names):
        drawn.append((rows, names))
        draw(file, dict(list(rows.items())[:2]), names)

    monkeypatch.setattr(show, "plot_images", draw_two)
    run = untrained(method)
    show.main([str(run), "--images", "3", "--seed", "5"])
    before = (run / "show.png").read_bytes()
    show.main([str(run), "--folder", str(photos)])
    assert (run / "show-photos.png").exists() and (run / "show.png").read_bytes() == before
    (rows, none), (own, names) = drawn
    assert not none and names == ["a.png", "b.jpg", "c\\xff.png"] and list(own) == list(rows)
    assert len(rows) <= 12 and len(set(rows)) == len(rows)
    labels = " | ".join(rows)
    wanted = ["whole image", "original", "masked", "reconstruction", "principal", *LABELS[method]]
    assert all(word in labels for word in wanted), labels
    assert labels.count("attention") == 1
    test = load_images("shapes", "test", 18)
    ids = torch.randperm(len(test), generator=torch.Generator().manual_seed(5))[:3]
    assert torch.equal(rows["original"], normalize(central_crop(test[ids], 16)))
    for row in own.values():
        assert len(row) == 3 and all(torch.isfinite(image).all() for image in row)


def test_masks_of_heads_hide_their_most_attended_patches():
    cfg = small("camae")
    model, x, maps = build(cfg), normal(2, 3, 16, 16), torch.rand(2, 3, 16)
    rows = show.mask_rows(sys.modules["camae"], model, x, maps, 2)
    assert list(rows) == ["mask of head\n1 of 3", "mask of head\n2 of 3"]
    for k, row in enumerate(rows.values()):
        top = maps[:, k].topk(round(16 * cfg.mask)).indices
        mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, top, True)
        hidden = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert torch.equal(row, x * ~hidden)


@pytest.mark.parametrize("restore", ["clean", "view"])
def test_branches_are_drawn_with_their_targets(restore):
    cfg = small("macrl", gray_s=1.0, jitter_s=0.0, jitter_w=0.0, restore=restore)
    images = load_images("shapes", "test", 18)[:4]
    rows = show.branch_rows(sys.modules["macrl"], build(cfg), images)
    assert len(rows) == (8 if restore == "clean" else 6)
    assert list(rows)[0] == "branch s:\nview" and list(rows)[len(rows) // 2] == "branch w:\nview"
    if restore == "clean":
        gray = denormalize(rows["branch s:\nview"][0])
        assert (gray[0] - gray[1]).abs().max() < 1e-3  # of the same crop as its target
        assert torch.equal(rows["branch w:\nview"], rows["branch w:\ntarget"])


# compare.py

def test_p_is_the_area_beyond_t():
    assert compare.student_p(2.776445, 4) == pytest.approx(0.05, abs=1e-6)
    assert compare.student_p(3.105807, 11) == pytest.approx(0.01, abs=1e-6)
    for df in (1, 2, 3, 8, 13, 40):
        for t in (0.0, 0.3, 2.5, 6.0):
            x = torch.linspace(-t, t, 20_001, dtype=torch.float64)
            density = (1 + x ** 2 / df) ** (-(df + 1) / 2) / math.sqrt(df * math.pi)
            density *= math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
            expected = pytest.approx(1 - torch.trapezoid(density, x).item(), abs=1e-7)
            assert compare.student_p(t, df) == compare.student_p(-t, df) == expected


def test_p_uses_the_variance_pooled_over_all_rows():
    values = {"a": [1.0, 2.0, 3.0], "b": [4.0, 6.0], "c": [3.0]}
    variance = (1 + 0 + 1 + 1 + 1) / (2 + 1 + 0)
    deviation, df = compare.pooled_deviation(values)
    assert deviation == pytest.approx(variance ** 0.5) and df == 3
    for row, gap, n in (("b", 3, 2), ("c", 1, 1)):
        expected = compare.student_p(gap / math.sqrt(variance * (1 / 3 + 1 / n)), 3)
        assert compare.p_value(values, row, "a") == pytest.approx(expected, rel=1e-12)
    assert math.isnan(compare.p_value(values, "a", "a"))
    assert math.isnan(compare.p_value({"a": [1.0], "b": [2.0]}, "b", "a"))
    assert math.isnan(compare.p_value({"a": [1.0, 1.0], "b": [2.0, 2.0]}, "b", "a"))
    assert math.isnan(compare.p_value(values, "b", "not done"))


def test_rows_are_the_lines_of_a_file_or_all_method_files(monkeypatch, tmp_path):
    rows = compare.read_rows("# a comment\n\nMAE, own = mvmae.py --lam 0 --targets=one\n")
    assert rows == {"MAE, own": ("mvmae.py", ["--lam", "0", "--targets=one"])}
    monkeypatch.setattr(compare, "plan", lambda rows, flags, args: found.update(rows) or [])
    found = {}
    compare.main([])
    assert found == {method: (f"{method}.py", []) for method in sorted(METHODS)}


ROWS = "MAE = mvmae.py --targets one --lam 0 --norm-pixels\nTwo views = mvmae.py\n"
COMMON = ("--tiny --data shapes --images 200 --img 16 --dim 48 --depth 2 --batch 50 --eval-every 0 "
          "--device cpu --no-amp").split()


@pytest.fixture
def fast(tmp_path, monkeypatch):
    """fast("out", …): compare.main with few shapes, short probes and no pictures."""
    sets = {split: load_images("shapes", split, 18)[torch.arange(n)]
            for split, n in (("train", 240), ("test", 100))}
    monkeypatch.setattr(common, "load_images", lambda data, split, *_: sets[split])
    for module, name in ((common, "plot_images"), (common, "plot_curves"),
                         (eval_linear, "plot_confusion"), (compare, "draw_table")):
        monkeypatch.setattr(module, name, lambda *_: None)
    for recipe in eval_linear.RECIPES.values():
        monkeypatch.setitem(recipe, "epochs", 2)
        monkeypatch.setitem(recipe, "min_steps", 0)
    (tmp_path / "rows").write_text(ROWS)
    return lambda out, *more: compare.main(["--rows", str(tmp_path / "rows"), "--out", str(
        tmp_path / out), "--seeds", "0", "1", *COMMON, *more])


def outcome(folder):
    """The table and the scores of each run."""
    with open(folder / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    reports = {file.parent.name: json.loads(file.read_text())
               for file in folder.glob("*/eval_linear.json")}
    return table, {name: report["percent"] for name, report in reports.items()}


def test_a_stopped_comparison_ends_in_the_same_table(fast, tmp_path, monkeypatch, capsys):
    fast("whole", "--gflop", "9", "--seeds", "0")
    told = capsys.readouterr().out
    assert "run 2 of 2: Two views, seed 0" in told and "next:" not in told

    save, evaluate, saves, evaluated = common.Run.save, eval_linear.evaluate, [], []

    class Killed(BaseException):
        pass

    def save_or_stop(self, step):
        saves.append(self.folder.name)
        if len(saves) == 4:
            raise Killed
        save(self, step)
        if len(saves) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate_or_stop(args):
        evaluated.append(Path(args.run).name)
        if len(evaluated) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # in the evaluation
        evaluate(args)

    monkeypatch.setattr(common.Run, "save", save_or_stop)
    monkeypatch.setattr(eval_linear, "evaluate", evaluate_or_stop)
    ends = []
    while "done" not in ends:
        try:
            fast("stopped", "--gflop", "9", "--seeds", "0")
            ends.append("done")
        except (Killed, SystemExit) as error:
            ends.append(getattr(error, "code", "killed"))
    assert ends == [143, "killed", 130, "done"]
    assert capsys.readouterr().err.count("compare.py: stopped; the same command continues") == 2
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    assert evaluated == ["mae-0", "two-views-0", "two-views-0"]  # what is finished is not repeated

    args = types.SimpleNamespace(out=str(tmp_path / "whole"), seeds=[0], gflop=9)
    job = compare.plan(compare.read_rows(ROWS), COMMON, args)[0]
    report = json.loads((job.folder / "eval_linear.json").read_text())
    percent = report["percent"]["trained encoder"]
    names = "knn_top1", "linear_top1", "attentive_top1"
    assert compare.read_scores(job) == {
        **{name: percent[name] for name in names},
        "rank": report["effective_rank"]["trained encoder"]}
    assert compare.read_scores(job._replace(steps=job.steps + 1)) is None
    os.utime(job.folder / "eval_linear.json", (0, 0))  # older than the checkpoint
    assert compare.read_scores(job) is None


def test_ctrl_c_in_the_last_evaluation_of_a_run_stops_the_comparison(fast, tmp_path, monkeypatch,
                                                                     capsys):
    monkeypatch.setattr(common.Run, "evaluate", lambda self, *_: (
        os.kill(os.getpid(), signal.SIGINT) if self.step == self.steps else None))
    with pytest.raises(SystemExit) as stop:
        fast("out", "--gflop", "9")
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capsys.readouterr().err.endswith("compare.py: stopped; the same command continues\n")
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["mae-0"]


def test_a_loss_that_is_not_finite_costs_only_its_run(fast, tmp_path, monkeypatch, capsys):
    train = sys.modules["mvmae"].train

    def fail(cfg):
        if cfg.lam == 0:
            signal.signal(signal.SIGINT, lambda *_: None)  # as Run does
            raise FloatingPointError("step 3: the loss is not finite")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return train(cfg)

    monkeypatch.setattr(sys.modules["mvmae"], "train", fail)
    with pytest.raises(SystemExit) as stop:
        fast("out", "--gflop", "9", "--seeds", "0")
    table, _ = outcome(tmp_path / "out")
    assert stop.value.code == 1 and [row["row"] for row in table] == ["Two views"]
    assert "step 3: the loss is not finite" in capsys.readouterr().err


def test_a_budget_becomes_epochs(fast, tmp_path):
    rows = compare.read_rows(ROWS)
    args = types.SimpleNamespace(out=str(tmp_path), seeds=[3, 1], gflop=15)
    jobs = compare.plan(rows, COMMON, args)
    assert [(job.row, job.cfg.seed) for job in jobs] == [
        ("MAE", 3), ("Two views", 3), ("MAE", 1), ("Two views", 1)]
    for job in jobs:
        step = 50 * speed.gflop_per_image(job.cfg)
        assert job.steps == int(15 / step) and job.steps % 4
        assert round(job.cfg.epochs * (200 // 50)) == job.steps  # as train computes it
        assert job.cfg.warmup == job.cfg.epochs / 5 and job.cfg.out == str(job.folder)
    jobs = compare.plan(rows, [*COMMON, "--epochs", "3"],
                        types.SimpleNamespace(out=str(tmp_path), seeds=[0], gflop=None))
    assert {(job.steps, job.cfg.epochs) for job in jobs} == {(12, 3)}


def test_without_a_budget_a_good_one_is_named(fast, capsys):
    with pytest.raises(SystemExit):
        fast("out")
    line = capsys.readouterr().err.splitlines()[-1]
    cfg = speed.config_of(speed.load_method("mvmae"), COMMON)
    named = float(re.search(r"--gflop (\d+), which pays for 10 epochs of Two views", line)[1])
    assert named == pytest.approx(10 * 200 * speed.gflop_per_image(cfg), rel=0.05)


def test_the_table(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (
        figures.append(figure), savefig(figure, *args, **options)))
    scores = {"a": [10.0, 12.0, 14.0], "b": [30.0, 31.0, 35.0], "only one": [11.0]}
    jobs, results = [], {}
    for row, values in scores.items():
        for seed, value in enumerate(values):
            jobs.append(compare.Job(row, None, tmp_path / f"{row}-{seed}", 12))
            results[jobs[-1].folder] = {name: value + i for i, name in enumerate(compare.SCORES)}
    to_come = compare.Job("a", None, tmp_path / "to come", 12)
    text = compare.write_table(tmp_path, [*jobs, to_come], results, "a")
    p = compare.p_value(scores, "b", "a")
    with open(tmp_path / "table.csv", newline="") as file:
        a, b, one = csv.DictReader(file)
    assert b["seeds"] == "3" and float(b["linear %"]) == 33
    assert float(b["effective rank deviation"]) == pytest.approx(7 ** 0.5)
    assert float(b["kNN % p"]) == p < 0.01 < float(one["kNN % p"])
    assert a["kNN % p"] == one["kNN % deviation"] == "nan"
    lines = text.splitlines()
    assert lines[1].startswith("a ") and "12.00 ± 2.00 " in lines[1] and " p " not in lines[1]
    assert f"32.00 ± 2.65 p {p:.2g}*" in lines[2] and lines[2].count("*") == 4
    assert "11.00 p " in lines[3] and "±" not in lines[3]
    assert lines[4].split() == ["pooled", "deviation"] + [f"{(22 / 4) ** 0.5:.2f}"] * 4
    assert "against a" in text and "pooled over all rows, 4 degrees of freedom" in text
    assert (tmp_path / "table.txt").read_text() == text
    axes = figures[0].axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(scores)
    dots = [line.get_xdata() for line in axes[1].lines if line.get_marker() == "o"]
    assert [list(x) for x in dots] == [[v + 1 for v in values] for values in scores.values()]
    bars = [bar.get_segments()[0][:, 0].tolist() for bar in axes[0].collections[:2]]
    assert bars[0] == [10, 14] and bars[1] == pytest.approx([32 - 7 ** 0.5, 32 + 7 ** 0.5])


# All programs

@pytest.mark.parametrize("program, command, words", [
    (speed, "nothing --tiny", "nothing.py does not exist"),
    (speed, "common", "no class Model"),
    (speed, "mvmae --mask 2", "--mask 2"),
    (eval_dense, "{tmp}/nowhere", "nowhere"),
    (eval_dense, "{run} --data {tmp}", "images/training"),
    (show, "{tmp}/nowhere", "nowhere"),
    (show, "{run} --images 0", "--images 0"),
    (show, "{run} --images {tmp}", "--images"),
    (show, "{run} --folder {tmp} --data shapes", "not allowed with"),
    (show, "{run} --folder {tmp}/nowhere", "nowhere is not a folder"),
    (show, "{run} --folder {tmp}/run", "holds no images"),
    (show, "{run} --folder {tmp}/bad", "bad/a.png cannot be read"),
    (show, "{run} --out {tmp}/a.gif", "a.gif must end in"),
    (show, "{run} --images 1 --out {tmp}/no/a.png", "no/a.png"),
    (compare, "--gflop nan", "--gflop"),
    (compare, "--gflop 0 --rows {tmp}/rows", "a step of MAE"),
    (compare, "--gflop 9 --seed 1", "--seed"),
    (compare, "--gflop 9 --epochs 3", "--epochs"), (compare, "--gflop 9 --resume x", "--resume"),
    (compare, "--gflop 9 --baseline MEA", "MEA"), (compare, "--gflop 9 --rows {tmp}/no", "no"),
    (compare, "--gflop 9 --tua 1", "--tua"), (compare, "--gflop 9 --rows {tmp}/words", "'mea.py'"),
    (compare, "--gflop 9 --rows {tmp}/twice", "'mae = mvmae.py'"),
    (compare, "--gflop 9 --rows {tmp}/no-file", "mea.py does not exist"),
    (compare, "--gflop 9 --rows {tmp}/rows --mask 2", "row MAE: --mask 2"),
    (compare, "--gflop 9 --rows {tmp}/rows --batch 241", "try --batch 200"),
    (compare, "--gflop 9 --rows {tmp}/rows --images 241", "--images 241"),
    (compare, "--gflop 9 --rows {tmp}/rows --out {tmp}/other", "another --out")])
def test_a_mistake_is_one_line(fast, untrained, tmp_path, program, command, words, capsys,
                               monkeypatch):
    monkeypatch.setattr(sys.modules["mvmae"], "train", lambda cfg: pytest.fail("trained"))
    for name, text in (("words", "mea.py"), ("twice", f"{ROWS}mae = mvmae.py"),
                       ("no-file", "a = mea.py"), ("bad/a.png", "no image"),
                       ("other/mae-0/config.json", '{"method": "mvmae", "config": {}}')):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    argv = command.format(run=untrained("mvmae"), tmp=tmp_path).split()
    if program is compare:
        argv = ["--seeds", "0", "--out", str(tmp_path / "out"), *COMMON, *argv]
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: " in line and words in line, line
    assert not (tmp_path / "out").exists()


def test_a_copied_method_file_works_with_all_programs(tmp_path):
    for name in ("common", "augment", "images", "plots", "eval_linear", "eval_dense", "show",
                 "compare", "speed"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copy(ROOT / "mvmae.py", tmp_path / "mine.py")
    (tmp_path / "rows").write_text("Mine = mine.py --lam 0\n")
    script = f"""
import common, eval_dense, eval_linear, compare, show, speed
common.plot_images = common.plot_curves = eval_linear.plot_confusion = lambda *_: None
compare.draw_table = eval_dense.draw = lambda *_: None
for recipe in (*eval_linear.RECIPES.values(), eval_dense.RECIPE):
    recipe.update(epochs=1, min_steps=0)
eval_dense.COUNTS.update(training=32, validation=16)
speed.seconds = lambda call, device: 1.0
flags = {COMMON}
compare.main(["--rows", "rows", "--out", "out", "--seeds", "0", "--gflop", "3", *flags])
show.main(["out/mine-0", "--images", "1"])
eval_dense.main(["out/mine-0"])
speed.main(["mine", *flags])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/mine-0/config.json").read_text())["method"] == "mine"
    assert (tmp_path / "out/mine-0/show.png").exists() and "mine on CPU" in done.stdout


def test_no_program_names_a_method():
    for name in ("eval_linear", "eval_dense", "show", "compare", "speed"):
        code = (ROOT / f"{name}.py").read_text().split('"""', 2)[2]
        code = re.sub(r'""".*?"""|#.*', "", code, flags=re.DOTALL)
        assert not re.search("|".join(METHODS), code), name


def test_help(capsys):
    for program in (eval_dense, show, compare, speed):
        with pytest.raises(SystemExit) as stop:
            program.main(["--help"])
        assert stop.value.code == 0 and program.__doc__.splitlines()[0] in capsys.readouterr().out
