"""MACRL, reconstructed from the abstract: Yuchong Yao, Nandakishor Desai and Marimuthu
Palaniswami, "Masked Contrastive Representation Learning", arXiv 2211.06012, 2022.

Two views of an image go through a siamese network with an encoder and a decoder in each branch.
Branch s has a higher mask ratio and stronger augmentation. Branch w has weaker corruptions. A
contrastive loss compares the encoder's features of the two branches, and both decoders reconstruct
their crops.

One training step on B images of N patches (V_s or V_w visible, P values each). D: token width.
    c_s, c_w = two crops, often smaller in s      # "stronger data augmentation"     (B, 3, 32, 32)
    x_s, x_w = augment(c_s), augment(c_w)         # colour changes, more in s        (B, 3, 32, 32)
    z_s = f(25 % of the patches of x_s)           # "higher mask ratio"              (B, 1 + V_s, D)
    z_w = f(50 % of the patches of x_w)           # "weaker data corruptions"        (B, 1 + V_w, D)
    q, k = g(patch mean of z_s), g(same of z_w)   # "features from the encoder"      (B, 128)
    L_c = InfoNCE(q, k)                           # "contrastive learning objective" a scalar
    y_s, y_w = d_s(z_s), d_w(z_w)                 # "the decoders' outputs"          (B, N, P)
    L_s, L_w = L1 of y and c, masked patches only # "L_1 reconstruction loss"        two scalars
    step of AdamW on λ_c·L_c + λ_r·(L_s + L_w)/2

The abstract gives no formula and no number. These choices are ours and may change the result: how
keys and negatives are made, mask ratios, augmentations, targets, the projector g, weights, sizes.
A third party's summary names a projector and a memory bank; --keys momentum --bank 4096 adds a
bank. papers/macrl.md lists every choice.

    python macrl.py                              our defaults, on CIFAR-10
    python macrl.py --tiny --data shapes         a first look on a laptop
    python eval_linear.py runs/macrl-DATE-TIME   accuracy; eval_finetune.py: fine-tuned

On an NVIDIA H200: 3,131 images/s. With --tiny --images 5000 --epochs 1 --no-amp on CIFAR-10 (JPEG)
the loss is 5.843 in step 1 and 4.463 on average in the last 19; papers/macrl.md has the command.
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

from augment import (color_jitter, gaussian_blur, normalize, random_grayscale, random_hflip,
                     random_resized_crop)
from common import (Batches, Run, RunConfig, autocast, load_data, load_encoder, require,
                    run_program, seed_step, start_processes)


@dataclass
class Config(RunConfig):
    """Hyper-parameters. Each is a command-line flag. The abstract gives none; "ours" marks our
    own choices."""
    mask: float = 0.75  # fraction of the patches masked in branch s; MAE's
    mask_w: float = 0.5  # fraction of the patches masked in branch w, at most --mask; ours
    lam_c: float = 1.0  # λ_c, weight of the contrastive loss, 0 turns it off; ours
    lam_r: float = 1.0  # λ_r, weight of the reconstruction loss, 0 turns it off; ours
    tau: float = 0.2  # τ, temperature; MoCo v2's
    keys: Literal["shared", "momentum"] = "shared"  # made by f and g (ours) or by their averages
    momentum: float = 0.99  # momentum of the averages f_ξ and g_ξ, rises to 1; MoCo v3's
    bank: int = 0  # M, keys of earlier steps used as extra negatives; ours
    pool: Literal["mean", "cls"] = "mean"  # features: mean of patch tokens, or class token; ours
    restore: Literal["clean", "view"] = "clean"  # target: clean crop, or augmented view; ours
    pixels: Literal["masked", "all"] = "masked"  # patches in the L1 loss; MAE's: masked
    norm_pixels: bool = False  # normalise target patches, MAE's variant
    crop_min_s: float = 0.2  # smallest crop of branch s, fraction of the area; MoCo v2's
    crop_min_w: float = 0.5  # smallest crop of branch w; ours
    jitter_s: float = 0.8  # probability of colour jitter in branch s; MoCo v2's
    jitter_w: float = 0.4  # probability of colour jitter in branch w; ours
    gray_s: float = 0.2  # probability of greyscale in branch s; MoCo v2's
    gray_w: float = 0.0  # probability of greyscale in branch w; ours
    blur_s: float = 0.0  # probability of blur in branch s; SimCLR's for CIFAR-10
    blur_w: float = 0.0  # probability of blur in branch w; SimCLR's for CIFAR-10
    img: int = 32  # side of the views in pixels; CIFAR-10's
    patch: int = 4  # side of a patch in pixels; ours
    dim: int = 384  # width D; ViT-Small's
    depth: int = 12  # blocks; ViT-Small's
    heads: int = 6  # heads K; ViT-Small's
    hidden: int = 2048  # hidden width of the projector; MoCo v2's
    out_dim: int = 128  # width of queries and keys; MoCo v2's
    decoder_depth: int = 4  # blocks of each decoder; ours
    decoder_dim: int = 192  # width of the decoders; ours
    decoder_heads: int = 6  # heads of the decoders; ours
    epochs: float = 300  # passes over the data; ours
    batch: int = 256  # images per step and process; ours
    lr: float = 1e-3  # base learning rate, for a batch of 256; ours
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 40.0  # epochs of linear warm-up; MAE's

    def __post_init__(self):
        super().__post_init__()
        N = (self.img // self.patch) ** 2
        require(self.img % self.patch == 0, f"--patch {self.patch} must divide --img {self.img}")
        require(0 < round(self.mask * N) < N,
                f"--mask {self.mask} must leave some of {N} patches masked and some visible")
        require(self.mask_w <= self.mask,
                f"--mask-w {self.mask_w} must be at most --mask {self.mask}")
        require(self.pixels == "all" or self.lam_r == 0 or round(self.mask_w * N) > 0,
                f"--mask-w {self.mask_w} masks none of {N} patches: add --pixels all")
        require(self.dim % (4 * self.heads) == 0,
                f"--dim {self.dim} must be a multiple of 4 times --heads {self.heads}")
        require(self.decoder_dim % (4 * self.decoder_heads) == 0, f"--decoder-dim "
                f"{self.decoder_dim} must be a multiple of 4 times --decoder-heads")
        require(self.hidden > 0 and self.out_dim > 0, "--hidden and --out-dim must be positive")
        require(self.warmup < self.epochs, f"--warmup {self.warmup} must be below --epochs")
        require(self.tau > 0, "--tau must be positive")
        require(self.lam_c + self.lam_r > 0, "--lam-c 0 and --lam-r 0 leave no loss")
        require(self.lam_c == 0 or self.batch > 1, "--batch 1 has no negatives; try --lam-c 0")
        require(0 < self.crop_min_s <= 1, "--crop-min-s must be above 0 and at most 1")
        require(0 < self.crop_min_w <= 1, "--crop-min-w must be above 0 and at most 1")
        require(max(self.momentum, self.jitter_s, self.jitter_w, self.gray_s, self.gray_w,
                    self.blur_s, self.blur_w) <= 1,
                "--momentum, --jitter-s/w, --gray-s/w and --blur-s/w must be at most 1")


TINY = Config(dim=192, depth=4, heads=3, hidden=384, out_dim=64, decoder_depth=2, decoder_dim=96,
              decoder_heads=3, epochs=8, batch=128, warmup=1.0, eval_every=1, tiny=True)


# The abstract. B: images. N: patches of an image. V: visible patches, V_s or V_w. P = 3·p·p:
# values of a patch of p×p pixels. H = W = img. out: width of a key. M: keys in the bank. Encoder,
# Decoder and other parts are at the end of the file. In small functions B is any batch size.

def views(images, cfg):
    """Views x_s and x_w of the two branches, and the clean crops c_s and c_w they come from.

    images: uint8 (B, 3, S, S) or an Images batch. A clean crop is a random resized crop, flipped
    with probability 1/2. Colour jitter, greyscale and blur turn it into a view. Returns
    x_s, x_w, c_s and c_w, normalised, (B, 3, img, img) each.
    """
    def crop(smallest):
        return random_hflip(random_resized_crop(images, cfg.img, (smallest, 1.0)))

    def augment(c, jitter, gray, blur):
        return gaussian_blur(random_grayscale(color_jitter(c, p=jitter), gray), blur)

    c_s, c_w = crop(cfg.crop_min_s), crop(cfg.crop_min_w)                       # in [0, 1]
    x_s = augment(c_s, cfg.jitter_s, cfg.gray_s, cfg.blur_s)    # "stronger data augmentation"
    x_w = augment(c_w, cfg.jitter_w, cfg.gray_w, cfg.blur_w)    # "weaker data corruptions"
    return normalize(torch.stack([x_s, x_w, c_s, c_w])).unbind()


def random_mask(B, N, ratio, device=None):
    """Which of N patches are masked: bool (B, N), round(ratio·N) of them in each row."""
    return torch.rand(B, N, device=device).argsort(1) < round(ratio * N)


def visible_first(mask):
    """Ids (B, N) of the patches in order, visible ones before masked ones."""
    return mask.int().argsort(dim=1, stable=True)


def take(x, ids):
    """The tokens `ids` (B, V) of x (B, N, D): (B, V, D)."""
    return x.take_along_dim(ids[:, :, None], 1)


class MACRL(nn.Module):
    """The siamese network, "encoder-decoder structure in both branches", and its losses."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.N = (cfg.img // cfg.patch) ** 2
        self.V_s = self.N - round(cfg.mask * self.N)
        self.V_w = self.N - round(cfg.mask_w * self.N)
        self.encoder = Encoder(cfg.img, cfg.patch, cfg.dim, cfg.depth, cfg.heads, cfg.pool)  # f

        def decoder():
            blocks = [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
            return Decoder(cfg.img, cfg.patch, cfg.dim, cfg.decoder_dim, blocks)
        self.decoder_s, self.decoder_w = decoder(), decoder()                   # d_s, d_w
        self.g = mlp(cfg.dim, cfg.hidden, cfg.out_dim).apply(init_weights)  # projector
        if cfg.keys == "momentum":
            self.f_xi = copy.deepcopy(self.encoder).requires_grad_(False)       # f_ξ, average of f
            self.g_xi = copy.deepcopy(self.g).requires_grad_(False)             # g_ξ, average of g
        self.register_buffer("bank", torch.randn(cfg.bank, cfg.out_dim))        # memory bank
        self.g.requires_grad_(cfg.lam_c > 0)            # parts without a loss are frozen
        self.decoder_s.requires_grad_(cfg.lam_r > 0)
        self.decoder_w.requires_grad_(cfg.lam_r > 0)

    def forward(self, x_s, x_w, c_s=None, c_w=None, mask_s=None, mask_w=None):
        """Views x and clean crops c of both branches, normalised (B, 3, H, W) → {"loss",
        "contrast": L_c, "reconstruction": L_r, "reconstruction s": L_s, "reconstruction w": L_w},
        without terms of weight 0. c None: the target is the view. mask (B, N): True is masked;
        None: random. The keys enter the bank."""
        cfg, loss, terms = self.cfg, 0, {}
        if mask_s is None:                                  # "higher mask ratio"
            mask_s = random_mask(len(x_s), self.N, cfg.mask, x_s.device)
        if mask_w is None:                                  # "weaker data corruptions"
            mask_w = random_mask(len(x_w), self.N, cfg.mask_w, x_w.device)
        ids_s = visible_first(mask_s)[:, :self.V_s]                             # (B, V_s)
        ids_w = visible_first(mask_w)[:, :self.V_w]                             # (B, V_w)
        z_s = self.encoder(x_s, ids_s)                 # "siamese network", (B, 1 + V_s, D)
        z_w = self.encoder(x_w, ids_w)                                          # (B, 1 + V_w, D)

        if cfg.lam_c > 0:                   # "learned features from the encoder in both branches"
            q = self.g(self.encoder.vector(z_s))                                # (B, out)
            if cfg.keys == "shared":
                k = self.g(self.encoder.vector(z_w))                            # (B, out)
            else:
                with torch.no_grad():
                    k = self.g_xi(self.f_xi.vector(self.f_xi(x_w, ids_w)))      # (B, out)
            q, k = gather(q), gather(k)                                         # (world·B, out)
            L_c = info_nce_loss(q, k, self.bank, cfg.tau)   # "contrastive learning objective"
            self.bank = torch.cat([self.bank, k.detach().float()])[len(k):]     # the last M keys
            terms["contrast"] = L_c
            loss = loss + cfg.lam_c * L_c

        if cfg.lam_r > 0:
            y_s, y_w = self.decoder_s(z_s, ids_s), self.decoder_w(z_w, ids_w)   # (B, N, P) each
            L_s = self.l1(y_s, x_s, c_s, mask_s)            # "L_1 reconstruction loss"
            L_w = self.l1(y_w, x_w, c_w, mask_w)
            L_r = (L_s + L_w) / 2                           # "the decoders' outputs"
            terms |= {"reconstruction": L_r, "reconstruction s": L_s, "reconstruction w": L_w}
            loss = loss + cfg.lam_r * L_r
        return {"loss": loss, **terms}      # "leverages the effectiveness of both"

    def l1(self, y, x, c, mask):
        """The L1 loss of predicted patches y (B, N, P) with mask (B, N). The target is the clean
        crop c, or the view x with --restore view or without c."""
        target = x if c is None or self.cfg.restore == "view" else c            # (B, 3, H, W)
        target = patchify(target, self.cfg.patch)                               # (B, N, P)
        target = normalize_patches(target) if self.cfg.norm_pixels else target
        counted = mask if self.cfg.pixels == "masked" else torch.ones_like(mask)
        return reconstruction_loss(y, target, counted)

    @torch.no_grad()
    def reconstruct(self, x, branch="s"):
        """Normalised images (B, 3, H, W) → (masked input, prediction) of a branch, both normalised
        images.

        With --norm-pixels each predicted patch gets its true mean and std. Visible patches
        are shown as they are, or as predicted with --pixels all.
        """
        cfg, patches = self.cfg, patchify(x, self.cfg.patch)                    # (B, N, P)
        ratio, V, decoder = {"s": (cfg.mask, self.V_s, self.decoder_s),
                             "w": (cfg.mask_w, self.V_w, self.decoder_w)}[branch]
        mask = random_mask(len(x), self.N, ratio, x.device)                     # (B, N)
        visible_ids = visible_first(mask)[:, :V]                                # (B, V)
        y = decoder(self.encoder(x, visible_ids), visible_ids).float()          # (B, N, P)
        y = denormalize_patches(y, patches) if cfg.norm_pixels else y
        if cfg.pixels == "masked":
            y = torch.where(mask[:, :, None], y, patches)
        masked = patches.masked_fill(mask[:, :, None], 0)
        return unpatchify(masked, cfg.patch), unpatchify(y, cfg.patch)


Model = MACRL


def info_nce_loss(q, k, bank, tau):
    """InfoNCE of queries q (B, out), mean over the queries. The positive of q[i] is k[i]. Its
    negatives are the other rows of k (B, out) and all rows of bank (M, out)."""
    with torch.autocast(q.device.type, enabled=False):
        q = F.normalize(q.float(), dim=1)                                       # (B, out)
        keys = F.normalize(torch.cat([k.float(), bank]), dim=1)                 # (B + M, out)
        return F.cross_entropy(q @ keys.mT / tau, torch.arange(len(q), device=q.device))


def reconstruction_loss(pred, target, mask):
    """Mean absolute error of (B, N, P) over the patches where mask (B, N) is True."""
    error = (pred.float() - target.float()).abs().mean(2)                       # (B, N)
    return (error * mask).sum() / mask.sum()


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
    model = MACRL(cfg).to(device)
    if cfg.init:
        load_encoder(model.encoder, cfg.init)
        if cfg.keys == "momentum":
            load_encoder(model.f_xi, cfg.init)
    net = DistributedDataParallel(model) if world > 1 else model
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), betas=(0.9, 0.95), fused=True)

    run = Run(__file__, cfg, batches, steps, model=model, optimizer=optimizer)
    for step in range(run.start, steps):
        seed_step(cfg.seed, step, rank)                           # exact resume
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, cfg.lr * cfg.batch * world / 256)

        x_s, x_w, c_s, c_w = views(batches[step], cfg)
        with autocast(device, cfg.amp):
            losses = net(x_s, x_w, c_s, c_w)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if cfg.keys == "momentum":
            m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2  # rises to 1
            ema(model.f_xi, model.encoder, m)
            ema(model.g_xi, model.g, m)

        run.log(step, losses)
        if run.epoch_done(step):                                  # or the last step, or Ctrl-C
            run.save(step)
            run.evaluate(train_set, test_set)                     # kNN, effective rank
            run.draw(test_set or train_set)                       # curves, reconstruction
        if run.interrupted:
            break
    return run.finish()


# Parts. K heads, each d = D/K wide.

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


class Encoder(nn.Module):
    """A ViT with class token. Its state dict is timm's. An image's vector is the mean of its patch
    tokens (pool "mean") or the class token ("cls")."""
    def __init__(self, img, patch, dim, depth, heads, pool="mean"):
        super().__init__()
        self.pool = pool
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = F.pad(sincos_pos_embed(dim, img // patch), (0, 0, 1, 0))
        self.register_buffer("pos_embed", positions)                # 0 for the class token
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x, visible_ids=None):
        """Images (B, 3, H, W) → (B, 1 + V, D), class token first. visible_ids (B, V): the patches
        that are encoded; None: all N."""
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[:, 1:]           # (B, N, D)
        x = x if visible_ids is None else take(x, visible_ids)                  # (B, V, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)            # (B, 1 + V, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def vector(self, z):
        """One vector (B, D) for the tokens (B, 1 + V, D) of an image."""
        return z[:, 1:].float().mean(1) if self.pool == "mean" else z[:, 0].float()

    def tokens(self, x):
        """Patch tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)[:, 1:]

    def features(self, x):
        """One vector for each whole image, (B, 3, H, W) → (B, D)."""
        return self.vector(self(x))


class Decoder(nn.Module):
    """Class token and the tokens of the visible patches (B, 1 + V, D), with their visible_ids
    (B, V) → all patches (B, N, P). blocks: modules (B, 1 + N, width) → (B, 1 + N, width)."""
    def __init__(self, img, patch, dim, width, blocks):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = F.pad(sincos_pos_embed(width, img // patch), (0, 0, 1, 0))
        self.register_buffer("pos_embed", positions)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, 3 * patch ** 2)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, z, visible_ids):
        """(B, 1 + V, D), (B, V) → (B, N, P)"""
        cls, tokens = self.embed(z).split([1, visible_ids.shape[1]], 1)
        N = self.pos_embed.shape[1] - 1
        x = self.mask_token.to(tokens.dtype).expand(len(z), N, -1)              # (B, N, width)
        x = x.scatter(1, visible_ids[:, :, None].expand_as(tokens), tokens)
        x = torch.cat([cls, x], 1) + self.pos_embed                             # (B, 1 + N, width)
        return self.pred(self.norm(self.blocks(x)))[:, 1:]                      # (B, N, P)


def main(argv=None):
    """The command line."""
    run_program(__file__, __doc__, Config, TINY, train, argv)


if __name__ == "__main__":
    main()
