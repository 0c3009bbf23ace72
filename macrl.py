"""MACRL: Yuchong Yao, Nandakishor Desai and Marimuthu Palaniswami, "Masked Contrastive Representation Learning",
arXiv 2211.06012, 2022. Written from its abstract. A third party's summary names projector and bank; all else that the
abstract does not say, the reconstructed target and all numbers included, was chosen here, often as MAE or MoCo do.

Two views of an image go through a siamese network: one encoder f, and a decoder in each branch, d_s and d_w. Branch s
gets the higher mask ratio and the stronger augmentation. A projector g makes queries q from the features of branch s;
f_ξ and g_ξ, averages of f and g, make keys k from branch w. q and k are contrasted, and both decoders reconstruct.

One training step on B images of N patches, V of them visible, fewer in s than in w; D is the width of a token, P the
number of values of a patch, and mean is the mean over the tokens of the visible patches:
    c_s, c_w = flip(crop(images)), least crop larger for w     # "stronger data augmentation"      (B, 3, 32, 32)
    x_s, x_w = colour(c_s), colour(c_w), less often for w      # the same; all four normalised    (B, 3, 32, 32)
    z_s = f(x_s), 25 % of its patches visible                  # "higher mask ratio"               (B, 1 + V, D)
    z_w = f(x_w), 50 % of its patches visible                  # "weaker data corruptions"         (B, 1 + V, D)
    q, k = g(mean(z_s)), g_ξ(mean(f_ξ(x_w, the same 50 %)))    # "the encoder in both branches"    (B, 128)
    L_c = InfoNCE(q, k; other k, bank of the last 4096 k)      # "contrastive learning objective"  a number
    y_s, y_w = d_s(z_s), d_w(z_w)                              # "the decoders' outputs"           (B, N, P)
    L_s, L_w = L1(y, patches of c) of each, where masked       # "L_1 reconstruction loss"         two numbers
    step of AdamW on λ_c·L_c + λ_r·(L_s + L_w)/2 for f, g, d_s, d_w
    f_ξ, g_ξ ← m·(f_ξ, g_ξ) + (1 - m)·(f, g)                   # "e.g., Momentum Contrast": one reading

What may change the result, because the abstract does not say it: mask ratios (--mask, --mask-w), augmentations
(--crop-min-s, --jitter-s, …), what is reconstructed (--restore, --pixels, --norm-pixels), which features are contrasted
(--pool), how keys are made (--keys, --momentum), negatives (--bank), weights (--lam-c, --lam-r), sizes; and, without a
flag, the projector, that queries come from s alone, and that each branch has its own decoder.
    python macrl.py                                         these defaults, on CIFAR-10, for a GPU
    python macrl.py --keys shared --bank 0                  nearer the abstract: f and g make the keys, too; no bank
    python macrl.py --tiny --data shapes                    a first look on a laptop; then eval_linear.py, show.py
Measured: --tiny, CIFAR-10 (JPEG), steps 141 to 160: loss 6.492, reconstruction 0.741, contrast 5.751.
Every other choice, where projector and bank come from, and commands for each data set: papers/macrl.md.
"""
import copy, math, sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (Batches, Run, autocast, check, check_above, check_config, check_least, check_mask, check_share,
                    color_jitter, cosine_lr, gaussian_blur, init_encoders, launch, load_data, normalize, param_groups,
                    random_grayscale, random_hflip, random_resized_crop, recompute, schedule, seed_step,
                    start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.75  # share of the patches masked in branch s, the "higher mask ratio"; MAE's
    mask_w: float = 0.5  # share of the patches masked in branch w, at most --mask; a choice made here
    lam_c: float = 1.0  # λ_c, weight of the contrast, a choice made here; 0 leaves it out
    lam_r: float = 1.0  # λ_r, weight of the reconstruction, a choice made here; 0 leaves it out
    tau: float = 0.2  # τ, temperature; MoCo v2's
    bank: int = 4096  # keys of earlier steps as negatives, far fewer than there are images, 0: none; a choice made here
    keys: Literal["momentum", "shared"] = "momentum"  # keys by averages of f and g (MoCo's), or by f and g themselves
    momentum: float = 0.99  # of the averages, rising to 1 by half a cosine; MoCo v3's
    pool: Literal["mean", "cls"] = "mean"  # features: mean of the patches (a choice made here), or class token
    restore: Literal["clean", "view"] = "clean"  # target: crop before colours and blur (chosen here), or the view
    pixels: Literal["masked", "all"] = "masked"  # L1 over the masked patches, MAE's, or over all
    norm_pixels: bool = False  # each target patch at mean 0, deviation 1, as in MAE; off is a choice made here
    crop_min_s: float = 0.2  # smallest crop of branch s, share of the area; MoCo v2's
    crop_min_w: float = 0.5  # smallest crop of branch w; a choice made here
    jitter_s: float = 0.8  # probability of colour jitter in branch s; MoCo v2's
    jitter_w: float = 0.4  # probability of colour jitter in branch w; a choice made here
    gray_s: float = 0.2  # probability of greyscale in branch s; MoCo v2's
    gray_w: float = 0.0  # probability of greyscale in branch w; a choice made here
    blur_s: float = 0.0  # probability of blur in branch s; 0 as in SimCLR's runs on CIFAR-10
    blur_w: float = 0.0  # probability of blur in branch w; 0 as in SimCLR's runs on CIFAR-10
    # model
    img: int = 32  # side of the views in pixels: CIFAR-10's
    patch: int = 4  # side of a patch in pixels; a choice made here
    dim: int = 384  # width D; ViT-Small's
    depth: int = 12  # blocks; ViT-Small's
    heads: int = 6  # heads K; ViT-Small's
    hidden: int = 2048  # hidden width of the projector; MoCo v2's
    out_dim: int = 128  # width of queries and keys; MoCo v2's
    decoder_depth: int = 4  # blocks of a decoder; a choice made here
    decoder_dim: int = 192  # width of a decoder; a choice made here
    decoder_heads: int = 6  # heads of a decoder; a choice made here
    # optimisation
    epochs: int = 300  # passes over the data; a choice made here
    batch: int = 256  # images per step and per process; a choice made here
    lr: float = 1e-3  # base learning rate, for a batch of 256; a choice made here
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 40.0  # epochs of linear warm-up; MAE's
    steps: int = 0  # length of training and schedule in steps; 0: as --epochs says
    # run
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; the abstract's first set
    images: int = 0  # train on only so many images, the same ones in every run; 0 for all
    store: int = 0  # side in pixels at which images are kept, squeezed to squares; 0 for 8/7 of --img
    root: str = "data"  # where data sets are downloaded to and decoded
    out: str = ""  # folder of the run, new or empty (default: runs/macrl-DATE-TIME)
    init: str = ""  # begin with the weights of this encoder: a run, its encoder.pt, or a state dict of timm's
    resume: str = ""  # folder of a run to go on with
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    amp: bool = True  # bfloat16 autocast where the device is fast in it
    compile: bool = False  # torch.compile the model
    recompute: bool = False  # compute the encoder's blocks a second time in backward: less memory, more time
    workers: int = 0  # threads that decode a folder; 0: one per core
    log_every: int = 20  # steps between rows of metrics.csv
    knn_every: int = 10  # epochs between kNN checks, 0 for none
    tiny: bool = False  # a size for a laptop

    def __post_init__(self):
        check_config(self)
        check_mask(self)
        N = (self.img // self.patch) ** 2
        check(0 <= self.mask_w <= self.mask, "--mask-w", self.mask_w, f"must lie between 0 and --mask {self.mask}")
        check(self.lam_r == 0 or self.pixels == "all" or round(self.mask_w * N) > 0, "--mask-w", self.mask_w,
              f"masks none of {N} patches, and --pixels masked reconstructs nothing else")
        check_least(self, 0, "lam_c lam_r bank")
        check(self.lam_c + self.lam_r > 0, "--lam-c", self.lam_c, f"and --lam-r {self.lam_r} leave nothing to learn")
        check(self.lam_c == 0 or self.batch >= 2, "--batch", self.batch,
              "must be at least 2, or the batch has no negatives")
        check_above(self, 0, "tau crop_min_s crop_min_w")
        check_share(self, "momentum crop_min_s crop_min_w jitter_s jitter_w gray_s gray_w blur_s blur_w")
        check_least(self, 1, "hidden out_dim")


TINY = Config(bank=1024, dim=192, depth=4, heads=3, hidden=384, out_dim=64, decoder_depth=2, decoder_dim=96,
              decoder_heads=3, epochs=8, batch=128, warmup=1.0, knn_every=1, tiny=True)


# The paper, in its abstract's words. B images, N patches, V the visible ones, D width of a token, P = 3·p·p values of a
# patch of p×p pixels, M keys in the bank, out = --out-dim; (world·B) are the images of all processes. The letters are
# chosen here: s, w branches; f encoder, g projector, f_ξ, g_ξ their averages; d_s, d_w decoders; c crops, x views;
# z tokens, y reconstructed patches; q queries, made from s; k keys, made from w; m momentum; τ temperature; L losses;
# λ weights.

def clean_views(images, cfg, aspect=None):
    """The first half of the "stronger data augmentation": c_s, a crop of each image for branch s, and c_w, one for
    branch w, whose smallest crop is larger; neither is normalised yet. Width over height is 3/4 to 4/3; half of the
    crops are mirrored.

    images (B, 3, S, S), uint8 or 0…1; aspect (B,): their width over height before they were squeezed to squares, 1 if
    None. Returns two of (B, 3, img, img), 0…1.
    """
    return tuple(random_hflip(random_resized_crop(images, cfg.img, (least, 1.0), aspect=aspect))
                 for least in (cfg.crop_min_s, cfg.crop_min_w))


def change_colours(clean, cfg):
    """The second half of the "stronger data augmentation": changes the colours of both crops of clean_views, more often
    in branch s. Each change is as strong in one branch as in the other, with MoCo v3's strengths: brightness, contrast,
    saturation, hue by up to 0.4, 0.4, 0.2, 0.1, blur of 0.1 to 2 pixels. Returns x_s and x_w, normalised, (B, 3, img,
    img) each."""
    chances = (cfg.jitter_s, cfg.gray_s, cfg.blur_s), (cfg.jitter_w, cfg.gray_w, cfg.blur_w)
    return tuple(normalize(gaussian_blur(random_grayscale(color_jitter(x, p=jitter), gray), blur))
                 for x, (jitter, gray, blur) in zip(clean, chances))


def views(images, cfg, aspect=None):
    """The views of branch s and branch w, normalised (B, 3, img, img); arguments as for clean_views. `train` calls the
    two halves itself, because it needs the crops as targets."""
    return change_colours(clean_views(images, cfg, aspect), cfg)


def random_mask(B, N, ratio, device=None):
    """Which of N places are masked: bool (B, N), 1 = masked; equally many in each row, every place as likely."""
    order = torch.rand(B, N, device=device).argsort(1)  # a permutation of 0 … N - 1 in each row
    return order < round(ratio * N)  # true at exactly round(ratio·N) places of each row


def visible_first(mask):
    """The patches of each image in order, the visible ones before the masked ones: mask (B, N) → ids (B, N)."""
    return mask.int().argsort(dim=1, stable=True)


def take(x, ids):
    """The tokens `ids` (B, V) of x (B, N, D): (B, V, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class MACRL(nn.Module):
    """The siamese network, "encoder-decoder structure in both branches", and its losses."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.N = cfg, (cfg.img // cfg.patch) ** 2
        self.encoder = Encoder(cfg, cfg.pool)  # f, of both branches

        def decoder():
            blocks = [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
            return Decoder(cfg.dim, cfg.img // cfg.patch, 3 * cfg.patch ** 2, cfg.decoder_dim, blocks)
        self.decoder_s, self.decoder_w = decoder(), decoder()  # d_s, d_w
        self.g = mlp(cfg.dim, cfg.hidden, cfg.out_dim).apply(init_weights)  # g
        if cfg.keys == "momentum":
            self.f_xi = copy.deepcopy(self.encoder).requires_grad_(False)  # f_ξ, begins as f; train moves it
            self.g_xi = copy.deepcopy(self.g).requires_grad_(False)  # g_ξ, likewise
        self.bank = Bank(cfg.bank, cfg.out_dim)  # the keys of earlier steps
        self.g.requires_grad_(cfg.lam_c > 0)  # what a weight of 0 leaves out is not trained
        self.decoder_s.requires_grad_(cfg.lam_r > 0)
        self.decoder_w.requires_grad_(cfg.lam_r > 0)

    def forward(self, view1, view2, target1=None, target2=None):
        """Views of branch s (view1) and w (view2), and the images that they are to reconstruct (target1, target2; None:
        the view itself), all normalised, (B, 3, H, W). Returns numbers by name: "contrast" is L_c, "reconstruction s"
        L_s, "reconstruction w" L_w, "reconstruction" the mean of these two, "loss" the weighted sum. What has weight 0
        is not among them. Puts the keys into the bank."""
        cfg, L_c, L_r, losses = self.cfg, 0, 0, {}
        mask_s, visible_s = self.draw(view1, cfg.mask)  # "higher mask ratio", (B, N), (B, V)
        mask_w, visible_w = self.draw(view2, cfg.mask_w)  # "weaker data corruptions", (B, N), (B, V)
        z_s = self.encoder(view1, visible_s)  # (B, 1 + V, D)
        if cfg.lam_r > 0 or cfg.keys == "shared":  # not needed where f_ξ makes the keys and nothing is reconstructed
            z_w = self.encoder(view2, visible_w)  # (B, 1 + V, D)

        if cfg.lam_c > 0:  # "features from the encoder in both branches"
            q = gather(self.g(self.encoder.vector(z_s)))  # (world·B, out)
            if cfg.keys == "momentum":
                with torch.no_grad():
                    k = gather(self.g_xi(self.f_xi.vector(self.f_xi(view2, visible_w))))  # (world·B, out)
            else:
                k = gather(self.g(self.encoder.vector(z_w)))  # (world·B, out)
            losses["contrast"] = L_c = info_nce_loss(q, k, self.bank.keys, cfg.tau)  # "contrastive learning objective"
            self.bank.push(k)
        if cfg.lam_r > 0:  # "the decoders' outputs"
            y_s, y_w = self.decoder_s(z_s, visible_s), self.decoder_w(z_w, visible_w)  # (B, N, P) each
            L_s = self.l1(y_s, view1 if target1 is None else target1, mask_s)
            L_w = self.l1(y_w, view2 if target2 is None else target2, mask_w)
            L_r = (L_s + L_w) / 2
            losses |= {"reconstruction": L_r, "reconstruction s": L_s, "reconstruction w": L_w}
        return {"loss": cfg.lam_c * L_c + cfg.lam_r * L_r, **losses}

    def draw(self, x, ratio):
        """A mask (B, N) for views (B, 3, H, W), and the patches that it leaves visible, (B, V)."""
        mask = random_mask(len(x), self.N, ratio, x.device)
        return mask, visible_first(mask)[:, :self.N - round(ratio * self.N)]

    def l1(self, y, target, mask):
        """The L1 loss of reconstructed patches (B, N, P) and target images (B, 3, H, W), mask (B, N); --norm-pixels and
        --pixels decide what is compared."""
        patches = patchify(target, self.cfg.patch)  # (B, N, P)
        patches = normalize_patches(patches) if self.cfg.norm_pixels else patches
        return reconstruction_loss(y, patches, mask if self.cfg.pixels == "masked" else torch.ones_like(mask))

    @torch.no_grad()
    def reconstruct(self, x, branch="s", target=None):
        """Normalised images (B, 3, H, W) → (masked input, prediction) of a branch, both normalised images.

        Visible patches that the loss leaves out (--pixels masked) are shown as they are. With --norm-pixels each
        patch gets the mean and deviation that it has in `target`, the images themselves if None.
        """
        cfg, patches = self.cfg, patchify(x, self.cfg.patch)  # (B, N, P)
        ratio, decoder = {"s": (cfg.mask, self.decoder_s), "w": (cfg.mask_w, self.decoder_w)}[branch]
        mask, visible = self.draw(x, ratio)
        y = decoder(self.encoder(x, visible), visible).float()  # (B, N, P)
        if cfg.norm_pixels:
            y = denormalize_patches(y, patches if target is None else patchify(target, cfg.patch))
        masked = mask[:, :, None]  # (B, N, 1)
        shown = torch.where(masked, y, patches) if cfg.pixels == "masked" else y
        return unpatchify(patches.masked_fill(masked, 0), cfg.patch), unpatchify(shown, cfg.patch)


class Bank(nn.Module):
    """The keys of earlier steps, (M, out), first in, first out; random unit vectors until the first M have come."""
    def __init__(self, M, out):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(M, out), dim=1))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))  # how many have come

    @torch.no_grad()
    def push(self, k):
        """Writes n keys (n, out), not yet of length 1, over the n oldest. If n is above M, only the last M are kept."""
        M = len(self.keys)
        if M > 0:
            k = F.normalize(k[-M:].float(), dim=1)
            self.keys.index_copy_(0, (self.pushed + torch.arange(len(k), device=k.device)) % M, k)
            self.pushed.add_(len(k))


def info_nce_loss(q, k, bank, tau):
    """InfoNCE, a number: the positive of q[i] is k[i], its negatives are the other rows of k and all rows of the bank.
    q, k (B, out), bank (M, out); M may be 0. The mean over i. In training B is the batch of all processes."""
    with torch.autocast(q.device.type, enabled=False):
        keys = torch.cat([F.normalize(k.float(), dim=1), F.normalize(bank.float(), dim=1)])  # (B + M, out)
        logits = F.normalize(q.float(), dim=1) @ keys.mT / tau  # (B, B + M)
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))


def reconstruction_loss(pred, target, mask):
    """Mean absolute error of (B, N, P) over the patches where mask (B, N) is 1; 0 if there is none."""
    error = (pred.float() - target.float()).abs().mean(2)  # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data, test = load_data(cfg)
    batches = Batches(data, cfg.batch, cfg.seed, here)
    steps, warmup = schedule(cfg, len(batches))

    torch.manual_seed(cfg.seed)
    model = MACRL(cfg).to(here.device)
    init_encoders(model, cfg.init)
    if cfg.recompute:
        recompute(model)
    net = DistributedDataParallel(model, broadcast_buffers=False) if here.world > 1 else model  # buffers never differ
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net  # draws as the plain model does
    peak = cfg.lr * cfg.batch * here.world / 256  # MAE's rule
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, betas=(0.9, 0.95), fused=True)  # MAE's

    run = Run("macrl", cfg, here, len(batches))
    step = run.resume(model=model, optimizer=optimizer)
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        images, aspect = batches[step]
        clean = clean_views(images, cfg, aspect)
        view1, view2 = change_colours(clean, cfg)
        targets = [normalize(c) for c in clean] if cfg.restore == "clean" else []  # c_s, c_w; []: the views themselves
        with autocast(here.device, cfg.amp):
            losses = net(view1, view2, *targets)
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, peak)
        optimizer.step()
        optimizer.zero_grad()
        if cfg.lam_c > 0 and cfg.keys == "momentum":
            m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2  # rises to 1, MoCo v3's way
            ema(model.f_xi, model.encoder, m)  # average ← m·average + (1 - m)·model
            ema(model.g_xi, model.g, m)

        step += 1
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        run.save(step, data, test, model=model, optimizer=optimizer)
    return run.finish()


# Parts. K heads, each d = D/K wide; q, k, v are those of attention, not of the contrast; width is the decoder's.

def ema(average, model, m):
    """average ← m·average + (1 - m)·model, weight by weight, for two networks of the same shape."""
    torch.optim.swa_utils.get_ema_multi_avg_fn(m)(list(average.parameters()), list(model.parameters()), None)


class Gather(torch.autograd.Function):
    """(B, D) → (world·B, D). Every process computes the same loss of all rows, so each gives a row the same gradient.
    Backward adds these up, to world times one; DistributedDataParallel, which averages, divides by world again."""
    @staticmethod
    def forward(ctx, z):
        rows = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, z.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # all_reduce writes into it
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(z):
    """(B, D) → the rows of all processes, with gradient; z itself where there is one process."""
    return Gather.apply(z) if dist.is_initialized() else z


def patchify(x, p):
    """Images (B, 3, H, W) → patches (B, N, P), P = 3·p·p ordered (channel, row, column): PixelShuffle undone."""
    return F.pixel_unshuffle(x, p).flatten(2).mT


def unpatchify(x, p):
    """Patches (B, N, P) of a square image → (B, 3, H, W), by PixelShuffle."""
    return F.pixel_shuffle(x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1)), p)


def normalize_patches(patches):
    """Each patch of (B, N, P) to mean 0 and standard deviation 1, as in MAE."""
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


def denormalize_patches(pred, patches):
    """Gives predicted normalised patches (B, N, P) the mean and deviation that the true `patches` have."""
    return pred * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)


def sincos_pos_embed(dim, grid):
    """Fixed sine-cosine positions of grid×grid patches, (1, N, D): half of D for the row, half for the column."""
    omega = 10000 ** -(torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(grid)[:, None] * omega  # (grid, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # of a row or a column, (grid, D/2)
    rows, columns = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], 2).reshape(1, grid * grid, dim)


def init_weights(module):
    """Xavier-uniform weights, zero biases, as in MAE, where only the patch embedding's bias begins as PyTorch's."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # flatten gives a view: the weight is filled
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp(dim, hidden, out):
    """Two layers with GELU between, each token on its own; parts named as in timm."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, out)))


def attend(q, k, v):
    """softmax(q·kᵀ/√d)·v of each head, (B, K, N, d) each → (B, K, N, d). On CPUs always in float32: the backward of
    attention in bfloat16 is several times slower there."""
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) → (B, N, D)."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, K, N, d) each
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) → (B, N, D)."""
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, 4 * dim, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A ViT with class token; its state dict loads into timm's ViT of the same size without renaming. An image's vector
    is the mean of its patches' tokens (pool "mean") or the class token ("cls")."""
    def __init__(self, cfg, pool="mean"):
        super().__init__()
        self.pool = pool
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        pos_embed = sincos_pos_embed(cfg.dim, cfg.img // cfg.patch)
        self.register_buffer("pos_embed", F.pad(pos_embed, (0, 0, 1, 0)))  # 0 for the class token
        self.blocks = nn.ModuleList(Block(cfg.dim, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x, visible=None):
        """Images (B, 3, H, W) → (B, 1 + V, D), class token first. Only the patches `visible` (B, V) are seen; None: all
        N."""
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[:, 1:]  # (B, N, D)
        x = x if visible is None else take(x, visible)  # (B, V, D)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)  # (B, 1 + V, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def vector(self, z):
        """One vector (B, D) for the tokens (B, 1 + V, D) of an image."""
        return z[:, 1:].float().mean(1) if self.pool == "mean" else z[:, 0].float()

    def tokens(self, x):
        """The patches' tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)[:, 1:]

    def features(self, x):
        """One vector for each whole image, (B, 3, H, W) → (B, D)."""
        return self.vector(self(x))


class Decoder(nn.Module):
    """Class token and tokens (B, 1 + V, D) of the patches `visible` (B, V), and mask tokens elsewhere → (B, N, P)."""
    def __init__(self, dim, grid, P, width, blocks):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", F.pad(sincos_pos_embed(width, grid), (0, 0, 1, 0)))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, P)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, z, visible):
        cls, tokens = self.embed(z).split([1, visible.shape[1]], 1)  # (B, 1, width), (B, V, width)
        x = self.mask_token.to(tokens.dtype).expand(len(z), self.pos_embed.shape[1] - 1, -1)  # (B, N, width)
        x = x.scatter(1, visible[:, :, None].expand_as(tokens), tokens)  # each token to its place
        x = torch.cat([cls, x], 1) + self.pos_embed  # (B, 1 + N, width)
        return self.pred(self.norm(self.blocks(x)))[:, 1:]  # (B, N, P)


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("macrl", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
