"""Checks and measures all methods on one CUDA GPU in ten minutes.

    python -m results.gpu --out runs/gpu                 on a GPU, from the repository's folder
    python -m results.gpu --out runs/gpu --rehearse      tiny sizes on the CPU, to try the script

Four parts, each a process with a time limit; a part that fails does not stop the next:
  agree    three steps of each method and backbone in float32 against the CPU; then bfloat16, a
           resumed run, a compiled run
  speed    60 steps of each default configuration, then batches of 16 and 256: images/s, fraction
           of the matrix rate, peak memory, losses
  views    views alone at 32 and 224 pixels, and their fraction of a step
  mclim    MCLim as in the paper (224 pixels, 768 × 6) with a batch of 64 on --data, as many epochs
           as fit, kNN after each
Every figure is printed and written to OUT/figures.json as soon as it is known.
"""
import argparse
import csv
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import camae
import cmae
import macrl
import mclim
import mvmae
from augment import normalize
from common import autocast, seed_step
from images import Images
from speed import gflop_per_image, matrix_rate, seconds

LIMITS = {"agree": 130, "speed": 190, "views": 40, "mclim": 210}  # seconds
FORMS = [(mclim, {}), (mclim, {"backbone": "swin"}), (mclim, {"backbone": "hivit"}), (mvmae, {}),
         (cmae, {}), (macrl, {}), (camae, {})]


def note(out, name, **figures):
    """Prints figures and adds them to figures.json."""
    print(name, json.dumps(figures), flush=True)
    file = out / "figures.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, name: figures}, indent=1) + "\n")


def attempt(out, name, job):
    """Notes the figures that job() returns, or its error."""
    begin = time.time()
    try:
        figures = job()
    except Exception as error:  # the other figures are worth having
        figures = {"error": f"{type(error).__name__}: {error}"[:500]}
    note(out, name, **figures, seconds=round(time.time() - begin, 1))


def steps(module, cfg, device, count, views):
    """`count` steps of a method with given views from given weights: the losses of each."""
    torch.manual_seed(0)
    model = module.Model(cfg)                       # on the CPU, so that the weights are the same
    count_patches = (cfg.img // cfg.patch) ** 2
    rows = len(views[0]) * (2 if module is mvmae else 1)
    blocks = count_patches // 4 if getattr(cfg, "backbone", "vit") != "vit" else count_patches
    names = {cmae: ("mask_q", "mask_k"), macrl: ("mask_s", "mask_w")}.get(module, ("mask",))
    ratios = [getattr(cfg, name, cfg.mask) for name in names]
    masks = {name: module.random_mask(rows, blocks, ratio).to(device)
             for name, ratio in zip(names, ratios)}
    model, views = model.to(device), [view.to(device) for view in views]
    optimizer, values = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(count):
        with autocast(device, cfg.amp):
            losses = model(*views, **masks)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append({name: value.item() for name, value in losses.items()})
    return values


def agree(out, device, rehearse):
    sizes = {"data": "shapes", "images": 320, "img": 32, "dim": 192, "depth": 2, "batch": 32,
             "epochs": 2, "warmup": 0.2, "device": device.type, "log_every": 1, "eval_every": 0}
    for module, form in FORMS:
        cfg = dataclasses.replace(module.TINY, **sizes, **form)
        name = " ".join([module.__name__, *form.values()])
        torch.manual_seed(1)
        views = torch.randn(2, 32, 3, 32, 32)

        def compare(amp):
            plain = steps(module, dataclasses.replace(cfg, amp=False), torch.device("cpu"), 3, views)
            here = steps(module, dataclasses.replace(cfg, amp=amp), device, 3, views)
            return {"largest relative difference": max(
                abs(a[term] - b[term]) / max(abs(b[term]), 1e-6)
                for a, b in zip(here, plain) for term in b), "losses": here[-1]}

        def resume():
            folder = module.train(dataclasses.replace(cfg, out=str(out / f"{name} run")))
            whole = last_loss(folder)
            (folder / "last.pt").unlink()           # previous.pt is of the first epoch
            module.train(dataclasses.replace(cfg, out=str(folder), resume=str(folder)))
            return {"whole": whole, "resumed": last_loss(folder)}

        def compiled():
            folder = out / f"{name} compiled"
            module.train(dataclasses.replace(cfg, compile=True, epochs=1, out=str(folder)))
            return {"loss": last_loss(folder)}

        attempt(out, f"agree: {name}, float32", lambda: compare(False))
        attempt(out, f"agree: {name}, bfloat16", lambda: compare(True))
        if not form and not (rehearse and module is not mvmae):
            attempt(out, f"agree: {name}, resumed", resume)
            attempt(out, f"agree: {name}, compiled", compiled)


def last_loss(folder):
    with open(folder / "metrics.csv", newline="") as table:
        return float([row for row in csv.DictReader(table) if row["loss"]][-1]["loss"])


def speed(out, device, rehearse):
    limit = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    note(out, "speed: matrix product", tflops=limit / 1e12)
    for batch in (None, 16, 256) if not rehearse else (4,):
        for module, form in FORMS:
            cfg = dataclasses.replace(module.TINY if rehearse else module.Config(), **form)
            cfg = dataclasses.replace(cfg, batch=batch or cfg.batch)
            name = " ".join([module.__name__, *form.values(), f"batch {cfg.batch}"])
            attempt(out, f"speed: {name}", lambda: rate(module, cfg, device, limit,
                                                        2 if rehearse else 60))


def rate(module, cfg, device, limit, count):
    side = round(cfg.img * 8 / 7)
    batch = Images(torch.randint(256, (cfg.batch, 3, side, side), dtype=torch.uint8).to(device))
    model = module.Model(cfg).to(device)
    optimizer = torch.optim.AdamW(module.param_groups(model, cfg.wd), lr=1e-4, fused=True)
    cuda, losses = device.type == "cuda", []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(count + 2):
        if step == 2:                               # two steps of warm-up
            losses[0].item()
            begin = time.time()
        seed_step(0, step)
        with autocast(device):
            loss = model(*module.views(batch, cfg))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    speed = count * cfg.batch / (time.time() - begin)
    return {"images/s": speed, "fraction of matrix rate": speed * gflop_per_image(cfg) * 1e9 / limit,
            "peak GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
            "first loss": losses[0], "last loss": losses[-1]}


def views(out, device, rehearse):
    for module, form in FORMS:
        if form:
            continue
        for img, patch in ((32, 4), (224, 16)):
            cfg = dataclasses.replace(module.TINY, img=img, patch=patch, batch=4 if rehearse else 64)
            batch = Images(torch.randint(256, (cfg.batch, 3, img * 8 // 7, img * 8 // 7),
                                         dtype=torch.uint8).to(device))
            attempt(out, f"views: {module.__name__} {img}", lambda: {
                "images/s": cfg.batch / seconds(lambda: module.views(batch, cfg), device, 1.0)})


def mclim_run(out, data, device, rehearse):
    cfg = mclim.TINY if rehearse else mclim.Config()
    cfg = dataclasses.replace(cfg, data=data, root=str(out / "data"), batch=64, eval_every=1,
                              out=str(out / "mclim"), images=256 if rehearse else 0,
                              epochs=1 if rehearse else 100, warmup=0.2 if rehearse else 10,
                              device=device.type)
    mclim.train(cfg)


def main():
    parser = argparse.ArgumentParser("python -m results.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--data", default="shapes", help="data set of the last part")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--part", choices=LIMITS, help="one part alone, without a time limit")
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA GPU is available; --rehearse tries the script on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.rehearse else "cuda")
    if args.part == "mclim":
        mclim_run(args.out, args.data, device, args.rehearse)
    elif args.part:
        {"agree": agree, "speed": speed, "views": views}[args.part](args.out, device, args.rehearse)
    else:
        for part, limit in LIMITS.items():
            command = [sys.executable, "-m", "results.gpu", *sys.argv[1:], "--part", part]
            try:
                status = subprocess.run(command, timeout=limit).returncode
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit} s"
            note(args.out, f"part {part}", status=status)


if __name__ == "__main__":
    main()
