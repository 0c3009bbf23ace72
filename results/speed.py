"""How fast `--tiny` trains: images/s over the batch size, and the seconds of a first epoch over the number of images.

    python results/speed.py data/cifar10                    a folder of images; leaves speed.csv and speed.png

Each figure is of a training without kNN checks: images/s is what metrics.csv says of all steps but the first, the
seconds are those of `train` from its first line to its last, with data, pictures and checkpoint. The images have been
decoded before.
"""
import csv, importlib, pathlib, sys, tempfile, time
from dataclasses import replace

import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import answer

METHODS, IMAGES = ("mclim", "mvmae", "cmae", "macrl", "camae"), (500, 1000, 2000)
BATCHES = {4: 60, 16: 30, 64: 10, 256: 5}  # and the steps of each


def measure(method, data, **changes):
    """Images/s and seconds of a `--tiny` training of `method` with `changes` to its Config."""
    module = importlib.import_module(method)
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(module.TINY, data=data, knn_every=0, log_every=10 ** 6, out=f"{folder}/run", **changes)
        begin = time.perf_counter()
        module.train(cfg)
        seconds = time.perf_counter() - begin
        with open(f"{folder}/run/metrics.csv", newline="") as file:
            rates = [float(row["images_per_second"]) for row in csv.DictReader(file) if row["images_per_second"]]
    return rates[-1], seconds


def draw(rows):
    """Draws speed.png of the rows of speed.csv."""
    figure, (left, right) = plt.subplots(1, 2, layout="constrained", figsize=(9, 3.5))
    for method in METHODS:
        for axis, x, y in ((left, "batch", "images_per_second"), (right, "images", "seconds")):
            mine = [(int(row[x]), float(row[y])) for row in rows if row["method"] == method and row[y]]
            axis.plot(*zip(*mine), "o-", label=method)
    left.set(xscale="log", xlabel="batch", ylabel="images/s", ylim=(0, None))
    left.set(xticks=list(BATCHES), xticklabels=list(BATCHES))
    left.minorticks_off()
    right.set(xlabel="images", ylabel="seconds of the first epoch", xticks=IMAGES, xlim=(0, None), ylim=(0, None))
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(HERE / "speed.png", dpi=100)


def main(data):
    """Measures all and writes speed.csv and speed.png."""
    rows = []
    for method in METHODS:
        for batch, steps in BATCHES.items():
            rate, _ = measure(method, data, batch=batch, steps=steps)
            rows.append({"method": method, "batch": batch, "images": "", "images_per_second": rate, "seconds": ""})
        for n in IMAGES:
            _, seconds = measure(method, data, images=n, epochs=1, warmup=0.2)
            rows.append({"method": method, "batch": 128, "images": n, "images_per_second": "",
                         "seconds": round(seconds, 1)})
        with open(HERE / "speed.csv", "w", newline="") as file:  # after each method
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    draw(rows)


if __name__ == "__main__":
    sys.exit(answer("speed.py", lambda: main(*(sys.argv[1:] or ["data/cifar10"]))))
