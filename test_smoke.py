"""The house's tests, the same for every method: blocks, augmentation, data, command line, runs on disk, processes.

The README's command runs these and all others, of images, weights, evaluation and each paper, on the CPU and without a
network, in minutes on two cores. SLOW=1 in the environment adds what takes long. No test sees a GPU, but for
`GPU=1 python -m pytest test_smoke.py -k gpu`.
"""
import csv, importlib, inspect, json, math, os, pathlib, re, shlex, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image

import camae, common, eval_linear, mclim, show

if "GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for one; it goes to the programs that tests start, too
HERE = pathlib.Path(__file__).parent
METHODS = {"mclim": range(1, 11), "mvmae": range(1, 8), "cmae": range(1, 7), "macrl": (),  # an abstract has none
           "camae": range(1, 7)}  # file → the equations of its paper
MODULES = {method: importlib.import_module(method) for method in METHODS}
SMALL = {method: replace(module.TINY, img=16, dim=48, depth=2, batch=16, knn_every=0, warmup=0.5)  # 16 patches of 4×4
         for method, module in MODULES.items()}
FLAGS = "--tiny --data shapes --img 16 --dim 48 --depth 2 --batch 250 --knn-every 0 --log-every 7".split()
every_method = pytest.mark.parametrize("method", METHODS)
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes long: SLOW=1 in the environment runs it, as CI does")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(cfg):
    """The model of a Config, from its seed."""
    torch.manual_seed(cfg.seed)
    return eval_linear.model_class(sys.modules[type(cfg).__module__])(cfg)


def run(*args, cwd=HERE, **options):
    """A real command line, on one thread, with no way to the network."""
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **nowhere, "PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, text=True, capture_output=True,
                          timeout=1800, **options)


# Blocks that the files share

def test_mask_counts_and_is_uniform():
    torch.manual_seed(0)
    mask = mclim.random_mask(4000, 25, 0.6)
    assert mask.dtype == torch.bool and mask.shape == (4000, 25)
    assert (mask.sum(1) == 15).all()  # 1 = masked, 0.6 of 25
    assert (mask.float().mean(0) - 0.6).abs().max() < 5 * math.sqrt(0.24 / 4000)
    assert not torch.equal(mask[0], mask[1])


def test_patchify_and_pixel_shuffle():
    x = normal(2, 3, 12, 12)
    patches = mclim.patchify(x, 4)
    assert patches.shape == (2, 9, 48)
    for n, c, i, j in [(0, 0, 0, 0), (5, 2, 3, 1), (7, 1, 0, 2)]:
        assert torch.equal(patches[:, n, c * 16 + i * 4 + j], x[:, c, n // 3 * 4 + i, n % 3 * 4 + j])
    assert torch.equal(mclim.unpatchify(patches, 4), x)
    Z = normal(2, 9, 48, seed=1)
    assert torch.equal(mclim.patchify(mclim.unpatchify(Z, 4), 4), Z)


def test_positions():
    table = mclim.sincos_pos_embed(16, 3)[0]
    for n in range(9):
        for half, place in ((0, n // 3), (8, n % 3)):
            for i in range(4):
                angle = place / 10000 ** (i / 4)
                assert table[n, half + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert table[n, half + 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_attention_is_softmax_of_queries_and_keys_by_values():
    torch.manual_seed(0)
    attention, x = mclim.Attention(12, 3), normal(2, 5, 12)
    q, k, v = attention.qkv(x).chunk(3, 2)
    heads = [torch.softmax(q[:, :, i:i + 4] @ k[:, :, i:i + 4].mT / 2, 2) @ v[:, :, i:i + 4] for i in (0, 4, 8)]
    assert torch.allclose(attention(x), attention.proj(torch.cat(heads, 2)), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert mclim.attend(*normal(3, 2, 3, 5, 4).bfloat16()).dtype == torch.float32  # on a CPU


def test_moving_average():
    average, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.9 * average.weight + 0.1 * model.weight
    mclim.ema(average, model, 0.9)
    assert torch.allclose(average.weight, expected) and not torch.equal(average.bias, model.bias)


# The model, as others rely on it

@every_method
def test_encoder_for_evaluation(method):
    model, x = build(SMALL[method]), normal(4, 3, 16, 16)
    features, tokens = model.encoder.features(x), model.encoder.tokens(x)
    assert features.shape == (4, 48) and features.dtype == torch.float32 and tokens.shape == (4, 16, 48)
    assert torch.equal(features, model.encoder.features(x)) and not torch.allclose(features[0], features[1])
    whole = model.encoder(x)  # with the class token first, where there is one
    assert torch.equal(tokens, whole[:, -16:])
    assert torch.allclose(features, whole[:, 0] if method == "camae" else tokens.mean(1), atol=1e-6)
    if method in ("cmae", "camae"):
        attention = model.encoder.attention(x)
        assert attention.shape == (4, 3, 16) and (attention > 0).all() and (attention.sum(2) < 1 + 1e-5).all()


@every_method
def test_reconstruction_shows_what_was_masked(method):
    model, x = build(SMALL[method]), normal(4, 3, 16, 16)
    masked, prediction = model.reconstruct(x)
    assert masked.shape == prediction.shape == x.shape
    visible = masked == x
    assert visible.float().mean() == 1 - round(model.cfg.mask * 16) / 16 and (masked[~visible] == 0).all()
    assert torch.allclose(prediction[visible], x[visible]) and not torch.allclose(prediction[~visible], x[~visible])


@every_method
def test_gradients_reach_what_is_trained_and_nothing_else(method):
    model = build(SMALL[method])
    with torch.no_grad():
        for p in model.parameters():  # a layer that begins at zero lets nothing through
            p.add_(0.01)
    model(normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))["loss"].backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0 if p.requires_grad else p.grad is None, name


@every_method
def test_vit_state_dict_has_timms_names(method):
    keys = set(build(SMALL[method]).encoder.state_dict())
    block = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()
    names = ["patch_embed.proj", "norm"] + [f"blocks.{i}.{part}" for i in range(2) for part in block]
    assert keys - {"cls_token"} == {"pos_embed"} | {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


@every_method
def test_tiny_model_overfits_one_batch(method):
    own = {"macrl": {"bank": 0, "keys": "shared"},  # its bank would hold the batch, and its keys stand still here
           "mclim": {"lam": 10.0}}  # or DCL, which may fall to -4.9 with four images, leaves the rest little
    model = build(replace(SMALL[method], **own.get(method, {})))
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = [[torch.sin(0.2 * i * x + c) + torch.cos(0.25 * (5 - i) * y + c) for c in range(3)] for i in range(1, 5)]
    view = torch.stack([torch.stack(wave) for wave in waves])                              # (4, 3, 16, 16)
    optimizer = torch.optim.AdamW(common.param_groups(model, 0.0), lr=3e-3)
    history = []
    for _ in range(80):
        losses = model(view, view.flip(3))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    mean = {name: sum(row[name] for row in history[-10:]) / 10 for name in history[0]}
    assert mean["reconstruction"] < 0.9 * history[0]["reconstruction"] and mean["loss"] < 0.8 * history[0]["loss"], mean


@every_method
def test_views_are_normalised_and_differ(method):
    cfg = replace(SMALL[method], img=24)
    batch = (255 * torch.rand(6, 3, 16, 16)).byte()
    view1, view2 = MODULES[method].views(batch, cfg)
    assert view1.shape == view2.shape == (6, 3, 24, 24) and view1.dtype == view2.dtype == torch.float32
    assert not torch.equal(view1, view2) and common.denormalize(view1).std() < 0.5 < view1.std()


# Schedule, groups, runs

def test_load_data_takes_a_fixed_choice_at_eight_sevenths_of_the_views(monkeypatch):
    def load_images(data, split, side, *_):
        return torch.arange(99)[:, None, None, None].expand(99, 3, side, side), torch.arange(99) % 5, torch.ones(99)

    monkeypatch.setattr(common, "load_images", lambda *args: load_images(*args) if args[1] == "train" else None)
    cfg = replace(mclim.TINY, img=28, data="shapes", images=40)
    (images, labels, aspect), test = common.load_data(cfg)
    assert test is None and images.shape == (40, 3, 32, 32) and len(aspect) == 40
    assert torch.equal(images[:, 0, 0, 0], common.fixed_choice(99, 40)) and torch.equal(images[:, 0, 0, 0] % 5, labels)
    assert common.load_data(replace(cfg, store=16, images=0))[0][0].shape == (99, 3, 16, 16)
    with pytest.raises(common.UserError, match="--images 100: there are only 99"):
        common.load_data(replace(cfg, images=100))


def test_schedule():
    rates = [common.cosine_lr(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)
    cfg = replace(mclim.TINY, epochs=8, warmup=0.5)
    assert common.schedule(cfg, 39) == (312, 20) and common.schedule(replace(cfg, warmup=3.0), 1) == (8, 3)
    assert common.schedule(replace(cfg, steps=50), 39) == (50, 10)                         # a fifth at most
    assert common.schedule(replace(cfg, steps=500), 39) == (500, 20)


@every_method
def test_an_untyped_warm_up_is_at_most_a_fifth(method):
    def warmup(text):
        cfg = common.command_line(method, MODULES[method].Config, MODULES[method].TINY, text.split())
        return cfg.warmup

    assert warmup("") == MODULES[method].Config.warmup and warmup("--epochs 10") == 2
    assert warmup("--tiny --epochs 1") == 0.2 and warmup("--epochs 4 --warmup 3.5") == 3.5
    assert warmup("--epochs 200") == MODULES[method].Config.warmup  # 40 in all but mclim.py


@every_method
def test_param_groups(method):
    model = build(SMALL[method])
    decay, rest = ({id(p) for p in group["params"]} for group in common.param_groups(model, 0.3))
    for name, p in model.named_parameters():
        plain = name.endswith("bias") or "norm" in name or "token" in name or "pos" in name
        assert (id(p) in rest) == (p.requires_grad and plain), name
        assert (id(p) in decay) == (p.requires_grad and not plain), name
    assert [group["weight_decay"] for group in common.param_groups(model, 0.3)] == [0.3, 0.0]


@pytest.fixture
def few(monkeypatch):
    """32 shapes instead of 5,000, and no pictures, so that SMALL trains in a second."""
    data = [part[:32] for part in common.load_images("shapes", "train", 16)]
    for module in MODULES.values():
        monkeypatch.setattr(module, "load_data", lambda cfg: (data, data))
    monkeypatch.setattr(common, "draw_curves", lambda *_: None)
    monkeypatch.setattr(common, "draw_images", lambda *_: None)


def weights(folder):
    state = common.load_checkpoint(folder)
    return {**state["model"], **{f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}}


def metrics(folder):
    rows = csv.DictReader(open(folder / "metrics.csv"))
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def killed_and_resumed(module, cfg, tmp_path, monkeypatch):
    """Asserts that a run which dies one step after its first epoch of two steps ends, resumed, like one that lives.
    Returns the folder of that."""
    save, threads = common.Run.save, torch.get_num_threads()

    def save_and_die(run, step, *args, **parts):
        save(run, step, *args, **parts)
        if step == 3:
            raise KeyboardInterrupt

    torch.set_num_threads(1)
    module.train(replace(cfg, out=str(tmp_path / "whole")))
    monkeypatch.setattr(common.Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        module.train(replace(cfg, out=str(tmp_path / "killed")))
    monkeypatch.setattr(common.Run, "save", save)
    assert module.main(["--resume", str(tmp_path / "killed")]) == 0
    torch.set_num_threads(threads)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    return tmp_path / "whole"


def assert_same_end(folder, whole):
    """Asserts that two runs have the same weights and metrics, and that neither has left part of a file."""
    ours, reference = weights(folder), weights(whole)
    assert ours.keys() == reference.keys() and all(torch.equal(ours[k], reference[k]) for k in ours)
    assert metrics(folder) == metrics(whole) and not list(folder.glob("*.part"))


@every_method
def test_a_run_its_folder_and_the_same_run_killed_after_its_first_epoch(few, tmp_path, capfd, method, monkeypatch):
    own = {"cmae": {"crop_from": 0, "crop_every": 2, "k": 0.5},  # boxes of epoch 0 serve in epoch 1
           "macrl": {"bank": 40}}  # of keys of two steps and a half
    cfg = replace(SMALL[method], epochs=3, knn_every=2, log_every=1, data="shapes", **own.get(method, {}))
    out = killed_and_resumed(MODULES[method], cfg, tmp_path, monkeypatch)
    assert {f.name for f in out.iterdir()} == set("config.json metrics.csv last.pt previous.pt encoder.pt".split())
    facts = json.loads((out / "config.json").read_text())
    assert set(facts["config"]) == {f.name for f in fields(cfg)} and facts["torch"] == torch.__version__
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in rows if row["knn"]] == [row["step"] for row in rows if row["rank"]] == ["4"]
    assert {"reconstruction", "contrast", "images_per_second", "lr"} < set(rows[0])
    model, _ = eval_linear.load_model(out)
    encoder = torch.load(out / "encoder.pt", weights_only=True)
    assert all(torch.equal(value, encoder[name]) for name, value in model.encoder.state_dict().items())
    said = capfd.readouterr().out
    size = sum(p.numel() for p in model.parameters()) / 1e6
    first = said.splitlines()[1 if method == "cmae" and "boxes" in said.splitlines()[0] else 0]
    assert all(words in first for words in (method, "CPU", f"{size:.1f} M parameters", "32 images", "2 steps an epoch",
                                            str(out))), first
    assert f"eval_linear.py {out}" in said and f"show.py {out}" in said and "kNN top-1" in said


def test_rows_are_means_over_equally_many_steps_and_the_live_line_fits(tmp_path, capfd, monkeypatch):
    cfg = replace(SMALL["mclim"], epochs=2, log_every=4, out=str(tmp_path / "run"))
    run = common.Run("mclim", cfg, common.start_processes("cpu"), 10)
    run.resume(model=build(cfg))
    capfd.readouterr()
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for step in range(1, 21):
        run.log(step, {"loss": torch.tensor(float(step)), "contrast": torch.tensor(0.0)}, 0.1)
        if step == 1:
            assert "step 1  loss 1.0000" in capfd.readouterr().out                          # progress from the first on
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == ["4", "8", "10", "14", "18", "20"]
    assert [float(row["loss"]) for row in rows] == [2.5, 6.5, 9.5, 12.5, 16.5, 19.5]
    live = re.split(r"\r\x1b\[K", capfd.readouterr().out)[1:]
    assert len(live) == 6 and max(map(len, live)) == 49
    signal.raise_signal(signal.SIGINT)
    assert "stopping after this step" in capfd.readouterr().err
    run.log(21, {"loss": torch.tensor(0.0), "contrast": torch.tensor(0.0)}, 0.1)
    assert run.leaving
    monkeypatch.undo()
    run.finish()


def test_a_cpu_that_would_take_days_is_told_so_once(tmp_path, capfd, monkeypatch):
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(common.time, "time", lambda: next(clock))                           # minutes a step
    for tiny in (False, True):
        cfg = replace(SMALL["mclim"], epochs=1000, tiny=tiny, out=str(tmp_path / f"run-{tiny}"))
        run = common.Run("mclim", cfg, common.start_processes("cpu"), 10)
        run.resume(model=build(cfg))
        for step in range(1, 5):
            run.log(step, {"loss": torch.tensor(0.0)}, 0.1)
        assert capfd.readouterr().out.count("days on this CPU; --tiny") == (not tiny)
        run.finish()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError])  # the last: cuBLAS's
def test_out_of_gpu_memory_names_the_flag(capsys, kind):
    def train(cfg):
        raise kind(cfg.out)

    def answer(words):
        return common.launch("mclim", mclim.Config, mclim.TINY, train, ["--out", words])

    for words in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        assert answer(words) == 2 and "--batch" in capsys.readouterr().err
    with pytest.raises(kind):
        answer("CUDA error: an illegal memory access")


# Command lines

def test_help_is_printed_where_greek_letters_are_unknown():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    answer = subprocess.run([sys.executable, HERE / "mvmae.py", "--help"], env=env, capture_output=True, text=True)
    assert answer.returncode == 0 and "--lam" in answer.stdout, answer.stderr


@every_method
def test_flags_are_the_fields(method, capsys):
    module = MODULES[method]
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    text = capsys.readouterr().out
    packed = re.sub(r"\s", "", text)
    lines = re.findall(r"(?m)^    (\w+): .*?  # (.*)$", inspect.getsource(module.Config))
    assert [name for name, _ in lines] == [field.name for field in fields(module.Config)]
    for name, comment in lines:
        assert "--" + name.replace("_", "-") in text and re.sub(r"\s", "", comment) in packed, name
    for heading in ("method", "model", "optimisation", "run"):
        assert f"\n{heading}:\n" in text
    assert text[text.index("\nexamples:"):].count(f"{method}.py") == 2
    differ = [name for name, value in vars(module.TINY).items() if value != getattr(module.Config, name)]
    assert packed.count(",tiny:") == len(differ) - 1  # --tiny itself has none
    assert f"(default:{module.Config.epochs},tiny:{module.TINY.epochs})" in packed

    def parse(text):
        return common.command_line(method, module.Config, module.TINY, text.split())

    assert parse("") == module.Config()
    assert parse("--tiny") == module.TINY
    assert parse("--depth 6 --tiny --no-amp") == replace(module.TINY, depth=6, amp=False)


@every_method
def test_every_command_of_readme_and_pages_is_understood(method):
    texts = [(HERE / "README.md").read_text(), MODULES[method].__doc__,
             *(page.read_text() for page in (HERE / "papers").glob("*.md"))]
    commands = re.findall(rf"{method}\.py ([^\n`|]*)", "\n".join(texts))
    commands = [shlex.split(re.split("&&|   ", command)[0]) for command in commands if "-" in command]
    assert len(commands) > 10
    for args in commands:
        if args and args[0].startswith("-") and not {"--resume", "--help"} & set(args):
            common.command_line(method, MODULES[method].Config, MODULES[method].TINY, args)


BAD = {  # of every method: command, after which one line on standard error holds these words, and the exit status is 2
    "flag": ("--nope 1", ["--nope"]),
    "choice": ("--device tpu", ["--device", "tpu", "cuda"]),
    "number": ("--lr fast", ["--lr", "fast", "float"]),
    "range": ("--lr -1", ["--lr", "-1", "above 0"]),
    "mask": ("--mask 1.5", ["--mask", "1.5", "between 0 and 1"]),
    "patch": ("--tiny --patch 5", ["--patch", "5", "must divide --img 32"]),
    "batch": ("--batch 1", ["--batch", "1", "at least 2"]),
    "temperature": ("--tau 0", ["--tau", "0", "above 0"]),
    "warm-up": ("--tiny --epochs 1 --warmup 1", ["--warmup", "1", "below --epochs 1"]),
    "seed": ("--seed 20261120220000", ["--seed", "below 2^32"]),
    "large batch": ("--tiny --data shapes --batch 9999", ["--batch", "9999", "5000"]),
    "mask not a number": ("--mask nan", ["--mask", "nan", "between 0 and 1"]),
    "no data": ("--data nowhere", ["--data", "nowhere", "train"]),
    "unset data": ("--data ''", ["--data", '""', "shapes"]),
    "empty data": ("--data {tmp}/empty", ["--data", "empty", "no images"]),
    "broken image": ("--data {tmp}/broken --root {tmp}/root", ["broken/train/ant/1.png"]),
    "strange class": ("--tiny --data {tmp}/strange --root {tmp}/root", ["--data", "cat", "no class of train/"]),
    "download": ("--data cifar10 --root {tmp}/root", ["--data", "cifar10", "network", "shapes"]),
    "out": ("--tiny --data shapes --out {tmp}/broken", ["--out", "broken", "--resume"]),
    "no run": ("--resume {tmp}/empty", ["--resume", "empty", "config.json"]),
    "no checkpoint": ("--resume {tmp}/unsaved", ["unsaved", "nothing has been saved"]),
    "truncated": ("--resume {tmp}/truncated", ["truncated/last.pt: is damaged", "truncated/previous.pt, the one"]),
    "not ours": ("--resume {tmp}/alien", ["alien/last.pt", "not a last.pt"]),
    "other method": ("--resume {tmp}/other", ["other", "is a run of mae.py"]),
    "broken config": ("--resume {tmp}/brokenconfig", ["brokenconfig", "config.json is broken"]),
    "edited config": ("--resume {tmp}/edited", ["edited", "config.json is broken", "processes"]),
    "older config": ("--resume {tmp}/older", ["older", "another", "'tau'"]),
    "other shapes": ("--resume {tmp}/shapes", ["shapes/last.pt", "does not fit", "blocks.2"]),
    "changed": ("--resume {tmp}/unsaved --batch 99", ["--batch", "99", "250"]),
}
BAD_OWN = {
    "mclim": {"choice": ("--backbone resnet", ["--backbone", "resnet", "vit"]),
              "no mask": ("--mask 0", ["--mask", "0", "--lam 0"])},
    "mvmae": {"one view": ("--targets one", ["--targets", "one", "--lam 0"]),
              "no mask": ("--mask 0.001", ["--mask", "0.001", "196"]),
              "width": ("--decoder-dim 100", ["--decoder-dim", "100", "--decoder-heads 16"])},
    "cmae": {"choice": ("--decoder lstm", ["--decoder", "lstm", "hybrid-conv"]),
             "weights": ("--lam-ctr 0 --lam-loc 0 --lam-con 0", ["--lam-ctr", "not all 0"]),
             "threshold": ("--k 1.1", ["--k", "1.1", "between 0 and 1"])},
    "macrl": {"choice": ("--keys frozen", ["--keys", "frozen", "shared"]),
              "ratios": ("--mask 0.3", ["--mask-w", "0.5", "--mask 0.3"]),
              "no mask": ("--mask-w 0.001", ["--mask-w", "0.001", "--pixels"]),
              "momentum": ("--momentum 2", ["--momentum", "2.0", "between 0 and 1"]),
              "crop": ("--crop-min-w 0", ["--crop-min-w", "0.0", "above 0"]),
              "large crop": ("--crop-min-s 2", ["--crop-min-s", "2.0", "between 0 and 1"]),
              "chance": ("--gray-w 2", ["--gray-w", "2.0", "between 0 and 1"]),
              "width": ("--out-dim 0", ["--out-dim", "0", "at least 1"]),
              "weights": ("--lam-c 0 --lam-r 0", ["--lam-c", "--lam-r", "nothing to learn"]),
              "bank": ("--bank -1", ["--bank", "-1", "at least 0"])},
    "camae": {"choice": ("--mask-by noise", ["--mask-by", "noise", "plb"]),
              "weight": ("--lam 1.5", ["--lam", "1.5", "between 0 and 1"]),
              "width": ("--hidden 0", ["--hidden", "0", "at least 1"])},
}


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """A folder for each method: data sets and runs that are broken in the ways that BAD names."""
    folders = {}
    for method, module in MODULES.items():
        folders[method] = tmp = tmp_path_factory.mktemp(method)
        (tmp / "empty" / "train" / "ant").mkdir(parents=True)
        for name in ("broken", "strange"):
            for split in ("train", "test"):
                (tmp / name / split / "ant").mkdir(parents=True)
                for i in range(2):
                    Image.new("RGB", (32, 32)).save(tmp / name / split / "ant" / f"{i}.png")
        (tmp / "broken" / "train" / "ant" / "1.png").write_bytes(b"no image")
        os.replace(tmp / "strange" / "test" / "ant", tmp / "strange" / "test" / "cat")
        cfg = common.command_line(method, module.Config, module.TINY, FLAGS)
        model = build(cfg)
        optimizer = torch.optim.AdamW(common.param_groups(model, 0.1))
        for name in ("unsaved", "truncated", "alien", "other", "shapes", "brokenconfig", "edited", "older"):
            (tmp / name).mkdir()
            held = dict(vars(replace(cfg, depth=3) if name == "shapes" else cfg))
            facts = {"method": "mae" if name == "other" else method, "config": held, "processes": 1}
            if name in ("older", "edited"):
                del (held if name == "older" else facts)["tau" if name == "older" else "processes"]
            (tmp / name / "config.json").write_text(json.dumps(facts)[:50 if name == "brokenconfig" else None])
            if name in ("truncated", "shapes"):
                common.save_checkpoint(tmp / name / "last.pt", method, cfg, 1, model=model, optimizer=optimizer)
        whole = (tmp / "truncated" / "last.pt").rename(tmp / "truncated" / "previous.pt").read_bytes()
        (tmp / "truncated" / "last.pt").write_bytes(whole[:5000])
        torch.save(model.encoder.state_dict(), tmp / "alien" / "last.pt")
    return folders


@pytest.mark.parametrize("method, name", [(m, name) for m in METHODS for name in {**BAD, **BAD_OWN[m]}])
def test_bad_input_gets_one_line(stage, method, name, monkeypatch, capsys):
    command, words = {**BAD, **BAD_OWN[method]}[name]
    monkeypatch.chdir(stage[method])
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    status = MODULES[method].main(shlex.split(command.format(tmp=stage[method])))
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1 and line.startswith(f"{method}.py: "), line
    assert all(word in line for word in words), line


def test_a_program_ends_with_one_line_and_status_2(stage, capsys):
    answer = run(HERE / "mclim.py", "--mask", "2")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "mclim.py: --mask 2.0" in answer.stderr
    for program in (eval_linear, show):
        assert program.main([str(stage["mclim"] / "truncated")]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"{program.__name__}.py: checkpoint" in line and "damaged" in line, line


def test_cuda_where_there_is_none_gets_one_line(capsys):
    assert mclim.main(["--device", "cuda"]) == 2 and "--device cuda" in capsys.readouterr().err


def test_a_loss_that_blows_up_is_told_with_status_1(tmp_path, capsys):
    status = mclim.main([*FLAGS, "--warmup", "0", "--lr", "1e38", "--out", str(tmp_path / "run"), "--no-amp"])
    line = capsys.readouterr().err
    assert status == 1 and line.count("\n") == 1, line
    assert all(word in line for word in ("step", "loss", "contrast", "there is no checkpoint yet"))


# Several processes

PAIR = """
import camae, gc, sys, torch, torch.distributed as dist, test_smoke
from torch.nn.parallel import DistributedDataParallel

def step(rank, method):
    test_smoke.share_masks(method, rank, 2)
    net = DistributedDataParallel(test_smoke.build(test_smoke.SMALL[method]))
    losses = net(*(view[6 * rank:][:6] for view in test_smoke.pair()))
    losses["loss"].backward()
    gradients = {n: p.grad for n, p in net.module.named_parameters() if p.grad is not None}
    if rank == 1:
        torch.save({"contrast": losses["contrast"].detach(), "gradients": gradients,
                    "buffers": dict(net.module.named_buffers())}, f"{sys.argv[1]}/{method}.pt")

dist.init_process_group("gloo")
for method in test_smoke.METHODS:
    step(dist.get_rank(), method)
    gc.collect()
plb, loss = camae.PLB(2), torch.tensor([[1.0 + dist.get_rank()]])
plb.note(torch.tensor([1]), camae.gather(loss).mean())
if dist.get_rank() == 1:
    torch.save(plb.sums, f"{sys.argv[1]}/plb.pt")
sys.exit(camae.main([*test_smoke.FLAGS, "--epochs", "1", "--out", f"{sys.argv[1]}/run"]))
"""


def pair():
    """Two views of 12 images, half of them for each of two processes."""
    return normal(12, 3, 16, 16), normal(12, 3, 16, 16, seed=1)


DRAW = mclim.random_mask


def share_masks(method, rank, world, patch=setattr):
    """Gives each of `world` processes its share of the masks that one alone would draw for all 12 images."""
    def random_mask(B, N, ratio, device=None):
        torch.manual_seed(3)
        return DRAW(B * world, N, ratio).unflatten(0, (-1, world, 12 // world))[:, rank].flatten(0, 1)

    patch(MODULES[method], "random_mask", random_mask)


def torchrun(*args):
    """Two processes of a script."""
    port = 20000 + time.time_ns() % 20000
    return run("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, *args)


def test_two_processes_equal_one_of_twice_the_batch_and_train(tmp_path, monkeypatch, capsys):
    (tmp_path / "pair.py").write_text(PAIR)
    answer = torchrun(tmp_path / "pair.py", tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("done after") == 1                                          # one process writes
    assert [row["step"] for row in metrics(tmp_path / "run") if row["loss"]] == ["7", "10"]
    assert camae.main(["--resume", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert "with 2 processes: " in line
    assert "-m torch.distributed.run --nproc-per-node 2 camae.py --resume" in line
    assert torch.load(tmp_path / "plb.pt", weights_only=True).tolist() == [0, 1.5]         # CAMAE's, the mean of both
    for method in METHODS:
        two = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        share_masks(method, 0, 1, monkeypatch.setattr)
        model = build(SMALL[method])
        losses = model(*pair())
        losses["loss"].backward()
        assert two["contrast"].item() == pytest.approx(losses["contrast"].item(), rel=1e-5)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == two["gradients"].keys()
        for name, gradient in gradients.items():
            assert (gradient - two["gradients"][name]).norm() <= 1e-4 * gradient.norm() + 1e-8, (method, name)
        for name, buffer in model.named_buffers():  # MACRL's bank among them
            assert torch.allclose(buffer, two["buffers"][name], atol=1e-6), (method, name)


LONE = """
import sys, torch.distributed as dist, common

def job():
    common.check(common.start_processes("cpu").rank == 0, "--out", "runs/held", "only one process knows this")
    dist.barrier()

dist.destroy_process_group = lambda: print("NCCL waits here for the other process", flush=True)
sys.exit(common.answer("lone.py", job))
"""


def test_a_process_that_fails_alone_ends_all(tmp_path):
    (tmp_path / "lone.py").write_text(LONE)
    answer = torchrun(tmp_path / "lone.py")
    assert answer.returncode != 0 and "lone.py: --out runs/held: only one process knows this\n" in answer.stderr
    assert "waits here" not in answer.stdout


# Learning

@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Starts `trained` before the first test, if a later one will ask for it: it runs beside the others."""
    if "SLOW" in os.environ and any("trained" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("trained")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Each method's training on shapes as a real process: method → its folder, and what becomes its answer."""
    tmp = tmp_path_factory.mktemp("trained")
    command = "--tiny --data shapes --depth 2 --dim 96 --batch 64 --lr 4e-3 --knn-every 0".split()
    own = {"mclim": "--epochs 3", "mvmae": "--epochs 3", "cmae": "--epochs 6", "macrl": "--epochs 3",
           "camae": "--epochs 3 --hidden 192 --jitter 0 --gray 0 --blur 0"}
    with ThreadPoolExecutor(1) as pool:
        yield {method: (tmp / method, pool.submit(run, HERE / f"{method}.py", *command, *own[method].split(), "--out",
                                                  tmp / method)) for method in METHODS}


@slow
@every_method
def test_training_on_shapes_beats_the_untrained_encoder(trained, method):
    out, job = trained[method]
    assert job.result().returncode == 0, job.result().stderr
    score = {}
    for learned in (False, True):
        model, cfg = eval_linear.load_model(out, learned)
        score[learned] = common.online_knn(model.encoder, *common.load_data(cfg), cfg, common.start_processes("cpu"))
    assert score[True] > score[False] + 0.03, score
    if method == "mclim":
        assert eval_linear.main([str(out), "--baselines", "--no-attentive"]) == 0
        report = json.loads((out / "eval_linear.json").read_text())["percent"]
        assert report["trained encoder"]["knn_top1"] == pytest.approx(100 * score[True], abs=1)
        assert report["untrained encoder"]["knn_top1"] == pytest.approx(100 * score[False], abs=1)
        assert set(report) == {"trained encoder", "untrained encoder", "raw pixels"}
        assert Image.open(out / "confusion.png").size == (800, 700)


@slow
@every_method
def test_compiled_training_repeats_the_plain_one(few, tmp_path, method):
    torch.compiler.reset()
    losses = {}
    for compile in (False, True):
        cfg = replace(SMALL[method], data="shapes", epochs=2, log_every=1, device="cpu", compile=compile)
        MODULES[method].train(replace(cfg, out=str(tmp_path / str(compile))))
        losses[compile] = [float(row["loss"]) for row in metrics(tmp_path / str(compile)) if row["loss"]]
    assert len(losses[True]) > 2 and losses[True] == pytest.approx(losses[False], rel=1e-3)


@pytest.mark.skipif("GPU" not in os.environ, reason="takes a CUDA GPU: GPU=1 in the environment runs it")
@pytest.mark.parametrize("own", [{}, {"compile": True}, {"recompute": True}], ids=str)
@every_method
def test_a_gpu_trains_like_the_cpu(few, tmp_path, method, own):
    torch.compiler.reset()
    losses = {}
    for device in ("cpu", "cuda"):
        cfg = replace(SMALL[method], data="shapes", epochs=2, log_every=1, device=device, out=str(tmp_path / device))
        MODULES[method].train(replace(cfg, **own) if device == "cuda" else cfg)
        losses[device] = [float(row["loss"]) for row in metrics(tmp_path / device) if row["loss"]]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.25)
