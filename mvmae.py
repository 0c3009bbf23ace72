"""Multi-View MAE: Seungbin Ji, Sangkwon Han and Jongtae Rhee, "Multi-View Masked Autoencoder for General Image
Representation", Applied Sciences 13(22), 12413, 2023, doi:10.3390/app132212413.

Two crops of each image are taken, 80 % of the patches of each are masked, and one autoencoder reconstructs both crops.
The latents of the visible patches are contrasted: the two of one image attract, those of different images repel each
other. Masking is the strong augmentation that the contrast needs; apart from it, views are only cropped and flipped.

One training step on B images (the paper's N) of N patches, V visible, D the width of a token, P the values in a patch:
    view1, view2 = two crops of each, flipped at random    # §3.1.1    (B, 3, 224, 224), normalised
    mask = 80 % of the patches of each view, at random     # §3.1.2    (2·B, N)
    visible = the patches that are not masked              # Eq. 1     (2·B, V)
    z = f(visible patches + positions)                     # Eq. 2     (2·B, 1 + V, D), class token first
    y = g(z and mask tokens, + positions)                  # §3.1.4    (2·B, N, P)
    L_r = MSE(y, views), masked patches only               # Eq. 3     a number
    z1, z2 = mean of the patches' tokens in z              # see --pool (B, D)
    L_c = NT-Xent(z1, z2)                                  # Eq. 4–6   a number
    step of AdamW on L_r + λ·L_c for f, g                  # Eq. 7

What may change the result, because the paper leaves it open or contradicts itself, and its flag:
    --pool      which vector of a latent is contrasted; no projection head, because the paper names none
    --norm-pixels, --pixels      target of Eq. 3, patches it counts; its printed sum: --pixels all --lam 1.3e-5
    --tau       0.07; the paper calls it the default of SimCLR, whose own is 0.1
    --crop-min, --kernel         the smallest crop, and how crops are resized
    --mask, --lam, --decoder-depth      with which values of these each row of Tables 5 and 6 was made
    python mvmae.py --data PATH                              the paper's run, ImageNet-1K in PATH, on one GPU
    python mvmae.py --tiny --data shapes                     a first look on a laptop
    python eval_finetune.py runs/mvmae-DATE-TIME             accuracy, fine-tuned; then eval_linear.py, show.py

Measured: --tiny, CIFAR-10 (JPEG), steps 381 to 390 (epoch 1): loss 3.172, reconstruction 0.595, contrast 1.289.
The flags that give MAE, every other choice, symbol and misprint, and the paper's tables: papers/mvmae.md.
"""
import math, sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (Batches, Run, autocast, check, check_above, check_config, check_least, check_mask, cosine_lr,
                    init_encoders, launch, load_data, normalize, param_groups, random_hflip, random_resized_crop,
                    recompute, schedule, seed_step, start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.8  # share of the patches that is masked, Table 5
    lam: float = 2.0  # λ, weight of the contrast, Table 5; 0 leaves it out
    tau: float = 0.07  # τ, temperature, §3.2.2
    targets: Literal["two", "same", "one"] = "two"  # two crops; same: one masked twice, Table 6; one: one view, MAE
    pool: Literal["mean", "cls"] = "mean"  # the vector of Eq. 4: the patches' mean (a choice made here), or class token
    pixels: Literal["masked", "all"] = "masked"  # Eq. 3 over the masked patches (MAE's), or over all
    norm_pixels: bool = False  # target of Eq. 3: each patch at mean 0, deviation 1 (better in MAE's paper), or as it is
    crop_min: float = 0.2  # smallest crop, share of the area; MAE's
    kernel: Literal["linear", "bicubic"] = "linear"  # how crops are resized; a choice made here, MAE's is bicubic
    # model
    img: int = 224  # side of the views in pixels, §4.1.1
    patch: int = 16  # side of a patch in pixels, §4.1.1
    dim: int = 768  # width D, §4.1.1
    depth: int = 12  # blocks, §4.1.1
    heads: int = 12  # heads K, §4.1.1: ViT-Base's
    decoder_depth: int = 4  # blocks of the decoder, Table 5
    decoder_dim: int = 512  # width of the decoder; MAE's
    decoder_heads: int = 16  # heads of the decoder; MAE's
    # optimisation
    epochs: int = 1600  # passes over the data, §4.1.1
    batch: int = 256  # images per step and per process; §4.1.1: 256 in all
    lr: float = 1.5e-4  # base learning rate, for a batch of 256, §4.1.1
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 40.0  # epochs of linear warm-up, §4.1.1
    steps: int = 0  # length of training and schedule in steps; 0: as --epochs says
    # run
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; §4.1 has ImageNet-1K
    images: int = 0  # train on only so many images, the same ones in every run; 0 for all
    store: int = 0  # side in pixels at which images are kept, squeezed to squares; 0 for 8/7 of --img
    root: str = "data"  # where data sets are downloaded to and decoded
    out: str = ""  # folder of the run, new or empty (default: runs/mvmae-DATE-TIME)
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
        check_least(self, 0, "lam")
        check_above(self, 0, "tau")
        check(self.lam == 0 or self.targets != "one", "--targets", self.targets, "has no pair to contrast: add --lam 0")
        check(self.lam == 0 or self.batch >= 2, "--batch", self.batch, "must be at least 2, or there are no negatives")
        check(0 < self.crop_min <= 1, "--crop-min", self.crop_min, "must be above 0 and at most 1")


# The rate is higher than the paper's because the training is short.
TINY = Config(img=32, patch=4, dim=192, depth=4, heads=3, decoder_depth=2, decoder_dim=96, decoder_heads=3, epochs=16,
              batch=128, lr=1e-3, warmup=1.0, knn_every=1, tiny=True)


# The paper, §3. B: images (the paper's N). N: patches of an image. V: visible ones. D: width of a token. P = 3·p·p:
# values of a patch of p×p pixels. H = W = img: side of a view. S: side of a stored image. views·B: the rows of a tensor
# with all first views, then all second ones; views is 1 with --targets one, else 2. In the small functions B is any
# number of rows. world·B: the images of all processes.

def views(images, cfg, aspect=None):
    """Target views of each image: crops, 3/4 to 4/3 times as wide as high, resized; half of them flipped. §3.1.1,
    Figure 5

    images (B, 3, S, S), uint8 or 0…1; aspect (B,): their width over height before they were squeezed to squares, 1 if
    None. Returns view1 and view2, normalised, (B, 3, img, img): the same one twice unless --targets is two.
    """
    def augment():
        crop = random_resized_crop(images, cfg.img, (cfg.crop_min, 1.0), aspect=aspect, kernel=cfg.kernel)
        return normalize(random_hflip(crop))
    view1 = augment()
    return view1, (augment() if cfg.targets == "two" else view1)


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


class MVMAE(nn.Module):
    """One autoencoder for all views, §3 and Figures 3 and 4: `encoder` is f, `decoder` is g."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        grid = cfg.img // cfg.patch
        self.N = grid ** 2
        self.V = self.N - round(cfg.mask * self.N)
        self.encoder = Encoder(cfg, cfg.pool)
        blocks = [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
        self.decoder = Decoder(cfg.dim, grid, 3 * cfg.patch ** 2, cfg.decoder_dim, blocks)

    def forward(self, view1, view2):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 7, "reconstruction": Eq. 3, "contrast": Eq. 6}, without the
        contrast if λ is 0. With --targets one, view2 is not used."""
        cfg = self.cfg
        x = view1 if cfg.targets == "one" else torch.cat([view1, view2])  # x⁺, (views·B, 3, H, W)
        mask = random_mask(len(x), self.N, cfg.mask, x.device)  # §3.1.2, (views·B, N)
        visible = visible_first(mask)[:, :self.V]  # Eq. 1, (views·B, V)
        z = self.encoder(x, visible)  # Eq. 2, (views·B, 1 + V, D)
        y = self.decoder(z, visible)  # §3.1.4, (views·B, N, P)

        target = patchify(x, cfg.patch)  # (views·B, N, P)
        target = normalize_patches(target) if cfg.norm_pixels else target
        counted = mask if cfg.pixels == "masked" else torch.ones_like(mask)  # (views·B, N)
        L_r = reconstruction_loss(y, target, counted)  # Eq. 3
        if cfg.lam == 0:
            return {"loss": L_r, "reconstruction": L_r}  # Eq. 7 with λ = 0

        z1, z2 = self.encoder.vector(z).chunk(2)  # (B, D) each
        z1, z2 = gather(z1), gather(z2)  # (world·B, D)
        L_c = nt_xent_loss(z1, z2, cfg.tau)  # Eq. 4, Eq. 5, Eq. 6
        loss = L_r + cfg.lam * L_c  # Eq. 7
        return {"loss": loss, "reconstruction": L_r, "contrast": L_c}

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        With --norm-pixels each predicted patch gets its true mean and deviation back. Where the loss leaves out
        visible patches (--pixels masked), they are shown as they are.
        """
        p, patches = self.cfg.patch, patchify(x, self.cfg.patch)  # (B, N, P)
        mask = random_mask(len(x), self.N, self.cfg.mask, x.device)  # (B, N)
        visible = visible_first(mask)[:, :self.V]  # (B, V)
        y = self.decoder(self.encoder(x, visible), visible).float()  # (B, N, P)
        y = denormalize_patches(y, patches) if self.cfg.norm_pixels else y
        shown = torch.where(mask[:, :, None], y, patches) if self.cfg.pixels == "masked" else y
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), p), unpatchify(shown, p)


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is 1; 0 if there is none. Eq. 3"""
    error = (pred.float() - target.float()).square().mean(2)  # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def nt_xent_loss(z1, z2, tau):
    """NT-Xent of the pairs z1[i], z2[i] (B, any width), mean over all 2B ordered pairs. Eq. 4 to 6"""
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2B, width)
        logits = z @ z.mT / tau  # Eq. 5, divided by τ, (2B, 2B)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = logits.masked_fill(itself, -torch.inf)  # Eq. 4, k ≠ i
        partner = torch.arange(len(z), device=z.device).roll(len(z1))  # j of i: i + B or i - B, (2B)
        return F.cross_entropy(logits, partner)  # Eq. 4, Eq. 6


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data, test = load_data(cfg)
    batches = Batches(data, cfg.batch, cfg.seed, here)
    steps, warmup = schedule(cfg, len(batches))

    torch.manual_seed(cfg.seed)
    model = MVMAE(cfg).to(here.device)
    init_encoders(model, cfg.init)
    if cfg.recompute:
        recompute(model)
    net = DistributedDataParallel(model, broadcast_buffers=False) if here.world > 1 else model  # buffers never differ
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net  # draws as the plain model does
    peak = cfg.lr * cfg.batch * here.world / 256  # MAE's rule: base rate · images of a step / 256
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, betas=(0.9, 0.95), fused=True)  # §4.1.1

    run = Run("mvmae", cfg, here, len(batches))
    step = run.resume(model=model, optimizer=optimizer)
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        images, aspect = batches[step]
        view1, view2 = views(images, cfg, aspect)
        with autocast(here.device, cfg.amp):
            losses = net(view1, view2)
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, peak)
        optimizer.step()
        optimizer.zero_grad()

        step += 1
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        run.save(step, data, test, model=model, optimizer=optimizer)
    return run.finish()


# Parts. K heads, each d = D/K wide; width: the decoder's D.

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
    return launch("mvmae", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
