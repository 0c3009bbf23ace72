"""CMAE: Jiawei Mao, Xuesong Yin, Yuanqi Chang and Honggu Zhou, "Improvements to Self-Supervised Representation Learning
for Masked Image Modeling", arXiv 2205.10546, 2022. Not the CMAE of Huang et al. (arXiv 2207.13532), another method.

A masked autoencoder whose encoder E has two more tasks. Contrast: E encodes the visible and the masked patches of a
view separately, its moving average M_E does so with a second view; the mean tokens of both views are projected, by P
and by its average M_P, and compared. Location: the place of each visible token is predicted. E also says where to crop.

One training step on B images of N patches, V of them visible; D is the width of a token, "1 +" the class token:
    I = the box around where E's heat map M is above k      # Eq. 1        (B, 4), after 60 epochs, then every 60
    x_q, x_k = two draws of flip(crop(images, I))           # §3.2         (B, 3, 64, 64)
    q1, q2 = E(visible of x_q), detach(E(masked of x_q))    # §3.3         (B, 1 + V, D), (B, 1 + N - V, D)
    k1, k2 = M_E(visible of x_k), M_E(masked of x_k)        # §3.3         the same shapes
    h1, h2 = restore([q1, q2]), restore([k1, k2])           # Eq. 2        (B, 1 + N, D)
    L_ctr = InfoNCE(P(mean of h1), M_P(mean of h2))         # Eq. 3        a number, from vectors (B, D)
    L_loc = ‖p - t‖, p = MLP(MLP(q1)), t: places, one-hot   # Eq. 4, 5     a number, from (B, V, N)
    L_con = MSE(decoder(q1), x_q), masked patches only      # §3.5         a number
    step of AdamW on λ_ctr·L_ctr + λ_loc·L_loc + λ_con·L_con  # Eq. 6
    M_E, M_P ← m·(M_E, M_P) + (1 - m)·(E, P)                # §3.3, MoCo v3's momentum average

What may change the result, because the paper does not say it, and its flag:
    --location-from    whether positions are added before Eq. 4: yes, as in MAE. The input then holds the answer, but
                       Eq. 5's gradient has length 1 even where the loss is small, and E goes on learning to keep places
    --pool, --projection, --patch, --tau    which vector of h is projected, and how; the side of a patch; τ
    --heat, --k        what M is made of, and k: with 0.1 the boxes may be nearly whole images
    --lr, --decoder    1e-3 as the rate itself: --lr 4e-3; Table 1's decoder; also open: "frozen" or "fine-tuned"
    python cmae.py                                           Table 1's CMAE, as far as it is described, for a GPU
    python cmae.py --tiny --data shapes                      a first look on a laptop; then eval_linear.py, show.py
Measured: --tiny, CIFAR-10 (JPEG), steps 381 to 390 (epoch 1): loss 1.984 (contrast 1.024, location 0.543).
Every other choice, symbol and misprint, and the paper's tables: papers/cmae.md.
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
                    cosine_lr, crop_boxes, crop_resize, init_encoders, launch, load_data, normalize, param_groups,
                    random_hflip, random_resized_crop, recompute, resize, schedule, seed_step, start_processes)


@dataclass
class Config:
    """Every setting, each a flag of the command line. Raises UserError for a value out of range."""
    # method
    mask: float = 0.75  # share of the patches that is masked, §4.2
    lam_ctr: float = 1.0  # λ_ctr, weight of the contrast, §3.6; 0 leaves it out
    lam_loc: float = 1.0  # λ_loc, weight of the location prediction, §3.6; 0 leaves it out
    lam_con: float = 1.0  # λ_con, weight of the reconstruction, §3.6; 0 leaves it out
    tau: float = 0.07  # τ, temperature, §3.3: [32], Wu et al.'s
    projection: Literal["linear", "mlp"] = "linear"  # "projection layer P", §3.3: one layer, or MoCo v2's two
    pool: Literal["mean", "cls"] = "mean"  # what of h is projected: its patches' mean, or its class tokens
    momentum: float = 0.99  # of M_E and M_P, rising to 1 by a cosine; MoCo v3's
    location_from: Literal["positions", "content"] = "positions"  # Eq. 4's tokens: q1, or encoded without positions
    norm_pixels: bool = False  # reconstruct patches at mean 0, deviation 1 (MAE's best); no: "pixel form", §3.5
    heat: Literal["attention", "features"] = "attention"  # what the heat map M is made of, §3.2
    k: float = 0.1  # threshold of M, 0…1, Eq. 1; ContrastiveCrop's
    alpha: float = 0.6  # crop centres follow Beta(α, α) across I; below 1 it prefers the edges; ContrastiveCrop's
    crop_from: int = 60  # epochs of plain crops before the first boxes; a fifth of 300, as in ContrastiveCrop
    crop_every: int = 60  # epochs until the boxes are computed again; a fifth of 300, too
    crop_min: float = 0.2  # smallest crop, share of the area; MAE's
    # model
    img: int = 64  # side of the views in pixels; the images' own, §4.1
    patch: int = 8  # side of a patch in pixels; a choice made here
    dim: int = 768  # width D, §4.2: ViT-Base
    depth: int = 12  # blocks, §4.2: ViT-Base
    heads: int = 12  # heads K, §4.2: ViT-Base
    decoder: Literal["transformer", "mlp", "conv", "hybrid-mlp", "hybrid-conv"] = "transformer"  # §3.5
    decoder_depth: int = 8  # blocks of the decoder; MAE's
    decoder_dim: int = 512  # width of the decoder: 512, 256, 128 or 64 in §3.5
    decoder_heads: int = 16  # heads of the decoder; MAE's
    # optimisation
    epochs: int = 300  # passes over the data, §4.2
    batch: int = 64  # images per step and per process, §4.2
    lr: float = 1e-3  # base learning rate, §4.2; taken to be for a batch of 256, as MAE's
    wd: float = 0.05  # weight decay, §4.2
    warmup: float = 40.0  # epochs of linear warm-up; MAE's
    steps: int = 0  # length of training and schedule in steps; 0: as --epochs says
    # run
    data: str = "tiny-imagenet"  # cifar10, cifar100, stl10, tiny-imagenet, shapes, or a folder; §4.1
    images: int = 0  # train on only so many images, the same ones in every run; 0 for all
    store: int = 0  # side in pixels at which images are kept, squeezed to squares; 0 for 8/7 of --img
    root: str = "data"  # where data sets are downloaded to and decoded
    out: str = ""  # folder of the run, new or empty (default: runs/cmae-DATE-TIME)
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
        check_least(self, 0, "lam_ctr lam_loc lam_con crop_from")
        check(self.lam_ctr + self.lam_loc + self.lam_con > 0, "--lam-ctr, --lam-loc, --lam-con", 0, "must be not all 0")
        check(self.lam_ctr == 0 or self.batch >= 2, "--batch", self.batch, "must be at least 2 to have negatives")
        check_above(self, 0, "tau alpha crop_min crop_every")
        check_share(self, "momentum crop_min k")
        attends = self.decoder == "transformer" or (self.decoder.startswith("hybrid") and self.decoder_depth > 1)
        learns = (self.lam_con > 0 and attends) or (self.lam_ctr > 0 and self.pool == "cls")  # the class token's query
        check(self.heat == "features" or learns or self.crop_from >= self.epochs, "--heat", self.heat,
              "is the class token's attention, which no loss trains here: take --heat features")


TINY = Config(k=0.5, crop_from=1, crop_every=2, img=32, patch=4, dim=192, depth=4, heads=3, decoder_depth=2,
              decoder_dim=96, decoder_heads=3, epochs=8, batch=128, warmup=1.0, data="cifar10", knn_every=1, tiny=True)


# The paper, §3. B images, N = n·n patches, V visible, D width of a token, K heads, (world·B) all processes' images. P
# is the projection, in shapes the values in a patch; p: predicted places; k: Eq. 1's threshold; Eq. 3's q, k: z_q, z_k.

def views(images, cfg, aspect=None, boxes=None):
    """Two crops of each image, around its object if `boxes` say where it is, each flipped or not. §3.2

    images (B, 3, S, S), uint8 or 0…1; aspect (B,): their width over height before they were squeezed to squares, 1 if
    None; boxes (B, 4): I of Eq. 1, as shares of the squeezed sides. Returns x_q and x_k, normalised, (B, 3, img, img).
    """
    def view():
        crops = (random_resized_crop(images, cfg.img, (cfg.crop_min, 1.0), aspect=aspect) if boxes is None else
                 contrastive_crop(images, cfg.img, (cfg.crop_min, 1.0), boxes, cfg.alpha, aspect))
        return normalize(random_hflip(crops))
    return view(), view()


def contrastive_crop(images, size, scale, boxes, alpha, aspect=None):
    """R_crop(s, r, I): crops (B, 3, size, size) of images, centred in the boxes I (B, 4) as far as they fit. Eq. 1"""
    H, W = images.shape[2:]
    _, _, height, width = crop_boxes(len(images), H, W, scale, (3 / 4, 4 / 3), aspect)  # by s and r
    I_top, I_left, I_bottom, I_right = boxes.to(height.device, non_blocking=True).unbind(1)  # 0…1, (B,)
    down, across = torch.distributions.Beta(alpha, alpha).sample((2, len(images))).to(height.device, non_blocking=True)
    top = (crop_starts(I_top, I_bottom, height / H, down) * H).round().long()
    left = (crop_starts(I_left, I_right, width / W, across) * W).round().long()
    return crop_resize(images, (top, left, height, width), size)


def crop_starts(low, high, length, place):
    """Where crops of a `length` start: `place` of the way from a crop centred at `low` to one centred at `high`, both
    moved into the image if they stick out. All (B,), 0…1."""
    low, high = ((edge - length / 2).clamp(min=0).minimum(1 - length) for edge in (low, high))
    return torch.lerp(low, high, place)


def semantic_boxes(heat, k):
    """I = F(1[M > k]), the rectangle around what is hot, of heat (B, n, n), 0…1: (B, 4), its top, left, bottom, right
    as shares of the side; the whole image where nothing is hot. Eq. 1"""
    hot, n = heat > k, heat.shape[1]
    rows, columns = hot.any(2), hot.any(1)  # (B, n)
    top, left = (line.int().argmax(1) for line in (rows, columns))  # the first
    bottom, right = (n - line.flip(1).int().argmax(1) for line in (rows, columns))  # one past the last
    return torch.stack([top, left, bottom, right], 1) / n  # Eq. 1


def random_mask(B, N, ratio, device=None):
    """Which of N places are masked: bool (B, N), 1 = masked; equally many in each row, every place as likely."""
    order = torch.rand(B, N, device=device).argsort(1)  # a permutation of 0 … N - 1 in each row
    return order < round(ratio * N)  # true at exactly round(ratio·N) places of each row


def visible_first(mask):
    """The patches of each image in order, the visible ones before the masked ones: mask (B, N) → ids (B, N)."""
    return mask.int().argsort(dim=1, stable=True)


def take(x, ids):
    """The tokens `ids` (B, V) of x (B, N, D): (B, V, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def restore(q1, q2, order):
    """Puts the tokens of a view's visible patches (B, 1 + V, D) and masked ones (B, 1 + N - V, D), class token first in
    each, back into the places that order (B, N) names: (B, 1 + N, D), first the mean of both class tokens. Eq. 2"""
    x = torch.cat([q1[:, 1:], q2[:, 1:]], 1)  # Eq. 2, concat: (B, N, D)
    x = torch.empty_like(x).scatter(1, order[:, :, None].expand_as(x), x)  # Eq. 2, restore
    return torch.cat([(q1[:, :1] + q2[:, :1]) / 2, x], 1)


class CMAE(nn.Module):
    """The autoencoder, its momentum encoder and the three tasks (Figure 1). `forward` is §3.3 to §3.6."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.grid, D = cfg, cfg.img // cfg.patch, cfg.dim  # grid is n
        self.N, self.V = self.grid ** 2, self.grid ** 2 - round(cfg.mask * self.grid ** 2)
        self.encoder = Encoder(cfg, cfg.pool)  # E
        self.projection = (nn.Linear(D, D) if cfg.projection == "linear" else mlp(D, D, D)).apply(init_weights)  # P
        self.M_E = copy.deepcopy(self.encoder).requires_grad_(False)  # §3.3: begins with the same weights
        self.M_P = copy.deepcopy(self.projection).requires_grad_(False)
        self.location = mlp(D, D, self.N).apply(init_weights)  # §3.4
        nn.init.zeros_(self.location.fc2.weight)  # a choice made here: random ones give E far larger gradients
        self.decoder = Decoder(D, self.grid, 3 * cfg.patch ** 2, cfg.decoder_dim, decoder_blocks(cfg))  # §3.5
        for part, lam in ((self.projection, cfg.lam_ctr), (self.location, cfg.lam_loc), (self.decoder, cfg.lam_con)):
            part.requires_grad_(lam > 0)

    def forward(self, view1, view2):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 6, "contrast": Eq. 3, "location": Eq. 5, "reconstruction"}; a
        term whose weight is 0 is missing."""
        cfg, V, x_q, x_k = self.cfg, self.V, view1, view2
        L_ctr, L_loc, L_con, losses = 0, 0, 0, {}
        mask_q = random_mask(len(x_q), self.N, cfg.mask, x_q.device)  # §3.3, (B, N)
        order_q = visible_first(mask_q)  # (B, N)
        visible, masked = order_q[:, :V], order_q[:, V:]  # (B, V), (B, N - V)
        q1 = self.encoder(x_q, visible)  # §3.3, (B, 1 + V, D)
        if cfg.lam_ctr > 0:
            order_k = visible_first(random_mask(len(x_k), self.N, cfg.mask, x_k.device))  # (B, N)
            with torch.no_grad():  # detach of Eq. 2; M_E has no gradient either
                q2 = self.encoder(x_q, masked)  # §3.3, (B, 1 + N - V, D)
                k1, k2 = self.M_E(x_k, order_k[:, :V]), self.M_E(x_k, order_k[:, V:])
            h1, h2 = restore(q1, q2, order_q), restore(k1, k2, order_k)  # Eq. 2, (B, 1 + N, D)
            z_q = gather(self.projection(self.encoder.vector(h1)))  # P(h1), pooled first, (world·B, D)
            z_k = gather(self.M_P(self.M_E.vector(h2)))  # (world·B, D)
            losses["contrast"] = L_ctr = info_nce_loss(z_q, z_k, cfg.tau)  # Eq. 3
        if cfg.lam_loc > 0:
            tokens = self.encoder(x_q, visible, add_positions=False) if cfg.location_from == "content" else q1
            with torch.autocast(x_q.device.type, enabled=False):  # in bfloat16, p near t would be mostly rounding
                p = self.location(tokens[:, 1:].float())  # Eq. 4, (B, V, N)
            losses["location"] = L_loc = location_loss(p, visible)  # Eq. 5
        if cfg.lam_con > 0:
            y = self.decoder(q1, visible)  # §3.5, (B, N, P)
            target = patchify(x_q, cfg.patch)  # (B, N, P)
            target = normalize_patches(target) if cfg.norm_pixels else target
            losses["reconstruction"] = L_con = reconstruction_loss(y, target, mask_q)  # §3.5
        return {"loss": cfg.lam_ctr * L_ctr + cfg.lam_loc * L_loc + cfg.lam_con * L_con, **losses}  # Eq. 6

    def heat(self, x):
        """The heat map M of Eq. 1 of whole normalised images (B, 3, H, W): (B, n, n), each from 0 to 1."""
        if self.cfg.heat == "attention":
            heat = self.encoder.attention(x).mean(1)  # (B, N)
        else:
            tokens = self.encoder.blocks[-1](self.encoder(x, with_entering=True)[1])  # last block again, no norm
            heat = tokens[:, 1:].abs().mean(2)  # (B, N)
        low, high = heat.amin(1, keepdim=True), heat.amax(1, keepdim=True)
        return ((heat - low) / (high - low).clamp(min=1e-12)).unflatten(1, (self.grid, self.grid))

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images. Visible patches are
        shown as they are; with --norm-pixels the others get their true mean and deviation back."""
        patches = patchify(x, self.cfg.patch)  # (B, N, P)
        mask = random_mask(len(x), self.N, self.cfg.mask, x.device)  # (B, N)
        visible = visible_first(mask)[:, :self.V]  # (B, V)
        y = self.decoder(self.encoder(x, visible), visible).float()  # (B, N, P)
        y = denormalize_patches(y, patches) if self.cfg.norm_pixels else y
        shown = torch.where(mask[:, :, None], y, patches)
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), self.cfg.patch), unpatchify(shown, self.cfg.patch)


class Boxes(nn.Module):
    """The rectangles I of all training images, (images, 4), whole images at first. A Module, for the checkpoint."""
    def __init__(self, images):
        super().__init__()
        self.register_buffer("boxes", torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(images, 1))

    @torch.no_grad()
    def locate(self, model, images, here):
        """Computes the boxes anew from the model's heat maps of uint8 images (all, 3, S, S); each process does all."""
        for ids in torch.arange(len(images)).split(250):  # some at a time, for the memory
            x = normalize(resize(images[ids].to(here.device), model.cfg.img))
            with autocast(here.device, model.cfg.amp):
                self.boxes[ids] = semantic_boxes(model.heat(x), model.cfg.k).cpu()


def info_nce_loss(q, k, tau):
    """InfoNCE of q[i] and its positive k[i] against all other k, (B, any width), mean over i. Eq. 3"""
    with torch.autocast(q.device.type, enabled=False):
        logits = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).mT / tau  # (B, B)
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))  # Eq. 3


def location_loss(p, positions):
    """Distance of the predicted places p (B, V, N) from the true ones, positions (B, V), one-hot; mean. Eq. 5"""
    t = F.one_hot(positions, p.shape[2])  # (B, V, N)
    return (p.float() - t).norm(dim=2).mean()  # Eq. 5


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is 1; 0 if there is none. L_con of §3.5"""
    error = (pred.float() - target.float()).square().mean(2)  # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def train(cfg):
    """Trains as `cfg` says; returns the run's folder. Raises UserError, FloatingPointError, SystemExit on a signal."""
    here = start_processes(cfg.device)
    data, test = load_data(cfg)
    batches, boxes = Batches(data, cfg.batch, cfg.seed, here), Boxes(len(data[0]))
    steps, warmup = schedule(cfg, len(batches))

    torch.manual_seed(cfg.seed)
    model = CMAE(cfg).to(here.device)
    init_encoders(model, cfg.init)
    if cfg.recompute:
        recompute(model)
    net = DistributedDataParallel(model, broadcast_buffers=False) if here.world > 1 else model  # buffers never differ
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net  # draws as the plain model does
    peak = cfg.lr * cfg.batch * here.world / 256  # §4.2's base rate, by MAE's rule
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), lr=peak, betas=(0.9, 0.95), fused=True)  # MAE's

    run = Run("cmae", cfg, here, len(batches))
    step = run.resume(model=model, optimizer=optimizer, boxes=boxes)
    if cfg.crop_from * len(batches) >= steps and here.rank == 0:
        run.tell(f"no ContrastiveCrop: training ends before --crop-from {cfg.crop_from} epochs are over")
    while step < steps and not run.stopped:
        seed_step(cfg.seed, step, here.rank)
        epoch, rest = divmod(step, len(batches))
        if not rest and epoch >= cfg.crop_from and (epoch - cfg.crop_from) % cfg.crop_every == 0:
            boxes.locate(model, data[0], here)  # §3.1
            if here.rank == 0:
                run.tell(f"mean box: {(boxes.boxes[:, 2:] - boxes.boxes[:, :2]).prod(1).mean():.2f} of the image")
        I = boxes.boxes[batches.ids(step)] if epoch >= cfg.crop_from else None  # (B, 4)
        images, aspect = batches[step]
        view1, view2 = views(images, cfg, aspect, I)
        with autocast(here.device, cfg.amp):
            losses = net(view1, view2)
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, peak)
        optimizer.step()
        optimizer.zero_grad()
        if cfg.lam_ctr > 0:
            m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2  # rises to 1, MoCo v3's way
            ema(model.M_E, model.encoder, m)  # average ← m·average + (1 - m)·model, §3.3
            ema(model.M_P, model.projection, m)

        step += 1
        run.log(step, losses, optimizer.param_groups[0]["lr"])
        run.save(step, data, test, model=model, optimizer=optimizer, boxes=boxes)
    return run.finish()


# Parts. Here p is the side of a patch, d = D/K the width of a head, width the decoder's; q, k, v are attention's.

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


def class_attention(block, x):
    """How the class token attends to the patches in `block`, which x (B, 1 + N, D) enters: (B, K, N). The product is
    summed in float32. A matrix product under autocast would be bfloat16, in which many patches come out equal."""
    qkv = block.attn.qkv(block.norm1(x)).float()  # (B, 1 + N, 3D)
    q, k, _ = qkv.unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, K, 1 + N, d) each, d = D/K
    return ((q[:, :, :1] * k).sum(3) / k.shape[3] ** 0.5).softmax(2)[:, :, 1:]


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

    def forward(self, x, ids=None, with_entering=False, add_positions=True):
        """Images (B, 3, H, W) → (B, 1 + V, D), class token first; with_entering: also what enters the last block, as
        large. Only the patches `ids` (B, V) are encoded; None: all N."""
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[:, 1:] * add_positions  # (B, N, D)
        x = x if ids is None else take(x, ids)  # (B, V, D)
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


class MlpBlock(nn.Module):
    """The half of Block without attention: each token on its own, the shape stays."""
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden, dim)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class ConvBlock(nn.Module):
    """§3.5's convolution (3, stride 1, padding 1) of each channel, then across channels; the class token stays."""
    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        bound = (6 / (9 + 9)) ** 0.5  # Xavier's, for the 9 inputs and 9 outputs that a place of a channel has
        self.kernel = nn.Parameter(torch.empty(dim, 1, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.fc = nn.Linear(dim, dim)

    def forward(self, x):
        image = self.norm(x[:, 1:]).mT.unflatten(2, (self.grid, self.grid))  # (B, width, n, n)
        image = F.conv2d(image, self.kernel, self.bias, padding=1, groups=len(self.kernel))  # each channel
        tokens = self.fc(F.gelu(image).flatten(2).mT)  # across channels, (B, N, width)
        return x + F.pad(tokens, (0, 0, 1, 0))  # 0 for the class token


def decoder_blocks(cfg):
    """The decoder's blocks by §3.5: all of one kind, or, in a hybrid, a transformer's but for the middle one."""
    width, depth, kind = cfg.decoder_dim, cfg.decoder_depth, cfg.decoder.removeprefix("hybrid-")
    make = {"transformer": lambda: Block(width, cfg.decoder_heads), "mlp": lambda: MlpBlock(width, 4 * width),
            "conv": lambda: ConvBlock(width, cfg.img // cfg.patch)}
    return [make[kind if kind == cfg.decoder or i == depth // 2 else "transformer"]() for i in range(depth)]


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


def main(argv=None):
    """The command line; returns the exit status."""
    return launch("cmae", Config, TINY, train, argv)


if __name__ == "__main__":
    sys.exit(main())
