"""Tests of eval_linear.py and eval_finetune.py."""
import json
import math
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import eval_finetune
import eval_linear
import mvmae
import show
from augment import central_crop, normalize
from conftest import ROOT, build, normal, small, status
from images import Images, draw_shapes
from results.long import report as long_report

CPU = torch.device("cpu")
WEIGHTS = sorted(ROOT.glob("weights/*.pt"))


@pytest.fixture
def run(untrained):
    """The folder of an untrained model's checkpoint."""
    return untrained("mvmae", seed=1)


@pytest.fixture
def shapes(monkeypatch):
    """80 training and 40 test images of ten classes for both programs; short probes."""
    names = tuple(str(i) for i in range(10))
    parts = [Images(*draw_shapes(n, 18, seed)[:2], classes=names) for seed, n in ((0, 80), (1, 40))]
    for program in (eval_linear, eval_finetune):
        monkeypatch.setattr(program, "load_data", lambda cfg: tuple(parts))
    for recipe in eval_linear.RECIPES.values():
        monkeypatch.setitem(recipe, "epochs", 2)
        monkeypatch.setitem(recipe, "min_steps", 0)
    return parts


# Probes

def test_linear_probe_separates_what_is_separable():
    labels = torch.arange(600) % 3
    x = F.one_hot(labels, 5) * 0.5 + 0.02 * normal(600, 5) + torch.tensor([0, 0, 0, 50.0, 0])
    scores = eval_linear.linear_probe(x, labels, x, 3)
    assert eval_linear.accuracy(scores, labels) == 100


def test_a_feature_that_does_not_vary_contributes_nothing():
    """It deviates by 1e-7 in training and is off by 0.001 in test."""
    labels = torch.arange(400) % 2
    x = torch.cat([normal(400, 4) + 2 * labels[:, None], 1 + 1e-7 * normal(400, 1, seed=1)], 1)
    off = x[200:] + torch.tensor([0, 0, 0, 0, 0.001])
    scores = eval_linear.linear_probe(x[:200], labels[:200], torch.cat([x[200:], off]), 2)
    assert torch.equal(scores[:200], scores[200:])
    assert eval_linear.accuracy(scores[200:], labels[200:]) > 90

    mean, scale = eval_linear.standardization(x[:200, None])                    # of tokens
    known, asked = (((part[:, None] - mean) * scale).half() for part in (x[:200], 1e6 * off))
    assert not known[..., 4].any() and not asked[..., 4].any()
    assert torch.allclose(known[:, 0, :4].float().std(0), torch.ones(4), atol=1e-2)


def test_a_score_that_is_not_finite_is_an_error(run, shapes, monkeypatch, capsys):
    monkeypatch.setattr(eval_linear, "linear_probe", lambda *_: torch.full((40, 10), torch.inf))
    assert status(eval_linear, run, "--no-attentive") == 1
    assert "not finite" in capsys.readouterr().err and not (run / "eval_linear.json").exists()


def test_attentive_probe_is_its_formula():
    probe, x = eval_linear.AttentiveProbe(8, 3).requires_grad_(False), normal(4, 5, 8)
    assert torch.allclose(probe(x), probe.head(x.mean(1)))  # it starts with the mean
    probe.query.copy_(normal(8, seed=1))
    probe.head.weight.copy_(normal(3, 8, seed=2))
    for b in range(4):
        weights = [math.exp(float(probe.query @ x[b, t]) / 8 ** 0.5) for t in range(5)]
        pooled = sum(w * x[b, t] for t, w in enumerate(weights)) / sum(weights)
        assert torch.allclose(probe(x)[b], probe.head(pooled), atol=1e-5)


def test_attentive_probe_finds_what_the_mean_hides(monkeypatch):
    """One token of nine tells the class; the others drown it in the mean."""
    monkeypatch.setitem(eval_linear.RECIPES["attentive"], "min_steps", 200)
    labels, x = torch.arange(600) % 3, normal(600, 9, 8)
    position = torch.randint(9, (600,))
    x[torch.arange(600), position, 7] = 9.0
    x[torch.arange(600), position, :3] = 1.5 * F.one_hot(labels, 3).float()
    known, truth = labels[:400], labels[400:]
    scores = eval_linear.attentive_probe(x[:400].half(), known, x[400:].half(), 3)
    assert eval_linear.accuracy(scores, truth) > 90  # a linear probe of the mean: 43


def test_tokens_are_standardised_ones_of_the_encoder(shapes):
    encoder = build(small("mvmae")).encoder
    tokens, own = eval_linear.extract_tokens(encoder, shapes[0], 16, CPU, False)
    queries, _ = eval_linear.extract_tokens(encoder, shapes[1], 16, CPU, False, own)
    with torch.no_grad():
        known, asked = (encoder.tokens(normalize(central_crop(x, 16))) for x in shapes)
    mean, std = known.mean((0, 1)), known.std((0, 1))
    assert tokens.dtype == torch.float16 and tokens.shape == (80, 16, 48)
    assert torch.allclose(tokens.float(), (known - mean) / std, atol=1e-2)
    assert torch.allclose(queries.float(), (asked - mean) / std, atol=1e-2)


def test_accuracy_is_that_of_a_loop():
    scores, labels = normal(50, 7), torch.arange(50) % 7
    for k in (1, 5):
        hits = [int(labels[i]) in sorted(range(7), key=lambda c: -scores[i, c])[:k]
                for i in range(50)]
        assert eval_linear.accuracy(scores, labels, k) == pytest.approx(2 * sum(hits))


# MAE's protocol

def test_lars_equals_a_plain_computation():
    W, b = normal(3, 4).requires_grad_(), normal(3, seed=1).requires_grad_()
    w, c = W.detach().clone(), b.detach().clone()
    optimizer = eval_linear.LARS([W, b], 0.7, momentum=0.9)
    sums = [torch.zeros(3, 4), torch.zeros(3)]
    for step in range(3):
        W.grad, b.grad = normal(3, 4, seed=step), normal(3, seed=step)
        ratio = 0.001 * math.sqrt((w ** 2).sum()) / math.sqrt((W.grad ** 2).sum())
        sums = [0.9 * sums[0] + ratio * W.grad, 0.9 * sums[1] + b.grad]
        w, c = w - 0.7 * sums[0], c - 0.7 * sums[1]
        optimizer.step()
        assert torch.allclose(W, w, atol=1e-6) and torch.allclose(b, c, atol=1e-6)
    zero = torch.zeros(2, 2, requires_grad=True)
    zero.grad = torch.ones(2, 2)
    eval_linear.LARS([zero], 0.5, momentum=0.9).step()
    assert torch.equal(zero, torch.full((2, 2), -0.5))  # no ratio: the plain step


def test_protocol_mae_trains_a_layer_behind_batch_norm(run, shapes, monkeypatch):
    rates, kept, step = [], [], eval_linear.LARS.step

    def keep_and_step(self):
        rates.append(self.param_groups[0]["lr"])
        kept.append(self.param_groups[0])
        step(self)

    monkeypatch.setattr(eval_linear.LARS, "step", keep_and_step)
    eval_linear.main([str(run), "--protocol", "mae", "--batch", "40", "--epochs", "10",
                      "--warmup", "5", "--lr", "0.2", "--no-amp"])
    assert rates == [mvmae.cosine_lr(i, 20, 10, 0.2 * 40 / 256) for i in range(20)]
    assert [tuple(p.shape) for p in kept[0]["params"]] == [(10, 48), (10,)]  # no affine norm
    assert kept[0]["weight_decay"] == 0 and kept[0]["momentum"] == 0.9
    report = json.loads((run / "eval_linear-mae.json").read_text())
    assert set(report["percent"]["trained encoder"]) == {"knn_top1", "linear_top1", "linear_top5"}
    assert report["batch"] == 40 and (run / "confusion-mae.png").exists()
    eval_linear.main(f"{run} --protocol mae --batch 40 --epochs 0.1 --warmup 0".split())
    assert len(rates) == 21  # at least one step


def test_protocol_mae_sees_new_crops_and_its_batch_norm_standardises(shapes):
    class Args:
        batch, epochs, warmup, lr = 40, 4, 0, 1.0

    class Encoder:
        def features(self, x):
            seen.append(x)
            return 100 * x.mean((2, 3)) + 7
    seen = []
    queries = Encoder().features(normalize(central_crop(shapes[1], 16)))
    scores = eval_linear.mae_probe(Encoder(), shapes[0], queries, Args, 16, CPU, False)
    again = eval_linear.mae_probe(Encoder(), shapes[0], queries[:1], Args, 16, CPU, False)
    assert torch.allclose(scores[:1], again, atol=1e-5) and len(seen) == 1 + 2 * 8
    assert not any(torch.equal(seen[1], other) for other in seen[2:9])
    assert scores.abs().max() < 0.5  # features of 100 are standardised


# load_model and the program

def test_weights_are_at_hand():
    assert WEIGHTS


@pytest.mark.parametrize("file", WEIGHTS, ids=lambda file: file.stem)
def test_weights_load_as_a_model_and_as_an_initial_encoder(file, tmp_path):
    model, cfg = eval_linear.load_model(file)
    untrained, _ = eval_linear.load_model(file, trained=False)
    assert (cfg.data, cfg.out, cfg.resume) == ("cifar10", "", "")
    x, encoder = normal(4, 3, cfg.img, cfg.img), build(cfg).encoder
    common.load_encoder(encoder, file)
    features, others, random = (e.eval().features(x) for e in (model.encoder, encoder,
                                                               untrained.encoder))
    assert torch.equal(features, others) and not torch.allclose(features, random, atol=0.1)
    show.main([str(file), "--data", "shapes", "--out", str(tmp_path / "show.png")])


@pytest.mark.parametrize("method, changes, copies", [
    ("mclim", {"target": "momentum"}, ["F2", "T2"]), ("cmae", {}, ["M_E", "M_P"]),
    ("macrl", {"keys": "momentum"}, ["f_xi", "g_xi"]),
    ("camae", {}, ["momentum_encoder", "momentum_projector"])])
def test_an_exported_model_stores_no_momentum_copies(untrained, method, changes, copies, tmp_path):
    run, file = untrained(method, **changes), tmp_path / "model.pt"
    long_report.export_model(run, file)
    model, _ = eval_linear.load_model(file)
    for copy in copies:
        online = model.get_submodule(long_report.COPIES[copy]).state_dict()
        for name, value in model.get_submodule(copy).state_dict().items():
            assert torch.equal(value, online[name])
    stored = {value.data_ptr() for value in torch.load(file, weights_only=True)["model"].values()}
    assert len(stored) == len(model.state_dict()) - sum(
        len(model.get_submodule(copy).state_dict()) for copy in copies)


def test_a_report_collects_finished_runs_and_keeps_earlier_scores(run, tmp_path, monkeypatch):
    monkeypatch.setattr(long_report, "ROOT", tmp_path)
    out, weights = tmp_path / "results/long", tmp_path / "weights"
    for folder in (out, weights):
        folder.mkdir(parents=True)
    (out / "rows.txt").write_text("MAE = mvmae.py\nCMAE = cmae.py\nCAMAE = camae.py\n")
    (out / "scores.csv").write_text("row,seed,knn,rank\nMAE,0,40,9\n")
    for i, name in enumerate(("cmae-0-0.01", "mae-0-all", "random-weights-0-all")):
        folder = tmp_path / "runs/long" / name
        folder.mkdir(parents=True)
        (folder / "eval_finetune.json").write_text(json.dumps({"percent": {"top1": 7 + i}}))
    (run / "config.json").write_text(json.dumps({
        "config": {"seed": 0, "epochs": 3}, "git": "abcdef0123", "precision": "float32"}))
    (run / "metrics.csv").write_text("step,epoch,knn\n1,1,0.1\n2,3,0.2\n")
    shutil.copytree(run, tmp_path / "runs/long/camae-0")  # not evaluated
    percent = {f"{name}_top1": value for name, value in zip(long_report.PROBES, (1, 2, 3))}
    (run / "eval_linear.json").write_text(json.dumps({
        "percent": {"trained encoder": percent}, "effective_rank": {"trained encoder": 4}}))
    shutil.copytree(run, tmp_path / "runs/long/cmae-0")
    (run / "metrics.csv").write_text("step,epoch,knn\n1,1,0.1\n")  # not finished
    shutil.copytree(run, tmp_path / "runs/long/mae-0")
    long_report.main()
    assert (out / "scores.csv").read_text().splitlines()[1:] == [
        "CMAE,0,abcdef0,float32,1,2,3,4,,7", "MAE,0,,,40,,,9,8,",
        "random weights,0,,float32,,,,,9,"]
    assert [file.name for file in weights.iterdir()] == ["cmae.pt"]
    assert sorted(path.name for path in out.iterdir()) == [
        "cmae-0", "knn.png", "rows.txt", "scores.csv"]


def test_load_model_reads_runs_checkpoints_and_half_precision(run, capsys):
    cfg = small("mvmae", seed=1)
    expected = build(cfg).encoder.state_dict()
    state = torch.load(run / "last.pt", weights_only=True)
    half = {name: value.half() for name, value in state["model"].items()}
    config = {**state["config"], "bygone": 3}
    del config["tau"]
    torch.save({"method": "mvmae", "config": config, "model": half}, run / "mvmae.pt")
    for file, tolerance in ((run, 0), (run / "last.pt", 0), (run / "mvmae.pt", 1e-3)):
        model, loaded = eval_linear.load_model(file)
        assert loaded == cfg and next(model.parameters()).dtype == torch.float32
        for name, value in model.encoder.state_dict().items():
            assert torch.allclose(value, expected[name], atol=tolerance), name
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "bygone" in said[0]  # tau took its default
    own, other = (eval_linear.load_model(run, trained=False, seed=seed)[0].encoder.state_dict()
                  for seed in (None, 2))
    assert torch.equal(own["cls_token"], expected["cls_token"])
    assert not torch.equal(other["cls_token"], expected["cls_token"])


def test_evaluation_writes_what_it_finds(run, shapes, capsys):
    eval_linear.main([str(run / "last.pt"), "--no-amp", "--baselines", "--data", "a/b"])
    said = capsys.readouterr().out
    report = json.loads((run / "eval_linear-last-b.json").read_text())
    assert (run / "confusion-last-b.png").exists() and "40 test images among 80 training" in said
    assert set(report["percent"]) == {"trained encoder", "untrained encoder", "raw pixels"}
    row, pixels = (report["percent"][name] for name in ("trained encoder", "raw pixels"))
    probes = {f"{kind}_top{k}" for kind in ("linear", "attentive") for k in (1, 5)}
    assert set(row) == {"knn_top1", *probes} and "attentive_top1" not in pixels
    model, cfg = eval_linear.load_model(run)
    x, y = (common.extract_features(model.encoder, part, 16, CPU, False) for part in shapes)
    assert row["knn_top1"] == pytest.approx(
        100 * common.knn_accuracy(x, shapes[0].labels, y, shapes[1].labels), abs=0.01)
    assert report["effective_rank"]["trained encoder"] == pytest.approx(
        common.effective_rank(x), abs=0.01)
    scores = eval_linear.linear_probe(x, shapes[0].labels, y, 10, cfg.seed)
    top1 = eval_linear.accuracy(scores, shapes[1].labels)
    assert row["linear_top1"] == pytest.approx(top1, abs=0.01)
    assert f"linear top1 {row['linear_top1']} %" in said and "batch" not in report


def test_below_six_classes_there_is_no_top_5(run, shapes):
    for part in shapes:
        part.classes, part.labels = ("a", "b", "c"), part.labels % 3
    eval_linear.main([str(run), "--no-attentive"])
    report = json.loads((run / "eval_linear.json").read_text())
    assert set(report["percent"]["trained encoder"]) == {"knn_top1", "linear_top1"}


@pytest.mark.parametrize("kind", ["no labels", "no test images", "one class"])
def test_without_labels_there_is_the_effective_rank(run, shapes, kind, monkeypatch, capsys):
    train, test = shapes
    if kind == "no labels":
        train.labels = torch.full_like(train.labels, -1)
    elif kind == "one class":
        train.classes = test.classes = ("a",)
    parts = (train, None if kind == "no test images" else test)
    monkeypatch.setattr(eval_linear, "load_data", lambda cfg: parts)
    eval_linear.main([str(run)])
    said, report = capsys.readouterr().out, json.loads((run / "eval_linear.json").read_text())
    assert "need labelled" in said and report["percent"] == {"trained encoder": {}}
    assert report["effective_rank"]["trained encoder"] > 1


def test_unlabelled_images_are_left_out(shapes):
    shapes[0].labels[::2] = -1
    assert len(eval_linear.labelled(shapes[0])) == 40
    assert eval_linear.labelled(shapes[1]) is shapes[1]  # not a copy


def test_raw_pixels_are_the_crop_between_0_and_1():
    x = Images(torch.randint(256, (2, 3, 64, 64)).byte())
    rows = common.extract_features(eval_linear.RawPixels(), x, 64, CPU, False)
    plain = F.interpolate(x.pixels / 255, (32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(rows, plain.flatten(1), atol=1e-5)


# Fine-tuning

def test_labels_are_a_fixed_choice_of_each_class():
    labels = torch.cat([torch.arange(1000) % 3, torch.full((50,), -1), torch.full((4,), 3)])
    chosen = eval_finetune.choose_labels(labels, 0.1, 0)
    assert labels[chosen].bincount().tolist() == [33, 33, 33, 1] == labels[
        eval_finetune.choose_labels(labels, 0.1, 1)].bincount().tolist()
    assert torch.equal(chosen, eval_finetune.choose_labels(labels, 0.1, 0))
    assert not torch.equal(chosen, eval_finetune.choose_labels(labels, 0.1, 1))
    whole = eval_finetune.choose_labels(labels, 1.0, 0)
    assert torch.equal(whole, (labels >= 0).nonzero()[:, 0])


def test_learning_rates_fall_from_layer_to_layer():
    model = eval_finetune.Classifier(build(small("mvmae")).encoder, 48, 10, 0.0)
    groups = eval_finetune.layer_groups(model, 0.3, 0.5)
    found = {p: (group["scale"], group["weight_decay"]) for group in groups
             for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    for name, p in model.named_parameters():
        layer = int(name.split(".")[2]) + 1 if "blocks" in name else 3
        layer = 0 if "embed" in name or "token" in name else layer
        plain = p.ndim < 2 or "token" in name
        assert found[p] == (0.5 ** (3 - layer), 0 if plain else 0.3), name
    assert groups[0]["scale"] == 1


def test_stochastic_depth_rises_and_every_weight_is_trained():
    model = eval_finetune.Classifier(build(small("mvmae", depth=3)).encoder, 48, 10, 0.6)
    branches = {}
    for i, block in enumerate(model.encoder.blocks):
        for name in ("attn", "mlp"):  # called after the model's own hook
            getattr(block, name).register_forward_hook(
                lambda module, _, out, key=(i, name): branches.update({key: out}))
    x = normal(1, 3, 16, 16).expand(300, -1, -1, -1)
    with torch.no_grad():
        model.head.weight.normal_()
    model(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    for (i, name), out in branches.items():
        dropped = (out == 0).flatten(1).all(1).double().mean().item()
        assert dropped == pytest.approx(0.3 * i, abs=0.1), (i, name)
    plain = model.head(build(small("mvmae", depth=3)).encoder.features(x[:2]))
    assert torch.allclose(model.eval()(x[:2]), plain, atol=1e-5)


def steps(images, **changes):
    off = {"rand_prob": 0.0, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "crop_min": 1.0,
           "batch": 40}
    cfg = replace(eval_finetune.Config(), **{**off, **changes})
    return eval_finetune.Steps(common.Batches(images, cfg.batch, 0, CPU), cfg, 16)


def test_augmentation_does_what_the_flags_say(shapes):
    images = shapes[0]
    plain, targets = steps(images)[1]
    labels = images.labels[common.Batches(images, 40, 0, CPU).ids(1)]
    assert torch.equal(targets, F.one_hot(labels, 10).float()) and plain.shape == (40, 3, 16, 16)
    again = steps(images)[1][0]
    assert torch.equal(plain, again) and not torch.equal(plain, steps(images)[0][0])

    def changed(**flags):
        return (steps(images, **flags)[1][0] - plain).abs().flatten(1).amax(1) > 0.02

    assert 0.3 < changed(rand_prob=0.3).double().mean() < 0.6
    assert 0.1 < changed(erase=0.25).double().mean() < 0.5
    mixed, soft = steps(images, mixup=0.8)[1]
    lam = soft.gather(1, labels[:, None])[0].clamp(max=1)
    assert labels[0] != labels[-1]
    assert torch.allclose(mixed[0], lam * plain[0] + (1 - lam) * plain[-1], atol=1e-5)
    assert torch.allclose(soft.sum(1), torch.ones(40)) and (soft.amax(1) < 1).any()
    cut, soft = steps(images, cutmix=1.0)[1]
    same = (cut == plain).all(1).double().mean((1, 2))
    own = labels != labels.roll(1)
    assert torch.allclose(same[own], soft.gather(1, labels[:, None])[own, 0].double(), atol=0.01)


def test_recipes_are_the_published_ones():
    mae = eval_finetune.Config()
    published = {"rand_magnitude": 9, "rand_prob": 0.5, "mixup": 0.8, "cutmix": 1.0,
                 "erase": 0.25, "smoothing": 0.1, "drop_path": 0.1, "lr": 5e-4,
                 "layer_decay": 0.65, "wd": 0.05, "warmup": 5, "epochs": 100, "batch": 1024}
    assert {name: getattr(mae, name) for name in published} == published
    mvmae = replace(mae, **eval_finetune.RECIPES["mvmae"])
    assert (mvmae.epochs, mvmae.batch, mvmae.mixup, mvmae.cutmix) == (100, 512, 0.8, 1.0)


def tune(run, out, *flags):
    eval_finetune.main([str(run), "--out", str(out), "--recipe", "plain", "--batch", "20",
                        "--epochs", "3", "--log-every", "1", *flags])
    return torch.load(out / "encoder.pt", weights_only=True)


def test_a_flag_overrides_its_recipe_and_the_report_says_so(run, shapes, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(
        [group["lr"] / group["scale"] for group in optimizer.param_groups]))
    tune(run, tmp_path / "out", "--labels", "0.5", "--workers", "0", "--erase", "0.1")
    hook.remove()
    assert len(rates) == 6 and len(rates[0]) > 1
    for i, found in enumerate(rates):
        expected = mvmae.cosine_lr(i, 6, 1, 2e-3 * 20 / 256)
        assert found == pytest.approx([expected] * len(found))
    report = json.loads((tmp_path / "out" / "eval_finetune.json").read_text())
    assert (report["batch"], report["erase"], report["lr"]) == (20, 0.1, 2e-3)
    assert report["labels"] == 0.5 and report["warmup"] == pytest.approx(0.6)
    model = eval_finetune.Classifier(build(small("mvmae")).encoder, 48, 10, 0.0)
    common.load_checkpoint(tmp_path / "out", model=model)
    scores = common.extract_features(model.eval(), shapes[1], 16, CPU)
    assert report["percent"]["top1"] == eval_linear.accuracy(scores, shapes[1].labels)
    assert (tmp_path / "out" / "confusion.png").exists()


def test_a_resumed_fine_tuning_ends_in_the_same_weights(run, shapes, tmp_path, monkeypatch):
    """With workers, a recipe that uses all random numbers, and Ctrl-C in the first epoch."""
    flags = "--rand-prob 0.5 --mixup 0.8 --cutmix 1 --erase 0.5 --drop-path 0.5".split()
    whole = tune(run, tmp_path / "whole", *flags, "--workers", "0")
    with monkeypatch.context() as patch:
        log = common.Run.log

        def interrupt_and_log(self, step, losses):
            if step == 1:
                workers = multiprocessing.active_children()
                assert len(workers) == 2  # a signal to this group does not reach them
                assert all(os.getpgid(worker.pid) != os.getpgrp() for worker in workers)
                os.kill(os.getpid(), signal.SIGINT)
            log(self, step, losses)

        patch.setattr(common.Run, "log", interrupt_and_log)
        with pytest.raises(SystemExit) as ended:
            tune(run, tmp_path / "killed", *flags, "--workers", "2")
    assert ended.value.code == 130
    eval_finetune.main(["--resume", str(tmp_path / "killed")])
    weights = torch.load(tmp_path / "killed" / "encoder.pt", weights_only=True)
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    first = build(small("mvmae", seed=1)).encoder.state_dict()
    assert not torch.equal(whole["norm.weight"], first["norm.weight"])


@pytest.mark.parametrize("scratch", [False, True])
def test_fine_tuning_starts_from_the_run_or_from_random_weights(run, shapes, tmp_path, scratch):
    still = ["--lr", "1e-9", "--wd", "0", "--seed", "7", "--epochs", "1", "--workers", "0"]
    found = tune(run, tmp_path / "out", *still, *(["--scratch"] if scratch else []))
    first = build(small("mvmae", seed=7 if scratch else 1)).encoder.state_dict()
    assert all(torch.allclose(found[name], first[name], atol=1e-6) for name in first)
