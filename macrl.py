"""MACRL: Yuchong Yao, Nandakishor Desai and Marimuthu Palaniswami, "Masked Contrastive Representation Learning",
arXiv 2211.06012, 2022.

This file is written from the abstract alone. What the abstract says is built, and stands below in its words; every
number and many a choice beside is ours, and no reader may take it for the paper's. Whoever has the paper may compare it
with the second table below.

Two views of an image go through a siamese network, an encoder and a decoder in both branches. Branch s gets the higher
mask ratio and the stronger augmentation, branch w the weaker of both. The encoder's features of the two branches are
contrasted, and both decoders reconstruct, with an L1 loss.

Symbols, all of them ours
    x_s, x_w        views of branch s and branch w                view1, view2 (B, 3, H, W)
    t_s, t_w        the same crops before colour augmentation     target1, target2 (B, 3, H, W)
    f, f_ξ          encoder, its momentum average                 encoder, f_xi
    g, g_ξ          projector, its momentum average               g, g_xi
    d_s, d_w        decoders                                      decoder_s, decoder_w
    z_s, z_w        the encoder's tokens of the visible patches   z_s, z_w (B, 1 + V, D), class token first
    y_s, y_w        reconstructed patches                         y_s, y_w (B, N, P)
    q, k            queries from s, keys from w                   q, k (world·B, --out-dim)
    b               memory bank: keys of earlier steps            bank.keys (M, --out-dim)
    L_c, L_s, L_w   contrast, L1 in branch s, in branch w         L_c, L_s, L_w
    τ               temperature                                   tau

The abstract's sentences → here
    "masked image modelling (e.g., Masked AutoEncoder) and  what the abstract leaves open follows MAE and MoCo
      contrastive learning (e.g., Momentum Contrast)"
    "asymmetric setting for the siamese network (i.e.,      MACRL, MACRL.branch
      encoder-decoder structure in both branches)"
    "one branch with higher mask ratio and stronger data    --mask, --mask-w; corrupt, clean_views
      augmentation, while the other adopts weaker data
      corruptions"
    "a contrastive learning objective based on the learned  info_nce_loss. To the letter it is --keys shared; by
      features from the encoder in both branches"             default branch w's keys are of the encoder's average
    "the L_1 reconstruction loss according to the           reconstruction_loss
      decoders' outputs"
    "CIFAR-10, CIFAR-100, Tiny-ImageNet, and two other      --data
      ImageNet subsets"

What the abstract does not say. That the paper has a projector and a memory bank is known, but not how they are made.
    Left open                             Here, and ours                                    Flag
    mask ratios                           0.75 in branch s, 0.5 in branch w; uniform, and   --mask --mask-w
                                            independent of each other
    augmentations                         both: independent crops, aspect 3/4 to 4/3, and   --crop-min-s
                                            flips. s: crops of 0.2 to 1 of the area, colour   --crop-min-w
                                            jitter with probability 0.8, greyscale 0.2. w:    --jitter-s --jitter-w
                                            crops of 0.5 to 1, jitter 0.4. No blur, for       --gray-s --gray-w
                                            images are small. Stronger means more often:      --blur-s --blur-w
                                            how much a change changes is MoCo v3's in both
    what masking does                     as in MAE: the encoder sees visible patches only  -
    weights of the branches               one encoder serves both, each has its decoder.    -
                                            A second pass of w makes the keys; decoder w
                                            does not stand on the momentum encoder
    class token, positions, weights       as in MAE: one class token, which the decoders    -
                                            see too; sines and cosines; Xavier
    which features are contrasted         mean of the visible patches' tokens               --pool cls
    projector                             2 layers, GELU                                    --hidden --out-dim
    objective                             InfoNCE of l2-normalised vectors                  --tau
    direction                             queries are made from s alone, keys from w        -
    keys                                  from momentum averages of encoder and projector,  --keys shared
                                            on the view and mask of w; or from the trained    --momentum
                                            ones, whose gradient then goes through keys
                                            too. Averages: 0.99, rising to 1 by a cosine
    negatives                             the batch's other keys, of all processes, and a   --bank
                                            bank of the last 4096, first in, first out,
                                            random unit vectors at first; 0: the batch alone
    what is reconstructed                 the crop before jitter, greyscale and blur        --restore view
    over which patches                    the masked ones                                   --pixels all
    pixels as they are, or normalised     as they are; only ImageNet's mean and deviation   --norm-pixels
      patch by patch                        of each channel are taken out
    L1 of two branches                    their mean                                        -
    weights of contrast and L1            1 and 1                                           --lam-c --lam-r
    encoder, decoders                     ViT-S on 32×32 pixels, patches of 4; 4 blocks,    --img --patch …
                                            192 wide, 6 heads                                 --decoder-heads
    optimisation                          AdamW as in MAE, base rate 1e-3, batch 256, 300   --lr --batch …
                                            epochs, 40 of them warm-up

    python macrl.py                                                         the defaults, on CIFAR-10
    python macrl.py --data cifar100                                         on CIFAR-100
    python macrl.py --data tiny-imagenet --img 64 --patch 8                 on Tiny-ImageNet
    python macrl.py --data PATH --img 224 --patch 16 --blur-s 0.5           a folder, as of an ImageNet subset
    python macrl.py --tiny --data shapes                                    a first look on a laptop
    python eval_linear.py runs/macrl-DATE-TIME                              kNN and linear probe of what came out
    python show.py runs/macrl-DATE-TIME                                     what both branches saw and restored

Measured: --tiny, 5 epochs of CIFAR-10 (JPEG) on one CPU core: kNN 47.7 %, linear probe 51.7 % (untrained 33.6, 43.6).
The defaults are not measured yet, and the abstract gives no figure to set beside. Commands and the rest: RESULTS.md.
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
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import (Batches, Run, autocast, check, check_config, color_jitter, cosine_lr, gaussian_blur, launch,
                    load_images, normalize, param_groups, random_grayscale, random_hflip, random_resized_crop,
                    seed_step, start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.75  # share of the patches masked in branch s, the "higher mask ratio"; how high: ours
    mask_w: float = 0.5  # share of the patches masked in branch w, at most --mask; ours
    lam_c: float = 1.0  # weight of the contrast, which is computed and logged at 0 too; ours
    lam_r: float = 1.0  # weight of the reconstruction, computed and logged at 0 too; ours
    tau: float = 0.2  # τ, temperature; ours: MoCo v2's
    bank: int = 4096  # keys of earlier steps as negatives, fewer than there are images; 0 for none; ours
    keys: Literal["momentum", "shared"] = "momentum"  # keys are of momentum averages or of the trained networks; ours
    momentum: float = 0.99  # of f_ξ and g_ξ, rising to 1 by a cosine; ours: MoCo v3's
    pool: Literal["mean", "cls"] = "mean"  # the features: mean of the patches' tokens or class token; ours
    restore: Literal["clean", "view"] = "clean"  # the target: the view before its colours were changed, or after; ours
    pixels: Literal["masked", "all"] = "masked"  # L1 over the masked patches or over all; ours
    norm_pixels: bool = False  # restore each patch at mean 0, deviation 1; ours
    crop_min_s: float = 0.2  # smallest crop of branch s, share of the area; ours
    crop_min_w: float = 0.5  # smallest crop of branch w; ours
    jitter_s: float = 0.8  # probability of colour jitter in branch s; ours: MoCo v3's
    jitter_w: float = 0.4  # probability of colour jitter in branch w; ours
    gray_s: float = 0.2  # probability of greyscale in branch s; ours: MoCo v3's
    gray_w: float = 0.0  # probability of greyscale in branch w; ours
    blur_s: float = 0.0  # probability of blur in branch s; ours: none, as SimCLR on CIFAR-10
    blur_w: float = 0.0  # probability of blur in branch w; ours
    # model
    img: int = 32  # side of the views in pixels; ours
    patch: int = 4  # side of a patch in pixels; ours
    dim: int = 384  # width D; ours: ViT-Small's
    depth: int = 12  # blocks; ours: ViT-Small's
    heads: int = 6  # heads K; ours: ViT-Small's
    hidden: int = 2048  # hidden width of the projector; ours: MoCo v2's
    out_dim: int = 128  # width of queries and keys; ours: MoCo v2's
    decoder_depth: int = 4  # blocks of a decoder; ours
    decoder_dim: int = 192  # width of a decoder; ours
    decoder_heads: int = 6  # heads of a decoder; ours
    # optimisation
    epochs: int = 300  # passes over the data; ours
    batch: int = 256  # images per step and per process; ours
    lr: float = 1e-3  # base learning rate, for a batch of 256; ours
    wd: float = 0.05  # weight decay; ours: MAE's
    warmup: int = 40  # epochs of linear warm-up; ours: MAE's
    # run
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; the abstract's first set
    root: str = "data"  # where data sets are downloaded to and decoded; ours
    out: str = ""  # folder of the run, new or empty; ours: runs/macrl-DATE-TIME
    resume: str = ""  # folder of a run to go on with; ours
    seed: int = 0  # of all random numbers; ours
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute; ours
    amp: bool = True  # bfloat16 autocast where the device has it; ours
    compile: bool = False  # torch.compile the model; ours
    workers: int = 0  # threads that decode a folder, 0 for one a core; ours
    log_every: int = 20  # steps between rows of metrics.csv; ours
    knn_every: int = 10  # epochs between kNN checks, 0 for none; ours
    tiny: bool = False  # a size for a laptop: minutes on a CPU; ours

    def __post_init__(self):
        check_config(self)
        patches = (self.img // self.patch) ** 2
        check(0 < self.mask < 1 and 0 < round(self.mask * patches) < patches, "--mask", self.mask,
              f"must lie between 0 and 1 and leave some of {patches} patches masked and some visible")
        check(0 <= self.mask_w <= self.mask, "--mask-w", self.mask_w, f"must lie between 0 and --mask {self.mask}")
        check(self.pixels == "all" or round(self.mask_w * patches) > 0, "--mask-w", self.mask_w,
              f"masks none of {patches} patches, and --pixels masked restores nothing else")
        check(min(self.lam_c, self.lam_r) >= 0 and 0 < self.lam_c + self.lam_r < math.inf, "--lam-c, --lam-r",
              (self.lam_c, self.lam_r), "must not be negative, and not both 0")
        check(0 < self.tau < math.inf, "--tau", self.tau, "must be above 0")
        check(self.bank >= 0, "--bank", self.bank, "must not be negative")
        check(self.lam_c == 0 or self.batch >= 2, "--batch", self.batch,
              "must be at least 2, or the batch has no negatives")
        check(0 <= self.momentum <= 1, "--momentum", self.momentum, "must lie between 0 and 1")
        for name in ("crop_min_s", "crop_min_w"):
            check(0 < getattr(self, name) <= 1, "--" + name.replace("_", "-"), getattr(self, name),
                  "must lie between 0 and 1")
        for name in ("jitter_s", "jitter_w", "gray_s", "gray_w", "blur_s", "blur_w"):
            check(0 <= getattr(self, name) <= 1, "--" + name.replace("_", "-"), getattr(self, name),
                  "is a probability: 0 to 1")
        for name in ("hidden", "out_dim", "decoder_depth", "decoder_heads"):
            check(getattr(self, name) >= 1, "--" + name.replace("_", "-"), getattr(self, name), "must be at least 1")
        check(self.decoder_dim > 0 and self.decoder_dim % (4 * self.decoder_heads) == 0, "--decoder-dim",
              self.decoder_dim, f"must be a multiple of 4 times --decoder-heads {self.decoder_heads}")


TINY = Config(bank=1024, dim=192, depth=4, heads=3, hidden=384, out_dim=64, decoder_depth=2, decoder_dim=96,
              decoder_heads=3, epochs=8, batch=128, warmup=1, knn_every=1, tiny=True)


# Transformer. B batch, N patches, V visible ones, D width, K heads, M keys of the bank, P = 3·p·p numbers of a patch, p
# pixels a side (--patch); width is the decoder's.

def sincos_pos_embed(dim, grid):
    """Fixed sine-cosine positions of grid×grid patches, (1, N, D): half of D for the row, half for the column."""
    omega = 10000 ** -(torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(grid)[:, None] * omega                                             # (grid, D/4)
    one = torch.cat([angle.sin(), angle.cos()], 1)                                          # (grid, D/2)
    rows, columns = one[:, None].expand(grid, grid, -1), one[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], 2).reshape(1, grid * grid, dim)


def mlp(dim, hidden, out):
    """Two layers with GELU between, each token on its own; parts named as in timm."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, out)))


def attend(q, k, tokens):
    """How the mean query of `tokens` (a slice of the N) attends to all N: (B, K, N, D/K) twice → (B, K, N), sum 1."""
    q = q.float()[:, :, tokens].mean(2, keepdim=True)                                       # (B, K, 1, D/K)
    return ((q * k.float()).sum(3) / k.shape[3] ** 0.5).softmax(2)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) → (B, N, D)."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """(B, N, D) → queries, keys, values of each head, (3, B, K, N, D/K)."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def mix(self, q, k, v):
        """Queries, keys, values of each head (B, K, N, D/K) → (B, N, D)."""
        x = F.scaled_dot_product_attention(q, k, v)                                         # (B, K, N, D/K)
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x):
        return self.mix(*self.split(x))


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


def init_weights(module):
    """Xavier-uniform weights and zero biases, as in MAE; a patch embedding counts as a linear layer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def patchify(x, p):
    """Images (B, 3, H, W) → patches (B, N, P), P = 3·p·p ordered (channel, row, column): PixelShuffle undone."""
    return F.pixel_unshuffle(x, p).flatten(2).mT


def unpatchify(x, p):
    """Patches (B, N, P) of a square image → (B, 3, H, W), by PixelShuffle."""
    return F.pixel_shuffle(x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1)), p)


class Gather(torch.autograd.Function):
    """(B, D) → (world·B, D). Backward sums a row's gradients over the processes: all have the same loss of it, and the
    averaging of DistributedDataParallel divides by their number again."""
    @staticmethod
    def forward(ctx, z):
        rows = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, z.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(z):
    """(B, D) → the rows of all processes, with gradient; z itself where there is one process."""
    return Gather.apply(z) if dist.is_initialized() else z


# Masking: uniform, as in MAE

def random_mask(B, blocks, ratio, device=None):
    """Which of blocks×blocks are masked: bool (B, blocks, blocks), as many in each image, uniform over places."""
    order = torch.rand(B, blocks * blocks, device=device).argsort(1)                        # a permutation of each row
    return (order < round(ratio * blocks ** 2)).unflatten(1, (blocks, blocks))


def visible_first(mask):
    """The patches of each image in order, the visible ones before the masked ones: mask (B, N) → ids (B, N)."""
    return mask.int().argsort(dim=1, stable=True)


def take(x, ids):
    """The tokens `ids` (B, V) of x (B, N, D): (B, V, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


# Model

class Encoder(nn.Module):
    """A ViT with class token; its state dict loads into timm's ViT of the same size without renaming."""
    def __init__(self, cfg, pool="mean"):
        super().__init__()
        self.pool = pool
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        pos_embed = sincos_pos_embed(cfg.dim, cfg.img // cfg.patch)
        self.register_buffer("pos_embed", F.pad(pos_embed, (0, 0, 1, 0)))                   # 0 for the class token
        self.blocks = nn.ModuleList(Block(cfg.dim, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.apply(init_weights)                                                            # Xavier, as in MAE
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, x, visible=None):
        """(B, 3, H, W), and which patches are visible (B, V) if not all → the last block's input (B, 1 + V, D)."""
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[:, 1:]                       # (B, N, D)
        x = x if visible is None else take(x, visible)                                      # (B, V, D)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)            # (B, 1 + V, D)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def forward(self, x, visible=None):
        return self.norm(self.blocks[-1](self.embed(x, visible)))                           # (B, 1 + V, D)

    def vector(self, z):
        """One vector (B, D) for the tokens (B, 1 + V, D) of an image: what is contrasted, and the features."""
        return z[:, 1:].float().mean(1) if self.pool == "mean" else z[:, 0].float()

    def features(self, x):
        return self.vector(self(x))

    def attention(self, x):
        """How the class token attends to the patches in the last block, (B, 3, H, W) → (B, K, N)."""
        block = self.blocks[-1]
        q, k, _ = block.attn.split(block.norm1(self.embed(x)))
        return attend(q, k, slice(1))[:, :, 1:]


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
        cls, tokens = self.embed(z).split([1, visible.shape[1]], 1)                         # (B, V, width)
        x = self.mask_token.to(tokens.dtype).expand(len(z), self.pos_embed.shape[1] - 1, -1)  # (B, N, width)
        x = x.scatter(1, visible[:, :, None].expand_as(tokens), tokens)                     # each token to its place
        x = torch.cat([cls, x], 1) + self.pos_embed                                         # (B, 1 + N, width)
        return self.pred(self.norm(self.blocks(x)))[:, 1:]                                  # (B, N, P)


class Bank(nn.Module):
    """The keys of earlier steps, (M, width), first in, first out; random unit vectors until the first M have come."""
    def __init__(self, M, width):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(M, width), dim=1))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))                   # how many have come

    @torch.no_grad()
    def push(self, k):
        """Puts keys (n, any width) in the place of the n oldest; of more than M the last M stay."""
        M = len(self.keys)
        if M > 0:
            k = F.normalize(k[-M:].float(), dim=1)
            self.keys.index_copy_(0, (self.pushed + torch.arange(len(k), device=k.device)) % M, k)
            self.pushed.add_(len(k))


class MACRL(nn.Module):
    """The siamese network, "encoder-decoder structure in both branches", and its losses."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.grid = cfg, cfg.img // cfg.patch
        self.encoder = Encoder(cfg, cfg.pool)                                               # f
        self.decoder_s, self.decoder_w = (
            Decoder(cfg.dim, self.grid, 3 * cfg.patch ** 2, cfg.decoder_dim,
                    [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]) for _ in range(2))
        self.g = mlp(cfg.dim, cfg.hidden, cfg.out_dim).apply(init_weights)
        if cfg.keys == "momentum":
            self.f_xi = copy.deepcopy(self.encoder).requires_grad_(False)
            self.g_xi = copy.deepcopy(self.g).requires_grad_(False)
        self.bank = Bank(cfg.bank, cfg.out_dim)
        self.restored = ("reconstruction\n(each patch given its\ntrue mean and contrast)" if cfg.norm_pixels else
                         "reconstruction")  # its label in pictures

    def forward(self, view1, view2, target1=None, target2=None):
        """Normalised views of branch s and w, and what they are to be restored to, themselves if None: (B, 3, H, W) →
        {"loss", "contrast", "reconstruction": the mean of "reconstruction s" and "reconstruction w"}. Fills the bank.
        """
        cfg = self.cfg
        mask_s, _, z_s, y_s = self.branch(view1, "s")                                       # "higher mask ratio"
        mask_w, visible_w, z_w, y_w = self.branch(view2, "w")                               # "weaker"

        q = gather(self.g(self.encoder.vector(z_s)))                                        # (world·B, out)
        if cfg.keys == "momentum":
            with torch.no_grad():
                k = gather(self.g_xi(self.f_xi.vector(self.f_xi(view2, visible_w))))        # (world·B, out)
        else:
            k = gather(self.g(self.encoder.vector(z_w)))                                    # (world·B, out)
        L_c = info_nce_loss(q, k, self.bank.keys, cfg.tau)                    # "the encoder in both branches"
        self.bank.push(k)

        L_s = self.restoration(y_s, view1 if target1 is None else target1, mask_s)
        L_w = self.restoration(y_w, view2 if target2 is None else target2, mask_w)
        L_r = (L_s + L_w) / 2                                                               # "the decoders' outputs"
        return {"loss": cfg.lam_c * L_c + cfg.lam_r * L_r, "contrast": L_c, "reconstruction": L_r,
                "reconstruction s": L_s, "reconstruction w": L_w}

    def branch(self, x, name):
        """Branch "s" or "w" of views (B, 3, H, W): their mask (B, N), visible patches (B, V), the encoder's tokens
        (B, 1 + V, D), and all patches as the decoder restores them (B, N, P)."""
        ratio, decoder = {"s": (self.cfg.mask, self.decoder_s), "w": (self.cfg.mask_w, self.decoder_w)}[name]
        mask = random_mask(len(x), self.grid, ratio, x.device).flatten(1)                   # (B, N)
        visible = visible_first(mask)[:, :self.grid ** 2 - round(ratio * self.grid ** 2)]   # (B, V)
        z = self.encoder(x, visible)                                                        # (B, 1 + V, D)
        return mask, visible, z, decoder(z, visible)

    def restoration(self, y, target, mask):
        """The L1 loss of restored patches (B, N, P), targets (B, 3, H, W), mask (B, N), as the flags have it."""
        patches = patchify(target, self.cfg.patch)                                          # (B, N, P)
        patches = normalize_patches(patches) if self.cfg.norm_pixels else patches
        return reconstruction_loss(y, patches, mask if self.cfg.pixels == "masked" else torch.ones_like(mask))

    @torch.no_grad()
    def reconstruct(self, x, branch="s", target=None):
        """Normalised images (B, 3, H, W) → (masked input, prediction) of a branch, both normalised images.

        Visible patches that the loss leaves out (--pixels masked) are shown as they are. With --norm-pixels each
        patch gets the mean and deviation that it has in `target`, the images themselves if None.
        """
        cfg, patches = self.cfg, patchify(x, self.cfg.patch)                                # (B, N, P)
        mask, _, _, y = self.branch(x, branch)
        y = y.float()
        if cfg.norm_pixels:
            true = patches if target is None else patchify(target, cfg.patch)
            y = y * (true.var(2, keepdim=True) + 1e-6).sqrt() + true.mean(2, keepdim=True)
        shown = torch.where(mask[:, :, None], y, patches) if cfg.pixels == "masked" else y
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), cfg.patch), unpatchify(shown, cfg.patch)


# Loss

def normalize_patches(patches):
    """Each patch of (B, N, P) to mean 0 and standard deviation 1, as in MAE."""
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(pred, target, mask):
    """Mean absolute error of (B, N, P) over the patches where mask (B, N) is 1; 0 where none is."""
    error = (pred.float() - target.float()).abs().mean(2)                                   # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def info_nce_loss(q, k, bank, tau):
    """InfoNCE of q[i] and its positive k[i] against all other k, (B, any width), and the bank (M, the same width);
    mean over i. With M = 0 the batch alone."""
    with torch.autocast(q.device.type, enabled=False):
        keys = torch.cat([F.normalize(k.float(), dim=1), F.normalize(bank.float(), dim=1)])  # (B + M, width)
        logits = F.normalize(q.float(), dim=1) @ keys.mT / tau                              # (B, B + M)
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))


# Views, "stronger data augmentation" in branch s

def clean_views(images, cfg):
    """Images (B, 3, S, S), uint8 or 0…1 → a crop of each for branch s and one for w, flipped or not, 0…1 (B, 3, img,
    img)."""
    return tuple(random_hflip(random_resized_crop(images, cfg.img, (least, 1.0))) for least in
                 (cfg.crop_min_s, cfg.crop_min_w))


def corrupt(clean, cfg):
    """x_s and x_w: the two of clean_views with their colours changed, normalised (B, 3, img, img)."""
    chances = (cfg.jitter_s, cfg.gray_s, cfg.blur_s), (cfg.jitter_w, cfg.gray_w, cfg.blur_w)
    return tuple(normalize(gaussian_blur(random_grayscale(color_jitter(x, p=jitter), gray), blur))
                 for x, (jitter, gray, blur) in zip(clean, chances))


def views(images, cfg):
    """uint8 images (B, 3, S, S) → the views of branch s and branch w, normalised (B, 3, img, img)."""
    return corrupt(clean_views(images, cfg), cfg)


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data = load_images(cfg.data, "train", cfg.img, cfg.root, cfg.workers, cfg.seed)
    test = load_images(cfg.data, "test", cfg.img, cfg.root, cfg.workers, cfg.seed)
    batches = Batches(data, cfg.batch, cfg.seed, here)

    torch.manual_seed(cfg.seed)
    model = MACRL(cfg).to(here.device)
    net = DistributedDataParallel(model) if here.world > 1 else model
    net = torch.compile(net) if cfg.compile else net
    peak = cfg.lr * cfg.batch * here.world / 256                                            # MAE's rule
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, betas=(0.9, 0.95), fused=True)  # MAE's
    steps, warmup = cfg.epochs * len(batches), cfg.warmup * len(batches)

    run = Run("macrl", cfg, here, len(batches))
    step = run.resume(model=model, optimizer=optimizer)
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        clean = clean_views(batches[step][0], cfg)
        view1, view2 = corrupt(clean, cfg)
        targets = map(normalize, clean) if cfg.restore == "clean" else ()
        with autocast(here.device, cfg.amp):
            losses = net(view1, view2, *targets)
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, peak)
        optimizer.step()
        optimizer.zero_grad()
        if cfg.keys == "momentum":                                                          # f_ξ, g_ξ follow f, g
            m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2         # MoCo v3's, up to 1
            get_ema_multi_avg_fn(m)([*model.f_xi.parameters(), *model.g_xi.parameters()],
                                    [*model.encoder.parameters(), *model.g.parameters()], None)

        step += 1
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        run.save(step, data, test, model=model, optimizer=optimizer)
    return run.finish()


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("macrl", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
