"""Weights, whichever paper they are of: on disk, from elsewhere, and what they are worth while they train.

A method file imports all of it from common.py.
"""
import contextlib, ctypes, dataclasses, functools, math, os, pathlib, sys, zipfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from images import UserError, central_crop, check, normalize


# On disk

def newest(folder):
    """What a message says of the checkpoints in the folder of a run."""
    files = [file for file in (folder / "last.pt", folder / "previous.pt") if file.exists()]
    return f"the last checkpoint, {files[0]}, is still good" if files else "there is no checkpoint yet"


def save_file(state, file, previous=None):
    """Writes `state` beside `file`, then moves it over, so that `file` is always whole; the old one becomes `previous`.
    Raises OSError, disk full."""
    part = file.with_suffix(".part")
    try:
        torch.save(state, part)
        if previous and file.exists():
            os.replace(file, previous)
        os.replace(part, file)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{file}: can't be written ({error}); {newest(file.parent)}") from error


def save_checkpoint(file, method, cfg, step, **parts):
    """Writes the state of `parts` (model, optimizer, …) to `file`; the one before becomes previous.pt beside it."""
    file, state = pathlib.Path(file), {"method": method, "config": dataclasses.asdict(cfg), "step": step}
    state.update((name, part.state_dict()) for name, part in parts.items())
    save_file(state, file, file.with_name("previous.pt"))


def read_file(flag, file):
    """What torch.save wrote to `file`, tensors and plain values. Raises UserError if a bit of it is wrong (torch's
    old format, without checksums, aside)."""
    check(file.is_file(), flag, file, "does not exist")
    try:
        if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
            raise zipfile.BadZipFile("a checksum is wrong")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, EOF, runtime: torch names no narrower one
        before = file.with_name("previous.pt")
        raise UserError(f"{flag} {file}: is damaged, truncated or no checkpoint ({type(error).__name__})" + (
            f"; delete it, and {before}, the one before, is taken" if file.name == "last.pt" and before.exists() else ""
        )) from error


def load_checkpoint(file, method=None, **parts):
    """Reads a file of save_checkpoint, or a run's newest, into `parts`; returns it. Raises UserError if it can't."""
    file = pathlib.Path(file)
    if file.is_dir():
        there = [name for name in ("last.pt", "previous.pt") if (file / name).exists()]
        check(there, "checkpoint", file, "holds neither last.pt nor previous.pt: nothing has been saved in it")
        file = file / there[0]
    state = read_file("checkpoint", file)
    check(isinstance(state, dict) and "method" in state, "checkpoint", file, "is not a last.pt of this project")
    check(method in (None, state["method"]), "checkpoint", file, f"is of {state['method']}, not of {method}")
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"checkpoint {file}: does not fit: {' '.join(str(error).split())[:300]}") from error
    return state


# From elsewhere, and to elsewhere

def init_encoders(model, file):
    """--init: a run's encoder, or a ViT of timm's, becomes model.encoder and the copy of it, if any, as the run begins.

    file: a run's folder, its encoder.pt, or a state dict of timm's; "" for nothing. A timm classifier's head is left
    out. Raises UserError, which says what does not fit.
    """
    if not file or model.cfg.resume:
        return
    file, ours = pathlib.Path(file), model.encoder.state_dict()
    state = read_file("--init", file / "encoder.pt" if file.is_dir() else file)
    check(isinstance(state, dict), "--init", file, "holds no state dict")
    check("method" not in state, "--init", file, "is a checkpoint: name the run's folder or its encoder.pt")
    state = state.get("model", state)  # MAE's published files
    whole = isinstance(state, dict) and all(isinstance(name, str) and torch.is_tensor(x) for name, x in state.items())
    check(whole, "--init", file, "holds no state dict")
    aside = [name for name in state if name.startswith(("head.", "fc_norm."))]
    state = {name: value for name, value in state.items() if name not in aside}
    if "fc_norm." in " ".join(aside):  # a norm after the pooling, instead of `norm` before it
        state = {**{name: value for name, value in ours.items() if name.startswith("norm.")}, **state}
    wrong = [f"{name} is missing" for name in ours if name not in state]
    wrong += [f"{name} is left over" for name in state if name not in ours]
    wrong += [f"{name} is {tuple(value.shape)}, not {tuple(ours[name].shape)}" for name, value in state.items()
              if name in ours and value.shape != ours[name].shape]
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    check(not wrong, "--init", file, f"does not fit: {', '.join(wrong[:5])}{more}")
    for network in model.children():
        if network.state_dict().keys() == ours.keys():
            network.load_state_dict(state)
    if not dist.is_initialized() or dist.get_rank() == 0:
        anew = "; norm begins anew" if "fc_norm." in " ".join(aside) else ""
        print(f"--init {file}: ignored: {', '.join(aside) or 'nothing'}{anew}", flush=True)


def timm_call(cfg, encoder):
    """The call that makes timm's ViT which this encoder's state dict fits and which gives its features; None for Swin,
    for HiViT, and for a Config without sizes."""
    if not hasattr(cfg, "patch") or getattr(cfg, "backbone", "vit") != "vit":
        return None
    token, pool = hasattr(encoder, "cls_token"), "token" if getattr(encoder, "pool", "mean") == "cls" else "avg"
    return (f'timm.create_model("vit_base_patch16_224", img_size={cfg.img}, patch_size={cfg.patch}, '
            f'embed_dim={cfg.dim}, depth={cfg.depth}, num_heads={cfg.heads}, class_token={token}, '
            f'global_pool="{pool}", fc_norm=False, num_classes=0)')


# Numerics

def autocast(device, amp=True):
    """bfloat16 autocast where a GPU or an x86 CPU computes in bfloat16, else float32."""
    cpu = torch.cpu.get_capabilities()
    able = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(amp and able))


def keep_memory():
    """On Linux with the GNU C library, memory that a step frees stays with the process: the kernel fills with zeros
    what it hands out again, and that takes long. Elsewhere nothing happens."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library has no mallopt
            library = ctypes.CDLL(None)
            library.mallopt(-4, 0)  # M_MMAP_MAX: no block is got from the kernel on its own
            library.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: free memory stays


def cosine_lr(step, steps, warmup, peak):
    """Learning rate of step 0 … steps - 1: a line up to `peak` over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def param_groups(model, wd):
    """AdamW's groups of what is trained: no weight decay on biases and norms (one-dimensional), tokens, positions."""
    groups = [{"params": [], "weight_decay": wd}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim < 2 or "token" in name or "pos" in name]["params"].append(p)
    return groups


def recompute(model):
    """--recompute: the residual blocks of model.encoder keep only their input for backward, which computes them again.
    Returns the model, which must not be copied afterwards."""
    for block in model.encoder.modules():
        if "mlp" in dict(block.named_children()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model


# What they are worth

def fixed_choice(n, k):
    """The same k of n ids each time, or all n, in the same random order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k]


@torch.no_grad()
def extract_features(encoder, images, img, here, amp=True, aspect=None):
    """encoder.features of uint8 images (N, 3, S, S) cropped to img×img: float32 (N, D) on the device."""
    rows = []
    for ids in torch.arange(len(images)).split(250):
        x = central_crop(images[ids].to(here.device), img, None if aspect is None else aspect[ids])
        with autocast(here.device, amp):
            rows.append(encoder.features(normalize(x)).float())
    return torch.cat(rows)


def knn_votes(features, labels, queries, k=20, tau=0.07):
    """(Q, classes): the k rows of `features` (N, D) nearest by cosine vote for their labels, by exp(cosine / tau)."""
    bank, votes = F.normalize(features.float(), dim=1), []
    for q in F.normalize(queries.float(), dim=1).split(500):
        similarity, nearest = (q @ bank.T).topk(min(k, len(bank)))                         # (500, k)
        vote = torch.zeros(len(q), int(labels.max()) + 1, device=q.device)
        votes.append(vote.scatter_add(1, labels[nearest], (similarity / tau).exp()))
    return torch.cat(votes)


def knn_accuracy(features, labels, queries, query_labels, k=20, tau=0.07):
    """Top-1, 0…1, of weighted k-nearest-neighbour classification of `queries` (Q, D)."""
    return (knn_votes(features, labels, queries, k, tau).argmax(1) == query_labels).double().mean().item()


def online_knn(encoder, train, test, cfg, here):
    """knn_accuracy on the same 5,000 and 1,000 labelled images of load_images' triples `train` and `test` each time."""
    parts = []
    for (images, labels, aspect), n in ((train, 5_000), (test, 1_000)):
        ids = (labels >= 0).nonzero().flatten()
        ids = ids[fixed_choice(len(ids), n)]
        parts.append(extract_features(encoder, images[ids], cfg.img, here, cfg.amp, aspect[ids]))
        parts.append(labels[ids].to(here.device))
    return knn_accuracy(*parts)


def effective_rank(features):
    """RankMe, arXiv 2210.02885: over how many directions features (N, D) spread, 1 … min(N, D). The exponential of the
    entropy of their singular values, each as a share of their sum."""
    sigma = torch.linalg.svdvals(features.float())
    p = sigma / sigma.sum().clamp(min=1e-12) + 1e-7
    return torch.special.entr(p).sum().exp().item()


def check_features(encoder, train, test, cfg, here):
    """{"rank": effective_rank of the same 2,000 training images each time, "knn": online_knn}; no "knn" where the
    training labels have fewer than two classes or no test image has a label."""
    ids = fixed_choice(len(train[0]), 2_000)
    found = {"rank": effective_rank(extract_features(encoder, train[0][ids], cfg.img, here, cfg.amp, train[2][ids]))}
    if test is not None and (test[1] >= 0).any() and len(train[1][train[1] >= 0].unique()) > 1:
        found["knn"] = online_knn(encoder, train, test, cfg, here)
    return found
