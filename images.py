"""Images: the data sets, batches of them on the device, and augmentation.

Image batches are (B, 3, H, W). Crops take uint8 or floats in 0…1 and give floats, which the other augmentations take
and give. All draw each image's own random numbers on the CPU, where nothing waits for them, and compute on the images'
device.
"""
import hashlib, math, os, pathlib, sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set, so that weights travel
SETS = ("cifar10", "cifar100", "stl10", "tiny-imagenet")
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


class UserError(ValueError):
    """Something the user can put right; the command line answers it with this one line and exit status 2."""


def check(ok, flag, value, right):
    """Raises UserError "FLAG VALUE: RIGHT" unless `ok`."""
    if not ok:
        raise UserError(f"{flag} {value}: {right}")


# Data

def load_images(data, split, size, root="data", workers=0, seed=0):
    """Images uint8 (N, 3, S, S) and labels int64 (N,), -1 for unlabelled, of the split "train" or "test".

    `data` is a name of SETS, "shapes", or a folder. S is `size`, or the set's own side where that is smaller, for
    enlarging is the augmentation's work. Raises UserError: a set not to be had, an unreadable image, unknown classes.
    """
    if data == "shapes":
        images, labels = draw_shapes(5_000 if split == "train" else 1_000, min(size, 64), 2 * seed + (split == "test"))
        return images, labels, torch.ones(len(images))
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()  # the first process downloads and decodes, the others find it done
    if data in ("cifar10", "cifar100", "stl10"):
        part = download(data, split, root)
        pixels, labels = torch.from_numpy(part.data), torch.tensor(part.labels if data == "stl10" else part.targets)
        images = pixels if data == "stl10" else pixels.permute(0, 3, 1, 2).contiguous()
        if size < images.shape[-1]:
            images = torch.cat([(resize(x, size) * 255).round().byte() for x in images.split(256)])
    else:
        folder = download(data, split, root) if data == "tiny-imagenet" else data
        images, labels = load_folder(folder, split, size, root, workers)
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    return images, labels.long(), torch.ones(len(images))


def download(data, split, root):
    """A set of SETS, fetched into `root` unless it is there: torchvision's data set, or Tiny-ImageNet's folder."""
    folder = pathlib.Path(root, "tiny-imagenet-200")
    try:
        if data == "stl10":
            return datasets.STL10(root, "train+unlabeled" if split == "train" else split, download=True)
        if data != "tiny-imagenet":
            kind = datasets.CIFAR10 if data == "cifar10" else datasets.CIFAR100
            return kind(root, split == "train", download=True)
        if not folder.exists():  # unpacked aside and then moved: an interrupted one is never taken for the whole
            datasets.utils.download_and_extract_archive(TINY_IMAGENET[0], root, f"{folder}.part", md5=TINY_IMAGENET[1])
            os.replace(pathlib.Path(f"{folder}.part", folder.name), folder)
        return folder
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data {data}: can't be downloaded ({error}). Without a network: put its archive into "
                        f"--root {root}, or name a folder of images, or take --data shapes") from error


def load_folder(folder, split, size, root, workers):
    """FOLDER/train/CLASS/… and FOLDER/test or val/CLASS/…, decoded once into a memory-mapped file in root/cache."""
    folder = pathlib.Path(folder)
    check((folder / "train").is_dir(), "--data", folder, f"is none of {', '.join(SETS)}, shapes, and no folder that "
          "holds train/CLASS/IMAGE and test/CLASS/IMAGE")
    notes = folder / "val" / "val_annotations.txt"  # Tiny-ImageNet's val/: one folder, and a list of its classes
    is_val = notes.exists() or not (folder / "test").is_dir()
    place = folder / ("train" if split == "train" else "val" if is_val else "test")
    if split == "test" and notes.exists():
        listed = [line.split()[:2] for line in notes.read_text().splitlines()]
        files, names = [place / "images" / file for file, _ in listed], [name for _, name in listed]
    else:
        kinds = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
        files = sorted(f for f in place.rglob("*") if f.suffix.lower() in kinds)
        names = [f.relative_to(place).parts[0] for f in files]
    check(files, "--data", folder, f"{place} holds no images")
    classes = {name: i for i, name in enumerate(class_names(folder, root))}
    strange = sorted(set(names) - set(classes))
    check(not strange, "--data", folder, f"{place} has {strange[:1]}, which is no class of train/")

    side = min(size, max(min(read_image(f, size).size) for f in files[::1 + len(files) // 100]))
    state = "".join(f"{f.relative_to(folder)} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
    place_hash, state_hash = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in (str(folder.resolve()), state))
    cache = pathlib.Path(root, "cache", f"{folder.resolve().name}-{place_hash}-{split}-{side}-")
    whole = cache.with_name(f"{cache.name}{state_hash}.npy")
    if not whole.exists():  # its name says which files, of which size and date, it was made from
        cache.parent.mkdir(parents=True, exist_ok=True)
        for old in cache.parent.glob(f"{cache.name}*.npy"):
            old.unlink()
        part = whole.with_suffix(f".{os.getpid()}.part")
        try:
            decode(files, place, side, workers, part)
            os.replace(part, whole)
        finally:
            part.unlink(missing_ok=True)
    return torch.from_numpy(np.load(whole, mmap_mode="c")), torch.tensor([classes[name] for name in names])


def decode(files, place, side, workers, target):
    """Writes the central squares of image files as a uint8 array (N, 3, side, side) to the file `target`."""
    array = np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), 3, side, side))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for i, image in enumerate(pool.map(lambda f: np.asarray(square(read_image(f, side), side)), files)):
            array[i] = image.transpose(2, 0, 1)
            if i + 1 == len(files) or sys.stdout.isatty() and i % 500 == 0:
                start, end = ("\r", "") if sys.stdout.isatty() and i + 1 < len(files) else ("", "\n")
                print(f"{start}decoding {place}, once: {i + 1:,} of {len(files):,}", end=end, flush=True)
    array.flush()


def class_names(data, root="data"):
    """Names of the classes of `data`, in the order of the labels. The set must have been loaded before."""
    if data == "shapes":
        return "disc ring square frame diamond triangle plus cross pillars stripes".split()
    if data in ("cifar10", "cifar100"):
        return (datasets.CIFAR10 if data == "cifar10" else datasets.CIFAR100)(root).classes
    if data == "stl10":
        return datasets.STL10(root, "test").classes
    folder = pathlib.Path(root, "tiny-imagenet-200") if data == "tiny-imagenet" else pathlib.Path(data)
    return sorted(d.name for d in (folder / "train").iterdir() if d.is_dir())


def read_image(file, side):
    """A file as a PIL image in RGB; a JPEG is decoded no larger than `side` needs. Raises UserError with the path."""
    try:
        image = Image.open(file)
        image.draft("RGB", (side, side))
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: can't be read as an image ({error}); mend it or take it away") from error


def square(image, side):
    """The central square of a PIL image, side×side."""
    w, h = image.size
    s = min(w, h)
    return image.resize((side, side), Image.BICUBIC, ((w - s) / 2, (h - s) / 2, (w + s) / 2, (h + s) / 2))


def draw_shapes(n, side, seed):
    """Ten classes of form, uint8 (n, 3, side, side) and labels: each has all colours, places, sizes and tilts alike."""
    forms = (lambda u, v, r, m: r < 0.95, lambda u, v, r, m: (r < 1) & (r > 0.6),
             lambda u, v, r, m: m < 0.8, lambda u, v, r, m: (m < 0.9) & (m > 0.5),
             lambda u, v, r, m: u.abs() + v.abs() < 1.1, lambda u, v, r, m: (v < 0.8) & (2 * u.abs() - 1 < v),
             lambda u, v, r, m: (m < 1) & (torch.minimum(u.abs(), v.abs()) < 0.25),
             lambda u, v, r, m: (m < 0.8) & (torch.minimum((u + v).abs(), (u - v).abs()) < 0.35),
             lambda u, v, r, m: (m < 0.9) & (torch.cos(3.5 * torch.pi * u) > 0),
             lambda u, v, r, m: (m < 0.9) & (torch.cos(3.5 * torch.pi * v) > 0))
    g, axis = torch.Generator().manual_seed(seed), (torch.arange(2 * side) + 0.5) / side - 1
    images, labels = torch.empty(n, 3, side, side, dtype=torch.uint8), torch.arange(n) % len(forms)
    for kind, form in enumerate(forms):
        mine = labels == kind
        x, y, size, tilt, *colours = torch.rand(7, int(mine.sum()), 1, 1, generator=g)
        size, tilt = 0.35 + 0.35 * size, 0.6 * (tilt - 0.5)
        x, y = (axis - (1 - size) * (2 * x - 1)) / size, (axis[:, None] - (1 - size) * (2 * y - 1)) / size
        u, v = x * tilt.cos() - y * tilt.sin(), x * tilt.sin() + y * tilt.cos()
        inside = form(u, v, torch.hypot(u, v), torch.maximum(u.abs(), v.abs())).float()    # drawn at twice the size
        ground = 0.2 + 0.6 * (torch.stack(colours, 1) > 0.5)                               # eight colours
        noise = 0.04 * torch.randn(len(x), 3, side, side, generator=g)
        image = torch.lerp(ground, 1 - ground, F.avg_pool2d(inside[:, None], 2)) + noise
        images[mine] = (image.clamp(0, 1) * 255).byte()
    return images, labels


class Batches:
    """`batches[step]`: this process's share of the images of a step, uint8 (B, 3, S, S) on its device.

    An epoch runs over all images in an order that (seed, epoch) alone decides, and leaves out what fills no batch.
    `among`: ids of the images that it runs over, if not all. Images stay on the GPU if they take less than a quarter of
    it; else they stream from memory or the mapped file.
    """
    def __init__(self, data, batch, seed, here, among=None):
        images = data[0]
        self.among = torch.arange(len(images)) if among is None else among
        check(batch * here.world <= len(self.among), "--batch", batch,
              f"there are only {len(self.among)} training images")
        room = torch.cuda.mem_get_info(here.device)[0] // 4 if here.device.type == "cuda" else 0
        self.images = images.to(here.device) if images.nbytes < room else images
        self.batch, self.seed, self.here, self.epoch = batch, seed, here, None

    def __len__(self):
        return len(self.among) // (self.batch * self.here.world)

    def ids(self, step):
        """Which images `batches[step]` holds, int64 (B,)."""
        epoch, i = divmod(step, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, self.among[torch.randperm(len(self.among), generator=generator)]
        return self.order[(i * self.here.world + self.here.rank) * self.batch:][:self.batch]

    def __getitem__(self, step):
        x = self.images[self.ids(step).to(self.images.device, non_blocking=True)]
        x = x if x.device == self.here.device else x.pin_memory().to(self.here.device, non_blocking=True)
        return x, torch.ones(len(x), device=x.device)


# Augmentation

def normalize(images):
    """0…1 to ImageNet's mean 0 and standard deviation 1."""
    mean, std = (torch.tensor(v).to(images.device, non_blocking=True)[:, None, None] for v in (MEAN, STD))
    return images.sub(mean).div_(std)


def denormalize(images):
    """The inverse of `normalize`, cut to 0…1."""
    mean, std = (torch.tensor(v).to(images.device, non_blocking=True)[:, None, None] for v in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


def resize_weights(start, length, size, n):
    """(B, size, n): how row o of a linear resize of [start, start + length) to `size` weighs the n input pixels.

    A triangle as wide as an output pixel, but no narrower than an input pixel: antialiasing when it shrinks.
    """
    start, scale, pixel = start[:, None, None], length[:, None, None] / size, torch.arange(n, device=start.device)
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale - 0.5
    weights = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel >= start) & (pixel < start + length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def crop_resize(images, boxes, size):
    """Crops boxes (top, left, height, width: each int64 (B,), in pixels) and resizes them to (B, 3, size, size)."""
    top, left, height, width = (b.to(images.device, non_blocking=True) for b in boxes)
    rows = resize_weights(top, height, size, images.shape[2])[:, None]                     # (B, 1, size, H)
    columns = resize_weights(left, width, size, images.shape[3])[:, None]                  # (B, 1, size, W)
    return rows @ (images / 255 if images.dtype == torch.uint8 else images) @ columns.mT   # (B, 3, size, size)


def resize(images, size):
    """The whole images at size×size; nothing random."""
    B, _, H, W = images.shape
    return crop_resize(images, [torch.full((B,), n) for n in (0, 0, H, W)], size)


def central_crop(images, size, aspect=None):
    return resize(images, size)


def crop_boxes(B, H, W, scale, ratio):
    """B boxes (top, left, height, width) by RandomResizedCrop's laws, within H×W pixels.

    Area uniform in `scale`, log aspect uniform in log `ratio`, place uniform; the first of ten tries that fits.
    """
    area, aspect = H * W * torch.empty(B, 10).uniform_(*scale), torch.empty(B, 10).uniform_(*map(math.log, ratio)).exp()
    width, height = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (width >= 1) & (width <= W) & (height >= 1) & (height <= H)
    first = fits.int().argmax(1, keepdim=True)
    width = torch.where(fits.any(1), width.gather(1, first)[:, 0], W)
    height = torch.where(fits.any(1), height.gather(1, first)[:, 0], H)
    return (torch.rand(B) * (H - height + 1)).long(), (torch.rand(B) * (W - width + 1)).long(), height, width


def random_resized_crop(images, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random box of each image, resized to (B, 3, size, size)."""
    return crop_resize(images, crop_boxes(len(images), *images.shape[2:], scale, ratio), size)


def apply_to(images, chosen, change, *values):
    """Replaces, in place, the images where `chosen` (bool (B,), on the CPU) by change(these images, their values)."""
    ids = chosen.nonzero().flatten()
    if len(ids):
        where, *values = (v.to(images.device, non_blocking=True) for v in (ids, *(v[ids] for v in values)))
        images.index_copy_(0, where, change(images[where], *values))
    return images


def random_hflip(images, p=0.5):
    """Mirrors each image with probability p."""
    return apply_to(images.clone(), torch.rand(len(images)) < p, lambda x: x.flip(3))


def grayscale(images):
    """Luma (B, 1, H, W), weighed as torchvision does."""
    r, g, b = images.split(1, 1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def random_grayscale(images, p=0.2):
    """Makes each image grey with probability p."""
    return apply_to(images.clone(), torch.rand(len(images)) < p, lambda x: grayscale(x).expand_as(x))


def adjust_brightness(images, factor):
    """Blends with black: factor (B,) ≥ 0, 1 changes nothing."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images, factor):
    """Blends with the image's mean grey: factor (B,) ≥ 0, 1 changes nothing."""
    mean, factor = grayscale(images.mean((2, 3), keepdim=True)), factor[:, None, None, None]
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images, factor):
    """Blends with grey: factor (B,) ≥ 0, 1 changes nothing."""
    return torch.lerp(grayscale(images).expand_as(images), images, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(images, factor):
    """Turns the hue by `factor` (B,) of the colour circle, -0.5…0.5."""
    r, g, b = images.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma, red, green = high - low, high == r, high == g
    hue = torch.where(red, g - b, torch.where(green, b - r, r - g)) / chroma.clamp(min=1e-9)
    hue += torch.where(red, 0.0, torch.where(green, 2.0, 4.0)) + 6 * factor[:, None, None]  # in sixths of the circle
    hue -= 6 * (hue / 6).floor_()                                                          # 0 … 6
    pure = torch.stack(((hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()), 1).clamp_(0, 1)
    return torch.addcmul(low[:, None], chroma[:, None], pure)                              # red at 0, green 2, blue 4


def color_jitter(images, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8):
    """With probability p the four changes in random order, factors uniform in 1 ± strength (hue: 0 ± strength)."""
    B, changes = len(images), (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    factors = [torch.empty(B).uniform_(max(0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
    factors.append(torch.empty(B).uniform_(-hue, hue))
    order, chosen, images = torch.rand(B, 4).argsort(1), torch.rand(B) < p, images.clone()
    for turn in range(4):
        for i, change in enumerate(changes):
            images = apply_to(images, chosen & (order[:, turn] == i), change, factors[i])
    return images


def gaussian_blur(images, p=0.5, sigma=(0.1, 2.0)):
    """With probability p a Gaussian blur, its deviation uniform in `sigma` (pixels): two matrix products."""
    def blur(x, s):
        squares = [(torch.arange(n, device=x.device) - torch.arange(n, device=x.device)[:, None]) ** 2
                   for n in x.shape[2:]]
        rows, columns = (torch.softmax(-d / (2 * s[:, None, None] ** 2), 2)[:, None] for d in squares)
        return rows @ x @ columns.mT                                                       # rows (B, 1, H, H)
    sigmas = torch.empty(len(images)).uniform_(*sigma)
    return apply_to(images.clone(), torch.rand(len(images)) < p, blur, sigmas) if p > 0 else images


def warp(images, xx=1.0, xy=0.0, yx=0.0, yy=1.0, x=0.0, y=0.0):
    """Resamples, bilinear, black outside: the pixel at (u, v) is fetched from (xx·u + xy·v + x, yx·u + yy·v + y), in
    half sides from the centre, v downwards; each a number or one for each image (B,)."""
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
