"""How much of what an encoder's tokens hold is the place of the patch, and how much is the image.

    python results/places.py data/cifar10 RUN RUN …           a folder of images, and folders of runs

Of the tokens of 1,000 test images, centred: the share of their variance that is in the mean over images of each place,
and the share that is in the mean over places of each image. Each run is followed by the untrained encoder of its size.
"""
import pathlib, sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from common import answer, central_crop, check, fixed_choice, load_images, normalize
from eval_linear import load_model


@torch.no_grad()
def shares(encoder, images, img):
    """The share of the place and that of the image, 0…1, in the tokens of uint8 images (N, 3, S, S)."""
    tokens = torch.cat([encoder.eval().tokens(normalize(central_crop(x, img))) for x in images.split(250)])  # (N, n, D)
    tokens = tokens.double() - tokens.double().mean((0, 1))
    whole = tokens.square().sum(2).mean()
    return [(tokens.mean(axis).square().sum(1).mean() / whole).item() for axis in (0, 1)]


def main(data="", *runs):
    """Prints a line for each run, and one for its untrained encoder. Raises UserError."""
    check(runs, "RUN", "…", "name a folder of images, then the folders of runs")
    for run in runs:
        for trained in (True, False):
            model, cfg = load_model(run, trained)
            images = load_images(data, "test", cfg.store or round(cfg.img * 8 / 7))[0]
            place, image = shares(model.encoder, images[fixed_choice(len(images), 1_000)], cfg.img)
            print(f"{run}{', untrained' * (not trained)}: place {place:.2f}, image {image:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(answer("places.py", lambda: main(*sys.argv[1:])))
