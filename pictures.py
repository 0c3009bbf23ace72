"""What is drawn: curves of a run, rows of images, a confusion matrix."""
import re

import matplotlib
import matplotlib.pyplot as plt
import torch

from images import denormalize

matplotlib.use("Agg")  # draws to files, on machines without a screen too


def draw_curves(file, rows):
    """One panel for each column of metrics.csv, over epochs; those that differ in a last number or letter share one."""
    panels, titles = {}, {"knn": "kNN top-1", "lr": "learning rate", "test top": "test accuracy in %"}
    for name in list(rows[0])[2:]:
        points = [(float(row["epoch"]), float(row[name])) for row in rows if row.get(name, "") != ""]
        if points:
            panels.setdefault(re.sub(r" \w\w?$", "", name), {})[name] = points
    columns, rows_of_panels = min(len(panels), 5), -(-len(panels) // 5)
    figure, axes = plt.subplots(rows_of_panels, columns, figsize=(3.2 * columns, 2.8 * rows_of_panels),
                                squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        for name, points in lines.items():
            axis.plot(*zip(*points), marker="." if len(points) < 20 else None, label=name)
        if len(lines) > 1:
            axis.legend(fontsize="xx-small", ncols=2)
        axis.set(title=titles.get(title, title.replace("_", " ")), xlabel="epoch")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def reconstruction_rows(model, x):
    masked, prediction = model.reconstruct(x)
    return {"original": x, "masked": masked, "reconstruction": prediction}


def draw_images(file, pictures):
    """One labelled row for each entry of `pictures`: label → normalised images (n, 3, H, W)."""
    n = max(map(len, pictures.values()))
    figure, axes = plt.subplots(len(pictures), n, figsize=(1.3 * n + 1.2, 1.35 * len(pictures)), squeeze=False,
                                layout="constrained")
    for row, (label, images) in zip(axes, pictures.items()):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, image in zip(row, denormalize(images.float().cpu())):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        plt.setp(row, xticks=[], yticks=[])
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_confusion(file, truth, guess, names, by):
    """The confusion matrix of labels `guess` (N,), made `by` a classifier, in percent of each true class.
    Numbers and names up to 20 classes."""
    n = len(names)
    counts = torch.bincount(truth * n + guess, minlength=n * n).reshape(n, n).double()
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, axis = plt.subplots(figsize=(8, 7), layout="constrained")
    figure.colorbar(axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100), label="% of the true class")
    axis.set(xlabel=f"predicted by the {by}", ylabel="true class")
    if n <= 20:
        axis.set_xticks(range(n), names, rotation=45, ha="right")
        axis.set_yticks(range(n), names)
        for i, row in enumerate(share.tolist()):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    figure.savefig(file, dpi=100)
    plt.close(figure)
