"""Fine-tunes the encoder of a run with a linear head. Defaults: --recipe mae.

    python eval_finetune.py RUN --recipe plain    crops and flips, for small encoders
    python eval_finetune.py RUN --labels 0.01     1 % of the labels of each class
    torchrun --nproc-per-node 8 eval_finetune.py RUN --batch 128    batch 1024

--recipe mae is MAE's FINETUNE.md for ViT-B; mvmae is Multi-View MAE's §4.1.2, with the rest from
Table 9 of MAE's paper. What differs from MAE's code, which uses timm: RandAugment is torchvision's,
with no noise in its strength (mstd0.5); crops are of stored squares of 8/7 of the image size; the
learning rate ends at 0, not 1e-6; test images are resized linearly; the encoder keeps its norm and
pooling; positions are not trained.

The last epoch counts: eval_finetune.json. --resume needs RUN where it was.
"""
import json
import os
import signal
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

from augment import normalize, random_hflip, random_resized_crop
from common import (Batches, Run, RunConfig, autocast, extract_features, flag, load_data,
                    make_config, make_parser, report_errors, require, seed_step,
                    start_processes)
from eval_linear import accuracy, cosine_lr, labelled, load_model
from plots import plot_confusion, plot_curves

RECIPES = {  # flags that --recipe sets
    "mae": {},
    "mvmae": {"batch": 512, "erase": 0.0, "lr": 1e-3, "layer_decay": 0.75},
    "plain": {"batch": 64, "rand_prob": 0.0, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0,
              "smoothing": 0.0, "drop_path": 0.0, "crop_min": 0.4, "lr": 2e-3,
              "layer_decay": 0.75, "epochs": 10.0},
}


@dataclass
class Config:
    """Settings. Each is a command-line flag."""
    run: str = ""  # a run folder or a checkpoint
    recipe: Literal["mae", "mvmae", "plain"] = "mae"  # sets other defaults
    scratch: bool = False  # from random weights
    labels: float = 1.0  # fraction of the labels of each class
    rand_prob: float = 0.5  # of each of RandAugment's two operations
    rand_magnitude: float = 9.0  # strength of RandAugment, 0 to 10
    mixup: float = 0.8  # α of mixup; 0: none
    cutmix: float = 1.0  # α of CutMix; 0: none
    erase: float = 0.25  # probability of erasing
    smoothing: float = 0.1  # label smoothing
    drop_path: float = 0.1  # stochastic depth, rises from 0 to this in the last block
    crop_min: float = 0.08  # smallest crop, fraction of the area
    layer_decay: float = 0.65  # learning rate of a block over that of the next
    epochs: float = 100  # passes over the labelled images
    batch: int = 1024  # images per step and process
    lr: float = 5e-4  # base learning rate, for a batch of 256
    wd: float = 0.05  # weight decay
    warmup: float = 5.0  # epochs of linear warm-up
    data: str = ""  # instead of the run's
    root: str = ""  # where data sets are
    out: str = ""  # folder of the run, new or empty
    resume: str = ""  # folder of a fine-tuning to continue
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: bool = True  # bfloat16 where it is fast
    workers: int = 8  # processes that augment
    log_every: int = 20  # steps between rows of metrics.csv

    def __post_init__(self):
        RunConfig.__post_init__(self)
        limits = {"labels": 1, "crop_min": 1, "layer_decay": 1, "rand_magnitude": 10,
                  "smoothing": 0.99, "drop_path": 0.99, "erase": 1}
        for name, limit in limits.items():
            require(getattr(self, name) <= limit, f"{flag(name)} must be at most {limit}")
        require(self.warmup < self.epochs, "--warmup must be below --epochs")


class Steps:
    """`steps[step]`: normalised images (B, 3, H, W) and class probabilities (B, classes). They
    depend on (seed, step, rank)."""
    def __init__(self, batches, cfg, img):
        self.batches, self.cfg, self.img = batches, cfg, img
        self.change = v2.RandAugment(1, round(10 * cfg.rand_magnitude), 101,
                                     v2.InterpolationMode.BICUBIC, fill=[124, 116, 104])
        self.erase = v2.RandomErasing(1.0, value="random")
        kinds = ((v2.MixUp, cfg.mixup), (v2.CutMix, cfg.cutmix))
        self.mixes = [kind(alpha=alpha) for kind, alpha in kinds if alpha > 0]

    def __getitem__(self, step):
        cfg, batches = self.cfg, self.batches
        seed_step(cfg.seed, step, batches.rank)
        images = batches.images[batches.ids(step)]
        x = random_resized_crop(images, self.img, (cfg.crop_min, 1.0), kernel="bicubic")
        x = random_hflip(x)  # (B, 3, H, W)
        counts = (torch.rand(len(x), 2) < cfg.rand_prob).sum(1)  # (B,)
        for i in counts.nonzero()[:, 0]:
            image = v2.functional.to_pil_image(x[i])
            for _ in range(counts[i]):
                image = self.change(image)
            x[i] = v2.functional.pil_to_tensor(image) / 255
        x = normalize(x)
        for i in (torch.rand(len(x)) < cfg.erase).nonzero()[:, 0]:
            x[i] = self.erase(x[i])
        targets = F.one_hot(images.labels, len(batches.images.classes)).float()
        if self.mixes:
            mix = self.mixes[torch.randint(len(self.mixes), ())]
            x, targets = mix(x, targets)
        return x, targets


def ignore_signals(worker):
    """Leaves Ctrl-C and other signals to the process group to the main process."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def choose_labels(labels, fraction, seed):
    """Sorted ids of a fraction of the images of each class, at least one."""
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in labels[labels >= 0].unique():
        ids = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(ids), generator=generator)
        chosen.append(ids[order[:max(1, round(fraction * len(ids)))]])
    return torch.cat(chosen).sort().values


def block_names(encoder):
    """Names of the blocks: modules with a child `mlp`."""
    return [name for name, module in encoder.named_modules() if hasattr(module, "mlp")]


class Classifier(nn.Module):
    """An encoder and a linear head, (B, 3, H, W) → scores (B, classes)."""
    def __init__(self, encoder, dim, classes, drop_path):
        super().__init__()
        self.encoder = encoder.requires_grad_(True)
        names = block_names(encoder)
        for i, name in enumerate(names):
            p = drop_path * i / max(1, len(names) - 1)
            for child, branch in encoder.get_submodule(name).named_children():
                if child in ("attn", "mlp"):
                    branch.register_forward_hook(
                        lambda m, _, out, p=p: stochastic_depth(out, p, "row", m.training))
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        z = self.encoder.features(x)  # (B, D)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(z.float())

    features = forward


def layer_groups(model, wd, decay):
    """AdamW's groups. `scale`, of the learning rate, is 1 for the head and the last norm; for a
    block or the patch embedding it is `decay` times that of the next layer."""
    names = block_names(model.encoder)
    last, layer, groups = len(names) + 1, 0, {}
    for name, p in model.named_parameters():
        inside = [i for i, block in enumerate(names, 1) if name.startswith(f"encoder.{block}.")]
        if inside:
            layer = inside[0]
        elif layer == len(names):
            layer = last
        plain = p.ndim < 2 or "token" in name or "pos" in name
        group = groups.setdefault((layer, plain), {
            "params": [], "weight_decay": 0 if plain else wd, "scale": decay ** (last - layer)})
        group["params"].append(p)
    return list(groups.values())[::-1]  # metrics.csv has the head's rate


def train(cfg):
    """Fine-tunes as `cfg` says. Returns the run folder."""
    device, rank, world = start_processes(cfg.device)
    require(cfg.run, "name the folder of a pre-training, RUN")
    pretrained, pre = load_model(cfg.run, not cfg.scratch, cfg.seed)
    pre = replace(pre, data=cfg.data or pre.data, root=cfg.root or pre.root, images=0)
    images, test = load_data(pre)
    require(test and len(images.classes) > 1, f"--data {pre.data}: no labelled test images")
    test, ids = labelled(test), choose_labels(images.labels, cfg.labels, cfg.seed)
    images = images if len(ids) == len(images) else images[ids]
    batches = Batches(images, cfg.batch, cfg.seed, torch.device("cpu"), rank, world)
    batches.device = device  # of Run; workers read batches.images
    steps, warmup = max(1, round(cfg.epochs * len(batches))), round(cfg.warmup * len(batches))

    torch.manual_seed(cfg.seed)
    dim = pretrained.encoder.features(torch.zeros(1, 3, pre.img, pre.img)).shape[1]
    model = Classifier(pretrained.encoder, dim, len(images.classes), cfg.drop_path).to(device)
    net = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(layer_groups(model, cfg.wd, cfg.layer_decay), fused=True)

    run = Run(__file__, cfg, batches, steps, model=model, optimizer=optimizer)
    loader = DataLoader(Steps(batches, cfg, pre.img), batch_size=None,
                        sampler=range(run.start, steps), worker_init_fn=ignore_signals,
                        num_workers=min(cfg.workers, os.cpu_count()),
                        pin_memory=device.type == "cuda")

    peak = cfg.lr * cfg.batch * world / 256
    for step, (x, targets) in enumerate(loader, run.start):
        seed_step(cfg.seed, steps + step, rank)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * cosine_lr(step, steps, warmup, peak)

        x, targets = (part.to(device, non_blocking=True) for part in (x, targets))
        with autocast(device, cfg.amp):
            scores = net(x)
        loss = F.cross_entropy(scores, targets, label_smoothing=cfg.smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        run.log(step, {"loss": loss})
        if run.epoch_done(step):
            run.save(step)
            if run.interrupted:
                break
    if rank == 0 and not run.interrupted:
        scores = extract_features(model.eval(), test, pre.img, device, cfg.amp).cpu()
        top1 = round(accuracy(scores, test.labels), 2)
        print(f"top-1 {top1} % of {len(test):,} test images")
        report = json.dumps({"percent": {"top1": top1}, **asdict(cfg)}, indent=1)
        (run.folder / "eval_finetune.json").write_text(report + "\n")
        plot_curves(run.folder / "curves.png", run.rows)
        plot_confusion(run.folder / "confusion.png", test.labels, scores.argmax(1),
                       images.classes, "fine-tuned")
    return run.finish()


def main(argv=None):
    """The command line."""
    parser = make_parser(__file__, __doc__, Config, Config())
    parser.usage = "%(prog)s RUN [--flag value ...]"
    parser.add_argument("run", metavar="RUN", nargs="?")
    typed = vars(parser.parse_args(argv))
    recipe = {} if "resume" in typed else RECIPES[typed.get("recipe", "mae")]
    with report_errors(parser):
        train(make_config({**recipe, **typed}, Config, Config(), "eval_finetune"))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
