"""A linear probe with the recipe of the Keras example, on the frozen encoders of runs.

    python results/keras_probe.py RUN RUN …           folders of runs on data with classes

A linear layer by SGD with momentum 0.9: rate 0.1 after a warm-up of a tenth, then cosine, 50 epochs in batches of 256;
on the features as they are, as theirs, and on the same features standardised. Theirs sees augmented images, this one
does not. Each run is followed by its untrained encoder.
"""
import pathlib, sys

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from common import answer, check, cosine_lr, extract_features, load_data, start_processes
from eval_linear import load_model


def probe(features, labels, epochs=50, batch=256, peak=0.1):
    """A linear layer, trained on features (N, D) and their labels (N,)."""
    torch.manual_seed(0)
    head = torch.nn.Linear(features.shape[1], int(labels.max()) + 1, device=features.device)
    torch.nn.init.xavier_uniform_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=peak, momentum=0.9)
    steps = len(features) // batch * epochs
    for step in range(steps):
        if step % (steps // epochs) == 0:
            order = torch.randperm(len(features)).to(features.device)
        ids = order[step % (steps // epochs) * batch:][:batch]
        F.cross_entropy(head(features[ids]), labels[ids]).backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, steps // 10, peak)
        optimizer.step()
        optimizer.zero_grad()
    return head


def main(*runs):
    """Prints the top-1 in % of each run and of its untrained encoder, on the test images. Raises UserError."""
    check(runs, "RUN", "…", "name the folders of runs")
    here = start_processes("auto")
    for run in runs:
        for trained in (True, False):
            model, cfg = load_model(run, trained)
            (known, labels, aspect), (asked, truth, shape) = load_data(cfg)
            encoder = model.encoder.to(here.device).eval()
            with torch.no_grad():
                features = extract_features(encoder, known, cfg.img, here, cfg.amp, aspect)
                queries = extract_features(encoder, asked, cfg.img, here, cfg.amp, shape)
            mean, deviation = features.mean(0), features.std(0)
            for kind, x, asks in (("as they are", features, queries),
                                  ("standardised", (features - mean) / deviation, (queries - mean) / deviation)):
                guess = probe(x, labels.to(here.device))(asks).argmax(1).cpu()
                print(f"{run}{', untrained' * (not trained)}, features {kind}: "
                      f"{100 * (guess == truth).double().mean():.2f} % of the test images", flush=True)


if __name__ == "__main__":
    sys.exit(answer("keras_probe.py", lambda: main(*sys.argv[1:])))
