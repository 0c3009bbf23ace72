"""Tests of images.py: augmentation against torchvision's, data sets, folders, batches."""
import math, os, shutil, signal, socket, sys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import common, eval_speed, images
from test_smoke import MODULES, every_method, run


# Views and augmentation

def test_adjustments_equal_torchvisions():
    torch.manual_seed(0)
    x = torch.rand(12, 3, 9, 7)
    x[0], x[1, 0], x[2] = 0.5, x[1, 1], x[2].round()                                       # greys, ties, pure colours
    factors = {"brightness": (0.2, 2), "contrast": (0.2, 2), "saturation": (0.2, 2), "hue": (-0.5, 0.5)}
    for name, bounds in factors.items():
        factor = torch.empty(12).uniform_(*bounds)
        theirs = torch.stack([getattr(TF, f"adjust_{name}")(image, f) for image, f in zip(x, factor.tolist())])
        assert (getattr(common, f"adjust_{name}")(x, factor) - theirs).abs().max() < 1e-3, name


@every_method
def test_views_send_few_copies_to_the_device(method):
    cfg = MODULES[method].Config()
    batch = torch.empty(64, 3, 256, 256, dtype=torch.uint8, device="meta")
    copies, kernels = eval_speed.count_copies(lambda: MODULES[method].views(batch, cfg))
    assert 1 <= copies <= 20 and kernels > copies
    x, g = torch.empty(64, 3, 8, 8, device="meta"), images
    for job in (lambda: g.random_resized_crop(x, 8), lambda: g.random_hflip(x), lambda: g.color_jitter(x),
                lambda: g.random_grayscale(x), lambda: g.gaussian_blur(x), lambda: g.normalize(x),
                lambda: g.denormalize(x), lambda: g.random_resized_crop(x, 8, aspect=x[:, 0, 0, 0])):
        assert eval_speed.count_copies(job)[0] == 1


@pytest.mark.parametrize("kernel, mode", [("linear", "BILINEAR"), ("bicubic", "BICUBIC")])
def test_crops_equal_torchvisions(kernel, mode):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 20, 30)
    boxes = torch.tensor([[0, 3, 10, 1], [0, 5, 2, 13], [20, 9, 7, 19], [30, 11, 28, 3]])  # top, left, height, width
    for size in (6, 16, 40):
        theirs = torch.stack([TF.resized_crop(image, *box, [size, size], InterpolationMode[mode], antialias=True)
                              for image, box in zip(x, boxes.T.tolist())]).clamp(0, 1)
        assert (common.crop_resize(x, boxes, size, kernel) - theirs).abs().max() < 1e-3
        if size == 16:
            bytes_in = common.crop_resize((255 * x).byte(), boxes, size, kernel)
            assert (bytes_in - common.crop_resize(x, boxes, size, kernel)).abs().max() < 2 / 255


def agree(a, b):
    """Whether two samples of n numbers may be of one law: Kolmogorov–Smirnov, p = 0.001."""
    a, b = a.double().sort().values, b.double().sort().values
    grid = torch.cat([a, b]).sort().values
    gap = (torch.searchsorted(a, grid, right=True) - torch.searchsorted(b, grid, right=True)).abs().max() / len(a)
    return gap < 1.95 * math.sqrt(2 / len(a))


@pytest.mark.parametrize("height, width, aspect", [(200, 240, None), (200, 400, 2.0), (400, 200, 0.5)])
def test_crop_boxes_follow_random_resized_crop(height, width, aspect):
    """On the true image, height×width, which is stored squeezed to 200×200 if its aspect is given."""
    torch.manual_seed(0)
    n, scale, ratio = 4000, (0.3, 0.9), (3 / 4, 4 / 3)
    H, W = (height, width) if aspect is None else (200, 200)
    ours = torch.stack(common.crop_boxes(n, H, W, scale, ratio, aspect and torch.full((n,), aspect)), 1).double()
    assert (ours >= 0).all() and (ours[:, 0] + ours[:, 2] <= H).all() and (ours[:, 1] + ours[:, 3] <= W).all()
    assert (ours[:, 0] == 0).any() and (ours[:, 0] + ours[:, 2] == H).any()                # all of it is reached
    assert (ours[:, 1] == 0).any() and (ours[:, 1] + ours[:, 3] == W).any()
    ours = ours * torch.tensor([height / H, width / W] * 2)
    blank = torch.zeros(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(n)]).double()
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert agree(measure(ours), measure(theirs))


@pytest.mark.parametrize("aspect, ratio", [(1.0, (1.5, 2.0)), (4.0, (0.75, 4 / 3)), (0.25, (0.75, 4 / 3))])
def test_where_no_try_fits_the_crop_is_torchvisions_central_one(aspect, ratio):
    height, width = round(200 / aspect ** 0.5), round(200 * aspect ** 0.5)
    boxes = common.crop_boxes(3, 100, 100, (1.5, 1.5), ratio, torch.full((3,), aspect))
    theirs = RandomResizedCrop.get_params(torch.zeros(3, height, width), (1.5, 1.5), ratio)
    for ours, true, side in zip(boxes, theirs, (height, width, height, width)):
        assert (ours / 100 - true / side).abs().max() < 0.015


def test_a_circle_stays_a_circle():
    torch.manual_seed(0)
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in (120, 240)), indexing="ij")
    discs = ((y % 24 - 12) ** 2 + (x % 24 - 12) ** 2 < 49).float().expand(64, 3, -1, -1)   # of radius 7, 24 apart
    stored = (255 * images.resize(discs, 120)).round().byte()                              # 2:1, squeezed
    aspect = torch.full((64,), 2.0)
    turned = images.crop_resize(stored, images.crop_boxes(64, 120, 120, (0.4, 0.4), (1, 1), aspect), 96)
    for view in (turned, images.central_crop(stored, 120, aspect), images.central_crop(stored, 105, aspect)):
        edges = [view.diff(dim=dim).abs().mean().item() for dim in (2, 3)]                 # as many down as across
        assert edges[0] == pytest.approx(edges[1], rel=0.12)
    assert images.resize(stored, 120).diff(dim=3).abs().mean() > 1.9 * edges[0]            # squeezed, twice as many


def test_central_crop_is_the_usual_one():
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (256, 512)), indexing="ij")
    waves = torch.stack([torch.sin(9 * x + 3 * y), torch.cos(7 * y), torch.sin(5 * x)]) / 2 + 0.5  # 2:1
    for true, aspect in ((waves, 2.0), (waves.mT, 0.5)):
        usual = TF.center_crop(true, [224, 224])                                           # resize 256 changes nothing
        ours = images.central_crop(images.resize(true[None], 256), 224, torch.tensor([aspect]))
        assert (ours - usual).abs().max() < 0.02
        whole = images.central_crop(images.resize(true[None], 256), 300, torch.tensor([aspect]))
        assert (whole - images.resize(TF.center_crop(true, [256, 256])[None], 300)).abs().max() < 0.02
    square = torch.rand(2, 3, 20, 20)
    assert torch.equal(images.central_crop(square, 20), images.resize(square, 20))
    large = torch.rand(1, 3, 64, 64)  # stored far above 8/7 of 16: still 7/8 of the side
    assert torch.allclose(images.central_crop(large, 16), images.resize(large[:, :, 4:60, 4:60], 16), atol=1e-5)


def test_crops_of_a_very_long_image_are_not_empty():
    for aspect in (300.0, 1 / 300):
        x = torch.rand(8, 3, 32, 32)
        assert images.random_resized_crop(x, 16, (0.2, 1.0), aspect=torch.full((8,), aspect)).isfinite().all()


def test_each_image_has_its_own_random_numbers():
    torch.manual_seed(0)
    same = torch.rand(1, 3, 16, 16).expand(400, -1, -1, -1)
    jobs = {"random_resized_crop": ((16,), 1.0), "random_hflip": ((0.5,), 0.5), "color_jitter": ((), 0.8),
            "random_grayscale": ((0.2,), 0.2), "gaussian_blur": ((0.5,), 0.5)}
    for name, (args, p) in jobs.items():
        out = getattr(common, name)(same, *args)
        changed = (out - same).abs().amax((1, 2, 3)) > 1e-6
        assert abs(changed.double().mean().item() - p) <= 0.01 + 4 * math.sqrt(p * (1 - p) / 400), name
        kinds = len(out.flatten(1).unique(dim=0))
        assert kinds == 2 if name in ("random_hflip", "random_grayscale") else kinds > 100, name
    for strengths in 0.4 * torch.eye(4):
        assert len(common.color_jitter(same, *strengths.tolist(), p=1.0).flatten(1).unique(dim=0)) > 300
    chosen, value = torch.tensor([0, 1, 0, 1, 1]).bool(), torch.arange(5.0)
    out = images.apply_to(torch.zeros(5, 3, 2, 2), chosen, lambda x, v: x + v[:, None, None, None], value)
    assert torch.equal(out[:, 2, 1, 0], chosen * value)


def test_blur_is_gaussian():
    x = torch.zeros(1, 3, 21, 21)
    x[:, :, 10, 10] = 1
    out = common.gaussian_blur(x, 1.0, (1.5, 1.5))[0, 0]
    i = torch.arange(21) - 10.0
    g = torch.exp(-i ** 2 / (2 * 1.5 ** 2))
    assert torch.allclose(out, torch.outer(g, g) / g.sum() ** 2, atol=1e-5)


# Data

@pytest.fixture
def folder(tmp_path):
    """Two classes of 3 + 3 training and 2 + 2 test images, one of them not square, one a grey PNG."""
    for split, n in (("train", 3), ("test", 2)):
        for label, colour in (("ant", (255, 0, 0)), ("bee", (0, 0, 255))):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 24 + 8 * i), colour).save(tmp_path / "set" / split / label / f"{i}.png")
    Image.new("L", (40, 40), 99).save(tmp_path / "set" / "train" / "bee" / "2.png")
    return tmp_path / "set"


def test_folder_is_decoded_once_found_again_and_rebuilt(folder, tmp_path, capfd):
    root = tmp_path / "root"
    x, y, aspect = common.load_images(str(folder), "train", 32, root)
    assert x.dtype == torch.uint8 and x.shape == (6, 3, 32, 32) and y.tolist() == [0, 0, 0, 1, 1, 1]
    assert aspect.tolist() == pytest.approx([40 / 24, 40 / 32, 1, 40 / 24, 40 / 32, 1])
    assert x[[0, 3, 5], :, 5, 5].tolist() == [[255, 0, 0], [0, 0, 255], [99, 99, 99]]
    assert "decoding" in capfd.readouterr().out
    again = common.load_images(str(folder), "train", 32, root)
    assert torch.equal(again[0], x) and torch.equal(again[2], aspect)
    assert "decoding" not in capfd.readouterr().out
    Image.new("RGB", (40, 40), (0, 255, 0)).save(folder / "train" / "ant" / "0.png")
    assert common.load_images(str(folder), "train", 32, root)[0][0, :, 5, 5].tolist() == [0, 255, 0]
    whole, aspects = sorted((root / "cache").iterdir(), key=lambda file: len(file.name))   # the old ones are gone
    assert aspects.name == f"{whole.stem}.aspect.npy"
    os.replace(whole, whole.with_suffix(".1.part"))  # what an interrupted build leaves
    capfd.readouterr()
    assert common.load_images(str(folder), "train", 32, root)[0][0, :, 5, 5].tolist() == [0, 255, 0]
    assert "decoding" in capfd.readouterr().out
    assert common.load_images(str(folder), "train", 500, root)[0].shape == (6, 3, 40, 40)  # never enlarged


def test_a_folder_that_the_disk_has_no_room_for_is_told_before_it_is_decoded(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6 * 3 * 32 * 32))
    with pytest.raises(common.UserError, match="--root .* GB free"):
        common.load_images(str(folder), "train", 32, tmp_path / "root")
    assert not list((tmp_path / "root" / "cache").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6 * 3 * 32 * 32 + 1))
    assert len(common.load_images(str(folder), "train", 32, tmp_path / "root")[0]) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="the file would not be sparse")
def test_a_decoded_folder_may_be_larger_than_memory(folder, tmp_path, monkeypatch):
    def decode(files, place, side, workers, target):
        np.lib.format.open_memmap(target, "w+", np.uint8, (1_300_000, 3, 256, 256))  # 256 GB, nothing written
        return np.ones(1_300_000, np.float32)

    monkeypatch.setattr(images, "decode", decode)
    x, _, _ = common.load_images(str(folder), "train", 256, tmp_path / "root")
    assert x.shape == (1_300_000, 3, 256, 256) and not x[-1].any()


def test_all_of_an_image_is_stored(tmp_path):
    image = Image.new("RGB", (100, 50))
    image.paste((255, 0, 0), (0, 0, 10, 50))
    image.paste((0, 0, 255), (90, 0, 100, 50))
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set" / "wide.png")
    x, _, aspect = common.load_images(str(tmp_path / "set"), "train", 40, tmp_path / "root")
    assert x[0, :, 20, [1, 20, 38]].T.tolist() == [[255, 0, 0], [0, 0, 0], [0, 0, 255]] and aspect.tolist() == [2]


def test_images_are_read_upright_and_in_16_bits(tmp_path):
    image, turned = Image.new("RGB", (40, 20)), Image.Exif()
    turned[0x0112] = 6  # a camera's note: turn by 90°
    image.save(tmp_path / "turned.jpg", exif=turned)
    assert images.read_image(tmp_path / "turned.jpg", 20).size == (20, 40)
    Image.fromarray(np.array([[0, 257, 25700, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.array(images.read_image(tmp_path / "deep.png", 4))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_the_stored_side_is_of_more_than_every_fourth_image(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(300):  # every fourth is a thumbnail
        Image.new("RGB", (8, 8) if i % 4 == 0 else (16, 16)).save(tmp_path / "set" / f"{i:03}.png")
    assert common.load_images(str(tmp_path / "set"), "train", 32, tmp_path / "root")[0].shape[2] == 16


def test_folders_without_classes_or_test_images_are_for_training(folder, tmp_path):
    def load(*parts):
        return [common.load_images(str(tmp_path.joinpath(*parts)), split, 16, tmp_path / "root")
                for split in ("train", "test")]

    for parts in (("set", "train", "ant"), ("set", "test")):                               # flat; any folders below it
        (x, y, aspect), test = load(*parts)
        assert len(x) == len(aspect) >= 3 and (y == -1).all() and test is None
    os.replace(folder / "test", tmp_path / "test")
    (_, y, _), test = load("set")
    assert y.tolist() == [0, 0, 0, 1, 1, 1] and test is None                               # classes, no test images
    Image.new("RGB", (40, 40)).save(folder / "train" / "stray.png")
    assert load("set")[0][1].tolist() == [0, 0, 0, 1, 1, 1, -1]
    os.replace(folder / "train" / "bee", tmp_path / "bee")
    os.replace(tmp_path / "test" / "bee", tmp_path / "bees")
    os.replace(tmp_path / "test", folder / "test")
    assert [(y == -1).all() for _, y, _ in load("set")] == [True, True]                    # one class tells nothing


KILLED = """
import images, os, signal, sys
read = images.read_image
def die(file, side):
    if os.path.isdir(sys.argv[2]) and file.endswith("1.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(file, side)
images.read_image = die
images.load_images(sys.argv[1], "train", 32, sys.argv[2], workers=1)
"""


def test_a_decoding_that_was_killed_leaves_nothing_behind(folder, tmp_path):
    cache = tmp_path / "root" / "cache"
    assert run("-c", KILLED, folder, tmp_path / "root").returncode == -signal.SIGKILL
    left, = cache.iterdir()
    assert left.suffix == ".part"
    alive = left.with_suffix("").with_suffix(f".{os.getppid()}.part")  # of another process that decodes now
    elsewhere = left.with_name(left.name.replace(socket.gethostname(), "another-machine"))
    alive.touch()
    elsewhere.touch()
    common.load_images(str(folder), "train", 32, tmp_path / "root")
    assert {file for file in cache.iterdir() if file.suffix == ".part"} == {alive, elsewhere}


@pytest.mark.parametrize("data, words", [("cifar10", "cifar-10-python.tar.gz (163 MB, from https://www.cs.toronto.edu"),
                                         ("stl10", "stl10_binary.tar.gz (2.5 GB, from http://ai.stanford.edu/"),
                                         ("tiny-imagenet", "tiny-imagenet-200.zip (237 MB, from http://cs231n.")])
def test_a_set_that_cannot_be_had_is_named_with_its_address(data, words, tmp_path, monkeypatch):
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with pytest.raises(common.UserError) as error:
        common.load_images(data, "train", 32, tmp_path / "root")
    line = str(error.value)
    assert words in line and f"--root {tmp_path / 'root'}" in line and "shapes" in line and "\n" not in line


def test_tiny_imagenets_own_val_folder(folder, tmp_path):
    os.replace(folder / "test", folder / "val")
    for i, label in enumerate(("bee", "ant", "bee")):
        (folder / "val" / "images").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(folder / "val" / "images" / f"val_{i}.JPEG", quality=95)
    (folder / "val" / "val_annotations.txt").write_text("val_1.JPEG\tant\t0\t0\t9\t9\n\nval_0.JPEG\tbee\t0\t0\t9\t9\n"
                                                        "val_2.JPEG\tbee\t0\t0\t9\t9\n")
    x, y, _ = common.load_images(str(folder), "test", 32, tmp_path / "root")
    assert y.tolist() == [1, 0, 1] and [round(v / 80) for v in x[:, 0, 9, 9].tolist()] == [0, 1, 2]


def test_shapes_are_fixed_by_the_seed_and_not_told_by_colour_or_place():
    x, y, aspect = common.load_images("shapes", "train", 16)
    assert aspect.tolist() == [1] * 5000
    again, other = common.load_images("shapes", "train", 16)[0], common.load_images("shapes", "train", 16, seed=1)[0]
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert x.shape == (5000, 3, 16, 16) and torch.equal(y.bincount(), torch.full((10,), 500))
    q, answers, _ = common.load_images("shapes", "test", 16)

    def place(images):  # the centre of what is not ground
        ink = (images.float() - images[:, :, :1, :1].float()).abs().mean(1)
        axis = torch.arange(16.0)
        return torch.stack([(ink.sum(1) * axis).sum(1), (ink.sum(2) * axis).sum(1)], 1) / ink.sum((1, 2))[:, None]

    for cue in (lambda images: images[:, :, 0, 0] / 255 - 0.5, lambda images: place(images) - 7.5):
        assert common.knn_accuracy(cue(x), y, cue(q), answers) < 0.15
    assert common.knn_accuracy(x.flatten(1) / 255 - 0.5, y, q.flatten(1) / 255 - 0.5, answers) > 0.25


def test_masks_of_shapes_are_where_the_form_is():
    x, y, masks = images.draw_shapes(200, 32, 5, masks=True)
    assert torch.equal(x, images.draw_shapes(200, 32, 5)[0]) and masks.shape == (200, 32, 32)
    assert masks.dtype == torch.bool and (masks.flatten(1).any(1) & ~masks.flatten(1).all(1)).all()
    for image, mask in zip(x.float() / 255, masks):
        ground = image[:, 0, 0] > 0.5  # 0.2 or 0.8 a channel; the form has the other
        inside = ((image > 0.5) != ground[:, None, None]).float().mean(0) > 0.5
        assert (inside == mask).float().mean() > 0.95


def test_batches_cover_an_epoch_and_are_shared_out():
    pool = torch.arange(103, dtype=torch.uint8)[:, None, None, None].expand(103, 3, 2, 2)
    pool = pool, None, torch.arange(103.0)
    alone = common.Batches(pool, 10, 0, common.Here(0, 1, torch.device("cpu")))
    epoch, aspect = (torch.cat(parts) for parts in zip(*(alone[step] for step in range(10))))
    assert torch.equal(epoch[:, 0, 0, 0], aspect.byte())  # each image with its own
    assert len(alone) == 10 and len(aspect.unique()) == 100
    assert not torch.equal(torch.cat([alone[step][1] for step in range(10, 20)]), aspect)
    two = [common.Batches(pool, 5, 0, common.Here(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    for step in (0, 7, 13):
        for part, whole in enumerate(alone[step]):
            assert torch.equal(torch.cat([half[step][part] for half in two]), whole)
