"""MCLim: Feng Xin and Li Xinwei, "The contrastive learning algorithm based on masked image
modeling", Academic Journal of Computing & Information Science 7(5), 2024,
doi:10.25236/AJCIS.2024.070513.

One branch sees a view with most patches masked and reconstructs it. The other branch sees another
view, unmasked. One projection T serves both tasks: PixelShuffle turns its outputs into an image,
and their mean over the tokens enters the decoupled contrastive loss (DCL, Yeh et al., arXiv
2110.06848), which is InfoNCE without the positive pair in the denominator.

One training step on B images of N patches, D the width of a token, P values a patch:
    view1, view2 = crop(images), colour(crop(images))             # §2.1      (B, 3, 224, 224)
    mask = 60 % of the patches, at random                         # §2.2      (B, N)
    tokens1 = F1(view1, a learnable vector in masked patches)     # Eq. 1     (B, N, D)
    Z1 = T1(tokens1)                                              # Eq. 3     (B, N, P)
    L1 = MSE(PixelShuffle(Z1), normalised patches of view1)       # Eq. 4, 6  masked patches only
    Z2 = T2(F2(view2)), no gradient                               # Eq. 2, 5  (B, N, P)
    L2 = DCL(Z1.mean(1), Z2.mean(1))                              # Eq. 8, 9  a scalar
    step of AdamW on λ·L1 + L2                                    # Eq. 10
    F2, T2 ← m·(F2, T2) + (1 - m)·(F1, T1)                        # --target momentum, inferred

The paper leaves these choices open, and they may change the result: --target (inferred: with λ = 0
MCLim "degenerates to the MOCO V3 algorithm", §3.2.3), --momentum, --lr, --tau, --norm-pixels,
--pool, --lam (Eq. 6: mean or sum) and evaluation, probably fine-tuning. papers/mclim.md has all.

    python mclim.py --epochs 100 --batch 16         the paper's run; H200: 682 images/s
    python mclim.py --tiny --data shapes            a first look on a laptop
    python eval_finetune.py runs/mclim-DATE-TIME    accuracy

With --tiny --images 5000 --epochs 1 --no-amp on CIFAR-10 (JPEG), the last logged loss is 5.932.
"""
import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.swin_transformer import SwinTransformer

from augment import color_jitter, gaussian_blur, normalize, random_grayscale, random_resized_crop
from common import (Batches, Run, RunConfig, autocast, load_data, load_encoder, require,
                    run_program, seed_step, start_processes)


@dataclass
class Config(RunConfig):
    """Hyper-parameters of the paper. Each is a command-line flag."""
    mask: float = 0.6  # fraction of the mask blocks that are masked, §3.2
    lam: float = 1.0  # λ, weight of L₁, Table 5's best; 0 leaves L₁ out
    tau: float = 0.2  # τ, temperature; the paper gives none, this is MoCo v3's
    contrast: Literal["dcl", "infonce", "none"] = "dcl"  # L₂: Eq. 9, Eq. 7, or no branch 2
    pixels: Literal["masked", "all"] = "masked"  # L₁ counts masked patches or all, Table 4
    norm_pixels: bool = True  # §2.5's "normalized pixels": normalise each patch, as in MAE
    pool: Literal["all", "visible"] = "all"  # tokens that are averaged for z1
    target: Literal["momentum", "shared", "separate"] = "momentum"  # how branch 2 gets its weights
    momentum: float = 0.99  # start value for --target momentum, rises to 1; MoCo v3's
    crop_min: float = 0.65  # smallest crop, fraction of the area, §2.1
    crop_max: float = 0.9  # largest crop, fraction of the area, §2.1
    jitter: float = 0.8  # probability of colour jitter in view 2, Table 2
    gray: float = 0.2  # probability of greyscale in view 2, Table 2
    blur: float = 0.0  # probability of blur in view 2; 0.8 in Table 2's last row
    backbone: Literal["vit", "swin", "hivit"] = "vit"  # encoder, Table 1
    img: int = 224  # side of the views in pixels; ViT's
    patch: int = 16  # side of a patch in pixels, from Table 1's 43.12 M
    dim: int = 768  # ViT's width D, Table 1's 43.12 M; Swin starts at dim/6, HiViT ends at 2·dim/3
    depth: int = 6  # blocks of the ViT or of Swin's stage 3, Table 1; HiViT's stage 3 has 4 more
    heads: int = 12  # heads K of the ViT; ViT-Base's
    freeze_patch: bool = True  # keep the initial weights of the patch embedding, §2.3
    head: Literal["linear", "mlp", "vit"] = "mlp"  # projection layer T, Table 3
    hidden: float = 4.0  # hidden width of T's MLP divided by D; as in a transformer block
    epochs: float = 100  # passes over the data, §3.2
    batch: int = 16  # images per step and process, §3.2
    lr: float = 1e-3  # base learning rate, for a batch of 256; the paper gives none
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 10.0  # epochs of linear warm-up; SimMIM's

    def __post_init__(self):
        super().__post_init__()
        block = self.patch if self.backbone == "vit" else 2 * self.patch
        require(self.img % block == 0,
                f"--img {self.img} must be a multiple of the mask block, {block} pixels")
        N_b = (self.img // block) ** 2
        require(0 < round(self.mask * N_b) < N_b or self.mask == self.lam == 0,
                f"--mask {self.mask} must leave some of {N_b} blocks masked and some visible, or "
                "be 0 with --lam 0")
        require(self.contrast == "none" or self.batch > 1,
                "--batch 1 has no negatives; try --contrast none")
        require(self.contrast != "none" or self.lam > 0, "--contrast none needs --lam above 0")
        require(self.tau > 0 and self.hidden > 0, "--tau and --hidden must be positive")
        require(max(self.momentum, self.jitter, self.gray, self.blur) <= 1,
                "--momentum, --jitter, --gray and --blur must be at most 1")
        require(0 < self.crop_min <= self.crop_max <= 1,
                "--crop-min must be above 0 and at most --crop-max, which is at most 1")
        require(self.warmup < self.epochs, f"--warmup {self.warmup} must be below --epochs")
        if self.backbone == "vit":
            require(self.dim % (4 * self.heads) == 0,
                    f"--dim {self.dim} must be a multiple of 4 times --heads {self.heads}")
        else:
            require(self.dim % 192 == 0 and self.patch % 4 == 0, f"--backbone {self.backbone} "
                    "needs --dim a multiple of 192 and --patch a multiple of 4")


TINY = Config(img=32, patch=4, dim=192, depth=4, heads=3, epochs=8, batch=128, warmup=1.0,
              eval_every=1, tiny=True)


# The paper, §2. B: images. N: tokens of an image. Each token covers s×s pixels: s is patch, in
# Swin 2·patch. P = 3·s·s: values of these pixels. N_b: mask blocks of an image. A block covers one
# token, in HiViT four. H = W = img. Encoders and other parts: end of the file.

def views(images, cfg):
    """Two crops of each image, the second with changed colours. §2.1

    images: uint8 (B, 3, S, S) or an Images batch. Returns view1 and view2, normalised,
    (B, 3, img, img).
    """
    scale = cfg.crop_min, cfg.crop_max
    view1 = random_resized_crop(images, cfg.img, scale)
    view2 = random_resized_crop(images, cfg.img, scale)
    view2 = color_jitter(view2, p=cfg.jitter)
    view2 = random_grayscale(view2, cfg.gray)
    view2 = gaussian_blur(view2, cfg.blur)
    return normalize(view1), normalize(view2)


def random_mask(B, N, ratio, device=None):
    """Which of N patches are masked: bool (B, N), round(ratio·N) of them in each row."""
    return torch.rand(B, N, device=device).argsort(1) < round(ratio * N)


def repeat_blocks(mask, grid):
    """Expands a mask of blocks (B, N_b) to grid×grid patches, (B, grid·grid). §2.2"""
    side = math.isqrt(mask.shape[1])
    mask = mask.unflatten(1, (side, side))
    return mask.repeat_interleave(grid // side, 1).repeat_interleave(grid // side, 2).flatten(1)


class MCLim(nn.Module):
    """The two branches of §2. F₁ is `encoder`, which is kept after training. F₂ is `F2`."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        block = cfg.patch if cfg.backbone == "vit" else 2 * cfg.patch           # §3.2
        self.N_b = (cfg.img // block) ** 2
        self.encoder = self.make_encoder()
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.embed_dim))     # p of Eq. 1
        nn.init.normal_(self.mask_token, std=0.02)
        self.mask_token.requires_grad_(cfg.mask > 0)  # unused if nothing is masked
        self.T1 = self.make_head()
        if cfg.contrast != "none":
            if cfg.target == "momentum":
                self.F2 = copy.deepcopy(self.encoder).requires_grad_(False)
                self.T2 = copy.deepcopy(self.T1).requires_grad_(False)
            elif cfg.target == "shared":
                self.F2, self.T2 = self.encoder, self.T1
            else:
                self.F2, self.T2 = self.make_encoder(), self.make_head()

    def make_encoder(self):
        """An encoder of Table 1. §2.3 freezes its patch embedding."""
        cfg = self.cfg
        if cfg.backbone == "vit":
            encoder = Encoder(cfg.img, cfg.patch, cfg.dim, cfg.depth, cfg.heads)
        elif cfg.backbone == "swin":
            encoder = SwinEncoder(cfg.img, cfg.patch, cfg.dim // 6, cfg.depth)
        else:
            encoder = HiViTEncoder(cfg.img, cfg.patch, 2 * cfg.dim // 3, cfg.depth + 4)
        encoder.patch_embed.requires_grad_(not cfg.freeze_patch)
        return encoder

    def make_head(self):
        """A projection layer of Table 3, (B, N, D) → (B, N, P)."""
        cfg, D, P = self.cfg, self.encoder.dim, 3 * self.encoder.stride ** 2
        if cfg.head == "linear":
            head = nn.Linear(D, P)
        elif cfg.head == "mlp":
            head = mlp(D, round(cfg.hidden * D), P)
        else:
            heads = cfg.heads if cfg.backbone == "vit" else D // 64
            head = nn.Sequential(Block(D, heads), nn.Linear(D, P))
        return head.apply(init_weights)

    def forward(self, view1, view2, mask=None):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 10, "reconstruction": Eq. 6, "contrast":
        Eq. 9 or 7}. λ = 0 and --contrast none drop their term. mask (B, N_b): True is masked;
        None: random."""
        cfg, s = self.cfg, self.encoder.stride
        losses, L1, L2 = {}, 0, 0
        if mask is None:
            mask = random_mask(len(view1), self.N_b, cfg.mask, view1.device)    # §2.2, (B, N_b)
        masked = repeat_blocks(mask, cfg.img // s)                              # (B, N)
        tokens1 = self.encoder(view1, mask, self.mask_token)                    # Eq. 1, (B, N, D)
        Z1 = self.T1(tokens1)                                                   # Eq. 3, (B, N, P)
        if cfg.lam > 0:
            y = unpatchify(Z1, s)                                         # Eq. 4, (B, 3, H, W)
            x = patchify(view1, s)                                              # (B, N, P)
            x = normalize_patches(x) if cfg.norm_pixels else x                  # §2.5
            counted = masked if cfg.pixels == "masked" else torch.ones_like(masked)
            L1 = reconstruction_loss(patchify(y, s), x, counted)                # Eq. 6
            losses["reconstruction"] = L1  # Table 4's "prediction loss" unless --pixels all
        if cfg.contrast != "none":
            tokens2 = self.F2(view2)                                            # Eq. 2, (B, N, D)
            Z2 = self.T2(tokens2)                                               # Eq. 5, (B, N, P)
            z1 = mean_where(Z1, ~masked) if cfg.pool == "visible" else Z1.float().mean(1)
            z1, z2 = gather(z1), gather(Z2.float().mean(1))                     # (world·B, P)
            contrastive_loss = dcl_loss if cfg.contrast == "dcl" else info_nce_loss
            L2 = contrastive_loss(z1, z2, cfg.tau)                              # Eq. 9 or 7
            losses["contrast"] = L2
        return {"loss": cfg.lam * L1 + L2, **losses}                            # Eq. 10

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        With --norm-pixels each predicted patch gets its true mean and std. Visible patches
        are shown as they are, or as predicted with --pixels all.
        """
        s, patches = self.encoder.stride, patchify(x, self.encoder.stride)      # (B, N, P)
        mask = random_mask(len(x), self.N_b, self.cfg.mask, x.device)           # (B, N_b)
        masked = repeat_blocks(mask, self.cfg.img // s)[:, :, None]             # (B, N, 1)
        y = self.T1(self.encoder(x, mask, self.mask_token)).float()             # (B, N, P)
        y = denormalize_patches(y, patches) if self.cfg.norm_pixels else y
        if self.cfg.pixels == "masked":
            y = torch.where(masked, y, patches)
        return unpatchify(patches.masked_fill(masked, 0), s), unpatchify(y, s)


Model = MCLim


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is True. Eq. 6"""
    error = (pred.float() - target.float()).square().mean(2)                    # (B, N)
    return (error * mask).sum() / mask.sum()


def pair_terms(z1, z2, tau):
    """Returns <z_i^1, z_i^2>/τ and log U_{i,k} of Eq. 8 for the pairs z1[i], z2[i] (B, P), both
    float32 (2B): the first B rows are k = 1, the others k = 2."""
    with torch.autocast(z1.device.type, enabled=False):
        B = len(z1)
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)                     # (2B, P)
        logits = z @ z.mT / tau                                                 # (2B, 2B)
        positive = logits.diagonal(B).repeat(2)                                 # (2B)
        same = torch.eye(B, dtype=torch.bool, device=z.device).repeat(2, 2)     # j = i, both l
        return positive, logits.masked_fill(same, -torch.inf).logsumexp(1)      # Eq. 8


def info_nce_loss(z1, z2, tau):
    """InfoNCE of the pairs z1[i], z2[i] (B, P): mean over i and both branches k. Eq. 7"""
    positive, log_U = pair_terms(z1, z2, tau)
    return (torch.logaddexp(positive, log_U) - positive).mean()                 # Eq. 7


def dcl_loss(z1, z2, tau):
    """Decoupled contrastive loss of the pairs z1[i], z2[i] (B, P): mean over i and both branches
    k. Eq. 9"""
    positive, log_U = pair_terms(z1, z2, tau)
    return (-positive + log_U).mean()                                           # Eq. 9


def cosine_lr(step, steps, warmup, peak):
    """Learning rate of step 0 … steps - 1: linear to `peak` in `warmup` steps, then a half cosine
    to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def param_groups(model, wd):
    """AdamW's groups: vectors and names with "token" or "pos" have no weight decay."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim < 2 or "token" in name or "pos" in name else decayed).append(p)
    return [{"params": decayed, "weight_decay": wd}, {"params": plain, "weight_decay": 0.0}]


def train(cfg):
    """Pre-trains as `cfg` says. Returns the run folder."""
    device, rank, world = start_processes(cfg.device)
    train_set, test_set = load_data(cfg)
    batches = Batches(train_set, cfg.batch, cfg.seed, device, rank, world)
    steps, warmup = max(1, round(cfg.epochs * len(batches))), round(cfg.warmup * len(batches))

    torch.manual_seed(cfg.seed)
    model = MCLim(cfg).to(device)
    if cfg.init:
        load_encoder(model.encoder, cfg.init)
        if cfg.contrast != "none":
            load_encoder(model.F2, cfg.init)
    net = DistributedDataParallel(model) if world > 1 else model
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), fused=True)

    run = Run(__file__, cfg, batches, steps, model=model, optimizer=optimizer)
    for step in range(run.start, steps):
        seed_step(cfg.seed, step, rank)                           # exact resume
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, cfg.lr * cfg.batch * world / 256)

        view1, view2 = views(batches[step], cfg)
        with autocast(device, cfg.amp):
            losses = net(view1, view2)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if cfg.contrast != "none" and cfg.target == "momentum":
            m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2  # rises to 1
            ema(model.F2, model.encoder, m)
            ema(model.T2, model.T1, m)

        run.log(step, losses)
        if run.epoch_done(step):                                  # or the last step, or Ctrl-C
            run.save(step)
            run.evaluate(train_set, test_set)                     # kNN, effective rank
            run.draw(test_set or train_set)                       # curves, reconstruction
        if run.interrupted:
            break
    return run.finish()


# Parts. K heads, each d = D/K wide. (B, h, w, C): maps of h×w tokens, each C wide.

@torch.no_grad()
def ema(average, model, m):
    """average ← m·average + (1 - m)·model, weight by weight, for two networks of the same shape."""
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - m)


def gather(z):
    """(B, D) → (world·B, D), the rows of all processes. The gradient of this process's rows is
    multiplied by world, because DistributedDataParallel averages gradients. Valid only if every
    process computes the same loss of all rows."""
    if not dist.is_initialized():
        return z
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = [torch.empty_like(z) for _ in range(world)]
    dist.all_gather(rows, z.detach().contiguous())
    rows[rank] = z.detach() + world * (z - z.detach())
    return torch.cat(rows)


def mean_where(x, chosen):
    """Mean of the tokens x (B, N, P) where chosen (B, N) is True: float32 (B, P)."""
    return (x.float() * chosen[:, :, None]).sum(1) / chosen.sum(1, keepdim=True)


def patchify(x, p):
    """Images (B, 3, H, W) → patches (B, N, P), P = 3·p·p ordered (channel, row, column)."""
    return F.pixel_unshuffle(x, p).flatten(2).mT


def unpatchify(x, p):
    """Patches (B, N, P) of a square image → (B, 3, H, W)."""
    return F.pixel_shuffle(x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1)), p)


def normalize_patches(patches):
    """Scales each patch of (B, N, P) to mean 0 and std 1, as in MAE."""
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


def denormalize_patches(pred, patches):
    """Gives normalised predictions (B, N, P) the mean and std of the true `patches`."""
    return pred * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)


def sincos_pos_embed(dim, grid):
    """Fixed sine-cosine positions of grid×grid patches, (1, N, D), as in MAE: the first half of D
    encodes the column, the second the row."""
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid)[:, None] * omega                                 # (grid, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], 1).float()                     # (grid, D/2)
    rows, columns = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat([columns, rows], 2).reshape(1, grid * grid, dim)


def init_weights(module):
    """Xavier-uniform weights and zero biases, as in MAE."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view: it fills the weight
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp(dim, hidden, out):
    """Two layers with GELU between; parts named as in timm."""
    fc1, fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)
    return nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))


def attend(q, k, v):
    """softmax(q·kᵀ/√d)·v of each head, (B, K, N, d) → (B, K, N, d). In float32 on CPUs, where the
    backward of attention in bfloat16 is several times slower."""
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
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))                     # (B, N, 3, K, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, K, N, d) each
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


# The three encoders of Table 1. MCLim reads their `stride` (an output token covers stride×stride
# pixels), `dim` (width of an output token) and `embed_dim` (width of a patch embedding and of
# mask_token). mask_token replaces the patch embeddings where mask (B, N_b) is True.

class Encoder(nn.Module):
    """A ViT without class token. Its state dict loads into timm's ViT with class_token=False,
    global_pool="avg", fc_norm=False."""
    def __init__(self, img, patch, dim, depth, heads):
        super().__init__()
        self.stride, self.dim, self.embed_dim = patch, dim, dim
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.register_buffer("pos_embed", sincos_pos_embed(dim, img // patch))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)

    def forward(self, x, mask=None, mask_token=None):
        """Images (B, 3, H, W) → (B, N, D). mask (B, N), mask_token (D)."""
        x = self.patch_embed(x).flatten(2).mT                                   # (B, N, D)
        if mask is not None:
            x = torch.where(mask[:, :, None], mask_token, x)                    # §2.2
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def tokens(self, x):
        """Patch tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)

    def features(self, x):
        """One vector for each whole image, (B, 3, H, W) → (B, D)."""
        return self(x).float().mean(1)


class SwinEncoder(nn.Module):
    """torchvision's Swin [2, 2, depth, 2] with 7×7 windows and a first stage of `width`. It embeds
    patches of patch/4 pixels. An output token covers 2·patch × 2·patch pixels."""
    def __init__(self, img, patch, width, depth):
        super().__init__()
        swin = SwinTransformer([patch // 4] * 2, width, [2, 2, depth, 2],
                               [width // 32 * 2 ** i for i in range(4)], [7, 7],
                               stochastic_depth_prob=0.0)  # features must not be random
        self.stride, self.dim, self.embed_dim = 2 * patch, 8 * width, width
        self.grid = 4 * img // patch
        self.patch_embed, _, self.patch_norm = swin.features[0]
        self.stages, self.norm = swin.features[1:], swin.norm
        self.patch_embed.apply(init_weights)

    def forward(self, x, mask=None, mask_token=None):
        """Images (B, 3, H, W) → (B, N, D). mask (B, N_b), mask_token (C), C = D/8."""
        # Autocast on a CPU would leave this norm in bfloat16.
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1).float())    # (B, h, w, C)
        if mask is not None:
            masked = repeat_blocks(mask, self.grid).view(*x.shape[:3], 1)
            x = torch.where(masked, mask_token, x)                              # §2.2
        return self.norm(self.stages(x)).flatten(1, 2)

    def tokens(self, x):
        """Tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)

    def features(self, x):
        """One vector for each whole image, (B, 3, H, W) → (B, D)."""
        return self(x).float().mean(1)


class RelativeAttention(nn.Module):
    """Attention with a learned bias for each relative position of two patches, as in Swin."""
    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias = nn.Parameter(torch.zeros((2 * grid - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        y, x = (a.flatten()[:, None] - a.flatten() + grid - 1 for a in (y, x))  # (N, N) each
        self.register_buffer("offset", y * (2 * grid - 1) + x, persistent=False)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))                     # (B, N, 3, K, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, K, N, d) each
        bias = self.relative_position_bias[self.offset].permute(2, 0, 1)        # (K, N, N)
        if x.device.type == "cpu":  # in float32, as in attend
            with torch.autocast("cpu", enabled=False):
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias)
        else:
            x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype).contiguous())
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
    """A Block without attention: it processes each token separately."""
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden, dim)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Merge(nn.Module):
    """Merges 2×2 tokens into one of twice the width, (B, h, w, C) → (B, h/2, w/2, 2C)."""
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)  # (B, h/2, w/2, 2, 2, C)
        return self.reduction(self.norm(x.flatten(3)))


class HiViTEncoder(nn.Module):
    """HiViT [2, 2, depth], arXiv 2205.14949. It embeds patches of patch/4 pixels, applies MLPs,
    merges tokens twice and ends with a ViT of width dim. An output token covers patch×patch
    pixels."""
    def __init__(self, img, patch, dim, depth):
        super().__init__()
        grid = img // patch
        self.stride, self.dim, self.embed_dim, self.grid = patch, dim, dim // 4, 4 * grid
        self.patch_embed = nn.Conv2d(3, dim // 4, patch // 4, patch // 4)
        self.patch_norm = nn.LayerNorm(dim // 4, eps=1e-6)
        stage1 = [MlpBlock(dim // 4, 3 * dim // 4) for _ in range(4)]  # 2 blocks of 2 MLPs
        stage2 = [MlpBlock(dim // 2, 3 * dim // 2) for _ in range(4)]
        self.stem = nn.Sequential(*stage1, Merge(dim // 4), *stage2, Merge(dim // 2))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, dim))
        self.blocks = nn.ModuleList(RelativeBlock(dim, dim // 64, grid) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x, mask=None, mask_token=None):
        """Images (B, 3, H, W) → (B, N, D). mask (B, N_b), mask_token (C), C = D/4."""
        # Autocast on a CPU would leave this norm in bfloat16.
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1).float())    # (B, h, w, C)
        if mask is not None:
            masked = repeat_blocks(mask, self.grid).view(*x.shape[:3], 1)
            x = torch.where(masked, mask_token, x)                              # §2.2
        x = self.stem(x).flatten(1, 2) + self.pos_embed                         # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def tokens(self, x):
        """Tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)

    def features(self, x):
        """One vector for each whole image, (B, 3, H, W) → (B, D)."""
        return self(x).float().mean(1)


def main(argv=None):
    """The command line."""
    run_program(__file__, __doc__, Config, TINY, train, argv)


if __name__ == "__main__":
    main()
