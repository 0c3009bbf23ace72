"""What a model has learned to see: pictures of any method's run, on test images or on your own.

    python show.py runs/mvmae-DATE-TIME                        on test images of its data set
    python show.py RUN --images DIR --out FILE                 on the image files in DIR, drawn to FILE.png, .pdf, …

Rows: the images, masked, and restored; where the last block's attention goes (from the class token, or from the mean
query where there is none), mean over its heads, over the image and alone, and each head alone. Each map is stretched:
black is its least, light yellow its most. Then what only the run's method has: CMAE's boxes and crops, MACRL's
branches, CAMAE's masks. Writes show.png beside the checkpoint.
"""
import pathlib, sys

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import draw_bounding_boxes

from common import (Parser, answer, check, denormalize, draw_images, load_images, normalize, resize,
                    start_processes)
from eval_linear import load_model
from images import read_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


# Panels: (model, normalised images (n, 3, H, W)) → rows of the picture, label → normalised images (n, 3, H, W)

def reconstruction_panel(model, x):
    """The images, what of them the model saw, and what it restored."""
    masked, prediction = model.reconstruct(x)
    return {"original": x, "masked": masked, model.restored: prediction}


def attention_panel(model, x):
    """The last block's attention: the mean over its heads, over the image and alone, then each head."""
    attention = model.encoder.attention(x)                                                  # (n, K, N)
    mean = heat_map(attention.mean(1), x.shape[2])                                          # (n, 3, H, W)
    rows = {"attention,\nmean over heads,\nover the image": 0.35 * denormalize(x) + 0.65 * mean,
            "mean over heads\n(black least,\nyellow most)": mean}
    rows |= {f"head {k + 1}": heat_map(attention[:, k], x.shape[2]) for k in range(attention.shape[1])}
    return {label: normalize(row) for label, row in rows.items()}


def crop_panel(model, x):
    """CMAE's heat map M and box I over the image, and three crops around it; of this model, as if computed anew."""
    cmae, cfg = sys.modules[type(model).__module__], model.cfg
    heat, images = model.heat(x), denormalize(x)                                            # (n, side, side), 0…1
    boxes = cmae.semantic_boxes(heat, cfg.k).cpu()                                          # (n, 4)
    over = 0.5 * images + 0.5 * heat_map(heat.flatten(1), x.shape[2])
    corners = (boxes[:, None, [1, 0, 3, 2]] * (x.shape[2] - 1)).round()                     # (n, 1, 4) x, y, x, y
    over = [draw_bounding_boxes(image, box, colors="cyan") for image, box in zip(over.cpu(), corners)]
    rows = {"heat map and box": torch.stack(over).to(x.device)}
    for i in range(3):
        rows[f"crop {i + 1}"] = cmae.contrastive_crop(images, x.shape[2], (cfg.crop_min, 1.0), boxes, cfg.alpha)
    return {label: normalize(row) for label, row in rows.items()}


def idm_panel(model, x):
    """What each head's IDM mask leaves of the images."""
    camae, attention = sys.modules[type(model).__module__], model.encoder.attention(x)      # (n, K, N)
    rows = {}
    for k in range(attention.shape[1]):
        mask = camae.idm_mask(attention[:, k], model.cfg.mask)                              # (n, N)
        patches = camae.patchify(x, model.cfg.patch).masked_fill(mask[:, :, None], 0)
        rows[f"left by the mask\nof head {k + 1}"] = camae.unpatchify(patches, model.cfg.patch)
    return rows


def branch_panel(model, x):
    """MACRL's branches on crops of the images: what goes in, what of it is seen, what is restored, and the target."""
    macrl, rows = sys.modules[type(model).__module__], {}
    clean = macrl.clean_views(denormalize(x), model.cfg)
    for branch, target, view in zip("sw", clean, macrl.corrupt(clean, model.cfg)):
        target = normalize(target) if model.cfg.restore == "clean" else view
        masked, prediction = model.reconstruct(view, branch, target)
        rows |= {f"branch {branch}:\nview": view, f"branch {branch}:\nmasked": masked,
                 f"branch {branch}:\n{model.restored}": prediction, f"branch {branch}:\ntarget": target}
    return rows


PANELS = {"every method": [reconstruction_panel, attention_panel], "cmae": [crop_panel], "macrl": [branch_panel],
          "camae": [idm_panel]}


def heat_map(values, size):
    """Values (n, N) of the patches of square images as colours 0…1, (n, 3, size, size), from their least to most."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scaled = (values - low) / (high - low).clamp(min=1e-12)                                 # 0…1
    colours = torch.from_numpy(plt.get_cmap("inferno")(scaled.cpu().numpy())[..., :3])      # (n, N, 3)
    side = int(values.shape[1] ** 0.5)
    colours = colours.mT.unflatten(2, (side, side)).float()                                 # (n, 3, side, side)
    return F.interpolate(colours, (size, size)).to(values.device)


def own_images(folder, size, count):
    """The first `count` image files in `folder`: their central squares, uint8 (n, 3, size, size). Raises UserError."""
    check(pathlib.Path(folder).is_dir(), "--images", folder, "is not a folder")
    files = sorted(f for f in pathlib.Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)[:count]
    check(files, "--images", folder, f"holds no image ({' '.join(sorted(SUFFIXES))})")
    squares = np.stack([read_image(f, size).resize((size, size)) for f in files])
    return torch.from_numpy(squares).permute(0, 3, 1, 2)


def show(args):
    """Draws what the command line asks for; returns the file. Raises UserError."""
    check(args.count >= 1, "--count", args.count, "must be at least 1")
    folder = pathlib.Path(args.run)
    file = pathlib.Path(args.out) if args.out else (folder if folder.is_dir() else folder.parent) / "show.png"
    check(file.parent.is_dir(), "--out", file, "is in no folder that exists")
    check(file.suffix in (".png", ".pdf", ".svg"), "--out", file, "must end in .png, .pdf or .svg")
    here = start_processes(args.device)
    model, cfg = load_model(args.run)
    if args.images:
        images = own_images(args.images, cfg.img, args.count)
    else:
        images, *_ = load_images(args.data or cfg.data, "test", cfg.img, args.root or cfg.root, cfg.workers, cfg.seed)
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:args.count]]
    x = normalize(resize(images.to(here.device), cfg.img))
    model.to(here.device).eval()
    torch.manual_seed(args.seed)
    rows = {}
    with torch.no_grad():
        for panel in PANELS["every method"] + PANELS.get(type(model).__module__, []):
            rows.update(panel(model, x))
    draw_images(file, rows)
    print(f"written: {file}")
    return file


def main(argv=None):
    """The command line; returns the exit status of `answer`."""
    parser = Parser("show.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="the folder of a run, or one of its checkpoints")
    parser.add_argument("--images", default="", help="a folder of image files to show instead of test images")
    parser.add_argument("--out", default="", help="the picture to write (default: show.png beside the checkpoint)")
    parser.add_argument("--data", default="", help="another data set than the run's: a name or a folder")
    parser.add_argument("--root", default="", help="where data sets are kept, if not where the run had them")
    parser.add_argument("--count", type=int, default=8, help="how many images")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of test images and of the masks")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    return answer("show.py", lambda: show(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
