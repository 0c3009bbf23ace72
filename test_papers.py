"""The papers' tests: each method's formulas against loops written from the paper, and what only this method has."""
import math, time
from dataclasses import replace

import pytest
import torch

import common, mclim, mvmae
from test_smoke import SMALL, build, few, normal  # few is a fixture

BACKBONES = [SMALL["mclim"], replace(SMALL["mclim"], backbone="swin", dim=192),
             replace(SMALL["mclim"], backbone="hivit", dim=192)]


# Losses

def paper_terms(z1, z2, tau):
    """For each k and i: the positive <z_i^1, z_i^2>/τ and U_{i,k} of Eq. 8, in plain Python."""
    z = {l: [[float(c) / math.sqrt(sum(float(d) ** 2 for d in row)) for c in row] for row in batch]
         for l, batch in ((1, z1), (2, z2))}

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b))

    for k in (1, 2):
        for i in range(len(z1)):
            U = sum(math.exp(dot(z[k][i], z[l][j]) / tau) for l in (1, 2) for j in range(len(z1)) if j != i)
            yield dot(z[1][i], z[2][i]) / tau, U


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_contrastive_losses_are_the_formulas(tau):
    z1, z2 = normal(5, 7), normal(5, 7, seed=1)
    terms = list(paper_terms(z1, z2, tau))
    dcl = sum(-p + math.log(U) for p, U in terms) / len(terms)                             # Eq. 9
    nce = sum(-math.log(math.exp(p) / (math.exp(p) + U)) for p, U in terms) / len(terms)   # Eq. 7
    assert mclim.dcl_loss(z1, z2, tau).item() == pytest.approx(dcl, rel=1e-5)
    assert mclim.info_nce_loss(z1, z2, tau).item() == pytest.approx(nce, rel=1e-5)


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_nt_xent_is_equations_4_to_6(tau):
    """In the paper's order 2k - 1, 2k: the two views of an image are neighbours."""
    z1, z2 = normal(5, 7), normal(5, 7, seed=1)
    z = [row for pair in zip(z1.tolist(), z2.tolist()) for row in pair]

    def sim(a, b):                                                                         # Eq. 5
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    def loss(i, j):                                                                        # Eq. 4
        total = sum(math.exp(sim(z[i], z[k]) / tau) for k in range(len(z)) if k != i)
        return -math.log(math.exp(sim(z[i], z[j]) / tau) / total)

    expected = sum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(5)) / 10   # Eq. 6
    assert mvmae.nt_xent_loss(z1, z2, tau).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [mclim.dcl_loss, mclim.info_nce_loss, mvmae.nt_xent_loss], ids=lambda f: f.__name__)
def test_contrastive_losses_stay_in_float32_under_autocast(loss):
    z1, z2 = normal(8, 16), normal(8, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(z1, z2, 0.1)
    assert torch.equal(inside, loss(z1, z2, 0.1)) and inside.dtype == torch.float32


def test_reconstruction_loss_is_the_formula():
    pred, target, mask = normal(3, 4, 5), normal(3, 4, 5, seed=1), torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [1] * 4])
    errors = [(pred[b, n, p] - target[b, n, p]).item() ** 2 for b in range(3) for n in range(4) for p in range(5)
              if mask[b, n]]
    loss = mclim.reconstruction_loss(pred, target, mask.bool()).item()
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert mclim.reconstruction_loss(pred, target, torch.zeros(3, 4)).item() == 0
    patches = mclim.normalize_patches(3 * normal(2, 4, 48) + 5)
    assert patches.mean(2).abs().max() < 1e-5 and (patches.std(2) - 1).abs().max() < 1e-4


def test_unmasked_targets_do_not_matter_to_the_prediction_loss():
    pred, target, mask = normal(2, 6, 5), normal(2, 6, 5, seed=1), torch.tensor([[1, 0, 1, 0, 0, 1]] * 2).bool()
    before = mclim.reconstruction_loss(pred, target, mask)
    assert torch.equal(before, mclim.reconstruction_loss(pred, target + 9 * ~mask[:, :, None], mask))
    assert not torch.equal(before, mclim.reconstruction_loss(pred, target + 9 * mask[:, :, None], mask))


# MCLim

def test_mask_is_aligned_to_blocks():
    mask = mclim.random_mask(3, 4, 0.5)
    fine = mclim.spread(mask, 12)
    for y in range(12):
        for x in range(12):
            assert torch.equal(fine[:, y, x], mask[:, y // 3, x // 3])


@pytest.mark.parametrize("backbone, millions", [("vit", 43.12), ("swin", 48.88), ("hivit", 34.32)])
def test_parameters_of_table_1(backbone, millions):
    encoder = mclim.MCLim(mclim.Config(backbone=backbone, contrast="none")).encoder
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("cfg", BACKBONES, ids=lambda cfg: cfg.backbone)
def test_masked_pixels_do_not_reach_the_encoder(cfg):
    model, x = build(cfg), normal(4, 3, 16, 16)
    with torch.no_grad():
        model.mask_token.normal_()
    mask = mclim.random_mask(4, model.blocks, 0.5)
    hidden = mclim.spread(mask, 16)[:, None]
    tokens, other_masked, other_visible = (model.encoder(image, mask, model.mask_token) for image in
                                           (x, torch.where(hidden, 7.0, x), torch.where(hidden, x, 7.0)))
    assert torch.equal(tokens, other_masked) and not torch.allclose(tokens, other_visible)


@pytest.mark.parametrize("cfg", BACKBONES, ids=lambda cfg: cfg.backbone)
@pytest.mark.parametrize("head", ["linear", "mlp", "vit"])
def test_gradients_leave_out_branch_2_and_the_patch_embedding(cfg, head):
    model = build(replace(cfg, head=head))
    model(normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))["loss"].backward()
    for name, p in model.named_parameters():
        frozen = name.startswith(("F2.", "T2.", "encoder.patch_embed." + "0." * (cfg.backbone == "swin")))
        assert p.requires_grad != frozen, name
        assert p.grad is None if frozen else p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cfg", BACKBONES, ids=lambda cfg: cfg.backbone)
def test_backbones_for_evaluation(cfg):
    model, x = build(cfg), normal(4, 3, 16, 16)
    features, attention = model.encoder.features(x), model.encoder.attention(x)
    assert features.shape == (4, model.encoder.dim) and torch.equal(features, model.encoder.features(x))
    assert torch.allclose(features, model.encoder(x).mean(1))
    assert attention.shape[::2] == (4, (16 // model.encoder.stride) ** 2)
    assert torch.allclose(attention.sum(2), torch.ones(attention.shape[:2]))
    masked, prediction = model.reconstruct(x)
    visible = masked == x
    assert visible.float().mean() == pytest.approx(1 - round(0.6 * model.blocks ** 2) / model.blocks ** 2)
    assert torch.allclose(prediction[visible], x[visible]) and not torch.allclose(prediction, x)


@pytest.mark.parametrize("change", [{}, {"l1": "rec"}, {"contrast": "infonce", "lam": 0.5}, {"target": "shared"}])
def test_forward_is_section_2(change):
    cfg = replace(SMALL["mclim"], **change)
    torch.manual_seed(0)
    model, view1, view2 = mclim.MCLim(cfg), normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1)
    if cfg.target == "momentum":
        with torch.no_grad():
            model.F2.norm.weight.add_(0.1)  # so that the branches differ
    torch.manual_seed(5)
    losses = model(view1, view2)
    torch.manual_seed(5)
    mask = mclim.random_mask(6, 4, cfg.mask)
    Z1 = model.T1(model.encoder(view1, mask, model.mask_token))                            # Eq. 1, 3
    target = mclim.normalize_patches(mclim.patchify(view1, 4))
    L1 = (Z1 - target).square()[mask.flatten(1)] if cfg.l1 == "pre" else (Z1 - target).square()
    z1, z2 = Z1.mean(1), model.T2(model.F2(view2)).mean(1)                                 # Eq. 2, 5
    L2 = (mclim.dcl_loss if cfg.contrast == "dcl" else mclim.info_nce_loss)(z1, z2, cfg.tau)
    assert losses["reconstruction"].item() == pytest.approx(L1.mean().item(), rel=1e-5)    # Eq. 4, 6
    assert losses["contrast"].item() == pytest.approx(L2.item(), rel=1e-5)                 # Eq. 7 to 9
    assert losses["loss"].item() == pytest.approx((cfg.lam * L1.mean() + L2).item(), rel=1e-5)  # Eq. 10


def test_moco_v3_and_simmim_fall_out_of_flags():
    view1, view2 = normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1)
    moco = mclim.MCLim(replace(SMALL["mclim"], mask=0.0, lam=0.0))
    losses = moco(view1, view2)
    z = [part(net(view)).mean(1) for part, net, view in ((moco.T1, moco.encoder, view1), (moco.T2, moco.F2, view2))]
    assert losses["reconstruction"] == 0 and not moco.mask_token.requires_grad
    assert losses["loss"].item() == pytest.approx(mclim.dcl_loss(*z, moco.cfg.tau).item(), rel=1e-5)
    simmim = mclim.MCLim(replace(SMALL["mclim"], contrast="none"))
    losses = simmim(view1, view2)
    assert set(losses) == {"loss", "reconstruction"} and losses["loss"] == losses["reconstruction"]
    assert not hasattr(simmim, "F2")


def test_branch_2_is_the_momentum_average(few, tmp_path):
    cfg = replace(SMALL["mclim"], batch=32, epochs=1, warmup=0, momentum=0.9, amp=False, out=str(tmp_path / "run"))
    mclim.train(cfg)                                                                       # one step
    torch.manual_seed(cfg.seed)
    start, end = mclim.MCLim(cfg).state_dict(), common.load_checkpoint(tmp_path / "run")["model"]
    for two, one, part in (("F2.", "encoder.", "blocks.0.attn.qkv.weight"), ("T2.", "T1.", "fc2.bias")):
        two, one = two + part, one + part
        assert not torch.equal(end[one], start[one])
        assert torch.allclose(end[two], 0.9 * start[two] + 0.1 * end[one], atol=1e-7)
    assert torch.equal(end["encoder.patch_embed.proj.weight"], start["encoder.patch_embed.proj.weight"])


def test_views_are_section_2_1():
    cfg = replace(SMALL["mclim"], img=24, patch=4)
    batch = (255 * torch.rand(6, 3, 16, 16)).byte()
    view1, view2 = mclim.views(batch, cfg)
    assert view1.shape == view2.shape == (6, 3, 24, 24) and view1.dtype == torch.float32
    plain = replace(cfg, crop_min=1.0, crop_max=1.0, jitter=0.0, gray=0.0)
    flat = (255 * torch.rand(6, 3, 1, 1)).byte().expand(6, 3, 16, 16)
    expected = common.normalize(flat[:, :, :1, :1] / 255)
    assert all(torch.allclose(view, expected, atol=1e-5) for view in mclim.views(flat, plain))
    view1, view2 = mclim.views(flat, replace(plain, gray=1.0))  # only branch 2 is changed
    grey = common.denormalize(view2)
    assert torch.allclose(view1, expected, atol=1e-5) and (grey - grey.mean(1, keepdim=True)).abs().max() < 1e-5
    assert not torch.allclose(mclim.views(flat, replace(plain, jitter=1.0))[1], expected, atol=1e-2)


# Multi-View MAE

def test_parameters_of_vit_base():
    encoder = mvmae.Encoder(mvmae.Config())
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 85.65           # timm's, without positions


def test_visible_patches_come_first_and_in_order():
    mask = mvmae.random_mask(5, 4, 0.8).flatten(1)
    ids = mvmae.visible_first(mask)
    assert ids.tolist() == [sorted(range(16), key=lambda i: row[i]) for row in mask.tolist()]
    x = normal(5, 16, 7)
    assert all(torch.equal(mvmae.take(x, ids[:, :3])[b, v], x[b, ids[b, v]]) for b in range(5) for v in range(3))


def test_masked_pixels_do_not_reach_the_latent():
    model, x = build(SMALL["mvmae"]), normal(4, 3, 16, 16)
    mask = mvmae.random_mask(4, 4, 0.8)
    visible = mvmae.visible_first(mask.flatten(1))[:, :3]
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    latent, other_masked, other_visible = (model.encoder(image, visible) for image in
                                           (x, torch.where(hidden, 7.0, x), torch.where(hidden, x, 7.0)))
    assert latent.shape == (4, 1 + 3, 48)
    assert torch.equal(latent, other_masked) and not torch.allclose(latent, other_visible)


def test_time_falls_with_the_mask_ratio():
    cfg, x = replace(mvmae.TINY, img=64), normal(8, 3, 64, 64)                             # 256 patches
    encoder = build(cfg).encoder
    seconds = {}
    for ratio in (0.2, 0.5, 0.8):
        mask = mvmae.random_mask(8, 16, ratio).flatten(1)
        visible = mvmae.visible_first(mask)[:, :256 - round(ratio * 256)]
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            encoder(x, visible).sum().backward()
            times.append(time.perf_counter() - begin)
        seconds[ratio] = min(times)
    assert seconds[0.8] < 0.7 * seconds[0.5] and seconds[0.5] < 0.9 * seconds[0.2], seconds


def mae_loss(model, x, mask, norm_pixels=False):
    """MAE's loss as MAE computes it: patches shuffled, the first kept, mask tokens appended, all unshuffled."""
    encoder, decoder, p = model.encoder, model.decoder, model.cfg.patch
    B, N = mask.shape
    shuffled = mask.int().argsort(dim=1)                                                   # the kept ones first
    kept = N - int(mask[0].sum())
    patches = torch.stack([x[:, :, i:i + p, j:j + p].permute(0, 2, 3, 1).flatten(1)        # (row, column, channel)
                           for i in range(0, 16, p) for j in range(0, 16, p)], 1)
    tokens = encoder.patch_embed(x).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
    tokens = torch.stack([tokens[b, shuffled[b, :kept]] for b in range(B)])
    tokens = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(B, 1, -1), tokens], 1)
    for block in encoder.blocks:
        tokens = block(tokens)
    tokens = decoder.embed(encoder.norm(tokens))
    full = torch.cat([tokens[:, 1:], decoder.mask_token.expand(B, N - kept, -1)], 1)
    full = torch.stack([full[b, shuffled[b].argsort()] for b in range(B)])
    full = torch.cat([tokens[:, :1], full], 1) + decoder.pos_embed
    for block in decoder.blocks:
        full = block(full)
    pred = decoder.pred(decoder.norm(full))[:, 1:]
    pred = pred.unflatten(2, (3, p, p)).permute(0, 1, 3, 4, 2).flatten(2)                  # MAE's order of a patch
    if norm_pixels:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((pred - patches) ** 2).mean(-1)
    return (error * mask).sum() / mask.sum()


@pytest.mark.parametrize("norm_pixels", [False, True])
def test_without_contrast_and_with_one_view_it_is_mae(norm_pixels):
    model = build(replace(SMALL["mvmae"], targets="one", lam=0.0, norm_pixels=norm_pixels))
    x = normal(6, 3, 16, 16)
    torch.manual_seed(5)
    losses = model(x, None)
    torch.manual_seed(5)
    mask = mvmae.random_mask(6, 4, 0.8).flatten(1)
    assert set(losses) == {"loss", "reconstruction"}
    assert losses["loss"].item() == pytest.approx(mae_loss(model, x, mask, norm_pixels).item(), rel=1e-5)


@pytest.mark.parametrize("change", [{}, {"pool": "cls"}, {"pixels": "all"}, {"targets": "same", "lam": 0.5},
                                    {"lam": 0}])
def test_forward_is_section_3(change):
    cfg = replace(SMALL["mvmae"], **change)
    model, views = build(cfg), (normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1))
    torch.manual_seed(5)
    losses = model(*views)
    torch.manual_seed(5)
    masks = mvmae.random_mask(12, 4, cfg.mask).flatten(1).chunk(2)
    L_r, z = 0, []
    for x, mask in zip(views, masks):                                                      # each view by itself
        visible = mvmae.visible_first(mask)[:, :3]                                             # Eq. 1
        latent = model.encoder(x, visible)                                                 # Eq. 2
        error = (model.decoder(latent, visible) - mvmae.patchify(x, 4)).square()
        L_r += (error if cfg.pixels == "all" else error[mask]).mean() / 2                  # Eq. 3
        z.append(latent[:, 0] if cfg.pool == "cls" else latent[:, 1:].mean(1))
    L_c = mvmae.nt_xent_loss(*z, cfg.tau)                                                  # Eq. 4 to 6
    assert losses["reconstruction"].item() == pytest.approx(L_r.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx((L_r + cfg.lam * L_c).item(), rel=1e-5)  # Eq. 7
    assert ("contrast" in losses) == (cfg.lam > 0)
    assert cfg.lam == 0 or losses["contrast"].item() == pytest.approx(L_c.item(), rel=1e-5)
    features = model.encoder.features(views[0])
    tokens = model.encoder(views[0])
    assert torch.allclose(features, tokens[:, 0] if cfg.pool == "cls" else tokens[:, 1:].mean(1), atol=1e-6)


def test_attention_is_the_class_tokens():
    encoder, x = build(SMALL["mvmae"]).encoder, normal(2, 3, 16, 16)
    block, tokens = encoder.blocks[-1], encoder.embed(x)
    q, k = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 3, 16)).unbind(2)[:2]      # (B, 1 + N, K, D/K)
    for head in range(3):
        full = torch.softmax(q[:, :, head] @ k[:, :, head].transpose(1, 2) / 4, 2)         # (B, 1 + N, 1 + N)
        assert torch.allclose(encoder.attention(x)[:, head], full[:, 0, 1:], atol=1e-6)


def test_views_are_section_3_1_1():
    cfg, x = SMALL["mvmae"], (255 * torch.rand(64, 3, 16, 16)).byte()
    same = mvmae.views(x, replace(cfg, targets="same"))
    assert torch.equal(*same)
    view1, _ = mvmae.views(x, replace(cfg, crop_min=1.0))  # most crops are now nearly the whole: flips are plain to see
    whole = common.normalize(common.resize(x, 16))
    flipped = (view1 - whole.flip(3)).square().mean((1, 2, 3)) < (view1 - whole).square().mean((1, 2, 3))
    assert 16 < flipped.sum() < 48
    small = [(view - view.mean((2, 3), keepdim=True)).square().mean() for view in  # crops of less area are smoother
             (mvmae.views(x, replace(cfg, crop_min=c))[0] for c in (0.2, 1.0))]
    assert small[0] < small[1]
