"""Curves of a run, grids of images, confusion matrices."""
import itertools
import os
from collections import defaultdict

import torch

# Before matplotlib is imported: needs no display, and a notebook's own backend fails in scripts.
os.environ["MPLBACKEND"] = "agg"
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from images import MEAN, STD


def plot_curves(file, rows):
    """One panel for each column of metrics.csv over epochs. Columns like "m 0", "m 1" share one."""
    panels = defaultdict(dict)
    for name in list(dict.fromkeys(name for row in rows for name in row))[2:]:  # not step, epoch
        points = [(float(row["epoch"]), float(row[name])) for row in rows
                  if row.get(name) not in (None, "")]
        if points:
            title, _, last = name.rpartition(" ")
            shared = title and len(last) < 3  # "reconstruction s" of two branches, "p of head 3"
            panels[title if shared else name][name] = points
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (title, series) in zip(axes, panels.items()):
        for name, points in series.items():
            axis.plot(*zip(*points), marker="." if len(points) < 20 else None, label=name)
        if len(series) > 1:
            axis.legend(fontsize="xx-small", ncols=2)
        last = float(rows[-1]["epoch"]) or 1
        axis.set(title=title.replace("_", " "), xlabel="epoch", xlim=(0, 1.03 * last))
        axis.grid(alpha=0.3)
    for axis in axes[len(panels):]:
        axis.remove()
    figure.savefig(file, dpi=100)


def plot_images(file, rows, names=(), legend=None):
    """A grid: `rows` maps a label to normalised images (n, 3, H, W), or to a list of (3, H, W).

    names: written under the columns. legend: label → colour (3,) in 0…1, written below the grid.
    """
    n = max(len(images) for images in rows.values())
    height = 1.35 * len(rows) + (0.3 if names else 0) + (0.6 if legend else 0)
    figure = Figure(figsize=(1.3 * n + 1.2, height), layout="constrained")
    axes = figure.subplots(len(rows), n, squeeze=False)
    for line, (label, images) in zip(axes, rows.items()):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, image in zip(line, images):
            axis.imshow(denormalize(image).permute(1, 2, 0).numpy(), interpolation="nearest")
        for axis in line:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[-1], names):
        short = name if len(name) < 19 else f"{name[:9]}…{name[-8:]}"
        axis.set_xlabel(short, fontsize="x-small", parse_math=False)
    if legend:
        patches = [Patch(color=color, label=label) for label, color in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(file, dpi=100)


def denormalize(image):
    """The inverse of augment.normalize, clipped to 0…1, as float32 on the CPU: (3, H, W)."""
    mean, std = torch.tensor([MEAN, STD])[..., None, None]
    return (image.float().cpu() * std + mean).clamp(0, 1)


def plot_confusion(file, labels, predictions, classes, title):
    """The confusion matrix in percent of each true class; numbers and names up to 20 classes."""
    n = len(classes)
    counts = torch.bincount(labels * n + predictions, minlength=n * n).reshape(n, n).double()
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class")
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    if n <= 20:
        axis.set_xticks(range(n), classes, rotation=45, ha="right", parse_math=False)
        axis.set_yticks(range(n), classes, parse_math=False)
        for i, j in itertools.product(range(n), repeat=2):
            color = "white" if percent[i, j] > 50 else "black"
            axis.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=color)
    figure.savefig(file, dpi=100)
