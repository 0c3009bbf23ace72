"""MCLim: Feng Xin and Li Xinwei, "The contrastive learning algorithm based on masked image modeling", Academic Journal
of Computing & Information Science 7(5), 2024, doi:10.25236/AJCIS.2024.070513.

One branch sees a view of an image with most patches masked and reconstructs it; a second branch, with the same weights
(a choice made here), sees another view, unmasked. One projection T serves both tasks: its outputs, rearranged, are the
reconstructed pixels, and their mean over the tokens (also a choice) is contrasted. The contrastive loss leaves the
positive pair out of its denominator (DCL), so that it depends less on large batches.

One training step on B images of N patches, D the width of a token, P the number of pixel values that a token restores:
    view1, view2 = crop(images), augment_colour(crop(images))     # §2.1      (B, 3, 224, 224)
    mask = 60 % of the patches, drawn at random                   # §2.2      (B, N)
    tokens1 = F1(view1, its masked patches replaced by a vector)  # Eq. 1     (B, N, D)
    Z1 = T1(tokens1)                                              # Eq. 3     (B, N, P)
    L1 = MSE(PixelShuffle(Z1), view1 with each patch normalised)  # Eq. 4, 6  a number, of the masked patches
    Z2 = T2(F2(view2)), where F2 = F1 and T2 = T1                 # Eq. 2, 5  (B, N, P); it has a gradient, too
    L2 = DCL(Z1.mean(1), Z2.mean(1))                              # Eq. 8, 9  a number, of vectors (B, P)
    step of AdamW on λ·L1 + L2 for F1, T1 and the vector          # Eq. 10    F1's patch embedding is frozen, §2.3

What the paper does not say, and what may change the result: whether branch 2 is branch 1 itself (our small runs chose
this) or, as in MoCo v3, an average of its weights over time (--target momentum, how slow: --momentum); the base rate
(--lr; nearly seven times MAE's); the temperature (--tau); what "normalized pixels" are (--norm-pixels); which tokens
make z1 (--pool); whether Eq. 6 averages over a patch's P values, as here, or sums them (--lam 768 for the ViT); and
whether "accuracy" is that of a fine-tuned network (probably) or of a linear probe.

    python mclim.py --epochs 100 --batch 16                  the paper's experiment, for a GPU
    python mclim.py --tiny --data shapes                     a first look on a laptop
    python eval_finetune.py runs/mclim-DATE-TIME             accuracy, fine-tuned; then eval_linear.py, show.py
Measured: --tiny, CIFAR-10 (JPEG), steps 381 to 390 (epoch 1): loss 3.519, reconstruction 0.848, contrast 2.671.
Every other choice, symbol and misprint, and the paper's tables: papers/mclim.md.
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
from torchvision.models.swin_transformer import SwinTransformer

from common import (Batches, Run, autocast, check, check_above, check_config, check_least, check_share, color_jitter,
                    cosine_lr, gaussian_blur, init_encoders, launch, load_data, normalize, param_groups,
                    random_grayscale, random_resized_crop, recompute, schedule, seed_step, start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.6  # share of the blocks that is masked, §3.2
    lam: float = 1.0  # λ, weight of L₁, Table 5's "prediction loss weight"; 0 leaves it out
    tau: float = 0.2  # τ, temperature; the paper gives no value, this is MoCo v3's
    contrast: Literal["dcl", "infonce", "none"] = "dcl"  # L₂: Eq. 9, Eq. 7, or no branch 2
    l1: Literal["pre", "rec"] = "pre"  # L₁ over masked patches (Table 4's "prediction") or all ("reconstruction")
    norm_pixels: bool = True  # "normalized pixels", §2.5: each patch at mean 0, deviation 1; no: view 1 as it is
    pool: Literal["all", "visible"] = "all"  # z1 is the mean over all tokens, or over visible ones alone
    target: Literal["shared", "momentum"] = "shared"  # branch 2 is branch 1 itself, or MoCo v3's average of its weights
    momentum: float = 0.99  # of --target momentum, rising to 1 by a cosine; MoCo v3's
    crop_min: float = 0.65  # smallest crop, share of the area, §2.1
    crop_max: float = 0.9  # largest crop, share of the area, §2.1
    jitter: float = 0.8  # probability of colour jitter in view 2, Table 2
    gray: float = 0.2  # probability of greyscale in view 2, Table 2
    blur: float = 0.0  # probability of blur in view 2; 0.8 is Table 2's last row
    # model
    backbone: Literal["vit", "swin", "hivit"] = "vit"  # encoder, Table 1
    img: int = 224  # side of the views in pixels; a choice made here, for CIFAR-10's own 32 is one mask block of §3.2
    patch: int = 16  # side of a patch in pixels, from Table 1's 43.12 M
    dim: int = 768  # width D of the ViT, from Table 1's 43.12 M; Swin begins dim/6 wide, HiViT ends 2/3 dim wide
    depth: int = 6  # blocks of the ViT, Table 1; of Swin's third stage; HiViT's third stage has 4 more
    heads: int = 12  # heads K of the ViT: ViT-Base's (Swin has 32 channels a head, HiViT 64)
    freeze_patch: bool = True  # the patch embedding keeps its initial weights, §2.3
    head: Literal["linear", "mlp", "vit"] = "mlp"  # projection layer T, Table 3
    hidden: float = 4.0  # hidden width of T's MLP, a multiple of D; 4 as in a transformer block
    # optimisation
    epochs: int = 100  # passes over the data, §3.2
    batch: int = 16  # images per step and per process, §3.2
    lr: float = 1e-3  # base learning rate, for a batch of 256; the paper gives none
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 10.0  # epochs of linear warm-up; SimMIM's
    steps: int = 0  # length of training and schedule in steps; 0: as --epochs says
    # run
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; §3.1
    images: int = 0  # train on only so many images, the same ones in every run; 0 for all
    store: int = 0  # side in pixels at which images are kept, squeezed to squares; 0 for 8/7 of --img
    root: str = "data"  # where data sets are downloaded to and decoded
    out: str = ""  # folder of the run, new or empty (default: runs/mclim-DATE-TIME)
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
        block = self.patch if self.backbone == "vit" else 2 * self.patch  # side of a mask block, §3.2
        check(self.img % block == 0, "--img", self.img, f"must be a multiple of the mask block, {block}")
        check_least(self, 0, "lam")
        blocks = (self.img // block) ** 2
        some = 0 < self.mask < 1 and 0 < round(self.mask * blocks) < blocks
        check(some or self.mask == self.lam == 0, "--mask", self.mask,
              f"must lie between 0 and 1 and leave some of {blocks} blocks masked and some visible (0 with --lam 0)")
        check(self.contrast == "none" or self.batch >= 2, "--batch", self.batch,
              "must be at least 2, or there are no negatives")
        check(self.contrast != "none" or self.lam > 0, "--lam", self.lam, "and --contrast none leave nothing to learn")
        check_share(self, "jitter gray blur momentum")
        check_above(self, 0, "tau hidden")
        check(0 < self.crop_min <= self.crop_max <= 1, "--crop-min", self.crop_min,
              f"must lie between 0 and --crop-max {self.crop_max}, which is at most 1")
        if self.backbone != "vit":
            check(self.dim % 192 == 0, "--dim", self.dim, f"must be a multiple of 192 for --backbone {self.backbone}")
            check(self.patch % 4 == 0, "--patch", self.patch, f"must be a multiple of 4 for --backbone {self.backbone}")


TINY = Config(img=32, patch=4, dim=192, depth=4, heads=3, epochs=8, batch=128, warmup=1.0, knn_every=1, tiny=True)


# The paper, §2. B images; N tokens; s×s pixels, a patch, that a token stands for and reconstructs (s = cfg.patch;
# twice that in Swin); D width of a token; P = 3·s·s values of a patch; N_b blocks of the mask (a block is one patch in
# the ViT and in Swin, four in HiViT); (world·B) are the images of all processes.

def views(images, cfg, aspect=None):
    """Two crops of each image, the second with its colours changed. §2.1

    images (B, 3, S, S), uint8 or 0…1; aspect (B,): their width over height before they were squeezed to squares, 1 if
    None. Returns view1 and view2, normalised, (B, 3, img, img).
    """
    scale = cfg.crop_min, cfg.crop_max
    view1 = random_resized_crop(images, cfg.img, scale, aspect=aspect)
    view2 = random_resized_crop(images, cfg.img, scale, aspect=aspect)
    view2 = color_jitter(view2, p=cfg.jitter)
    view2 = random_grayscale(view2, cfg.gray)
    view2 = gaussian_blur(view2, cfg.blur)
    return normalize(view1), normalize(view2)


def random_mask(B, N, ratio, device=None):
    """Which of N places are masked: bool (B, N), 1 = masked; equally many in each row, every place as likely."""
    order = torch.rand(B, N, device=device).argsort(1)  # a permutation of 0 … N - 1 in each row
    return order < round(ratio * N)  # true at exactly round(ratio·N) places of each row


def repeat_blocks(mask, grid):
    """The mask of blocks (B, N_b) as a mask of the image's grid×grid patches, (B, grid·grid): a patch is masked where
    its block is. §2.2"""
    side = math.isqrt(mask.shape[1])
    mask = mask.unflatten(1, (side, side))
    return mask.repeat_interleave(grid // side, 1).repeat_interleave(grid // side, 2).flatten(1)


class MCLim(nn.Module):
    """Both branches, §2: `encoder` (except its patch embedding), `T1` and `mask_token` are trained; `F2` and `T2`,
    branch 2's, are `encoder` and `T1` themselves, or with --target momentum averages of these."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = (Encoder(cfg) if cfg.backbone == "vit" else  # F₁ of the paper, the part that is kept
                        SwinEncoder(cfg) if cfg.backbone == "swin" else HiViTEncoder(cfg))
        self.encoder.patch_embed.requires_grad_(not cfg.freeze_patch)  # §2.3
        block = cfg.patch if cfg.backbone == "vit" else 2 * cfg.patch  # side of a mask block, §3.2
        self.N_b = (cfg.img // block) ** 2
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.embed_dim))  # p^u
        nn.init.normal_(self.mask_token, std=0.02)  # MAE's
        self.mask_token.requires_grad_(cfg.mask > 0)  # unused if nothing is masked
        D, P = self.encoder.dim, 3 * self.encoder.stride ** 2
        if cfg.head == "linear":  # Table 3
            self.T1 = nn.Linear(D, P)
        elif cfg.head == "mlp":
            self.T1 = mlp(D, round(cfg.hidden * D), P)
        else:
            heads = cfg.heads if cfg.backbone == "vit" else D // 64  # 64 channels a head, as ViT-Base has
            self.T1 = nn.Sequential(Block(D, heads), nn.Linear(D, P))
        self.T1.apply(init_weights)
        if cfg.contrast != "none":
            shared = cfg.target == "shared"
            self.F2 = self.encoder if shared else copy.deepcopy(self.encoder).requires_grad_(False)
            self.T2 = self.T1 if shared else copy.deepcopy(self.T1).requires_grad_(False)

    def forward(self, view1, view2):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 10, "reconstruction": Eq. 6, "contrast": Eq. 9 or 7}, without
        what λ = 0 or --contrast none leaves out."""
        cfg, s = self.cfg, self.encoder.stride  # a token stands for s×s pixels (not the paper's superscript s)
        losses, L1, L2 = {}, 0, 0  # what is left out stays 0
        block_mask = random_mask(len(view1), self.N_b, cfg.mask, view1.device)  # §2.2, (B, N_b)
        patch_mask = repeat_blocks(block_mask, view1.shape[2] // s)  # (B, N)
        tokens1 = self.encoder(view1, block_mask, self.mask_token)  # Eq. 1, (B, N, D)
        Z1 = self.T1(tokens1)  # Eq. 3, (B, N, P)
        if cfg.lam > 0:
            y = unpatchify(Z1, s)  # Eq. 4, PixelShuffle, (B, 3, H, W); Eq. 6 cuts it into patches again
            x = patchify(view1, s)  # (B, N, P)
            x = normalize_patches(x) if cfg.norm_pixels else x  # §2.5
            counted = patch_mask if cfg.l1 == "pre" else torch.ones_like(patch_mask)  # Table 4, (B, N)
            losses["reconstruction"] = L1 = reconstruction_loss(patchify(y, s), x, counted)  # Eq. 6
        if cfg.contrast != "none":
            tokens2 = self.F2(view2)  # Eq. 2, (B, N, D); with --target momentum no gradient enters F2 and T2
            Z2 = self.T2(tokens2)  # Eq. 5, (B, N, P)
            z1 = mean_where(Z1, ~patch_mask) if cfg.pool == "visible" else Z1.float().mean(1)  # (B, P)
            z1, z2 = gather(z1), gather(Z2.float().mean(1))  # (world·B, P)
            contrastive_loss = dcl_loss if cfg.contrast == "dcl" else info_nce_loss  # Eq. 9 or Eq. 7
            losses["contrast"] = L2 = contrastive_loss(z1, z2, cfg.tau)
        return {"loss": cfg.lam * L1 + L2, **losses}  # Eq. 10

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        With --norm-pixels each predicted patch gets its true mean and deviation back. Where the loss leaves out
        visible patches (--l1 pre), they are shown as they are.
        """
        s = self.encoder.stride
        block_mask = random_mask(len(x), self.N_b, self.cfg.mask, x.device)  # (B, N_b)
        patch_mask = repeat_blocks(block_mask, x.shape[2] // s)[:, :, None]  # (B, N, 1)
        pred = self.T1(self.encoder(x, block_mask, self.mask_token)).float()  # Z1, (B, N, P)
        patches = patchify(x, s)  # (B, N, P)
        pred = denormalize_patches(pred, patches) if self.cfg.norm_pixels else pred
        shown = torch.where(patch_mask, pred, patches) if self.cfg.l1 == "pre" else pred
        return unpatchify(patches.masked_fill(patch_mask, 0), s), unpatchify(shown, s)


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is 1; 0 if there is none. Eq. 6"""
    error = (pred.float() - target.float()).square().mean(2)  # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def info_nce_loss(z1, z2, tau):
    """InfoNCE of the pairs z1[i], z2[i], (B, any width) of all processes, mean over both views. Eq. 7, U of Eq. 8"""
    with torch.autocast(z1.device.type, enabled=False):
        B = len(z1)
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2B, width)
        logits = z @ z.mT / tau  # (2B, 2B)
        positive = logits.diagonal(B).repeat(2)  # <z_i^1, z_i^2>/τ, (2B)
        same = torch.eye(B, dtype=torch.bool, device=z.device).repeat(2, 2)  # j = i, in both views l
        log_U = logits.masked_fill(same, -torch.inf).logsumexp(1)  # Eq. 8, (2B): k = 1, then k = 2
        return (torch.logaddexp(positive, log_U) - positive).mean()  # Eq. 7


def dcl_loss(z1, z2, tau):
    """Decoupled contrastive loss of the pairs z1[i], z2[i], (B, any width) of all processes, mean over both views.
    Eq. 9, U of Eq. 8"""
    with torch.autocast(z1.device.type, enabled=False):
        B = len(z1)
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2B, width)
        logits = z @ z.mT / tau  # (2B, 2B)
        positive = logits.diagonal(B).repeat(2)  # <z_i^1, z_i^2>/τ, (2B)
        same = torch.eye(B, dtype=torch.bool, device=z.device).repeat(2, 2)  # j = i, in both views l
        log_U = logits.masked_fill(same, -torch.inf).logsumexp(1)  # Eq. 8, (2B): k = 1, then k = 2
        return (-positive + log_U).mean()  # Eq. 9


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data, test = load_data(cfg)
    batches = Batches(data, cfg.batch, cfg.seed, here)
    steps, warmup = schedule(cfg, len(batches))

    torch.manual_seed(cfg.seed)
    model = MCLim(cfg).to(here.device)
    init_encoders(model, cfg.init)
    if cfg.recompute:
        recompute(model)
    net = DistributedDataParallel(model, broadcast_buffers=False) if here.world > 1 else model  # buffers never differ
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net  # draws as the plain model does
    peak = cfg.lr * cfg.batch * here.world / 256  # §3.2
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, fused=True)  # §3.2

    run = Run("mclim", cfg, here, len(batches))
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
        if cfg.contrast != "none" and cfg.target == "momentum":
            m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2  # rises to 1, MoCo v3's way
            ema(model.F2, model.encoder, m)  # average ← m·average + (1 - m)·model
            ema(model.T2, model.T1, m)

        step += 1
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        run.save(step, data, test, model=model, optimizer=optimizer)
    return run.finish()


# Parts. K heads, each d = D/K wide; h, w, C: a map of tokens and its channels.

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


def mean_where(x, chosen):
    """Mean of the tokens (B, N, D) where chosen (B, N) is 1: float32 (B, D)."""
    return (x.float() * chosen[:, :, None]).sum(1) / chosen.sum(1, keepdim=True)


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


# The three encoders of Table 1 look alike from outside. What MCLim reads of them: `stride`, the side in pixels of what
# a token stands for; `dim`, a token's width; `embed_dim`, the width right behind `patch_embed`, which is mask_token's;
# `patch_embed`, what is frozen. `grid` is the number of places along a side where mask_token may stand.

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

    def forward(self, x, mask=None, mask_token=None):
        """Images (B, 3, H, W) → tokens (B, N, D); where mask (B, N) is 1, mask_token (D) replaces patches."""
        x = self.patch_embed(x).flatten(2).mT  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[:, :, None], mask_token.to(x.dtype), x)  # §2.2
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def tokens(self, x):
        """The tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)

    def features(self, x):
        """The mean of the tokens of whole images, (B, 3, H, W) → (B, D)."""
        return self(x).float().mean(1)


class SwinEncoder(nn.Module):
    """Swin [2, 2, depth, 2] with windows of 7, torchvision's: it begins with patches of p/4 pixels, and a token of the
    end stands for 2p×2p. Its attention, too, is torchvision's: under autocast it computes in bfloat16, on CPUs as
    well."""
    def __init__(self, cfg):
        super().__init__()
        width = cfg.dim // 6
        swin = SwinTransformer([cfg.patch // 4] * 2, width, [2, 2, cfg.depth, 2],
                               [width // 32 * 2 ** i for i in range(4)], [7, 7],
                               stochastic_depth_prob=0.0)  # none, as in the ViT: features must not be random
        self.stride, self.dim, self.embed_dim, self.grid = 2 * cfg.patch, 8 * width, width, 4 * cfg.img // cfg.patch
        self.patch_embed, _, self.patch_norm = swin.features[0]  # the middle part is the permute of forward
        self.stages, self.norm = swin.features[1:], swin.norm
        self.patch_embed.apply(init_weights)  # all other weights begin as torchvision's

    def forward(self, x, mask=None, mask_token=None):
        """Images (B, 3, H, W) → tokens (B, N, D); where mask (B, N_b) is 1, mask_token (C) replaces small patches."""
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1))  # (B, grid, grid, C), C = D/8
        if mask is not None:
            masked = repeat_blocks(mask, self.grid).unflatten(1, (self.grid, self.grid))  # (B, grid, grid)
            x = torch.where(masked[..., None], mask_token.to(x.dtype), x)  # §2.2
        return self.norm(self.stages(x)).flatten(1, 2)

    tokens, features = Encoder.tokens, Encoder.features  # of whole images, as the ViT's: (B, N, D) and (B, D)


class RelativeAttention(nn.Module):
    """Attention with a learned bias for every offset between two of grid×grid patches, as in Swin."""
    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias = nn.Parameter(torch.zeros((2 * grid - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        y, x = (a.flatten()[:, None] - a.flatten() + grid - 1 for a in (y, x))  # (N, N), 0 … 2·grid - 2
        self.register_buffer("offset", y * (2 * grid - 1) + x, persistent=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, K, N, d) each
        bias = self.relative_position_bias[self.offset].permute(2, 0, 1)  # (K, N, N)
        if x.device.type == "cpu":  # in float32, as in attend
            with torch.autocast("cpu", enabled=False):
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias)  # (B, K, N, d)
        else:
            x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype).contiguous())  # (B, K, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))


class RelativeBlock(nn.Module):
    """Block with RelativeAttention, (B, N, D) → (B, N, D)."""
    def __init__(self, dim, heads, grid):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelativeAttention(dim, heads, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, 4 * dim, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


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
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)  # (B, h/2, w/2, 4C)
        return self.reduction(self.norm(x))


class HiViTEncoder(nn.Module):
    """HiViT [2, 2, depth + 4] (arXiv 2205.14949): MLPs on small patches, merged twice, then a ViT. A token stands for
    p×p pixels."""
    def __init__(self, cfg):
        super().__init__()
        dim, grid = 2 * cfg.dim // 3, cfg.img // cfg.patch
        self.stride, self.dim, self.embed_dim, self.grid = cfg.patch, dim, dim // 4, 4 * grid
        self.patch_embed = nn.Conv2d(3, dim // 4, cfg.patch // 4, cfg.patch // 4)
        self.patch_norm = nn.LayerNorm(dim // 4, eps=1e-6)
        stage1, stage2 = ([MlpBlock(w, 3 * w) for _ in range(4)] for w in (dim // 4, dim // 2))  # two MLPs a block
        self.stem = nn.Sequential(*stage1, Merge(dim // 4), *stage2, Merge(dim // 2))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, dim))  # learned, besides the blocks' biases
        self.blocks = nn.ModuleList(RelativeBlock(dim, dim // 64, grid) for _ in range(cfg.depth + 4))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x, mask=None, mask_token=None):
        """Images (B, 3, H, W) → tokens (B, N, D); where mask (B, N_b) is 1, mask_token (C) replaces small patches."""
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1))  # (B, grid, grid, C), C = D/4
        if mask is not None:
            masked = repeat_blocks(mask, self.grid).unflatten(1, (self.grid, self.grid))  # (B, grid, grid)
            x = torch.where(masked[..., None], mask_token.to(x.dtype), x)  # §2.2
        x = self.stem(x).flatten(1, 2) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    tokens, features = Encoder.tokens, Encoder.features  # of whole images, as the ViT's: (B, N, D) and (B, D)


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("mclim", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
