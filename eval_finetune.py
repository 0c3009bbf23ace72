"""Fine-tuning: how good a classifier any method's encoder becomes, trained end to end with a linear head.

    python eval_finetune.py runs/mvmae-DATE-TIME               a run, or one of its checkpoints (last.pt, previous.pt)
    python eval_finetune.py RUN --labels 0.01                  with 1 % of the labels, the same share of each class
    python eval_finetune.py RUN --scratch --layer-decay 1      the same network from random weights, all layers alike
    python eval_finetune.py RUN --tiny                         settings for a small encoder, on a laptop
    torchrun --nproc-per-node 8 eval_finetune.py RUN --batch 64                Multi-View MAE's batch, on eight GPUs

After Multi-View MAE, §4.1.2: 100 epochs, batch 512, mixup with a probability of 0.8, RandAugment. What that leaves open
is MAE's recipe (arXiv 2111.06377, Table 9): AdamW, rates that fall from layer to layer, label smoothing, stochastic
depth. What differs from MAE's code: positions stay fixed, where MAE's learn; crops are linear, where MAE's are bicubic;
in mixup each image draws its own share, where MAE draws one for the whole batch (α is 0.8 in both); RandAugment's
strength is 9 of 30 and both its operations always act, as in torchvision, where MAE's is 9 of 10 with a little noise
and each acts with probability 0.5 (--rand-ops 1 --rand-magnitude 27 comes near); there is no CutMix and no random
erasing. Multi-View MAE's §4.1.3 hints at CutMix and colour jitter, without numbers.

The encoder ends in its own norm and its own pooling, as in `features`, where MAE's code begins a new norm behind the
average; all its weights learn, MCLim's patch embedding too. Test images are seen by their central crop. CAMAE
fine-tunes on 1 % and 10 % of the labels as Barlow Twins does: papers/camae.md has the flags.

A fine-tuning is a folder like those of pre-training and is resumed in the same way; its pretrained.json holds what it
needs of RUN for that. The last epoch counts: eval_finetune.json and confusion.png say what it is worth on test images.
"""
import json, math, os, pathlib, sys, time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import stochastic_depth
from torchvision.transforms.v2 import functional as TF

from common import (Batches, Run, UserError, adjust_brightness, adjust_contrast, adjust_saturation, autocast, check,
                    check_above, check_least, check_share, check_training, class_names, cosine_lr, extract_features,
                    launch, load_data, normalize, param_groups, random_hflip, random_resized_crop, schedule, seed_step,
                    start_processes)
from eval_linear import build_model, labelled_only, load_model, top
from images import apply_to
from pictures import draw_confusion


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # what is evaluated
    run: str = ""  # folder of a pre-training, or a checkpoint of one
    scratch: bool = False  # the same network from random weights
    labels: float = 1.0  # share of the labels to use, the same in each class; CAMAE Table V: 0.01, 0.1
    # regularisation
    mixup: float = 0.8  # probability that an image is mixed with another, Multi-View MAE §4.1.2
    mixup_alpha: float = 0.8  # a mixed image keeps a share of itself, drawn from Beta(α, α); MAE's
    rand_ops: int = 2  # operations of RandAugment for an image, Multi-View MAE §4.1.2; how many: torchvision's
    rand_magnitude: float = 9.0  # strength of RandAugment, 0 to 30; torchvision's
    smoothing: float = 0.1  # label smoothing; MAE's
    drop_path: float = 0.1  # chance to drop a branch of the last block, falling to 0 at the first; MAE's
    crop_min: float = 0.08  # smallest crop, share of the area; RandomResizedCrop's
    # optimisation
    layer_decay: float = 0.75  # a block's rate as a share of the next one's; MAE's
    epochs: int = 100  # passes over the labelled images, Multi-View MAE §4.1.2
    batch: int = 512  # images per step and per process; Multi-View MAE §4.1.2: 512 in all; lowered where labels are few
    lr: float = 1e-3  # base learning rate, for a batch of 256; MAE's
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 5.0  # epochs of linear warm-up; MAE's
    steps: int = 0  # length of training and schedule in steps; 0: as --epochs says
    # run
    data: str = ""  # another data set than the run's: a name or a folder
    root: str = ""  # where data sets are kept, if not where the run had them
    out: str = ""  # folder of this run, new or empty (default: runs/eval_finetune-DATE-TIME)
    resume: str = ""  # folder of a fine-tuning to go on with
    seed: int = 0  # of all random numbers, and of the choice of labels
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    amp: bool = True  # bfloat16 autocast where the device is fast in it
    compile: bool = False  # torch.compile the model
    workers: int = 0  # threads that decode a folder, 0 for one a core
    log_every: int = 20  # steps between rows of metrics.csv
    test_every: int = 10  # epochs between tests on all test images, 0 for the last alone
    tiny: bool = False  # settings for a small encoder, on a laptop

    def __post_init__(self):
        check_training(self)
        check_least(self, 0, "rand_ops test_every steps")
        check_above(self, 0, "mixup_alpha labels layer_decay crop_min")
        check_share(self, "mixup labels layer_decay crop_min")
        check(0 <= self.rand_magnitude <= 30, "--rand-magnitude", self.rand_magnitude, "must lie between 0 and 30")
        check(0 <= self.smoothing < 1, "--smoothing", self.smoothing, "must be below 1, not negative")
        check(0 <= self.drop_path < 1, "--drop-path", self.drop_path, "must be below 1, not negative")


TINY = Config(mixup=0.0, rand_ops=1, drop_path=0.0, crop_min=0.4, epochs=10, batch=64, lr=2e-3, warmup=1.0,
              tiny=True)


def labelled(labels, share, seed):
    """Which images keep their labels: the same share of each class, at least one image, by `seed`. (n,), sorted."""
    generator, kept = torch.Generator().manual_seed(seed), []
    for label in labels[labels >= 0].unique():
        ids = (labels == label).nonzero().flatten()
        kept.append(ids[torch.randperm(len(ids), generator=generator)[:max(1, round(share * len(ids)))]])
    return torch.cat(kept).sort().values


def blocks_of(encoder):
    """Names of the residual blocks of an encoder, first to last: the modules that hold an `mlp`. In HiViT's stem these
    are single MLPs."""
    return [name.rpartition(".")[0] for name, _ in encoder.named_modules() if name.split(".")[-1] == "mlp"]


class Classifier(nn.Module):
    """An encoder, trained from its first layer on, and a linear head: images (B, 3, H, W) → scores (B, classes).

    With stochastic depth: in training, each residual branch gives 0 for an image with a probability that rises from 0
    in the first block to `drop_path` in the last.
    """
    def __init__(self, encoder, classes, drop_path):
        super().__init__()
        self.encoder, blocks = encoder.requires_grad_(True), blocks_of(encoder)
        for i, block in enumerate(blocks):
            for name, branch in encoder.get_submodule(block).named_children():
                if name in ("attn", "mlp"):
                    branch.register_forward_hook(lambda module, _, out, p=drop_path * i / max(1, len(blocks) - 1):
                                                 stochastic_depth(out, p, "row", module.training))
        self.head = nn.Linear(len(encoder.norm.weight), classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        z = self.encoder.features(x)  # (B, D)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(z.float())

    features = forward  # what extract_features asks for


def layer_groups(model, wd, decay):
    """param_groups of a Classifier, divided by layers, each with the `scale` of its rate: 1 for the head and the last
    norm, multiplied by `decay` once more for each block towards the input. What precedes the first block is one
    layer with the encoder's own parameters (class token, positions), as in MAE; what lies between two blocks goes with
    the former."""
    blocks, layer, layers = blocks_of(model.encoder), 0, {}
    last = len(blocks) + 1
    for name, p in model.encoder.named_parameters():  # its own, then its layers' in order
        inside = [i for i, block in enumerate(blocks, 1) if name.startswith(f"{block}.")]
        if inside:
            layer = inside[0]
        elif layer == len(blocks):
            layer = last
        layers[p] = layer
    groups = []
    for group in param_groups(model, wd):
        for layer in range(last + 1):
            params = [p for p in group["params"] if layers.get(p, last) == layer]
            groups.append({**group, "params": params, "scale": decay ** (last - layer)})
    return [group for group in groups if group["params"]]


def mixup(images, targets, p, alpha):
    """Blends images (B, 3, H, W) and their targets (B, classes) with those of the batch in reverse order: with
    probability p an image keeps a share of itself by Beta(alpha, alpha), else all of it."""
    share = torch.distributions.Beta(alpha, alpha).sample((len(images), 1))  # (B, 1)
    share = torch.where(torch.rand(len(images), 1) < p, share, 1.0).to(images.device, non_blocking=True)
    return torch.lerp(images.flip(0), images, share[..., None, None]), torch.lerp(targets.flip(0), targets, share)


# RandAugment

def warp(images, xx=1.0, xy=0.0, yx=0.0, yy=1.0, x=0.0, y=0.0):
    """Resamples images bilinearly; outside is black. The output pixel at (u, v) is read from (xx·u + xy·v + x,
    yx·u + yy·v + y). Coordinates are -1…1, from the centre, v downwards; each coefficient is a number or (B,)."""
    zeros = torch.zeros(len(images), device=images.device)
    inverse = torch.stack([torch.stack([zeros + v for v in row], 1) for row in ((xx, xy, x), (yx, yy, y))], 1)
    return F.grid_sample(images, F.affine_grid(inverse, images.shape, align_corners=False), align_corners=False)


def rotate(images, angle):
    """Turns each image by `angle` (B,) radians, clockwise. Square images."""
    return warp(images, angle.cos(), angle.sin(), -angle.sin(), angle.cos())


def adjust_sharpness(images, factor):
    """Blends with a smoothed image: factor (B,) ≥ 0, 1 changes nothing."""
    return torch.lerp(TF.adjust_sharpness(images, 0.0), images, factor[:, None, None, None]).clamp_(0, 1)


def posterize(images, bits):
    """Keeps the highest `bits` (B,), 0…8, of each value's eight."""
    step = 2 ** (8 - bits.round())[:, None, None, None]
    return (images * 255).round_().div_(step).floor_().mul_(step).div_(255)


def solarize(images, threshold):
    """Inverts the values from `threshold` (B,) on."""
    return torch.where(images >= threshold[:, None, None, None], 1 - images, images)


RANDAUGMENT = {  # what it does with images and s (B,): the strength -1…1; five of them leave its sign aside
    "identity": lambda x, s: x,
    "shear x": lambda x, s: warp(x, xy=0.3 * s), "shear y": lambda x, s: warp(x, yx=0.3 * s),
    "translate x": lambda x, s: warp(x, x=2 * 150 / 331 * s),
    "translate y": lambda x, s: warp(x, y=2 * 150 / 331 * s),
    "rotate": lambda x, s: rotate(x, s * math.radians(30)),
    "brightness": lambda x, s: adjust_brightness(x, 1 + 0.9 * s),
    "colour": lambda x, s: adjust_saturation(x, 1 + 0.9 * s),
    "contrast": lambda x, s: adjust_contrast(x, 1 + 0.9 * s),
    "sharpness": lambda x, s: adjust_sharpness(x, 1 + 0.9 * s),
    "posterize": lambda x, s: posterize(x, 8 - (4 * s.abs()).round()),
    "solarize": lambda x, s: solarize(x, 1 - s.abs()),
    "autocontrast": lambda x, s: TF.autocontrast(x), "equalize": lambda x, s: TF.equalize(x)}


def rand_augment(images, ops=2, magnitude=9):
    """RandAugment (arXiv 1909.13719): `ops` of RANDAUGMENT for each image, by chance, at `magnitude`, 0…30. Ranges are
    torchvision's; geometry is bilinear, shears are about the centre. Square images."""
    images = images.clone()
    for _ in range(ops):
        chosen, sign = torch.randint(len(RANDAUGMENT), (len(images),)), torch.randint(2, (len(images),)) * 2 - 1
        for i, change in enumerate(RANDAUGMENT.values()):
            images = apply_to(images, chosen == i, change, sign * magnitude / 30)
    return images


def views(images, img, cfg, aspect=None):
    """uint8 images (B, 3, S, S) and their aspect (B,), 1 if None → cropped, flipped, changed by RandAugment,
    normalised (B, 3, img, img)."""
    x = random_hflip(random_resized_crop(images, img, (cfg.crop_min, 1.0), aspect=aspect))
    return normalize(rand_augment(x, cfg.rand_ops, cfg.rand_magnitude))


# The program

def pretrained(cfg):
    """The pre-training's model, with its weights unless --scratch or --resume, its Config, and its name: of RUN, or of
    pretrained.json in the folder that is resumed. Raises UserError."""
    if not cfg.resume:
        check(cfg.run, "RUN", "missing", "name the folder of a pre-training: eval_finetune.py RUN")
        return *load_model(cfg.run, trained=not cfg.scratch, seed=cfg.seed), cfg.run
    file = pathlib.Path(cfg.resume, "pretrained.json")
    try:
        facts = json.loads(file.read_text())
        method, config, name = facts["method"], facts["config"], facts["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: can't be read ({type(error).__name__}), so there is nothing to resume") from error
    return *build_model(method, config, file, cfg.seed), name


def fitting(cfg, images, world):
    """cfg, if the labelled images fill a step's batch; else with the --batch that makes about ten steps an epoch, at
    least one image. Raises UserError."""
    check(images >= world, "--labels", cfg.labels, f"leaves {images} images for {world} processes")
    return cfg if cfg.batch * world <= images else replace(cfg, batch=max(1, images // (10 * world)))


def train(cfg):
    """Fine-tunes as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a
    signal."""
    began, here = time.time(), start_processes(cfg.device)
    source, pre, run_name = pretrained(cfg)
    encoder, others = source.encoder, [name for name, _ in source.named_children() if name != "encoder"]
    method = type(pre).__module__
    del source
    data, root = cfg.data or pre.data, cfg.root or pre.root
    known, asked = load_data(replace(pre, data=data, root=root, workers=cfg.workers, images=0))
    asked = labelled_only(asked)
    check(asked and (known[1] >= 0).any(), "--data", data, "has no labelled training and test images: name a folder "
          "that holds train/CLASS/IMAGE and test/CLASS/IMAGE")
    (_, labels, _), (queries, truth, aspect) = known, asked
    classes, kept = class_names(data, root), labelled(labels, cfg.labels, cfg.seed)
    typed, cfg = cfg.batch, fitting(cfg, len(kept), here.world)
    batches = Batches(known, cfg.batch, cfg.seed, here, among=kept)
    steps, warmup = schedule(cfg, len(batches))

    torch.manual_seed(cfg.seed)
    model = Classifier(encoder, len(classes), cfg.drop_path).to(here.device)
    network = (f"{type(encoder).__name__} of {method}.py, {run_name}, "
               f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters, "
               f"{'from random weights' if cfg.scratch else 'pre-trained'}; left aside: {', '.join(others)}")
    if here.rank == 0:
        fewer = f"; --batch {cfg.batch} instead of {typed}, for so few images" * (cfg.batch < typed)
        print(f"{network}\n{len(kept):,} labelled images, {len(queries):,} test images, {len(classes)} classes{fewer}",
              flush=True)
    net = DistributedDataParallel(model, broadcast_buffers=False) if here.world > 1 else model
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net  # draws as the plain model does
    peak = cfg.lr * cfg.batch * here.world / 256  # MAE's rule
    optimizer = torch.optim.AdamW(layer_groups(model, cfg.wd, cfg.layer_decay), lr=peak, fused=True)  # MAE's betas

    run = Run("eval_finetune", cfg, here, len(batches), columns=["test top 1", "test top 5"])
    step = run.resume(model=model, optimizer=optimizer)
    if here.rank == 0 and not cfg.resume:
        part = run.folder / "pretrained.part"
        part.write_text(json.dumps({"run": cfg.run, "method": method, "config": asdict(pre)}, indent=1) + "\n")
        os.replace(part, run.folder / "pretrained.json")
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        images, shape = batches[step]
        x = views(images, pre.img, cfg, shape)
        known_labels = labels[batches.ids(step)].to(here.device, non_blocking=True)  # (B,)
        targets = F.one_hot(known_labels, len(classes)).float()  # (B, classes)
        x, targets = mixup(x, targets, cfg.mixup, cfg.mixup_alpha)
        with autocast(here.device, cfg.amp):
            scores = net(x)  # (B, classes)
        loss = F.cross_entropy(scores, targets, label_smoothing=cfg.smoothing)
        loss.backward()
        rate = cosine_lr(step, steps, warmup, peak)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        optimizer.zero_grad()

        step += 1
        run.log(step, {"loss": loss}, rate)
        epoch, rest = divmod(step, len(batches))
        due = step == steps or not rest and cfg.test_every and epoch % cfg.test_every == 0
        if due and here.rank == 0:
            answers = extract_features(model.eval(), queries, pre.img, here, cfg.amp, aspect).cpu()  # (N, classes)
            model.train()
            top1, top5 = top(answers, truth, 1), top(answers, truth, 5)
            run.write({"step": step, "epoch": round(step / len(batches), 4), "test top 1": top1, "test top 5": top5})
            run.tell(f"after epoch {step / len(batches):g}: {top1} % of the test images right, {top5} % among the best "
                     "five")
            if step == steps:
                report = {"network": network, "data": data, "labelled images": len(kept), "test images": len(queries),
                          "percent": {"top1": top1, "top5": top5}, "config": asdict(cfg),
                          "seconds since start or resume": round(time.time() - began, 1)}
                (run.folder / "eval_finetune.json").write_text(json.dumps(report, indent=1) + "\n")
                draw_confusion(run.folder / "confusion.png", truth, answers.argmax(1), classes, "fine-tuned network")
        run.save(step, None, None, model=model, optimizer=optimizer)
    return run.finish(following=())


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("eval_finetune", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
