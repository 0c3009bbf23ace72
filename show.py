"""What a model has learned to see: pictures of any method's run, on test images or on your own.

    python show.py runs/mvmae-DATE-TIME                        on test images of its data set
    python show.py RUN --images DIR --out own.pdf              on the image files in DIR; also to .png or .svg

Rows of the picture, on test images (training images where there are none):
  whole image     where the model sees only its central square
  original, masked, reconstruction
  tokens          the first three principal components of the patches' tokens, of all images shown together, as red,
                  green and blue: patches of one colour are alike to the model
  attention       where the last block's attention goes, from the class token, or from the mean query where there is
                  none: the mean over its heads, over the image and alone, then each head alone. Each map is stretched:
                  black is its least value, light yellow its most
  the method's    CMAE's boxes and crops, MACRL's branches, CAMAE's masks
What is transparent in your images is white. Writes show.png beside the checkpoint.
"""
import os, pathlib, sys
from dataclasses import replace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.utils import draw_bounding_boxes

from common import (Parser, answer, central_crop, check, denormalize, draw_images, load_data, normalize,
                    start_processes)
from eval_linear import load_model
from images import KINDS, read_image
from pictures import reconstruction_rows, restored_label


# Panels: (model, normalised images (n, 3, H, W)) → rows of the picture, label → normalised images (n, 3, H, W)

def tokens_panel(model, x):
    """The first three principal components of the patches' tokens of all images."""
    tokens = model.encoder.tokens(x).float()  # (n, N, D)
    components = principal_components(tokens)  # (n, N, 3)
    low, high = components.flatten(0, 1).quantile(torch.tensor([0.01, 0.99], device=x.device), 0)  # (3) each
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)  # (n, N, 3)
    return {"tokens: their first\nthree principal\ncomponents": normalize(patches_to_image(colours, x))}


def attention_panel(model, x):
    """The last block's attention: the mean over its heads, over the image and alone, then each head."""
    attention = attention_maps(model.encoder, x)  # (n, K, N)
    mean = heat_map(attention.mean(1), x)  # (n, 3, H, W)
    rows = {"attention,\nmean over heads,\nover the image": 0.35 * denormalize(x) + 0.65 * mean,
            "mean over heads\n(black least,\nyellow most)": mean}
    rows |= {f"head {k + 1}": heat_map(attention[:, k], x) for k in range(attention.shape[1])}
    return {label: normalize(row) for label, row in rows.items()}


def crop_panel(model, x):
    """CMAE's heat map M and box I over the central square, and three crops around the box, by this model. (Training
    computes them from whole squeezed images, so that its boxes differ.)"""
    cmae, cfg = sys.modules[type(model).__module__], model.cfg
    heat, images = model.heat(x), denormalize(x)  # (n, side, side), (n, 3, H, W), both 0…1
    boxes = cmae.semantic_boxes(heat, cfg.k).cpu()  # (n, 4)
    over = 0.5 * images + 0.5 * heat_map(heat.flatten(1), x)
    corners = (boxes[:, None, [1, 0, 3, 2]] * (x.shape[2] - 1)).round()  # (n, 1, 4) x, y, x, y
    over = [draw_bounding_boxes(image, box, colors="cyan") for image, box in zip(over.cpu(), corners)]
    rows = {"heat map and box": torch.stack(over).to(x.device)}
    for i in range(3):
        rows[f"crop {i + 1}"] = cmae.contrastive_crop(images, x.shape[2], (cfg.crop_min, 1.0), boxes, cfg.alpha)
    return {label: normalize(row) for label, row in rows.items()}


def idm_panel(model, x):
    """What each head's IDM mask leaves of the images."""
    camae, attention = sys.modules[type(model).__module__], model.encoder.attention(x)  # (n, K, N)
    rows = {}
    for k in range(attention.shape[1]):
        mask = camae.idm_mask(attention[:, k], model.cfg.mask)  # (n, N)
        patches = camae.patchify(x, model.cfg.patch).masked_fill(mask[:, :, None], 0)
        rows[f"left by the mask\nof head {k + 1}"] = camae.unpatchify(patches, model.cfg.patch)
    return rows


def branch_panel(model, x):
    """MACRL's branches on crops of the images: what goes in, what of it is seen, what is restored, and the target."""
    macrl, rows = sys.modules[type(model).__module__], {}
    clean = macrl.clean_views(denormalize(x), model.cfg)
    for branch, target, view in zip("sw", clean, macrl.change_colours(clean, model.cfg)):
        target = normalize(target) if model.cfg.restore == "clean" else view
        masked, prediction = model.reconstruct(view, branch, target)
        rows |= {f"branch {branch}:\nview": view, f"branch {branch}:\nmasked": masked,
                 f"branch {branch}:\n{restored_label(model)}": prediction, f"branch {branch}:\ntarget": target}
    return rows


PANELS = {"every method": [reconstruction_rows, tokens_panel, attention_panel], "cmae": [crop_panel],
          "macrl": [branch_panel], "camae": [idm_panel]}


# What the panels show

def attention_maps(encoder, x):
    """How the last block of any method's encoder attends to the patches of normalised images (n, 3, H, W): (n, K, N).

    Of each of the K heads the softmax over all tokens of the class token's query, or of the tokens' mean query where
    there is no class token. Biases for places (Swin, HiViT) and Swin's windows are left out.
    """
    attention = [module for module in encoder.modules() if hasattr(module, "qkv")][-1]
    entering = []
    hook = attention.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    try:
        encoder.features(x)
    finally:
        hook.remove()
    tokens = entering[0].flatten(1, -2)  # (n, N, D); Swin has (n, h, w, D)
    heads = getattr(attention, "heads", None) or attention.num_heads  # K; torchvision's name in Swin
    q, k, _ = attention.qkv(tokens).float().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (n, K, N, d)
    has_class_token = hasattr(encoder, "cls_token")
    q = q[:, :, :1] if has_class_token else q.mean(2, keepdim=True)  # (n, K, 1, d)
    maps = ((q * k).sum(3) / k.shape[3] ** 0.5).softmax(2)  # (n, K, N), or one more
    return maps[:, :, 1:] if has_class_token else maps


def principal_components(tokens):
    """The first three principal components of tokens (n, N, D), n and N taken together: (n, N, 3)."""
    centred = tokens.flatten(0, 1) - tokens.mean((0, 1))  # (n·N, D)
    directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors  # (D, D), least variance first
    return (centred @ directions[:, -3:].flip(1)).unflatten(0, tokens.shape[:2])


def patches_to_image(colours, x):
    """Colours (n, N, 3) of the patches of square images x (n, 3, H, W) → (n, 3, H, W)."""
    side = int(colours.shape[1] ** 0.5)
    return F.interpolate(colours.mT.unflatten(2, (side, side)), x.shape[2:])


def heat_map(values, x):
    """Values (n, N) of the patches of square images x (n, 3, H, W) as colours 0…1, (n, 3, H, W), from their least to
    most."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scaled = (values - low) / (high - low).clamp(min=1e-12)  # 0…1
    colours = torch.from_numpy(matplotlib.colormaps["inferno"](scaled.cpu().numpy())[..., :3]).float()  # (n, N, 3)
    return patches_to_image(colours.to(x.device), x)


# Images

def on_white(file):
    """An image file as training reads it, in full size, and what is transparent in it white. Raises UserError."""
    picture = read_image(file, 2 ** 16)
    with Image.open(file) as image:
        if not image.has_transparency_data:
            return picture
        opaque = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    return Image.composite(picture, Image.new("RGB", picture.size, "white"), opaque)


def own_images(folder, side, count):
    """The first `count` image files in `folder`, as load_images has images: uint8 (n, 3, side, side) and their aspect
    (n,); and the files' names. Raises UserError."""
    check(pathlib.Path(folder).is_dir(), "--images", folder, "is not a folder")
    files = sorted(f for f in pathlib.Path(folder).rglob("*")
                   if f.is_file() and f.suffix.lower() in KINDS)[:count]
    check(files, "--images", folder, f"holds no image ({' '.join(KINDS)})")
    pictures = [on_white(file) for file in files]
    squeezed = np.stack([p.resize((side, side), Image.Resampling.BICUBIC) for p in pictures])  # (n, side, side, 3)
    aspect = torch.tensor([p.width / p.height for p in pictures])
    return torch.from_numpy(squeezed).permute(0, 3, 1, 2), aspect, [file.name for file in files]


def whole(image, aspect):
    """A squeezed uint8 image (3, S, S) in its own proportions, normalised, its longer side S."""
    S = image.shape[1]
    size = [max(1, round(S * min(1, 1 / aspect))), max(1, round(S * min(1, aspect)))]
    return normalize(F.interpolate(image[None] / 255, size, mode="bilinear", antialias=True)[0])


def show(args):
    """Draws what the command line asks for; returns the file. Raises UserError."""
    check(os.environ.get("WORLD_SIZE", "1") == "1", "torchrun", "show.py", "runs alone, on one device")
    check(args.count >= 1, "--count", args.count, "must be at least 1")
    check(0 <= args.seed < 2 ** 32, "--seed", args.seed, "must be at least 0 and below 2^32")
    check(not (args.images and args.data), "--data", args.data, "and --images exclude each other")
    folder = pathlib.Path(args.run)
    file = pathlib.Path(args.out) if args.out else (folder if folder.is_dir() else folder.parent) / "show.png"
    check(file.parent.is_dir(), "--out", file, "is in no folder that exists")
    check(file.suffix in (".png", ".pdf", ".svg"), "--out", file, "must end in .png, .pdf or .svg")
    here = start_processes(args.device)
    model, cfg = load_model(args.run)
    names = ()
    if args.images:
        images, aspect, names = own_images(args.images, cfg.store or round(cfg.img * 8 / 7), args.count)
    else:
        train, test = load_data(replace(cfg, data=args.data or cfg.data, root=args.root or cfg.root, images=0))
        images, _, aspect = test or train
        ids = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:args.count]
        images, aspect = images[ids], aspect[ids]
    x = normalize(central_crop(images.to(here.device), cfg.img, aspect))
    model.to(here.device).eval()
    torch.manual_seed(args.seed)
    rows = {}
    if images.shape[2] > cfg.img or (aspect != 1).any():
        wholes = [whole(image, a) for image, a in zip(images, aspect.tolist())]
        rows["whole image\n(the model sees\nits centre)"] = wholes
    with torch.no_grad():
        for panel in PANELS["every method"] + PANELS.get(type(model).__module__, []):
            rows.update(panel(model, x))
    draw_images(file, rows, names)
    print(f"written: {file}")
    return file


def main(argv=None):
    """The command line; returns the exit status of `answer`."""
    parser = Parser("show.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="the folder of a run, or one of its checkpoints")
    parser.add_argument("--images", default="", help="a folder of image files to show instead of test images")
    parser.add_argument("--out", default="",
                        help="the picture to write, .png, .pdf or .svg (default: show.png beside the checkpoint)")
    parser.add_argument("--data", default="", help="another data set than the run's: a name or a folder")
    parser.add_argument("--root", default="", help="where data sets are kept, if not where the run had them")
    parser.add_argument("--count", type=int, default=8, help="how many images")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of test images and of the masks")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    return answer("show.py", lambda: show(parser.parse_args(argv)), "lower --count")


if __name__ == "__main__":
    sys.exit(main())
