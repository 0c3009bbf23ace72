"""Multi-View MAE: Seungbin Ji, Sangkwon Han and Jongtae Rhee, "Multi-View Masked Autoencoder for General Image
Representation", Applied Sciences 13(22), 12413, 2023, doi:10.3390/app132212413.

Two crops of an image are masked by 80 % and restored by one masked autoencoder. The latents of what is visible are
contrasted: those of one image attract, those of different images repel each other. Masking is the strong augmentation
that the contrast needs, so the views are cropped and flipped, and nothing else.

Symbols of the paper → here
    I_i           an image of the batch                      images
    x_1^+, x_2^+  the target views                           view1, view2 (B, 3, H, W); both in x (2B, 3, H, W)
    h(·), x'_i    patchifying and masking, what they make    Encoder.patch_embed, random_mask; mask (2B, N): 1 = masked
    x_i^v, x_i^m  visible and masked patches of view i       visible (2B, V): ids of the visible ones; the others
    x_pos         positional embeddings                      pos_embed
    f(·), g(·)    encoder, decoder                           encoder, decoder
    z_i           latent of view i                           z (2B, 1 + V, D), class token first
    z_i, Eq. 4    the vector that is contrasted              z1, z2 (B, D), of all processes
    y_i           the restored view                          y (2B, N, P), as patches
    N             batch size                                 B; here N is the number of patches
    λ, τ          weight of L_c, temperature                 lam, tau
    L_r, L_c, L   the losses                                 L_r, L_c, "loss"

Equations → here
    1, 2, 7       lines of MVMAE.forward
    3             reconstruction_loss
    4, 5, 6       nt_xent_loss

Where this file departs from the paper. "Most of the settings followed the MAE" (§4.1.1): so does what is left open.
    Left open                             Here                                              Flag
    which vector of the latent's many     the mean of the visible patches' tokens; no       --pool cls
      tokens Eq. 4 contrasts                projection head, for none is named
    class token                           there is one                                      -
    width and heads of the decoder        512 and 16                                        --decoder-dim
                                                                                            --decoder-heads
    pixels as they are, or normalised     as they are, for so Eq. 3 reads; only ImageNet's  --norm-pixels
      patch by patch (MAE's better row)     mean and deviation of each channel are taken
                                            out, as from all images here
    learning rate 1.5e-4: MAE's, for 256  MAE's: lr · batch / 256. Table 6 has batch 512:   --lr
      images, or the rate itself            --lr 0.75e-4 there is the other reading
    weight decay                          0.05                                              --wd
    the crops                             0.2 to 1 of the area, aspect 3/4 to 4/3; of the   --crop-min
                                            central square that images are stored as, at
                                            most --img a side, not of the whole image
    "w/o two different targets", Table 6  one target view, masked twice                     --targets same
    "Baseline [23]", Table 6              MAE's form with this file's settings: one view,   --targets one --lam 0
                                            masked once; MAE's own ratio and depth besides    --mask 0.75
                                                                                              --decoder-depth 8
    §4.1.2, §4.1.3: evaluation            eval_finetune.py, eval_linear.py, for all methods -
    Printed otherwise
    Eq. 3: a sum over whole views' pixels mean over pixels ("mean squared error", §3.2.1)   --pixels all
                                            of the masked patches, which the decoder
                                            "predicts" (Figure 3), and over the 2B views
    Eq. 4's text: "the denominator        the numerator does; in the denominator are the    -
      computes … a positive pair"           positive and the 2(N - 1) negatives: k ≠ i
    Eq. 6: pairs (2k - 1, 2k)             (i, i + B): all first views, then all second      -
    Figure 7: the decoder takes x_i^m     it takes mask tokens, as §3.1.4's text says       -
    τ: 0.07, "the default setting of"     0.07, which is MoCo's; SimCLR's is 0.1            --tau
      SimCLR
    §4.2.1: with λ = 0 it is MAE          not alone: two views remain, and Table 6 has      --targets one
                                            either row
    Table 5: 79.25, 79.64, 80.03 for 80 %, in one run they would be one number; what the    -
      λ = 2, depth 4                        other settings were is not said: here the final
    Figure 2: "following" [27], rollout   attention from the class token, last block alone  -

    python mvmae.py                                          the paper's settings, on CIFAR-10 at 224 pixels
    python mvmae.py --data PATH --epochs 200                 your images, or ImageNet-1K as for Table 5
    python mvmae.py --targets one --lam 0 --mask 0.75 --decoder-depth 8        MAE
    python mvmae.py --tiny --data shapes                     a first look on a laptop
    python eval_linear.py runs/mvmae-DATE-TIME               kNN and linear probe of what came out
    python show.py runs/mvmae-DATE-TIME                      reconstructions and attention, as in Figures 8 and 2

Measured: --tiny, 6 epochs of CIFAR-10 (JPEG) on one CPU core: kNN 54.2 %, linear probe 53.3 % (untrained 33.6, 43.6;
MAE in the same time 44.0, 54.8). At the paper's size one view costs 0.33 of what it would with all patches visible.
The paper's configuration is not measured yet. Commands and the rest: RESULTS.md.
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

from common import (Batches, Run, autocast, check, check_config, cosine_lr, launch, load_images, normalize,
                    param_groups, random_hflip, random_resized_crop, seed_step, start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.8  # share of the patches that is masked, Table 5
    lam: float = 2.0  # λ, weight of the contrast, Table 5; 0 leaves it out
    tau: float = 0.07  # τ, temperature, §3.2.2
    targets: Literal["two", "same", "one"] = "two"  # target views: two, one masked twice (Table 6), one (MAE)
    pool: Literal["mean", "cls"] = "mean"  # the vector of Eq. 4: mean of the patches' tokens or class token; ours
    pixels: Literal["masked", "all"] = "masked"  # Eq. 3 over the masked patches (ours: MAE's) or over all
    norm_pixels: bool = False  # restore each patch at mean 0, deviation 1; ours: off, as Eq. 3 reads
    crop_min: float = 0.2  # smallest crop, share of the area; ours: MAE's
    # model
    img: int = 224  # side of the views in pixels, §4.1.1
    patch: int = 16  # side of a patch in pixels, §4.1.1
    dim: int = 768  # width D, §4.1.1
    depth: int = 12  # blocks, §4.1.1
    heads: int = 12  # heads K, §4.1.1: ViT-Base's
    decoder_depth: int = 4  # blocks of the decoder, Table 5
    decoder_dim: int = 512  # width of the decoder; ours: MAE's
    decoder_heads: int = 16  # heads of the decoder; ours: MAE's
    # optimisation
    epochs: int = 1600  # passes over the data, §4.1.1
    batch: int = 256  # images per step and per process; §4.1.1: in all
    lr: float = 1.5e-4  # base learning rate, for a batch of 256, §4.1.1
    wd: float = 0.05  # weight decay; ours: MAE's
    warmup: int = 40  # epochs of linear warm-up, §4.1.1
    # run
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; ours: §4.1 has ImageNet-1K
    root: str = "data"  # where data sets are downloaded to and decoded; ours
    out: str = ""  # folder of the run, new or empty; ours: runs/mvmae-DATE-TIME
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
        check(0 <= self.lam < math.inf, "--lam", self.lam, "must not be negative")
        check(self.lam == 0 or self.targets != "one", "--targets", self.targets, "has no pair to contrast: add --lam 0")
        check(self.lam == 0 or self.batch >= 2, "--batch", self.batch, "must be at least 2, or there are no negatives")
        check(0 < self.tau < math.inf, "--tau", self.tau, "must be above 0")
        check(0 < self.crop_min <= 1, "--crop-min", self.crop_min, "must lie between 0 and 1")
        check(self.decoder_depth >= 1, "--decoder-depth", self.decoder_depth, "must be at least 1")
        check(self.decoder_heads >= 1, "--decoder-heads", self.decoder_heads, "must be at least 1")
        check(self.decoder_dim > 0 and self.decoder_dim % (4 * self.decoder_heads) == 0, "--decoder-dim",
              self.decoder_dim, f"must be a multiple of 4 times --decoder-heads {self.decoder_heads}")


TINY = Config(img=32, patch=4, dim=192, depth=4, heads=3, decoder_depth=2, decoder_dim=96, decoder_heads=3, epochs=16,
              batch=128, lr=1e-3, warmup=1, knn_every=1, tiny=True)


# Transformer. B batch, N patches, V visible ones, D width, K heads, P = 3·p·p numbers of a patch, p pixels a side
# (--patch). 2B is B with --targets one; width is the decoder's.

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


# Masking, §3.1.2

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


# Model, §3.1.3 and §3.1.4

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


class MVMAE(nn.Module):
    """One autoencoder for both views, and the loss (Figures 3 and 4). `forward` is §3.1.2 to §3.2."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.grid = cfg, cfg.img // cfg.patch
        self.V = self.grid ** 2 - round(cfg.mask * self.grid ** 2)
        self.encoder = Encoder(cfg, cfg.pool)                                               # f
        blocks = [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
        self.decoder = Decoder(cfg.dim, self.grid, 3 * cfg.patch ** 2, cfg.decoder_dim, blocks)  # g
        self.restored = ("reconstruction\n(each patch given its\ntrue mean and contrast)" if cfg.norm_pixels else
                         "reconstruction")  # its label in pictures

    def forward(self, view1, view2):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 7, "reconstruction": Eq. 3, "contrast": Eq. 6, if λ > 0}."""
        cfg = self.cfg
        x = torch.cat([view1, view2]) if cfg.targets != "one" else view1                    # (2B, 3, H, W)
        mask = random_mask(len(x), self.grid, cfg.mask, x.device).flatten(1)                # §3.1.2  (2B, N)
        visible = visible_first(mask)[:, :self.V]                                           # Eq. 1   (2B, V)
        z = self.encoder(x, visible)                                                        # Eq. 2   (2B, 1 + V, D)
        y = self.decoder(z, visible)                                                        # §3.1.4  (2B, N, P)

        target = patchify(x, cfg.patch)                                                     # (2B, N, P)
        target = normalize_patches(target) if cfg.norm_pixels else target
        L_r = reconstruction_loss(y, target, mask if cfg.pixels == "masked" else torch.ones_like(mask))  # Eq. 3
        if cfg.lam == 0:
            return {"loss": L_r, "reconstruction": L_r}

        z1, z2 = map(gather, self.encoder.vector(z).chunk(2))                               # (world·B, D)
        L_c = nt_xent_loss(z1, z2, cfg.tau)                                                 # Eq. 4 to 6
        return {"loss": L_r + cfg.lam * L_c, "reconstruction": L_r, "contrast": L_c}        # Eq. 7

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        Visible patches that the loss leaves out (--pixels masked) are shown as they are. With --norm-pixels each
        patch gets its true mean and deviation back.
        """
        cfg, patches = self.cfg, patchify(x, self.cfg.patch)                                # (B, N, P)
        mask = random_mask(len(x), self.grid, cfg.mask, x.device).flatten(1)                # (B, N)
        visible = visible_first(mask)[:, :self.V]                                           # (B, V)
        y = self.decoder(self.encoder(x, visible), visible).float()                         # (B, N, P)
        if cfg.norm_pixels:
            y = y * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)
        shown = torch.where(mask[:, :, None], y, patches) if cfg.pixels == "masked" else y
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), cfg.patch), unpatchify(shown, cfg.patch)


# Loss, §3.2

def normalize_patches(patches):
    """Each patch of (B, N, P) to mean 0 and standard deviation 1, as in MAE."""
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is 1; 0 where none is. Eq. 3."""
    error = (pred.float() - target.float()).square().mean(2)                                # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def nt_xent_loss(z1, z2, tau):
    """NT-Xent of the pairs z1[i], z2[i] (B, any width), mean over all 2B ordered pairs. Eq. 4 to 6."""
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)                                 # (2B, width)
        logits = z @ z.mT / tau                                                             # Eq. 5, by τ (2B, 2B)
        logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)  # k ≠ i
        partner = torch.arange(len(z), device=z.device).roll(len(z1))                       # j of i: i ± B
        return F.cross_entropy(logits, partner)                                             # Eq. 4, Eq. 6


# Views, §3.1.1

def views(images, cfg):
    """uint8 images (B, 3, S, S) → target views, normalised (B, 3, img, img): the same twice unless --targets two."""
    def target():
        return normalize(random_hflip(random_resized_crop(images, cfg.img, (cfg.crop_min, 1.0))))
    view1 = target()
    return view1, (target() if cfg.targets == "two" else view1)


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data = load_images(cfg.data, "train", cfg.img, cfg.root, cfg.workers, cfg.seed)
    test = load_images(cfg.data, "test", cfg.img, cfg.root, cfg.workers, cfg.seed)
    batches = Batches(data, cfg.batch, cfg.seed, here)

    torch.manual_seed(cfg.seed)
    model = MVMAE(cfg).to(here.device)
    net = DistributedDataParallel(model) if here.world > 1 else model
    net = torch.compile(net) if cfg.compile else net
    peak = cfg.lr * cfg.batch * here.world / 256                                            # MAE's rule
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, betas=(0.9, 0.95), fused=True)  # §4.1.1
    steps, warmup = cfg.epochs * len(batches), cfg.warmup * len(batches)

    run = Run("mvmae", cfg, here, len(batches))
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

        step += 1
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        run.save(step, data, test, model=model, optimizer=optimizer)
    return run.finish()


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("mvmae", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
