"""Images: the data sets, batches of them on the device, and augmentation.

Image batches are (B, 3, H, W). Crops take uint8 or floats in 0…1 and give floats, which the other augmentations take
and give. All draw each image's own random numbers on the CPU, where nothing waits for them, and compute on the images'
device.
"""
import glob, hashlib, math, os, pathlib, random, shutil, socket, sys, warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import rgb_to_grayscale

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set, so that weights travel
SETS = {"cifar10": (datasets.CIFAR10.url, "163 MB"), "cifar100": (datasets.CIFAR100.url, "161 MB"),
        "stl10": (datasets.STL10.url, "2.5 GB"),  # the address of each set's archive, and its size
        "tiny-imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "237 MB")}
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # no one writes into the decoded file
KINDS = ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"  # what counts as an image in a folder


class UserError(ValueError):
    """Something the user can put right; the command line answers it with this one line and exit status 2."""


def check(ok, flag, value, right):
    """Raises UserError "FLAG VALUE: RIGHT" unless `ok`."""
    if not ok:
        raise UserError(f"{flag} {value}: {right}")


# Data

def load_images(data, split, size, root="data", workers=0, seed=0):
    """Images uint8 (N, 3, S, S), labels int64 (N,), -1 where there is none, and aspect float32 (N,) of the split
    "train" or "test"; None where a folder has no test images.

    `data` is a name of SETS, "shapes", or a folder. Images are stored whole, squeezed to S×S; aspect is width over
    height before that. S is `size`, or the set's own side where that is smaller (of a folder: the largest shorter side
    among 100 images): the views enlarge. Raises UserError: a set not to be had, an unreadable image, unknown classes.
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
        triple = images, labels.long(), torch.ones(len(images))
    else:
        folder = download(data, split, root) if data == "tiny-imagenet" else data
        triple = load_folder(folder, split, size, root, workers)
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    return triple


def download(data, split, root):
    """A set of SETS, fetched into `root` unless it is there: torchvision's data set, or Tiny-ImageNet's folder."""
    folder, (address, size) = pathlib.Path(root, "tiny-imagenet-200"), SETS[data]
    try:
        if data == "stl10":
            return datasets.STL10(root, "train+unlabeled" if split == "train" else split, download=True)
        if data != "tiny-imagenet":
            return (datasets.CIFAR10 if data == "cifar10" else datasets.CIFAR100)(root, split == "train", download=True)
        if not folder.exists():  # unpacked aside and then moved: an interrupted one is never taken for the whole
            md5 = "90528d7ca1a48142e341f4ef8d21d0de"
            datasets.utils.download_and_extract_archive(address, root, f"{folder}.part", md5=md5)
            os.replace(pathlib.Path(f"{folder}.part", folder.name), folder)
        return folder
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data {data}: can't be downloaded ({' '.join(str(error).split())}). Without a network: put "
                        f"{address.rsplit('/', 1)[1]} ({size}, from {address}) into the folder --root {root}, or name "
                        "a folder of images, or take --data shapes") from error


def load_folder(folder, split, size, root, workers):
    """load_images of a folder, decoded once into a memory-mapped file in root/cache: ImageNet's train is 252 GB large.

    The folder holds train/CLASS/… and test/CLASS/… or val/CLASS/…. Its train/ may stand alone, and may be without
    classes; where there is no train/, all images in the folder and below are for training. An image outside a class's
    folder has the label -1. With only one class all labels are -1: there is nothing to tell apart, and no kNN check.
    """
    check(folder and pathlib.Path(folder).is_dir(), "--data", folder or '""', f"is none of {', '.join(SETS)}, shapes, "
          "and no folder of images or of train/CLASS/IMAGE and test/CLASS/IMAGE")
    folder = pathlib.Path(folder)
    notes = folder / "val" / "val_annotations.txt"  # Tiny-ImageNet's list of the classes in val/images
    train = folder / "train" if (folder / "train").is_dir() else folder
    tests = [folder / "val" / "images"] if notes.exists() else [folder / "test", folder / "val"]
    place = train if split == "train" else next((test for test in tests if test.is_dir() and train != folder), None)
    if not place:
        return None
    files = sorted(os.path.join(at, name) for at, _, names in os.walk(place, followlinks=True) for name in names
                   if name.lower().endswith(KINDS))
    check(files, "--data", folder, f"{place} holds no images")
    below, classes = [file[len(str(place)) + 1:] for file in files], class_names(folder)
    if split == "test" and notes.exists():
        names = list(map(dict(row[:2] for row in map(str.split, notes.read_text().splitlines()) if row).get, below))
    else:
        names = [path.split(os.sep)[0] if os.sep in path else None for path in below]
    strange = sorted(set(names) - {None, *classes}) if classes else []
    check(not strange, "--data", folder, f"{place} has {strange[:1]}, which is no class of train/")
    numbers = {name: i for i, name in enumerate(classes)} if len(classes) > 1 else {}

    side = min(size, max(min(read_image(f, size).size) for f in random.Random(0).sample(files, min(100, len(files)))))
    state = f"upright {[(path, (at := os.stat(file)).st_size, at.st_mtime_ns) for path, file in zip(below, files)]}"
    place_hash, state_hash = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in (str(folder.resolve()), state))
    cache = pathlib.Path(root, "cache", f"{folder.resolve().name}-{place_hash}-{split}-{side}-")
    whole = cache.with_name(f"{cache.name}{state_hash}.npy")  # which files, of which size and date, it was made from
    aspects, part = whole.with_suffix(".aspect.npy"), whole.with_suffix(f".{socket.gethostname()}.{os.getpid()}.part")
    if not whole.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        for old in cache.parent.glob(f"{glob.escape(cache.name)}*"):  # of other files, or of a process killed here
            here = f".{socket.gethostname()}." in old.name and pathlib.Path("/proc/self").exists()
            if old.suffix == ".npy" or here and not pathlib.Path("/proc", old.suffixes[-2][1:]).exists() or old == part:
                old.unlink()
        try:
            np.save(aspects, decode(files, place, side, workers, part))
            os.replace(part, whole)
        finally:
            part.unlink(missing_ok=True)
    labels = torch.tensor([numbers.get(name, -1) for name in names])
    return torch.from_numpy(np.load(whole, mmap_mode="r")), labels, torch.from_numpy(np.load(aspects))


def decode(files, place, side, workers, target):
    """Writes image files, squeezed, as uint8 (N, 3, side, side) to the file `target`; returns their aspects (N,)."""
    def squeeze(i):
        image = read_image(files[i], side)
        array[i] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        aspects[i] = image.width / image.height
    need, free = 3 * side ** 2 * len(files) / 1e9, shutil.disk_usage(target.parent).free / 1e9
    check(need < free, "--root", target.parent, f"has {free:.1f} GB free, and {place} decoded takes {need:.1f}")
    array = np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), 3, side, side))
    aspects = np.empty(len(files), np.float32)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for i, _ in enumerate(pool.map(squeeze, range(len(files)))):
            if i + 1 == len(files) or sys.stdout.isatty() and i % 500 == 0:
                start, end = ("\r", "") if sys.stdout.isatty() and i + 1 < len(files) else ("", "\n")
                print(f"{start}decoding {place}, once: {i + 1:,} of {len(files):,}", end=end, flush=True)
    array.flush()
    return aspects


def class_names(data, root="data"):
    """Names of the classes of `data`, in the order of the labels. The set must have been loaded before."""
    if data == "shapes":
        return "disc ring square frame diamond triangle plus cross pillars stripes".split()
    if data in ("cifar10", "cifar100"):
        return (datasets.CIFAR10 if data == "cifar10" else datasets.CIFAR100)(root).classes
    if data == "stl10":
        return datasets.STL10(root, "test").classes
    train = pathlib.Path(root, "tiny-imagenet-200", "train") if data == "tiny-imagenet" else pathlib.Path(data, "train")
    return sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else []


def read_image(file, side):
    """A file as a PIL image in RGB, upright; a JPEG is decoded no larger than `side` needs. Raises UserError."""
    try:
        image = Image.open(file)
        image.draft("RGB", (side, side))
        check(image.mode != "F", "its pixels", "floats", "0 to 1, or 0 to 255? Save it with 8 or 16 bits")
        image = image.convert("I").point(lambda x: x / 257).convert("L") if image.mode[0] == "I" else image  # 16 bits
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: can't be read as an image ({error}); mend it or take it away") from error


def draw_shapes(n, side, seed, masks=False):
    """Ten classes of form, uint8 (n, 3, side, side) and labels: each has all colours, places, sizes and tilts alike.
    With `masks` also bool (n, side, side): where the form covers at least half of the pixel."""
    forms = (lambda u, v, r, m: r < 0.95, lambda u, v, r, m: (r < 1) & (r > 0.6),
             lambda u, v, r, m: m < 0.8, lambda u, v, r, m: (m < 0.9) & (m > 0.5),
             lambda u, v, r, m: u.abs() + v.abs() < 1.1, lambda u, v, r, m: (v < 0.8) & (2 * u.abs() - 1 < v),
             lambda u, v, r, m: (m < 1) & (torch.minimum(u.abs(), v.abs()) < 0.25),
             lambda u, v, r, m: (m < 0.8) & (torch.minimum((u + v).abs(), (u - v).abs()) < 0.35),
             lambda u, v, r, m: (m < 0.9) & (torch.cos(3.5 * torch.pi * u) > 0),
             lambda u, v, r, m: (m < 0.9) & (torch.cos(3.5 * torch.pi * v) > 0))
    g, axis = torch.Generator().manual_seed(seed), (torch.arange(2 * side) + 0.5) / side - 1
    images, labels = torch.empty(n, 3, side, side, dtype=torch.uint8), torch.arange(n) % len(forms)
    covered = torch.empty(n, 1, side, side)
    for kind, form in enumerate(forms):
        mine = labels == kind
        x, y, size, tilt, *colours = torch.rand(7, int(mine.sum()), 1, 1, generator=g)
        size, tilt = 0.35 + 0.35 * size, 0.6 * (tilt - 0.5)
        x, y = (axis - (1 - size) * (2 * x - 1)) / size, (axis[:, None] - (1 - size) * (2 * y - 1)) / size
        u, v = x * tilt.cos() - y * tilt.sin(), x * tilt.sin() + y * tilt.cos()
        inside = form(u, v, torch.hypot(u, v), torch.maximum(u.abs(), v.abs())).float()    # drawn at twice the size
        ground = 0.2 + 0.6 * (torch.stack(colours, 1) > 0.5)                               # eight colours
        covered[mine] = F.avg_pool2d(inside[:, None], 2)
        image = torch.lerp(ground, 1 - ground, covered[mine]) + 0.04 * torch.randn(len(x), 3, side, side, generator=g)
        images[mine] = (image.clamp(0, 1) * 255).byte()
    return (images, labels, covered[:, 0] >= 0.5) if masks else (images, labels)


class Batches:
    """`batches[step]`: this process's share of a step's images, uint8 (B, 3, S, S) on its device, and their aspects,
    (B,) on the CPU, where crops are drawn.

    `data`: load_images' triple. An epoch runs over all images, or over the ids `among`, in an order that (seed, epoch)
    alone decides, and leaves out what fills no batch. Images stay on the GPU if they take less than a quarter of its
    free memory; else they stream from memory or the mapped file.
    """
    def __init__(self, data, batch, seed, here, among=None):
        self.images, _, self.aspects = data
        self.among = torch.arange(len(self.images)) if among is None else among
        check(batch * here.world <= len(self.among), "--batch", batch,
              f"there are only {len(self.among)} training images" + f" for {here.world} processes" * (here.world > 1))
        room = torch.cuda.mem_get_info(here.device)[0] // 4 if here.device.type == "cuda" else 0
        self.images = self.images.to(here.device) if self.images.nbytes < room else self.images
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
        ids = self.ids(step)
        x = self.images[ids.to(self.images.device, non_blocking=True)]
        x = x if x.device == self.here.device else x.pin_memory().to(self.here.device, non_blocking=True)
        return x, self.aspects[ids]


# Augmentation

def normalize(images):
    """0…1 to ImageNet's mean 0 and standard deviation 1."""
    mean, std = torch.tensor([MEAN, STD]).to(images.device, non_blocking=True)[..., None, None]  # (3, 1, 1) each
    return images.sub(mean).div_(std)


def denormalize(images):
    """The inverse of `normalize`, cut to 0…1."""
    mean, std = torch.tensor([MEAN, STD]).to(images.device, non_blocking=True)[..., None, None]  # (3, 1, 1) each
    return (images * std).add_(mean).clamp_(0, 1)


def resize_weights(start, length, size, n, kernel="linear"):
    """(B, size, n): how row o of a resize of [start, start + length) to `size` weighs the n input pixels. Its kernel, a
    triangle ("linear") or Keys' cubic with a = -1/2 ("bicubic"), is measured in input pixels where it enlarges, in
    output pixels where it shrinks: antialiasing."""
    pixel, row = (torch.arange(k, device=start.device) for k in (n, size))
    start, length = start[:, None, None], length[:, None, None]
    scale, inside = length / size, (pixel >= start) & (pixel < start + length)             # (B, 1, n)
    width, centre = scale.clamp(min=1), start + (row[:, None] + 0.5) * scale - 0.5         # (B, size, 1)
    pixel = torch.where(inside, pixel / width, 1e6)  # what is outside is out of reach
    x = (pixel - centre / width).abs_()                                                    # (B, size, n)
    if kernel == "bicubic":
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x ** 2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2).mul_(x < 2)
    else:
        weights = x.neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


def crop_resize(images, boxes, size, kernel="linear"):
    """Crops boxes (top, left, height, width: each int64 (B,), in pixels) and resizes them to (B, 3, size, size), by a
    kernel of resize_weights; what a cubic overshoots is cut to 0…1."""
    (B, _, H, W), boxes = images.shape, torch.stack(tuple(boxes)).to(images.device, non_blocking=True)  # (4, B)
    starts, lengths = boxes.view(2, 2 * B)                                                 # of rows, then of columns
    weights = resize_weights(starts, lengths, size, max(H, W), kernel)                     # (2B, size, max(H, W))
    rows, columns = weights[:B, None, :, :H], weights[B:, :, :W]                # (B, 1, size, H), (B, size, W)
    if images.dtype == torch.uint8:
        images, rows = images.float(), rows / 255
    out = ((rows @ images).flatten(1, 2) @ columns.mT).unflatten(1, (3, size))             # (B, 3, size, size)
    return out.clamp_(0, 1) if kernel == "bicubic" else out


def resize(images, size):
    """The whole images at size×size; nothing random."""
    B, _, H, W = images.shape
    return crop_resize(images, [torch.full((B,), n, device=images.device) for n in (0, 0, H, W)], size)


def central_crop(images, size, aspect=None):
    """Evaluation's crop, (B, 3, size, size): the central square of size / S of the true image's shorter side, as 224 of
    256; at most 1, and 7/8 where S is larger. aspect (B,): width over height before squeezing; None: unsqueezed."""
    B, _, H, W = images.shape
    shape = (torch.full((B,), W / H) if aspect is None else aspect).to(images.device)      # width over height
    share = min(1, size / min(H, W)) if min(H, W) <= round(size * 8 / 7) else 7 / 8
    height = (H * share * shape.clamp(max=1)).round().long().clamp(min=1)
    width = (W * share / shape.clamp(min=1)).round().long().clamp(min=1)
    return crop_resize(images, ((H - height) // 2, (W - width) // 2, height, width), size)


def crop_boxes(B, H, W, scale, ratio, aspect=None):
    """B boxes (top, left, height, width: each int64 (B,)) by RandomResizedCrop's laws, within H×W stored pixels.

    Area uniform in `scale`, log of width over height uniform in log `ratio`, place uniform; the first of ten tries that
    fits, else the largest central box whose width over height lies in `ratio`. `aspect` (B,) is the true images' width
    over height, if they were squeezed to H×W: the laws hold in true proportions, and the boxes are on its device.
    """
    area, shape = H * W * torch.empty(B, 10).uniform_(*scale), torch.empty(B, 10).uniform_(*map(math.log, ratio)).exp()
    draws = torch.cat([area, shape, torch.rand(B, 1), torch.rand(B, 1)], 1)
    whole = torch.full((B,), W / H) if aspect is None else aspect                          # width over height
    area, shape, down, right = draws.to(whole.device, non_blocking=True).split((10, 10, 1, 1), 1)
    stretch = (whole * (H / W))[:, None]  # of a stored pixel: width over height
    width, height = (area * shape / stretch).sqrt().round().long(), (area / shape * stretch).sqrt().round().long()
    fits, near = (width >= 1) & (width <= W) & (height >= 1) & (height <= H), whole.clamp(*ratio)
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1)
    width = torch.where(found, width.gather(1, first)[:, 0], (W * (near / whole).clamp(1 / W, 1)).round().long())
    height = torch.where(found, height.gather(1, first)[:, 0], (H * (whole / near).clamp(1 / H, 1)).round().long())
    top = torch.where(found, (down[:, 0] * (H - height + 1)).long(), (H - height) // 2)
    left = torch.where(found, (right[:, 0] * (W - width + 1)).long(), (W - width) // 2)
    return top, left, height, width


def random_resized_crop(images, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), aspect=None, kernel="linear"):
    """A random box of each image, resized to (B, 3, size, size); arguments as in crop_boxes and crop_resize."""
    return crop_resize(images, crop_boxes(len(images), *images.shape[2:], scale, ratio, aspect), size, kernel)


def apply_to(images, chosen, change, *values):
    """Replaces, in place, the images where `chosen` (bool (B,), on the CPU) by change(these images, their values)."""
    ids = chosen.nonzero().flatten()
    if len(ids):
        ids, *values = torch.stack([ids, *(v[ids] for v in values)]).to(images.device, non_blocking=True)  # one copy
        images.index_copy_(0, ids.long(), change(images[ids.long()], *values))
    return images


def random_hflip(images, p=0.5):
    """Mirrors each image with probability p."""
    return apply_to(images.clone(), torch.rand(len(images)) < p, lambda x: x.flip(3))


def random_grayscale(images, p=0.2):
    """Makes each image grey with probability p."""
    return apply_to(images.clone(), torch.rand(len(images)) < p, lambda x: rgb_to_grayscale(x, 3))


def adjust_brightness(images, factor):
    """Blends with black: factor (B,) ≥ 0, 1 changes nothing."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images, factor):
    """Blends with the image's mean grey: factor (B,) ≥ 0, 1 changes nothing."""
    mean, factor = rgb_to_grayscale(images.mean((2, 3), keepdim=True)), factor[:, None, None, None]
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images, factor):
    """Blends with grey: factor (B,) ≥ 0, 1 changes nothing."""
    return torch.lerp(rgb_to_grayscale(images).expand_as(images), images, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(images, factor):
    """Turns the hue by `factor` (B,) of the colour circle, -0.5…0.5."""
    r, g, b = images.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    sixths = torch.where(high == r, g - b, torch.where(high == g, (b - r).add_(chroma, alpha=2),
                                                       (r - g).add_(chroma, alpha=4)))     # of the circle, times chroma
    hue = sixths.div_(6 * chroma.clamp(min=1e-9)).add_(factor[:, None, None])              # (B, H, W), 0: red
    apart = hue[:, None] - torch.arange(3, device=hue.device)[:, None, None] / 3           # from red, green and blue
    pure = apart.sub_(apart.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)                  # (B, 3, H, W)
    return pure.mul_(chroma[:, None]).add_(low[:, None])


def color_jitter(images, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8):
    """With probability p the four changes in random order, factors uniform in 1 ± strength (hue: 0 ± strength)."""
    B, changes = len(images), (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # 0, 1, 2, 3
    factors = [torch.empty(B).uniform_(max(0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
    factors = torch.stack([*factors, torch.empty(B).uniform_(-hue, hue)])                  # (4, B)
    order = torch.rand(B, 4).argsort(1).T                                                  # (4, B): each turn's change
    ids, images = (torch.rand(B) < p).nonzero().flatten(), images.clone()
    ids = ids[order[:, ids].argsort(1)]                                                    # (4, n): each turn's images
    kinds = order.gather(1, ids)                                                           # (4, n): sorted
    sent = torch.stack([ids, factors[kinds, ids]]).to(images.device, non_blocking=True)    # (2, 4, n)
    for turn, where, values in zip(kinds, sent[0].long(), sent[1]):
        counts = turn.bincount(minlength=4).tolist()
        for change, mine, factor in zip(changes, where.split(counts), values.split(counts)):
            if len(mine):
                images.index_copy_(0, mine, change(images[mine], factor))
    return images


def gaussian_blur(images, p=0.5, sigma=(0.1, 2.0)):
    """With probability p a Gaussian blur, its deviation uniform in `sigma` (pixels): two matrix products."""
    def blur(x, s):
        axes = [torch.arange(n, device=x.device) for n in x.shape[2:]]
        rows, columns = (torch.softmax(-(p - p[:, None]) ** 2 / (2 * s[:, None, None] ** 2), 2)[:, None] for p in axes)
        return rows @ x @ columns.mT                                                       # rows (B, 1, H, H)
    sigmas = torch.empty(len(images)).uniform_(*sigma)
    return apply_to(images.clone(), torch.rand(len(images)) < p, blur, sigmas) if p > 0 else images
