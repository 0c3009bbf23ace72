"""CMAE: Jiawei Mao, Xuesong Yin, Yuanqi Chang and Honggu Zhou, "Improvements to Self-Supervised Representation Learning
for Masked Image Modeling", arXiv 2205.10546, 2022. Not the CMAE of Huang et al., "Contrastive Masked Autoencoders are
Stronger Vision Learners", arXiv 2207.13532, which is another method.

A masked autoencoder whose encoder has two tasks of its own: the visible and masked tokens of a view, put together
again, are contrasted with those that a momentum encoder makes of another view; and the place of each visible token is
predicted from it. The views are cut around the main object, which the encoder itself finds (ContrastiveCrop), and the
decoder may be weaker than a transformer.

Symbols of the paper → here
    M, k, I         heat map, threshold, rectangle           heat (B, n, n), k, boxes (B, 4): top, left, bottom, right,
                                                             as shares of the image's side
    s, r            scale and aspect of a crop               scale; the aspect is 3/4 to 4/3
    x_q, x_k        the two views                            view1, view2 (B, 3, H, W)
    E, M_E, P, M_P  encoder, projection, and their averages  encoder, M_E, P, M_P
    q_1, q_2        E's visible and masked tokens of x_q     q1 (B, 1 + V, D), q2, class token first
    k_1, k_2        M_E's visible and masked tokens of x_k   k1, k2
    h_1, h_2        all tokens of a view in order            h1, h2 (B, N, D)
    z_q, z_k        projected vectors, of all processes      z_q, z_k (world·B, D)
    p, t            predicted and true places, one-hot       p (B, V, N); t is made from positions (B, V)
    L_ctr, L_loc, L_con, each with its λ                     L_ctr, L_loc, L_con, lam_ctr, lam_loc, lam_con

Equations → here
    1               semantic_boxes is F(1[M > k]), contrastive_crop is R_crop(s, r, I)
    2, 4, 6         lines of CMAE.forward; restore
    3, 5            info_nce_loss, location_loss

Where this file departs from the paper
    Left open                             Here                                              Flag
    which decoder and which M Table 1's   the original decoder, attention                   --decoder --heat
      CMAE has
    patch, for 64×64 images               8, so N = 64                                      --patch
    crops                                 0.2 to 1 of the area, aspect 3/4 to 4/3, flips;   --crop-min
                                            no colour is named, and there is none
    ContrastiveCrop's numbers             k 0.1, Beta(0.6, 0.6), 60 epochs (a fifth of 300) --k --alpha
                                          of plain random crops, then boxes anew every 60:    --crop-from
                                          its paper's (arXiv 2202.03278); its code has        --crop-every
                                          Beta(0.1, 0.1) for Tiny-ImageNet. With a ViT, k 0.1
                                          may give nearly whole images (training prints how
                                          much, show.py draws it): then --k 0.5
    M is enlarged to the image there      it stays at n×n: boxes end where patches do       -
    M from the last layer's features,     mean of their absolute value over channels,       --heat features
      "weighted" in each channel            before the last norm, which makes all tokens
                                            equally large
    M from multi-head attention           the last block's, from the class token, mean of   --heat attention
                                            the heads. That token's query is trained
                                            through a transformer decoder alone
    other z_k of Eq. 3                    the batch's, of all processes                     --batch
    directions                            as printed: x_q is located, restored, contrasted  -
                                            with x_k, and not the other way round
    momentum                              MoCo v3's: 0.99, rising to 1 by a cosine          --momentum
    how P makes one vector of h           mean over tokens, to which Eq. 2's order is all   -
                                            one, then a 2-layer MLP of width D
    Eq. 3's τ, dot product                0.2, of l2-normalised vectors: MoCo v3's          --tau
    q_2, k_2                              encoded by themselves, with a class token of      -
                                            their own; h has no class token
    Eq. 4: MLP(MLP(·))                    each MLP is one linear layer, D wide, GELU        -
                                            between; p is taken as it is, no softmax
    base rate 1e-3: for how many images   256, MAE's rule, which makes 2.5e-4 at batch 64;  --lr 4e-3
                                            the other reading is 1e-3 itself
    original decoder                      MAE's: 8 blocks, 512 wide, 16 heads               --decoder-depth
                                                                                            --decoder-dim
    "deep convolution"                    depthwise, then a layer across channels; norm,    --decoder conv
                                            GELU and residual as in a transformer block
    "replace the decoder middle layer"    layer depth/2, counted from 0                     --decoder hybrid-mlp,
                                                                                              hybrid-conv
    §4.2: "frozen and fine-tuned"         linear probe, by eval_linear.py                   -
    Printed otherwise
    §3.3: "q_2 belongs to the unmasked"   q_2 holds the masked tokens; no gradient there
    Eq. 5: ‖q - t‖₂                       ‖p - t‖₂, a token's norm, mean over tokens
    As printed, and its effect
    §3.4                                  a visible token carries its place into E, as in MAE: E learns to keep it
    §3.5: "MLP decoder"                   nothing moves between tokens: a masked patch gets what its place alone
                                            predicts, and L_con teaches E nothing

    python cmae.py                                           Table 1's CMAE, as far as it is told
    python cmae.py --decoder conv --decoder-dim 128          a weaker decoder
    python cmae.py --tiny --data shapes                      a first look on a laptop
    python eval_linear.py runs/cmae-DATE-TIME                kNN and linear probe of what came out
    python show.py runs/cmae-DATE-TIME                       reconstructions, attention, boxes and crops

Measured: --tiny, 5 epochs of CIFAR-10 (JPEG) on one CPU core: kNN 36.4 %, linear probe 46.2 % (untrained 33.6, 43.6);
2 epochs of Tiny-ImageNet: 7.3 and 13.5 %. The paper's configuration is not measured yet. Commands and the rest:
RESULTS.md.
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

from common import (Batches, Run, autocast, check, check_config, cosine_lr, crop_boxes, crop_resize, launch,
                    load_images, normalize, param_groups, random_hflip, random_resized_crop, resize, seed_step,
                    start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.75  # share of the patches that is masked, §4.2
    lam_ctr: float = 1.0  # weight of the contrast, §3.6
    lam_loc: float = 1.0  # weight of the location prediction, §3.6
    lam_con: float = 1.0  # weight of the reconstruction, §3.6
    tau: float = 0.2  # τ, temperature; ours: MoCo v3's
    momentum: float = 0.99  # of M_E and M_P, rising to 1 by a cosine; ours: MoCo v3's
    heat: Literal["attention", "features"] = "attention"  # what the heat map M is made of, §3.2
    k: float = 0.1  # threshold of M, 0…1, Eq. 1; ours: ContrastiveCrop's
    alpha: float = 0.6  # crop centres by Beta(α, α) across I, below 1 rather at its ends; ours: ContrastiveCrop's
    crop_from: int = 60  # epochs of plain random crops before (all of --epochs: only such); ours: ContrastiveCrop's
    crop_every: int = 60  # epochs between computing the boxes anew; ours: ContrastiveCrop's
    crop_min: float = 0.2  # smallest crop, share of the area; ours: MAE's
    # model
    img: int = 64  # side of the views in pixels, §4.1
    patch: int = 8  # side of a patch in pixels; ours
    dim: int = 768  # width D, §4.2: ViT-Base
    depth: int = 12  # blocks, §4.2
    heads: int = 12  # heads K, §4.2
    decoder: Literal["transformer", "mlp", "conv", "hybrid-mlp", "hybrid-conv"] = "transformer"  # §3.5
    decoder_depth: int = 8  # blocks of the decoder; ours: MAE's
    decoder_dim: int = 512  # width of the decoder: 512, 256, 128 or 64 in §3.5
    decoder_heads: int = 16  # heads of the decoder; ours: MAE's
    # optimisation
    epochs: int = 300  # passes over the data, §4.2
    batch: int = 64  # images per step and per process, §4.2
    lr: float = 1e-3  # base learning rate, §4.2; for a batch of 256: ours, MAE's rule
    wd: float = 0.05  # weight decay, §4.2
    warmup: int = 40  # epochs of linear warm-up; ours: MAE's
    # run
    data: str = "tiny-imagenet"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; §4.1
    root: str = "data"  # where data sets are downloaded to and decoded; ours
    out: str = ""  # folder of the run, new or empty; ours: runs/cmae-DATE-TIME
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
        lams = self.lam_ctr, self.lam_loc, self.lam_con
        check(min(lams) >= 0 and 0 < sum(lams) < math.inf, "--lam-ctr, --lam-loc, --lam-con", lams,
              "must not be negative, and not all 0")
        check(self.batch >= 2, "--batch", self.batch, "must be at least 2, or there are no negatives")
        check(0 < self.tau < math.inf, "--tau", self.tau, "must be above 0")
        check(0 <= self.momentum <= 1, "--momentum", self.momentum, "must lie between 0 and 1")
        check(0 <= self.k < 1, "--k", self.k, "must lie between 0 and 1")
        check(0 < self.alpha < math.inf, "--alpha", self.alpha, "must be above 0")
        check(self.crop_from >= 0, "--crop-from", self.crop_from, "must not be negative")
        check(self.crop_every >= 1, "--crop-every", self.crop_every, "must be at least 1")
        check(0 < self.crop_min <= 1, "--crop-min", self.crop_min, "must lie between 0 and 1")
        check(self.decoder_depth >= 1, "--decoder-depth", self.decoder_depth, "must be at least 1")
        check(self.decoder_heads >= 1, "--decoder-heads", self.decoder_heads, "must be at least 1")
        check(self.decoder_dim > 0 and self.decoder_dim % (4 * self.decoder_heads) == 0, "--decoder-dim",
              self.decoder_dim, f"must be a multiple of 4 times --decoder-heads {self.decoder_heads}")


TINY = Config(crop_from=1, crop_every=2, img=32, patch=4, dim=192, depth=4, heads=3, decoder_depth=2, decoder_dim=96,
              decoder_heads=3, epochs=8, batch=128, warmup=1, data="cifar10", knn_every=1, tiny=True)


# Transformer. B batch, N patches, V visible ones, D width, K heads, n patches a side, p pixels a side of a
# patch; P in shapes is 3·p·p, the numbers of a patch, and width is the decoder's.

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


# Masking, §3.3

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


def restore(x, order):
    """Puts tokens x (B, N, D) that came in `order` (B, N), as visible_first gives it, back into their places. Eq. 2."""
    return torch.empty_like(x).scatter(1, order[:, :, None].expand_as(x), x)


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


class MlpBlock(nn.Module):
    """The half of Block without attention: each token on its own, the shape stays."""
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden, dim)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class ConvBlock(nn.Module):
    """§3.5's convolution (3, stride 1, padding 1) of each channel, then across channels; the class token passes by."""
    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.fc = nn.Linear(dim, dim)

    def forward(self, x):
        image = self.norm(x[:, 1:]).mT.unflatten(2, (self.grid, self.grid))                 # (B, width, n, n)
        tokens = self.fc(F.gelu(self.conv(image)).flatten(2).mT)                            # (B, N, width)
        return x + F.pad(tokens, (0, 0, 1, 0))                                              # 0 for the class token


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


def decoder_blocks(cfg):
    """The decoder's blocks by §3.5: all of one kind, or a transformer's and one of another kind in the middle."""
    def block(kind):
        if kind == "mlp":
            return MlpBlock(cfg.decoder_dim, 4 * cfg.decoder_dim)
        if kind == "conv":
            return ConvBlock(cfg.decoder_dim, cfg.img // cfg.patch)
        return Block(cfg.decoder_dim, cfg.decoder_heads)
    kind, middle = cfg.decoder.removeprefix("hybrid-"), cfg.decoder_depth // 2
    return [block(kind if kind == cfg.decoder or i == middle else "transformer") for i in range(cfg.decoder_depth)]


class CMAE(nn.Module):
    """The autoencoder, its momentum encoder and the three tasks (Figure 1). `forward` is §3.3 to §3.6."""
    restored = "reconstruction"  # its label in pictures

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.grid, D = cfg, cfg.img // cfg.patch, cfg.dim
        self.V = self.grid ** 2 - round(cfg.mask * self.grid ** 2)
        self.encoder = Encoder(cfg)                                                         # E
        self.P = mlp(D, D, D).apply(init_weights)
        self.M_E, self.M_P = (copy.deepcopy(part).requires_grad_(False) for part in (self.encoder, self.P))
        self.location = mlp(D, D, self.grid ** 2).apply(init_weights)
        self.decoder = Decoder(D, self.grid, 3 * cfg.patch ** 2, cfg.decoder_dim, decoder_blocks(cfg))

    def forward(self, view1, view2):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 6, "contrast": Eq. 3, "location": Eq. 5, "reconstruction"}."""
        cfg, V, x_q, x_k = self.cfg, self.V, view1, view2
        mask_q, mask_k = (random_mask(len(x), self.grid, cfg.mask, x.device).flatten(1) for x in (x_q, x_k))  # (B, N)
        order_q, order_k = visible_first(mask_q), visible_first(mask_k)                     # (B, N)
        visible = order_q[:, :V]                                                            # (B, V)
        q1 = self.encoder(x_q, visible)                                                     # §3.3 (B, 1 + V, D)
        with torch.no_grad():                                                               # detach, and M_E
            q2 = self.encoder(x_q, order_q[:, V:])                                          # (B, 1 + N - V, D)
            k1, k2 = self.M_E(x_k, order_k[:, :V]), self.M_E(x_k, order_k[:, V:])
        h1 = restore(torch.cat([q1[:, 1:], q2[:, 1:]], 1), order_q)                         # Eq. 2 (B, N, D)
        h2 = restore(torch.cat([k1[:, 1:], k2[:, 1:]], 1), order_k)                         # Eq. 2 (B, N, D)
        z_q, z_k = gather(self.P(h1.float().mean(1))), gather(self.M_P(h2.float().mean(1)))  # (world·B, D)
        L_ctr = info_nce_loss(z_q, z_k, cfg.tau)                                            # Eq. 3

        p = self.location(q1[:, 1:])                                                        # Eq. 4 (B, V, N)
        L_loc = location_loss(p, visible)                                                   # Eq. 5

        y = self.decoder(q1, visible)                                                       # §3.5 (B, N, P)
        L_con = reconstruction_loss(y, patchify(x_q, cfg.patch), mask_q)
        loss = cfg.lam_ctr * L_ctr + cfg.lam_loc * L_loc + cfg.lam_con * L_con              # Eq. 6
        return {"loss": loss, "contrast": L_ctr, "location": L_loc, "reconstruction": L_con}

    def heat(self, x):
        """The heat map M of Eq. 1 of normalised images (B, 3, H, W): (B, n, n), each from 0 to 1."""
        if self.cfg.heat == "attention":
            heat = self.encoder.attention(x).mean(1)                                        # (B, N)
        else:
            heat = self.encoder.blocks[-1](self.encoder.embed(x))[:, 1:].abs().mean(2)      # (B, N)
        low, high = heat.amin(1, keepdim=True), heat.amax(1, keepdim=True)
        return ((heat - low) / (high - low).clamp(min=1e-12)).unflatten(1, (self.grid, self.grid))

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        Visible patches, which the loss leaves out, are shown as they are.
        """
        patches = patchify(x, self.cfg.patch)                                               # (B, N, P)
        mask = random_mask(len(x), self.grid, self.cfg.mask, x.device).flatten(1)           # (B, N)
        visible = visible_first(mask)[:, :self.V]                                           # (B, V)
        y = self.decoder(self.encoder(x, visible), visible).float()                         # (B, N, P)
        shown = torch.where(mask[:, :, None], y, patches)
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), self.cfg.patch), unpatchify(shown, self.cfg.patch)


# Loss, §3.3 to §3.5

def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is 1; 0 where none is. L_con of §3.5."""
    error = (pred.float() - target.float()).square().mean(2)                                # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def info_nce_loss(q, k, tau):
    """InfoNCE of q[i] and its positive k[i] against all other k, (B, any width), mean over i. Eq. 3."""
    with torch.autocast(q.device.type, enabled=False):
        logits = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).mT / tau     # (B, B)
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))


def location_loss(p, positions):
    """Distance of the predicted places p (B, V, N) from the true ones, positions (B, V), one-hot; mean. Eq. 5."""
    t = F.one_hot(positions, p.shape[2])                                                    # (B, V, N)
    return (p.float() - t).norm(dim=2).mean()


# Views, §3.2

def semantic_boxes(heat, k):
    """I = F(1[M > k]), the rectangle around what is hot. Eq. 1.

    heat (B, n, n), 0…1 → (B, 4): top, left, bottom, right as shares of the side; the whole image where nothing is.
    """
    hot, n = heat > k, heat.shape[1]
    rows, columns = hot.any(2), hot.any(1)                                                  # (B, n)
    top, left = (line.int().argmax(1) for line in (rows, columns))                          # the first
    bottom, right = (n - line.flip(1).int().argmax(1) for line in (rows, columns))          # behind the last
    return torch.stack([top, left, bottom, right], 1) / n


def crop_starts(low, high, length, alpha):
    """Where crops of `length` begin whose centres follow Beta(α, α) from low to high, as far as they fit: each (B,),
    in shares of the side."""
    low, high = ((edge - length / 2).clamp(min=0).minimum(1 - length) for edge in (low, high))
    return torch.lerp(low, high, torch.distributions.Beta(alpha, alpha).sample(low.shape))


def contrastive_crop(images, size, scale, boxes, alpha):
    """R_crop(s, r, I): crops of images (B, 3, H, W) with their centres in `boxes` (B, 4), (B, 3, size, size). Eq. 1."""
    H, W = images.shape[2:]
    _, _, height, width = crop_boxes(len(images), H, W, scale, (3 / 4, 4 / 3))              # s and r
    top = (crop_starts(boxes[:, 0], boxes[:, 2], height / H, alpha) * H).round().long()
    left = (crop_starts(boxes[:, 1], boxes[:, 3], width / W, alpha) * W).round().long()
    return crop_resize(images, (top, left, height, width), size)


def views(images, cfg, boxes=None):
    """uint8 images (B, 3, S, S) → two views, normalised (B, 3, img, img): around `boxes` (B, 4), if there are any."""
    def view():
        scale = cfg.crop_min, 1.0
        crops = (random_resized_crop(images, cfg.img, scale) if boxes is None else
                 contrastive_crop(images, cfg.img, scale, boxes, cfg.alpha))
        return normalize(random_hflip(crops))
    return view(), view()


class Boxes(nn.Module):
    """The rectangles I of all training images, (images, 4), whole images at first; a Module to be in the checkpoint."""
    def __init__(self, images):
        super().__init__()
        self.register_buffer("boxes", torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(images, 1))

    @torch.no_grad()
    def locate(self, model, images, here):
        """Computes them anew from the model's heat maps of uint8 images (N, 3, S, S); each process does all."""
        for ids in torch.arange(len(images)).split(250):
            x = normalize(resize(images[ids].to(here.device), model.cfg.img))
            with autocast(here.device, model.cfg.amp):
                self.boxes[ids] = semantic_boxes(model.heat(x), model.cfg.k).cpu()
        top, left, bottom, right = self.boxes.unbind(1)
        if here.rank == 0:
            print(f"boxes: {((bottom - top) * (right - left)).mean():.2f} of the image on average", flush=True)


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data = load_images(cfg.data, "train", cfg.img, cfg.root, cfg.workers, cfg.seed)
    test = load_images(cfg.data, "test", cfg.img, cfg.root, cfg.workers, cfg.seed)
    batches, boxes = Batches(data, cfg.batch, cfg.seed, here), Boxes(len(data[0]))

    torch.manual_seed(cfg.seed)
    model = CMAE(cfg).to(here.device)
    net = DistributedDataParallel(model) if here.world > 1 else model
    net = torch.compile(net) if cfg.compile else net
    peak = cfg.lr * cfg.batch * here.world / 256                                            # §4.2
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, betas=(0.9, 0.95), fused=True)  # MAE's
    steps, warmup = cfg.epochs * len(batches), cfg.warmup * len(batches)

    run = Run("cmae", cfg, here, len(batches))
    step = run.resume(model=model, optimizer=optimizer, boxes=boxes)
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        epoch, rest = divmod(step, len(batches))
        if not rest and epoch >= cfg.crop_from and (epoch - cfg.crop_from) % cfg.crop_every == 0:
            boxes.locate(model, data[0], here)                                              # §3.2
        I = boxes.boxes[batches.ids(step)] if epoch >= cfg.crop_from else None              # (B, 4)
        view1, view2 = views(batches[step][0], cfg, I)
        with autocast(here.device, cfg.amp):
            losses = net(view1, view2)
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, peak)
        optimizer.step()
        optimizer.zero_grad()
        m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2             # MoCo v3's, up to 1
        get_ema_multi_avg_fn(m)([*model.M_E.parameters(), *model.M_P.parameters()],         # §3.3
                                [*model.encoder.parameters(), *model.P.parameters()], None)

        step += 1
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        run.save(step, data, test, model=model, optimizer=optimizer, boxes=boxes)
    return run.finish()


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("cmae", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
