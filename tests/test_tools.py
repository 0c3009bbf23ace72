"""Tests of eval_dense.py, show.py, compare.py and speed.py."""
import csv
import json
import math
import os
import re
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import camae
import common
import compare
import eval_dense
import eval_finetune
import eval_linear
import macrl
import mvmae
import plots
import show
import speed
from augment import central_crop, normalize
from conftest import METHODS, ROOT, build, normal, program, slow, small, status
from images import UserError, load_images
from plots import denormalize


# speed.py

def test_gflop_of_a_step_equals_arithmetic(monkeypatch):
    """Backward takes twice as many operations as forward, but as many for the first layer, whose
    input has no gradient."""
    class Model(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.embed, self.block = nn.Conv2d(3, 12, 4, 4), mvmae.Block(12, 3)
            self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)

        def forward(self, view1, view2):
            tokens = self.grouped(self.embed(view1)).flatten(2).mT  # 16 of 12
            return {"loss": self.block(tokens).sum()}

    monkeypatch.setattr(mvmae, "Model", Model)
    embed, grouped = 2 * 16 * 12 * 48, 2 * 16 * 12 * 4 * 9
    block = 2 * 16 * 12 * 12 * 12 + 2 * 2 * 16 * 16 * 12  # layers, then attention
    state, found = torch.get_rng_state(), speed.gflop_per_image(mvmae, small("mvmae"))
    assert found * 1e9 == pytest.approx(2 * embed + 3 * (grouped + block), rel=1e-9)
    assert torch.equal(torch.get_rng_state(), state)


def test_seconds_are_the_median_after_two_calls(monkeypatch):
    for durations, median in (([90, 80, 2, 9, 3], 3), ([90, 80, 1, 1, 2, 2], 1.5)):
        times = iter(np.cumsum([value for pair in zip([0] * 6, durations) for value in pair]))
        monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
        assert speed.seconds(lambda: None, torch.device("cpu")) == median


@pytest.mark.parametrize("method", ["macrl", "camae"])
def test_speed_prints_rates_of_a_compiled_model(method, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, options: compiled.append(model) or model)
    monkeypatch.setattr(speed, "seconds", lambda call, device: (call(), 2.0)[1])
    assert speed.matrix_rate(torch.device("cpu"), torch.float32) == 2 * 2048 ** 3 / 2
    monkeypatch.setattr(speed, "matrix_rate", lambda device, dtype: 1e8)
    speed.main([f"{method}.py", *COMMON, "--compile"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(method) and lines[0].endswith("float32")
    assert [line.split()[:3] for line in lines[1:5]] == [
        [name, "25.0", "images/s"] for name in ("reading", "views", "step", "together")]
    assert len(compiled) == 1 and lines[3].endswith("compiled")
    gflop, made, fraction, limit = map(float, re.findall(r"[\d.]+(?:e-\d+)?", lines[5]))
    assert (limit, made) == pytest.approx((1e-4, 25 * gflop / 1e3), rel=1e-2)
    assert fraction == pytest.approx(made / limit, rel=1e-2)


# eval_dense.py

def test_iou_leaves_ignored_pixels_out():
    truth, guess = torch.randint(4, (3, 5, 6)).byte(), torch.randint(5, (3, 5, 6)).byte()
    truth[0, :2] = 255
    iou = eval_dense.intersection_over_union(eval_dense.count_pixels(truth, guess, 6, 255))
    for c in range(4):
        true, found = truth == c, (guess == c) & (truth != 255)
        assert torch.isclose(iou[c], (true & found).sum() / (true | found).sum().double())
    assert iou[4:].isnan().all()  # without true pixels


def test_pixel_loss_is_the_mean_over_pixels_that_are_not_ignored():
    scores, truth = normal(2, 3, 4, 4), torch.randint(3, (2, 4, 4)).byte()
    expected = F.cross_entropy(scores, truth.long(), ignore_index=1)
    assert torch.allclose(eval_dense.pixel_loss(scores, truth, 1), expected)
    assert eval_dense.pixel_loss(scores, torch.full((2, 4, 4), 7).byte(), 7) == 0


def test_a_segmentation_that_is_not_finite_is_an_error():
    tokens, truth = normal(4, 4, 2), torch.zeros(4, 4, 4).byte()
    assert eval_dense.segment(tokens, truth, tokens, 2, 255).shape == (4, 4, 4)
    with pytest.raises(FloatingPointError, match="not finite"):
        eval_dense.segment(tokens, truth, tokens * math.nan, 2, 255)


def test_scores_of_tokens_are_upsampled_bilinearly():
    probe, x = eval_dense.DenseProbe(2, 2, 12), normal(1, 16, 2)
    probe.layer.weight.data = torch.eye(2)
    nn.init.zeros_(probe.layer.bias)
    expected = F.interpolate(x.mT.reshape(1, 2, 4, 4), (12, 12), mode="bilinear")
    assert torch.allclose(probe(x), expected, atol=1e-6)


def test_shapes_have_their_class_on_their_pixels(monkeypatch):
    monkeypatch.setattr(eval_dense, "COUNTS", {"training": 20, "validation": 20})
    (images, classes), (others, _) = (eval_dense.load_shapes(split, 16, 0)
                                      for split in ("training", "validation"))
    assert [x.unique().tolist() for x in classes] == [[0, 1 + i % 10] for i in range(20)]
    assert not torch.equal(images.pixels, others.pixels)


@pytest.fixture
def ade(tmp_path):
    """A folder in ADE20K's layout: 0 is "other", 1 red, 2 blue; one image is twice as wide."""
    for i, split in enumerate(["training"] * 6 + ["validation"] * 4):
        mask = np.zeros((24, 48 if i == 1 else 24), np.uint8)
        mask[:12, :-8], mask[12:, 8:] = 1, 2
        rgb = np.array([[90, 90, 90], [255, 0, 0], [0, 0, 255]], np.uint8)[mask]
        for kind, pixels in (("images", rgb), ("annotations", mask)):
            (tmp_path / "ade" / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "ade" / kind / split / f"{i}.png")
    return tmp_path / "ade"


def test_annotations_keep_their_indices_and_positions(ade):
    images, masks = eval_dense.load_annotated(ade, "training", 24)
    assert torch.equal(masks == 1, images.pixels[:, 0] == 255)
    assert (masks[1, :12] == 1).all() and (masks[0, 0, -8:] == 0).all()  # the central square
    assert eval_dense.load_annotated(ade, "training", 12)[1].unique().tolist() == [0, 1, 2]
    for kind in ("images", "annotations"):  # the same names in two folders
        os.rename(ade / kind / "training", ade / kind / "a")
        (ade / kind / "training" / "b").mkdir(parents=True)
        os.rename(ade / kind / "a", ade / kind / "training" / "a")
        shutil.copy(ade / kind / "validation" / "6.png", ade / kind / "training" / "b" / "0.png")
    Image.new("L", (24, 24), 5).save(ade / "annotations" / "training" / "b" / "0.png")
    assert eval_dense.load_annotated(ade, "training", 24)[1].amax((1, 2)).tolist() == [2] * 6 + [5]


def test_segmentation_reports_what_it_measured(untrained, ade, monkeypatch):
    monkeypatch.setattr(eval_dense, "RECIPE", {**eval_dense.RECIPE, "lr": 2e-2, "epochs": 60})
    predictions, segment, run = [], eval_dense.segment, untrained("mvmae")

    def segment_and_keep(*arguments):
        predictions.append(segment(*arguments))
        return predictions[-1]

    monkeypatch.setattr(eval_dense, "segment", segment_and_keep)
    eval_dense.main(f"{run}/last.pt --data {ade} --ignore 0 --baselines --no-amp".split())
    report = json.loads((run / "eval_dense-last-ade.json").read_text())
    assert (run / "eval_dense-last-ade.png").exists()
    rows = ["trained encoder", "untrained encoder", "raw patches"]
    assert list(report["percent"]) == list(report["iou"]) == rows
    truth = eval_dense.load_annotated(ade, "validation", 16)[1]
    for row, prediction in zip(rows, predictions, strict=True):
        found, each = report["percent"][row], report["iou"][row]
        right = 100 * (prediction == truth)[truth > 0].double().mean().item()
        assert found["pixel_accuracy"] == pytest.approx(right, abs=0.01) and right > 80, row
        assert found["mean_iou"] == pytest.approx((each["1"] + each["2"]) / 2, abs=0.02)


@pytest.mark.parametrize("change, words", [
    (lambda masks: (masks / "2.png").unlink(), "2.png cannot be read"),
    (lambda masks: Image.new("RGB", (24, 24)).save(masks / "2.png"), "RGB"),
    (lambda masks: Image.new("L", (24, 20)).save(masks / "2.png"), "(24, 20)"),
    (lambda masks: [Image.new("L", Image.open(file).size).save(file)
                    for file in masks.iterdir()], "--ignore 0")])
def test_a_bad_folder_of_annotations_is_one_line(untrained, ade, change, words, capsys):
    change(ade / "annotations/training")
    assert status(eval_dense, untrained("mvmae"), "--data", ade, "--ignore", 0) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


# show.py

@pytest.mark.parametrize("method, changes", [
    ("mvmae", {}), ("mclim", {}), ("mclim", {"backbone": "swin", "dim": 192, "img": 32}),
    ("mclim", {"backbone": "hivit", "dim": 192, "img": 32})], ids=str)
def test_attention_maps_are_the_softmax_of_each_head(method, changes):
    cfg = small(method, **changes)
    encoder, x, inputs = build(cfg).encoder, normal(2, 3, cfg.img, cfg.img), []
    layer = [module for module in encoder.modules() if hasattr(module, "qkv")][-1]
    layer.register_forward_hook(lambda layer, args, out: inputs.append(args[0]))
    with torch.no_grad():
        maps = show.attention_maps(encoder, x)
        q, k, _ = layer.qkv(inputs[0].flatten(1, -2)).chunk(3, 2)
    cls, K = method == "mvmae", maps.shape[1]
    assert maps.shape == (2, K, encoder.tokens(x).shape[1]) and K > 1
    q = q[:, :1] if cls else q.mean(1, keepdim=True)
    for head, (one, other) in enumerate(zip(q.chunk(K, 2), k.chunk(K, 2))):
        expected = torch.softmax(one @ other.mT / one.shape[2] ** 0.5, 2)[:, 0, cls:]
        assert torch.allclose(maps[:, head], expected, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_principal_components_equal_those_of_an_svd():
    x = torch.randn(5, 7, 12) * torch.linspace(3, 0.1, 12) + 4
    flat = x.flatten(0, 1).double()
    U, S, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    theirs, ours = (U * S)[:, :3], show.principal_components(x).flatten(0, 1).double()
    assert torch.allclose(ours * (ours * theirs).sum(0).sign(), theirs, atol=1e-3)


def test_attention_and_masks_are_drawn_on_their_patches():
    cfg = small("camae")
    model, x, maps = build(cfg), normal(2, 3, 16, 16), torch.rand(2, 3, 16)
    (_, row), = show.attention_rows(model, x, maps).items()
    shades = torch.stack([denormalize(image) for image in row]).mean(1)[:, ::4, ::4].flatten(1)
    assert torch.equal(shades.argmin(1), maps.mean(1).argmin(1)) and shades.max() > 0.6
    assert torch.equal(shades.argmax(1), maps.mean(1).argmax(1)) and shades.min() < 0.05
    rows = show.mask_rows(camae, model, x, maps, 2)
    assert len(rows) == 2
    for k, row in enumerate(rows.values()):
        mask = camae.idm_mask(maps[:, k], cfg.mask)
        patches = camae.patchify(x, 4).masked_fill(mask[:, :, None], 0)
        assert torch.equal(row, camae.unpatchify(patches, 4))


@pytest.mark.parametrize("method, labels", [
    ("mclim", "mean query"), ("mvmae", "class token"), ("camae", "mask of head\n3 of 3"),
    ("cmae", "box of the\nheat map | view 1 | view 2"), ("macrl", "branch w:\nreconstruction")])
def test_show_draws_test_images_and_the_users_own(untrained, tmp_path, method, labels,
                                                  monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 20), "red").save(photos / "a.png")
    Image.new("RGB", (20, 40)).save(os.fsdecode(os.fsencode(photos) + b"/c\xff.png"))
    drawn = []
    monkeypatch.setattr(show, "plot_images", lambda *args: drawn.append(args))
    run = untrained(method)
    show.main([str(run / "last.pt"), "--images", "3", "--seed", "5"])
    show.main([str(run), "--folder", str(photos)])
    (file, rows, none), (other, own, names) = drawn
    assert (file, other) == (run / "show-last.png", run / "show-photos.png")
    assert not none and names == ["a.png", "c\\xff.png"] and list(own) == list(rows)
    for words in ("whole image", "original", "reconstruction", "principal", labels):
        assert words in " | ".join(rows) and len(rows) <= 12, words
    test = load_images("shapes", "test", 18)
    ids = torch.randperm(len(test), generator=torch.Generator().manual_seed(5))[:3]
    assert torch.equal(rows["original"], normalize(central_crop(test[ids], 16)))
    wide, high = next(iter(own.values()))  # in their own proportions
    assert wide.shape == (3, 9, 18) and high.shape == (3, 18, 9)
    read, _ = show.read_folder(photos, 50, 3)
    assert read.pixels.shape == (2, 3, 20, 20)  # never enlarged


def test_nothing_is_reconstructed_if_nothing_is_masked():
    x = normal(2, 3, 16, 16)
    assert list(show.reconstruction_rows(build(small("mclim", mask=0, lam=0)), x)) == ["original"]


def test_a_branch_has_a_target_if_that_is_not_the_view():
    images = load_images("shapes", "test", 18)[:4]
    for restore in ("clean", "view"):
        model = build(small("macrl", jitter_w=0.0, restore=restore))
        rows = show.branch_rows(macrl, model, images)
        view = rows["branch w:\nview"]
        assert torch.equal(rows.get("branch w:\ntarget", view), view)  # without jitter
        assert ("branch s:\ntarget" in rows) == (restore == "clean")


# compare.py

@pytest.mark.parametrize("t, df, p", [
    (12.706205, 1, 0.05), (-4.302653, 2, 0.05), (5.840909, 3, 0.01), (3.105807, 11, 0.01),
    (-2.228139, 10, 0.05)])
def test_p_is_that_of_a_table(t, df, p):
    assert compare.student_p(t, df) == pytest.approx(p, abs=1e-6)


def test_p_uses_the_variance_of_all_rows():
    values = {"a": [1.0, 2.0, 3.0], "b": [4.0, 6.0], "c": [3.0]}
    variance = (1 + 0 + 1 + 1 + 1) / (2 + 1 + 0)
    for row, gap, n in (("b", 3, 2), ("c", 1, 1)):
        expected = compare.student_p(gap / math.sqrt(variance * (1 / 3 + 1 / n)), 3)
        assert compare.p_value(values, row, "a") == pytest.approx(expected, rel=1e-12)
    for a, b in (([1.0], [2.0]), ([1.0, 1.0], [2.0, 2.0])):  # no variance
        assert math.isnan(compare.p_value({"a": a, "b": b}, "b", "a"))
    assert math.isnan(compare.p_value(values, "a", "a"))
    assert math.isnan(compare.p_value(values, "b", "not done"))


ROWS = "# a comment\n\nMAE = mvmae.py --targets one --lam 0\nTwo views = mvmae.py\n"
COMMON = ("--tiny --data shapes --images 200 --img 16 --dim 48 --depth 2 --batch 50 --eval-every 0 "
          "--device cpu --no-amp").split()


def test_rows_are_the_lines_of_a_file_or_all_method_files(monkeypatch):
    assert compare.read_rows(ROWS) == {
        "MAE": ("mvmae.py", ["--targets", "one", "--lam", "0"]), "Two views": ("mvmae.py", [])}
    monkeypatch.setattr(compare, "plan", lambda rows, flags, args: found.update(rows) or [])
    found = {}
    compare.main([])
    assert found == {method: (f"{method}.py", []) for method in sorted(METHODS)}


@pytest.fixture
def fast(tmp_path, monkeypatch):
    """Flags of compare.py; short probes, few shapes, empty pictures."""
    sets = {split: load_images("shapes", split, 18)[torch.arange(n)]
            for split, n in (("train", 240), ("test", 100))}
    monkeypatch.setattr(common, "load_images", lambda data, split, *_: sets[split])
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: Path(file).touch())
    for recipe in eval_linear.RECIPES.values():
        monkeypatch.setitem(recipe, "epochs", 2)
        monkeypatch.setitem(recipe, "min_steps", 0)
    (tmp_path / "rows").write_text(ROWS)
    return ["--rows", tmp_path / "rows", "--seeds", 0, "--gflop", 9, *COMMON, "--out"]


def plan(folder, flags=COMMON, seeds=(0,), gflop=9):
    args = types.SimpleNamespace(out=str(folder), seeds=list(seeds), gflop=gflop)
    return compare.plan(compare.read_rows(ROWS), flags, args)


def test_a_stopped_comparison_ends_in_the_same_table(fast, tmp_path, monkeypatch, capsys):
    """Stopped in the first run and in the evaluation of the second."""
    compare.main([*map(str, fast), str(tmp_path / "whole")])
    save, evaluate, saved, evaluated = common.Run.save, eval_linear.evaluate, [], []

    def save_and_stop(self, step):
        save(self, step)
        saved.append(step)
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_and_evaluate(args):
        evaluated.append(Path(args.run).name)
        if len(evaluated) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        evaluate(args)

    monkeypatch.setattr(common.Run, "save", save_and_stop)
    monkeypatch.setattr(eval_linear, "evaluate", stop_and_evaluate)
    for code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        assert status(compare, *fast, tmp_path / "stopped") == code
        assert capsys.readouterr().err.endswith("stopped; the same command continues\n")
    compare.main([*map(str, fast), str(tmp_path / "stopped")])
    stopped, whole = (tmp_path / name / "table.csv" for name in ("stopped", "whole"))
    assert stopped.read_text() == whole.read_text()
    assert evaluated == ["mae-0", "two-views-0", "two-views-0"]  # what is finished is not repeated

    job = plan(tmp_path / "whole")[0]
    report, scores = job.folder / "eval_linear.json", compare.read_scores(job)
    found = json.loads(report.read_text())
    assert scores.pop("rank") == found["effective_rank"]["trained encoder"]
    assert scores.items() <= found["percent"]["trained encoder"].items()
    assert compare.read_scores(job._replace(steps=job.steps + 1)) is None
    for change in ({"run": f"{job.folder}/previous.pt"}, {"attentive": False}, {"images": 7}):
        report.write_text(json.dumps(found | change))
        assert compare.read_scores(job) is None, change
    report.write_text(json.dumps(found))
    assert compare.read_scores(job) is not None
    os.utime(report, (0, 0))  # older than the checkpoint
    assert compare.read_scores(job) is None


def test_values_that_are_not_finite_cost_only_their_run(fast, tmp_path, monkeypatch, capsys):
    train = mvmae.train

    def fail(cfg):
        if cfg.lam == 0:
            signal.signal(signal.SIGINT, lambda *_: None)  # as Run does
            raise FloatingPointError("step 3: the loss is not finite")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return train(cfg)

    monkeypatch.setattr(mvmae, "train", fail)
    assert status(compare, *fast, tmp_path / "out") == 1
    _, row = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert row.startswith("Two views,1,")
    assert "step 3: the loss is not finite" in capsys.readouterr().err
    monkeypatch.setattr(eval_linear, "linear_probe", lambda *_: torch.full((100, 10), torch.inf))
    os.utime(tmp_path / "out/two-views-0/eval_linear.json", (0, 0))
    assert status(compare, *fast, tmp_path / "out") == 1
    assert "two-views-0: a score is not finite" in capsys.readouterr().err


def test_a_budget_becomes_epochs(fast, tmp_path):
    jobs = plan(tmp_path, seeds=(3, 1), gflop=15)
    assert [(job.row, job.cfg.seed) for job in jobs] == [
        ("MAE", 3), ("Two views", 3), ("MAE", 1), ("Two views", 1)]
    for job in jobs:
        step = 50 * speed.gflop_per_image(job.module, job.cfg)
        assert job.steps == int(15 / step) and job.steps % 4
        assert round(job.cfg.epochs * (200 // 50)) == job.steps  # as train computes it
        assert job.cfg.warmup == job.cfg.epochs / 5 and job.cfg.out == str(job.folder)
    jobs = plan(tmp_path, [*COMMON, "--epochs", "3"], gflop=None)
    assert {(job.steps, job.cfg.epochs) for job in jobs} == {(12, 3)}
    budget = float(f"{10 * 200 * speed.gflop_per_image(jobs[1].module, jobs[1].cfg):.2g}")
    with pytest.raises(UserError, match=f"--gflop {budget:.0f}, .* 10 epochs of Two views"):
        plan(tmp_path, gflop=None)


def test_the_table(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    scores = {"a": [10.0, 12.0, 14.0], "b": [30.0, 31.0, 35.0], "only one": [11.0]}
    jobs, results = [compare.Job("a", None, None, tmp_path / "to come", 12)], {}
    for row, values in scores.items():
        for seed, value in enumerate(values):
            jobs.append(compare.Job(row, None, None, tmp_path / f"{row}-{seed}", 12))
            results[jobs[-1].folder] = {name: value + i for i, name in enumerate(compare.SCORES)}
    text = compare.write_table(tmp_path, jobs, results, "a")
    assert (tmp_path / "table.txt").read_text() == text
    p = compare.p_value(scores, "b", "a")
    with open(tmp_path / "table.csv", newline="") as file:
        a, b, one = csv.DictReader(file)
    assert (b["seeds"], b["linear %"], one["kNN % deviation"]) == ("3", "33.0", "nan")
    assert float(b["kNN % p"]) == p < 0.01 < float(one["kNN % p"])
    lines = text.splitlines()
    assert "12.00 ± 2.00 " in lines[1] and " p " not in lines[1]
    assert f"32.00 ± 2.65 p {p:.2g}*" in lines[2] and lines[2].count("*") == 4
    assert "±" not in lines[3] and "*" not in lines[3]
    assert lines[4].split() == ["pooled", "deviation"] + [f"{(22 / 4) ** 0.5:.2f}"] * 4
    lines = figures[0].axes[0].lines
    assert [[*line.get_xdata()] for line in lines if line.get_marker() == "o"] == [*scores.values()]


# plots.py

def test_rows_of_a_confusion_are_true_classes(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    labels, predictions = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 1])
    plots.plot_confusion("a.png", labels, predictions, ("a", "b"), "title")
    axis = drawn[0].axes[0]
    assert np.allclose(axis.images[0].get_array(), [[100 / 3, 200 / 3], [0, 100]])
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): "33", (1, 0): "67", (0, 1): "0", (1, 1): "100"}
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("true class", "predicted class")


def test_curves_of_branches_share_a_panel(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    plots.plot_curves("a.png", [
        {"step": 1, "epoch": 0.5, "loss": 3.0, "l1 s": 1.0, "l1 w": 2.0, "knn": None},
        {"step": 2, "epoch": "1", "loss": "2", "l1 s": "1", "l1 w": "1", "knn": "0.5"}])
    panels = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines]
              for axis in drawn[0].axes}
    assert panels == {"loss": [[[0.5, 3], [1, 2]]], "knn": [[[1, 0.5]]],
                      "l1": [[[0.5, 1], [1, 1]], [[0.5, 2], [1, 1]]]}


# All programs

@pytest.mark.parametrize("tool, command, words", [
    (speed, "nothing --tiny", "METHOD nothing: not a file of"),
    (speed, "tests/mclim --tiny", "METHOD tests/mclim: not a file of"),
    (speed, "common", "no class Model"), (speed, "mvmae --tua 1", "--tua"),
    (eval_linear, "{run} --protocol mae --lr 0", "--lr must be positive"),
    (eval_linear, "{run} --epochs 5", "--epochs: only with --protocol mae"),
    (eval_linear, "{run} --protocol mae --epochs 5", "--warmup 10.0 must be below --epochs"),
    (eval_linear, "{tmp}/foreign.pt", "foreign.pt: no model of no_such_method.py"),
    (eval_linear, "{tmp}/tuned.pt", "tuned.pt: no model of eval_finetune.py"),
    (eval_finetune, "", "RUN"),
    (eval_finetune, "{run} --labels 2", "--labels must be at most 1"),
    (eval_finetune, "{run} --epochs 2 --warmup 2", "must be below --epochs"),
    (eval_finetune, "{run} --smoothing 1", "at most 0.99"),
    (eval_dense, "{run} --data {tmp}", "images/training"),
    (show, "{run} --images 0", "--images 0"),
    (show, "{tmp}/nowhere.pt", "nowhere.pt: no such file"),
    (show, "{run} --folder {tmp}/nowhere", "nowhere holds no images"),
    (show, "{run} --folder {tmp}/run", "holds no images"),
    (show, "{run} --folder {tmp}/bad", "bad/a.png cannot be read"),
    (show, "{run} --out {tmp}/a.gif", "a.gif must end in"),
    (show, "{run} --out {tmp}/no/a.png", "no/a.png"),
    (compare, "--gflop 0", "a step of MAE"),
    (compare, "--seed 1", "--seed"),
    (compare, "--epochs 3", "--epochs"),
    (compare, "--baseline MEA", "MEA"),
    (compare, "--rows {tmp}/no", "/no'"),
    (compare, "--rows {tmp}/words", "'mea.py'"),
    (compare, "--rows {tmp}/twice", "'mae = mvmae.py'"),
    (compare, "--batch 241", "row MAE: --batch 241"),
    (compare, "--out {tmp}/other", "another --out")])
def test_a_mistake_is_one_line(fast, untrained, tmp_path, tool, command, words, capsys):
    for name, text in (("words", "mea.py"), ("twice", f"{ROWS}mae = mvmae.py"),
                       ("bad/a.png", "no image"),
                       ("other/mae-0/config.json", '{"method": "mvmae", "config": {}}')):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, method in (("foreign", "no_such_method"), ("tuned", "eval_finetune")):
        torch.save({"method": method, "config": {}, "model": {}}, tmp_path / f"{name}.pt")
    argv = command.format(run=untrained("mvmae"), tmp=tmp_path).split()
    if tool is compare:
        argv = [*fast, tmp_path / "out", *argv]
    assert status(tool, *argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line and words in line, line
    assert not (tmp_path / "out").exists()


def test_a_copied_method_file_works_with_all_programs(tmp_path):
    for file in ROOT.glob("*.py"):
        if file.stem not in METHODS:
            shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "mvmae.py", tmp_path / "mine.py")
    (tmp_path / "rows").write_text("Mine = mine.py --lam 0\n")
    done = program("-c", f"""
import sys
sys.path.remove({str(ROOT)!r})
import compare, eval_dense, eval_linear, matplotlib.figure, show, speed
matplotlib.figure.Figure.savefig = lambda *_, **__: None
for recipe in (*eval_linear.RECIPES.values(), eval_dense.RECIPE):
    recipe.update(epochs=1, min_steps=0)
eval_dense.COUNTS.update(training=32, validation=16)
speed.seconds = lambda call, device: 1.0
flags = {COMMON}
compare.main(["--rows", "rows", "--out", "out", "--seeds", "0", "--gflop", "3", *flags])
show.main(["out/mine-0", "--images", "1"])
eval_dense.main(["out/mine-0"])
speed.main(["mine", *flags])
""", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("mine on CPU", "mine-0/show.png", "mine-0/eval_dense.json"):
        assert words in done.stdout


@slow
@pytest.mark.parametrize("part", ["agree", "speed", "views", "mclim"])
def test_the_gpu_check_rehearses_without_errors(part, tmp_path):
    done = program("-m", "results.gpu", "--rehearse", "--out", tmp_path, "--part", part)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / "figures.jsonl"
    assert figures.exists() == (part != "mclim") and "error" not in done.stdout, done.stdout
