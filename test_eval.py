"""Tests of what is done with a finished run: kNN and probes, segmentation, fine-tuning, speed, pictures."""
import csv, importlib, inspect, json, math, os, pathlib, random, re, shlex, shutil, signal, subprocess, sys, time, types
import weakref
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms import InterpolationMode

import common, compare, eval_dense, eval_finetune, eval_linear, eval_speed, pictures, show
from test_images import folder  # a fixture
from test_papers import BACKBONES
from test_smoke import (HERE, METHODS, MODULES, SMALL, build, every_method, killed_and_resumed, metrics, normal, run,
                        slow, torchrun)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with the checkpoint of an untrained model of each method, method → path."""
    folders = {}
    for method, cfg in SMALL.items():
        folders[method] = tmp_path_factory.mktemp(method) / "run"
        folders[method].mkdir()
        cfg = replace(cfg, data="shapes", seed=1)
        common.save_checkpoint(folders[method] / "last.pt", method, cfg, 1, model=build(cfg))
    return folders


@pytest.fixture
def little(monkeypatch):
    """40 training and 32 test shapes of the first four classes, for all programs; pictures of figures stay empty."""
    parts = []
    for split, n in (("train", 40), ("test", 32)):
        x, y, aspect = common.load_images("shapes", split, 18)
        x, y, aspect = (part[y < 4][:n] for part in (x, y, aspect))
        parts.append((x, y, aspect))
    for module in (eval_linear, eval_finetune, show):
        monkeypatch.setattr(module, "load_data", lambda cfg: parts)
    for module, name in ((common, "draw_curves"), (eval_finetune, "draw_confusion"), (eval_linear, "draw_confusion")):
        monkeypatch.setattr(module, name, lambda file, *_: file.touch())
    return parts


# kNN, probes, rank

def test_linear_probe_separates_what_is_separable():
    labels = torch.arange(2000) % 3
    features = F.one_hot(labels, 5) * 0.5 + 0.02 * normal(2000, 5) + torch.tensor([0, 0, 0, 50.0, 0])
    scores = eval_linear.linear_probe(features, labels, features, 3)
    assert eval_linear.top(scores, labels, 1) == 100 and eval_linear.top(-scores, labels, 1) == 0


def tokens_from(x, like=None):
    return eval_linear.Tokens(lambda ids: x[ids], len(x), like)


def test_attentive_probe_is_its_formula_and_cross_attention():
    probe, x = eval_linear.AttentiveProbe(8, 3), normal(4, 5, 8)
    with torch.no_grad():
        assert torch.allclose(probe(x), probe.head(x.mean(1)))  # it begins at the mean
        for p in probe.parameters():
            p.copy_(normal(*p.shape))
    for b in range(4):
        weights = [math.exp(float(probe.query.detach() @ x[b, n]) / 8 ** 0.5) for n in range(5)]
        pooled = sum(w * x[b, n] for n, w in enumerate(weights)) / sum(weights)
        for c in range(3):
            score = probe.head.weight[c] @ pooled + probe.head.bias[c]
            assert probe(x)[b, c].item() == pytest.approx(score.item(), abs=1e-5)
    theirs = torch.nn.MultiheadAttention(8, 1, bias=False, batch_first=True)  # with keys and values
    W_q, W_k, W_v = theirs.in_proj_weight.chunk(3)
    q, out = normal(8, seed=1), theirs.out_proj.weight
    with torch.no_grad():
        expected = theirs(q.expand(4, 1, 8), x, x)[0][:, 0]
        probe.query.copy_(W_k.T @ (W_q @ q))  # the query holds the keys',
        probe.head = torch.nn.Linear(8, 8, bias=False)
        probe.head.weight.copy_(out @ W_v)  # the last layer the values'
        assert torch.allclose(probe(x), expected, atol=1e-5)


def test_attentive_probe_finds_what_the_mean_hides(monkeypatch):
    """One token of nine tells the class, and its neighbours' other numbers drown it in the mean."""
    monkeypatch.setitem(eval_linear.RECIPES["attentive"], "least_steps", 400)
    torch.manual_seed(0)
    labels, x = torch.arange(600) % 3, torch.randn(600, 9, 8)
    where = torch.randint(9, (600,))
    x[:, :, 3:] += 0.5
    x[torch.arange(600), where, 7] = 9.0  # says: look here
    x[torch.arange(600), where, :3] = 1.5 * F.one_hot(labels, 3).float()
    seen, asked = tokens_from(x[:400]), tokens_from(x[400:])
    known, truth = labels[:400], labels[400:]
    attentive = eval_linear.top(eval_linear.attentive_probe(seen, known, asked, 3), truth, 1)
    linear = eval_linear.top(eval_linear.linear_probe(x[:400].mean(1), known, x[400:].mean(1), 3), truth, 1)
    assert attentive > linear + 5, (attentive, linear)


def test_tokens_are_standardised_held_or_computed_anew(monkeypatch):
    x = 3 * normal(30, 4, 6) + 7
    tokens = tokens_from(x)
    expected = (x - x.mean((0, 1))) / x.std((0, 1))
    assert tokens.held.dtype == torch.float16 and "held" in str(tokens)
    assert torch.allclose(tokens[torch.tensor([3, 9])], expected[[3, 9]], atol=5e-3)
    others = tokens_from(x + 1, like=tokens)[torch.arange(30)]
    assert torch.allclose(others, (x + 1 - x.mean((0, 1))) / x.std((0, 1)), atol=5e-3)
    monkeypatch.setattr(eval_linear, "HELD", 2 * x.numel() - 1)
    anew = tokens_from(x)
    assert anew.held is None and "computed at each step" in str(anew)
    assert torch.allclose(anew[torch.tensor([3, 9])], expected[[3, 9]], atol=1e-5)


def test_tokens_are_those_of_the_encoder():
    model, x = build(SMALL["mvmae"]), (255 * torch.rand(6, 3, 24, 24)).byte()
    parts = [(images, None, torch.ones(len(images))) for images in (x[:4], x[4:])]
    expected_features = common.extract_features(model.encoder, x, 16, common.start_processes("cpu"), False)
    runs = []
    model.encoder.norm.register_forward_hook(lambda *_: runs.append(1))
    tokens, features = eval_linear.tokens_of(model.encoder, parts, 16, common.start_processes("cpu"), amp=False)
    assert torch.allclose(torch.cat(features), expected_features, atol=1e-5)
    assert len(runs) == 5  # the width; of each part the mean and deviation, then all: never tokens and features apart
    with torch.no_grad():
        plain = model.encoder.tokens(common.normalize(common.central_crop(x, 16)))  # (6, 16, 48)
    expected = (plain - plain[:4].mean((0, 1))) / plain[:4].std((0, 1))
    assert [part.shape for part in tokens] == [(4, 16, 48), (2, 16, 48)]
    ours = torch.cat([part[torch.arange(len(part))] for part in tokens])
    assert torch.allclose(ours, expected, atol=1e-2)


@every_method
def test_evaluation_writes_what_it_found(checkpoints, little, tmp_path, method, capsys, monkeypatch):
    for recipe in eval_linear.RECIPES.values():
        monkeypatch.setitem(recipe, "epochs", 2)
    monkeypatch.setitem(eval_linear.RECIPES["attentive"], "least_steps", 0)
    asked = [str(checkpoints[method]), "--no-amp"] + ["--baselines", "--seeds", "3"] * (method == "mvmae")
    assert eval_linear.main(asked) == 0
    told, report = capsys.readouterr().out, json.loads((checkpoints[method] / "eval_linear.json").read_text())
    (x, y, aspect), (queries, truth, _) = little
    model, cfg = eval_linear.load_model(checkpoints[method])
    here = common.start_processes("cpu")
    bank, ask = (common.extract_features(model.encoder.eval(), part, 16, here, False, torch.ones(len(part)))
                 for part in (x, queries))
    row = report["percent"]["trained encoder"]
    assert row["knn_top1"] == pytest.approx(100 * common.knn_accuracy(bank, y, ask, truth), abs=0.01)
    assert report["effective_rank"]["trained encoder"] == pytest.approx(common.effective_rank(bank), abs=0.02)
    columns = {f"{kind}_top{k}" for kind in ("knn", "linear", "attentive") for k in (1, 5)}
    assert set(row) == columns and "trained encoder" in told and "attentive: optimizer AdamW" in told
    linear = eval_linear.linear_probe(bank, y, ask, 10, seed=cfg.seed)
    first = report["of each seed"]["trained encoder"]
    if method == "mvmae":
        assert set(report["percent"]) == {"trained encoder", "untrained encoder", "raw pixels"}
        assert set(report["percent"]["raw pixels"]) == {c for c in columns if "attentive" not in c}
        assert len(first["linear_top1"]) == len(first["attentive_top5"]) == 3 and "knn_top1" not in first
        mean = sum(first["linear_top1"]) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in first["linear_top1"]) / 2)
        assert row["linear_top1"] == pytest.approx(mean, abs=0.01) and f"{mean:.2f} ± {deviation:.2f}" in told
        assert first["linear_top1"][0] == eval_linear.top(linear, truth, 1)
    else:
        assert row["linear_top1"] == eval_linear.top(linear, truth, 1) and "±" not in told and not first
    assert (checkpoints[method] / "confusion.png").exists()


def test_evaluation_reads_only_as_many_images_as_asked(checkpoints, little, monkeypatch):
    asked = []
    monkeypatch.setattr(eval_linear, "load_data", lambda cfg: asked.append(cfg.images) or (little[0], None))
    assert eval_linear.main([str(checkpoints["mvmae"]), "--images", "40"]) == 0 and asked == [40]


def test_raw_pixels_are_of_the_whole_crop():
    """Of 64 pixels for an encoder of 64 the whole image, of 256 for 224 seven eighths of its side, shrunk to 32."""
    for side, img, edge in ((64, 64, 0), (256, 224, 16)):
        x = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        x[1, :, edge:side - edge, edge:edge + side // 8] = 255  # the left edge of what is seen
        rows = eval_linear.raw_pixels(x, img, common.start_processes("cpu"), torch.ones(2)).view(2, 3, 32, 32)
        assert rows[0].max() == 0 and rows[1, :, :, 0].min() > 0.99 and rows[1, :, :, 8:].max() == 0


@pytest.mark.parametrize("program", [eval_linear, eval_dense, show, eval_speed])
def test_evaluation_runs_alone(program, checkpoints, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    what = "mvmae" if program is eval_speed else str(checkpoints["mvmae"])
    assert program.main([what]) == 2 and "torchrun" in capsys.readouterr().err


def test_tokens_of_one_encoder_leave_memory_before_the_next_come(checkpoints, little, monkeypatch):
    tokens_of, earlier = eval_linear.tokens_of, []

    def spied(*args):
        assert not any(tokens() for tokens in earlier)
        tokens, features = tokens_of(*args)
        earlier.extend(map(weakref.ref, tokens))
        return tokens, features

    monkeypatch.setattr(eval_linear, "tokens_of", spied)
    monkeypatch.setattr(eval_linear, "measure", lambda *_: ({}, torch.zeros(32)))
    assert eval_linear.main([str(checkpoints["mvmae"]), "--baselines"]) == 0 and len(earlier) == 4


@pytest.mark.parametrize("kind", ["no labels", "no test images", "unlabelled test images", "one class"])
def test_without_labels_the_rank_remains_and_says_what_else_it_needs(checkpoints, little, kind, capsys, monkeypatch):
    (x, y, a), (queries, truth, b) = little
    none = torch.full_like(y, -1)
    parts = {"no labels": ((x, none, a), (queries, none[:32], b)), "no test images": ((x, y, a), None),
             "unlabelled test images": ((x, y, a), (queries, none[:32], b)),
             "one class": ((x, 0 * y, a), (queries, 0 * truth, b))}[kind]
    monkeypatch.setattr(eval_linear, "load_data", lambda cfg: parts)
    run = checkpoints["mclim"]
    assert eval_linear.main([str(run), "--data", "elsewhere"]) == 0
    told, report = capsys.readouterr().out, json.loads((run / "eval_linear-elsewhere.json").read_text())
    assert "need labelled training and test images" in told and "kNN top-1" not in told
    assert report["percent"] == {"trained encoder": {}} and report["effective_rank"]["trained encoder"] > 1


@pytest.mark.parametrize("program, command, words", [
    (eval_linear, "{run} --seeds 0", ["--seeds", "0", "at least 1"]),
    (eval_linear, "{run} --images -1", ["--images", "-1", "at least 0"]),
    (eval_linear, "{tmp}/nowhere", ["nowhere", "does not exist"]),
    (eval_dense, "{run} --ignore 256", ["--ignore", "256", "0 to 255"]),
    (eval_dense, "{run} --data {tmp}", ["--data", "images/training"]),
    (eval_dense, "{tmp}/nowhere", ["nowhere", "does not exist"]),
    (show, "{run} --count 0", ["--count", "0", "at least 1"]),
    (show, "{run} --seed 99999999999999999999", ["--seed", "below 2^32"]),
    (show, "{run} --images {tmp} --data shapes", ["--data", "--images exclude"]),
    (show, "{run} --images {tmp}/nowhere", ["--images", "nowhere", "not a folder"]),
    (show, "{run} --images {tmp}", ["--images", "holds no image"]),
    (show, "{run} --out {tmp}/no/folder/a.png", ["--out", "no folder"]),
    (show, "{run} --out {tmp}/a.gif", ["--out", "a.gif", ".png"])])
def test_bad_input_of_evaluation_gets_one_line(checkpoints, tmp_path, program, command, words, capsys):
    status = program.main(shlex.split(command.format(run=checkpoints["mvmae"], tmp=tmp_path)))
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1 and line.startswith(f"{program.__name__}.py: "), line
    assert all(word in line for word in words), line


# Segmentation

def test_mean_iou_is_that_of_a_loop():
    torch.manual_seed(0)
    truth, guess = torch.randint(4, (3, 5, 6)).byte(), torch.randint(5, (3, 5, 6)).byte()
    truth[0, :2] = 255
    iou = eval_dense.intersection_over_union(eval_dense.count_pixels(truth, guess, 6, 255))
    for c in range(6):
        both = either = occurs = 0
        for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist()):
            if t != 255:
                both, either, occurs = both + (t == g == c), either + (c in (t, g)), occurs + (t == c)
        assert iou[c].item() == pytest.approx(both / either) if occurs else iou[c].isnan(), c
    assert iou[4].isnan() and not iou[3].isnan()


def test_loss_of_pixels_leaves_out_what_is_ignored():
    scores, truth = normal(2, 3, 4, 4), torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    for ignore in (255, 0):
        truth[0] = ignore
        terms = [-scores[b].log_softmax(0)[int(truth[b, i, j]), i, j]
                 for b in range(2) for i in range(4) for j in range(4) if truth[b, i, j] != ignore]
        expected = sum(terms) / len(terms)
        assert eval_dense.pixel_loss(scores, truth, ignore).item() == pytest.approx(expected.item(), rel=1e-5)
    assert eval_dense.pixel_loss(scores, torch.full((2, 4, 4), 7).byte(), 7) == 0


def test_dense_probe_puts_scores_where_their_tokens_are():
    probe = eval_dense.DenseProbe(2, 3, 12)
    with torch.no_grad():
        probe.layer.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    x = torch.zeros(1, 16, 2)
    x[0, 6, 0], x[0, 12, 1] = 9.0, 9.0  # row 1, column 2; row 3, column 0
    scores = probe(x)
    assert scores.shape == (1, 3, 12, 12)
    assert scores[0, 1].argmax() == 4 * 12 + 7 and scores[0, 2].argmax() in (10 * 12, 11 * 12)  # patches' centres
    flat = F.interpolate(probe.layer(x).mT.unflatten(2, (4, 4)), (12, 12), mode="bilinear", align_corners=False)
    assert torch.equal(scores, flat)


def test_masks_of_shapes_are_the_drawn_forms_and_colour_does_not_tell():
    images, masks = eval_dense.drawn("validation", 32, 0)
    assert images.shape == (500, 3, 32, 32) and masks.unique().tolist() == list(range(11))
    for image, mask in zip(images[:40].float(), masks[:40]):
        inside, outside = image[:, mask > 0].mean(1), image[:, mask == 0].mean(1)
        assert len(mask.unique()) == 2 and (inside - outside).abs().min() > 100  # complements, every channel
    assert (masks[:, 0, 0] == 0).double().mean() > 0.9  # corners are ground
    assert [masks[i].max().item() for i in range(20)] == [1 + i % 10 for i in range(20)]
    colours = images.float().permute(0, 2, 3, 1)  # (N, H, W, 3)
    ground = colours[masks == 0].mean(0)
    assert (ground - colours[masks > 0].mean(0)).abs().max() < 25  # of 255: no colour is ground's


def mean_iou(truth, guess):
    return eval_dense.intersection_over_union(eval_dense.count_pixels(truth, guess, 11, 255)).nanmean().item()


def test_raw_colour_gives_nothing_and_the_truth_everything(monkeypatch):
    monkeypatch.setitem(eval_dense.RECIPE, "epochs", 4)
    monkeypatch.setitem(eval_dense.RECIPE, "lr", 1e-2)
    (images, masks), (asked, truth) = (tuple(part[:n] for part in eval_dense.drawn(split, 16, 0))
                                       for split, n in (("training", 400), ("validation", 200)))
    found = {}
    for name, source, other in (("colour", images, asked), ("truth", masks, truth)):
        def tokens(x, like=None):
            values = (x.permute(0, 2, 3, 1) if x.ndim == 4 else F.one_hot(x.long(), 11)).flatten(1, 2)
            return eval_linear.Tokens(lambda ids: values[ids].float(), len(x), like)  # a token for each pixel
        own = tokens(source)
        guess = eval_dense.segment(own, masks, tokens(other, own), 11, 255)
        found[name] = mean_iou(truth, guess)
    blind = mean_iou(truth, 0 * truth)
    assert found["colour"] < blind + 0.02 and found["truth"] > 0.9, (found, blind)


@pytest.fixture
def ade(tmp_path):
    """A folder in ADE20K's layout: six images and four, one of them twice as wide; 0 is "other", 1 red, 2 blue."""
    for split, n in (("training", 6), ("validation", 4)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        for i in range(n):
            mask = np.zeros((24, 48 if i == 1 else 24), np.uint8)
            mask[:12, :-8], mask[12:, 8:] = 1, 2
            rgb = np.array([[90, 90, 90], [255, 0, 0], [0, 0, 255]], np.uint8)[mask]
            Image.fromarray(rgb).save(tmp_path / "ade" / "images" / split / f"{i}.jpg", quality=95)
            Image.fromarray(mask).save(tmp_path / "ade" / "annotations" / split / f"{i}.png")
    return tmp_path / "ade"


def test_annotations_keep_their_indices_and_their_places(ade):
    images, masks = eval_dense.annotated(ade, "training", 24)
    assert images.shape == (6, 3, 24, 24) and masks.shape == (6, 24, 24) and masks.unique().tolist() == [0, 1, 2]
    red = (images[:, 0] > 200) & (images[:, 2] < 60)
    assert ((masks == 1) == red).double().mean() > 0.98
    assert (masks[1, :12] == 1).all() and (masks[0, 0, -8:] == 0).all()  # a wide one's central square
    assert torch.equal(eval_dense.annotated(ade, "training", 12)[1].unique(), masks.unique())


@pytest.mark.parametrize("data", ["shapes", "ade"])
def test_segmentation_writes_what_it_found(checkpoints, ade, data, capsys, monkeypatch):
    monkeypatch.setitem(eval_dense.RECIPE, "epochs", 1 if data == "shapes" else 40)
    monkeypatch.setattr(eval_dense, "SHAPES", {"training": 64, "validation": 32})
    run = checkpoints["mclim" if data == "shapes" else "mvmae"]
    asked = ["--baselines"] if data == "shapes" else ["--data", str(ade), "--ignore", "0"]
    assert eval_dense.main([str(run), *asked]) == 0
    name = "eval_dense" if data == "shapes" else f"eval_dense-{ade.parent.name}-{ade.name}"
    told, report = capsys.readouterr().out, json.loads((run / f"{name}.json").read_text())
    assert Image.open(run / f"{name}.png").size[0] > 500 and "probe: optimizer AdamW" in told
    names = ["trained encoder", "untrained encoder", "raw patches"]
    assert list(report["percent"]) == names[:3 if data == "shapes" else 1]
    for row, each in zip(report["percent"].values(), report["iou"].values()):
        assert row["mean_iou"] == pytest.approx(sum(each.values()) / len(each), abs=0.02)
    if data == "ade":
        each = report["iou"]["trained encoder"]
        assert set(each) == {"1", "2"} and min(each.values()) > 50


@pytest.mark.parametrize("change, words", [
    (lambda ade: (ade / "annotations/validation/2.png").unlink(), ["2.png", "does not exist"]),
    (lambda ade: (ade / "annotations/training/2.png").write_bytes(b"no"), ["2.png", "can't be read"]),
    (lambda ade: Image.new("RGB", (24, 24)).save(ade / "annotations/training/2.png"), ["2.png", "indices", "RGB"]),
    (lambda ade: Image.new("L", (24, 20)).save(ade / "annotations/training/2.png"), ["2.png", "(24, 20)", "(24, 24)"]),
    (lambda ade: [f.unlink() for f in (ade / "images/training").iterdir()], ["images/training", "holds no images"]),
    (lambda ade: [Image.new("L", Image.open(f).size).save(f) for f in (ade / "annotations/training").iterdir()],
     ["--ignore 0", "leaves nothing"]),
    (lambda ade: [Image.fromarray(np.minimum(np.array(Image.open(f)), 1)).save(f)
                  for f in (ade / "annotations/training").iterdir()], ["--ignore 0", "nothing to tell apart"])])
def test_a_bad_folder_of_annotations_gets_one_line(checkpoints, ade, change, words, capsys):
    change(ade)
    assert eval_dense.main([str(checkpoints["mvmae"]), "--data", str(ade), "--ignore", "0"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line


# Speed

def test_speed_answers_help(capsys):
    assert eval_speed.main(["--help"]) == 0 and "eval_speed.py mclim --tiny" in capsys.readouterr().out


@every_method
def test_speed_is_told(method, monkeypatch, capsys):
    monkeypatch.setattr(eval_speed, "rate", lambda step, device: (
        step.__code__.co_freevars == ("a", "b") or step(), 2.0)[1])  # the peak's product takes a minute without AMX
    assert eval_speed.main([method, "--tiny", *"--img 16 --dim 48 --depth 2 --batch 4 --device cpu".split()]) == 0
    told = capsys.readouterr().out
    assert told.count("\nviews") == 2 and "bfloat16" in told and "8.0 images/s" in told and "\nreading" in told
    assert told.count("\nroom ") == 2 and "MB an image, with --recompute: at most" in told
    assert ("one view" in told) == (method != "mclim")


def test_speed_of_ordinary_trainings_is_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "results")
    speed = importlib.import_module("speed")
    for name, value in {"HERE": tmp_path, "METHODS": ["mvmae"], "BATCHES": {4: 2}, "IMAGES": [128]}.items():
        monkeypatch.setattr(speed, name, value)
    speed.main("shapes")
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch"], row["images"]) for row in rows] == [("4", ""), ("128", "128")]
    assert all(float(row["images_per_second"] or row["seconds"]) > 0 for row in rows)
    assert (tmp_path / "speed.png").exists()


def test_the_largest_batch_fills_nine_tenths_of_the_memory():
    cfg, saved = SMALL["cmae"], 10 ** 6
    model, views = build(cfg), 2 * 3 * cfg.img ** 2 * 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = 6 * sum(p.numel() for p in model.parameters()) + 12 * trained  # copies; gradients and two moments
    n = eval_speed.largest_batch(model, cfg, saved, 2)
    assert fixed + n * (saved + views) <= 1.8e9 < fixed + (n + 1) * (saved + views)
    assert eval_speed.largest_batch(model, cfg, saved, 1e-6) == 0


@every_method
def test_the_bytes_that_a_step_keeps_are_those_that_the_allocator_counts(method, monkeypatch):
    cfg, cpu = replace(SMALL[method], depth=3), torch.device("cpu")
    model = build(cfg)

    def allocated(n):
        torch.manual_seed(0)
        x = torch.randn(2, n, 3, cfg.img, cfg.img)
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(profile_memory=True) as profiler:
            losses = model(*x)
        del losses
        return sum(event.self_cpu_memory_usage for event in profiler.events())

    monkeypatch.setattr(MODULES[method], "attend", F.scaled_dot_product_attention)
    for again in (False, True):
        if again:
            common.recompute(model)
        counted = eval_speed.saved_bytes(model, cfg, 18, cpu)[0] - eval_speed.saved_bytes(model, cfg, 2, cpu)[0]
        theirs = allocated(18) - allocated(2)
        assert counted == pytest.approx(theirs, rel=1e-3), again
    (plain, most), (less, least) = eval_speed.room(MODULES[method], cfg, cpu).values()
    assert plain < most and less < least < most and less < 0.9 * plain


def test_confusion_matrix_is_of_the_true_class(tmp_path, monkeypatch):
    truth, guess, shown = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 2, 1, 0]), []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axis, a, **kw: shown.append(a) or imshow(axis, a, **kw))
    pictures.draw_confusion(tmp_path / "confusion.png", truth, guess, ["a", "b", "c"], "test")
    assert shown[0].tolist() == [[75, 0, 25], [50, 50, 0], [0, 0, 0]] and (tmp_path / "confusion.png").exists()


# Fine-tuning: RandAugment

S = torch.tensor([-1.0, -0.3, 0.3, 0.9])


@pytest.mark.parametrize("name, theirs", [
    ("identity", lambda x, s: x),
    ("shear x", lambda x, s: TF.affine(x, 0.0, [0, 0], 1.0, [math.degrees(math.atan(0.3 * s)), 0.0],
                                       InterpolationMode.BILINEAR)),
    ("shear y", lambda x, s: TF.affine(x, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(0.3 * s))],
                                       InterpolationMode.BILINEAR)),
    ("rotate", lambda x, s: TF.rotate(x, -30 * s, InterpolationMode.BILINEAR)),
    ("brightness", lambda x, s: TF.adjust_brightness(x, 1 + 0.9 * s)),
    ("colour", lambda x, s: TF.adjust_saturation(x, 1 + 0.9 * s)),
    ("contrast", lambda x, s: TF.adjust_contrast(x, 1 + 0.9 * s)),
    ("sharpness", lambda x, s: TF.adjust_sharpness(x, 1 + 0.9 * s)),
    ("posterize", lambda x, s: TF.posterize((255 * x).round().byte(), 8 - round(4 * abs(s))) / 255),
    ("solarize", lambda x, s: TF.solarize(x, 1 - abs(s))),
    ("autocontrast", lambda x, s: TF.autocontrast(x)),
    ("equalize", lambda x, s: TF.equalize(TF.convert_image_dtype(x, torch.uint8)) / 255)])
def test_operations_of_randaugment_equal_torchvisions(name, theirs):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 20, 20)
    expected = torch.stack([theirs(image, s) for image, s in zip(x, S.tolist())])
    assert (eval_finetune.RANDAUGMENT[name](x, S) - expected).abs().max() < 5e-3


def test_translations_of_randaugment_move_by_a_share_of_the_side():
    x = torch.rand(4, 3, 331, 331)
    for name, dim in (("translate x", 3), ("translate y", 2)):
        moved = eval_finetune.RANDAUGMENT[name](x, torch.tensor([0.2, -0.2, 0.1, 0.0]))  # by 30, -30, 15, 0 pixels
        for before, after, n in zip(x, moved, (30, -30, 15, 0)):
            kept = slice(n, None) if n >= 0 else slice(None, n)
            gone = slice(None, -n or None) if n >= 0 else slice(-n, None)
            a, b = (image.movedim(dim - 1, 0) for image in (before, after))
            assert torch.allclose(a[kept], b[gone], atol=1e-3)


def test_strength_of_randaugment_is_of_30():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16).expand(300, -1, -1, -1)
    wanted = (x[0] * 1.3).clamp(max=1)
    bright = [out for out in eval_finetune.rand_augment(x, 1, 10) if torch.allclose(out, wanted, atol=1e-5)]
    assert 2 <= len(bright) <= 25  # 1 of 14, and of two signs


def test_randaugment_draws_operations_for_each_image():
    torch.manual_seed(0)
    same = torch.rand(1, 3, 16, 16).expand(600, -1, -1, -1)
    assert torch.equal(eval_finetune.rand_augment(same, 0), same)
    one = eval_finetune.rand_augment(same, 1, 9)
    kinds = one.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(kinds) == 1 + 9 * 2 + 4  # identity; nine with a sign; posterize, solarize, autocontrast, equalize
    assert len(eval_finetune.rand_augment(same, 2, 9).flatten(1).unique(dim=0)) > 60


# Fine-tuning: labels, network, rates, mixup

def test_labels_are_kept_alike_in_all_classes_and_by_the_seed():
    labels = torch.cat([torch.arange(1000) % 3, torch.full((50,), -1), torch.full((4,), 3)])
    kept = eval_finetune.labelled(labels, 0.1, 0)
    assert labels[kept].bincount().tolist() == [33, 33, 33, 1] and len(kept.unique()) == len(kept)  # never none
    assert torch.equal(kept, eval_finetune.labelled(labels, 0.1, 0))
    assert not torch.equal(kept, eval_finetune.labelled(labels, 0.1, 1))
    assert torch.equal(eval_finetune.labelled(labels, 1.0, 0), (labels >= 0).nonzero().flatten())


NETWORKS = [SMALL[method] for method in METHODS] + BACKBONES[1:]
every_network = pytest.mark.parametrize("cfg", NETWORKS, ids=lambda cfg: type(cfg).__module__ + getattr(
    cfg, "backbone", ""))


@every_network
def test_rates_fall_from_layer_to_layer(cfg):
    model = eval_finetune.Classifier(build(cfg).encoder, 10, 0.0)
    names = eval_finetune.blocks_of(model.encoder)
    assert len(names) == {"swin": 8, "hivit": 8 + 6}.get(getattr(cfg, "backbone", "vit"), cfg.depth)
    scale, wd = {}, {}
    for group in eval_finetune.layer_groups(model, 0.3, 0.5):
        for p in group["params"]:
            assert id(p) not in scale
            scale[id(p)], wd[id(p)] = group["scale"], group["weight_decay"]
    for name, p in model.named_parameters():
        inside = [i for i, block in enumerate(names) if name.startswith(f"encoder.{block}.")]
        if inside:
            assert scale[id(p)] == 0.5 ** (len(names) - inside[0]), name
        elif name.startswith(("head", "encoder.norm")):
            assert scale[id(p)] == 1, name
        elif "embed" in name or "cls" in name or "patch" in name:
            assert scale[id(p)] == 0.5 ** (len(names) + 1), name
        else:  # between two blocks
            assert 0.5 ** len(names) <= scale[id(p)] < 1, name
        assert wd[id(p)] == (0.0 if p.ndim < 2 or "token" in name or "pos" in name else 0.3), name


@every_network
def test_every_weight_is_trained_and_evaluation_has_no_chance(cfg):
    model = eval_finetune.Classifier(build(cfg).encoder, 10, 0.5)
    with torch.no_grad():
        model.head.weight.normal_()
    x = normal(32, 3, cfg.img, cfg.img)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    plain = F.linear(build(cfg).encoder.features(x), model.head.weight, model.head.bias)
    assert torch.allclose(model.eval()(x), plain, atol=1e-5)


def test_stochastic_depth_rises_and_drops_whole_branches():
    cfg = replace(SMALL["mvmae"], depth=3)
    model, branches = eval_finetune.Classifier(build(cfg).encoder, 10, 0.6), {}
    for i, block in enumerate(model.encoder.blocks):
        for name in ("attn", "mlp"):  # after the model's own hook
            getattr(block, name).register_forward_hook(
                lambda module, _, out, key=(i, name): branches.setdefault(key, []).append(out))
    torch.manual_seed(0)
    x = normal(1, 3, 16, 16).expand(400, -1, -1, -1)
    model.train()(x)
    for (i, name), (out,) in branches.items():
        dropped = (out == 0).flatten(1).all(1)
        assert dropped.double().mean().item() == pytest.approx(0.3 * i, abs=0.08), (i, name)
    assert not torch.equal(*((branches[2, name][0] == 0).flatten(1).all(1) for name in ("attn", "mlp")))
    attn, = branches[1, "attn"]
    kept = (attn != 0).flatten(1).any(1)
    whole = model.eval()(x[:1]) is not None and branches[1, "attn"][1]
    first = branches[0, "mlp"][0]  # never dropped: all alike
    assert torch.allclose(first, first[:1].expand_as(first), atol=1e-6)
    assert torch.allclose(attn[kept] * 0.7, whole.expand(int(kept.sum()), -1, -1), atol=1e-5)


def test_mixup_blends_images_and_targets_alike():
    torch.manual_seed(0)
    x, y = torch.rand(1000, 3, 2, 2), F.one_hot(torch.arange(1000) % 2, 2).float()  # the reverse: other classes
    mixed, targets = eval_finetune.mixup(x, y, 0.6, 0.8)
    share = (targets * y).sum(1)  # λ
    assert torch.allclose(targets.sum(1), torch.ones(1000))
    lam = share[:, None, None, None]
    assert torch.allclose(mixed, lam * x + (1 - lam) * x.flip(0), atol=1e-6)
    whole = share == 1
    assert whole.double().mean().item() == pytest.approx(0.4, abs=0.06)
    assert share[~whole].var().item() == pytest.approx(0.25 / (2 * 0.8 + 1), abs=0.02)  # of Beta(0.8, 0.8)
    assert torch.equal(eval_finetune.mixup(x, y, 0.0, 0.8)[0], x)


def test_views_of_fine_tuning():
    torch.manual_seed(0)
    cfg, x = replace(eval_finetune.TINY, crop_min=1.0, rand_ops=0), (255 * torch.rand(64, 3, 16, 16)).byte()
    view, whole = eval_finetune.views(x, 16, cfg), common.normalize(common.resize(x, 16))
    assert view.shape == (64, 3, 16, 16)
    flipped = (view - whole.flip(3)).square().mean((1, 2, 3)) < (view - whole).square().mean((1, 2, 3))
    assert 16 < flipped.sum() < 48
    smooth = [eval_finetune.views(x, 16, replace(cfg, crop_min=c)).diff(dim=3).square().mean() for c in (0.1, 1.0)]
    assert smooth[0] < smooth[1]
    torch.manual_seed(1)
    plain = eval_finetune.views(x, 16, cfg)
    torch.manual_seed(1)
    changed = eval_finetune.views(x, 16, replace(cfg, rand_ops=2, rand_magnitude=20)) != plain
    assert changed.flatten(1).any(1).double().mean() > 0.7


# Fine-tuning: the program

def settings(run, out, **change):
    usual = {"run": str(run), "out": str(out), "batch": 8, "epochs": 2, "log_every": 1}
    return replace(eval_finetune.TINY, **{**usual, **change})


@every_method
def test_fine_tuning_writes_what_it_found(checkpoints, little, tmp_path, method, capsys):
    out = eval_finetune.train(settings(checkpoints[method], tmp_path / "run", epochs=3, test_every=2, mixup=0.5,
                                       drop_path=0.3))
    names = "config.json metrics.csv curves.png last.pt previous.pt encoder.pt pretrained.json eval_finetune.json " \
            "confusion.png"
    assert {f.name for f in out.iterdir()} == set(names.split())
    report, told = json.loads((out / "eval_finetune.json").read_text()), capsys.readouterr().out
    assert f"{method}.py" in report["network"] and "pre-trained" in report["network"] and report["network"] in told
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [row["step"] for row in rows if row["loss"]] == [str(i) for i in range(1, 16)]
    tests = [row for row in rows if row["test top 1"]]
    assert [float(row["epoch"]) for row in tests] == [2, 3]
    model = eval_finetune.Classifier(build(SMALL[method]).encoder, 10, 0.0)
    common.load_checkpoint(out, "eval_finetune", model=model)
    queries, truth, aspect = little[1]
    with torch.no_grad(), common.autocast(torch.device("cpu")):
        scores = model.eval()(common.normalize(common.central_crop(queries, 16, aspect)))
    right = 100 * (scores.argmax(1) == truth).double().mean().item()
    assert report["percent"]["top1"] == float(tests[-1]["test top 1"]) == pytest.approx(right, abs=0.01)
    among = 100 * (scores.topk(5).indices == truth[:, None]).any(1).double().mean().item()
    assert report["percent"]["top5"] == pytest.approx(among, abs=0.01)
    assert "next:" not in told.split("done after")[-1]


def test_fine_tuning_begins_at_the_run_or_at_random_weights(checkpoints, little, tmp_path):
    run, still = checkpoints["mvmae"], {"lr": 1e-9, "wd": 0.0, "seed": 7, "epochs": 1, "warmup": 0.0, "steps": 1}
    for scratch in (False, True):
        out = eval_finetune.train(settings(run, tmp_path / str(scratch), scratch=scratch, **still))
        encoder = torch.load(out / "encoder.pt", weights_only=True)
        first = build(replace(SMALL["mvmae"], seed=7)) if scratch else eval_linear.load_model(run)[0]
        for name, value in first.encoder.state_dict().items():
            assert torch.allclose(encoder[name], value, atol=1e-6), name
        assert ("random weights" in json.loads((out / "eval_finetune.json").read_text())["network"]) == scratch


def test_rates_of_the_layers_are_those_of_the_schedule(checkpoints, little, tmp_path, monkeypatch):
    cfg, seen = settings(checkpoints["mvmae"], tmp_path / "run", layer_decay=0.5, lr=1e-3, wd=0.3), []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(
        [(group["lr"], group["scale"], group["weight_decay"]) for group in self.param_groups]) or step(self))
    eval_finetune.train(cfg)
    assert len(seen) == 10
    for i, groups in enumerate(seen):
        rate = common.cosine_lr(i, 10, 5, 1e-3 * 8 / 256)
        assert all(lr == pytest.approx(rate * scale) for lr, scale, _ in groups)
        assert {scale for _, scale, _ in groups} == {1, 0.5, 0.25, 0.125} and {wd for *_, wd in groups} == {0, 0.3}


@pytest.mark.parametrize("labels, mixed", [(0.5, 0.0), (1.0, 1.0)])
def test_the_loop_of_fine_tuning(checkpoints, little, tmp_path, labels, mixed, monkeypatch):
    """Its images keep their own labels, are mixed and smoothed, and the network is in training after a test, too."""
    parts = [(y[:, None, None, None].expand_as(x).byte(), y, aspect) for x, y, aspect in little]
    parts[0] = tuple(torch.cat([part[:2], part]) for part in parts[0])  # and two images without a label, which are
    parts[0][0][:2], parts[0][1][:2] = 255, -1                          # never seen: there is no class 255
    monkeypatch.setattr(eval_finetune, "load_data", lambda cfg: parts)
    seen, trains, dropped, loss, forward = [], [], set(), F.cross_entropy, eval_finetune.Classifier.forward

    def cross_entropy(scores, targets, label_smoothing):
        seen.append((scores, targets))
        assert label_smoothing == 0.2 and scores.dtype == torch.float32
        return loss(scores, targets, label_smoothing=label_smoothing)

    def forward_and_tell(model, x):
        trains.append(model.training)
        fed.append(x)
        return forward(model, x)

    images_seen, fed, seeds, seed_step = [], [], [], eval_finetune.seed_step
    monkeypatch.setattr(eval_finetune, "seed_step", lambda *args: seeds.append(args) or seed_step(*args))
    monkeypatch.setattr(eval_finetune, "stochastic_depth", lambda x, p, *_: dropped.add(p) or x)
    monkeypatch.setattr(eval_finetune.F, "cross_entropy", cross_entropy)
    monkeypatch.setattr(eval_finetune.Classifier, "forward", forward_and_tell)
    monkeypatch.setattr(eval_finetune, "views", lambda x, img, cfg, aspect: (
        images_seen.append(x) or x[:, :, :16, :16] / 255))
    eval_finetune.train(settings(checkpoints["mclim"], tmp_path / "run", labels=labels, mixup=mixed, smoothing=0.2,
                                 drop_path=0.4, test_every=1, epochs=2, warmup=0.0))
    assert dropped == {0.0, 0.4} and len(seen) == 2 * (5 if labels == 1 else 2) and all(trains)
    assert seeds == [(0, step, 0) for step in range(len(seen))]
    for (_, targets), x, given in zip(seen, images_seen, fed):
        own = F.one_hot(x[:, 0, 0, 0].long(), 10).float()
        assert torch.equal(targets, own) == torch.equal(given, x[:, :, :16, :16] / 255) == (mixed == 0)
        assert mixed == 0 or torch.equal((targets > 0).any(0), (own > 0).any(0))


def test_a_fine_tuning_goes_on_without_its_run(checkpoints, little, tmp_path, capsys):
    run = shutil.copytree(checkpoints["mvmae"], tmp_path / "pre")
    out = eval_finetune.train(settings(run, tmp_path / "tuned", test_every=0))
    shutil.rmtree(run)
    assert eval_finetune.main(["--resume", str(out)]) == 0
    assert json.loads((out / "pretrained.json").read_text())["method"] == "mvmae"
    (out / "pretrained.json").unlink()
    capsys.readouterr()
    assert eval_finetune.main(["--resume", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "pretrained.json" in line


def test_a_resumed_fine_tuning_ends_in_the_same_weights(checkpoints, little, tmp_path, monkeypatch):
    cfg = settings(checkpoints["camae"], "", epochs=3, mixup=0.5, drop_path=0.5, labels=0.5)  # 20 images
    killed_and_resumed(eval_finetune, cfg, tmp_path, monkeypatch)
    reports = [json.loads((tmp_path / name / "eval_finetune.json").read_text()) for name in ("killed", "whole")]
    assert reports[0]["percent"] == reports[1]["percent"] and reports[0]["labelled images"] == 20


def test_few_labels_make_a_batch_that_fits(checkpoints, little, tmp_path, capsys):
    for batch, taken in ((21, 2), (20, 20)):
        cfg = settings(checkpoints["mvmae"], tmp_path / str(batch), labels=0.5, batch=batch, steps=1)
        out, told = eval_finetune.train(cfg), capsys.readouterr().out
        assert json.loads((out / "config.json").read_text())["config"]["batch"] == taken
        said = "--batch 2 instead of 21, for so few images" in told
        assert "20 labelled images" in told and said == (taken == 2)


@pytest.mark.parametrize("command, words", [
    ("", ["RUN", "name the folder"]),
    ("{tmp}/nowhere", ["nowhere", "does not exist"]),
    ("{run} --labels 2", ["--labels", "2.0", "between 0 and 1"]),
    ("{run} --labels 0", ["--labels", "0.0", "above 0"]),
    ("{run} --rand-ops -1", ["--rand-ops", "-1", "at least 0"]),
    ("{run} --test-every -1", ["--test-every", "-1", "at least 0"]),
    ("{run} --mixup-alpha inf", ["--mixup-alpha", "inf", "above 0"]),
    ("{run} --smoothing 1", ["--smoothing", "1.0", "below 1"]),
    ("{run} --drop-path 1", ["--drop-path", "1.0", "below 1"]),
    ("{run} --crop-min 0", ["--crop-min", "0.0", "above 0"]),
    ("{run} --mixup 2", ["--mixup", "2.0", "between 0 and 1"]),
    ("{run} --layer-decay 0", ["--layer-decay", "0.0", "above 0"]),
    ("{run} --rand-magnitude 31", ["--rand-magnitude", "31.0", "30"]),
    ("{run} --warmup 100", ["--warmup", "100", "below --epochs 100"]),
    ("{run} --batch 8 --out {run}", ["--out", "must be new or empty"]),
    ("{tmp}/missing/last.pt", ["missing/last.pt", "does not fit", "Missing", "encoder.norm.bias"]),
    ("{tmp}/left/last.pt", ["left/last.pt", "does not fit", "Unexpected", "encoder.more"]),
    ("{done}", ["is of eval_finetune.py"]),
    ("--resume {run}", ["{run}", "holds no config.json"]),
    ("--resume {done} --lr 1", ["--lr", "1.0", "was started with"])])
def test_bad_input_of_fine_tuning_gets_one_line(checkpoints, little, tmp_path, command, words, capsys):
    run = checkpoints["mvmae"]
    done = eval_finetune.train(settings(run, tmp_path / "done", steps=1)) if "{done}" in command else ""
    for name in {"missing", "left"} & set(re.split(r"\W", command)):
        state = torch.load(run / "last.pt", weights_only=True)
        if name == "missing":
            del state["model"]["encoder.norm.bias"]
        else:
            state["model"]["encoder.more"] = torch.zeros(1)
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "last.pt")
    capsys.readouterr()
    status = eval_finetune.main(shlex.split(command.format(run=run, done=done, tmp=tmp_path)))
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1 and line.startswith("eval_finetune.py: "), line
    assert all(word.format(run=run) in line for word in words), line


def test_fine_tuning_without_labels_says_what_it_needs(checkpoints, little, tmp_path, capsys, monkeypatch):
    for parts in ((little[0], None), ((little[0][0], 0 * little[0][1] - 1, little[0][2]), little[1])):
        monkeypatch.setattr(eval_finetune, "load_data", lambda cfg: parts)
        assert eval_finetune.main([str(checkpoints["mvmae"]), "--out", str(tmp_path / "run")]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "--data shapes" in line and "train/CLASS/IMAGE" in line


def test_flags_of_fine_tuning_are_its_fields_and_the_readme_knows_them(capsys):
    with pytest.raises(SystemExit, match="0"):
        eval_finetune.main(["--help"])
    packed = re.sub(r"\s", "", capsys.readouterr().out)
    lines = re.findall(r"(?m)^    (\w+): .*?  # (.*)$", inspect.getsource(eval_finetune.Config))
    assert [name for name, _ in lines] == [field.name for field in fields(eval_finetune.Config)]
    assert all(("--" + name.replace("_", "-") in packed or name == "run") and re.sub(r"\s", "", text) in packed
               for name, text in lines)

    def parse(text):
        return common.command_line("eval_finetune", eval_finetune.Config, eval_finetune.TINY, shlex.split(text))

    assert parse("") == eval_finetune.Config()
    assert parse("RUN --tiny") == parse("--tiny RUN") == replace(eval_finetune.TINY, run="RUN")
    assert parse("--labels 0.1 RUN --no-amp") == eval_finetune.Config(run="RUN", labels=0.1, amp=False)
    text = (HERE / "README.md").read_text() + eval_finetune.__doc__
    commands = re.findall(r"eval_finetune\.py (\S+)((?: --[\w-]+(?: [^\s`|-][^\s`]*)?)*)", text)
    assert len(commands) >= 5
    for run, flags in commands:
        assert parse(run + flags).run == run


def test_fine_tuning_learns_a_colour(checkpoints, tmp_path, monkeypatch):
    parts = []
    for split, n in (("train", 200), ("test", 100)):
        x, _, aspect = (part[:n] for part in common.load_images("shapes", split, 16))
        parts.append((x, (x[:, 0].float().mean((1, 2)) > 128).long(), aspect))  # is it red?
    monkeypatch.setattr(eval_finetune, "load_data", lambda cfg: parts)
    cfg = settings(checkpoints["mclim"], tmp_path / "tuned", batch=20, epochs=5, lr=2e-2, rand_ops=0, log_every=50)
    report = json.loads((eval_finetune.train(cfg) / "eval_finetune.json").read_text())
    assert report["percent"]["top1"] > 85, report  # chance is 50


def test_torchrun_fine_tunes_and_one_process_writes(checkpoints, tmp_path):
    answer = torchrun(HERE / "eval_finetune.py", checkpoints["mclim"], "--tiny", "--labels", 0.1, "--steps", 2,
                      "--rand-ops", 0, "--out", tmp_path / "tuned")
    assert answer.returncode == 0, answer.stderr
    rows = metrics(tmp_path / "tuned")
    assert [row["step"] for row in rows] == ["2", "2"] and rows[0]["epoch"] == "0.6667"  # 3 steps of 2 · 64 images each
    assert answer.stdout.count("labelled images") == 1 and answer.stdout.count("of the test images right") == 1


# Pictures

def test_a_notebook_keeps_its_way_of_drawing():
    code = "import sys, matplotlib, compare, eval_dense, eval_finetune, show; print('matplotlib.pyplot' in sys.modules)"
    assert run("-c", code).stdout == "False\n"


def test_commands_that_are_named_hold_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(common.Run.command(types.SimpleNamespace(folder=tmp_path), "mvmae.py --resume"))
    assert pathlib.Path(words[1]).samefile(HERE / "mvmae.py") and words[2:] == ["--resume", str(tmp_path)]


def test_curves_have_no_empty_panels_and_knn_in_percent(tmp_path, monkeypatch):
    names = ["step", "epoch", "lr", "knn", "rank", "loss", "contrast", "p 1", "p 2", "images_per_second"]
    rows, axes = [dict(zip(names, range(i, 10 + i))) for i in range(4)], []
    rows += [{"step": 4, "epoch": 4, "knn": 0.5, "rank": 33.0}]
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **kw: axes.extend(figure.axes) or save(figure, *to))
    pictures.draw_curves(tmp_path / "curves.png", rows)
    assert Image.open(tmp_path / "curves.png").size == (320 * 4, 280 * 2)  # seven: four and three
    titles = [axis.get_title() for axis in axes]
    assert titles == ["learning rate", "kNN top-1 in %", "effective rank", "loss", "contrast", "p", "images per second"]
    assert {axis.get_xlim() for axis in axes} == {(0, 1.03 * 4)}  # although the loss ends at 3
    assert axes[1].lines[0].get_ydata()[-1] == 50 and axes[2].lines[0].get_ydata()[-1] == 33 and len(axes[5].lines) == 2
    pictures.draw_curves(tmp_path / "curves.png", [{**rows[0], "epoch": 0.0}])  # the first row of a long epoch
    assert axes[-1].get_xlim() == (0, 1.03)


@pytest.mark.parametrize("norm", [False, True])
def test_the_picture_says_what_was_restored(norm):
    model, x = build(replace(SMALL["mvmae"], norm_pixels=norm)), normal(2, 3, 16, 16)
    torch.manual_seed(1)
    masked, prediction = model.reconstruct(x)
    torch.manual_seed(1)
    rows = pictures.reconstruction_rows(model, x)
    assert ("true mean and contrast" in list(rows)[2]) == norm and list(rows)[:2] == ["original", "masked"]
    assert all(torch.equal(*pair) for pair in zip(rows.values(), (x, masked, prediction)))


@pytest.mark.parametrize("cfg", [SMALL[method] for method in METHODS] + BACKBONES[1:],
                         ids=lambda cfg: type(cfg).__module__ + getattr(cfg, "backbone", ""))
def test_attention_maps_are_the_softmax_of_the_last_blocks_query(cfg):
    """By another way: what the last attention is called with, its weights as matrices, a loop over images and heads."""
    encoder, x = build(cfg).encoder, normal(2, 3, cfg.img, cfg.img)
    block = encoder.stages[-1][-1] if hasattr(encoder, "stages") else encoder.blocks[-1]
    forward, entering = type(block.attn).forward, []
    block.attn.forward = lambda x: entering.append(x) or forward(block.attn, x)
    with torch.no_grad():
        maps = show.attention_maps(encoder, x)
        x_in, = entering
        x_in = x_in.reshape(2, -1, x_in.shape[-1])
        D, K, cls = x_in.shape[2], maps.shape[1], hasattr(encoder, "cls_token")
        d = D // K
        for b in range(2):
            for k in range(K):
                W_q, W_k = (block.attn.qkv.weight[i * D + k * d:i * D + (k + 1) * d] for i in (0, 1))
                b_q, b_k = (block.attn.qkv.bias[i * D + k * d:i * D + (k + 1) * d] for i in (0, 1))
                query = W_q @ (x_in[b, 0] if cls else x_in[b].mean(0)) + b_q
                weights = [math.exp(float(query @ (W_k @ token + b_k)) / math.sqrt(d)) for token in x_in[b]]
                expected = torch.tensor(weights) / sum(weights)
                assert torch.allclose(maps[b, k], expected[1:] if cls else expected, atol=1e-5)
    assert maps.shape[2] == encoder.tokens(x).shape[1]
    assert K == (block.attn.num_heads if hasattr(encoder, "stages") else block.attn.heads) > 1
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_principal_components_are_those_of_all_tokens():
    torch.manual_seed(0)
    x = torch.randn(5, 7, 12) * torch.linspace(3, 0.1, 12) + 4
    ours = show.principal_components(x)
    flat = x.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    U, S, _ = torch.linalg.svd(flat, full_matrices=False)
    theirs = (U * S)[:, :3].unflatten(0, (5, 7))
    for i in range(3):
        sign = (ours[..., i] * theirs[..., i]).sum().sign()
        assert torch.allclose(ours[..., i].double() * sign, theirs[..., i], atol=1e-3)


def test_own_images_are_upright_on_white_whole_and_named(tmp_path):
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 20, 20))
    picture.save(tmp_path / "half.png")
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.full((20, 20), 257 * 60, np.uint16)).save(tmp_path / "xray.png")  # 16 bits
    x, aspect, names = show.own_images(tmp_path, 16, 8)
    assert names == ["half.png", "turned.jpg", "xray.png"] and aspect.tolist() == [2, 0.5, 1]
    assert x.shape == (3, 3, 16, 16) and x[2].unique().tolist() == [60]
    assert x[0, :, 8, 2].tolist() == [255, 0, 0] and x[0, :, 8, 13].tolist() == [255, 255, 255]
    wholes = [common.denormalize(show.whole(image, a)) for image, a in zip(x, aspect.tolist())]
    assert [tuple(whole.shape) for whole in wholes] == [(3, 8, 16), (3, 16, 8), (3, 16, 16)]
    assert torch.allclose(wholes[0][:, 4, 2], torch.tensor([1.0, 0, 0]), atol=0.02)
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(common.UserError, match="floats.tiff: can't be read as an image .*8 or 16 bits"):
        show.own_images(tmp_path, 16, 8)


@every_method
def test_show_draws_any_checkpoint_and_the_users_own_images(checkpoints, little, folder, tmp_path, method, monkeypatch):
    drawn = []
    draw = show.draw_images
    monkeypatch.setattr(show, "draw_images", lambda file, rows, names: drawn.append((rows, names)) or (
        draw(file, {label: list(row)[:2] for label, row in list(rows.items())[:4]}, names)))
    run = checkpoints[method]
    assert show.main([str(run), "--count", "3"]) == 0 and (run / "show.png").exists()
    assert show.main([str(run), "--images", str(folder), "--count", "3", "--out", str(tmp_path / "own.png")]) == 0
    assert Image.open(run / "show.png").size[0] == Image.open(tmp_path / "own.png").size[0]
    (plain, none), (own, names) = drawn
    assert list(names) == ["0.png", "1.png", "0.png"] and not none and list(plain) == list(own)
    labels = " ".join(plain)
    assert all(word in labels for word in ("whole image", "original", "reconstruction", "principal", "head 3"))
    special = {"cmae": "crop 3", "macrl": "branch w:\ntarget", "camae": "left by the mask"}
    assert special.get(method, "") in labels and all(len(row) == 3 for row in plain.values())
    assert all(torch.isfinite(image).all() for row in own.values() for image in row)


def test_show_takes_training_images_where_there_are_no_others(checkpoints, little, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(show, "load_data", lambda cfg: (little[0], None))
    monkeypatch.setattr(show, "draw_images", lambda file, rows, names: drawn.append(rows))
    assert show.main([str(checkpoints["mclim"]), "--count", "40", "--seed", "3"]) == 0
    wanted = little[0][0][torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    assert torch.equal(drawn[0]["original"], common.normalize(common.central_crop(wanted, 16)))


def test_panel_of_idm_shows_what_each_head_leaves():
    model, x = build(SMALL["camae"]), normal(2, 3, 16, 16)
    rows = show.idm_panel(model, x)
    for k, row in enumerate(rows.values()):
        mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, model.encoder.attention(x)[:, k].topk(12).indices, True)
        hidden = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert torch.equal(row, x * ~hidden)
    assert len(rows) == 3


@pytest.mark.parametrize("restore", ["clean", "view"])
def test_panel_of_branches_shows_both_and_their_targets(restore):
    cfg = replace(SMALL["macrl"], gray_s=1.0, jitter_s=0.0, jitter_w=0.0, restore=restore)
    rows = show.branch_panel(build(cfg), normal(8, 3, 16, 16))
    s_view, s_masked, _, s_target, w_view, w_masked, _, w_target = rows.values()
    assert (s_masked == s_view).double().mean() == 0.25 and (w_masked == w_view).double().mean() == 0.5
    assert torch.equal(w_view, w_target) and torch.equal(s_view, s_target) == (restore == "view")


# Comparison

def layers(tokens, *widths):
    """FLOP of linear layers one after the other, on so many tokens: a product and a sum are two."""
    return sum(2 * tokens * a * b for a, b in zip(widths, widths[1:]))


def blocks(tokens, dim, depth):
    """Of transformer blocks: queries, keys and values, q·kᵀ and its product with v, projection, MLP."""
    one = layers(tokens, dim, 3 * dim) + 2 * 2 * tokens ** 2 * dim + layers(tokens, dim, dim)
    return depth * (one + layers(tokens, dim, 4 * dim, dim))


def by_hand(cfg):
    """FLOP of a training step of two images. Backward takes twice the forward; once for the patch embedding, whose
    input needs no gradient; nothing where neither does."""
    N, P, D, W = (cfg.img // cfg.patch) ** 2, 3 * cfg.patch ** 2, cfg.dim, getattr(cfg, "decoder_dim", 0)
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
        return 2 * views * (encode(1 + V) + decode(V)) + (3 * layers(4, D, 4) if cfg.lam > 0 else 0)
    if method == "cmae":
        projection = layers(1, D, D, *[D] * (cfg.projection == "mlp"))
        contrast = encode_only(1 + N - V) + encode_only(1 + V) + encode_only(1 + N - V) + 4 * projection
        own = blocks(T, W, cfg.decoder_depth) if cfg.decoder == "transformer" else (
            cfg.decoder_depth * (2 * 9 * N * W + layers(N, W, W)))  # 3×3 in each channel, then across them
        decoder = 3 * (layers(1 + V, D, W) + own + layers(T, W, P))
        return 2 * (encode(1 + V) + contrast + 3 * layers(V, D, D, N) + decoder) + 2 * layers(2, D, 2)
    if method == "macrl":
        V_w, g = N - round(cfg.mask_w * N), layers(1, D, cfg.hidden, cfg.out_dim)
        contrast = encode_only(1 + V_w) + 4 * g + 2 * layers(1, cfg.out_dim, 2 + cfg.bank)
        return 2 * (encode(1 + V) + encode(1 + V_w) + contrast + decode(V) + decode(V_w))
    g = layers(1, D, cfg.hidden, cfg.hidden, cfg.out_dim)
    contrast = 2 * (encode(T, cfg.freeze_patch) + encode_only(T) + 4 * g)
    mim = layers(T, D, 3 * D) + encode(1 + V, cfg.freeze_patch) + decode(V)  # the first: of its attention map
    return 2 * (contrast + (mim if cfg.mim else 0)) + 4 * layers(2, cfg.out_dim, 2)


@pytest.mark.parametrize("method, flags", [*((method, {}) for method in METHODS),
    ("mclim", {"contrast": "none", "head": "linear", "freeze_patch": False}), ("mclim", {"target": "momentum"}),
    ("mvmae", {"targets": "one", "lam": 0}), ("cmae", {"decoder": "conv", "heat": "features"}),
    ("cmae", {"projection": "mlp"}), ("camae", {"mim": False, "freeze_patch": True})], ids=str)
def test_gflop_of_a_step_are_those_counted_by_hand(method, flags):
    cfg = replace(SMALL[method], depth=3, **flags)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert eval_speed.gflop_per_image(cfg) == pytest.approx(by_hand(cfg) / 2 / 1e9, rel=1e-9)
    assert torch.rand(1) == expected  # random numbers go on as if nothing was counted


def test_p_is_the_area_beyond_t_under_students_density():
    for df in (1, 2, 3, 4, 5, 8, 13, 40):
        for t in (0.0, 0.3, 1.0, 2.5, 6.0):
            density = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
            x = torch.linspace(-t, t, 20_001, dtype=torch.float64)
            within = torch.trapezoid(density * (1 + x ** 2 / df) ** (-(df + 1) / 2), x).item()
            assert compare.student_p(t, df) == compare.student_p(-t, df) == pytest.approx(1 - within, abs=1e-7)


def test_rows_are_compared_by_the_variance_pooled_over_all():
    values = {"a": [1.0, 2.0, 3.0], "b": [4.0, 6.0], "c": [3.0]}
    p = compare.compare_with(values, "a")
    variance = (1 + 0 + 1 + 1 + 1) / (2 + 1 + 0)
    assert p["b"] == pytest.approx(compare.student_p(3 / math.sqrt(variance * (1 / 3 + 1 / 2)), 3), rel=1e-12)
    assert p["c"] == pytest.approx(compare.student_p(1 / math.sqrt(variance * (1 / 3 + 1 / 1)), 3), rel=1e-12)
    assert math.isnan(p["a"])
    assert math.isnan(compare.compare_with({"a": [1.0, 1.0], "c": [2.0, 2.0]}, "a")["c"])  # no variance, no verdict
    assert math.isnan(compare.compare_with({"a": [1.0], "b": [2.0]}, "a")["b"])
    assert math.isnan(compare.compare_with({"a": [1.0, 2.0], "b": [2.0, 3.0]}, "not yet done")["b"])


def test_rows_are_read_with_their_names_or_without():
    rows = compare.read_rows("# a comment\n\n MAE = mvmae.py --lam 0 --targets=one\ncmae.py --mask=0.5\nmclim.py")
    assert rows == {"MAE": ("mae", "mvmae", ["--lam", "0", "--targets=one"]), "mclim.py": ("mclim-py", "mclim", []),
                    "cmae.py --mask=0.5": ("cmae-py-mask-0-5", "cmae", ["--mask=0.5"])}
    default = compare.read_rows(compare.ROWS)
    assert len(default) == 8 and {row[1] for row in default.values()} == set(METHODS)


ROWS = """MAE = mvmae.py --targets one --lam 0 --norm-pixels
mclim.py
CMAE = cmae.py --lam-loc 0
contrast = camae.py --no-mim
"""
COMMON = "--tiny --data shapes --images 200 --img 16 --dim 48 --depth 2 --batch 50 --knn-every 0 --device cpu".split()


@pytest.fixture
def fast(tmp_path, monkeypatch):
    """Few shapes, few epochs of the probes, no pictures, one thread, and how compare.py is called: folder, flags."""
    parts = {split: [part[:n] for part in common.load_images("shapes", split, 18)] for split, n in (("train", 240),
                                                                                                   ("test", 100))}
    monkeypatch.setattr(common, "load_images", lambda data, split, *_: parts[split])
    for module, name in ((common, "draw_images"), (common, "draw_curves"), (eval_linear, "draw_confusion"),
                         (compare, "draw_table")):
        monkeypatch.setattr(module, name, lambda *_: None)
    for recipe, name in (("linear", "epochs"), ("attentive", "epochs"), ("attentive", "least_steps")):
        monkeypatch.setitem(eval_linear.RECIPES[recipe], name, 2)
    costs = {"mclim": 0.01, "mvmae": 0.025, "cmae": 0.03, "camae": 0.027}
    monkeypatch.setattr(compare, "gflop_per_image", lambda cfg: costs[type(cfg).__module__])
    (tmp_path / "rows").write_text(ROWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda out, *more, flags=COMMON: compare.main(
        ["--rows", str(tmp_path / "rows"), "--out", str(tmp_path / out), "--seeds", "0", "1", *flags, *more])
    torch.set_num_threads(threads)
    for sign, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(sign, usual)


def outcome(folder):
    """What must not depend on when a comparison was stopped: the table but for seconds, and the scores of each run."""
    with open(folder / "table.csv", newline="") as file:
        table = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    reports = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/eval_linear.json")}
    return table, {name: (report["percent"], report["effective_rank"]) for name, report in reports.items()}


class Killed(BaseException):
    """What nothing catches."""


def test_a_comparison_killed_anywhere_ends_in_the_same_table(fast, tmp_path, monkeypatch, capsys):
    assert fast("whole", "--gflop", "9") == 0
    said = capsys.readouterr().out
    assert "run 8 of 8: contrast, seed 1" in said and said.count("GFLOP left, ") == 7
    assert len({metrics(tmp_path / "whole" / f"{row}-0")[-1]["epoch"] for row in ("mae", "mclim-py", "cmae")}) == 3
    report = json.loads((tmp_path / "whole" / "mae-0" / "eval_linear.json").read_text())
    report["percent"]["trained encoder"]["knn_top1"] = 99
    save, main, saves, stale, evaluated, draw = common.Run.save, eval_linear.main, [], [], [], random.Random(0)
    deaths = dict(zip(draw.sample(range(1, 60), 4), (Killed, Killed, KeyboardInterrupt, SystemExit(143))))

    def save_and_die(self, step, *args, **parts):
        assert str(self.folder) not in evaluated  # what is finished is never repeated
        saves.append(step)
        if len(saves) in deaths:
            if len(stale) % 2:
                save(self, step, *args, **parts)
            stale.append(str(self.folder))
            if step < self.steps:
                (self.folder / "eval_linear.json").write_text(json.dumps(report))  # as if its user had looked at it
            raise deaths[len(saves)]
        save(self, step, *args, **parts)

    def evaluate_and_die(argv):
        evaluated.append(argv[0])
        if argv[0] in stale and evaluated.count(argv[0]) == 1:
            if argv[0] == stale[0]:
                pathlib.Path(argv[0], "eval_linear.json").write_text('{"per')
            raise Killed
        return main(argv)

    monkeypatch.setattr(common.Run, "save", save_and_die)
    monkeypatch.setattr(eval_linear, "main", evaluate_and_die)
    ends = []
    while not ends or ends[-1] not in (0, 1, 2):
        try:
            ends.append(fast("killed", "--gflop", "9"))
        except (Killed, SystemExit) as error:
            ends.append(getattr(error, "code", "killed"))
    assert sorted(map(str, ends)) == ["0", "130", "143"] + ["killed"] * (2 + len(set(stale))) and len(stale) == 4
    assert capsys.readouterr().err.count("the same command goes on") == 2
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert len(outcome(tmp_path / "whole")[1]) == 8 and len(evaluated) == 8 + len(set(stale))


def test_ctrl_c_ends_a_comparison_cleanly_and_it_goes_on(fast, tmp_path, monkeypatch, capsys):
    log = common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda self, step, *rest: (
        os.kill(os.getpid(), signal.SIGINT) if step == 2 else None, log(self, step, *rest)))
    with pytest.raises(SystemExit) as stop:
        fast("out", "--gflop", "9")
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert [row["step"] for row in metrics(tmp_path / "out" / "mae-0")] == ["2"]
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["mae-0"]

    def evaluate(argv):
        raise KeyboardInterrupt
    monkeypatch.setattr(common.Run, "log", log)
    monkeypatch.setattr(eval_linear, "evaluate", evaluate)
    with pytest.raises(SystemExit) as stop:
        fast("out", "--gflop", "9")
    assert stop.value.code == 130 and not (tmp_path / "out" / "table.txt").exists()


def test_a_loss_that_is_not_finite_costs_its_row_alone(fast, tmp_path, monkeypatch, capsys):
    def dead(sign, frame):
        pass

    def fail(cfg):
        signal.signal(signal.SIGINT, dead)  # as Run does, and only its end undoes it
        raise FloatingPointError("loss not finite by step 3")
    handlers, run = [], compare.run_job
    monkeypatch.setattr(compare, "run_job", lambda job: handlers.append(signal.getsignal(signal.SIGINT)) or run(job))
    monkeypatch.setattr(MODULES["mclim"], "train", fail)
    assert fast("out", "--gflop", "2", "--seeds", "0") == 1
    assert len(handlers) == 4 and dead not in handlers
    table, _ = outcome(tmp_path / "out")
    assert [row["row"] for row in table] == ["MAE", "CMAE", "contrast"] and table[1]["kNN % p"] == "nan"
    assert "mclim-py-0: loss not finite by step 3" in capsys.readouterr().err


def test_steps_are_what_the_budget_pays_for_or_the_epochs(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "gflop_per_image", eval_speed.gflop_per_image)
    rows = compare.read_rows("MAE = mvmae.py --lam 0 --targets one --mask 0.5\nmclim.py --contrast none")
    args = types.SimpleNamespace(out=str(tmp_path), seeds=[3, 1], gflop=9.0, equal="compute")
    jobs = compare.plan(rows, COMMON, args)
    assert [(job.method, job.cfg.seed) for job in jobs] == [("mvmae", 3), ("mclim", 3), ("mvmae", 1), ("mclim", 1)]
    for job in jobs:
        step = 50 * eval_speed.gflop_per_image(job.cfg)
        assert job.steps == job.cfg.steps == int(9 / step) > 3 and job.gflop == pytest.approx(job.steps * step)
        assert 9 - step < job.gflop <= 9 and job.cfg.batch == 50 and job.cfg.out == str(job.folder)
    jobs = compare.plan(rows, [*COMMON, "--epochs", "3"], types.SimpleNamespace(**{**vars(args), "equal": "epochs"}))
    assert {(job.steps, job.cfg.steps, job.cfg.epochs) for job in jobs} == {(12, 0, 3)}


@pytest.mark.parametrize("more, flag", [
    ([], "--gflop"), (["--gflop", "0"], "--gflop"), (["--gflop", "nan"], "--gflop"), (["--gflop", "0.1"], "--gflop"),
    (["--gflop", "9", "--equal", "epochs"], "--gflop"), (["--gflop", "9", "--seeds", "1", "1"], "--seeds"),
    (["--gflop", "9", "--seeds", "-1"], "--seed"), (["--gflop", "9", "--seed", "1"], "--seed"),
    (["--gflop", "9", "--epochs", "3"], "--epochs"), (["--gflop", "9", "--steps=3"], "--steps"),
    (["--gflop", "9", "--resume", "x"], "--resume"), (["--gflop", "9", "--baseline", "MEA"], "--baseline"),
    (["--gflop", "9", "--tua", "1"], "row MAE"), (["--gflop", "9", "--mask", "2"], "row MAE"),
    (["--gflop", "9", "--rows", "nowhere"], "nowhere"), (["--gflop", "9", "--init", "nowhere"], "--init"),
    (["--gflop", "9", "--batch", "201"], "--batch"), (["--gflop", "9", "--images", "241"], "--images"),
    (["--gflop", "9", "--mask=0.5", "--lam", "x"], "--lam")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_is_wrong_is_told_in_one_line_before_anything_is_trained(fast, tmp_path, monkeypatch, capsys, more, flag):
    for module in MODULES.values():
        monkeypatch.setattr(module, "train", lambda cfg: pytest.fail("trained"))
    assert fast("out", *more) == 2
    err = capsys.readouterr().err
    assert err.startswith("compare.py: ") and err.count("\n") == 1 and flag in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["mea.py", "mclim", "A = ", "MAE = mclim.py", "mae = mclim.py", "... = mclim.py",
                                  'x = mclim.py --data "my images'])
def test_rows_that_are_no_rows_are_told(fast, tmp_path, capsys, line):
    (tmp_path / "own").write_text(f"MAE = mvmae.py\n{line}\n")
    assert fast("out", "--rows", str(tmp_path / "own"), "--gflop", "9") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--rows" in err and line.strip() in err
    (tmp_path / "own").write_text("# nothing\n")
    assert fast("out", "--rows", str(tmp_path / "own"), "--gflop", "9") == 2


def test_a_comparison_needs_labels_one_size_and_its_own_folder(fast, tmp_path, monkeypatch, capsys):
    def told(*more, flags=COMMON):
        assert fast("out", "--gflop", "9", *more, flags=flags) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err
    assert "--depth 12 in MAE, 6 in mclim.py" in told(flags="--data shapes --img 16 --patch 4 --batch 50".split())
    load = common.load_images
    monkeypatch.setattr(common, "load_images", lambda data, split, *_: None if split == "test" else load(data, split))
    assert "test/CLASS" in told()
    monkeypatch.setattr(common, "load_images", lambda data, split, *rest: [
        x * 0 - 1 if x.dtype == torch.int64 and split == "train" else x for x in load(data, split)])
    assert "test/CLASS" in told()
    monkeypatch.setattr(common, "load_images", load)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in told()
    monkeypatch.delenv("WORLD_SIZE")

    cfg = replace(SMALL["mvmae"], out=str(tmp_path / "out" / "mae-0"))
    (tmp_path / "out" / "mae-0").mkdir(parents=True)
    (tmp_path / "out" / "mae-0" / "thesis.tex").write_text("mine")
    assert "mae-0" in told()
    facts = {"method": "mvmae", "config": asdict(cfg), "processes": 1}
    (tmp_path / "out" / "mae-0" / "config.json").write_text(json.dumps(facts))
    assert "another --out" in told() and (tmp_path / "out" / "mae-0" / "thesis.tex").exists()


def test_scores_are_those_of_a_run_that_is_trained_and_evaluated(tmp_path):
    job = compare.Job("a", "mclim", SMALL["mclim"], tmp_path, 12, 1.0)
    percent = {"knn_top1": 1.0, "linear_top1": 2.0, "attentive_top1": 3.0}

    def scores(step, percent, images=SMALL["mclim"].images, checkpoint=tmp_path):
        (tmp_path / "metrics.csv").write_text(f"step,knn,images_per_second\n{step},,4.0\n")
        report = {"percent": {"trained encoder": percent}, "effective_rank": {"trained encoder": 4.0}, "images": images,
                  "checkpoint": str(checkpoint)}
        (tmp_path / "eval_linear.json").write_text(json.dumps(report))
        return compare.read_scores(job)
    assert compare.read_scores(job) is None
    assert scores(12, percent) == {**percent, "rank": 4.0}
    assert scores(11, percent) is None and scores(12, {"knn_top1": 1.0, "linear_top1": 2.0}) is None
    assert scores(12, percent, images=77) is None  # evaluated on other images than it was trained on
    assert scores(12, percent, checkpoint=tmp_path / "previous.pt") is None


def test_table_has_means_deviations_p_and_seconds(tmp_path, monkeypatch):
    shown, jobs, results = [], [], {}
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **kw: shown.append(figure) or save(figure, *to, **kw))
    scores = {"a": [10.0, 12.0, 14.0], "b": [30.0, 31.0, 35.0], "only one": [11.0]}
    for row, values in scores.items():
        for seed, value in enumerate(values):
            jobs.append(compare.Job(row, "mclim", SMALL["mclim"], tmp_path / f"{row}-{seed}", 12, 345.678))
            jobs[-1].folder.mkdir()
            results[jobs[-1].folder] = {score: value + i for i, score in enumerate(compare.SCORES)}
            (jobs[-1].folder / "metrics.csv").write_text("step,knn,images_per_second\n8,,4.0\n8,0.5,\n12,,2.0\n")
    assert compare.trained(jobs[0]) == (12, 8 * 16 / 4 + 4 * 16 / 2)
    text = compare.write_table(tmp_path, [*jobs, replace(jobs[0], folder=tmp_path / "to come")], results, "a")
    p = compare.compare_with(scores, "a")
    with open(tmp_path / "table.csv", newline="") as file:
        a, b, one = csv.DictReader(file)
    assert [b[name] for name in ("seeds", "linear %", "GFLOP", "seconds")] == ["3", "33.0", "345.678", "64.0"]
    assert float(b["effective rank deviation"]) == pytest.approx(7 ** 0.5, abs=1e-4) and one["kNN % deviation"] == "nan"
    assert float(b["kNN % p"]) == p["b"] < 0.01 < float(one["kNN % p"]) == p["only one"] and a["kNN % p"] == "nan"
    first, second, third = text.splitlines()[1:4]
    assert f"32.00 ± 2.65 p {p['b']:.2g}*" in second and "346" in second and second.count("*") == 4
    assert "12.00 ± 2.00  " in first and "11.00 p " in third
    assert "*" not in first + third and (tmp_path / "table.txt").read_text() == text
    axes = shown[0].axes
    assert len(axes) == 4 and [label.get_text() for label in axes[0].get_yticklabels()] == list(scores)
    dots = [line.get_xdata().tolist() for line in axes[1].lines if line.get_marker() == "o"]
    assert dots == [[v + 1 for v in values] for values in scores.values()]
    bars = [bar.get_segments()[0][:, 0].tolist() for bar in axes[0].collections]
    assert bars[0] == [10, 14] and bars[1] == pytest.approx([32 - 7 ** 0.5, 32 + 7 ** 0.5])
    assert Image.open(tmp_path / "table.png").size[0] > 800


@slow
def test_a_comparison_under_real_kills_ends_in_the_same_table(tmp_path):
    for split, n in (("train", 200), ("test", 100)):
        for i, (image, label) in enumerate(zip(*common.load_images("shapes", split, 18)[:2])):
            if i < n:
                file = tmp_path / "set" / split / str(int(label)) / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    (tmp_path / "rows").write_text("mvmae.py --targets one --lam 0\nmclim.py\n")
    command = ["compare.py", "--rows", tmp_path / "rows", "--seeds", 0, 1, *COMMON, "--data", tmp_path / "set",
               "--root", tmp_path / "root", "--gflop", 9]
    whole, draw, ends = run(*command, "--out", tmp_path / "whole"), random.Random(0), []
    assert whole.returncode == 0, whole.stderr
    for sign in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen([sys.executable, *map(str, command), "--out", tmp_path / "killed"], cwd=HERE,
                                       stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and "\nrun " not in (tmp_path / "said").read_text():
            time.sleep(0.05)
        try:
            process.wait(draw.uniform(0, 3))
        except subprocess.TimeoutExpired:
            process.send_signal(sign)
        ends.append(process.wait())
        assert "Traceback" not in (tmp_path / "said").read_text()
    last = run(*command, "--out", tmp_path / "killed")
    assert last.returncode == 0 and ends[0] == -signal.SIGKILL and ends[1] == 130, (ends, last.stderr)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
