"""Weights: what a run writes survives crashes, flipped bits and a full disk; other weights, memory, features' worth.

`python -m pytest -q test_weights.py`, on the CPU and without a network. SLOW=1 in the environment adds real kills.
"""
import csv, json, math, os, resource, signal, subprocess, sys, time
from dataclasses import replace

import pytest
import torch
from PIL import Image

import common, mclim
from test_smoke import (FLAGS, HERE, SMALL, assert_same_end, build, every_method, few, metrics, normal, run, slow,
                        weights)

# On disk

def test_a_crash_at_any_file_operation_of_save_loses_nothing(few, tmp_path, monkeypatch):
    class Crash(BaseException):
        """What no code of ours catches, like a kill."""

    def train(out, last):
        """Trains two epochs of two steps, up to file operation `last` after the first checkpoint. Returns all."""
        done = []

        def counted(operation):
            def call(*args):
                if "good" in common.newest(out):
                    done.append(operation.__name__)
                if len(done) == last:
                    if operation is save:
                        args[1].write_bytes(b"half of it")
                    raise Crash
                return operation(*args)
            return call

        save, cfg = torch.save, replace(SMALL["mclim"], dim=24, depth=1, epochs=2, knn_every=1, log_every=1)
        with monkeypatch.context() as patch:
            for owner, name in ((torch, "save"), (os, "replace"), (csv.DictWriter, "writerows")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            mclim.train(replace(cfg, out=str(out)))
        return done

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = train(tmp_path / "whole", None)
    assert done == "writerows writerows save replace writerows save replace replace".split()
    for n in range(1, len(done) + 1):
        with pytest.raises(Crash):
            train(tmp_path / str(n), n)
        assert mclim.main(["--resume", str(tmp_path / str(n))]) == 0, done[n - 1]
        assert_same_end(tmp_path / str(n), tmp_path / "whole")
    torch.set_num_threads(threads)


def test_a_flipped_bit_is_found(tmp_path):
    model = build(replace(SMALL["mclim"], dim=24, heads=2))
    common.save_checkpoint(tmp_path / "last.pt", "mclim", model.cfg, 1, model=model)
    whole, good, found = (tmp_path / "last.pt").read_bytes(), common.load_checkpoint(tmp_path), 0
    (tmp_path / "previous.pt").write_bytes(whole)
    for place in torch.randint(8 * len(whole), (30,), generator=torch.Generator().manual_seed(0)).tolist():
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "last.pt").write_bytes(flipped)
        try:
            state = common.load_checkpoint(tmp_path)
        except common.UserError as error:
            assert "last.pt: is damaged" in str(error) and "previous.pt" in str(error) and "\n" not in str(error)
            found += 1
        else:  # between the entries of the file
            assert all(torch.equal(state["model"][name], value) for name, value in good["model"].items())
    assert found >= 25


def test_a_full_disk_leaves_the_last_checkpoint(few, tmp_path, capsys):
    cfg, limits = replace(SMALL["mclim"], epochs=2, data="shapes"), resource.getrlimit(resource.RLIMIT_FSIZE)
    mclim.train(replace(cfg, epochs=1, out=str(tmp_path / "run")))
    facts = json.loads((tmp_path / "run" / "config.json").read_text())
    facts["config"]["epochs"] = 2  # more to do, no room for it
    (tmp_path / "run" / "config.json").write_text(json.dumps(facts))
    before, room = weights(tmp_path / "run"), (tmp_path / "run" / "last.pt").stat().st_size // 2
    for command, words in ((["--resume", str(tmp_path / "run")], "last.pt, is still good"),
                           ([*FLAGS, "--batch", "16", "--out", str(tmp_path / "new")], "no checkpoint yet")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            assert mclim.main(command) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and words in line and ".pt: can't be written" in line, line
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "run").items())
    assert not list(tmp_path.glob("*/*.part"))


def test_checkpoint_of_a_broken_model_is_not_written(tmp_path):
    cfg = replace(SMALL["mclim"], out=str(tmp_path))
    model = build(cfg)
    with torch.no_grad():
        model.encoder.norm.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="step 3"):
        common.Run("mclim", cfg, common.start_processes("cpu"), 3).save(3, None, None, model)
    assert not (tmp_path / "last.pt").exists()


@slow
@pytest.mark.parametrize("sign, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_process_resumed_ends_in_the_same_weights(tmp_path, sign, status):
    command = [HERE / "mclim.py", *FLAGS, "--epochs", 4]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [subprocess.Popen(list(map(str, [sys.executable, *command, "--out", tmp_path / name])), env=env,
                              stdout=subprocess.DEVNULL) for name in ("whole", "killed")]
    while not (tmp_path / "killed" / "last.pt").exists() and start[1].poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)  # somewhere in the second epoch
    start[1].send_signal(sign)
    assert start[1].wait() == status and 0 < common.load_checkpoint(tmp_path / "killed")["step"] < 80
    with open(tmp_path / "killed" / "metrics.csv", "a") as file:  # rows that are written again, the last one broken off
        file.write("79,3.95,0.1,,,1,1,1,9\n80,4")
    answer = run(HERE / "mclim.py", "--resume", tmp_path / "killed")
    assert answer.returncode == 0 and start[0].wait() == 0, answer.stderr
    ours, reference = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert ours.keys() == reference.keys() and all(torch.equal(ours[k], reference[k]) for k in ours)
    if sign == signal.SIGKILL:  # a signal adds a row of its own
        assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


@slow
def test_ctrl_c_under_torchrun_saves_and_leaves_no_traceback_of_ours(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29651",
               HERE / "mclim.py", *FLAGS, "--epochs", "1000", "--out", tmp_path / "run"]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=said,
                                   stderr=said, start_new_session=True)
    while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: all processes get it
    process.wait()
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "run" / "last.pt").exists() and "stopped after" in said, said
    assert said.count("torch.distributed.run --nproc-per-node 2 mclim.py --resume") == 1, said
    assert "mclim.py\"," not in said and "common.py\"," not in said, said  # no line of ours in a traceback


# From elsewhere

def test_init_takes_a_run_its_encoder_or_a_timm_classifier(tmp_path, capsys):
    source = build(replace(SMALL["mvmae"], seed=1)).encoder.state_dict()
    torch.save(source, tmp_path / "encoder.pt")
    head = {"head.weight": torch.zeros(9, 48), "head.bias": torch.zeros(9)}
    torch.save({**source, **head}, tmp_path / "timm.pth")
    torch.save({"model": source}, tmp_path / "mae.pth")
    average = {name: value for name, value in source.items() if not name.startswith("norm.")}
    torch.save({**average, **head, "fc_norm.bias": torch.ones(48)}, tmp_path / "average.pth")
    for method, copy in (("mvmae", "encoder"), ("cmae", "M_E"), ("camae", "f_xi")):
        for file in (tmp_path, *(tmp_path / name for name in ("encoder.pt", "timm.pth", "mae.pth", "average.pth"))):
            model = build(replace(SMALL[method], init=str(file)))
            before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
            common.init_encoders(model, model.cfg.init)
            said = capsys.readouterr().out
            ignored = "head.weight, head.bias" if file.name in ("timm.pth", "average.pth") else "ignored: nothing"
            assert said.count("\n") == 1 and ignored in said, said
            assert ("norm begins anew" in said) == (file.name == "average.pth")
            for name, value in model.get_submodule(copy).state_dict().items():
                begin = before if name.startswith("norm.") and file.name == "average.pth" else source
                assert torch.equal(value, begin[name]) and torch.equal(model.encoder.state_dict()[name], value), name
    model = build(replace(SMALL["mvmae"], resume="somewhere"))  # a run that goes on has its own weights
    common.init_encoders(model, "nowhere")


@pytest.mark.parametrize("method, change, words", [
    ("mclim", {}, ["cls_token is left over", "pos_embed is (1, 17, 48), not (1, 16, 48)"]),
    ("mvmae", {"depth": 3}, ["blocks.2.norm1.weight is missing", "and 7 more"]),
    ("mvmae", {"dim": 24}, ["cls_token is (1, 1, 48), not (1, 1, 24)", " more"]),
    ("mvmae", {"init": "nowhere"}, ["nowhere", "does not exist"]),
    ("mvmae", {"init": "{tmp}/number.pt"}, ["number.pt", "holds no state dict"]),
    ("mvmae", {"init": "{tmp}/list.pt"}, ["list.pt", "holds no state dict"]),
    ("mvmae", {"init": __file__}, [__file__, "no checkpoint"])])
def test_init_that_does_not_fit_gets_one_line(tmp_path, method, change, words):
    torch.save(build(SMALL["mvmae"]).encoder.state_dict(), tmp_path / "encoder.pt")
    torch.save({"model": 3}, tmp_path / "number.pt")
    torch.save({7: torch.zeros(3)}, tmp_path / "list.pt")
    change = {name: str(value).format(tmp=tmp_path) if name == "init" else value for name, value in change.items()}
    model = build(replace(SMALL[method], **{"init": str(tmp_path), **change}))
    with pytest.raises(common.UserError, match="--init") as error:
        common.init_encoders(model, model.cfg.init)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


OTHERS = [("mclim", {}, "avg"), ("mvmae", {}, "avg"), ("mvmae", {"pool": "cls"}, "token"), ("cmae", {}, "avg"),
          ("macrl", {}, "avg"), ("macrl", {"pool": "cls"}, "token"), ("camae", {}, "token")]


@pytest.mark.parametrize("method, change, pool", OTHERS)
def test_timms_vit_of_the_call_gives_the_same_features(method, change, pool):
    timm = pytest.importorskip("timm", reason="timm is not installed, and nothing else needs it")
    encoder = build(replace(SMALL[method], **change)).encoder.requires_grad_(False)
    call, x = common.timm_call(replace(SMALL[method], **change), encoder), normal(3, 3, 16, 16)
    theirs = eval(call, {"timm": timm}).eval().requires_grad_(False)
    theirs.load_state_dict(encoder.state_dict())
    assert torch.allclose(theirs(x), encoder.features(x), atol=1e-5)


def test_timm_call_names_the_pooling_and_fits_no_swin_or_hivit():
    for method, change, pool in OTHERS:
        cfg = replace(SMALL[method], **change)
        assert f'global_pool="{pool}"' in common.timm_call(cfg, build(cfg).encoder)
    for backbone in ("swin", "hivit"):
        cfg = replace(mclim.TINY, backbone=backbone, img=64, patch=8)
        assert common.timm_call(cfg, build(cfg).encoder) is None


# Memory

@every_method
def test_recomputed_blocks_give_the_same_loss_and_gradients_to_the_bit(method):
    results, calls = [], []
    for recompute in (False, True):
        model = build(SMALL[method])
        model = common.recompute(model) if recompute else model
        model.encoder.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(recompute))
        torch.manual_seed(3)
        losses = model(normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1))
        losses["loss"].backward()
        results.append([*losses.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
    assert calls.count(True) > calls.count(False) > 0  # computed again


@pytest.mark.skipif(sys.platform != "linux", reason="speaks to the GNU C library")
def test_freed_memory_is_kept():
    ask = """
import ctypes, torch, weights
class Facts(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
library = ctypes.CDLL(None)
library.mallinfo2.restype = Facts
def mapped():  # whether a block of 64 MiB is got from the kernel on its own
    before = library.mallinfo2().hblks
    block = torch.empty(2 ** 26, dtype=torch.uint8)
    return library.mallinfo2().hblks > before
print(mapped())
weights.keep_memory()
torch.empty(2 ** 26, dtype=torch.uint8)
print(mapped(), library.mallinfo2().fordblks >= 2 ** 26)
"""
    told = subprocess.run([sys.executable, "-c", ask], cwd=HERE, capture_output=True, text=True)
    assert told.stdout.split() == ["True", "False", "True"], told


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    assert common.autocast(torch.device("cuda")) is native and not common.autocast(torch.device("cuda"), amp=False)


# What they are worth

def test_knn_is_the_vote():
    bank, labels, queries = normal(30, 4), torch.arange(30) % 3, normal(8, 4, seed=1)
    votes, truth = common.knn_votes(bank, labels, queries, k=5), []
    for q, ours in zip(queries, votes):
        cosine = [(torch.dot(q, b) / q.norm() / b.norm()).item() for b in bank]
        theirs = [0.0] * 3
        for j in sorted(range(30), key=lambda j: -cosine[j])[:5]:
            theirs[labels[j]] += math.exp(cosine[j] / 0.07)
        assert ours.tolist() == pytest.approx(theirs, rel=1e-4)
        truth.append(theirs.index(max(theirs)))
    truth = torch.tensor(truth)
    assert common.knn_accuracy(bank, labels, queries, truth, k=5) == 1
    assert common.knn_accuracy(bank, labels, queries, (truth + (torch.arange(8) < 2)) % 3, k=5) == 0.75


@pytest.mark.parametrize("kind", ["no test images", "no labels", "one class", "two classes"])
def test_knn_needs_labels_and_two_classes(tmp_path, capfd, monkeypatch, kind):
    if kind != "no test images":  # drawing takes long
        monkeypatch.setattr(common, "draw_curves", lambda file, rows: None)
        monkeypatch.setattr(common, "draw_images", lambda file, rows: None)
    images, aspect = (255 * torch.rand(32, 3, 16, 16)).byte(), torch.ones(32)
    labels = torch.arange(32) % 2 if "two" in kind or "test" in kind else torch.full((32,), -1 if "no" in kind else 0)
    cfg = replace(SMALL["mclim"], epochs=1, knn_every=1, out=str(tmp_path / "run"))
    train, test, model = (images, labels, aspect), (images, labels, aspect), build(cfg)
    run = common.Run("mclim", cfg, common.start_processes("cpu"), 2)
    run.resume(model=model)
    run.log(2, {"loss": torch.tensor(1.0)}, 0.1)
    run.save(2, train, None if "test" in kind else test, model)
    said, row = capfd.readouterr().out, metrics(tmp_path / "run")[-1]
    assert (row["knn"] != "") == ("kNN top-1" in said) == ("two" in kind) and ("no kNN" in said) == ("two" not in kind)
    assert 1 <= float(row["rank"]) <= 32 and "effective rank" in said and said.count("after epoch 1") == 1
    if kind == "no test images":
        assert Image.open(tmp_path / "run" / "reconstruction.png").size[0] > 500  # of training images
        assert Image.open(tmp_path / "run" / "curves.png").size[0] > 500


def test_effective_rank_is_rankmes():
    features = normal(40, 6)
    sigma = torch.linalg.svd(features.double())[1].tolist()
    p = [value / sum(sigma) + 1e-7 for value in sigma]
    assert common.effective_rank(features) == pytest.approx(math.exp(-sum(v * math.log(v) for v in p)), rel=1e-4)
    assert common.effective_rank(torch.eye(6).repeat(7, 1)) == pytest.approx(6, rel=1e-4)
    assert common.effective_rank(normal(40, 1) @ normal(1, 6)) == pytest.approx(1, abs=1e-3)  # collapsed
