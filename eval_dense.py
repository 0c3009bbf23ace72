"""What is where: semantic segmentation by a linear layer on the frozen encoder's patch tokens, for any method's run.

    python eval_dense.py runs/mvmae-DATE-TIME                  drawn shapes: is a pixel ground, disc, ring, square, …
    python eval_dense.py RUN --baselines                       beside it the untrained encoder and raw patches
    python eval_dense.py RUN --data ADEChallengeData2016 --ignore 0            ADE20K, whose index 0 is "other"

An image and its annotation are cut to their central square. Its `tokens` are standardised by the mean and deviation of
1,000 training images; one linear layer gives each patch a score for each class; the scores are upsampled bilinearly to
the image; the loss is the mean cross-entropy of the pixels that are not --ignore, by the fixed recipe below. The last
epoch counts. Mean IoU: for each class that occurs in the test images' annotations, the intersection over the union of
its true and its predicted pixels; then the mean over these classes.

--data shapes: 2,000 training and 500 test images that the program draws, and so knows what each pixel shows. Ground
and object have complementary colours, and each colour is the ground's as often as the object's: colour alone cannot
tell them apart.
--data FOLDER: ADE20K's layout, images/training, images/validation, annotations/training, annotations/validation; an
annotation is a PNG of class indices, named as its image is. Both are resized to the run's size.

This is the same kind of task as Multi-View MAE's Table 4 (semantic segmentation), but not the same experiment: there is
no UperNet, no fine-tuned encoder, no crops at several scales. Neither Mask R-CNN nor COCO is here (Table 3).
Writes eval_dense.json and eval_dense.png (with --data, eval_dense-DATA.json and .png) beside the checkpoint.
"""
import argparse, json, math, os, pathlib, sys, time
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common import Parser, UserError, answer, check, class_names, normalize, start_processes
from eval_linear import Tokens, beside, load_model, tokens_of, train_probe
from images import KINDS, draw_shapes, read_image
from pictures import draw_images

RECIPE = {"optimizer": "AdamW", "lr": 2e-3, "weight_decay": 1e-4, "batch": 16, "epochs": 10, "schedule": "cosine"}
SHAPES = {"training": 2_000, "validation": 500}  # how many are drawn


# Data

def drawn(split, side, seed):
    """Shapes of a split, uint8 (N, 3, side, side), and what each pixel shows, uint8 (N, side, side): 0 ground, 1 … 10
    the form, in the order of class_names."""
    images, labels, inside = draw_shapes(SHAPES[split], side, 2 * seed + (split == "validation"), masks=True)
    return images, ((labels[:, None, None] + 1) * inside).to(torch.uint8)


def central_square(image, side, kernel):
    """The central square of a PIL image, side×side."""
    w, h = image.size
    s = min(w, h)
    return image.resize((side, side), kernel, ((w - s) / 2, (h - s) / 2, (w + s) / 2, (h + s) / 2))


def read_pair(image, annotation, side):
    """An image and its annotation, central squares: uint8 (side, side, 3) and (side, side). Raises UserError."""
    try:
        indices = Image.open(annotation)
        indices.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{annotation}: can't be read as an image ({error})") from error
    check(indices.mode in ("L", "P"), "--data", annotation, f"must be a PNG of indices 0 to 255, but is {indices.mode}")
    picture = read_image(image, 1 << 16)  # so large that no JPEG is made smaller as it is decoded
    check(picture.size == indices.size, "--data", annotation, f"is {indices.size}, its image {picture.size}")
    picture = central_square(picture, side, Image.Resampling.BICUBIC)
    return np.array(picture), np.array(central_square(indices, side, Image.Resampling.NEAREST))


def annotated(folder, split, side, workers=0):
    """Images of a split of a folder in ADE20K's layout, uint8 (N, 3, side, side), and their annotations, uint8
    (N, side, side). Raises UserError."""
    places = [pathlib.Path(folder, kind, split) for kind in ("images", "annotations")]
    for place in places:
        check(place.is_dir(), "--data", folder, f"is not shapes, and no folder with {place.relative_to(folder)} in it")
    files = sorted(f for f in places[0].iterdir() if f.suffix.lower() in KINDS)
    check(files, "--data", places[0], "holds no images")
    notes = [places[1] / f"{file.stem}.png" for file in files]
    for note in notes:
        check(note.is_file(), "--data", note, "does not exist, but its image does")
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        images, masks = zip(*pool.map(read_pair, files, notes, [side] * len(files)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks))


# Probe

class DenseProbe(nn.Module):
    """Tokens (B, N, D) of square images → class scores of their pixels (B, classes, side, side)."""
    def __init__(self, dim, classes, side):
        super().__init__()
        self.layer, self.side = nn.Linear(dim, classes), side
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        grid = math.isqrt(x.shape[1])
        scores = self.layer(x).mT.unflatten(2, (grid, grid))  # (B, classes, grid, grid)
        return F.interpolate(scores, (self.side, self.side), mode="bilinear")


def pixel_loss(scores, truth, ignore):
    """Mean cross-entropy of scores (B, classes, H, W) over the pixels whose truth (B, H, W) is not `ignore`; 0 where
    there is none."""
    truth = truth.to(scores.device).long()
    return F.cross_entropy(scores, truth, ignore_index=ignore, reduction="sum") / (truth != ignore).sum().clamp(min=1)


def count_pixels(truth, guess, classes, ignore):
    """How many pixels of each true class are taken for each class, int64 (classes, classes), from uint8 (N, H, W)
    twice; `ignore` is left out of the truth."""
    kept = truth != ignore
    pairs = truth[kept].long() * classes + guess[kept].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def intersection_over_union(counts):
    """Of each class, from count_pixels; NaN for a class that does not occur in the truth."""
    hit = counts.diagonal().double()
    return torch.where(counts.sum(1) > 0, hit / (counts.sum(0) + counts.sum(1) - hit), torch.nan)


def segment(tokens, masks, others, classes, ignore, seed=0, progress=""):
    """A DenseProbe trained on `tokens` and `masks` uint8 (N, H, W); returns its guess for the Tokens `others`, uint8
    (Q, H, W)."""
    torch.manual_seed(seed)
    probe = DenseProbe(tokens.shape[2], classes, masks.shape[1]).to(tokens.mean.device)
    train_probe(probe, tokens, masks, RECIPE, lambda scores, truth: pixel_loss(scores, truth, ignore), progress)
    return torch.cat([probe(others[ids]).argmax(1).byte().cpu() for ids in torch.arange(len(others)).split(16)])


def raw_patches(images, grid, here, like=None):
    """The pixels of each of grid×grid patches as its token."""
    def encode(ids):
        x = normalize(images[ids].to(here.device) / 255)
        return F.pixel_unshuffle(x, x.shape[2] // grid).flatten(2).mT  # (B, N, P)
    return Tokens(encode, len(images), like)


# The program

def palette(classes):
    """A colour for each class, (classes, 3), 0…1: grey for the first, for the others twenty hues, repeated."""
    hues = matplotlib.colormaps["tab20"](np.arange(20))[[*range(0, 14, 2), *range(16, 20, 2), *range(1, 20, 2), 14], :3]
    return torch.from_numpy(np.concatenate([[[0.3, 0.3, 0.3]], np.resize(hues, (max(1, classes - 1), 3))])).float()


def evaluate(args):
    """Does what the command line asks and returns what is written to eval_dense.json. Raises UserError."""
    check(os.environ.get("WORLD_SIZE", "1") == "1", "torchrun", "eval_dense.py", "runs alone, on one device")
    check(0 <= args.ignore <= 255, "--ignore", args.ignore, "must be an index of annotations, 0 to 255")
    began, here = time.time(), start_processes(args.device)
    model, cfg = load_model(args.run)
    data, img = args.data or "shapes", cfg.img
    (images, masks), (asked, truth) = (
        drawn(split, img, cfg.seed) if data == "shapes" else annotated(data, split, img, cfg.workers)
        for split in ("training", "validation"))
    known, occurs = (set(part.flatten().bincount().nonzero()[:, 0].tolist()) - {args.ignore} for part in (masks, truth))
    check(len(known) > 1 and occurs, "--ignore", args.ignore, "leaves nothing to tell apart in the annotations; an "
          "index that they do not hold, say 254, ignores nothing")
    classes = 1 + max(known | occurs)
    names = ["ground", *class_names("shapes")] if data == "shapes" else [str(i) for i in range(classes)]
    print(f"{cfg.data} → {data}: {len(images):,} training images, {len(asked):,} test images of {img}×{img} pixels, "
          f"{len(known)} classes\nprobe: {', '.join(f'{k} {v}' for k, v in RECIPE.items())}", flush=True)

    def tokens(encoder):
        parts = [(x, None, torch.ones(len(x))) for x in (images, asked)]
        return tokens_of(encoder.to(here.device).eval(), parts, img, here, args.amp)[0]

    def patches():
        grid = math.isqrt(model.encoder.tokens(torch.zeros(1, 3, img, img, device=here.device)).shape[1])
        own = raw_patches(images, grid, here)
        return own, raw_patches(asked, grid, here, like=own)

    subjects = {"trained encoder": lambda: tokens(model.encoder)}
    if args.baselines:
        subjects["untrained encoder"] = lambda: tokens(load_model(args.run, trained=False)[0].encoder)
        subjects["raw patches"] = patches
    rows, each, guesses = {}, {}, {}
    print(f"{'':18} {'mean IoU':>9} {'pixels right':>13}  in %")
    for name, subject in subjects.items():
        own = others = None  # the tokens of the encoder before leave the memory
        own, others = subject()
        guesses[name] = segment(own, masks, others, classes, args.ignore, cfg.seed, f"{name}: {own}")
        counts = count_pixels(truth, guesses[name], classes, args.ignore)
        iou = intersection_over_union(counts)
        right = counts.diagonal().sum() / counts.sum()
        rows[name] = {"mean_iou": round(100 * iou.nanmean().item(), 2), "pixels_right": round(100 * right.item(), 2)}
        each[name] = {n: round(100 * v, 2) for n, v in zip(names, iou.tolist()) if not math.isnan(v)}
        print(f"{chr(13) + chr(27) + '[K' if sys.stdout.isatty() else ''}{name:18} {rows[name]['mean_iou']:9} "
              f"{rows[name]['pixels_right']:13}", flush=True)

    colours, first = palette(classes), torch.linspace(0, len(asked) - 1, min(10, len(asked))).long()

    def coloured(mask):
        picture = colours[mask.long().clamp(max=classes - 1)].permute(0, 3, 1, 2)
        return normalize(picture.masked_fill((mask == args.ignore)[:, None], 1))

    pictures = {"image": normalize(asked[first] / 255), "truth": coloured(truth[first])}
    pictures |= {name: coloured(guess[first]) for name, guess in guesses.items()}
    file, picture = (beside(args.run, f"eval_dense.{kind}", args.data) for kind in ("json", "png"))
    draw_images(picture, pictures, legend=dict(zip(names, colours.tolist())) if classes <= 20 else {})
    report = {"checkpoint": str(args.run), "data": data, "recipe": RECIPE, "percent": rows, "iou": each,
              "seconds": round(time.time() - began, 1)}
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds']} s; written: {file} and {picture.name}")
    return report


def main(argv=None):
    """The command line; returns the exit status of `answer`."""
    parser = Parser("eval_dense.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="the folder of a run, or one of its checkpoints")
    parser.add_argument("--data", default="", help="shapes (the default), or a folder in ADE20K's layout")
    parser.add_argument("--ignore", type=int, default=255, help="the index of pixels that do not count (default: 255)")
    parser.add_argument("--baselines", action="store_true", help="also the untrained encoder and raw patches")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 where it is there")
    return answer("eval_dense.py", lambda: evaluate(parser.parse_args(argv)), "take --device cpu")


if __name__ == "__main__":
    sys.exit(main())
