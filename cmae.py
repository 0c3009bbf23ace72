"""CMAE: Jiawei Mao, Xuesong Yin, Yuanqi Chang and Honggu Zhou, "Improvements to Self-Supervised
Representation Learning for Masked Image Modeling", arXiv 2205.10546, 2022. The CMAE of Huang et
al., arXiv 2207.13532, is another method.

CMAE adds two tasks for the encoder E to a masked autoencoder. Contrast: E encodes one view, visible
and masked patches separately; the momentum encoder M_E encodes another; both are contrasted.
Location: a head predicts the position of each visible token. E also selects the area for crops.

One training step on B images of N patches, V visible, D the width of a token:
    I = rectangle around patches where E's heat map M > k     # Eq. 1     (B, 4), epochs 60, 120 …
    x_q, x_k = two crops centred in I, flipped at random      # §3.2      (B, 3, 224, 224)
    q1, q2 = E(visible of x_q), detach(E(masked of x_q))      # §3.3      (B, 1+V, D), (B, 1+N-V, D)
    k1, k2 = M_E(visible of x_k), M_E(masked of x_k)          # §3.3      the same shapes
    h1, h2 = restore([q1, q2]), restore([k1, k2])             # Eq. 2     (B, 1+N, D)
    z_q, z_k = P(mean of h1), M_P(mean of h2), L2-normalised  # §3.3      (B, D)
    L_ctr = InfoNCE(z_q, z_k)                                 # Eq. 3     a scalar
    L_loc = ‖p - t‖, p = MLP(MLP(q1)), t: one-hot positions   # Eq. 4, 5  a scalar, from (B, V, N)
    L_con = MSE(decoder(q1), x_q), masked patches only        # §3.5      a scalar
    step of AdamW on λ_ctr·L_ctr + λ_loc·L_loc + λ_con·L_con  # Eq. 6
    M_E, M_P ← m·(M_E, M_P) + (1 - m)·(E, P)                  # §3.3

The paper leaves these choices open, and they may change the result: --location-from,
--location-norm, --pool, --projection, --k, --heat, --img, --lr. papers/cmae.md has all.

    python cmae.py --data tiny-imagenet          the paper's run
    python cmae.py --tiny --data shapes          a first look on a laptop
    python eval_linear.py runs/cmae-DATE-TIME    accuracy

On an NVIDIA H200: 1,239 images/s. With --tiny --images 5000 --epochs 1 --no-amp --log-every 1 on
CIFAR-10 (JPEG) the loss falls from 6.59 to 4.45.
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

from augment import crop_boxes, crop_resize, normalize, random_hflip, random_resized_crop
from common import (Batches, Run, RunConfig, autocast, load_data, load_encoder, require,
                    run_program, seed_step, start_processes)


DECODERS = Literal["transformer", "mlp", "conv", "hybrid-mlp", "hybrid-conv"]


@dataclass
class Config(RunConfig):
    """Hyper-parameters of the paper. Each is a command-line flag."""
    mask: float = 0.75  # fraction of patches masked, §4.2
    lam_ctr: float = 1.0  # λ_ctr, weight of the contrastive loss, §3.6
    lam_loc: float = 1.0  # λ_loc, weight of the location prediction, §3.6
    lam_con: float = 1.0  # λ_con, weight of the reconstruction, §3.6
    tau: float = 0.07  # τ, temperature of Eq. 3; from [32], Wu et al.
    projection: Literal["linear", "mlp"] = "linear"  # P of §3.3: one layer, or MoCo v2's two
    pool: Literal["mean", "cls"] = "mean"  # P's input: mean of h's patch tokens or class token
    momentum: float = 0.99  # start value for M_E and M_P, rises to 1; MoCo v3's
    location_from: Literal["positions", "content"] = "positions"  # q1 with positions or without
    location_norm: Literal["norm", "squared"] = "norm"  # Eq. 5 as printed or squared
    heat: Literal["attention", "features"] = "attention"  # source of the heat map M, §3.2
    k: float = 0.1  # threshold of M, Eq. 1. Small ViT: boxes cover 96 % of images, 48 % at 0.7
    alpha: float = 0.6  # crop centres follow Beta(α, α) in I; ContrastiveCrop's
    crop_from: int = 60  # first epoch with boxes; ContrastiveCrop's, a fifth of all
    crop_every: int = 60  # epochs between updates of the boxes; also a fifth
    crop_min: float = 0.2  # smallest crop, fraction of the area; MAE's
    img: int = 224  # side of the views in pixels; MAE's, inferred: §4.1's images have 64
    patch: int = 16  # side of a patch in pixels; MAE's, inferred
    dim: int = 768  # width D of ViT-Base, §4.2
    depth: int = 12  # blocks of ViT-Base, §4.2
    heads: int = 12  # heads K of ViT-Base, §4.2
    decoder: DECODERS = "transformer"  # kind of decoder blocks, §3.5
    decoder_depth: int = 8  # blocks of the decoder; MAE's
    decoder_dim: int = 512  # width of the decoder: 512, 256, 128 or 64 in §3.5
    decoder_heads: int = 16  # heads of the decoder; MAE's
    epochs: float = 300  # passes over the data, §4.2
    batch: int = 64  # images per step and process, §4.2
    lr: float = 1e-3  # base learning rate, §4.2; for a batch of 256, inferred
    wd: float = 0.05  # weight decay, §4.2
    warmup: float = 40.0  # epochs of linear warm-up; MAE's, inferred

    def __post_init__(self):
        super().__post_init__()
        N = (self.img // self.patch) ** 2
        require(self.img % self.patch == 0, f"--patch {self.patch} must divide --img {self.img}")
        require(0 < round(self.mask * N) < N,
                f"--mask {self.mask} must leave some of {N} patches masked and some visible")
        require(self.dim % (4 * self.heads) == 0,
                f"--dim {self.dim} must be a multiple of 4 times --heads {self.heads}")
        require(self.decoder_dim % (4 * self.decoder_heads) == 0, f"--decoder-dim "
                f"{self.decoder_dim} must be a multiple of 4 times --decoder-heads")
        require(self.warmup < self.epochs, f"--warmup {self.warmup} must be below --epochs")
        require(min(self.tau, self.alpha, self.crop_every) > 0,
                "--tau, --alpha and --crop-every must be positive")
        require(self.lam_ctr + self.lam_loc + self.lam_con > 0,
                "one of --lam-ctr, --lam-loc, --lam-con must be positive")
        require(self.lam_ctr == 0 or self.batch > 1, "--batch 1 has no negatives; try --lam-ctr 0")
        require(0 < self.crop_min <= 1, "--crop-min must be above 0 and at most 1")
        require(max(self.k, self.momentum) <= 1, "--k and --momentum must be at most 1")
        trained = (self.lam_ctr > 0 and self.pool == "cls") or (
            self.lam_con > 0 and self.decoder not in ("mlp", "conv"))
        require(self.heat == "features" or trained,
                "--heat attention: no loss trains the class token's query; add --heat features")


TINY = Config(k=0.5, crop_from=1, crop_every=2, img=32, patch=4, dim=192, depth=4, heads=3,
              decoder_depth=2, decoder_dim=96, decoder_heads=3, epochs=8, batch=128, warmup=1.0,
              eval_every=1, tiny=True)


# The paper, §3. B: images. N = n·n: patches of an image. V: visible ones. P: the projection; in
# shapes, 3·patch². H = W = img. Encoder, Decoder and other parts: end of the file.

def views(images, cfg, boxes=None):
    """Two crops of each image, each flipped with probability 1/2. §3.2

    images: uint8 (B, 3, S, S) or an Images batch. boxes (B, 4): I of Eq. 1; None: plain crops.
    Returns x_q and x_k, normalised, (B, 3, img, img).
    """
    def augment():
        scale = (cfg.crop_min, 1.0)
        crop = (random_resized_crop(images, cfg.img, scale) if boxes is None else
                contrastive_crop(images, cfg.img, scale, boxes, cfg.alpha))
        return normalize(random_hflip(crop))
    return augment(), augment()


def contrastive_crop(images, size, scale, boxes, alpha):
    """R_crop(s, r, I) of Eq. 1: crops (B, 3, size, size) with centres in I (B, 4), after I is
    clamped to the centres of crops that fit."""
    H, W = getattr(images, "pixels", images).shape[2:]
    _, _, height, width = crop_boxes(images, scale)  # from s and r
    I_top, I_left, I_bottom, I_right = boxes.unbind(1)  # (B,) each
    down, across = torch.distributions.Beta(alpha, alpha).sample((2, len(images)))
    top = crop_start(I_top, I_bottom, height / H, down) * H
    left = crop_start(I_left, I_right, width / W, across) * W
    return crop_resize(images, [top.round().long(), left.round().long(), height, width], size)


def crop_start(low, high, length, t):
    """Starts of crops of `length`: centred at `low` if t = 0, at `high` if t = 1, both clamped
    into the image. All (B,), fractions of the side."""
    first, last = ((x - length / 2).clamp(min=0).minimum(1 - length) for x in (low, high))
    return torch.lerp(first, last, t)


def semantic_boxes(heat, k):
    """Rectangles around the patches where the heat map M (B, n, n) is above k; the whole image if
    none is. (B, 4): top, left, bottom, right, fractions of the side. I = F(1[M > k]) of Eq. 1"""
    hot, n = heat > k, heat.shape[1]  # 1[M > k]
    rows, columns = hot.any(2).int(), hot.any(1).int()  # (B, n)
    top, left = rows.argmax(1), columns.argmax(1)  # the first
    bottom, right = n - rows.flip(1).argmax(1), n - columns.flip(1).argmax(1)  # past the last
    return torch.stack([top, left, bottom, right], 1) / n  # Eq. 1


class Boxes(nn.Module):
    """The boxes I of all training images, (images, 4). A Module, so that checkpoints hold them."""
    def __init__(self, images):
        super().__init__()
        self.register_buffer("boxes", torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(images, 1))

    @torch.no_grad()
    def locate(self, model, pixels, device):
        """Computes all boxes from the heat maps of whole images, uint8 (images, 3, S, S)."""
        S = pixels.shape[2]
        for ids in torch.arange(len(pixels)).split(250):
            whole = [torch.full_like(ids, side) for side in (0, 0, S, S)]
            x = normalize(crop_resize(pixels[ids].to(device), whole, model.cfg.img))
            with autocast(device, model.cfg.amp):
                self.boxes[ids] = semantic_boxes(model.heat(x), model.cfg.k).cpu()


def random_mask(B, N, ratio, device=None):
    """Which of N patches are masked: bool (B, N), round(ratio·N) of them in each row."""
    return torch.rand(B, N, device=device).argsort(1) < round(ratio * N)


def visible_first(mask):
    """Ids (B, N) of the patches in order, visible ones before masked ones."""
    return mask.int().argsort(dim=1, stable=True)


def take(x, ids):
    """The tokens `ids` (B, V) of x (B, N, D): (B, V, D)."""
    return x.take_along_dim(ids[:, :, None], 1)


def restore(q1, q2, order):
    """Merges the tokens q1 (B, 1 + V, D) and q2 (B, 1 + N - V, D) in image order, (B, 1 + N, D),
    and averages their class tokens. order (B, N): patch ids of q1, then of q2. Eq. 2"""
    x = torch.cat([q1[:, 1:], q2[:, 1:]], 1)  # concat, (B, N, D)
    # Both values of --pool ignore the order. It would matter if P read the flattened h or if
    # Eq. 3 contrasted single tokens.
    x = take(x, order.argsort(1))  # restore
    return torch.cat([(q1[:, :1] + q2[:, :1]) / 2, x], 1)


class CMAE(nn.Module):
    """The autoencoder, the momentum encoder and three tasks, Figure 1."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.grid, D = cfg, cfg.img // cfg.patch, cfg.dim  # grid is n
        self.N = self.grid ** 2
        self.V = self.N - round(cfg.mask * self.N)
        self.encoder = Encoder(cfg.img, cfg.patch, D, cfg.depth, cfg.heads, cfg.pool)  # E
        self.projection = nn.Linear(D, D) if cfg.projection == "linear" else mlp(D, D, D)  # P
        self.projection.apply(init_weights)
        self.M_E = copy.deepcopy(self.encoder).requires_grad_(False)  # §3.3
        self.M_P = copy.deepcopy(self.projection).requires_grad_(False)
        self.location = mlp(D, D, self.N).apply(init_weights)  # §3.4
        nn.init.zeros_(self.location.fc2.weight)  # else L_loc dominates E's gradient
        width = cfg.decoder_dim
        blocks = decoder_blocks(cfg.decoder, cfg.decoder_depth, width, cfg.decoder_heads, self.grid)
        self.decoder = Decoder(cfg.img, cfg.patch, D, width, blocks)  # §3.5
        self.projection.requires_grad_(cfg.lam_ctr > 0)
        self.location.requires_grad_(cfg.lam_loc > 0)
        self.decoder.requires_grad_(cfg.lam_con > 0)

    def forward(self, x_q, x_k, mask_q=None, mask_k=None):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 6, "contrast": Eq. 3, "location": Eq. 5,
        "reconstruction"}, without terms of weight 0. Masks (B, N): True is masked; None: random."""
        cfg, V = self.cfg, self.V
        L_ctr, L_loc, L_con, losses = 0, 0, 0, {}
        if mask_q is None:
            mask_q = random_mask(len(x_q), self.N, cfg.mask, x_q.device)        # §3.3, (B, N)
        order_q = visible_first(mask_q)                                         # (B, N)
        visible_ids, masked_ids = order_q[:, :V], order_q[:, V:]
        q1 = self.encoder(x_q, visible_ids)                                     # (B, 1 + V, D)

        if cfg.lam_ctr > 0:
            if mask_k is None:
                mask_k = random_mask(len(x_k), self.N, cfg.mask, x_k.device)    # §3.3, (B, N)
            order_k = visible_first(mask_k)
            with torch.no_grad():                                               # detach of Eq. 2
                q2 = self.encoder(x_q, masked_ids)                              # (B, 1 + N - V, D)
                k1, k2 = self.M_E(x_k, order_k[:, :V]), self.M_E(x_k, order_k[:, V:])
            h1, h2 = restore(q1, q2, order_q), restore(k1, k2, order_k)         # Eq. 2
            z_q = gather(self.projection(self.encoder.vector(h1)))              # (world·B, D)
            z_k = gather(self.M_P(self.M_E.vector(h2)))                         # (world·B, D)
            L_ctr = losses["contrast"] = info_nce_loss(z_q, z_k, cfg.tau)       # Eq. 3

        if cfg.lam_loc > 0:
            tokens = q1
            if cfg.location_from == "content":
                tokens = self.encoder(x_q, visible_ids, add_positions=False)
            with torch.autocast(x_q.device.type, enabled=False):  # bfloat16 is too coarse for p - t
                p = self.location(tokens[:, 1:].float())                        # Eq. 4, (B, V, N)
            L_loc = losses["location"] = location_loss(p, visible_ids, cfg.location_norm)  # Eq. 5

        if cfg.lam_con > 0:
            y = self.decoder(q1, visible_ids)                                   # §3.5, (B, N, P)
            L_con = reconstruction_loss(y, patchify(x_q, cfg.patch), mask_q)    # §3.5
            losses["reconstruction"] = L_con
        loss = cfg.lam_ctr * L_ctr + cfg.lam_loc * L_loc + cfg.lam_con * L_con  # Eq. 6
        return {"loss": loss, **losses}

    def heat(self, x):
        """Normalised images (B, 3, H, W) → the heat map M of Eq. 1, (B, n, n), from 0 to 1."""
        if self.cfg.heat == "attention":
            heat = self.encoder.attention(x).mean(1)  # (B, N)
        else:
            tokens = self.encoder.blocks[-1](self.encoder.last_block_input(x))  # before the norm
            heat = tokens[:, 1:].abs().mean(2)  # (B, N)
        heat = heat - heat.amin(1, keepdim=True)
        heat = heat / heat.amax(1, keepdim=True).clamp(min=1e-12)
        return heat.unflatten(1, (self.grid, self.grid))

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.
        The prediction shows visible patches as they are in x."""
        p, patches = self.cfg.patch, patchify(x, self.cfg.patch)  # (B, N, P)
        mask = random_mask(len(x), self.N, self.cfg.mask, x.device)
        visible_ids = visible_first(mask)[:, :self.V]
        y = self.decoder(self.encoder(x, visible_ids), visible_ids).float()  # (B, N, P)
        y = torch.where(mask[:, :, None], y, patches)
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), p), unpatchify(y, p)


Model = CMAE


def info_nce_loss(q, k, tau):
    """InfoNCE of each q[i] with its positive k[i] among all k, rows (B, D). Eq. 3"""
    with torch.autocast(q.device.type, enabled=False):
        # Eq. 3 prints a plain dot product. [32], cited for τ, normalises the vectors.
        logits = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).mT / tau
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))  # Eq. 3


def location_loss(p, positions, norm="norm"):
    """Mean distance of predictions p (B, V, N) from the one-hot true positions (B, V). Eq. 5"""
    t = F.one_hot(positions, p.shape[2])  # (B, V, N)
    distance = (p.float() - t).norm(dim=2)  # Eq. 5, (B, V)
    return (distance.square() if norm == "squared" else distance).mean()


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is True: L_con of §3.5"""
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
    model, boxes = CMAE(cfg).to(device), Boxes(len(train_set))
    if cfg.init:
        load_encoder(model.encoder, cfg.init)
        load_encoder(model.M_E, cfg.init)
    net = DistributedDataParallel(model) if world > 1 else model
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), betas=(0.9, 0.95), fused=True)

    run = Run(__file__, cfg, batches, steps, model=model, optimizer=optimizer, boxes=boxes)
    if cfg.crop_from >= cfg.epochs and rank == 0:
        print(f"no ContrastiveCrop: --crop-from {cfg.crop_from} is not below --epochs")
    for step in range(run.start, steps):
        seed_step(cfg.seed, step, rank)                           # exact resume
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, warmup, cfg.lr * cfg.batch * world / 256)

        epoch, i = divmod(step, len(batches))
        since = epoch - cfg.crop_from
        if i == 0 and since >= 0 and since % cfg.crop_every == 0:  # §3.1
            boxes.locate(model, train_set.pixels, device)
            area = (boxes.boxes[:, 2:] - boxes.boxes[:, :2]).prod(1).mean()
            if rank == 0:
                print(f"epoch {epoch}: boxes cover {area:.0%} of images")
        I = boxes.boxes[batches.ids(step)] if epoch >= cfg.crop_from else None  # (B, 4)
        view1, view2 = views(batches[step], cfg, I)
        with autocast(device, cfg.amp):
            losses = net(view1, view2)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if cfg.lam_ctr > 0:
            m = 1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / steps)) / 2  # rises to 1
            ema(model.M_E, model.encoder, m)  # §3.3
            ema(model.M_P, model.projection, m)

        run.log(step, losses)
        if run.epoch_done(step):                                  # or the last step, or Ctrl-C
            run.save(step)
            run.evaluate(train_set, test_set)                     # kNN, effective rank
            run.draw(test_set or train_set)                       # curves, reconstruction
        if run.interrupted:
            break
    return run.finish()


# Parts. K heads, each d = D/K wide. width: the decoder's.

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


def class_attention(block, x):
    """Attention of the class token to the patches in `block`, whose input is x (B, 1 + N, D):
    (B, K, N). Scores in float32, because in bfloat16 many are equal."""
    qkv = block.attn.qkv(block.norm1(x)).float()                                # (B, 1 + N, 3D)
    q, k, _ = qkv.unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q[:, :, :1] * k).sum(3) / k.shape[3] ** 0.5                       # (B, K, 1 + N)
    return scores.softmax(2)[:, :, 1:]


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

    def last_block_input(self, x, ids=None, add_positions=True):
        """Images (B, 3, H, W) → the tokens (B, 1 + V, D) that enter the last block."""
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[:, 1:] * add_positions
        x = x if ids is None else take(x, ids)  # (B, V, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # (B, 1 + V, D)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def forward(self, x, ids=None, add_positions=True):
        """Images (B, 3, H, W) → tokens (B, 1 + V, D) of the patches ids (B, V), class token first.
        ids None: all N."""
        return self.norm(self.blocks[-1](self.last_block_input(x, ids, add_positions)))

    def vector(self, z):
        """One vector (B, D) for the tokens (B, 1 + V, D) of an image."""
        return z[:, 1:].float().mean(1) if self.pool == "mean" else z[:, 0].float()

    def tokens(self, x):
        """Patch tokens of whole images, (B, 3, H, W) → (B, N, D)."""
        return self(x)[:, 1:]

    def features(self, x):
        """One vector for each whole image, (B, 3, H, W) → (B, D)."""
        return self.vector(self(x))

    def attention(self, x):
        """The class token's attention in the last block, (B, 3, H, W) → (B, K, N)."""
        return class_attention(self.blocks[-1], self.last_block_input(x))


class MlpBlock(nn.Module):
    """A Block without attention: it processes each token separately."""
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden, dim)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class ConvBlock(nn.Module):
    """A depthwise 3×3 convolution and a linear layer. The class token stays as it is."""
    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        bound = (6 / (9 + 9)) ** 0.5  # Xavier's for 9 inputs and 9 outputs
        self.kernel = nn.Parameter(torch.empty(dim, 1, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.fc = nn.Linear(dim, dim)

    def forward(self, x):
        image = self.norm(x[:, 1:]).mT.unflatten(2, (self.grid, self.grid))  # (B, width, n, n)
        image = F.conv2d(image, self.kernel, self.bias, padding=1, groups=len(self.kernel))
        tokens = self.fc(F.gelu(image).flatten(2).mT)  # (B, N, width)
        return x + F.pad(tokens, (0, 0, 1, 0))  # 0 for the class token


def decoder_blocks(kind, depth, width, heads, grid):
    """The blocks of a decoder of §3.5. A hybrid replaces the middle block of a transformer."""
    make = {"transformer": lambda: Block(width, heads), "mlp": lambda: MlpBlock(width, 4 * width),
            "conv": lambda: ConvBlock(width, grid)}
    middle, rest = kind.removeprefix("hybrid-"), "transformer" if "hybrid" in kind else kind
    return [make[middle if i == depth // 2 else rest]() for i in range(depth)]


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
