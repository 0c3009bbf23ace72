"""MCLim: Feng Xin and Li Xinwei, "The contrastive learning algorithm based on masked image modeling", Academic Journal
of Computing & Information Science 7(5), 2024, doi:10.25236/AJCIS.2024.070513.

The first of two branches sees a masked view and restores it, and is at the same time contrasted with the second, which
sees another view whole. One projection serves both tasks: its outputs, rearranged by PixelShuffle, are the restored
image, and their mean over the image is the vector that is contrasted. The contrastive loss is decoupled (DCL: the
positive pair is left out of the denominator), which keeps it useful at batch 16.

Symbols of the paper → here
    x^s, x^v     the patches of a view; its visible ones    view1, view2 (B, 3, H, W)
    p^u          the learnable vector                       mask_token (embed_dim, D in the ViT)
    F₁, F₂       encoders of the two branches               encoder (the one that is kept), F2
    T₁, T₂       their projection layers                    T1, T2
    {z_i^s}      tokens from the encoder, i a patch         tokens1, tokens2 (B, N, D)
    Z¹, Z²       tokens from the projection                 Z1, Z2 (B, N, P)
    y            the restored image                         y (B, 3, H, W)
    n            what Eq. 6 averages over                   the patches where `counted` (B, N) is 1
    z_i^1, z_i^2 vectors of image i that are contrasted     z1, z2 (B, P), of all processes
    U_{i,k}      sum over the negatives of z_i^k            log_U (2B): its logarithm, k = 1 in the first B rows
    L_i^k        the loss of one i and k                    the 2B values whose mean a loss returns
    λ, τ         weight of L₁, temperature                  lam, tau

Equations → here
    1 to 5, 10   lines of MCLim.forward, in the paper's order
    6            reconstruction_loss, its target by normalize_patches
    7            info_nce_loss
    8            log_U in both contrastive losses; each of them stands alone, to be copied
    9            dcl_loss

Where this file departs from the paper
    Left open                             Here                                              Flag
    how branch 2 gets its weights         momentum average of branch 1 as in MoCo v3,       --target shared, --momentum
                                          rising to 1 by a cosine; "twin network" may also
                                          mean shared weights
    what vector of Z^k is contrasted      its mean over the N tokens, l2-normalised         -
    class token, positions of the ViT     none; fixed sine-cosine: so 43.12 M is met        -
    patch, "original size" of CIFAR-10    16, so 43.12 M is met, and 224: §3.2's mask       --patch, --img
                                          blocks of 32×32 would cover a CIFAR-10 image
    where the vector replaces patches     after the patch embedding, before positions:      -
                                          SimMIM's way
    frozen patch embedding                its convolution, random, the same in both         -
                                          branches; a norm behind it (Swin, HiViT) learns
    "normalized pixels"                   each patch to mean 0, deviation 1, MAE's way      -
    temperature, in (0, 1)                0.2, MoCo v3's; any above 0 is taken              --tau
    base rate, schedule, AdamW's betas,   1e-3 for a batch of 256, half a cosine to 0,      --lr --wd --warmup
      decay, warm-up                      PyTorch's betas, 0.05, 10 epochs
    width of T's hidden layer             4 D, with GELU, as in a transformer block         --hidden
    T maps "to a lower" (§2.4) or "high"  to P, which PixelShuffle needs                    -
      (§3.2.2) dimension
    T as "1 ViT block"                    the block, and a linear layer from D to P         --head vit
    blur, in §2.1 but not in Table 2's    none                                              --blur 0.8
      best row
    strengths of the augmentations        MoCo v3's; no flip, for none is named             (color_jitter's arguments)
    aspect of the crops                   3/4 to 4/3, as random resized crops usually are   -
    widths of Swin and HiViT              Table 1's 49.88 M and 35.88 M fit no published    --dim
                                          width; nearest: Swin 128 wide (48.88 M), HiViT
                                          512 (34.32 M), that is dim/6 and 2/3 dim
    "iterations", 100                     epochs                                            --epochs
    "accuracy"                            linear probe or kNN, by eval_linear.py            -
    Printed otherwise
    around Eq. 2: blanks, {z_i^s}_{i=2}^N the second branch's view and tokens: view2, tokens2
    Eq. 1: {p_i^u}_{i=1}^{u≠v}            the vector, once for each masked patch
    Eq. 4's text: {h_i^s}                 Z¹, as in the formula
    Eq. 6: n is "the number of samples"   mean over the pixels of the masked patches (Eq. 10: "the number of blocked
                                            image blocks"), or of all: --l1 rec, Table 4
    Eq. 7's text: "NPC multiplier"        what DCL removes is the positive, exp(<z_i^1, z_i^2>/τ), in the denominator
    Eq. 10's text: "z_i^l", "i-th branch" z_i^1 is image i in branch 1, z_i^2 the same image in branch 2
    Eq. 9, 10: one i, one k               mean over i and k
    Table 5: "Contrastive Loss Weight"    λ weighs L₁, the reconstruction, as in Eq. 10
    learning rate "l_r × BatchSize = 256" lr · batch / 256
    §2.3 cites [5] for freezing           it is [3], MoCo v3

Patches of p = --patch: ViT takes p×p. Swin and HiViT start from p/4 and end at strides of 2p and p pixels; their mask
blocks are 2p×2p: 32×32 at the default p = 16 (§3.2).

    python mclim.py --epochs 100 --batch 16                  the paper's experiment
    python mclim.py --lam 0 --mask 0 --batch 32              Table 1's MoCo v3 with DCL, to which MCLim "degenerates"
    python mclim.py --contrast none --batch 32               Table 1's SimMIM, with this file's head, target and crops
    python mclim.py --tiny --data shapes                     a first look on a laptop
    python eval_linear.py runs/mclim-DATE-TIME               kNN and linear probe of what came out

Measured: --tiny, 6 epochs of CIFAR-10 (JPEG) on two CPU cores: kNN 44.4 %, linear probe 49.5 % (untrained 33.7, 43.5).
The paper's configuration is not measured yet. Commands and the rest: RESULTS.md.
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
from torchvision.models.swin_transformer import SwinTransformer

from common import (Batches, Run, autocast, check, check_config, color_jitter, cosine_lr, gaussian_blur, launch,
                    load_images, normalize, param_groups, random_grayscale, random_resized_crop, seed_step,
                    start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.6  # share of the blocks that is masked, §3.2
    lam: float = 1.0  # λ, weight of the reconstruction, Table 5
    tau: float = 0.2  # τ, temperature; ours: MoCo v3's
    contrast: Literal["dcl", "infonce", "none"] = "dcl"  # L₂: Eq. 9, Eq. 7, or no second branch
    l1: Literal["pre", "rec"] = "pre"  # L₁ over masked patches or over all, Table 4
    target: Literal["momentum", "shared"] = "momentum"  # branch 2: average of branch 1 (ours) or the same weights
    momentum: float = 0.99  # of that average, rising to 1 by a cosine; ours: MoCo v3's
    crop_min: float = 0.65  # smallest crop, share of the area, §2.1
    crop_max: float = 0.9  # largest crop, §2.1
    jitter: float = 0.8  # probability of colour jitter in view 2, Table 2
    gray: float = 0.2  # probability of greyscale in view 2, Table 2
    blur: float = 0.0  # probability of blur in view 2; 0.8 is Table 2's last row
    # model
    backbone: Literal["vit", "swin", "hivit"] = "vit"  # encoder, Table 1
    img: int = 224  # side of the views in pixels, from §3.2's mask blocks of 32×32
    patch: int = 16  # side of a patch in pixels, from Table 1's 43.12 M
    dim: int = 768  # width D of the ViT, from Table 1's 43.12 M; Swin begins dim/6 wide, HiViT ends 2/3 dim wide
    depth: int = 6  # blocks of the ViT, Table 1; of Swin's third stage; HiViT's third stage has 4 more
    heads: int = 12  # heads K of the ViT; ours: ViT-Base's (Swin has 32 channels a head, HiViT 64)
    head: Literal["linear", "mlp", "vit"] = "mlp"  # projection layer T, Table 3
    hidden: float = 4.0  # hidden width of T's MLP, in widths of the encoder; ours
    # optimisation
    epochs: int = 100  # passes over the data, §3.2
    batch: int = 16  # images per step and per process, §3.2
    lr: float = 1e-3  # base learning rate, for a batch of 256; ours
    wd: float = 0.05  # weight decay; ours: MAE's
    warmup: int = 10  # epochs of linear warm-up; ours: SimMIM's
    # run
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; §3.1
    root: str = "data"  # where data sets are downloaded to and decoded; ours
    out: str = ""  # folder of the run, new or empty; ours: runs/mclim-DATE-TIME
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
        block = self.patch if self.backbone == "vit" else 2 * self.patch
        check(self.img % block == 0, "--img", self.img, f"must be a multiple of the mask block, {block}")
        blocks = (self.img // block) ** 2
        moco = self.mask == 0 and self.lam == 0
        check(moco or 0 < self.mask < 1 and 0 < round(self.mask * blocks) < blocks, "--mask", self.mask,
              f"must lie between 0 and 1 and leave some of {blocks} blocks masked and some visible (0 with --lam 0)")
        check(self.contrast == "none" or self.batch >= 2, "--batch", self.batch,
              "must be at least 2, or there are no negatives")
        check(self.contrast != "none" or self.lam > 0, "--lam", self.lam, "and --contrast none leave nothing to learn")
        check(0 <= self.lam < math.inf, "--lam", self.lam, "must not be negative")
        check(0 < self.tau < math.inf, "--tau", self.tau, "must be above 0")
        check(0 <= self.momentum <= 1, "--momentum", self.momentum, "must lie between 0 and 1")
        check(0 < self.crop_min <= self.crop_max <= 1, "--crop-min", self.crop_min,
              f"must lie between 0 and --crop-max {self.crop_max}, which is at most 1")
        for name in ("jitter", "gray", "blur"):
            check(0 <= getattr(self, name) <= 1, f"--{name}", getattr(self, name), "is a probability: 0 to 1")
        check(0 < self.hidden < math.inf and round(self.hidden * self.dim) >= 1, "--hidden", self.hidden,
              "must be above 0 and leave T a hidden unit")
        if self.backbone != "vit":
            check(self.dim % 192 == 0, "--dim", self.dim, f"must be a multiple of 192 for --backbone {self.backbone}")
            check(self.patch % 4 == 0, "--patch", self.patch, f"must be a multiple of 4 for --backbone {self.backbone}")


TINY = Config(img=32, patch=4, dim=192, depth=4, heads=3, epochs=8, batch=128, warmup=1, knn_every=1, tiny=True)


# Transformer. B batch, N patches or tokens, D width, K heads, P = 3·p·p numbers that a token restores, p pixels a side
# (--patch; twice that in Swin), n mask blocks a side, grid patches a side; h, w, C: a map of tokens and its channels.

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


# Masking, §2.2

def random_mask(B, blocks, ratio, device=None):
    """Which of blocks×blocks are masked: bool (B, blocks, blocks), as many in each image, uniform over places."""
    order = torch.rand(B, blocks * blocks, device=device).argsort(1)                        # a permutation of each row
    return (order < round(ratio * blocks ** 2)).unflatten(1, (blocks, blocks))


def spread(mask, grid):
    """A mask of blocks (B, n, n) on the finer grid inside them: (B, grid, grid)."""
    k = grid // mask.shape[1]
    return mask.repeat_interleave(k, 1).repeat_interleave(k, 2)


# Model, §2.3 and §2.4. The three encoders of Table 1 look alike from outside:
#   stride, dim, embed_dim         side in pixels of what a token stands for, its width, the width when it is masked
#   forward(x, mask, mask_token)   (B, 3, H, W) → (B, N, D): tokens; where mask (B, n, n) is 1, patches are replaced
#   features(x)                    (B, 3, H, W) → (B, D): the mean of the tokens, unmasked
#   attention(x)                   (B, 3, H, W) → (B, K, N): how their mean query attends to them in the last block,
#                                  by content alone: without Swin's windows, and its and HiViT's biases for place

class Encoder(nn.Module):
    """The ViT without class token; its state dict loads into timm's ViT of the same size (class_token=False,
    global_pool="avg", fc_norm=False) without renaming."""
    def __init__(self, cfg):
        super().__init__()
        self.stride, self.dim, self.embed_dim, self.grid = cfg.patch, cfg.dim, cfg.dim, cfg.img // cfg.patch
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch)))
        self.register_buffer("pos_embed", sincos_pos_embed(cfg.dim, self.grid))
        self.blocks = nn.ModuleList(Block(cfg.dim, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.apply(init_weights)
        self.patch_embed.requires_grad_(False)                                              # §2.3: frozen

    def embed(self, x, mask=None, mask_token=None):
        """(B, 3, H, W) → the last block's input (B, N, D)."""
        x = self.patch_embed(x).flatten(2).mT                                               # (B, N, D)
        if mask is not None:
            x = torch.where(spread(mask, self.grid).view(len(x), -1, 1), mask_token.to(x.dtype), x)  # §2.2
        x = x + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def forward(self, x, mask=None, mask_token=None):
        return self.norm(self.blocks[-1](self.embed(x, mask, mask_token)))

    def features(self, x):
        return self(x).mean(1)

    def attention(self, x):
        block = self.blocks[-1]
        q, k, _ = block.attn.split(block.norm1(self.embed(x)))
        return attend(q, k, slice(None))


class SwinEncoder(nn.Module):
    """Swin [2, 2, depth, 2] with windows of 7, torchvision's: stride 2p."""
    def __init__(self, cfg):
        super().__init__()
        width = cfg.dim // 6
        swin = SwinTransformer([cfg.patch // 4] * 2, width, [2, 2, cfg.depth, 2],
                               [width // 32 * 2 ** i for i in range(4)], [7, 7],
                               stochastic_depth_prob=0.0)  # none, as in the ViT: features must not be random
        self.stride, self.dim, self.embed_dim, self.grid = 2 * cfg.patch, 8 * width, width, 4 * cfg.img // cfg.patch
        self.patch_embed, self.stages, self.norm = swin.features[0], swin.features[1:], swin.norm
        self.patch_embed[0].apply(init_weights).requires_grad_(False)                       # §2.3: frozen

    def embed(self, x, mask=None, mask_token=None):
        """(B, 3, H, W) → the last block's input (B, h, w, D)."""
        x = self.patch_embed(x)                                                             # (B, grid, grid, width)
        if mask is not None:
            x = torch.where(spread(mask, self.grid)[..., None], mask_token.to(x.dtype), x)  # §2.2
        return self.stages[-1][:-1](self.stages[:-1](x))                                    # (B, h, w, D)

    def forward(self, x, mask=None, mask_token=None):
        return self.norm(self.stages[-1][-1](self.embed(x, mask, mask_token))).flatten(1, 2)  # (B, N, D)

    def features(self, x):
        return self(x).mean(1)

    def attention(self, x):
        block = self.stages[-1][-1]
        x = block.norm1(self.embed(x)).flatten(1, 2)                                        # (B, N, D)
        q, k, _ = block.attn.qkv(x).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attend(q, k, slice(None))


class RelativeAttention(Attention):
    """Attention with a learned bias for every offset between two patches of a grid×grid image, as in Swin."""
    def __init__(self, dim, heads, grid):
        super().__init__(dim, heads)
        self.relative_position_bias = nn.Parameter(torch.zeros((2 * grid - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        y, x = (a.flatten()[:, None] - a.flatten() + grid - 1 for a in (y, x))              # (N, N), 0 … 2·grid - 2
        self.register_buffer("offset", y * (2 * grid - 1) + x, persistent=False)

    def forward(self, x):
        q, k, v = self.split(x)
        bias = self.relative_position_bias[self.offset].permute(2, 0, 1).to(q.dtype)        # (K, N, N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))


class MlpBlock(nn.Module):
    """The half of Block without attention: each token on its own, the shape stays."""
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden, dim)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Merge(nn.Module):
    """Four neighbours become one of twice the width, (B, h, w, C) → (B, h/2, w/2, 2C)."""
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)        # (B, h/2, w/2, 4C)
        return self.reduction(self.norm(x))


class HiViTEncoder(nn.Module):
    """HiViT [2, 2, depth + 4] (arXiv 2205.14949): MLPs on small patches, merged twice, then a ViT. Stride p."""
    def __init__(self, cfg):
        super().__init__()
        dim, grid = 2 * cfg.dim // 3, cfg.img // cfg.patch
        self.stride, self.dim, self.embed_dim, self.grid = cfg.patch, dim, dim // 4, 4 * grid  # where masked
        self.patch_embed = nn.Conv2d(3, dim // 4, cfg.patch // 4, cfg.patch // 4)
        self.patch_norm = nn.LayerNorm(dim // 4, eps=1e-6)
        stage1, stage2 = ([MlpBlock(w, 3 * w) for _ in range(4)] for w in (dim // 4, dim // 2))  # two MLPs a block
        self.stem = nn.Sequential(*stage1, Merge(dim // 4), *stage2, Merge(dim // 2))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, dim))
        self.blocks = nn.ModuleList(Block(dim, dim // 64) for _ in range(cfg.depth + 4))
        for block in self.blocks:
            block.attn = RelativeAttention(dim, dim // 64, grid)                            # else a ViT's block
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed.requires_grad_(False)                                              # §2.3: frozen

    def embed(self, x, mask=None, mask_token=None):
        """(B, 3, H, W) → the last block's input (B, N, D)."""
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1))                        # (B, 4·H/p, 4·W/p, D/4)
        if mask is not None:
            x = torch.where(spread(mask, self.grid)[..., None], mask_token.to(x.dtype), x)  # §2.2
        x = self.stem(x).flatten(1, 2) + self.pos_embed                                     # (B, N, D)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    forward, features, attention = Encoder.forward, Encoder.features, Encoder.attention     # as in the ViT


class MCLim(nn.Module):
    """Both branches and the loss (Figure 1). `forward` is §2.2 to §2.5."""
    restored = "reconstruction\n(each patch given its\ntrue mean and contrast)"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = {"vit": Encoder, "swin": SwinEncoder, "hivit": HiViTEncoder}[cfg.backbone](cfg)
        self.blocks = cfg.img // (cfg.patch if cfg.backbone == "vit" else 2 * cfg.patch)
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.embed_dim), requires_grad=cfg.mask > 0)
        nn.init.normal_(self.mask_token, std=0.02)                                          # SimMIM's
        D, P = self.encoder.dim, 3 * self.encoder.stride ** 2
        if cfg.head == "linear":                                                            # Table 3
            self.T1 = nn.Linear(D, P)
        elif cfg.head == "mlp":
            self.T1 = mlp(D, round(cfg.hidden * D), P)
        else:
            self.T1 = nn.Sequential(Block(D, cfg.heads if cfg.backbone == "vit" else D // 64), nn.Linear(D, P))
        self.T1.apply(init_weights)
        if cfg.contrast != "none":
            momentum = cfg.target == "momentum"
            self.F2 = copy.deepcopy(self.encoder).requires_grad_(False) if momentum else self.encoder
            self.T2 = copy.deepcopy(self.T1).requires_grad_(False) if momentum else self.T1

    def forward(self, view1, view2):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 10, "reconstruction": Eq. 6, "contrast": Eq. 9 or 7}."""
        cfg, p, both = self.cfg, self.encoder.stride, self.cfg.contrast != "none"
        mask = random_mask(len(view1), self.blocks, cfg.mask, view1.device)                 # §2.2   (B, n, n)
        tokens1 = self.encoder(view1, mask, self.mask_token)                                # Eq. 1  (B, N, D)
        tokens2 = self.F2(view2) if both else None                                          # Eq. 2  (B, N, D)
        Z1 = self.T1(tokens1)                                                               # Eq. 3  (B, N, P)
        y = unpatchify(Z1, p)                                                               # Eq. 4  (B, 3, H, W)
        Z2 = self.T2(tokens2) if both else None                                             # Eq. 5  (B, N, P)

        counted = spread(mask, view1.shape[2] // p).flatten(1)                              # (B, N)
        counted = counted if cfg.l1 == "pre" else torch.ones_like(counted)                  # Table 4
        target = normalize_patches(patchify(view1, p))                                      # §2.5   (B, N, P)
        L1 = reconstruction_loss(patchify(y, p), target, counted)                           # Eq. 6
        if not both:
            return {"loss": cfg.lam * L1, "reconstruction": L1}

        z1, z2 = gather(Z1.float().mean(1)), gather(Z2.float().mean(1))                     # (world·B, P)
        L2 = (dcl_loss if cfg.contrast == "dcl" else info_nce_loss)(z1, z2, cfg.tau)        # Eq. 9 or Eq. 7
        return {"loss": cfg.lam * L1 + L2, "reconstruction": L1, "contrast": L2}            # Eq. 10

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        The prediction is of normalised pixels: each patch gets its true mean and deviation back. Where the loss leaves
        out visible patches (--l1 pre), they are shown as they are.
        """
        p, patches = self.encoder.stride, patchify(x, self.encoder.stride)                  # (B, N, P)
        mask = random_mask(len(x), self.blocks, self.cfg.mask, x.device)
        masked = spread(mask, x.shape[2] // p).flatten(1)[:, :, None]                       # (B, N, 1)
        y = self.T1(self.encoder(x, mask, self.mask_token)).float()                         # (B, N, P)
        y = y * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)
        shown = torch.where(masked, y, patches) if self.cfg.l1 == "pre" else y
        return unpatchify(patches.masked_fill(masked, 0), p), unpatchify(shown, p)


# Loss, §2.5

def normalize_patches(patches):
    """Each patch of (B, N, P) to mean 0 and standard deviation 1, as in MAE."""
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is 1; 0 where none is. Eq. 6."""
    error = (pred.float() - target.float()).square().mean(2)                                # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def info_nce_loss(z1, z2, tau):
    """InfoNCE of the pairs z1[i], z2[i] (B, any width), mean over both views. Eq. 7, with U of Eq. 8."""
    with torch.autocast(z1.device.type, enabled=False):
        B = len(z1)
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)                                 # (2B, width)
        logits = z @ z.mT / tau                                                             # (2B, 2B)
        positive = logits.diagonal(B).repeat(2)                                             # (2B)  <z_i^1, z_i^2>/τ
        same = torch.eye(B, dtype=torch.bool, device=z.device).repeat(2, 2)                 # j = i, in both views l
        log_U = logits.masked_fill(same, -torch.inf).logsumexp(1)                           # Eq. 8
        return (torch.logaddexp(positive, log_U) - positive).mean()                         # Eq. 7


def dcl_loss(z1, z2, tau):
    """Decoupled contrastive loss of the pairs z1[i], z2[i] (B, any width), mean over both views. Eq. 9, U of Eq. 8."""
    with torch.autocast(z1.device.type, enabled=False):
        B = len(z1)
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)                                 # (2B, width)
        logits = z @ z.mT / tau                                                             # (2B, 2B)
        positive = logits.diagonal(B).repeat(2)                                             # (2B)  <z_i^1, z_i^2>/τ
        same = torch.eye(B, dtype=torch.bool, device=z.device).repeat(2, 2)                 # j = i, in both views l
        log_U = logits.masked_fill(same, -torch.inf).logsumexp(1)                           # Eq. 8
        return (-positive + log_U).mean()                                                   # Eq. 9


# Views, §2.1

def views(images, cfg):
    """uint8 images (B, 3, S, S) → the two views, normalised (B, 3, img, img): both cropped, the second coloured."""
    scale = cfg.crop_min, cfg.crop_max
    view1 = random_resized_crop(images, cfg.img, scale)
    view2 = random_resized_crop(images, cfg.img, scale)
    view2 = color_jitter(view2, p=cfg.jitter)
    view2 = random_grayscale(view2, cfg.gray)
    view2 = gaussian_blur(view2, cfg.blur)
    return normalize(view1), normalize(view2)


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data = load_images(cfg.data, "train", cfg.img, cfg.root, cfg.workers, cfg.seed)
    test = load_images(cfg.data, "test", cfg.img, cfg.root, cfg.workers, cfg.seed)
    batches = Batches(data, cfg.batch, cfg.seed, here)

    torch.manual_seed(cfg.seed)
    model = MCLim(cfg).to(here.device)
    net = DistributedDataParallel(model) if here.world > 1 else model
    net = torch.compile(net) if cfg.compile else net
    peak = cfg.lr * cfg.batch * here.world / 256                                            # §3.2
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, fused=True)         # §3.2
    steps, warmup = cfg.epochs * len(batches), cfg.warmup * len(batches)

    run = Run("mclim", cfg, here, len(batches))
    step = run.resume(model=model, optimizer=optimizer)
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        view1, view2 = views(batches[step][0], cfg)
        with autocast(here.device, cfg.amp):
            losses = net(view1, view2)
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, peak)
        optimizer.step()
        optimizer.zero_grad()
        if cfg.contrast != "none" and cfg.target == "momentum":                             # F₂, T₂ follow F₁, T₁
            m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2         # MoCo v3's, up to 1
            get_ema_multi_avg_fn(m)([*model.F2.parameters(), *model.T2.parameters()],
                                    [*model.encoder.parameters(), *model.T1.parameters()], None)

        step += 1
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        run.save(step, data, test, model=model, optimizer=optimizer)
    return run.finish()


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("mclim", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
