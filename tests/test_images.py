"""Data sets, folders and augmentation: what is read, what is refused, torchvision's arithmetic."""
import math
import multiprocessing
import os
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import augment
import images
from augment import crop_boxes, crop_resize
from common import knn_accuracy
from images import Images, UserError, load_images, read_image

BROKEN_EXIF = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\xff\xff\xff\xff"


# Augmentation

def test_adjustments_equal_torchvisions():
    x = torch.rand(12, 3, 8, 8)
    x[0], x[1, 0], x[2] = 0.5, x[1, 1], x[2].round()  # grey, ties, pure colours
    bounds = {"brightness": (0.2, 2), "contrast": (0.2, 2), "saturation": (0.2, 2),
              "hue": (-0.5, 0.5)}
    for name, pair in bounds.items():
        factor = torch.empty(12).uniform_(*pair)
        adjust = getattr(TF, f"adjust_{name}")
        theirs = torch.stack([adjust(image, f) for image, f in zip(x, factor.tolist())])
        ours = getattr(augment, f"adjust_{name}")(x, factor)
        assert (ours - theirs).abs().max() < 1e-3, name


@pytest.mark.parametrize("kernel, mode", [("linear", "BILINEAR"), ("bicubic", "BICUBIC")])
@pytest.mark.parametrize("size", [6, 16, 40])
def test_crops_equal_torchvisions(kernel, mode, size):
    x = torch.rand(4, 3, 20, 30)
    boxes = torch.tensor([[0, 3, 10, 1], [0, 5, 2, 13], [20, 9, 7, 19], [30, 11, 28, 3]])
    theirs = [TF.resized_crop(image, *box, [size, size], InterpolationMode[mode], antialias=True)
              for image, box in zip(x, boxes.T.tolist())]
    ours = crop_resize(x, list(boxes), size, kernel)
    assert (ours - torch.stack(theirs).clamp(0, 1)).abs().max() < 1e-3
    assert (crop_resize((255 * x).byte(), list(boxes), size, kernel) - ours).abs().max() < 2 / 255


def same_distribution(a, b):
    """Kolmogorov–Smirnov test of two samples of n numbers, p = 0.001."""
    a, b = a.double().sort().values, b.double().sort().values
    grid = torch.cat([a, b]).sort().values
    gap = torch.searchsorted(a, grid, right=True) - torch.searchsorted(b, grid, right=True)
    return gap.abs().max() / len(a) < 1.95 * math.sqrt(2 / len(a))


@pytest.mark.parametrize("height, width, aspect", [(200, 240, 0), (200, 400, 2.0), (400, 200, 0.5)])
def test_crop_boxes_follow_random_resized_crop(height, width, aspect):
    """On an image of height×width, stored as a 200×200 square if its aspect is given."""
    n, scale = 4000, (0.3, 0.9)
    H, W = (200, 200) if aspect else (height, width)
    stored = torch.empty(n, 1, H, W, device="meta")
    stored = Images(stored, aspect=torch.full((n,), aspect)) if aspect else stored
    boxes = torch.stack(crop_boxes(stored, scale), 1).double()
    for start, length, side in ((0, 2, H), (1, 3, W)):
        ends = boxes[:, start] + boxes[:, length]
        assert (boxes[:, start] == 0).any() and (ends == side).any() and (ends <= side).all()
    boxes = boxes * torch.tensor([height / H, width / W] * 2)
    blank = torch.zeros(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, scale, (3 / 4, 4 / 3))
                           for _ in range(n)]).double()
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2],
                    lambda b: b[:, 0], lambda b: b[:, 1]):
        assert same_distribution(measure(boxes), measure(theirs))


@pytest.mark.parametrize("aspect", [1.0, 4.0, 0.25])
def test_a_crop_that_fits_nowhere_is_torchvisions_central_one(aspect):
    ratio = (1.5, 2.0) if aspect == 1 else (3 / 4, 4 / 3)
    height, width = round(200 / aspect ** 0.5), round(200 * aspect ** 0.5)
    stored = Images(torch.zeros(3, 3, 100, 100), aspect=torch.full((3,), aspect))
    theirs = RandomResizedCrop.get_params(torch.zeros(3, height, width), (1.5, 1.5), ratio)
    for ours, true, side in zip(crop_boxes(stored, (1.5, 1.5), ratio), theirs,
                                (height, width, height, width)):
        assert (ours / 100 - true / side).abs().max() < 0.015


def test_central_crop_is_the_usual_one():
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (256, 512)), indexing="ij")
    waves = torch.stack([torch.sin(9 * x + 3 * y), torch.cos(7 * y), torch.sin(5 * x)]) / 2 + 0.5
    for true, aspect in ((waves, 2.0), (waves.mT, 0.5)):
        stored = Images(TF.resize(true[None], [256, 256], antialias=True),
                        aspect=torch.tensor([aspect]))
        ours = augment.central_crop(stored, 224)
        assert (ours - TF.center_crop(true, [224, 224])).abs().max() < 0.02
    large = torch.rand(1, 3, 64, 64)  # stored far above 8/7 of 16: still 7/8 of the side
    theirs = TF.resize(large[:, :, 4:60, 4:60], [16, 16], antialias=True)
    assert torch.allclose(augment.central_crop(large, 16), theirs, atol=1e-5)


def test_extreme_proportions_give_finite_crops():
    for aspect in (300.0, 1 / 300):
        stored = Images(torch.rand(8, 3, 32, 32), aspect=torch.full((8,), aspect))
        assert augment.random_resized_crop(stored, 16, (0.2, 1.0)).isfinite().all()
    assert augment.random_resized_crop(torch.rand(2, 3, 1, 1), 4).shape == (2, 3, 4, 4)


def test_each_image_has_its_own_random_numbers():
    same = torch.rand(1, 3, 16, 16).expand(400, -1, -1, -1)
    jobs = {"random_resized_crop": ((16,), 1.0), "random_hflip": ((0.5,), 0.5),
            "color_jitter": ((), 0.8), "random_grayscale": ((0.2,), 0.2),
            "gaussian_blur": ((0.5,), 0.5)}
    for name, (args, p) in jobs.items():
        out = getattr(augment, name)(same, *args)
        changed = ((out - same).abs().amax((1, 2, 3)) > 1e-6).double().mean().item()
        assert abs(changed - p) <= 0.01 + 4 * math.sqrt(p * (1 - p) / 400), name
        kinds = len(out.flatten(1).unique(dim=0))
        assert kinds == 2 if name in ("random_hflip", "random_grayscale") else kinds > 100, name
    for strengths in 0.4 * torch.eye(4):
        jittered = augment.color_jitter(same, *strengths.tolist(), p=1.0)
        assert len(jittered.flatten(1).unique(dim=0)) > 300


def test_color_jitter_is_the_four_changes_in_some_order():
    x = torch.rand(40, 3, 4, 4)
    torch.manual_seed(3)
    out = augment.color_jitter(x, 0.4, 0.4, 0.0, 0.0, p=1.0)
    torch.manual_seed(3)
    b, c = (torch.empty(40).uniform_(0.6, 1.4) for _ in range(2))
    one = augment.adjust_contrast(augment.adjust_brightness(x, b), c)
    other = augment.adjust_brightness(augment.adjust_contrast(x, c), b)
    first, second = ((out - y).abs().amax((1, 2, 3)) < 1e-4 for y in (one, other))
    assert (first | second).all() and (first & ~second).any() and (second & ~first).any()


def test_blur_is_gaussian():
    x = torch.zeros(1, 3, 21, 21)
    x[:, :, 10, 10] = 1
    i = torch.arange(21) - 10.0
    g = torch.exp(-i ** 2 / (2 * 1.5 ** 2))
    out = augment.gaussian_blur(x, 1.0, (1.5, 1.5))[0, 0]
    assert torch.allclose(out, torch.outer(g, g) / g.sum() ** 2, atol=1e-5)


# Folders

def save(path, color=(255, 0, 0), size=(40, 40), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 3 training and 2 test images, red and blue, some not square."""
    for split, count in (("train", 3), ("test", 2)):
        for label, color in (("ant", (255, 0, 0)), ("bee", (0, 0, 255))):
            for i in range(count):
                save(tmp_path / "set" / split / label / f"{i}.png", color, (40, 24 + 8 * i))
    return tmp_path / "set"


def load(folder, split="train", side=32):
    return load_images(str(folder), split, side, str(folder.parent / "root"))


def test_a_folder_is_decoded_once_and_again_if_a_file_changes(folder, capsys):
    found = load(folder)
    assert found.pixels.dtype == torch.uint8 and found.pixels.shape == (6, 3, 32, 32)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1] and found.classes == ("ant", "bee")
    assert found.aspect.tolist() == pytest.approx([40 / 24, 40 / 32, 1] * 2)
    assert found.pixels[[0, 3], :, 5, 5].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert "decoded" in capsys.readouterr().out
    assert torch.equal(load(folder).pixels, found.pixels)
    load(Path(os.path.relpath(folder)))
    assert "decoded" not in capsys.readouterr().out
    save(folder / "train" / "ant" / "0.png", (0, 255, 0))
    assert load(folder).pixels[0, :, 5, 5].tolist() == [0, 255, 0]
    assert load(folder, side=500).pixels.shape == (6, 3, 40, 40)  # never enlarged
    assert len(load(folder, "test")) == 4


def test_a_cache_cut_short_is_made_again(folder):
    whole = load(folder).pixels.clone()
    cache, = (folder.parent / "root" / "cache").glob("set-train-????????????????.npy")
    cache.write_bytes(cache.read_bytes()[:200])
    assert torch.equal(load(folder).pixels, whole)
    cache.with_suffix(".aspect.npy").unlink()
    assert torch.equal(load(folder).pixels, whole)


def test_two_decodings_at_once_and_one_that_was_killed(folder, monkeypatch):
    fork = multiprocessing.get_context("fork")
    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed = fork.Process(target=load, args=(folder,))
        killed.start()
        killed.join()
    assert killed.exitcode == -signal.SIGKILL
    others = [fork.Process(target=load, args=(folder,)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert load(folder).pixels[[0, 3], :, 5, 5].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_unreadable_images_are_named_together(folder):
    for i in range(12):
        (folder / "train" / "ant" / f"bad{i:02}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        load(folder)
    line = str(error.value)
    assert line.startswith("12 of 18 images") and "bad00.jpg" in line and "bad09.jpg" in line
    assert "bad10.jpg" not in line and "\n" not in line
    assert not list((folder.parent / "root" / "cache").iterdir())


def test_a_link_to_the_root_adds_no_image(folder):
    (folder / "train" / "ant" / "all").symlink_to(folder)
    (folder / "train" / "ant" / "up").symlink_to(folder / "train" / "ant")
    assert len(load(folder)) == 6
    other = folder.parent / "elsewhere" / "3.png"
    save(other)
    (folder / "train" / "ant" / "more").symlink_to(other.parent)
    assert len(load(folder)) == 7
    (folder / "train" / "0alias").symlink_to(folder / "train" / "bee")
    assert load(folder).classes == ("ant", "bee")


def test_hidden_names_and_empty_folders_are_no_classes(folder):
    (folder / "train" / "ant" / "._0.png").write_bytes(b"no image")
    save(folder / "train" / ".trash" / "0.png")
    (folder / "train" / "cat").mkdir()
    assert load(folder).classes == ("ant", "bee") and len(load(folder)) == 6


def test_a_test_split_without_labels_gives_way_to_val(folder, capsys):
    os.rename(folder / "test", folder / "val")
    save(folder / "test" / "0.png")
    assert load(folder, "test").labels.tolist() == [0, 0, 1, 1]
    os.rename(folder / "val", folder / "valid")
    capsys.readouterr()
    assert load(folder, "test") is None
    assert "no images with labels in test/ or val/" in capsys.readouterr().out


def test_images_without_classes_are_for_training(folder):
    flat = load(folder / "train" / "ant")
    assert len(flat) == 3 and (flat.labels == -1).all() and flat.classes == ()
    assert load(folder / "train" / "ant", "test") is None
    save(folder / "train" / "stray.png")
    assert load(folder).labels.tolist() == [0, 0, 0, 1, 1, 1, -1]
    save(folder / "test" / "cat" / "0.png")
    with pytest.raises(UserError, match="cat"):
        load(folder, "test")
    for label in ("ant", "bee"):
        shutil.rmtree(folder / "train" / label)
    assert (load(folder, "test").labels == -1).all() and len(load(folder)) == 1


def test_images_for_testing_are_no_training_images(folder):
    for train, test in (("training", "test"), ("Train", "Test"), ("training", "validation"),
                        ("images/train", "images/val"), ("name/Training", "name/Testing")):
        (folder / train).parent.mkdir(exist_ok=True)
        os.rename(folder / "train", folder / train)
        os.rename(folder / "test", folder / test)
        with pytest.raises(UserError, match=f"found {min(train, test)}/ant/"):
            load(folder)
        os.rename(folder / train, folder / "train")
        os.rename(folder / test, folder / "test")


def test_tiny_imagenets_annotations(folder):
    os.rename(folder / "test", folder.parent / "aside")
    save(folder / "test" / "images" / "test_0.JPEG")
    for i in range(3):
        save(folder / "val" / "images" / f"val_{i}.JPEG", (80 * i, 0, 0))
    lines = [f"val_{i}.JPEG\t{label}\t0\t0\t9\t9\n"
             for i, label in enumerate(("bee", "ant", "bee"))]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    found = load(folder, "test")
    assert found.labels.tolist() == [1, 0, 1]
    assert [round(v / 80) for v in found.pixels[:, 0, 9, 9].tolist()] == [0, 1, 2]


def test_names_that_are_not_utf8(folder):
    odd = os.fsencode(folder / "train") + b"/caf\xe9"
    os.mkdir(odd)
    Image.new("RGB", (40, 40)).save(os.fsdecode(odd + b"/\xff.png"))
    assert load(folder).classes == ("ant", "bee", "caf\\xe9")


@pytest.mark.parametrize("case", ["empty", "download"])
def test_unavailable_data_is_named(case, tmp_path, monkeypatch):
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    (tmp_path / "empty").mkdir()
    data = "cifar10" if case == "download" else str(tmp_path / case)
    with pytest.raises(UserError) as error:
        load_images(data, "train", 32, str(tmp_path / "root"))
    assert f"--data {data}" in str(error.value) and "\n" not in str(error.value)


# Image files

def test_images_are_upright_and_read_in_spite_of_broken_metadata(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # turned by 90°
    for exif, size in ((turned, (20, 40)), (BROKEN_EXIF, (40, 20))):
        save(tmp_path / "a.jpg", size=(40, 20), exif=exif)
        assert read_image(tmp_path / "a.jpg", 20).size == size


def test_transparent_parts_are_white(tmp_path):
    save(tmp_path / "clear.png", (255, 0, 0, 0), mode="RGBA")
    save(tmp_path / "half.png", (0, 0, 0, 128), mode="RGBA")
    assert read_image(tmp_path / "clear.png", 40).getpixel((5, 5)) == (255, 255, 255)
    half = read_image(tmp_path / "half.png", 40).getpixel((5, 5))
    assert half == pytest.approx((127,) * 3, abs=1)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_grey_images_of_16_bits_are_refused(tmp_path, name):
    Image.fromarray(np.array([[0, 257, 25700, 65535]], np.uint16)).save(tmp_path / name)
    with pytest.raises(ValueError, match="8 bits"):
        read_image(tmp_path / name, 4)


def test_the_whole_image_is_stored_squeezed(tmp_path):
    image = Image.new("RGB", (100, 50))
    image.paste((255, 0, 0), (0, 0, 10, 50))
    image.paste((0, 0, 255), (90, 0, 100, 50))
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set" / "wide.png")
    found = load(tmp_path / "set", side=40)
    assert found.pixels[0, :, 20, [1, 20, 38]].T.tolist() == [[255, 0, 0], [0, 0, 0], [0, 0, 255]]
    assert found.aspect.tolist() == [2]


# Downloads and shapes

def test_cifar_becomes_images(monkeypatch):
    x = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    given = types.SimpleNamespace(data=x, targets=[2, 0, 1], classes=["a", "b", "c"])
    monkeypatch.setattr(images.torchvision.datasets, "CIFAR10", lambda *_, **__: given)
    found = load_images("cifar10", "train", 36)
    assert torch.equal(found.pixels, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert found.labels.tolist() == [2, 0, 1] and found.classes == ("a", "b", "c")
    assert load_images("cifar10", "test", 18).pixels.shape == (3, 3, 18, 18)


def test_shapes_are_fixed_by_the_seed_and_classes_do_not_follow_from_color_or_position():
    train, test = (load_images("shapes", split, 16) for split in ("train", "test"))
    assert torch.equal(train.pixels, load_images("shapes", "train", 16).pixels)
    assert not torch.equal(train.pixels, load_images("shapes", "train", 16, seed=1).pixels)
    assert train.labels.bincount().tolist() == [500] * 10 and len(train.classes) == 10

    def color(x):
        return x[:, :, 0, 0] / 255 - 0.5

    def center(x):
        ink = (x.float() - x[:, :, :1, :1].float()).abs().mean(1)
        axis = torch.arange(16.0)
        mass = torch.stack([(ink.sum(1) * axis).sum(1), (ink.sum(2) * axis).sum(1)], 1)
        return mass / ink.sum((1, 2))[:, None] - 7.5

    def accuracy(cue):
        return knn_accuracy(cue(train.pixels), train.labels, cue(test.pixels), test.labels)

    assert accuracy(color) < 0.15 and accuracy(center) < 0.15
    assert accuracy(lambda x: x.flatten(1) / 255 - 0.5) > 0.25


def test_masks_of_shapes_are_where_the_shape_is():
    pixels, _, masks = images.draw_shapes(200, 32, 5)
    grounds = pixels[:, :, 0, 0] > 127
    for image, ground, mask in zip(pixels / 255, grounds, masks):
        inside = ((image > 0.5) != ground[:, None, None]).float().mean(0) > 0.5
        assert (inside == mask).float().mean() > 0.95
    colors = grounds.unique(dim=0, return_counts=True)[1]  # a shape's is its ground's complement
    assert len(colors) == 8 and colors.min() > 10
