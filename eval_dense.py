"""Semantic segmentation by a linear layer on the patch tokens of a frozen encoder.

    python eval_dense.py RUN                  drawn shapes: background, disc, ring, …
    python eval_dense.py RUN --baselines      also the untrained encoder and raw patches
    python eval_dense.py RUN --data ADEChallengeData2016 --ignore 0    ADE20K; 0 is its "other"

A linear layer gives each standardised token a score for each class, upsampled bilinearly to the
image. The loss is the mean cross-entropy of the pixels that are not --ignore. The last epoch
counts. Mean IoU is over the classes that occur in the test annotations.

--data shapes: 2,000 training and 500 test images. Each colour is the object's as often as the
background's.
--data FOLDER: ADE20K's layout, images/training, images/validation, annotations/training,
annotations/validation. An annotation is a PNG of class indices, named as its image. The central
square of both is resized.

Unlike Multi-View MAE's Table 4, there is no UperNet and no fine-tuning. Writes eval_dense.json
and .png beside the checkpoint (of a file: NAME-FILE; with --data: NAME-DATA).
"""
import argparse
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from augment import normalize
from common import report_errors, require, start_processes
from eval_linear import extract_tokens, load_model, train_probe
from images import SHAPES, Images, UserError, draw_shapes, find_images, read_image
from plots import plot_images
import matplotlib  # after plots, which sets the backend

RECIPE = {"lr": 2e-3, "wd": 1e-4, "batch": 16, "epochs": 10, "min_steps": 0}  # AdamW, cosine
COUNTS = {"training": 2000, "validation": 500}  # of drawn shapes


# Data: Images (N, 3, side, side) and the class of each pixel, uint8 (N, side, side)

def load_shapes(split, side, seed):
    """Drawn shapes of a split. Class 0 is the background, 1 … 10 are SHAPES."""
    pixels, labels, masks = draw_shapes(COUNTS[split], side, 2 * seed + (split == "validation"))
    return Images(pixels), ((labels[:, None, None] + 1) * masks).byte()


def read_pair(file, annotation, side):
    """The central squares of an image file (side, side, 3) and its annotation (side, side), uint8.
    Raises UserError."""
    try:
        image = read_image(file, 1 << 16)  # a JPEG in full size
        classes = Image.open(annotation)
        classes.load()
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"--data: {file} or {annotation} cannot be read: {error}") from error
    require(classes.mode in ("L", "P"),
            f"--data: {annotation} must be a PNG of class indices, its mode is {classes.mode}")
    require(image.size == classes.size,
            f"--data: {annotation} is {classes.size}, its image is {image.size}")
    size = (side, side)
    return (np.array(ImageOps.fit(image, size, Image.Resampling.BICUBIC)),
            np.array(ImageOps.fit(classes, size, Image.Resampling.NEAREST)))


def load_annotated(folder, split, side):
    """A split of a folder like ADE20K's. Raises UserError."""
    place = Path(folder, "images", split)
    files = [Path(file) for file in find_images(place)]
    require(files, f"--data {folder}: expected shapes or a folder with images in images/{split}")
    annotations = [Path(folder, "annotations", split, file.relative_to(place)).with_suffix(".png")
                   for file in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels, classes = zip(*pool.map(read_pair, files, annotations, [side] * len(files)))
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Images(pixels), torch.from_numpy(np.stack(classes))


# Probe

class DenseProbe(nn.Module):
    """Tokens (B, T, D) of square images → class scores of their pixels (B, C, side, side)."""
    def __init__(self, dim, classes, side):
        super().__init__()
        self.layer, self.side = nn.Linear(dim, classes), side
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        grid = math.isqrt(x.shape[1])
        scores = self.layer(x).mT.unflatten(2, (grid, grid))                    # (B, C, grid, grid)
        return F.interpolate(scores, (self.side, self.side), mode="bilinear")


def pixel_loss(scores, truth, ignore):
    """Mean cross-entropy of scores (B, C, H, W) over the pixels whose truth (B, H, W) is not
    `ignore`; 0 if there is none."""
    total = F.cross_entropy(scores, truth.long(), ignore_index=ignore, reduction="sum")
    return total / (truth != ignore).sum().clamp(min=1)


def segment(tokens, truth, queries, classes, ignore, seed=0):
    """Pixel classes uint8 (Q, H, W) of `queries` (Q, T, D), by a probe trained on `tokens` (N, T,
    D) and `truth` uint8 (N, H, W). Raises FloatingPointError."""
    torch.manual_seed(seed)
    probe = DenseProbe(tokens.shape[2], classes, truth.shape[1]).to(truth.device)
    train_probe(probe, tokens, truth, RECIPE,
                loss=lambda scores, target: pixel_loss(scores, target, ignore))
    rows = []
    for part in queries.split(16):
        scores = probe(part.float())
        if not scores.isfinite().all():
            raise FloatingPointError("a score is not finite; try --no-amp")
        rows.append(scores.argmax(1).byte().cpu())
    return torch.cat(rows)


def count_pixels(truth, prediction, classes, ignore):
    """Number of pixels by true and predicted class, (C, C); the truth `ignore` is left out."""
    counted = truth != ignore
    pairs = truth[counted].long() * classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def intersection_over_union(counts):
    """(C,) of count_pixels; NaN for a class without true pixels."""
    both = counts.diagonal().double()
    return torch.where(counts.sum(1) > 0, both / (counts.sum(0) + counts.sum(1) - both), torch.nan)


class RawPatches(nn.Module):
    """The baseline without encoder: the pixels of grid×grid patches are tokens."""
    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def tokens(self, x):
        return F.pixel_unshuffle(x, x.shape[2] // self.grid).flatten(2).mT


# The program

def evaluate(args):
    """Evaluates as the command line says."""
    device, _, _ = start_processes(args.device)
    model, cfg = load_model(args.run)
    data, img = args.data or "shapes", cfg.img
    (train, masks), (test, truth) = (
        load_shapes(split, img, cfg.seed) if data == "shapes" else load_annotated(data, split, img)
        for split in ("training", "validation"))
    known, occurring = (set(part.unique().tolist()) - {args.ignore} for part in (masks, truth))
    require(len(known) > 1 and occurring, f"--ignore {args.ignore} leaves fewer than two classes")
    classes = 1 + max(known | occurring)
    names = ["background", *SHAPES] if data == "shapes" else list(map(str, range(classes)))
    print(f"{cfg.data} → {data}: {len(train):,} training images, {len(test):,} test images, "
          f"{img}×{img} pixels, {len(known)} classes", flush=True)

    encoders = {"trained encoder": model.encoder.to(device).eval()}
    if args.baselines:
        with torch.no_grad():
            T = model.encoder.tokens(torch.zeros(1, 3, img, img, device=device)).shape[1]
        untrained = load_model(args.run, trained=False)[0].encoder
        encoders["untrained encoder"] = untrained.to(device).eval()
        encoders["raw patches"] = RawPatches(math.isqrt(T))
    percent, each, predictions = {}, {}, {}
    print(f"{'':18} {'mean IoU':>9} {'pixel accuracy':>15}  in %")
    for name, encoder in encoders.items():
        tokens, like = extract_tokens(encoder, train, img, device, args.amp)
        queries, _ = extract_tokens(encoder, test, img, device, args.amp, like)
        guess = segment(tokens, masks.to(device), queries, classes, args.ignore, cfg.seed)
        predictions[name] = guess
        counts = count_pixels(truth, guess, classes, args.ignore)
        iou = 100 * intersection_over_union(counts)
        mean, right = iou.nanmean().item(), 100 * (counts.diagonal().sum() / counts.sum()).item()
        percent[name] = {"mean_iou": round(mean, 2), "pixel_accuracy": round(right, 2)}
        each[name] = {names[i]: round(iou[i].item(), 2) for i in sorted(occurring)}
        print(f"{name:18} {mean:9.2f} {right:15.2f}", flush=True)

    run = Path(args.run)
    folder, suffix = (run, "") if run.is_dir() else (run.parent, f"-{run.stem}")
    suffix += f"-{Path(data).resolve().name}" if args.data else ""
    file = folder / f"eval_dense{suffix}.json"
    draw(file.with_suffix(".png"), test.pixels, {"truth": truth, **predictions}, names, args.ignore)
    report = {"checkpoint": str(args.run), "data": data, "recipe": RECIPE, "percent": percent,
              "iou": each}
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {file} and {file.stem}.png")


def draw(file, images, masks, names, ignore):
    """Draws ten images and their `masks`, label → uint8 (N, H, W). Ignored pixels are white."""
    tab20 = matplotlib.colormaps["tab20"].colors
    hues = tab20[::2] + tab20[1::2]  # ten dark ones, ten light ones
    colors = [(0, 0, 0), *(hues[i % 20] for i in range(len(names) - 1))]
    ids = torch.linspace(0, len(images) - 1, min(10, len(images))).long()
    rows = {"image": normalize(images[ids] / 255)}
    for label, classes in masks.items():
        classes = classes[ids].long()
        shown = torch.tensor(colors)[classes.clamp(max=len(names) - 1)].permute(0, 3, 1, 2)
        rows[label] = normalize(shown.masked_fill((classes == ignore)[:, None], 1))
    plot_images(file, rows, legend=dict(zip(names, colors)) if len(names) <= 20 else None)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser("eval_dense.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, or a checkpoint")
    parser.add_argument("--data", default="", help="shapes or a folder in ADE20K's layout")
    parser.add_argument("--ignore", type=int, default=255, metavar="INDEX",
                        help="class of the pixels that do not count (default: 255)")
    parser.add_argument("--baselines", action="store_true", help="also untrained and raw patches")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True,
                        help="bfloat16 autocast where the device is fast in it")
    args = parser.parse_args(argv)
    with report_errors(parser):
        evaluate(args)


if __name__ == "__main__":
    main()
