"""What is drawn: curves of a run, rows of images, a confusion matrix."""
import re

import numpy as np
import torch
from matplotlib.figure import Figure  # without pyplot: files are drawn without a screen, and a notebook keeps its own
from matplotlib.patches import Patch

from images import denormalize

TITLES = {"knn": "kNN top-1 in %", "rank": "effective rank", "lr": "learning rate", "test top": "test accuracy in %"}


def draw_curves(file, rows):
    """One panel for each column of metrics.csv, over epochs; those that differ in a last number or letter share one."""
    panels, last = {}, float(rows[-1]["epoch"]) or 1  # 0 where a long epoch has just begun
    for name in list(rows[0])[2:]:
        scale = 100 if name == "knn" else 1
        points = [(float(row["epoch"]), scale * float(row[name])) for row in rows if row.get(name, "") != ""]
        if points:
            panels.setdefault(re.sub(r" \w\w?$", "", name), {})[name] = points
    lines = np.array_split(list(panels), -(-len(panels) // 5))  # of at most five panels, and no two much unlike
    figure = Figure(figsize=(3.2 * len(lines[0]), 2.8 * len(lines)), layout="constrained")
    for part, titles in zip(figure.subfigures(len(lines), squeeze=False)[:, 0], lines):
        for axis, title in zip(part.subplots(1, len(titles), squeeze=False)[0], titles):
            for name, points in panels[title].items():
                axis.plot(*zip(*points), marker="." if len(points) < 20 else None, label=name)
            if len(panels[title]) > 1:
                axis.legend(fontsize="xx-small", ncols=2)
            axis.set(title=TITLES.get(title, title.replace("_", " ")), xlabel="epoch", xlim=(0, 1.03 * last))
            axis.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def restored_label(model):
    """What pictures call that which `model` restores."""
    return "reconstruction" + "\n(each patch given its\ntrue mean and contrast)" * model.cfg.norm_pixels


def reconstruction_rows(model, x):
    """Rows for draw_images: normalised images x (n, 3, H, W), what of them the model sees, and what it restores."""
    masked, prediction = model.reconstruct(x)
    return {"original": x, "masked": masked, restored_label(model): prediction}


def draw_images(file, rows, names=(), legend={}):
    """One labelled row for each entry of `rows`: label → n normalised images (3, H, W), each of its own H and W.

    names: of the columns, written under them; legend: label → colour (3,), 0…1, written under all.
    """
    n = max(map(len, rows.values()))
    size = 1.3 * n + 1.2, 1.35 * len(rows) + 0.3 * bool(names) + 0.6 * bool(legend)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), n, squeeze=False)
    for row, (label, images) in zip(axes, rows.items()):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, image in zip(row, images):
            axis.imshow(denormalize(image.float().cpu()).permute(1, 2, 0).numpy(), interpolation="nearest")
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[-1], names):
        axis.set_xlabel(name if len(name) < 19 else f"{name[:9]}…{name[-8:]}", fontsize="x-small", parse_math=False)
    if legend:
        patches = [Patch(color=colour, label=label) for label, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    figure.savefig(file, dpi=100)


def draw_confusion(file, truth, guess, names, by):
    """The confusion matrix of labels `guess` (N,), made `by` a classifier, in percent of each true class.
    Numbers and names up to 20 classes."""
    n = len(names)
    counts = torch.bincount(truth * n + guess, minlength=n * n).reshape(n, n).double()
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    axis = figure.subplots()
    figure.colorbar(axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100), label="% of the true class")
    axis.set(xlabel=f"predicted by the {by}", ylabel="true class")
    if n <= 20:
        axis.set_xticks(range(n), names, rotation=45, ha="right", parse_math=False)
        axis.set_yticks(range(n), names, parse_math=False)
        for i, row in enumerate(share.tolist()):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    figure.savefig(file, dpi=100)
