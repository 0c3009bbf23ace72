"""Data sets and image folders as one uint8 tensor, in memory or memory-mapped.

Images are stored whole, squeezed to S×S squares; `aspect` keeps their width over height.
"""
import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
DOWNLOADS = {"cifar10": torchvision.datasets.CIFAR10.url,
             "cifar100": torchvision.datasets.CIFAR100.url,
             "stl10": torchvision.datasets.STL10.url,
             "tiny-imagenet": "http://cs231n.stanford.edu/tiny-imagenet-200.zip"}
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
SHAPES = {  # masks of u, v: coordinates, r: their length, m: the larger one
    "disc": lambda u, v, r, m: r < 0.95,
    "ring": lambda u, v, r, m: (r < 1) & (r > 0.6),
    "square": lambda u, v, r, m: m < 0.8,
    "frame": lambda u, v, r, m: (m < 0.9) & (m > 0.5),
    "diamond": lambda u, v, r, m: u.abs() + v.abs() < 1.1,
    "triangle": lambda u, v, r, m: (v < 0.8) & (2 * u.abs() - 1 < v),
    "plus": lambda u, v, r, m: (m < 1) & (torch.minimum(u.abs(), v.abs()) < 0.25),
    "cross": lambda u, v, r, m: (m < 0.8) & ((u.abs() - v.abs()).abs() < 0.35),
    "pillars": lambda u, v, r, m: (m < 0.9) & (torch.cos(3.5 * torch.pi * u) > 0),
    "stripes": lambda u, v, r, m: (m < 0.9) & (torch.cos(3.5 * torch.pi * v) > 0),
}


class UserError(Exception):
    """A mistake that the user can correct; programs print it and exit with status 2."""


@dataclass
class Images:
    """A data set or a batch of N images."""
    pixels: torch.Tensor  # uint8 (N, 3, S, S)
    labels: torch.Tensor = None  # int64 (N,), -1 if unknown; None: all unknown
    aspect: torch.Tensor = None  # float32 (N,), width over height of the original; None: 1
    classes: tuple = ()  # class names in the order of the labels

    def __post_init__(self):
        N = len(self.pixels)
        self.labels = torch.full((N,), -1) if self.labels is None else self.labels
        self.aspect = torch.ones(N) if self.aspect is None else self.aspect

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, ids):
        return Images(self.pixels[ids], self.labels[ids], self.aspect[ids], self.classes)

    def to(self, device):
        """The same with the pixels on `device`."""
        return replace(self, pixels=self.pixels.to(device))


def load_images(data, split, side, root="data", seed=0):
    """The split "train" or "test" of a data set or folder as Images; None if a folder has no test.

    Images larger than `side` are shrunk to it. In a distributed run the first process downloads
    and decodes while the others wait. Raises UserError.
    """
    if data == "shapes":
        count = 5000 if split == "train" else 1000
        pixels, labels, _ = draw_shapes(count, min(side, 64), 2 * seed + (split == "test"))
        return Images(pixels, labels, classes=tuple(SHAPES))
    waits = dist.is_initialized() and dist.get_rank() > 0
    if waits:
        dist.barrier()
    try:
        if data in DOWNLOADS:
            return download(data, split, side, root)
        return load_folder(Path(data), split, side, Path(root))
    finally:
        if dist.is_initialized() and not waits:
            dist.barrier()


def download(data, split, side, root):
    """A data set of DOWNLOADS as Images. STL-10's training split includes its unlabelled images."""
    folder = Path(root, "tiny-imagenet-200")
    try:
        if data == "tiny-imagenet":
            if not folder.exists():
                os.makedirs(root, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=root) as part:
                    torchvision.datasets.utils.download_and_extract_archive(
                        DOWNLOADS[data], part, md5="90528d7ca1a48142e341f4ef8d21d0de")
                    os.rename(Path(part, folder.name), folder)
        elif data == "stl10":
            part = "train+unlabeled" if split == "train" else "test"
            source = torchvision.datasets.STL10(root, part, download=True)
            pixels, labels = torch.from_numpy(source.data), torch.from_numpy(source.labels)
        else:
            CIFAR = getattr(torchvision.datasets, data.upper())
            source = CIFAR(root, split == "train", download=True)
            pixels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
            labels = torch.tensor(source.targets)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data {data}: cannot download {DOWNLOADS[data]} to {root} ({error}); "
                        "try --data shapes") from error
    if data == "tiny-imagenet":
        return load_folder(folder, split, side, Path(root))
    if side < pixels.shape[-1]:
        pixels = torch.cat([F.interpolate(x, (side, side), mode="bicubic", antialias=True)
                            for x in pixels.split(1000)])
    return Images(pixels, labels.long(), classes=tuple(source.classes))


# Image folders

def find_images(place):
    """Sorted paths of all images below `place`. Each real directory is visited once, none that
    contains `place`; hidden names are skipped."""
    seen = {str(parent) for parent in Path(place).resolve().parents}
    files = []
    for folder, below, names in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        below[:] = [name for name in below if name[0] != "."]
        files += [os.path.join(folder, name) for name in names
                  if name[0] != "." and name.lower().endswith(SUFFIXES)]
    return sorted(files)


def class_names(files, place):
    """The class of each file: its first folder below `place`, or its entry in Tiny-ImageNet's
    val_annotations.txt; "" if it has none."""
    notes = Path(place, "val_annotations.txt")
    lines = notes.read_text().splitlines() if notes.exists() else []
    annotated = dict(line.split()[:2] for line in lines if line)
    names = []
    for file in files:
        parts = Path(file).relative_to(place).parts
        name = annotated.get(parts[-1], parts[0] if len(parts) > 1 else "")
        names.append(readable(name))
    return names


def readable(path):
    """A path as printable text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def load_folder(folder, split, side, root):
    """Images of train/CLASS/… and test/CLASS/… or val/CLASS/…, decoded once into root/cache.

    The test split is the first of test and val that has labelled images. Without train/, test/ and
    val/, all images are for training. Labels need two classes. Raises UserError.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder}: expected {', '.join(DOWNLOADS)}, shapes "
                        "or a folder with train/CLASS/IMAGE and test/CLASS/IMAGE")
    place = folder / "train"
    files = find_images(place)
    if not files:
        place, files = folder, find_images(folder)
        if not files:
            raise UserError(f"--data {folder}: no images")
        below = {Path(file).relative_to(folder).parent for file in files}
        odd = [readable(path) for path in below if SPLITS & {part.lower() for part in path.parts}]
        if odd:
            raise UserError(f"--data {folder}: expected train/CLASS/IMAGE, found {min(odd)}/")
        if split == "test":
            return None
    names = class_names(files, place)
    classes = sorted(set(names) - {""})
    if split == "test":
        for place in (folder / "test", folder / "val"):
            files = find_images(place)
            names = class_names(files, place)
            if set(names) - {"", "images"}:  # Tiny-ImageNet's test/images has no labels
                break
        else:
            print("no images with labels in test/ or val/")
            return None
        unknown = sorted(set(names) - {"", *classes})
        if unknown and len(classes) > 1:
            raise UserError(f"--data {folder}: {place} has class {unknown[0]}, which train lacks")
    numbers = {name: i for i, name in enumerate(classes)} if len(classes) > 1 else {}
    labels = torch.tensor([numbers.get(name, -1) for name in names])
    pixels, aspect = decode_once(files, place, side, root)
    return Images(pixels, labels, aspect, tuple(classes))


def decode_once(files, place, side, root):
    """Pixels (N, 3, side, side), mapped from root/cache, and aspect (N,) of image files. The cache
    is made again if it is damaged or a file's path, size or time has changed."""
    side = min(side, largest_side(files))
    state = [(f[len(str(place)):], os.path.getsize(f), os.path.getmtime(f)) for f in files]
    key = hashlib.sha256(os.fsencode(f"{side} {place.resolve()} {state}")).hexdigest()[:16]
    cache = root / "cache" / f"{place.resolve().parent.name}-{place.name}-{key}.npy"
    try:
        return read_cache(cache)
    except (OSError, ValueError, EOFError):
        cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as part:
        aspect = decode(files, place, side, Path(part, "pixels.npy"))
        np.save(Path(part, "aspect.npy"), aspect)
        os.replace(Path(part, "aspect.npy"), cache.with_suffix(".aspect.npy"))
        os.replace(Path(part, "pixels.npy"), cache)
    return read_cache(cache)


def read_cache(cache):
    """What decode_once has written. Raises OSError, ValueError or EOFError unless it is whole."""
    pixels = np.load(cache, mmap_mode="c")  # copy on write
    aspect = np.load(cache.with_suffix(".aspect.npy"))
    return torch.from_numpy(pixels), torch.from_numpy(aspect)


def largest_side(files):
    """The largest shorter side among about 100 image files."""
    sides = []
    for file in files[::len(files) // 100 + 1]:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except Exception:  # decode names it
            continue
    return max(sides, default=1)


def decode(files, place, side, target):
    """Writes image files as uint8 (N, 3, side, side) to `target`; returns their aspect (N,).
    Raises UserError."""
    pixels = np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), 3, side, side))
    if hasattr(os, "posix_fallocate"):  # a full disk would be a crash later
        with open(target, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, target.stat().st_size)
    aspect = np.ones(len(files), np.float32)
    unreadable = []

    def squeeze(i):
        try:
            image = read_image(files[i], side)
        except Exception as error:  # Pillow raises many kinds
            unreadable.append(f"{files[i]} ({error})")
            return
        aspect[i] = image.width / image.height
        image = image.resize((side, side), Image.Resampling.BICUBIC)
        pixels[i] = np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, _ in enumerate(pool.map(squeeze, range(len(files))), 1):
            if i % 10_000 == 0 or i == len(files):
                print(f"decoded {readable(place)}: {i:,} of {len(files):,} images", flush=True)
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(files)} images cannot be read: "
                        f"{', '.join(sorted(unreadable)[:10])}")
    pixels.flush()
    return aspect


def read_image(file, side):
    """A file as an upright RGB PIL image on white; a JPEG is decoded no larger than `side` needs.
    Raises Pillow's errors, and ValueError for grey of more than 8 bits."""
    image = Image.open(file)
    image.draft("RGB", (side, side))
    if image.mode[0] in "IF":
        raise ValueError("more than 8 bits: save it with 8")
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata
        pass
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def draw_shapes(count, side, seed):
    """Ten classes of shapes: pixels uint8 (count, 3, side, side), labels and masks bool (count,
    side, side). Colour, position, size and tilt have the same distribution in every class."""
    generator = torch.Generator().manual_seed(seed)
    axis = (torch.arange(2 * side) + 0.5) / side - 1  # drawn at twice the size
    labels = torch.arange(count) % len(SHAPES)
    pixels = torch.empty(count, 3, side, side, dtype=torch.uint8)
    cover = torch.empty(count, 1, side, side)
    for label, form in enumerate(SHAPES.values()):
        mine = labels == label
        n = int(mine.sum())
        x, y, size, tilt, *colors = torch.rand(7, n, 1, 1, generator=generator)
        size = 0.35 + 0.35 * size
        tilt = 0.6 * (tilt - 0.5)
        x = (axis - (1 - size) * (2 * x - 1)) / size
        y = (axis[:, None] - (1 - size) * (2 * y - 1)) / size
        u = x * tilt.cos() - y * tilt.sin()
        v = x * tilt.sin() + y * tilt.cos()
        drawn = form(u, v, torch.hypot(u, v), torch.maximum(u.abs(), v.abs()))
        cover[mine] = F.avg_pool2d(drawn.float()[:, None], 2)
        ground = 0.2 + 0.6 * (torch.stack(colors, 1) > 0.5)  # one of eight colours, (n, 3, 1, 1)
        image = torch.lerp(ground, 1 - ground, cover[mine])
        image += 0.04 * torch.randn(n, 3, side, side, generator=generator)
        pixels[mine] = (image.clamp(0, 1) * 255).byte()
    return pixels, labels, cover[:, 0] >= 0.5
