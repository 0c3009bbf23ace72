"""Checks and measures all methods on one CUDA GPU in ten minutes.

    python -m results.gpu --out runs/gpu --data cifar10
    python -m results.gpu --out runs/try --rehearse      tiny, on the CPU

Five parts, each a process with a time limit; a failure stops no other:
  agree   three steps in float32 and bfloat16 against the CPU; a resumed run
  speed   30 steps of each default configuration, then batches 16 and 256
  compile the default configurations, compiled
  views   views alone at 32 and 224 pixels
  mclim   the paper's MCLim (224 pixels, 768 × 6), batch 64, as many epochs as fit
Writes OUT/figures.jsonl.
"""
import argparse
import csv
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import camae
import cmae
import macrl
import mclim
import mvmae
from common import autocast, seed_step, start_processes
from images import Images
from speed import gflop_per_image, matrix_rate, seconds

LIMITS = {"agree": 70, "speed": 160, "compile": 230, "views": 30, "mclim": 100}  # seconds
METHODS = (mclim, mvmae, cmae, macrl, camae)
FORMS = [(method, {}) for method in METHODS] + [(mclim, {"backbone": "swin"}),
                                                (mclim, {"backbone": "hivit"})]


def note(args, name, job):
    """Prints the figures of job(), or its error, and adds them to figures.jsonl."""
    try:
        figures = job()
    except Exception as error:
        figures = {"error": repr(error)[:500]}
    print(name, json.dumps(figures), flush=True)
    with open(args.out / "figures.jsonl", "a") as file:
        file.write(json.dumps({name: figures}) + "\n")


def losses_of_steps(module, cfg, device, amp):
    """Loss terms of three steps from fixed weights, masks and views."""
    torch.manual_seed(0)
    model, views = module.Model(cfg), torch.randn(2, cfg.batch, 3, cfg.img, cfg.img)
    N = model.N_b if module is mclim else model.N
    rows = 2 * cfg.batch if module is mvmae else cfg.batch  # both views
    names = {cmae: ["mask_q", "mask_k"], macrl: ["mask_s", "mask_w"]}.get(module, ["mask"])
    masks = {name: module.random_mask(rows, N, getattr(cfg, name, cfg.mask)).to(device)
             for name in names}
    model, (view1, view2) = model.to(device), views.to(device)
    optimizer, values = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(3):
        with autocast(device, amp):
            losses = model(view1, view2, **masks)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        values += [value.item() for value in losses.values()]
    return values


def agree(args, device):
    for module, form in FORMS:
        cfg = replace(module.TINY, data="shapes", images=64, img=32, depth=1, batch=16, epochs=2,
                      warmup=0.2, device=device.type, log_every=1, eval_every=0, **form)
        name = " ".join([module.__name__, *form.values()])

        def compare(amp):
            pairs = zip(losses_of_steps(module, cfg, device, amp),
                        losses_of_steps(module, cfg, torch.device("cpu"), False))
            return max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)

        def last_loss(folder, resume=""):
            module.train(replace(cfg, out=str(folder), resume=resume))
            with open(folder / "metrics.csv", newline="") as table:
                return [row["loss"] for row in csv.DictReader(table) if row["loss"]][-1]

        def resume(folder):
            whole = last_loss(folder)
            (folder / "last.pt").unlink()  # leaves the first epoch's
            return {"whole": whole, "resumed": last_loss(folder, str(folder))}

        note(args, f"{name} float32", lambda: {"difference": compare(False)})
        note(args, f"{name} bfloat16", lambda: {"difference": compare(True)})
        if not args.rehearse or module is mvmae:
            note(args, f"{name} resumed", lambda: resume(args.out / f"{name} run"))


def speed(args, device):
    compiled = args.part == "compile"
    if compiled and args.rehearse:
        return
    limit = matrix_rate(device, torch.float32 if args.rehearse else torch.bfloat16)
    note(args, "matrix product", lambda: {"TFLOP/s": limit / 1e12})
    for batch in (4,) if args.rehearse else (0,) if compiled else (0, 16, 256):
        for module, form in FORMS:
            cfg = replace(module.TINY if args.rehearse else module.Config(), **form)
            if batch == cfg.batch:
                continue
            cfg = replace(cfg, batch=batch or cfg.batch)
            name = " ".join([args.part, module.__name__, *form.values(), f"batch {cfg.batch}"])
            count = 2 if args.rehearse else 30
            note(args, name, lambda: rate(module, cfg, device, limit, count, compiled))


def random_images(cfg, device):
    side = round(cfg.img * 8 / 7)
    return Images(torch.randint(256, (cfg.batch, 3, side, side), dtype=torch.uint8).to(device))


def rate(module, cfg, device, limit, count, compiled):
    torch.manual_seed(0)
    model, images = module.Model(cfg).to(device), random_images(cfg, device)
    net = torch.compile(model, options={"fallback_random": True}) if compiled else model
    optimizer = torch.optim.AdamW(module.param_groups(model, cfg.wd), lr=1e-4, fused=True)
    losses = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(count + 3):
        if step == 3:
            losses[-1].item()  # waits
            begin = time.time()
        seed_step(0, step)
        view1, view2 = module.views(images, cfg)[:2]
        with autocast(device):
            loss = net(view1, view2)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    first, *_, last = torch.stack(losses).tolist()
    speed = count * cfg.batch / (time.time() - begin)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0
    fraction = speed * gflop_per_image(module, cfg) * 1e9 / limit
    return {"images/s": speed, "fraction of matrix rate": fraction, "peak GB": peak,
            "first loss": first, "last loss": last}


def views(args, device):
    for module in METHODS:
        for img, patch in ((32, 4), (224, 16)):
            cfg = replace(module.TINY, img=img, patch=patch, batch=4 if args.rehearse else 64)
            images = random_images(cfg, device)
            note(args, f"views {module.__name__} {img}", lambda: {
                "images/s": cfg.batch / seconds(lambda: module.views(images, cfg), device, 1.0)})


def run_mclim(args, device):
    cfg = replace(mclim.TINY, images=128, epochs=2) if args.rehearse else mclim.Config()
    mclim.train(replace(cfg, data=args.data, out=f"{args.out}/mclim", batch=64, eval_every=1,
                        device=device.type))


def main():
    parser = argparse.ArgumentParser("results.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--data", default="shapes", help="of part mclim")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--part", choices=LIMITS)
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA GPU; try --rehearse")
    args.out.mkdir(parents=True, exist_ok=bool(args.part))
    parts = {"agree": agree, "speed": speed, "compile": speed, "views": views, "mclim": run_mclim}
    if args.part:
        parts[args.part](args, start_processes("cpu" if args.rehearse else "cuda")[0])
    else:
        for part, limit in LIMITS.items():  # SIGTERM: a training saves
            command = ["timeout", "-k", "30", str(limit), sys.executable, "-m", "results.gpu",
                       *sys.argv[1:], "--part", part]
            note(args, f"part {part}", lambda: {"status": subprocess.run(command).returncode})


if __name__ == "__main__":
    main()
