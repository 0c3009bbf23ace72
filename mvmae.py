"""Multi-View MAE: Seungbin Ji, Sangkwon Han and Jongtae Rhee, "Multi-View Masked Autoencoder for
General Image Representation", Applied Sciences 13(22), 12413, 2023, doi:10.3390/app132212413.

Two crops of each image are taken, 80 % of the patches of each are masked, and one autoencoder
reconstructs both crops. The latents of the visible patches are contrasted: those of one image
attract, those of different images repel. Masking serves as the strong augmentation.

One training step on B images of N patches (V visible, P values each). D: token width.
    view1, view2 = two crops of each, flipped at random    # §3.1.1    (B, 3, 224, 224), normalised
    mask = 80 % of the patches of each view, at random     # §3.1.2    (2·B, N)
    z = f(visible patches + positions)                     # Eq. 1, 2  (2·B, 1 + V, D)
    y = g(z and mask tokens, + positions)                  # §3.1.4    (2·B, N, P)
    L_r = MSE(y, views), masked patches only               # Eq. 3     a scalar
    z1, z2 = mean of the patch tokens in z                 # --pool    (B, D)
    L_c = NT-Xent(z1, z2)                                  # Eq. 4–6   a scalar
    step of AdamW on L_r + λ·L_c                           # Eq. 7

The paper leaves these choices open, and they may change the result: --pool, --norm-pixels,
--pixels, --crop-min, and a projection head (here none). papers/mvmae.md has every choice.

    python mvmae.py --data PATH                  the paper's run on ImageNet-1K
    python mvmae.py --tiny --data shapes         a first look on a laptop
    python eval_linear.py runs/mvmae-DATE-TIME   accuracy; eval_finetune.py: fine-tuned

On an NVIDIA H200: 2,711 images/s. With --tiny --images 5000 --epochs 1 --no-amp on CIFAR-10
(JPEG), the loss is 11.562 at step 1 and 6.914 on average in the last 19 steps.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from augment import normalize, random_hflip, random_resized_crop
from common import (Batches, Run, RunConfig, autocast, load_data, load_encoder, require,
                    run_program, seed_step, start_processes)


@dataclass
class Config(RunConfig):
    """Hyper-parameters of the paper. Each is a command-line flag."""
    mask: float = 0.8  # fraction of the patches that is masked, Table 5
    lam: float = 2.0  # λ, weight of the contrastive loss, Table 5; 0 leaves it out
    tau: float = 0.07  # τ, temperature, §3.2.2
    targets: Literal["two", "same", "one"] = "two"  # two crops; one crop masked twice; one view
    pool: Literal["mean", "cls"] = "mean"  # vector of Eq. 4: mean of patch tokens or class token
    pixels: Literal["masked", "all"] = "masked"  # patches in Eq. 3; MAE's: masked
    norm_pixels: bool = False  # normalise target patches, MAE's variant; §4.1.1 may mean it
    crop_min: float = 0.2  # smallest crop, fraction of the area; MAE's
    img: int = 224  # side of the views in pixels, §4.1.1
    patch: int = 16  # side of a patch in pixels, §4.1.1
    dim: int = 768  # width D, §4.1.1
    depth: int = 12  # blocks, §4.1.1
    heads: int = 12  # heads K; ViT-Base's
    decoder_depth: int = 4  # blocks of the decoder, Table 5 and §4.2.1
    decoder_dim: int = 512  # width of the decoder; MAE's
    decoder_heads: int = 16  # heads of the decoder; MAE's
    epochs: float = 1600  # passes over the data, §4.1.1
    batch: int = 256  # images per step and process; 256 in all in §4.1.1
    lr: float = 1.5e-4  # learning rate for a batch of 256, §4.1.1; scaled with the batch, as in MAE
    wd: float = 0.05  # weight decay; MAE's
    warmup: float = 40.0  # epochs of linear warm-up, §4.1.1

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
        require(self.tau > 0, "--tau must be positive")
        require(self.lam == 0 or self.targets != "one", "--targets one has no pairs: add --lam 0")
        require(self.lam == 0 or self.batch > 1, "--batch 1 has no negatives; try --lam 0")
        require(0 < self.crop_min <= 1, "--crop-min must be above 0 and at most 1")


# The learning rate is higher than the paper's because the training is short.
TINY = Config(img=32, patch=4, dim=192, depth=4, heads=3, decoder_depth=2, decoder_dim=96,
              decoder_heads=3, epochs=16, batch=128, lr=1e-3, warmup=1.0, eval_every=1, tiny=True)


# The paper, §3. B: images (the paper's N). N: patches of an image. V: visible patches. P = 3·p·p:
# values of a patch of p×p pixels. H = W = img. views: 2, or 1 with --targets one. Encoder, Decoder
# and other parts are at the end of the file. In small functions B is any batch size.

def views(images, cfg):
    """Two crops of each image, each flipped with probability 1/2. §3.1.1

    images: uint8 (B, 3, S, S) or an Images batch. Returns view1 and view2, normalised,
    (B, 3, img, img): equal unless --targets is two.
    """
    def augment():
        crop = random_resized_crop(images, cfg.img, (cfg.crop_min, 1.0), kernel="bicubic")
        return normalize(random_hflip(crop))
    view1 = augment()
    return view1, (augment() if cfg.targets == "two" else view1)


def random_mask(B, N, ratio, device=None):
    """Which of N patches are masked: bool (B, N), round(ratio·N) of them in each row."""
    return torch.rand(B, N, device=device).argsort(1) < round(ratio * N)


def visible_first(mask):
    """Ids (B, N) of the patches in order, visible ones before masked ones."""
    return mask.int().argsort(dim=1, stable=True)


def take(x, ids):
    """The tokens `ids` (B, V) of x (B, N, D): (B, V, D)."""
    return x.take_along_dim(ids[:, :, None], 1)


class MVMAE(nn.Module):
    """One autoencoder for all views, §3 and Figures 3 and 4: `encoder` is f, `decoder` is g."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.N = (cfg.img // cfg.patch) ** 2
        self.V = self.N - round(cfg.mask * self.N)
        self.encoder = Encoder(cfg.img, cfg.patch, cfg.dim, cfg.depth, cfg.heads, cfg.pool)
        blocks = [Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
        self.decoder = Decoder(cfg.img, cfg.patch, cfg.dim, cfg.decoder_dim, blocks)

    def forward(self, view1, view2, mask=None):
        """Normalised views (B, 3, H, W) → {"loss": Eq. 7, "reconstruction": Eq. 3, "contrast":
        Eq. 6}; no contrast if λ is 0. mask (views·B, N): True is masked; None: random."""
        cfg = self.cfg
        x = view1 if cfg.targets == "one" else torch.cat([view1, view2])        # (views·B, 3, H, W)
        if mask is None:
            mask = random_mask(len(x), self.N, cfg.mask, x.device)              # §3.1.2
        visible_ids = visible_first(mask)[:, :self.V]                           # Eq. 1
        z = self.encoder(x, visible_ids)                          # Eq. 2, (views·B, 1 + V, D)
        y = self.decoder(z, visible_ids)                          # §3.1.4, (views·B, N, P)

        target = patchify(x, cfg.patch)                                         # (views·B, N, P)
        target = normalize_patches(target) if cfg.norm_pixels else target       # MAE's variant
        counted = mask if cfg.pixels == "masked" else torch.ones_like(mask)
        L_r = reconstruction_loss(y, target, counted)   # Eq. 3, over masked patches as in MAE
        if cfg.lam == 0:
            return {"loss": L_r, "reconstruction": L_r}

        z1, z2 = self.encoder.vector(z).chunk(2)                                # (B, D) each
        z1, z2 = gather(z1), gather(z2)                                         # (world·B, D)
        L_c = nt_xent_loss(z1, z2, cfg.tau)                                     # Eq. 4, 5, 6
        return {"loss": L_r + cfg.lam * L_c, "reconstruction": L_r, "contrast": L_c}  # Eq. 7

    @torch.no_grad()
    def reconstruct(self, x):
        """Normalised images (B, 3, H, W) → (masked input, prediction), both normalised images.

        With --norm-pixels each predicted patch gets its true mean and std. Visible patches
        are shown as they are, or as predicted with --pixels all.
        """
        p, patches = self.cfg.patch, patchify(x, self.cfg.patch)                # (B, N, P)
        mask = random_mask(len(x), self.N, self.cfg.mask, x.device)             # (B, N)
        visible_ids = visible_first(mask)[:, :self.V]                           # (B, V)
        y = self.decoder(self.encoder(x, visible_ids), visible_ids).float()     # (B, N, P)
        y = denormalize_patches(y, patches) if self.cfg.norm_pixels else y
        if self.cfg.pixels == "masked":
            y = torch.where(mask[:, :, None], y, patches)
        return unpatchify(patches.masked_fill(mask[:, :, None], 0), p), unpatchify(y, p)


Model = MVMAE


def reconstruction_loss(pred, target, mask):
    """Mean squared error of (B, N, P) over the patches where mask (B, N) is True. Eq. 3, over
    masked patches as in MAE"""
    error = (pred.float() - target.float()).square().mean(2)                    # (B, N)
    return (error * mask).sum() / mask.sum()


def nt_xent_loss(z1, z2, tau):
    """NT-Xent of the pairs z1[i], z2[i] (B, D): mean over all 2B ordered pairs. Eq. 4 to 6"""
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)                     # (2B, D)
        logits = z @ z.mT / tau                                                 # Eq. 5, (2B, 2B)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = logits.masked_fill(itself, -torch.inf)                         # Eq. 4, k ≠ i
        partner = torch.arange(len(z), device=z.device).roll(len(z1))           # j of i
        return F.cross_entropy(logits, partner)                                 # Eq. 4, Eq. 6


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
    model = MVMAE(cfg).to(device)
    if cfg.init:
        load_encoder(model.encoder, cfg.init)
    net = DistributedDataParallel(model) if world > 1 else model
    net = torch.compile(net, options={"fallback_random": True}) if cfg.compile else net
    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), betas=(0.9, 0.95), fused=True)

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

        run.log(step, losses)
        if run.epoch_done(step):                                  # or the last step, or Ctrl-C
            run.save(step)
            run.evaluate(train_set, test_set)                     # kNN, effective rank
            run.draw(test_set or train_set)                       # curves, reconstruction
        if run.interrupted:
            break
    return run.finish()


# Parts. K heads, each d = D/K wide.

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
