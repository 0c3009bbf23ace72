"""CAMAE with IDM and PLB: He Zhu, Yang Chen, Guyue Hu and Shan Yu, "Information-density Masking
Strategy for Masked Image Modeling".

A contrastive loss compares an encoder with its momentum encoder. The same encoder reconstructs the
first view from a quarter of its patches. IDM masks the patches with the most attention in one head
of the last block. PLB draws heads with a high reconstruction loss more often.

One training step on B images of N patches with P values each, and K heads (the paper's M):
    view1, view2 = augment(images), augment(images)           # §III-A    (B, 3, 224, 224)
    z1, z2 = g(f(view1)), g(f(view2))                         # §III-A    (B, 256)
    z1', z2' = g_ξ(f_ξ(view1)), g_ξ(f_ξ(view2))               # §III-A    (B, 256), no gradient
    L_c = (InfoNCE(z1, z2') + InfoNCE(z2, z1')) / 2           # Eq. 1     both directions
    m = one of K heads, drawn with probabilities p            # Eq. 5     a scalar
    mask = the 75 % of patches with most attention in head m  # Eq. 3     (B, N)
    L^m = MSE(q(f(visible patches)), masked patches)          # Eq. 2     of view1
    step of AdamW on L_c + L^m                                # Eq. 6     for f, g and q
    f_ξ, g_ξ ← μ·(f_ξ, g_ξ) + (1 - μ)·(f, g)                  # Figure 1  μ: --momentum
    after an epoch: p ← 0.01·p + 0.99·softmax(ℓ / 0.2)        # Eq. 4     ℓ: mean L^m by head

The paper leaves some choices open that may change the result. --plb-loss is the scale of L^m in
Eq. 4. The text calls L^m a mean, which makes p mildly uneven (largest of 3 heads: 0.36 to 0.58 in
small runs), but Table II and §IV-C suggest more. Eq. 2 is a sum, which gives one head nearly all of
p. Others: --predictor, --momentum, --freeze-patch, --norm-pixels, --lr. See papers/camae.md.

    torchrun --nproc-per-node 8 camae.py --data PATH --recompute   the paper's run on ImageNet
    python camae.py --tiny --data shapes                           a first look on a laptop
    python eval_linear.py runs/camae-DATE-TIME                     accuracy
On an NVIDIA H200: 809 images/s, 98 GB. --tiny --images 2500 --epochs 1 --no-amp --log-every 1 on
CIFAR-10 (JPEG) and one thread: loss 6.931 in step 1 and 5.388 in the last.
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
from torch.utils.checkpoint import checkpoint

from augment import (color_jitter, gaussian_blur, normalize, random_grayscale, random_hflip,
                     random_resized_crop)
from common import (Batches, Run, RunConfig, autocast, load_data, load_encoder, require,
                    run_program, seed_step, start_processes)


@dataclass
class Config(RunConfig):
    """Hyper-parameters of the paper. Each is a command-line flag."""
    mask: float = 0.75  # fraction of patches masked, §III-C
    mask_by: Literal["random", "idm", "plb"] = "plb"  # Table II; idm draws heads uniformly
    contrast: bool = True  # Eq. 1; Table I's MAE: --no-contrast --mask-by random or idm
    mim: bool = True  # Eq. 2; --no-mim --predictor --freeze-patch: MoCo v3's loss
    tau: float = 0.2  # τ, temperature, §IV-A
    lam: float = 0.99  # λ, weight of the new estimate of p, Eq. 4
    eps: float = 0.2  # ε, temperature of the heads' losses, Eq. 4
    plb_loss: Literal["mean", "sum"] = "mean"  # reduction of L^m in Eq. 4 over masked pixels
    momentum: float = 0.99  # μ of f_ξ, g_ξ, rises to 1; MoCo v3's [10]; DINO [7] has 0.996
    crop_min: float = 0.08  # smallest crop, fraction of the area; MoCo v3's
    jitter: float = 0.8  # probability of colour jitter; MoCo v3's
    gray: float = 0.2  # probability of greyscale; MoCo v3's
    blur: float = 0.5  # probability of blur in each view; SimCLR's
    norm_pixels: bool = False  # normalise each target patch of Eq. 2, MAE's variant
    img: int = 224  # side of the views in pixels, §IV-A
    patch: int = 16  # side of a patch in pixels, §IV-A
    dim: int = 768  # width D, §IV-A
    depth: int = 12  # blocks; ViT-B's, §IV-A
    heads: int = 12  # heads K, the paper's M; ViT-B's, §IV-A
    freeze_patch: bool = False  # the patch embedding is not trained; MoCo v3's
    predictor: bool = False  # MoCo v3's MLP after g_θ; Eq. 1 has none
    hidden: int = 4096  # hidden width of projector and predictor; MoCo v3's
    out_dim: int = 256  # width of z, §IV-A
    decoder_depth: int = 8  # blocks of the decoder; MAE's
    decoder_dim: int = 512  # width of the decoder; MAE's
    decoder_heads: int = 16  # heads of the decoder; MAE's
    epochs: float = 400  # passes over the data, §IV-A
    batch: int = 512  # images per step and process, §IV-A: 4096 on eight GPUs
    lr: float = 1.5e-4  # base learning rate, for a batch of 256; MAE's and MoCo v3's
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 40.0  # epochs of linear warm-up; MAE's and MoCo v3's
    recompute: bool = False  # activation checkpointing of the encoder: less memory

    def __post_init__(self):
        super().__post_init__()
        N = (self.img // self.patch) ** 2
        require(self.contrast or self.mim, "--no-contrast --no-mim leave nothing to learn")
        require(self.img % self.patch == 0, f"--patch {self.patch} must divide --img {self.img}")
        require(0 < round(self.mask * N) < N,
                f"--mask {self.mask} must leave some of {N} patches masked and some visible")
        require(self.dim % (4 * self.heads) == 0,
                f"--dim {self.dim} must be a multiple of 4 times --heads {self.heads}")
        require(self.decoder_dim % (4 * self.decoder_heads) == 0, f"--decoder-dim "
                f"{self.decoder_dim} must be a multiple of 4 times --decoder-heads")
        require(self.warmup < self.epochs, f"--warmup {self.warmup} must be below --epochs")
        require(not self.contrast or self.batch > 1,
                "--batch 1 has no negatives; try --no-contrast")
        require(self.tau > 0 and self.eps > 0, "--tau and --eps must be positive")
        require(self.hidden > 0 and self.out_dim > 0, "--hidden and --out-dim must be positive")
        require(max(self.lam, self.momentum, self.jitter, self.gray, self.blur) <= 1,
                "--lam, --momentum, --jitter, --gray and --blur must be at most 1")
        require(0 < self.crop_min <= 1, "--crop-min must be above 0 and at most 1")


# The learning rate is higher than the default because the training is short.
TINY = Config(crop_min=0.2, blur=0.0, img=32, patch=4, dim=192, depth=4, heads=3, hidden=768,
              out_dim=64, decoder_depth=2, decoder_dim=96, decoder_heads=3, epochs=8, batch=128,
              lr=1e-3, warmup=1.0, eval_every=1, tiny=True)


# The paper, §III. B: images. N: patches of an image. V: visible patches. P = 3·patch²: values of a
# patch. K: heads (the paper's M). H = W = img. Encoder, Decoder and other parts are at the end of
# the file. In small functions B is any batch size.

def views(images, cfg):
    """Two augmented views x_i and x'_i of each image. §III-A

    images: uint8 (B, 3, S, S) or an Images batch. Returns view1 and view2, normalised,
    (B, 3, img, img). With --no-contrast view2 is view1.
    """
    def augment():
        x = random_resized_crop(images, cfg.img, (cfg.crop_min, 1.0))
        x = random_hflip(x)
        x = color_jitter(x, p=cfg.jitter)
        x = random_grayscale(x, cfg.gray)
        return normalize(gaussian_blur(x, cfg.blur))
    view1 = augment()
    return view1, (augment() if cfg.contrast else view1)


def random_mask(B, N, ratio, device=None):
    """Which of N patches are masked: bool (B, N), round(ratio·N) of them in each row."""
    return torch.rand(B, N, device=device).argsort(1) < round(ratio * N)


def idm_mask(attention, ratio):
    """Masks the patches with the most attention: (B, N) → bool (B, N), round(ratio·N) of them in
    each row. Eq. 3"""
    rank = attention.argsort(1, descending=True).argsort(1)                     # 0: most attention
    return rank < round(ratio * attention.shape[1])


def visible_first(mask):
    """Ids (B, N) of the patches in order, visible ones before masked ones."""
    return mask.int().argsort(dim=1, stable=True)


def take(x, ids):
    """The tokens `ids` (B, V) of x (B, N, D): (B, V, D)."""
    return x.take_along_dim(ids[:, :, None], 1)


class CAMAE(nn.Module):
    """Contrastive learning and reconstruction with one encoder, §III and Figure 1. Parts that
    --no-contrast or --no-mim disables are frozen."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.N = (cfg.img // cfg.patch) ** 2
        self.V = self.N - round(cfg.mask * self.N)
        self.encoder = Encoder(cfg.img, cfg.patch, cfg.dim, cfg.depth, cfg.heads,     # f_θ
                               recompute=cfg.recompute)
        self.encoder.patch_embed.requires_grad_(not cfg.freeze_patch)
        blocks = [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
        self.decoder = Decoder(cfg.img, cfg.patch, cfg.dim, cfg.decoder_dim, blocks)  # q_θ
        self.decoder.requires_grad_(cfg.mim)
        self.projector = moco_mlp(cfg.dim, cfg.hidden, cfg.hidden, cfg.out_dim)       # g_θ, §IV-A
        self.projector.requires_grad_(cfg.contrast)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)     # f_ξ
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)  # g_ξ
        self.predictor = nn.Identity()                                                # Eq. 1
        if cfg.predictor:                                                             # MoCo v3
            self.predictor = moco_mlp(cfg.out_dim, cfg.hidden, cfg.out_dim)
            self.predictor.requires_grad_(cfg.contrast)

    def forward(self, view1, view2, m=None, mask=None):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 6, "contrast": Eq. 1, "reconstruction":
        Eq. 2}. --no-contrast and --no-mim remove a term.

        m (1,): head of Eq. 3; None: random. mask (B, N): True is masked; None: set by --mask-by.
        """
        cfg, losses, last_block_input = self.cfg, {}, None
        if cfg.contrast:
            tokens1, last_block_input = self.encoder(view1, return_last_block_input=True)
            h1, h2 = self.encoder.vector(tokens1), self.encoder.features(view2)   # h_i, (B, D)
            # Gathering before the projector replaces synchronised BatchNorm.
            z1, z2 = self.projector(gather(h1)), self.projector(gather(h2))   # z_i, (world·B, 256)
            z1, z2 = self.predictor(z1), self.predictor(z2)                   # no-op by default
            with torch.no_grad():                                             # sg of Figure 1
                h1_xi = self.momentum_encoder.features(view1)                 # h'_i, (B, D)
                h2_xi = self.momentum_encoder.features(view2)
                z1_xi = self.momentum_projector(gather(h1_xi))                # z'_i, (world·B, 256)
                z2_xi = self.momentum_projector(gather(h2_xi))
            losses["contrast"] = (info_nce_loss(z1, z2_xi, cfg.tau)           # Eq. 1, symmetric
                                  + info_nce_loss(z2, z1_xi, cfg.tau)) / 2
        if cfg.mim:
            if mask is None:
                mask = self.draw_mask(view1, m, last_block_input)             # Eq. 3, (B, N)
            y, target = self.decode(view1, mask), patchify(view1, cfg.patch)  # x̃ and x, (B, N, P)
            target = normalize_patches(target) if cfg.norm_pixels else target
            losses["reconstruction"] = reconstruction_loss(y, target, mask)   # Eq. 2
        return {"loss": sum(losses.values()), **losses}                       # Eq. 6

    @torch.no_grad()
    def draw_mask(self, x, m=None, last_block_input=None):
        """Masks by --mask-by, bool (B, N), for images (B, 3, H, W). m (1,): head of Eq. 3, on the
        unmasked images; None: random. last_block_input (B, 1 + N, D): that of x, if already
        computed."""
        cfg = self.cfg
        if cfg.mask_by == "random":
            return random_mask(len(x), self.N, cfg.mask, x.device)
        if m is None:
            m = torch.randint(cfg.heads, (1,), device=x.device)
        if last_block_input is None:
            last_block_input = self.encoder(x, return_last_block_input=True)[1]
        attention = class_attention(self.encoder.blocks[-1], last_block_input)    # atten, (B, K, N)
        return idm_mask(attention.index_select(1, m)[:, 0], cfg.mask)             # Eq. 3

    def decode(self, x, mask):
        """Images (B, 3, H, W) and their mask (B, N) → prediction of all patches (B, N, P)."""
        visible_ids = visible_first(mask)[:, :self.V]                             # (B, V)
        return self.decoder(self.encoder(x, visible_ids), visible_ids)

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        Visible patches are shown as they are. With --norm-pixels each predicted patch gets its
        true mean and std.
        """
        p, patches = self.cfg.patch, patchify(x, self.cfg.patch)                  # (B, N, P)
        mask = self.draw_mask(x)                                                  # (B, N)
        y = self.decode(x, mask).float()                                          # (B, N, P)
        y = denormalize_patches(y, patches) if self.cfg.norm_pixels else y
        y = torch.where(mask[:, :, None], y, patches)
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), p), unpatchify(y, p)


Model = CAMAE


class PLB(nn.Module):
    """Pattern-learning balanced sampling, §III-D. A Module, so that a checkpoint includes it."""
    def __init__(self, heads):
        super().__init__()
        self.register_buffer("p", torch.full((heads,), 1 / heads))        # p^m, equal at first
        self.register_buffer("losses", torch.full((heads,), torch.nan))   # L^m; nan: never drawn
        self.register_buffer("sums", torch.zeros(heads))                  # of L^m in this epoch
        self.register_buffer("counts", torch.zeros(heads))                # draws in this epoch

    def draw(self, seed, step):
        """Draws the head m of a step, int64 (1,), the same in all processes. Eq. 5"""
        # as seed_step, with an unused rank
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + 1_008)
        u = torch.rand(1, generator=generator).to(self.p.device, non_blocking=True)
        m = torch.searchsorted(self.p.cumsum(0), u, right=True)   # multinomial would block on CUDA
        return m.clamp(max=len(self.p) - 1)                       # the sum may round below 1

    def note(self, m, loss):
        """Adds the loss of a step to the sum of its head m (1,)."""
        self.sums.index_add_(0, m, loss.detach().float().view(1))
        self.counts.index_add_(0, m, torch.ones_like(self.sums[:1]))

    def end_epoch(self):
        """Sets `losses` to the mean losses of this epoch. A head that was not drawn keeps its
        loss."""
        self.losses.copy_(torch.where(self.counts > 0, self.sums / self.counts, self.losses))
        self.sums.zero_()
        self.counts.zero_()

    def update(self, lam, eps):
        """Updates p by Eq. 4. A head that was never drawn gets the mean loss of the others."""
        losses = torch.where(self.losses.isnan(), self.losses.nanmean(), self.losses)
        self.p.copy_(plb_update(self.p, losses, lam, eps))

    def row(self):
        """Columns of metrics.csv: loss and probability of each head, perplexity of p, from 1 (one
        head) to K (uniform)."""
        row = {f"loss of head {m}": loss for m, loss in enumerate(self.losses.tolist(), 1)}
        row |= {f"p of head {m}": p for m, p in enumerate(self.p.tolist(), 1)}
        return row | {"perplexity": torch.special.entr(self.p).sum().exp().item()}


def plb_update(p, losses, lam, eps):
    """Updated probabilities (K,), from p and the mean losses of an epoch, (K,) each. Eq. 4"""
    return (1 - lam) * p + lam * (losses / eps).softmax(0)


def plb_scale(cfg):
    """Factor from reconstruction_loss to L^m in Eq. 4: 1 with --plb-loss mean; with sum the number
    of masked pixel values of an image."""
    masked = round(cfg.mask * (cfg.img // cfg.patch) ** 2)                        # patches
    return 1 if cfg.plb_loss == "mean" else masked * 3 * cfg.patch ** 2


def info_nce_loss(z, z_prime, tau):
    """InfoNCE of z[i] and its positive z_prime[i] among all z_prime (B, D), mean over i. Vectors
    are L2-normalised here, as in MoCo v3. Eq. 1"""
    with torch.autocast(z.device.type, enabled=False):
        z, z_prime = F.normalize(z.float(), dim=1), F.normalize(z_prime.float(), dim=1)
        logits = z @ z_prime.mT / tau                                             # (B, B)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device))     # Eq. 1


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is True. Eq. 2"""
    error = (pred.float() - target.float()).square().mean(2)                    # (B, N)
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
    model, plb = CAMAE(cfg).to(device), PLB(cfg.heads).to(device)
    if cfg.init:
        load_encoder(model.encoder, cfg.init)
        load_encoder(model.momentum_encoder, cfg.init)
    net = DistributedDataParallel(model) if world > 1 else model
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), betas=(0.9, 0.95), fused=True)

    run = Run(__file__, cfg, batches, steps, model=model, optimizer=optimizer, plb=plb)
    by_head = cfg.mim and cfg.mask_by != "random"
    for step in range(run.start, steps):
        seed_step(cfg.seed, step, rank)                           # exact resume
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, cfg.lr * cfg.batch * world / 256)

        view1, view2 = views(batches[step], cfg)
        m = plb.draw(cfg.seed, step)                              # Eq. 5
        with autocast(device, cfg.amp):
            losses = net(view1, view2, m)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if cfg.contrast:
            momentum = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2
            ema(model.momentum_encoder, model.encoder, momentum)  # Figure 1
            ema(model.momentum_projector, model.projector, momentum)

        run.log(step, losses)
        if by_head:
            L_m = gather(losses["reconstruction"].detach().view(1, 1)).mean()  # all processes
            plb.note(m, plb_scale(cfg) * L_m)
            if (step + 1) % len(batches) == 0:
                plb.end_epoch()
                if rank == 0:
                    run.write({"step": step + 1, "epoch": (step + 1) // len(batches), **plb.row()})
                if cfg.mask_by == "plb":
                    plb.update(cfg.lam, cfg.eps)                  # Eq. 4
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


def moco_mlp(*widths):
    """MoCo v3's projector or predictor, (B, widths[0]) → (B, widths[-1]): linear layers with
    BatchNorm, ReLU between them, no weights in the last norm. The norms use the statistics of the
    batch."""
    layers, last = [], len(widths) - 1
    for i in range(1, len(widths)):
        norm = nn.BatchNorm1d(widths[i], affine=i < last, track_running_stats=False)
        layers += [nn.Linear(widths[i - 1], widths[i], bias=False), norm, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).apply(init_weights)


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
    """A ViT with class token. Its state dict is timm's. An image's vector is the class token."""
    def __init__(self, img, patch, dim, depth, heads, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = F.pad(sincos_pos_embed(dim, img // patch), (0, 0, 1, 0))
        self.register_buffer("pos_embed", positions)                # 0 for the class token
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x, visible_ids=None, return_last_block_input=False):
        """Images (B, 3, H, W) → (B, 1 + V, D), class token first. visible_ids (B, V): the patches
        that are encoded; None: all N. return_last_block_input: also return the last block's input,
        of the same shape."""
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[:, 1:]           # (B, N, D)
        x = x if visible_ids is None else take(x, visible_ids)                  # (B, V, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)            # (B, 1 + V, D)
        for block in self.blocks:
            last_block_input = x
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        x = self.norm(x)
        return (x, last_block_input) if return_last_block_input else x

    def vector(self, z):
        """One vector (B, D) for the tokens (B, 1 + V, D) of an image."""
        return z[:, 0].float()

    def tokens(self, x):
        """Patch tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)[:, 1:]

    def features(self, x):
        """One vector for each whole image, (B, 3, H, W) → (B, D)."""
        return self.vector(self(x))


def class_attention(block, x):
    """Attention of the class token to the patches in `block`, whose input is x (B, 1 + N, D):
    (B, K, N). Scores in float32, because in bfloat16 many are equal."""
    qkv = block.attn.qkv(block.norm1(x)).float()                                # (B, 1 + N, 3D)
    q, k, _ = qkv.unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q[:, :, :1] * k).sum(3) / k.shape[3] ** 0.5                       # (B, K, 1 + N)
    return scores.softmax(2)[:, :, 1:]


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
