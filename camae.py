"""CAMAE with IDM and PLB: He Zhu, Yang Chen, Guyue Hu and Shan Yu, "Information-density Masking Strategy for Masked
Image Modeling".

An encoder is contrasted with its momentum average on two views, and it reconstructs the first view from a quarter of
the patches. The encoder's own attention decides which it sees: the patches that one head of its last block attends to
most are masked (IDM). That head is drawn in each step; heads with a higher loss are drawn more often (PLB).

f is the encoder, g the projector, q the decoder; f_xi and g_xi are averages of f and g; p are the heads' probabilities.
One training step on B images of N patches with P values each, and K heads (the paper's M):
    view1, view2 = augment(images), augment(images)              # §III-A    (B, 3, 224, 224)
    z1, z2 = g(f(view1)), g(f(view2))                            # §III-A    (B, 256)
    z1_xi, z2_xi = g_xi(f_xi(view1)), g_xi(f_xi(view2))          # §III-A    (B, 256), no gradient
    L_c = (InfoNCE(z1, z2_xi) + InfoNCE(z2, z1_xi)) / 2          # Eq. 1, both ways, as MoCo v3
    m = one of the K heads, drawn by p                           # Eq. 5     one a step
    mask = the 75 % of view1's patches that m attends to most    # Eq. 3     (B, N)
    L_m = MSE(q(f(visible patches)), view1), masked ones only    # Eq. 2     a number, from (B, N, P)
    step of AdamW on L_c + L_m for f, g, q                       # Eq. 6
    f_xi, g_xi ← momentum·(f_xi, g_xi) + (1 - momentum)·(f, g)   # Figure 1
    after each epoch: p = 0.01·p + 0.99·softmax(L/0.2)           # Eq. 4     (K,), L: the mean L_m of each head's steps

What may change the result, because the paper leaves it open: the scale of L_m in Eq. 4 (--plb-loss; with the mean,
every head kept a good share in small runs), momentum (--momentum), a frozen patch embedding (--freeze-patch),
normalised pixels (--norm-pixels), augmentations (--crop-min …), --lr; and, without a flag, that the mask follows the
attention of f's class token, not of f_xi's, and that one head serves all images of a step.

    torchrun --nproc-per-node 8 camae.py --data PATH --recompute       the paper's experiment, on ImageNet
    python camae.py --tiny --data shapes                               a first look on a laptop
    python eval_linear.py runs/camae-DATE-TIME                         the linear probe; show.py draws the heads' masks
Measured: --tiny, CIFAR-10 (JPEG), steps 81 to 100: loss 4.968, reconstruction 1.126, contrast 3.842.
Every other choice, symbol and misprint, and the paper's tables: papers/camae.md.
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

from common import (Batches, Run, autocast, check, check_above, check_config, check_least, check_mask, check_share,
                    color_jitter, cosine_lr, gaussian_blur, init_encoders, launch, load_data, normalize, param_groups,
                    random_grayscale, random_hflip, random_resized_crop, recompute, schedule, seed_step,
                    start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.75  # share of the patches that is masked, §III-C
    mask_by: Literal["random", "idm", "plb"] = "plb"  # Table II: at random; by a head drawn evenly, or by p of Eq. 4
    contrast: bool = True  # L_c, Eq. 1; without it reconstruction alone: Table I's MAE with --mask-by random or idm
    mim: bool = True  # L^m, Eq. 2; without it contrast alone, as in Tables III to V
    tau: float = 0.2  # τ, temperature, §IV-A
    lam: float = 0.99  # λ, weight of the new estimate of p, Eq. 4
    eps: float = 0.2  # ε, temperature of the heads' losses, Eq. 4
    plb_loss: Literal["mean", "patches", "sum"] = "mean"  # L^m in Eq. 4: mean; patches' means summed; all values summed
    momentum: float = 0.99  # of f_ξ and g_ξ, rising to 1 by a cosine; MoCo v3's ([10]); DINO's ([7]) is 0.996
    crop_min: float = 0.08  # smallest crop, share of the area; MoCo v3's
    jitter: float = 0.8  # probability of colour jitter; MoCo v3's
    gray: float = 0.2  # probability of greyscale; MoCo v3's
    blur: float = 0.5  # probability of blur; SimCLR's, alike in both views
    norm_pixels: bool = False  # target patches at mean 0, deviation 1 (MAE's better variant), else the pixels of Eq. 2
    # model
    img: int = 224  # side of the views in pixels, §IV-A
    patch: int = 16  # side of a patch in pixels, §IV-A
    dim: int = 768  # width D, §IV-A
    depth: int = 12  # blocks, §IV-A: ViT-Base's
    heads: int = 12  # heads K, §IV-A: ViT-Base's
    freeze_patch: bool = False  # the patch embedding keeps its initial weights, MoCo v3's way; else it learns, MAE's
    hidden: int = 4096  # hidden width of the projectors; MoCo v3's
    out_dim: int = 256  # width of z, §IV-A
    decoder_depth: int = 8  # blocks of the decoder; MAE's
    decoder_dim: int = 512  # width of the decoder; MAE's
    decoder_heads: int = 16  # heads of the decoder; MAE's
    # optimisation
    epochs: int = 400  # passes over the data, §IV-A
    batch: int = 512  # images per step and per process, §IV-A: 4096 on eight GPUs
    lr: float = 1.5e-4  # base learning rate, for a batch of 256; MAE's and MoCo v3's
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 40.0  # epochs of linear warm-up; MAE's and MoCo v3's
    steps: int = 0  # length of training and schedule in steps; 0: as --epochs says
    # run
    data: str = "cifar10"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; §IV-A has ImageNet
    images: int = 0  # train on only so many images, the same ones in every run; 0 for all
    store: int = 0  # side in pixels at which images are kept, squeezed to squares; 0 for 8/7 of --img
    root: str = "data"  # where data sets are downloaded to and decoded
    out: str = ""  # folder of the run, new or empty (default: runs/camae-DATE-TIME)
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
        check(self.contrast or self.mim, "--no-contrast", "--no-mim", "leave nothing to learn")
        check(not self.contrast or self.batch >= 2, "--batch", self.batch,
              "must be at least 2, or there are no negatives")
        check_share(self, "lam momentum jitter gray blur")
        check_above(self, 0, "tau eps")
        check_least(self, 1, "hidden out_dim")
        check(0 < self.crop_min <= 1, "--crop-min", self.crop_min, "must lie between 0 and 1")


# The rate is higher than the default because the training is short.
TINY = Config(crop_min=0.2, blur=0.0, img=32, patch=4, dim=192, depth=4, heads=3, hidden=768, out_dim=64,
              decoder_depth=2, decoder_dim=96, decoder_heads=3, epochs=8, batch=128, lr=1e-3, warmup=1.0, knn_every=1,
              tiny=True)


# The paper, §III. B images, N patches, V visible ones, K heads (the paper's M), m one of them and p their
# probabilities; D width of a token, P = 3·patch·patch values of a patch; S side of a stored image, H = W = img that of
# a view; world·B images in all processes together, which info_nce_loss calls B.

def views(images, cfg, aspect=None):
    """Two views of each image, drawn independently by the same augmentations; without contrast one view, twice. §III-A

    images (B, 3, S, S), uint8 or 0…1; aspect (B,): their width over height before they were squeezed to squares, 1 if
    None. Returns view1 and view2 (x_i and x'_i), normalised, (B, 3, img, img).
    """
    def view():
        x = random_resized_crop(images, cfg.img, (cfg.crop_min, 1.0), aspect=aspect)
        x = random_hflip(x)
        x = color_jitter(x, p=cfg.jitter)  # brightness, contrast, saturation, hue by up to 0.4, 0.4, 0.2, 0.1
        x = random_grayscale(x, cfg.gray)
        return normalize(gaussian_blur(x, cfg.blur))
    view1 = view()
    return view1, (view() if cfg.contrast else view1)


def random_mask(B, N, ratio, device=None):
    """Which of N places are masked: bool (B, N), 1 = masked; equally many in each row, every place as likely."""
    order = torch.rand(B, N, device=device).argsort(1)  # a permutation of 0 … N - 1 in each row
    return order < round(ratio * N)  # true at exactly round(ratio·N) places of each row


def idm_mask(attention, ratio):
    """Masks the share `ratio` of the patches that have the most attention: (B, N) → bool (B, N), 1 = masked. Eq. 3"""
    rank = attention.argsort(1, descending=True).argsort(1)  # 0 for the most
    return rank < round(ratio * attention.shape[1])


def visible_first(mask):
    """The patches of each image in order, the visible ones before the masked ones: mask (B, N) → ids (B, N)."""
    return mask.int().argsort(dim=1, stable=True)


def take(x, ids):
    """The tokens `ids` (B, V) of x (B, N, D): (B, V, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class CAMAE(nn.Module):
    """Both tasks of one encoder, §III and Figure 1."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.N = cfg, (cfg.img // cfg.patch) ** 2
        self.V = self.N - round(cfg.mask * self.N)
        self.encoder = Encoder(cfg, "cls")  # f_θ
        self.encoder.patch_embed.requires_grad_(not cfg.freeze_patch)
        blocks = [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
        self.decoder = Decoder(cfg.dim, cfg.img // cfg.patch, 3 * cfg.patch ** 2, cfg.decoder_dim, blocks)  # q_θ
        self.decoder.requires_grad_(cfg.mim)  # what --no-mim or --no-contrast leaves out is built, and frozen
        self.g_theta = projector(cfg.dim, cfg.hidden, cfg.out_dim).requires_grad_(cfg.contrast)
        self.f_xi = copy.deepcopy(self.encoder).requires_grad_(False)
        self.g_xi = copy.deepcopy(self.g_theta).requires_grad_(False)

    def forward(self, view1, view2, m=None):
        """Normalised views (B, 3, H, W) and the head m (1,) that masks; None draws one → {"loss": Eq. 6, "contrast":
        Eq. 1, "reconstruction": Eq. 2}, without what --no-contrast or --no-mim leaves out."""
        cfg, L_c, L_m, losses = self.cfg, 0, 0, {}
        entering = None  # the tokens of view1 that enter the last block
        if cfg.contrast:
            tokens1, entering = self.encoder(view1, with_entering=True)  # (B, 1 + N, D) each
            h1, h2 = self.encoder.vector(tokens1), self.encoder.features(view2)  # h_i of either view, (B, D)
            z1, z2 = self.g_theta(gather(h1)), self.g_theta(gather(h2))  # z_i, (world·B, 256)
            with torch.no_grad():
                h1_xi, h2_xi = self.f_xi.features(view1), self.f_xi.features(view2)  # h'_i of either view, (B, D)
                z1_xi, z2_xi = self.g_xi(gather(h1_xi)), self.g_xi(gather(h2_xi))  # z'_i, (world·B, 256)
            L_c = (info_nce_loss(z1, z2_xi, cfg.tau) + info_nce_loss(z2, z1_xi, cfg.tau)) / 2  # Eq. 1, both ways
            losses["contrast"] = L_c
        if cfg.mim:
            mask = self.draw_mask(view1, m, entering)  # Eq. 3, (B, N)
            y = self.decode(view1, mask)  # x̃, (B, N, P)
            target = patchify(view1, cfg.patch)  # x, (B, N, P)
            target = normalize_patches(target) if cfg.norm_pixels else target
            L_m = masked_mse(y, target, mask)  # Eq. 2
            losses["reconstruction"] = L_m
        return {"loss": L_c + L_m, **losses}  # Eq. 6

    @torch.no_grad()
    def draw_mask(self, x, m=None, entering=None):
        """The mask of images (B, 3, H, W): bool (B, N), 1 = masked. It is random, or it follows f_θ's attention to the
        whole images in head m. m is a tensor (1,), so that nothing waits for the device; None draws a head evenly.
        entering (B, 1 + N, D): the tokens that enter the last block; None: they are computed here."""
        if self.cfg.mask_by == "random":
            return random_mask(len(x), self.N, self.cfg.mask, x.device)
        m = torch.randint(self.cfg.heads, (1,), device=x.device) if m is None else m
        attention = (self.encoder.attention(x) if entering is None else
                     class_attention(self.encoder.blocks[-1], entering))  # (B, K, N)
        return idm_mask(attention.index_select(1, m)[:, 0], self.cfg.mask)

    def decode(self, x, mask):
        """Images (B, 3, H, W) whose patches are masked (B, N) → the decoder's prediction of all patches (B, N, P)."""
        visible = visible_first(mask)[:, :self.V]  # (B, V)
        return self.decoder(self.encoder(x, visible), visible)

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        Masked at random, or by the attention of a head drawn evenly. Visible patches, which the loss leaves out, are
        shown as they are. With --norm-pixels each masked patch gets its true mean and deviation back.
        """
        patches = patchify(x, self.cfg.patch)  # (B, N, P)
        mask = self.draw_mask(x)  # (B, N)
        y = self.decode(x, mask).float()  # (B, N, P)
        y = denormalize_patches(y, patches) if self.cfg.norm_pixels else y
        shown = torch.where(mask[:, :, None], y, patches)
        masked = patches.masked_fill(mask[:, :, None], 0)
        return unpatchify(masked, self.cfg.patch), unpatchify(shown, self.cfg.patch)


def plb_scale(cfg):
    """The factor that turns masked_mse, a mean, into the L^m of Eq. 4, by --plb-loss: 1 for the mean itself, the number
    of masked patches for the sum over patches, the number of masked pixel values for the sum over all of them. Eq. 2"""
    patches = (cfg.img // cfg.patch) ** 2
    masked = round(cfg.mask * patches)
    return {"mean": 1, "patches": masked, "sum": masked * 3 * cfg.patch ** 2}[cfg.plb_loss]


def plb_update(p, losses, lam, eps):
    """Probabilities p (K,) of the heads after an epoch in which their mean losses were `losses` (K,). Eq. 4"""
    return (1 - lam) * p + lam * (losses / eps).softmax(0)


class PLB(nn.Module):
    """Pattern-learning balanced sampling, §III-D: a head with a high loss, which is not yet well learned, is drawn more
    often. Holds the heads' probabilities and losses; a Module, so that a checkpoint holds them."""
    def __init__(self, heads):
        super().__init__()
        self.register_buffer("p", torch.full((heads,), 1 / heads))  # p^m, "the same probability" at first
        self.register_buffer("losses", torch.full((heads,), float("nan")))  # L^m, unknown until head m was drawn
        self.register_buffer("sums", torch.zeros(heads))  # of the losses in this epoch
        self.register_buffer("counts", torch.zeros(heads))  # how often each head was drawn in it

    def draw(self, steps, seed, epoch):
        """The head of each step of an epoch, int64 (steps,) from 0, the same in all processes. Eq. 5"""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_000 + epoch)  # + 500_000: not Batches' seed
        return self.p.cpu().multinomial(steps, replacement=True, generator=generator).to(self.p.device)

    def note(self, m, loss):
        """Adds the loss of a step, a number averaged over all processes, to this epoch's sum of its head m (1,)."""
        self.sums.index_add_(0, m, loss.detach().float().view(1))
        self.counts.index_add_(0, m, torch.ones_like(self.sums[:1]))

    def end_epoch(self, lam, eps):
        """Eq. 4 with this epoch's mean losses. A head that was not drawn in this epoch keeps its last mean loss; one
        that was never drawn gets the mean of the others."""
        self.losses.copy_(torch.where(self.counts > 0, self.sums / self.counts, self.losses))
        losses = torch.where(self.losses.isnan(), self.losses.nanmean(), self.losses)
        self.p.copy_(plb_update(self.p, losses, lam, eps))
        self.sums.zero_()
        self.counts.zero_()

    def heads_in_play(self):
        """The perplexity of p, exp of its entropy, a number: 1 where one head is always drawn, K where p is even."""
        return torch.special.entr(self.p).sum().exp()


def info_nce_loss(z, z_prime, tau):
    """InfoNCE of z[i] and its positive z_prime[i] among all z_prime, (B, any width), brought to length 1 here, as MoCo
    v3 does; mean over i. Eq. 1"""
    with torch.autocast(z.device.type, enabled=False):
        z, z_prime = F.normalize(z.float(), dim=1), F.normalize(z_prime.float(), dim=1)
        logits = z @ z_prime.mT / tau  # (B, B), the positives on the diagonal
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device))


def masked_mse(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is 1; 0 if there is none. Eq. 2"""
    error = (pred.float() - target.float()).square().mean(2)  # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data, test = load_data(cfg)
    batches = Batches(data, cfg.batch, cfg.seed, here)
    steps, warmup = schedule(cfg, len(batches))

    torch.manual_seed(cfg.seed)
    model, plb = CAMAE(cfg).to(here.device), PLB(cfg.heads).to(here.device)
    init_encoders(model, cfg.init)
    if cfg.recompute:
        recompute(model)
    net = DistributedDataParallel(model, broadcast_buffers=False) if here.world > 1 else model  # buffers never differ
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net  # draws as the plain model does
    peak = cfg.lr * cfg.batch * here.world / 256  # §IV-A
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, betas=(0.9, 0.95), fused=True)  # MAE's

    by_heads = cfg.mim and cfg.mask_by != "random"
    columns = [f"{name} of head {m}" for name in ("loss", "p") for m in range(1, cfg.heads + 1)] + ["heads in play"]
    run = Run("camae", cfg, here, len(batches), ["knn", "rank", *(columns if by_heads else ())])
    step = run.resume(model=model, optimizer=optimizer, plb=plb)
    drawn = plb.draw(len(batches), cfg.seed, step // len(batches))  # the epoch's heads, one a step; used if by_heads
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        images, aspect = batches[step]
        view1, view2 = views(images, cfg, aspect)
        m = drawn[step % len(batches)].view(1)  # Eq. 5
        with autocast(here.device, cfg.amp):
            losses = net(view1, view2, m)
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, peak)
        optimizer.step()
        optimizer.zero_grad()
        if cfg.contrast:
            momentum = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2  # rises to 1, MoCo v3's way
            ema(model.f_xi, model.encoder, momentum)  # average ← momentum·average + (1 - momentum)·model
            ema(model.g_xi, model.g_theta, momentum)

        step += 1
        if by_heads:
            L_m = gather(losses["reconstruction"].detach().view(1, 1)).mean()  # over all processes
            plb.note(m, plb_scale(cfg) * L_m)
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        if step % len(batches) == 0:
            if by_heads:
                p, in_play = plb.p.tolist(), plb.heads_in_play().item()  # the old p, which drew this epoch's heads
                plb.end_epoch(cfg.lam if cfg.mask_by == "plb" else 0.0, cfg.eps)  # Eq. 4; λ = 0 keeps p even
                if here.rank == 0:
                    row = dict(zip(columns, [*plb.losses.tolist(), *p, in_play]))
                    run.write({"step": step, "epoch": step // len(batches), **row})
            drawn = plb.draw(len(batches), cfg.seed, step // len(batches))
        run.save(step, data, test, model=model, optimizer=optimizer, plb=plb)
    return run.finish()


# Parts, most of them shared with the other files, with letters of their own: p is the side of a patch in pixels, m a
# momentum, z the encoder's tokens (any rows in gather), N in attention the number of all tokens; q, k, v are
# attention's; K heads, each d = D/K wide.

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

    def forward(self, x, visible=None, with_entering=False):
        """Images (B, 3, H, W) → (B, 1 + V, D), class token first; with_entering: also what enters the last block, as
        large. Only the patches `visible` (B, V) are seen; None: all N."""
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[:, 1:]  # (B, N, D)
        x = x if visible is None else take(x, visible)  # (B, V, D)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)  # (B, 1 + V, D)
        for block in self.blocks:
            entering, x = x, block(x)  # in the end: what enters the last block
        return (self.norm(x), entering) if with_entering else self.norm(x)

    def vector(self, z):
        """One vector (B, D) for the tokens (B, 1 + V, D) of an image."""
        return z[:, 1:].float().mean(1) if self.pool == "mean" else z[:, 0].float()

    def tokens(self, x):
        """The patches' tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)[:, 1:]

    def features(self, x):
        """One vector for each whole image, (B, 3, H, W) → (B, D)."""
        return self.vector(self(x))

    def attention(self, x):
        """How the class token attends to the patches in the last block, (B, 3, H, W) → (B, K, N)."""
        return class_attention(self.blocks[-1], self(x, with_entering=True)[1])


def class_attention(block, x):
    """How the class token attends to the patches in `block`, which x (B, 1 + N, D) enters: (B, K, N). The product is
    summed in float32. A matrix product under autocast would be bfloat16, in which many patches come out equal."""
    qkv = block.attn.qkv(block.norm1(x)).float()  # (B, 1 + N, 3D)
    q, k, _ = qkv.unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, K, 1 + N, d) each, d = D/K
    return ((q[:, :, :1] * k).sum(3) / k.shape[3] ** 0.5).softmax(2)[:, :, 1:]


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


def projector(dim, hidden, out):
    """MoCo v3's: three linear layers with batch norm, the last norm without weights, (B, dim) → (B, out)."""
    def norm(width, affine=True):
        return nn.BatchNorm1d(width, affine=affine, track_running_stats=False)
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(dim, hidden, bias=False), norm1=norm(hidden), act1=nn.ReLU(),
        fc2=nn.Linear(hidden, hidden, bias=False), norm2=norm(hidden), act2=nn.ReLU(),
        fc3=nn.Linear(hidden, out, bias=False), norm3=norm(out, affine=False))).apply(init_weights)


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("camae", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
