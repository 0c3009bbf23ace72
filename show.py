"""Pictures of what a run of any method has learned, on test images or your own.

    python show.py RUN                               test images of the run's data set
    python show.py RUN --folder DIR --out own.pdf    image files of a folder

Rows, at most twelve:
  whole image      where the model sees only the central square
  original, masked, reconstruction    of the central square; for MACRL of both branches' views
  view 1, view 2   of a training step; CMAE takes them from the box in the row above
  patch tokens     their first three principal components over all images, as red, green, blue
  attention        in the last block, mean over the heads; black: least, yellow: most
  masks of CAMAE's heads
Tokens, attention and box are of the unmasked image. With --norm-pixels, reconstructed patches
get their true mean and std. Writes show.png (of a file: show-FILE.png; with --folder
or --data: show-NAME.png).
"""
import argparse
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import draw_bounding_boxes

from augment import central_crop, crop_resize, normalize
from common import load_data, report_errors, require, start_processes
from eval_linear import load_model
from images import Images, UserError, find_images, largest_side, read_image, readable
from plots import plot_images
import matplotlib  # after plots, which sets the backend

ROWS = 12  # at most


# Rows: label → normalised images (n, 3, H, W). x: normalised central crops of the Images `images`.

def whole_rows(images):
    """Whole images in their proportions."""
    S, rows = images.pixels.shape[2], []
    for image, aspect in zip(images.pixels, images.aspect.tolist()):
        shape = [max(1, round(S * min(1, 1 / aspect))), max(1, round(S * min(1, aspect)))]
        image = F.interpolate(image[None] / 255, shape, mode="bilinear", antialias=True)
        rows.append(normalize(image)[0])
    return {"whole image\n(the model sees\nits centre)": rows}


def reconstruction_rows(model, x):
    """The images, what the model sees, and the reconstructions."""
    masked, prediction = model.reconstruct(x)
    if masked.equal(x):  # --mask 0
        return {"original": x}
    return {"original": x, "masked": masked, "reconstruction": prediction}


def branch_rows(module, model, images):
    """MACRL's branches. The target is drawn if it is not the view."""
    view1, view2, clean1, clean2 = module.views(images, model.cfg)
    rows = {}
    for branch, view, clean in (("s", view1, clean1), ("w", view2, clean2)):
        masked, prediction = model.reconstruct(view, branch)
        rows[f"branch {branch}:\nview"] = view
        if model.cfg.restore == "clean":
            rows[f"branch {branch}:\ntarget"] = clean
        rows[f"branch {branch}:\nmasked view"] = masked
        rows[f"branch {branch}:\nreconstruction"] = prediction
    return rows


def view_rows(module, model, images):
    """The two views of a training step, and CMAE's boxes, which its views are taken from."""
    cfg, rows, boxes = model.cfg, {}, []
    if hasattr(module, "semantic_boxes"):
        S = images.pixels.shape[2]
        whole = [torch.full((len(images),), side) for side in (0, 0, S, S)]
        whole = crop_resize(images, whole, cfg.img)                             # (n, 3, H, W), 0…1
        I = module.semantic_boxes(model.heat(normalize(whole)), cfg.k).cpu()
        boxes = [I]
        corners = (I[:, None, [1, 0, 3, 2]] * (cfg.img - 1)).round()            # x, y, x, y
        drawn = [draw_bounding_boxes(*pair, colors="white") for pair in zip(whole.cpu(), corners)]
        rows["box of the\nheat map"] = normalize(torch.stack(drawn))
    view1, view2 = module.views(images, cfg, *boxes)[:2]
    return rows | {"view 1": view1, "view 2": view2}


def token_rows(model, x):
    """Three principal components of all patch tokens."""
    components = principal_components(model.encoder.tokens(x).float())          # (n, N, 3)
    ends = torch.tensor([0.01, 0.99], device=x.device)
    low, high = components.flatten(0, 1).quantile(ends, 0)                      # (3,) each
    colors = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return {"patch tokens,\nthree principal\ncomponents": normalize(to_image(colors, x.shape[2]))}


def attention_rows(model, x, maps):
    """The mean of attention maps (n, K, N) over the heads, from least to most."""
    mean = maps.mean(1).cpu()                                                   # (n, N)
    low, high = mean.amin(1, keepdim=True), mean.amax(1, keepdim=True)
    colors = matplotlib.colormaps["inferno"](((mean - low) / (high - low)).numpy())[..., :3]
    query = "class token" if hasattr(model.encoder, "cls_token") else "mean query"
    return {f"attention of the\n{query},\nmean of {maps.shape[1]} heads":
            normalize(to_image(torch.from_numpy(colors).float(), x.shape[2]))}


def mask_rows(module, model, x, maps, room):
    """Images under the masks of CAMAE's first `room` heads."""
    rows, heads = {}, maps.shape[1]
    for k in range(min(room, heads)):
        mask = module.idm_mask(maps[:, k], model.cfg.mask)                      # (n, N)
        hidden = to_image(mask[:, :, None].float(), x.shape[2]) > 0             # (n, 1, H, W)
        rows[f"mask of head\n{k + 1} of {heads}"] = x.masked_fill(hidden, 0)
    return rows


# What the rows show

def attention_maps(encoder, x):
    """Attention (n, K, N) to the patches in the last layer with `qkv`, or None. The query is that
    of the class token or else the mean of all; position biases and Swin's windows are left out."""
    layers = [module for module in encoder.modules() if hasattr(module, "qkv")]
    if not layers:
        return None
    inputs = []
    hook = layers[-1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    encoder.features(x)
    hook.remove()
    tokens = inputs[0].flatten(1, -2)                                           # (n, N, D)
    heads = getattr(layers[-1], "heads", None) or layers[-1].num_heads          # Swin's name for K
    q, k, _ = layers[-1].qkv(tokens).float().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    cls = hasattr(encoder, "cls_token")
    q = q[:, :, :1] if cls else q.mean(2, keepdim=True)                         # (n, K, 1, d)
    maps = ((q * k).sum(3) / k.shape[3] ** 0.5).softmax(2)
    return maps[:, :, 1:] if cls else maps


def principal_components(tokens):
    """First three principal components of all tokens (n, N, D): (n, N, 3)."""
    centred = tokens.flatten(0, 1) - tokens.mean((0, 1))                        # (n·N, D)
    directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors           # by rising variance
    return (centred @ directions[:, -3:].flip(1)).unflatten(0, tokens.shape[:2])


def to_image(values, size):
    """Values (n, N, C) of the patches of square images → (n, C, size, size)."""
    side = round(values.shape[1] ** 0.5)
    return F.interpolate(values.mT.unflatten(2, (side, side)), (size, size))


# The program

def read_folder(folder, side, count):
    """The first images below a folder and their file names. Raises UserError."""
    files = find_images(folder)[:count]
    require(files, f"--folder {folder} holds no images")
    side = min(side, largest_side(files))
    pixels, aspect = [], []
    for file in files:
        try:
            image = read_image(file, side)
        except Exception as error:  # Pillow raises many kinds
            raise UserError(f"{readable(file)} cannot be read: {error}") from error
        aspect.append(image.width / image.height)
        pixels.append(np.array(image.resize((side, side), Image.Resampling.BICUBIC)))
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    names = [readable(Path(file).name) for file in files]
    return Images(pixels, aspect=torch.tensor(aspect)), names


@torch.no_grad()
def show(args):
    """Draws the picture. Raises UserError."""
    require(args.images > 0, f"--images {args.images} must be positive")
    run, source = Path(args.run), args.folder or args.data
    folder, name = (run, "show") if run.is_dir() else (run.parent, f"show-{run.stem}")
    name += f"-{Path(source).resolve().name}" if source else ""
    file = Path(args.out or folder / f"{name}.png")
    require(file.suffix in (".png", ".pdf", ".svg"), f"--out {file} must end in .png, .pdf or .svg")
    device, _, _ = start_processes(args.device)
    model, cfg = load_model(args.run)
    module = inspect.getmodule(model)
    names = ()
    if args.folder:
        images, names = read_folder(args.folder, round(cfg.img * 8 / 7), args.images)
    else:
        train, test = load_data(replace(cfg, data=args.data or cfg.data, images=0))
        images = test or train
        generator = torch.Generator().manual_seed(args.seed)
        images = images[torch.randperm(len(images), generator=generator)[:args.images]]

    model.to(device).eval()
    images = images.to(device)
    x = normalize(central_crop(images, cfg.img))                                # (n, 3, img, img)
    torch.manual_seed(args.seed)
    rows = {}
    if images.pixels.shape[2] > cfg.img or (images.aspect != 1).any():
        rows = whole_rows(images)
    if "branch" in inspect.signature(model.reconstruct).parameters:
        rows |= {"original": x} | branch_rows(module, model, images)
    else:
        rows |= reconstruction_rows(model, x) | view_rows(module, model, images)
    rows |= token_rows(model, x)
    maps = attention_maps(model.encoder, x)
    if maps is not None:
        rows |= attention_rows(model, x, maps)
        if hasattr(module, "idm_mask"):
            rows |= mask_rows(module, model, x, maps, ROWS - len(rows))
    plot_images(file, rows, names)
    print(f"written: {readable(file)}")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser("show.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, or a checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--folder", default="", help="show images of this folder")
    source.add_argument("--data", default="", help="show test images of this data set")
    parser.add_argument("--images", type=int, default=8, help="number (default: 8)")
    parser.add_argument("--out", default="", help="a .png, .pdf or .svg file")
    parser.add_argument("--seed", type=int, default=0, help="of images, masks and views")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    with report_errors(parser):
        show(args)


if __name__ == "__main__":
    main()
