"""Tests of what is done with a finished run: linear probe, fine-tuning, pictures."""
import csv, inspect, json, math, os, re, shlex
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

import common, eval_finetune, eval_linear, eval_speed, images, mclim, pictures, show
from test_papers import BACKBONES
from test_smoke import (HERE, METHODS, MODULES, SMALL, build, every_method, few, folder, killed_and_resumed, metrics,
                        normal, torchrun)  # few and folder are fixtures


def test_linear_probe_separates_what_is_separable():
    labels = torch.arange(2000) % 3
    features = F.one_hot(labels, 5) * 0.5 + 0.02 * normal(2000, 5) + torch.tensor([0, 0, 0, 50.0, 0])
    scores = eval_linear.linear_probe(features, labels, features, 3)
    assert eval_linear.top(scores, labels, 1) == 100 and eval_linear.top(-scores, labels, 1) == 0


@every_method
def test_speed_is_told(method, monkeypatch, capsys):
    monkeypatch.setattr(eval_speed, "rate", lambda step, device: (step(), 2.0)[1])
    assert eval_speed.main([method, "--tiny", *"--img 16 --dim 48 --depth 2 --batch 4 --device cpu".split()]) == 0
    told = capsys.readouterr().out
    assert told.count("views") == 2 and "bfloat16" in told and "8.0 images/s" in told
    assert ("one view" in told) == (method != "mclim")


def test_confusion_matrix_is_of_the_true_class(tmp_path, monkeypatch):
    truth, guess, shown = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 2, 1, 0]), []
    imshow = pictures.plt.Axes.imshow
    monkeypatch.setattr(pictures.plt.Axes, "imshow", lambda axis, a, **kw: shown.append(a) or imshow(axis, a, **kw))
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
    assert (images.RANDAUGMENT[name](x, S) - expected).abs().max() < 5e-3


def test_translations_of_randaugment_move_by_a_share_of_the_side():
    x = torch.rand(4, 3, 331, 331)
    for name, dim in (("translate x", 3), ("translate y", 2)):
        moved = images.RANDAUGMENT[name](x, torch.tensor([0.2, -0.2, 0.1, 0.0]))            # by 30, -30, 15, 0 pixels
        for before, after, n in zip(x, moved, (30, -30, 15, 0)):
            kept = slice(n, None) if n >= 0 else slice(None, n)
            gone = slice(None, -n or None) if n >= 0 else slice(-n, None)
            a, b = (image.movedim(dim - 1, 0) for image in (before, after))
            assert torch.allclose(a[kept], b[gone], atol=1e-3)


def test_strength_of_randaugment_is_of_30():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16).expand(300, -1, -1, -1)
    bright = [out for out in images.rand_augment(x, 1, 10) if torch.allclose(out, (x[0] * 1.3).clamp(max=1), atol=1e-5)]
    assert 2 <= len(bright) <= 25                                                           # 1 of 14, and of two signs


def test_randaugment_draws_operations_for_each_image():
    torch.manual_seed(0)
    same = torch.rand(1, 3, 16, 16).expand(600, -1, -1, -1)
    assert torch.equal(images.rand_augment(same, 0), same)
    one = images.rand_augment(same, 1, 9)
    kinds = one.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(kinds) == 1 + 9 * 2 + 4  # identity; nine with a sign; posterize, solarize, autocontrast, equalize
    assert len(images.rand_augment(same, 2, 9).flatten(1).unique(dim=0)) > 60


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
    first = branches[0, "mlp"][0]                                                           # never dropped: all alike
    assert torch.allclose(first, first[:1].expand_as(first), atol=1e-6)
    assert torch.allclose(attn[kept] * 0.7, whole.expand(int(kept.sum()), -1, -1), atol=1e-5)


def test_mixup_blends_images_and_targets_alike():
    torch.manual_seed(0)
    x, y = torch.rand(1000, 3, 2, 2), F.one_hot(torch.arange(1000) % 2, 2).float()          # the reverse: other classes
    mixed, targets = eval_finetune.mixup(x, y, 0.6, 0.8)
    share = (targets * y).sum(1)                                                            # λ
    assert torch.allclose(targets.sum(1), torch.ones(1000))
    lam = share[:, None, None, None]
    assert torch.allclose(mixed, lam * x + (1 - lam) * x.flip(0), atol=1e-6)
    whole = share == 1
    assert whole.double().mean().item() == pytest.approx(0.4, abs=0.06)
    assert share[~whole].var().item() == pytest.approx(0.25 / (2 * 0.8 + 1), abs=0.02)      # of Beta(0.8, 0.8)
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

@pytest.fixture
def pretrained(few, tmp_path, monkeypatch):
    """A run of each method on 32 shapes; fine-tuning sees 40 shapes of the first four classes, and tests on 32."""
    x, y = common.load_images("shapes", "train", 16)
    x, y = x[y < 4], y[y < 4]
    parts = {"train": (x[:40], y[:40]), "test": (x[-32:], y[-32:])}
    monkeypatch.setattr(eval_finetune, "load_images", lambda data, split, *_: parts[split])
    made = {}

    def run(method):
        if method not in made:
            made[method] = MODULES[method].train(replace(SMALL[method], epochs=1, warmup=0, data="shapes",
                                                         out=str(tmp_path / method)))
        return str(made[method])
    return run


def settings(run, out, **change):
    usual = {"run": run, "out": str(out), "batch": 8, "epochs": 3, "log_every": 1}
    return replace(eval_finetune.TINY, **{**usual, **change})


@every_method
def test_fine_tuning_writes_what_it_found(pretrained, tmp_path, method, capsys):
    out = eval_finetune.train(settings(pretrained(method), tmp_path / "run", test_every=2, mixup=0.5, drop_path=0.3))
    names = "config.json metrics.csv curves.png last.pt previous.pt encoder.pt eval_finetune.json confusion.png".split()
    assert {f.name for f in out.iterdir()} == set(names)
    report, told = json.loads((out / "eval_finetune.json").read_text()), capsys.readouterr().out
    assert f"{method}.py" in report["network"] and "pre-trained" in report["network"] and report["network"] in told
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [row["step"] for row in rows if row["loss"]] == [str(i) for i in range(1, 16)]
    tests = [row for row in rows if row["test top 1"]]
    assert [row["epoch"] for row in tests] == ["2", "3"]
    model = eval_finetune.Classifier(build(SMALL[method]).encoder, 10, 0.0)
    common.load_checkpoint(out, "eval_finetune", model=model)
    with torch.no_grad(), common.autocast(torch.device("cpu")):
        scores = model(common.normalize(eval_finetune.load_images("shapes", "test")[0] / 255))
    truth = eval_finetune.load_images("shapes", "test")[1]
    right = 100 * (scores.argmax(1) == truth).double().mean().item()
    assert report["percent"]["top1"] == float(tests[-1]["test top 1"]) == pytest.approx(right, abs=0.01)
    among = 100 * (scores.topk(5).indices == truth[:, None]).any(1).double().mean().item()
    assert report["percent"]["top5"] == pytest.approx(among, abs=0.01)
    assert "next:" not in told.split("done after")[-1]


def test_fine_tuning_begins_at_the_run_or_at_random_weights(pretrained, tmp_path):
    run, still = pretrained("mvmae"), {"lr": 1e-9, "wd": 0.0, "seed": 7}
    for scratch in (False, True):
        out = eval_finetune.train(settings(run, tmp_path / str(scratch), scratch=scratch, **still))
        encoder = torch.load(out / "encoder.pt", weights_only=True)
        first = build(replace(SMALL["mvmae"], seed=7)) if scratch else eval_linear.load_model(run)[0]
        for name, value in first.encoder.state_dict().items():
            assert torch.allclose(encoder[name], value, atol=1e-6), name
        assert ("random weights" in json.loads((out / "eval_finetune.json").read_text())["network"]) == scratch


def test_rates_of_the_layers_are_those_of_the_schedule(pretrained, tmp_path, monkeypatch):
    cfg, seen = settings(pretrained("mvmae"), tmp_path / "run", layer_decay=0.5, lr=1e-3, wd=0.3), []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(
        [(group["lr"], group["scale"], group["weight_decay"]) for group in self.param_groups]) or step(self))
    eval_finetune.train(cfg)
    assert len(seen) == 15
    for i, groups in enumerate(seen):
        rate = common.cosine_lr(i, 15, 5, 1e-3 * 8 / 256)
        assert all(lr == pytest.approx(rate * scale) for lr, scale, _ in groups)
        assert {scale for _, scale, _ in groups} == {1, 0.5, 0.25, 0.125} and {wd for *_, wd in groups} == {0, 0.3}


@pytest.mark.parametrize("labels, mixed", [(0.5, 0.0), (1.0, 1.0)])
def test_the_loop_of_fine_tuning(pretrained, tmp_path, labels, mixed, monkeypatch):
    """Its images keep their own labels, are mixed and smoothed, and the network is in training after a test, too."""
    x, y = eval_finetune.load_images("shapes", "train")
    monkeypatch.setattr(eval_finetune, "load_images", lambda *_: (y[:, None, None, None].expand_as(x).byte(), y))
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
    monkeypatch.setattr(eval_finetune, "views", lambda x, img, cfg: images_seen.append(x) or x / 255)
    eval_finetune.train(settings(pretrained("mclim"), tmp_path / "run", labels=labels, mixup=mixed, smoothing=0.2,
                                 drop_path=0.4, test_every=1, epochs=2, warmup=0))
    assert dropped == {0.0, 0.4} and len(seen) == 2 * (5 if labels == 1 else 2) and all(trains)
    assert seeds == [(0, step, 0) for step in range(len(seen))]
    for (_, targets), x, given in zip(seen, images_seen, fed):
        own = F.one_hot(x[:, 0, 0, 0].long(), 10).float()
        assert torch.equal(targets, own) == torch.equal(given, x / 255) == (mixed == 0)
        assert mixed == 0 or torch.equal((targets > 0).any(0), (own > 0).any(0))


def test_a_fine_tuning_goes_on_where_its_run_was_moved(pretrained, tmp_path):
    run = pretrained("mvmae")
    out = eval_finetune.train(settings(run, tmp_path / "tuned", test_every=0))
    os.rename(run, f"{run}-moved")
    assert eval_finetune.main(["--resume", str(out)]) == 2
    assert eval_finetune.main([f"{run}-moved", "--resume", str(out)]) == 0
    assert [row["epoch"] for row in metrics(out) if row["test top 1"]] == ["3"]


def test_a_resumed_fine_tuning_ends_in_the_same_weights(pretrained, tmp_path, monkeypatch):
    cfg = settings(pretrained("camae"), "", mixup=0.5, drop_path=0.5, labels=0.5)           # 20 images
    killed_and_resumed(eval_finetune, cfg, tmp_path, monkeypatch)
    reports = [json.loads((tmp_path / name / "eval_finetune.json").read_text()) for name in ("killed", "whole")]
    assert reports[0]["percent"] == reports[1]["percent"] and reports[0]["labelled images"] == 20


@pytest.mark.parametrize("command, words", [
    ("", ["RUN", "name the folder"]),
    ("{tmp}/nowhere", ["nowhere", "does not exist"]),
    ("{run} --labels 2", ["--labels", "2.0", "at most 1"]),
    ("{run} --rand-ops -1", ["--rand-ops", "-1", "at least 0"]),
    ("{run} --test-every -1", ["--test-every", "-1", "at least 0"]),
    ("{run} --mixup-alpha inf", ["--mixup-alpha", "inf", "above 0"]),
    ("{run} --smoothing 1", ["--smoothing", "1.0", "below 1"]),
    ("{run} --drop-path 1", ["--drop-path", "1.0", "below 1"]),
    ("{run} --crop-min 0", ["--crop-min", "0.0", "between 0 and 1"]),
    ("{run} --mixup 2", ["--mixup", "2.0", "0 to 1"]),
    ("{run} --layer-decay 0", ["--layer-decay", "0.0", "above 0"]),
    ("{run} --rand-magnitude 31", ["--rand-magnitude", "31.0", "30"]),
    ("{run} --warmup 100", ["--warmup", "100", "below --epochs 100"]),
    ("{run} --batch 99", ["--batch", "99", "only 40"]),
    ("{run} --batch 8 --out {run}", ["--out", "must be new or empty"]),
    ("{tmp}/missing/last.pt", ["missing/last.pt", "does not fit", "Missing", "encoder.norm.bias"]),
    ("{tmp}/left/last.pt", ["left/last.pt", "does not fit", "Unexpected", "encoder.more"]),
    ("{done}", ["is of eval_finetune.py"]),
    ("--resume {run}", ["is a run of mvmae.py"]),
    ("--resume {done} --lr 1", ["--lr", "1.0", "was started with"])])
def test_bad_input_of_fine_tuning_gets_one_line(pretrained, tmp_path, command, words, capsys):
    run = pretrained("mvmae")
    done = eval_finetune.train(settings(run, tmp_path / "done")) if "{done}" in command else ""
    for name in ("missing", "left"):
        state = torch.load(f"{run}/last.pt", weights_only=True)
        if name == "missing":
            del state["model"]["encoder.norm.bias"]
        else:
            state["model"]["encoder.more"] = torch.zeros(1)
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "last.pt")
    status = eval_finetune.main(shlex.split(command.format(run=run, done=done, tmp=tmp_path)))
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1 and line.startswith("eval_finetune.py: "), line
    assert all(word in line for word in words), line


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
    assert len(commands) > 8
    for run, flags in commands:
        assert parse(run + flags).run == run


def test_fine_tuning_learns_shapes(few, tmp_path):
    run = mclim.train(replace(SMALL["mclim"], epochs=1, warmup=0, data="shapes", out=str(tmp_path / "run")))
    cfg = replace(eval_finetune.TINY, run=str(run), epochs=8, lr=1e-2, rand_ops=0, out=str(tmp_path / "tuned"))
    report = json.loads((eval_finetune.train(cfg) / "eval_finetune.json").read_text())
    assert report["percent"]["top1"] > 40, report                                           # chance is 10


def test_torchrun_fine_tunes_and_one_process_writes(few, tmp_path):
    run = mclim.train(replace(SMALL["mclim"], epochs=1, warmup=0, data="shapes", out=str(tmp_path / "run")))
    answer = torchrun(HERE / "eval_finetune.py", run, "--tiny", "--labels", 0.1, "--epochs", 1, "--warmup", 0, "--out",
                      tmp_path / "tuned")
    assert answer.returncode == 0, answer.stderr
    assert [row["step"] for row in metrics(tmp_path / "tuned")] == ["3", "3"]               # of 2 · 64 images; the test
    assert answer.stdout.count("labelled images") == 1 and answer.stdout.count("of the test images right") == 1


# Pictures

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
