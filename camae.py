"""CAMAE, with IDM and PLB: He Zhu, Yang Chen, Guyue Hu and Shan Yu, "Information-density Masking Strategy for Masked
Image Modeling".

An encoder is contrasted with its momentum average on two views, and restores the first of them from a quarter of its
patches. Which quarter, its own attention says: the patches that one head of the last block finds most informative are
masked (IDM). The head is drawn anew each step, one whose masks are still hard to restore more often (PLB).

Symbols of the paper → here
    x_i, x'_i          two views of image i                       view1, view2 (B, 3, H, W)
    f_θ, f_ξ           encoder, its momentum average              encoder, f_xi
    g_θ, g_ξ           projectors                                 g_theta, g_xi
    q_θ                decoder                                    decoder
    h_i, h'_i          hidden outputs, of all processes           h1, h2; h1_xi, h2_xi by f_ξ (world·B, D)
    z_i, z'_i          what is contrasted                         z1, z2; z1_xi, z2_xi by g_ξ (world·B, 256)
    atten_i^m          attention map of head m                    attention (B, K, N); the drawn head's (B, N)
    M                  number of attention maps                   K, the heads
    mask_{i,h}^m       1 where patch h of image i is masked       mask (B, N)
    x_{i,h}, x̃_{i,h}   patches, and as restored                   target, y (B, N, P)
    p^m, m             probabilities of the heads, the drawn one  PLB.p (K,), m (1,): from 0; in metrics.csv from 1, an
                                                                  epoch's row with the p that its heads were drawn by
    L_c, L^m, L        the losses                                 L_c, L_m, "loss"
    τ, λ, ε                                                       tau, lam, eps

Equations → here
    1               info_nce_loss
    2               masked_mse
    3               idm_mask
    4, 5            plb_update, PLB.draw
    6               a line of CAMAE.forward
    f_ξ, g_ξ        follow f_θ, g_θ after each step of train
    §IV-A           Xavier: init_weights; the rate for a batch: train

Where this file departs from the paper. Where that is silent, the contrast follows MoCo v3 [10] and the rest MAE [4], as
§IV-A does; exceptions are listed.
    Left open                             Here                                              Flag
    which of h's tokens is projected      the class token                                   -
    projectors                            3 layers, 4096 wide, batch norm over all          --hidden
                                            processes' images; no predictor: Eq. 1 has none
    direction of Eq. 1                    both: x against x', x' against x; their mean      -
    augmentation "from the same family"   crops of 0.08 to 1 of the area, flips, colour     --crop-min --jitter
                                            jitter, greyscale; blur at 0.5 in both views      --gray --blur
    z · z' in Eq. 1                       of l2-normalised vectors                          -
    "the same as [10]"                    but for its frozen patch embedding, solarisation, --wd
                                            unequal blur, decay 0.1, betas and factor 2τ
    "self-distillation … follows [7]"     none: §III has no such term                       -
    atten: whose query, of which view     the class token's, whole view 1, no gradient      -
    what is restored                      x, the first view, as it was augmented            -
    pixels as they are, or normalised     as they are, for so Eq. 2 reads; only ImageNet's  --norm-pixels
                                            mean and deviation of each channel are taken
                                            out, which sets the scale of L^m that ε meets     --eps
    decoder                               8 blocks, 512 wide, 16 heads                      --decoder-depth
                                                                                            --decoder-dim
    momentum                              0.99, rising to 1 by a cosine                     --momentum
    base rate, decay, warm-up             1.5e-4, 0.05, 40 epochs                           --lr --wd --warmup
    L^m of a head never drawn             the mean of those that were                       -
    Given otherwise
    §IV-A: batch 4096 on eight GPUs       512 a process, so that torchrun with eight has    --batch
                                            4096; what one GPU holds is not measured yet
    §III-C: "over the top 25%"            the top 75 % are masked: so abstract, Figure 3    --mask
                                            and the sentence before
    Eq. 2: a sum                          "equals the mean squared error": the mean over    -
                                            the masked patches' pixels
    Eq. 4: L^m                            the mean over an epoch; a head not drawn in it    -
                                            keeps its last. λ weighs the new estimate
    Eq. 6: Σ_m                            the one head drawn in the step (Eq. 5)            -
    Tables III to V: "CMAE"               CAMAE is meant; "CMAE [6]" is Huang et al.'s      -

    torchrun --nproc-per-node 8 camae.py --data PATH         the paper's experiment, on ImageNet
    python camae.py --mask-by random                         a row of Table II; idm and plb are the others
    python camae.py --no-contrast --mask-by random           MAE on this file's views; MAE's own: add
                                                             --crop-min 0.2 --jitter 0 --gray 0 --blur 0
    python camae.py --tiny --data shapes                     a first look on a laptop
    python eval_linear.py runs/camae-DATE-TIME               kNN and linear probe of what came out
    python show.py runs/camae-DATE-TIME                      attention maps and their masks: Figures 2 and 3

Measured: --tiny, 2 epochs of CIFAR-10 (JPEG) on one CPU core: kNN 47.7 %, linear probe 50.5 % (untrained 34.0, 44.1);
with --mask-by random 47.9, 51.6; with idm 47.6, 50.3. The paper's configuration is not measured yet. Commands and the
rest: RESULTS.md.
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
    mask: float = 0.75  # share of the patches that is masked, §III-C
    mask_by: Literal["random", "idm", "plb"] = "plb"  # Table II: at random, by a head drawn evenly, or drawn by Eq. 4
    contrast: bool = True  # L_c, Eq. 1; without it MAE, as in Table I, on this file's views
    tau: float = 0.2  # τ, temperature, §IV-A
    lam: float = 0.99  # λ, weight of the new estimate of p, Eq. 4
    eps: float = 0.2  # ε, temperature of the heads' losses, Eq. 4
    momentum: float = 0.99  # of f_ξ and g_ξ, rising to 1 by a cosine; ours: MoCo v3's
    crop_min: float = 0.08  # smallest crop, share of the area; ours: MoCo v3's
    jitter: float = 0.8  # probability of colour jitter; ours: MoCo v3's
    gray: float = 0.2  # probability of greyscale; ours: MoCo v3's
    blur: float = 0.5  # probability of blur; ours: SimCLR's, alike in both views
    norm_pixels: bool = False  # restore each patch at mean 0, deviation 1; ours: off, as Eq. 2 reads
    # model
    img: int = 224  # side of the views in pixels, §IV-A
    patch: int = 16  # side of a patch in pixels, §IV-A
    dim: int = 768  # width D, §IV-A
    depth: int = 12  # blocks, §IV-A: ViT-Base's
    heads: int = 12  # heads K, §IV-A: ViT-Base's
    hidden: int = 4096  # hidden width of the projectors; ours: MoCo v3's
    out_dim: int = 256  # width of z, §IV-A
    decoder_depth: int = 8  # blocks of the decoder; ours: MAE's
    decoder_dim: int = 512  # width of the decoder; ours: MAE's
    decoder_heads: int = 16  # heads of the decoder; ours: MAE's
    # optimisation
    epochs: int = 400  # passes over the data, §IV-A
    batch: int = 512  # images per step and per process, §IV-A: 4096 on eight GPUs
    lr: float = 1.5e-4  # base learning rate, for a batch of 256; ours: MAE's and MoCo v3's
    wd: float = 0.05  # weight decay; ours: MAE's
    warmup: int = 40  # epochs of linear warm-up; ours: MAE's and MoCo v3's
    # run
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; ours: §IV-A has ImageNet
    root: str = "data"  # where data sets are downloaded to and decoded; ours
    out: str = ""  # folder of the run, new or empty; ours: runs/camae-DATE-TIME
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
        check(not self.contrast or self.batch >= 2, "--batch", self.batch,
              "must be at least 2, or there are no negatives")
        check(0 < self.tau < math.inf, "--tau", self.tau, "must be above 0")
        check(0 <= self.lam <= 1, "--lam", self.lam, "must lie between 0 and 1")
        check(0 < self.eps < math.inf, "--eps", self.eps, "must be above 0")
        check(0 <= self.momentum <= 1, "--momentum", self.momentum, "must lie between 0 and 1")
        check(0 < self.crop_min <= 1, "--crop-min", self.crop_min, "must lie between 0 and 1")
        for name in ("jitter", "gray", "blur"):
            check(0 <= getattr(self, name) <= 1, f"--{name}", getattr(self, name), "is a probability: 0 to 1")
        for name in ("hidden", "out_dim", "decoder_depth", "decoder_heads"):
            check(getattr(self, name) >= 1, "--" + name.replace("_", "-"), getattr(self, name), "must be at least 1")
        check(self.decoder_dim > 0 and self.decoder_dim % (4 * self.decoder_heads) == 0, "--decoder-dim",
              self.decoder_dim, f"must be a multiple of 4 times --decoder-heads {self.decoder_heads}")


TINY = Config(crop_min=0.2, img=32, patch=4, dim=192, depth=4, heads=3, hidden=768, out_dim=64, decoder_depth=2,
              decoder_dim=96, decoder_heads=3, epochs=8, batch=128, lr=1e-3, warmup=1, knn_every=1, tiny=True)


# Transformer. B batch, N patches, V visible ones, D width, K heads, P = 3·p·p numbers of a patch, p pixels a side
# (--patch); width is the decoder's.

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


# Masking, §III-C and §III-D

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


def idm_mask(attention, ratio):
    """Masks the share `ratio` of the patches that have the most attention: (B, N) → bool (B, N), 1 = masked. Eq. 3."""
    rank = attention.argsort(1, descending=True).argsort(1)                                 # 0 for the most
    return rank < round(ratio * attention.shape[1])


def plb_update(p, losses, lam, eps):
    """Probabilities p (K,) of the heads after an epoch in which their mean losses were `losses` (K,). Eq. 4."""
    return (1 - lam) * p + lam * (losses / eps).softmax(0)


class PLB(nn.Module):
    """The heads' probabilities, and the losses that Eq. 4 makes them from; a Module to be in the checkpoint."""
    def __init__(self, heads):
        super().__init__()
        for name, value in (("p", 1 / heads), ("losses", math.nan), ("sums", 0.0), ("counts", 0.0)):
            self.register_buffer(name, torch.full((heads,), value))

    def draw(self, steps, seed, epoch):
        """The head of each step of an epoch (steps,), the same in all processes. Eq. 5."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return self.p.cpu().multinomial(steps, replacement=True, generator=generator).to(self.p.device)

    def note(self, m, loss):
        """Adds a step's loss, mean over all processes, to what head m (1,) had in this epoch."""
        loss = gather(loss.detach().float().view(1, 1)).mean(0)                             # (1)
        self.sums.index_add_(0, m, loss)
        self.counts.index_add_(0, m, torch.ones_like(loss))

    def end_epoch(self, lam, eps):
        """Eq. 4 with this epoch's mean losses. A head not drawn in it keeps its last; one never drawn has the others'
        mean."""
        self.losses.copy_(torch.where(self.counts > 0, self.sums / self.counts, self.losses))
        losses = torch.where(self.losses.isnan(), self.losses.nanmean(), self.losses)
        self.p.copy_(plb_update(self.p, losses, lam, eps))
        self.sums.zero_()
        self.counts.zero_()


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


def encode(encoder, x):
    """In one pass, what encoder(x) and encoder.attention(x) give: (B, 1 + N, D) and, without gradient, (B, K, N). The
    last block is written out for the sake of its queries and keys."""
    x, block = encoder.embed(x), encoder.blocks[-1]
    q, k, v = block.attn.split(block.norm1(x))
    x = x + block.attn.mix(q, k, v)
    x = x + block.mlp(block.norm2(x))
    return encoder.norm(x), attend(q.detach(), k.detach(), slice(1))[:, :, 1:]


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


def projector(dim, hidden, out):
    """MoCo v3's: three linear layers with batch norm, the last norm without weights, (B, dim) → (B, out)."""
    def norm(width, affine=True):
        return nn.BatchNorm1d(width, affine=affine, track_running_stats=False)
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(dim, hidden, bias=False), norm1=norm(hidden), act1=nn.ReLU(),
        fc2=nn.Linear(hidden, hidden, bias=False), norm2=norm(hidden), act2=nn.ReLU(),
        fc3=nn.Linear(hidden, out, bias=False), norm3=norm(out, affine=False))).apply(init_weights)


class CAMAE(nn.Module):
    """Both tasks of one encoder (Figure 1). `forward` is §III-A to §III-D."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.grid = cfg, cfg.img // cfg.patch
        self.V = self.grid ** 2 - round(cfg.mask * self.grid ** 2)
        self.encoder = Encoder(cfg, "cls")                                                  # f_θ
        blocks = [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
        self.decoder = Decoder(cfg.dim, self.grid, 3 * cfg.patch ** 2, cfg.decoder_dim, blocks)  # q_θ
        if cfg.contrast:
            self.g_theta = projector(cfg.dim, cfg.hidden, cfg.out_dim)
            self.f_xi = copy.deepcopy(self.encoder).requires_grad_(False)
            self.g_xi = copy.deepcopy(self.g_theta).requires_grad_(False)
        self.restored = ("reconstruction\n(each patch given its\ntrue mean and contrast)" if cfg.norm_pixels else
                         "reconstruction")  # its label in pictures

    def forward(self, view1, view2, m=None):
        """Normalised views (B, 3, H, W) and the head m (1,) that masks, any if None → {"loss": Eq. 6, "contrast":
        Eq. 1, "reconstruction": Eq. 2}."""
        cfg, attention = self.cfg, None
        if cfg.contrast:
            tokens1, attention = encode(self.encoder, view1)                                # (B, 1 + N, D), (B, K, N)
            tokens2 = self.encoder(view2)                                                   # (B, 1 + N, D)
            with torch.no_grad():
                h1_xi, h2_xi = (gather(self.f_xi.features(view)) for view in (view1, view2))  # (world·B, D)
                z1_xi, z2_xi = self.g_xi(h1_xi), self.g_xi(h2_xi)                           # (world·B, 256)
            h1, h2 = (gather(self.encoder.vector(tokens)) for tokens in (tokens1, tokens2))  # (world·B, D)
            z1, z2 = self.g_theta(h1), self.g_theta(h2)                                     # (world·B, 256)
            L_c = (info_nce_loss(z1, z2_xi, cfg.tau) + info_nce_loss(z2, z1_xi, cfg.tau)) / 2  # Eq. 1

        mask = self.mask(view1, m, attention)                                               # Eq. 3  (B, N)
        y, target = self.restore(view1, mask), patchify(view1, cfg.patch)                   # (B, N, P)
        L_m = masked_mse(y, normalize_patches(target) if cfg.norm_pixels else target, mask)  # Eq. 2
        if not cfg.contrast:
            return {"loss": L_m, "reconstruction": L_m}
        return {"loss": L_c + L_m, "contrast": L_c, "reconstruction": L_m}                  # Eq. 6

    @torch.no_grad()
    def mask(self, x, m=None, attention=None):
        """Which patches of images (B, 3, H, W) are masked, bool (B, N): at random, or by head m (1,), any if None, of
        their attention (B, K, N), computed here if None."""
        if self.cfg.mask_by == "random":
            return random_mask(len(x), self.grid, self.cfg.mask, x.device).flatten(1)
        m = torch.randint(self.cfg.heads, (1,), device=x.device) if m is None else m
        attention = self.encoder.attention(x) if attention is None else attention
        return idm_mask(attention.index_select(1, m)[:, 0], self.cfg.mask)                  # Eq. 3

    def restore(self, x, mask):
        """Images (B, 3, H, W) whose patches are masked (B, N) → all patches as the decoder restores them (B, N, P)."""
        visible = visible_first(mask)[:, :self.V]                                           # (B, V)
        return self.decoder(self.encoder(x, visible), visible)

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        Masked at random, or by the attention of a head drawn evenly. Visible patches, which the loss leaves out, are
        shown as they are. With --norm-pixels each masked patch gets its true mean and deviation back.
        """
        cfg, patches = self.cfg, patchify(x, self.cfg.patch)                                # (B, N, P)
        mask = self.mask(x)                                                                 # (B, N)
        y = self.restore(x, mask).float()                                                   # (B, N, P)
        if cfg.norm_pixels:
            y = y * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)
        shown = torch.where(mask[:, :, None], y, patches)
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), cfg.patch), unpatchify(shown, cfg.patch)


# Loss, §III-A and §III-B

def normalize_patches(patches):
    """Each patch of (B, N, P) to mean 0 and standard deviation 1, as in MAE."""
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


def masked_mse(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is 1; 0 where none is. Eq. 2."""
    error = (pred.float() - target.float()).square().mean(2)                                # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def info_nce_loss(z, z_prime, tau):
    """InfoNCE of z[i] and its positive z_prime[i] against all other z_prime, (B, any width), mean over i. Eq. 1."""
    with torch.autocast(z.device.type, enabled=False):
        logits = F.normalize(z.float(), dim=1) @ F.normalize(z_prime.float(), dim=1).mT / tau  # (B, B)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device))


# Views, §III-A

def views(images, cfg):
    """uint8 images (B, 3, S, S) → two views by the same law, normalised (B, 3, img, img); one twice, --no-contrast."""
    def view():
        x = random_hflip(random_resized_crop(images, cfg.img, (cfg.crop_min, 1.0)))
        x = random_grayscale(color_jitter(x, p=cfg.jitter), cfg.gray)
        return normalize(gaussian_blur(x, cfg.blur))
    view1 = view()
    return view1, (view() if cfg.contrast else view1)


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data = load_images(cfg.data, "train", cfg.img, cfg.root, cfg.workers, cfg.seed)
    test = load_images(cfg.data, "test", cfg.img, cfg.root, cfg.workers, cfg.seed)
    batches = Batches(data, cfg.batch, cfg.seed, here)

    torch.manual_seed(cfg.seed)
    model, plb = CAMAE(cfg).to(here.device), PLB(cfg.heads).to(here.device)
    net = DistributedDataParallel(model) if here.world > 1 else model
    net = torch.compile(net) if cfg.compile else net
    peak = cfg.lr * cfg.batch * here.world / 256                                            # §IV-A
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, betas=(0.9, 0.95), fused=True)  # MAE's
    steps, warmup = cfg.epochs * len(batches), cfg.warmup * len(batches)

    heads = range(1, cfg.heads + 1) if cfg.mask_by != "random" else ()
    columns = [f"{name} of head {m}" for name in ("loss", "p") for m in heads]
    run = Run("camae", cfg, here, len(batches), ["knn", *columns])
    step = run.resume(model=model, optimizer=optimizer, plb=plb)
    drawn = plb.draw(len(batches), cfg.seed, step // len(batches))                          # the epoch's heads
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        view1, view2 = views(batches[step][0], cfg)
        m = drawn[step % len(batches)].view(1)                                              # Eq. 5
        with autocast(here.device, cfg.amp):
            losses = net(view1, view2, m)
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, peak)
        optimizer.step()
        optimizer.zero_grad()
        if cfg.contrast:                                                                    # f_ξ, g_ξ follow f_θ, g_θ
            mu = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2        # MoCo v3's, up to 1
            get_ema_multi_avg_fn(mu)([*model.f_xi.parameters(), *model.g_xi.parameters()],
                                     [*model.encoder.parameters(), *model.g_theta.parameters()], None)

        step += 1
        if cfg.mask_by != "random":
            plb.note(m, losses["reconstruction"])
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        if step % len(batches) == 0 and cfg.mask_by != "random":
            p = plb.p.tolist()                                                              # this epoch's
            plb.end_epoch(cfg.lam if cfg.mask_by == "plb" else 0.0, cfg.eps)                # Eq. 4; λ = 0 keeps p even
            if here.rank == 0:
                epoch = {"step": step, "epoch": step // len(batches)}
                run.write({**epoch, **dict(zip(columns, plb.losses.tolist() + p))})
            drawn = plb.draw(len(batches), cfg.seed, step // len(batches))
        run.save(step, data, test, model=model, optimizer=optimizer, plb=plb)
    return run.finish()


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("camae", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
