"""The papers' tests: each method's formulas against loops written from the paper, and what only this method has."""
import ast, contextlib, copy, csv, dataclasses, math, re, sys, time
from collections import Counter, OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode  # documented, though its module's name begins with _
from torchvision.transforms.functional import rgb_to_grayscale

import camae, cmae, common, eval_finetune, macrl, mclim, mvmae
from test_smoke import HERE, METHODS, MODULES, SMALL, build, every_method, few, normal  # few is a fixture

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


@pytest.mark.parametrize("module", [cmae, camae])
def test_one_sided_info_nce_is_cmaes_equation_3_and_camaes_1(module):
    q, k = (z / z.norm(dim=1, keepdim=True) for z in (normal(5, 7), normal(5, 7, seed=1)))
    terms = []
    for i in range(5):
        positive = math.exp(torch.dot(q[i], k[i]) / 0.2)
        others = sum(math.exp(torch.dot(q[i], k[j]) / 0.2) for j in range(5) if j != i)
        terms.append(-math.log(positive / (positive + others)))
    assert module.info_nce_loss(3 * q, 2 * k, 0.2).item() == pytest.approx(sum(terms) / 5, rel=1e-5)


@pytest.mark.parametrize("M", [0, 4])
def test_info_nce_of_macrl_has_the_batch_and_the_bank_as_negatives(M):
    q, k, bank = (z / z.norm(dim=1, keepdim=True) for z in (normal(5, 7), normal(5, 7, seed=1), normal(M, 7, seed=2)))
    terms = []
    for i in range(5):
        positive = math.exp(torch.dot(q[i], k[i]) / 0.2)
        others = [k[j] for j in range(5) if j != i] + list(bank)
        terms.append(-math.log(positive / (positive + sum(math.exp(torch.dot(q[i], n) / 0.2) for n in others))))
    assert macrl.info_nce_loss(3 * q, 2 * k, 5 * bank, 0.2).item() == pytest.approx(sum(terms) / 5, rel=1e-5)


def test_location_loss_is_equation_5():
    p, positions = normal(2, 3, 9), torch.tensor([[0, 4, 8], [1, 2, 7]])
    norms = [math.sqrt(sum((p[b, v, n].item() - (n == positions[b, v].item())) ** 2 for n in range(9)))
             for b in range(2) for v in range(3)]
    assert cmae.location_loss(p, positions).item() == pytest.approx(sum(norms) / 6, rel=1e-5)


@pytest.mark.parametrize("loss", [mclim.dcl_loss, mclim.info_nce_loss, mvmae.nt_xent_loss, cmae.info_nce_loss,
                                  camae.info_nce_loss, lambda q, k, tau: macrl.info_nce_loss(q, k, q.flip(1), tau)],
                         ids=lambda f: f"{f.__module__}.{f.__name__}")
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


def test_reconstruction_loss_of_macrl_is_the_mean_absolute_error():
    pred, target, mask = normal(3, 4, 5), normal(3, 4, 5, seed=1), torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [1] * 4])
    errors = [abs((pred[b, n, p] - target[b, n, p]).item()) for b in range(3) for n in range(4) for p in range(5)
              if mask[b, n]]
    assert macrl.reconstruction_loss(pred, target, mask.bool()).item() == pytest.approx(sum(errors) / len(errors))
    assert macrl.reconstruction_loss(pred, target, torch.zeros(3, 4)).item() == 0


# MCLim

def test_mask_is_aligned_to_blocks():
    mask = mclim.random_mask(3, 16, 0.5)
    fine = mclim.repeat_blocks(mask, 12)
    for y in range(12):
        for x in range(12):
            assert torch.equal(fine[:, 12 * y + x], mask[:, 4 * (y // 3) + x // 3])


@pytest.mark.parametrize("backbone, millions", [("vit", 43.12), ("swin", 48.88), ("hivit", 34.32)])
def test_parameters_of_table_1(backbone, millions):
    encoder = mclim.MCLim(mclim.Config(backbone=backbone, contrast="none")).encoder
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("cfg", BACKBONES, ids=lambda cfg: cfg.backbone)
def test_masked_pixels_do_not_reach_the_encoder(cfg):
    model, x = build(cfg), normal(4, 3, 16, 16)
    with torch.no_grad():
        model.mask_token.normal_()
    mask = mclim.random_mask(4, model.N_b, 0.5)
    hidden = mclim.repeat_blocks(mask, 16).view(4, 1, 16, 16)
    tokens, other_masked, other_visible = (model.encoder(image, mask, model.mask_token) for image in
                                           (x, torch.where(hidden, 7.0, x), torch.where(hidden, x, 7.0)))
    assert torch.equal(tokens, other_masked) and not torch.allclose(tokens, other_visible)


@pytest.mark.parametrize("cfg", BACKBONES, ids=lambda cfg: cfg.backbone)
@pytest.mark.parametrize("head, target", [("linear", "shared"), ("mlp", "shared"), ("vit", "shared"),
                                          ("mlp", "momentum")])
def test_gradients_leave_out_averages_and_the_patch_embedding(cfg, head, target):
    model = build(replace(cfg, head=head, target=target))
    model(normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))["loss"].backward()
    for name, p in model.named_parameters():
        frozen = name.startswith(("F2.", "T2.", "encoder.patch_embed."))
        assert p.requires_grad != frozen, name
        assert p.grad is None if frozen else p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cfg", [cfg for cfg in BACKBONES if cfg.backbone != "swin"], ids=lambda cfg: cfg.backbone)
def test_attention_is_in_float32_on_a_cpu(cfg, monkeypatch):
    seen, attention = set(), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest: seen.add(q.dtype) or attention(q, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        build(cfg).encoder(normal(2, 3, 16, 16))
    assert seen == {torch.float32}


@pytest.mark.parametrize("cfg", BACKBONES, ids=lambda cfg: cfg.backbone)
def test_backbones_for_evaluation(cfg):
    model, x = build(cfg), normal(4, 3, 16, 16)
    features, tokens = model.encoder.features(x), model.encoder.tokens(x)
    assert features.shape == (4, model.encoder.dim) and torch.equal(features, model.encoder.features(x))
    assert tokens.shape == (4, (16 // model.encoder.stride) ** 2, model.encoder.dim)
    assert torch.equal(tokens, model.encoder(x)) and torch.allclose(features, tokens.mean(1))
    masked, prediction = model.reconstruct(x)
    visible = masked == x
    assert visible.float().mean() == pytest.approx(1 - round(0.6 * model.N_b) / model.N_b)
    assert torch.allclose(prediction[visible], x[visible]) and not torch.allclose(prediction, x)


@pytest.mark.parametrize("change", [{}, {"l1": "rec"}, {"contrast": "infonce", "lam": 0.5}, {"target": "momentum"},
                                    {"norm_pixels": False}, {"pool": "visible"}])
def test_forward_is_section_2(change):
    cfg = replace(SMALL["mclim"], **change)
    torch.manual_seed(0)
    model, view1, view2 = mclim.MCLim(cfg), normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1)
    assert (model.F2 is model.encoder and model.T2 is model.T1) == (cfg.target == "shared")
    if cfg.target == "momentum":
        with torch.no_grad():
            model.F2.norm.weight.add_(0.1)  # so that the branches differ
    torch.manual_seed(5)
    losses = model(view1, view2)
    torch.manual_seed(5)
    mask = mclim.random_mask(6, 16, cfg.mask)
    Z1 = model.T1(model.encoder(view1, mask, model.mask_token))                            # Eq. 1, 3
    target = mclim.patchify(view1, 4)
    target = mclim.normalize_patches(target) if cfg.norm_pixels else target
    L1 = (Z1 - target).square()[mask] if cfg.l1 == "pre" else (Z1 - target).square()
    z1 = Z1.mean(1) if cfg.pool == "all" else torch.stack([Z[~row].mean(0) for Z, row in zip(Z1, mask)])
    z2 = model.T2(model.F2(view2)).mean(1)                                                 # Eq. 2, 5
    L2 = (mclim.dcl_loss if cfg.contrast == "dcl" else mclim.info_nce_loss)(z1, z2, cfg.tau)
    assert losses["reconstruction"].item() == pytest.approx(L1.mean().item(), rel=1e-5)    # Eq. 4, 6
    assert losses["contrast"].item() == pytest.approx(L2.item(), rel=1e-5)                 # Eq. 7 to 9
    assert losses["loss"].item() == pytest.approx((cfg.lam * L1.mean() + L2).item(), rel=1e-5)  # Eq. 10
    weight = model.encoder.blocks[0].attn.qkv.weight  # shared: with the gradient through branch 2
    found, expected = (torch.autograd.grad(loss, weight)[0] for loss in (losses["loss"], cfg.lam * L1.mean() + L2))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_moco_v3_and_simmim_fall_out_of_flags():
    view1, view2 = normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1)
    moco = mclim.MCLim(replace(SMALL["mclim"], mask=0.0, lam=0.0, target="momentum"))
    losses = moco(view1, view2)
    z = [part(net(view)).mean(1) for part, net, view in ((moco.T1, moco.encoder, view1), (moco.T2, moco.F2, view2))]
    assert set(losses) == {"loss", "contrast"} and not moco.mask_token.requires_grad      # λ = 0: not computed
    assert losses["loss"].item() == pytest.approx(mclim.dcl_loss(*z, moco.cfg.tau).item(), rel=1e-5)
    simmim = mclim.MCLim(replace(SMALL["mclim"], contrast="none"))
    losses = simmim(view1, view2)
    assert set(losses) == {"loss", "reconstruction"} and losses["loss"] == losses["reconstruction"]
    assert not hasattr(simmim, "F2")
    free = mclim.MCLim(replace(SMALL["mclim"], freeze_patch=False, target="momentum"))
    free(view1, view2)["loss"].backward()
    assert free.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    assert not free.F2.patch_embed.proj.weight.requires_grad


def test_prediction_of_normalised_pixels_is_shown_as_pixels():
    x = 3 * normal(2, 4, 12) + 5
    assert torch.allclose(mclim.denormalize_patches(mclim.normalize_patches(x), x), x, atol=1e-4)
    for norm_pixels in (True, False):
        model = build(replace(SMALL["mclim"], norm_pixels=norm_pixels, l1="rec", head="linear"))
        with torch.no_grad():
            model.T1.weight.zero_()
            model.T1.bias.fill_(2.0)
        image = normal(3, 3, 16, 16)
        true = mclim.patchify(image, 4)
        expected = 2 * true.std(2, keepdim=True) + true.mean(2, keepdim=True) if norm_pixels else torch.tensor(2.0)
        shown = mclim.patchify(model.reconstruct(image)[1], 4)
        assert torch.allclose(shown, expected.expand_as(shown), atol=1e-3)


def test_branch_2_is_the_momentum_average(few, tmp_path):
    cfg = replace(SMALL["mclim"], batch=32, epochs=1, warmup=0, target="momentum", momentum=0.9, amp=False,
                  out=str(tmp_path / "run"))
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
    mask = mvmae.random_mask(5, 16, 0.8)
    ids = mvmae.visible_first(mask)
    assert ids.tolist() == [sorted(range(16), key=lambda i: row[i]) for row in mask.tolist()]
    x = normal(5, 16, 7)
    assert all(torch.equal(mvmae.take(x, ids[:, :3])[b, v], x[b, ids[b, v]]) for b in range(5) for v in range(3))


def test_masked_pixels_do_not_reach_the_latent():
    model, x = build(SMALL["mvmae"]), normal(4, 3, 16, 16)
    mask = mvmae.random_mask(4, 16, 0.8)
    visible = mvmae.visible_first(mask)[:, :3]
    hidden = mask.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    latent, other_masked, other_visible = (model.encoder(image, visible) for image in
                                           (x, torch.where(hidden, 7.0, x), torch.where(hidden, x, 7.0)))
    assert latent.shape == (4, 1 + 3, 48)
    assert torch.equal(latent, other_masked) and not torch.allclose(latent, other_visible)


def test_time_falls_with_the_mask_ratio():
    cfg, x = replace(mvmae.TINY, img=64, depth=2), normal(4, 3, 64, 64)  # 256 patches
    encoder, threads = build(cfg).encoder, torch.get_num_threads()
    torch.set_num_threads(1)  # and processor time: what runs beside the test does not count
    seconds = {}
    for ratio in (0.2, 0.5, 0.8):
        mask = mvmae.random_mask(4, 256, ratio)
        visible = mvmae.visible_first(mask)[:, :256 - round(ratio * 256)]
        times = []
        for _ in range(7):
            begin = time.process_time()
            encoder(x, visible).sum().backward()
            times.append(time.process_time() - begin)
        seconds[ratio] = min(times)
    torch.set_num_threads(threads)
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
    model = build(replace(SMALL["mvmae"], targets="one", lam=0.0, mask=0.75, norm_pixels=norm_pixels))
    x, rows = normal(6, 3, 16, 16), []
    model.encoder.register_forward_hook(lambda encoder, inputs, z: rows.append(z.shape))
    torch.manual_seed(5)
    losses = model(x, None)
    torch.manual_seed(5)
    mask = mvmae.random_mask(6, 16, 0.75)
    assert set(losses) == {"loss", "reconstruction"} and rows == [(6, 1 + 4, 48)]  # B rows, not 2B
    assert losses["loss"].item() == pytest.approx(mae_loss(model, x, mask, norm_pixels).item(), rel=1e-5)


@pytest.mark.parametrize("change", [{}, {"pool": "cls"}, {"pixels": "all"}, {"targets": "same", "lam": 0.5},
                                    {"lam": 0}])
def test_forward_is_section_3(change):
    cfg = replace(SMALL["mvmae"], **change)
    model, views = build(cfg), (normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1))
    torch.manual_seed(5)
    losses = model(*views)
    torch.manual_seed(5)
    masks = mvmae.random_mask(12, 16, cfg.mask).chunk(2)
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
    features, latent = model.encoder.features(views[0]), model.encoder(views[0])
    assert torch.allclose(features, latent[:, 0] if cfg.pool == "cls" else latent[:, 1:].mean(1), atol=1e-6)
    assert torch.equal(model.encoder.tokens(views[0]), latent[:, 1:]) and latent.shape == (6, 1 + 16, 48)


def test_contrast_of_weight_0_is_not_computed(monkeypatch):
    calls = []
    monkeypatch.setattr(mvmae, "nt_xent_loss", lambda *z: calls.append(z) or torch.zeros(()))
    for lam in (0.0, 2.0):
        build(replace(SMALL["mvmae"], lam=lam))(normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))
        assert len(calls) == (lam > 0)


@pytest.mark.parametrize("change", [{}, {"pixels": "all"}, {"norm_pixels": True}])
def test_reconstruct_shows_what_the_loss_counts(change):
    model, x = build(replace(SMALL["mvmae"], **change)), normal(4, 3, 16, 16)
    with torch.no_grad():
        model.decoder.pred.weight.zero_()
        model.decoder.pred.bias.fill_(2.0)
    masked, shown = model.reconstruct(x)
    hidden = masked != x
    assert hidden.double().mean() == 13 / 16 and (masked[hidden] == 0).all()
    patches = mvmae.patchify(x, 4)
    expected = torch.full_like(patches, 2.0)
    if "norm_pixels" in change:
        expected = patches.mean(2, keepdim=True) + 2.0 * patches.std(2, keepdim=True)
    expected = mvmae.unpatchify(expected.expand_as(patches), 4)
    assert torch.allclose(shown, expected if "pixels" in change else torch.where(hidden, expected, x), atol=1e-4)


PLAIN = {camae: {"jitter": 0.0, "gray": 0.0, "blur": 0.0}, macrl: {"jitter_s": 0.0, "gray_s": 0.0}}


@pytest.mark.parametrize("module", [mvmae, cmae, macrl, camae])
def test_views_are_flipped_and_of_many_sizes(module):
    cfg, x = replace(SMALL[module.__name__], **PLAIN.get(module, {})), (255 * torch.rand(64, 3, 16, 16)).byte()
    least = "crop_min_s" if module is macrl else "crop_min"
    view1, _ = module.views(x, replace(cfg, **{least: 1.0}))  # nearly whole images: flips are plain to see
    whole = common.normalize(common.resize(x, 16))
    flipped = (view1 - whole.flip(3)).square().mean((1, 2, 3)) < (view1 - whole).square().mean((1, 2, 3))
    assert 16 < flipped.sum() < 48
    small = [(view - view.mean((2, 3), keepdim=True)).square().mean() for view in  # crops of less area are smoother
             (module.views(x, replace(cfg, **{least: c}))[0] for c in (0.2, 1.0))]
    assert small[0] < small[1]


def test_one_target_view_for_both_branches():
    same = mvmae.views((255 * torch.rand(8, 3, 16, 16)).byte(), replace(SMALL["mvmae"], targets="same"))
    assert torch.equal(*same)


def test_target_views_are_crops_and_flips_by_the_kernel_asked_for():
    x, aspect, views = (255 * torch.rand(8, 3, 16, 16)).byte(), torch.linspace(0.5, 2.0, 8), {}
    for kernel in ("linear", "bicubic"):
        torch.manual_seed(3)
        views[kernel] = mvmae.views(x, replace(SMALL["mvmae"], kernel=kernel, crop_min=0.4), aspect)
        torch.manual_seed(3)
        for view in views[kernel]:
            crop = common.random_resized_crop(x, 16, (0.4, 1.0), aspect=aspect, kernel=kernel)
            assert torch.equal(view, common.normalize(common.random_hflip(crop)))
    assert not torch.allclose(views["linear"][0], views["bicubic"][0], atol=1e-2)
    assert not torch.equal(*views["linear"])


# CMAE

@pytest.mark.parametrize("k", [0.1, 0.5, 0.97])
def test_semantic_boxes_are_equation_1(k):
    heat = torch.rand(40, 5, 5, generator=torch.Generator().manual_seed(0))
    for M, box in zip(heat, cmae.semantic_boxes(heat, k)):
        hot = [(y, x) for y in range(5) for x in range(5) if M[y, x] > k] or [(0, 0), (4, 4)]
        rectangle = [min(y for y, _ in hot), min(x for _, x in hot), max(y for y, _ in hot) + 1,
                     max(x for _, x in hot) + 1]
        assert box.tolist() == pytest.approx([side / 5 for side in rectangle])


def cut(monkeypatch, n, side, make):
    """The boxes that make(images (n, 3, side, side)) cuts out: top, left, height, width as shares of the side, (n,)."""
    seen = []
    monkeypatch.setattr(cmae, "crop_resize", lambda images, boxes, size: (
        seen.append(boxes), images[:, :, :size, :size])[1])
    torch.manual_seed(0)
    make(torch.zeros(1).expand(n, 3, side, side))
    return [b.double() / side for b in seen[-1]]


@pytest.mark.parametrize("alpha, area", [(0.6, 0.0004), (1.0, 0.16), (2.5, 0.5)])
def test_centres_of_crops_follow_the_beta_law_where_they_fit(alpha, area, monkeypatch):
    """Centres from 0.1 to 0.8: a crop of 0.7 fits from 0.35 to 0.65 only, so it begins between 0 and 0.3."""
    n, box = 4000, torch.tensor([0.1, 0.1, 0.8, 0.8])
    top, left, height, width = cut(monkeypatch, n, 20_000, lambda images: cmae.contrastive_crop(
        images, 1, (area, area), box.repeat(n, 1), alpha))
    assert (height * width - area).abs().max() < 1e-4 and (height / width).max() / (height / width).min() > 1.5
    cells = (torch.arange(200_000, dtype=torch.double) + 0.5) / 200_000
    law = (cells * (1 - cells)) ** (alpha - 1)
    law = law.cumsum(0) / law.sum()                                                        # its distribution function
    for start, length in ((top, height), (left, width)):
        low, high = (0.1 - length / 2).clamp(min=0), (0.8 - length / 2).minimum(1 - length)
        u = ((start - low) / (high - low)).sort().values
        assert -1e-3 < u[0] and u[-1] < 1 + 1e-3                                           # pixels are whole
        gap = law[(u.clamp(0, 1 - 1e-9) * 200_000).long()] - torch.arange(n) / n
        assert gap.abs().max() < 1.95 / math.sqrt(n)                                       # Kolmogorov–Smirnov, 0.001
    assert (top - left).abs().max() > 0.2                                                  # not one number for both


def test_contrastive_crop_is_a_crop_around_the_box():
    """On an image whose red is its row and green its column, a crop's mean colour tells where its centre is."""
    torch.manual_seed(0)
    ramp = torch.arange(40.0) / 40
    image = torch.stack([ramp[:, None].expand(40, 40), ramp.expand(40, 40), torch.zeros(40, 40)])
    images, boxes = image.expand(500, -1, -1, -1), torch.tensor([0.6, 0.3, 0.7, 0.4]).repeat(500, 1)
    crops = cmae.contrastive_crop(images, 16, (0.04, 0.16), boxes, 0.6)                    # small: all fit
    assert crops.shape == (500, 3, 16, 16)
    y, x = crops[:, 0].mean((1, 2)) + 0.5 / 40, crops[:, 1].mean((1, 2)) + 0.5 / 40
    assert 0.58 < y.min() < 0.62 < 0.68 < y.max() < 0.72 and 0.28 < x.min() < 0.32 < 0.38 < x.max() < 0.42
    corner = cmae.contrastive_crop(images, 16, (0.5, 0.5), torch.tensor([1.0, 1.0, 1.0, 1.0]).repeat(500, 1), 0.6)
    assert (corner[:, :2, -1, -1] > 0.95).all()                                            # moved in, not cut off


def test_views_around_boxes_keep_true_proportions(monkeypatch):
    """An image 1.25 times as wide as high, squeezed: a crop's share of the area stays, its aspect is the true one."""
    cfg, aspect = replace(SMALL["cmae"], crop_min=0.2), torch.full((400,), 1.25)
    box = torch.tensor([0.5, 0.5, 0.5, 0.5]).repeat(400, 1)
    top, left, height, width = cut(monkeypatch, 400, 2000, lambda images: cmae.views(images, cfg, aspect, box))
    true = 1.25 * width / height
    assert 0.74 < true.min() < 0.80 and 1.25 < true.max() < 1.35
    assert 0.19 < (height * width).min() < 0.25 and (height * width).max() > 0.8
    assert ((top + height / 2 - 0.5).abs() < 1e-3).all() and ((left + width / 2 - 0.5).abs() < 1e-3).all()
    seen = []
    monkeypatch.setattr(cmae, "random_resized_crop", lambda images, size, scale, aspect: seen.append(
        (scale, aspect)) or images)
    cmae.views(torch.zeros(400, 3, 16, 16), cfg, aspect)
    assert seen == [((0.2, 1.0), aspect)] * 2                                              # plain crops, without boxes


def test_boxes_are_located_image_by_image_and_crops_are_plain_before(tmp_path, monkeypatch, capsys):
    seen = []  # for each view of a step: image → its box
    monkeypatch.setattr(cmae, "contrastive_crop", lambda images, size, scale, boxes, alpha, aspect: seen.append(
        {image.numpy().tobytes(): box.tolist() for image, box in zip(images, boxes)}) or common.resize(images, size))
    cfg = replace(SMALL["cmae"], epochs=4, warmup=0.0, crop_from=1, crop_every=2, k=0.5, amp=False, data="shapes",
                  images=32, out=str(tmp_path / "run"))
    cmae.train(cfg)
    assert "no ContrastiveCrop" not in capsys.readouterr().out
    assert len(seen) == 2 * 2 * 3                                # two views, two steps, epochs 1 to 3, none in epoch 0
    first, second, third = ({**seen[i], **seen[i + 2]} for i in (0, 4, 8))
    assert first == second != third                                                        # anew in epochs 1 and 3
    x = common.load_data(cfg)[0][0]
    kept = common.load_checkpoint(tmp_path / "run")["boxes"]["boxes"]
    assert len(x) == 32 and all(third[image.numpy().tobytes()] == box.tolist() for image, box in zip(x, kept))
    model, boxes = build(cfg), cmae.Boxes(32)
    boxes.locate(model, x, common.start_processes("cpu"))
    heat = torch.cat([model.heat(common.normalize(common.resize(image[None], 16))) for image in x])
    assert torch.equal(boxes.boxes, cmae.semantic_boxes(heat, cfg.k))
    cmae.train(replace(cfg, steps=2, out=str(tmp_path / "short")))  # two steps are the first epoch
    assert "no ContrastiveCrop" in capsys.readouterr().out and len(seen) == 12


@pytest.mark.parametrize("heat", ["attention", "features"])
def test_heat_map(heat):
    model, x = build(replace(SMALL["cmae"], heat=heat)), normal(3, 3, 16, 16)
    M = model.heat(x)
    assert M.shape == (3, 4, 4) and (M.amin((1, 2)) == 0).all() and (M.amax((1, 2)) == 1).all()
    entered = []
    model.encoder.norm.register_forward_pre_hook(lambda norm, args: entered.append(args[0]))
    model.encoder(x)
    source = model.encoder.attention(x).mean(1) if heat == "attention" else entered[0][:, 1:].abs().mean(2)
    assert torch.equal(M.flatten(1).argsort(1), source.argsort(1))


def test_attention_of_cmae_is_the_class_tokens_in_float32():
    encoder, x, entered = build(SMALL["cmae"]).encoder, normal(2, 3, 16, 16), []
    block = encoder.blocks[-1]
    block.norm1.register_forward_hook(lambda norm, args, tokens: entered.append(tokens))
    maps = encoder.attention(x)
    assert torch.equal(encoder(x), encoder(x, with_entering=True)[0])
    q, k = block.attn.qkv(entered[-1]).unflatten(2, (3, 3, 16)).unbind(2)[:2]              # (B, 1 + N, K, d)
    for head in range(3):
        full = torch.softmax(q[:, :, head] @ k[:, :, head].mT / 4, 2)                      # (B, 1 + N, 1 + N)
        assert torch.allclose(maps[:, head], full[:, 0, 1:], atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder.attention(x)
    assert rough.dtype == torch.float32 and len(rough.unique()) > 90                       # bfloat16 has fewer values


@pytest.mark.parametrize("change", [{"decoder": "mlp"}, {"decoder": "conv"}, {"lam_con": 0.0},
                                    {"decoder": "hybrid-mlp", "decoder_depth": 1}])
def test_attention_that_no_loss_teaches_is_refused(change):
    """Where neither the decoder nor P reads the class token, the last block's query of it gets no gradient."""
    with pytest.raises(common.UserError, match="--heat features"):
        replace(SMALL["cmae"], **change)
    for more in ({"heat": "features"}, {"pool": "cls"}):
        model = build(replace(SMALL["cmae"], **change, **more))
        tokens = []
        model.encoder.norm.register_forward_hook(lambda norm, args, out: tokens.append(out))
        loss = model(normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))["loss"]
        gradient, = torch.autograd.grad(loss, tokens[0])
        assert (gradient[:, 0] != 0).any() == ("pool" in more)
    with pytest.raises(common.UserError, match="--heat features"):
        replace(SMALL["cmae"], **change, pool="cls", lam_ctr=0.0)


def test_restore_puts_every_token_back():
    mask = cmae.random_mask(6, 16, 0.75)
    order, x, cls = cmae.visible_first(mask), normal(6, 16, 5), normal(2, 6, 1, 5, seed=1)
    visible, masked = (torch.cat([c, cmae.take(x, ids)], 1) for c, ids in zip(cls, order.split([4, 12], 1)))
    h = cmae.restore(visible, masked, order)
    assert torch.equal(h[:, 1:], x) and torch.allclose(h[:, :1], cls.mean(0))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_no_gradient_flows_through_q2(pool):
    """q_1 sees the visible pixels of x_q only, so what reaches its masked pixels could have come through q_2 alone."""
    model = build(replace(SMALL["cmae"], pool=pool))
    x_q, x_k = normal(4, 3, 16, 16).requires_grad_(), normal(4, 3, 16, 16, seed=1).requires_grad_()
    torch.manual_seed(5)
    losses = model(x_q, x_k)
    torch.manual_seed(5)
    hidden = cmae.random_mask(4, 16, 0.75).unflatten(1, (4, 4))
    hidden = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(x_q)
    gradient, = torch.autograd.grad(losses["contrast"], x_q, retain_graph=True)
    assert (gradient[hidden] == 0).all() and (gradient[~hidden] != 0).any()
    assert torch.autograd.grad(losses["contrast"], x_k, allow_unused=True) == (None,)      # nor through M_E
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x_q, x_k)["reconstruction"]
    weight = model.encoder.blocks[0].mlp.fc1.weight
    assert torch.autograd.grad(loss, weight)[0].abs().sum() > 0                            # but q_1's does, as cast


@pytest.mark.parametrize("change", [{}, {"lam_ctr": 0.5, "lam_loc": 2.0, "lam_con": 3.0}, {"pool": "cls"},
                                    {"projection": "mlp"}, {"location_from": "content"}, {"norm_pixels": True}])
def test_forward_is_sections_3_3_to_3_6(change):
    cfg = replace(SMALL["cmae"], **change)
    model, x_q, x_k = build(cfg), normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1)
    with torch.no_grad():
        model.M_E.norm.weight.add_(normal(48))  # so that the encoders differ, and the projections
        dict(model.M_P.named_parameters())["weight" if cfg.projection == "linear" else "fc2.weight"].add_(0.1)
        model.location.fc2.weight.add_(normal(16, 48))                                     # which begins with 0
    torch.manual_seed(5)
    losses = model(x_q, x_k)
    torch.manual_seed(5)
    mask_q, mask_k = cmae.random_mask(6, 16, 0.75), cmae.random_mask(6, 16, 0.75)
    vectors, visible = [], torch.stack([(~row).nonzero().flatten() for row in mask_q])
    for encoder, x, mask in ((model.encoder, x_q, mask_q), (model.M_E, x_k, mask_k)):
        h, cls = torch.empty(6, 16, 48), torch.zeros(6, 48)
        for part in (mask, ~mask):                                                         # Eq. 2, patch by patch
            ids = torch.stack([row.nonzero().flatten() for row in part])
            tokens = encoder(x, ids)
            cls += tokens[:, 0] / 2
            for b in range(6):
                h[b, ids[b]] = tokens[b, 1:]
        vectors.append(cls if cfg.pool == "cls" else h.mean(1))

    def two_layers(network, v):
        return F.gelu(v @ network.fc1.weight.mT + network.fc1.bias) @ network.fc2.weight.mT + network.fc2.bias

    def project(network, v):
        return v @ network.weight.mT + network.bias if cfg.projection == "linear" else two_layers(network, v)

    L_ctr = cmae.info_nce_loss(project(model.projection, vectors[0]), project(model.M_P, vectors[1]), cfg.tau)  # Eq. 3
    q1 = model.encoder(x_q, visible)
    target = torch.stack([x_q[:, :, 4 * (n // 4):, 4 * (n % 4):][:, :, :4, :4].flatten(1) for n in range(16)], 1)
    if cfg.norm_pixels:
        target = (target - target.mean(2, keepdim=True)) / target.std(2, keepdim=True)
    L_con = (model.decoder(q1, visible) - target).square()[mask_q].mean()
    if cfg.location_from == "content":
        model.encoder.pos_embed.zero_()
    L_loc = cmae.location_loss(two_layers(model.location, model.encoder(x_q, visible)[:, 1:]), visible)  # Eq. 4, 5
    for name, value in (("contrast", L_ctr), ("location", L_loc), ("reconstruction", L_con),
                        ("loss", cfg.lam_ctr * L_ctr + cfg.lam_loc * L_loc + cfg.lam_con * L_con)):  # Eq. 6
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_content_does_not_tell_where_it_lies():
    """Without positions the tokens of shuffled patches are the shuffled tokens; with them they are not."""
    encoder, x, order = build(SMALL["cmae"]).encoder, normal(2, 3, 16, 16), torch.tensor([3, 0, 2, 1])
    patches, visible = cmae.patchify(x, 4), torch.tensor([[1, 6, 9, 12]] * 2)
    mixed = patches.clone()
    mixed[:, visible[0]] = patches[:, visible[0, order]]
    for positions in (False, True):
        one, other = (encoder(image, visible, add_positions=positions) for image in (x, cmae.unpatchify(mixed, 4)))
        assert torch.allclose(one[:, 1:][:, order], other[:, 1:], atol=1e-5) != positions
        with torch.autocast("cpu", torch.bfloat16):  # tokens add up in float32, with positions or without
            assert encoder(x, visible, with_entering=True, add_positions=positions)[1].dtype == torch.float32


def test_the_location_head_begins_at_zero_and_learns():
    """All p are 0, each token's distance is 1, and nothing of it reaches the encoder; after a step it does."""
    model, x = build(replace(SMALL["cmae"], lam_ctr=0.0, lam_con=0.0, heat="features")), normal(8, 3, 16, 16)
    weight, optimizer = model.encoder.blocks[0].attn.qkv.weight, torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss = model(x, x)["loss"]
        loss.backward()
        assert (loss.item() == 1) == (weight.grad.abs().sum().item() == 0) == (step == 0)
        optimizer.step()


def test_places_are_predicted_in_float32_under_autocast():
    """Eq. 5's gradient has length 1 at any distance, so that rounding in p would count however small the loss is."""
    model, dtypes = build(SMALL["cmae"]), []
    model.location.register_forward_hook(lambda head, args, p: dtypes.append(p.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("off", ["lam_ctr", "lam_loc", "lam_con"])
def test_what_a_weight_of_0_leaves_out_is_frozen_and_not_computed(off, monkeypatch, tmp_path):
    model = build(replace(SMALL["cmae"], heat="features", location_from="content", **{off: 0.0}))
    model.location.fc2.weight.data.normal_()                                               # which begins with 0
    name, part, calls = {"lam_ctr": ("contrast", model.projection, (2, 0)),                # q_1, content; M_E never
                         "lam_loc": ("location", model.location, (2, 2)),
                         "lam_con": ("reconstruction", model.decoder, (3, 2))}[off]
    counts = {id(network): 0 for network in (model.encoder, model.M_E, part)}
    for network in (model.encoder, model.M_E, part):
        network.register_forward_hook(lambda network, args, out: counts.update({id(network): counts[id(network)] + 1}))
    losses = model(normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))
    assert set(losses) == {"loss", "contrast", "location", "reconstruction"} - {name}
    assert losses["loss"].item() == pytest.approx(sum(losses[n].item() for n in set(losses) - {"loss"}))
    assert tuple(counts.values()) == (*calls, 0)
    losses["loss"].backward()
    assert not any(p.requires_grad for p in part.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_without_the_contrast_the_averages_stand_still(tmp_path):
    cfg = replace(SMALL["cmae"], lam_ctr=0.0, epochs=1, warmup=0.0, data="shapes", images=32, out=str(tmp_path / "run"))
    cmae.train(cfg)
    trained, begun = common.load_checkpoint(tmp_path / "run")["model"], build(cfg).state_dict()
    still = [name for name in begun if name.startswith(("M_E", "M_P", "projection"))]
    assert len(still) > 20 and all(torch.equal(trained[name], begun[name]) for name in still)
    assert not torch.equal(trained["encoder.norm.weight"], begun["encoder.norm.weight"])


MOMENTUM = {"cmae": ("M_E", "M_P", "projection"), "camae": ("f_xi", "g_xi", "g_theta"), "macrl": ("f_xi", "g_xi", "g")}


@pytest.mark.parametrize("module", [cmae, macrl, camae])
def test_the_momentum_networks_are_averages_and_slow_down(few, tmp_path, module, monkeypatch):
    method = module.__name__
    cfg = replace(SMALL[method], epochs=1, warmup=0, momentum=0.9, amp=False, out=str(tmp_path / "run"))
    f_xi, g_xi, g = MOMENTUM[method]
    last = "weight" if method == "cmae" else "fc2.weight"  # cmae's projection is one layer
    pairs = {f"{f_xi}.blocks.0.attn.qkv.weight": "encoder.blocks.0.attn.qkv.weight",
             f"{g_xi}.{last}": f"{g}.{last}"}
    states, save = [], common.Run.save

    def save_and_keep(run, step, *args, model, **parts):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        save(run, step, *args, model, **parts)

    monkeypatch.setattr(common.Run, "save", save_and_keep)
    module.train(cfg)                                                                      # two steps
    for average, one in pairs.items():
        expected = build(cfg).state_dict()[average]
        for state, m in zip(states, (0.9, 0.95)):                                          # half-way up to 1
            expected = m * expected + (1 - m) * state[one]
            assert torch.allclose(state[average], expected, atol=1e-7)
            assert not torch.equal(state[average], state[one])


@pytest.mark.parametrize("decoder", ["transformer", "mlp", "conv", "hybrid-mlp", "hybrid-conv"])
def test_decoders_train_and_have_the_pages_parameters(decoder):
    model = build(replace(SMALL["cmae"], decoder=decoder, decoder_depth=3, lam_ctr=0.0, lam_loc=0.0, heat="features"))
    kinds = {"transformer": "Block", "mlp": "MlpBlock", "conv": "ConvBlock"}
    middle, rest = kinds[decoder.removeprefix("hybrid-")], kinds[decoder if decoder in kinds else "transformer"]
    assert [type(block).__name__ for block in model.decoder.blocks] == [rest, middle, rest]
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    x = common.normalize(common.load_images("shapes", "train", 16)[0][:16] / 255)
    for _ in range(30):
        loss = model(x, x)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.blocks.parameters())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    command = "python cmae.py" + {"transformer": ""}.get(decoder, f" --decoder {decoder}") + (
        " --heat features" if decoder in ("mlp", "conv") else "")
    row = re.search(rf"\| ([\d.]+, [\d., ]+) \| `{command}` \|", (HERE / "papers/cmae.md").read_text())
    for width, millions in zip((512, 256, 128, 64), row[1].split(","), strict=True):
        with torch.device("meta"):
            blocks = cmae.decoder_blocks(cmae.Config(decoder=decoder, decoder_dim=width, heat="features"))
            n = sum(p.numel() for p in cmae.Decoder(768, 8, 192, width, blocks).parameters())
        assert f"{n / 1e6:.2f}" == millions.strip()


def test_convolution_reaches_neighbours_only_and_passes_the_class_token():
    block, x = cmae.ConvBlock(8, 4), normal(1, 17, 8)
    changed = x.clone()
    changed[0, 1 + 5] += normal(8, seed=1)                                                 # row 1, column 1
    where = (block(x) != block(changed)).any(2)[0].nonzero().flatten().tolist()
    assert where == [1 + 4 * y + x for y in (0, 1, 2) for x in (0, 1, 2)]
    assert torch.equal(block(x)[:, 0], x[:, 0])


def test_convolution_is_depthwise_and_drawn_by_its_own_fans():
    """Nine numbers go into one of a channel, one into nine: Xavier's deviation is √(2/18), also within a Decoder."""
    torch.manual_seed(0)
    block = cmae.Decoder(48, 4, 48, 256, [cmae.ConvBlock(256, 4)]).blocks[0]
    assert block.kernel.std().item() == pytest.approx(1 / 3, rel=0.05) and block.kernel.abs().max() < 1 / math.sqrt(3)
    x = normal(1, 17, 256)
    image = block.norm(x)[0, 1:].unflatten(0, (4, 4))
    y, column, c = 2, 1, 7                                                                 # a place without an edge
    out = sum(block.kernel[c, 0, i, j] * image[y + i - 1, column + j - 1, c] for i in range(3) for j in range(3))
    seen = []
    block.fc.register_forward_pre_hook(lambda fc, args: seen.append(args[0]))
    block(x)
    assert seen[0][0, 4 * y + column, c].item() == pytest.approx(F.gelu(out).item(), abs=1e-5)


# CAMAE

def test_masked_mse_is_equation_2():
    pred, target, mask = normal(3, 4, 5), normal(3, 4, 5, seed=1), torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [1] * 4])
    errors = [(target[i, h, c] - pred[i, h, c]).item() ** 2 for i in range(3) for h in range(4) for c in range(5)
              if mask[i, h]]
    assert camae.masked_mse(pred, target, mask.bool()).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_idm_masks_the_patches_with_the_most_attention(ratio):
    attention = normal(6, 16).softmax(1)
    for row, mask in zip(attention.tolist(), camae.idm_mask(attention, ratio).tolist()):
        most = sorted(range(16), key=lambda h: -row[h])[:round(16 * ratio)]
        assert [h for h in range(16) if mask[h]] == sorted(most)


def test_plb_update_is_equation_4_for_losses_of_any_size():
    p, losses, lam, eps = [0.5, 0.2, 0.3], [0.3, 0.7, 0.1], 0.9, 0.2
    total = sum(math.exp(L / eps) for L in losses)
    expected = [(1 - lam) * q + lam * math.exp(L / eps) / total for q, L in zip(p, losses)]
    assert camae.plb_update(torch.tensor(p), torch.tensor(losses), lam, eps).tolist() == pytest.approx(expected)
    huge = camae.plb_update(torch.tensor(p), 1e6 + torch.tensor(losses, dtype=torch.double), lam, eps)
    assert huge.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("plb_loss", ["mean", "patches", "sum"])
def test_plb_sees_equation_2_at_the_scale_of_its_flag(plb_loss):
    cfg = replace(SMALL["camae"], plb_loss=plb_loss, mask=0.25)
    y, x, mask = normal(3, 16, 48), normal(3, 16, 48, seed=1), camae.random_mask(3, 16, 0.25)
    total = []
    for i in range(3):
        patches = [[(x[i, h, c] - y[i, h, c]).item() ** 2 for c in range(48)] for h in range(16) if mask[i, h]]
        pixels = sum if plb_loss == "sum" else lambda errors: sum(errors) / 48
        total.append(sum(map(pixels, patches)) / (4 if plb_loss == "mean" else 1))
    assert camae.plb_scale(cfg) * camae.masked_mse(y, x, mask).item() == pytest.approx(sum(total) / 3, rel=1e-5)


def test_plb_gathers_an_epoch_and_an_undrawn_head_keeps_its_loss():
    plb = camae.PLB(3)
    for m, loss in ((0, 0.2), (2, 0.5), (0, 0.4)):
        plb.note(torch.tensor([m]), torch.tensor(loss))
    plb.end_epoch(0.99, 0.2)
    first = camae.plb_update(torch.full((3,), 1 / 3), torch.tensor([0.3, 0.4, 0.5]), 0.99, 0.2)  # 1: the others' mean
    assert torch.allclose(plb.p, first) and plb.losses[1].isnan()
    plb.note(torch.tensor([1]), torch.tensor(0.1))
    plb.end_epoch(0.99, 0.2)
    assert torch.allclose(plb.losses, torch.tensor([0.3, 0.1, 0.5]))
    assert torch.allclose(plb.p, camae.plb_update(first, torch.tensor([0.3, 0.1, 0.5]), 0.99, 0.2))


def test_heads_in_play_are_the_exponential_of_the_entropy():
    plb = camae.PLB(3)
    for p, heads in (([1 / 3] * 3, 3), ([0.5, 0.0, 0.5], 2), ([0.0, 1.0, 0.0], 1),
                     ([0.7, 0.2, 0.1], math.exp(-sum(q * math.log(q) for q in (0.7, 0.2, 0.1))))):
        plb.p.copy_(torch.tensor(p))
        assert plb.heads_in_play().item() == pytest.approx(heads, rel=1e-5)


def test_heads_are_drawn_by_p_and_by_seed_and_epoch():
    plb = camae.PLB(3)
    plb.p.copy_(torch.tensor([0.2, 0.7, 0.1]))
    drawn = plb.draw(5000, 0, 3)
    assert torch.equal(drawn, plb.draw(5000, 0, 3)) and not torch.equal(drawn, plb.draw(5000, 0, 4))
    assert (drawn.bincount(minlength=3) / 5000 - plb.p).abs().max() < 0.03
    batches = common.Batches((torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.zeros(8), torch.ones(8)), 8, 5,
                             common.start_processes("cpu"))
    shuffle = torch.Generator().manual_seed(5 * 1_000_003 + 3)
    assert torch.equal(batches.ids(3), torch.randperm(8, generator=shuffle))  # the seed of the images' order is another
    shuffle.manual_seed(5 * 1_000_003 + 3)
    assert not torch.equal(plb.draw(5000, 5, 3), plb.p.multinomial(5000, replacement=True, generator=shuffle))


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_of_the_contrastive_pass_is_attention_in_full(autocast):
    model, x = build(SMALL["camae"]), normal(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens, entering = model.encoder(x, with_entering=True)
        block = model.encoder.blocks[-1]
        assert torch.equal(tokens, model.encoder(x)) and torch.equal(tokens, model.encoder.norm(block(entering)))
        q, k = block.attn.qkv(block.norm1(entering)).unflatten(2, (3, 3, 16)).float().unbind(2)[:2]  # (B, 1 + N, K, d)
        attention = camae.class_attention(block, entering)
        assert attention.dtype == torch.float32 and torch.equal(attention, model.encoder.attention(x))
    for head in range(3):
        full = torch.softmax(q[:, :, head] @ k[:, :, head].transpose(1, 2) / 4, 2)         # (B, 1 + N, 1 + N)
        assert torch.allclose(attention[:, head], full[:, 0, 1:], atol=1e-6)


def test_masks_drawn_without_gradient_leave_the_weights_theirs_under_autocast():
    gradients = []
    for autocast in (False, True):
        model, view = build(replace(SMALL["camae"], contrast=False, mask_by="idm")), normal(6, 3, 16, 16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(view, view, torch.tensor([1]))["loss"].backward()
        gradients.append([p.grad for p in model.encoder.blocks.parameters()])
    for full, rough in zip(*gradients):
        assert (full - rough).norm() < 0.2 * full.norm()


@pytest.mark.parametrize("change", [{}, {"mask_by": "random"}, {"contrast": False}, {"norm_pixels": True},
                                    {"contrast": False, "mask_by": "random"}, {"mim": False}, {"plb_loss": "sum"}])
def test_forward_is_section_iii(change):
    cfg = replace(SMALL["camae"], **change)
    model, view1, view2, m = build(cfg), normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1), torch.tensor([1])
    L_c = L_m = torch.zeros(())
    if cfg.contrast:
        with torch.no_grad():
            model.f_xi.norm.weight.add_(0.1)  # so that the networks differ
            model.g_xi.fc2.weight.add_(0.1)
        z1, z2 = (model.g_theta(model.encoder(x)[:, 0]) for x in (view1, view2))
        k1, k2 = (model.g_xi(model.f_xi(x)[:, 0]) for x in (view1, view2))
        L_c = 0.5 * camae.info_nce_loss(z1, k2, cfg.tau) + 0.5 * camae.info_nce_loss(z2, k1, cfg.tau)  # Eq. 1
    torch.manual_seed(5)
    losses = {name: value.item() for name, value in model(view1, view2, m).items()}
    torch.manual_seed(5)
    mask = camae.random_mask(6, 16, 0.75)
    if cfg.mask_by != "random":
        mask = camae.idm_mask(model.encoder.attention(view1)[:, 1], 0.75)                  # Eq. 3
    visible = torch.stack([(~row).nonzero().flatten() for row in mask])
    target = camae.patchify(view1, 4)
    target = camae.normalize_patches(target) if cfg.norm_pixels else target
    if cfg.mim:
        L_m = (model.decoder(model.encoder(view1, visible), visible) - target).square()[mask].mean()  # Eq. 2
    for name, value, there in (("contrast", L_c, cfg.contrast), ("reconstruction", L_m, cfg.mim),
                               ("loss", L_c + L_m, True)):                                 # Eq. 6
        assert (name in losses) == there and losses.get(name, 0) == pytest.approx(value.item(), rel=1e-5), name
    assert torch.allclose(model.encoder.features(view1), model.encoder(view1)[:, 0])


def test_mask_of_a_reconstruction_is_made_as_in_training():
    model, x = build(SMALL["camae"]), normal(4, 3, 16, 16)
    torch.manual_seed(5)
    masked, _ = model.reconstruct(x)
    torch.manual_seed(5)
    head = torch.randint(3, (1,)).item()
    mask = camae.idm_mask(model.encoder.attention(x)[:, head], 0.75)
    assert torch.equal((masked == 0).all(1), macrl.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4).bool()[:, 0])


@pytest.mark.parametrize("change", [{"contrast": False}, {"mim": False}, {"mim": False, "freeze_patch": True}])
def test_what_is_left_out_is_frozen_and_not_computed(change, monkeypatch):
    """autocast caches weights: those cast for the mask without a gradient must not serve the loss."""
    cfg = replace(SMALL["camae"], mask_by="idm", **change)
    model, x = build(cfg), normal(6, 3, 16, 16)
    for part in ("g_theta", "f_xi", "g_xi") if not cfg.contrast else ("decoder",):
        monkeypatch.setattr(getattr(model, part), "forward", None)  # a call of it would raise
    frozen = {"f_xi", "g_xi"} | (set() if cfg.contrast else {"g_theta"}) | (set() if cfg.mim else {"decoder"})
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, x.flip(3))["loss"]
    loss.backward()
    for name, p in model.named_parameters():
        still = name.split(".")[0] in frozen or name.startswith("encoder.patch_embed") and cfg.freeze_patch
        assert p.requires_grad == (not still) and (p.grad is None if still else p.grad.abs().sum() > 0), name


def test_views_of_camae_are_changed_as_often_as_said(monkeypatch):
    torch.manual_seed(0)
    x, none = (255 * torch.rand(300, 3, 16, 16)).byte(), {"jitter": 0.0, "gray": 0.0, "blur": 0.0, "crop_min": 1.0}
    for name, p in {"jitter": 0.6, "gray": 0.6, "blur": 0.6}.items():
        views = []
        for value in (0.0, p):
            torch.manual_seed(1)  # crops and flips are drawn first: the same
            views.append(camae.views(x, replace(SMALL["camae"], **{**none, name: value}))[0])
        changed = ((views[0] - views[1]).abs().amax((1, 2, 3)) > 1e-4).double().mean().item()
        assert changed == pytest.approx(p, abs=0.1), name
    cfg = replace(SMALL["camae"], contrast=False)
    assert torch.equal(*camae.views(x, cfg)) and not torch.equal(*camae.views(x, SMALL["camae"]))
    aspect, crop, told = torch.linspace(0.5, 2, 300), camae.random_resized_crop, []
    monkeypatch.setattr(camae, "random_resized_crop", lambda *args, aspect: told.append(aspect) or crop(*args))
    camae.views(x, SMALL["camae"], aspect)
    assert len(told) == 2 and told[0] is told[1] is aspect


def test_the_last_norm_of_a_projector_has_no_weights():
    projector = camae.projector(48, 96, 32)
    assert {name.split(".")[0] for name, _ in projector.named_parameters()} == {"fc1", "norm1", "fc2", "norm2", "fc3"}
    z = projector(normal(64, 48))
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, correction=0) - 1).abs().max() < 1e-2
    assert not projector.eval()(normal(64, 48)[:32]).allclose(z[:32])                       # the batch's own statistics


@pytest.mark.parametrize("mask_by, plb_loss", [("idm", "mean"), ("plb", "mean"), ("plb", "patches")])
def test_probabilities_and_losses_of_heads_are_logged_each_epoch(few, tmp_path, mask_by, plb_loss, monkeypatch):
    note, seen = camae.PLB.note, []
    forward, told = camae.CAMAE.forward, []
    alone, scale = camae.gather, {"mean": 1, "patches": 12}[plb_loss]  # 12 of 16 patches are masked

    def forward_and_tell(model, view1, view2, m=None):
        losses = forward(model, view1, view2, m)
        told.append((m.item(), 2 * scale * losses["reconstruction"].item()))
        return losses

    def gather(z):  # the loss of a step as if a second process had three times as much: twice on average
        return torch.cat([z, 3 * z]) if z.numel() == 1 else alone(z)

    monkeypatch.setattr(camae, "gather", gather)
    monkeypatch.setattr(camae.CAMAE, "forward", forward_and_tell)
    monkeypatch.setattr(camae.PLB, "note", lambda plb, m, loss: seen.append(m.item()) or note(plb, m, loss))
    out = camae.train(replace(SMALL["camae"], epochs=3, warmup=0.0, mask_by=mask_by, plb_loss=plb_loss, amp=False,
                              log_every=1, data="shapes", out=str(tmp_path / "run")))
    rows = [row for row in csv.DictReader(open(out / "metrics.csv")) if row["p of head 1"]]
    p = torch.tensor([[float(row[f"p of head {m}"]) for m in (1, 2, 3)] for row in rows])
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and torch.allclose(p.sum(1), torch.ones(3))
    assert torch.allclose(p[0], torch.full((3,), 1 / 3))
    in_play = torch.tensor([float(row["heads in play"]) for row in rows])
    assert torch.allclose(in_play, torch.exp(-(p * p.log()).sum(1)), rtol=1e-4)
    plb = common.load_checkpoint(out)["plb"]
    losses = torch.tensor([[float(row[f"loss of head {m}"]) for m in (1, 2, 3)] for row in rows])
    assert [m for m, _ in told] == seen
    for epoch in range(3):
        for m in set(seen[2 * epoch:][:2]):
            mine = [loss for head, loss in told[2 * epoch:][:2] if head == m]
            assert losses[epoch, m].item() == pytest.approx(sum(mine) / len(mine), rel=1e-5)
    if mask_by == "idm":
        assert torch.allclose(p, torch.full((3, 3), 1 / 3)) and torch.allclose(plb["p"], p[0])
        assert seen == torch.cat([camae.PLB(3).draw(2, 0, epoch) for epoch in range(3)]).tolist()
        assert len(set(zip(seen[0::2], seen[1::2]))) > 1
    else:
        filled = torch.where(losses.isnan(), losses.nanmean(1, keepdim=True), losses)
        for before, after, L in zip(p, [*p[1:], plb["p"]], filled):
            assert torch.allclose(after, camae.plb_update(before, L, 0.99, 0.2), atol=1e-6)


def test_contrast_alone_has_no_heads_to_log(few, tmp_path):
    with pytest.raises(common.UserError, match="--no-contrast --no-mim: leave nothing"):
        replace(SMALL["camae"], contrast=False, mim=False)
    out = camae.train(replace(SMALL["camae"], epochs=1, warmup=0.0, mim=False, freeze_patch=True, data="shapes",
                              out=str(tmp_path / "run")))
    row = list(csv.DictReader(open(out / "metrics.csv")))[-1]
    assert not [name for name in row if "head" in name or name == "reconstruction"] and float(row["contrast"]) > 0
    before, after = build(SMALL["camae"]).state_dict(), torch.load(out / "encoder.pt", weights_only=True)
    assert torch.equal(before["encoder.patch_embed.proj.weight"], after["patch_embed.proj.weight"])
    assert not torch.equal(before["encoder.norm.weight"], after["norm.weight"])


# MACRL

def test_bank_is_first_in_first_out_and_wraps_around():
    def holds(keys):
        """Whether the bank holds these, in any order."""
        return torch.allclose(*(torch.tensor(sorted(x.tolist())) for x in (bank.keys, keys)), atol=1e-6)

    bank, rows = macrl.Bank(5, 3), F.normalize(normal(14, 3), dim=1)
    start = bank.keys.clone()
    assert torch.allclose(start.norm(dim=1), torch.ones(5)) and len(start.unique(dim=0)) == 5
    for seen, n in ((2, 2), (4, 2), (7, 3)):
        bank.push(3 * rows[seen - n:seen])  # of any length: unit vectors are kept
        assert holds(torch.cat([rows[max(0, seen - 5):seen], start[seen:]]))
    assert torch.allclose(bank.keys[2:4], rows[2:4]) and torch.allclose(bank.keys[:2], rows[5:7])
    bank.push(rows[7:14])  # more than it holds: the last five
    assert holds(rows[9:14])
    bank.push(rows[:1])
    assert holds(torch.cat([rows[10:14], rows[:1]]))
    macrl.Bank(0, 3).push(rows)


def test_the_bank_runs_where_only_torch_is():
    names = {"torch": torch, "nn": torch.nn, "F": F}
    exec(source("macrl", "Bank"), names)
    bank, k = names["Bank"](4, 3), normal(2, 3)
    bank.push(k)
    assert bank.pushed == 2 and torch.allclose(bank.keys[:2], F.normalize(k, dim=1))


@pytest.mark.parametrize("change", [{}, {"keys": "shared"}, {"pool": "cls"}, {"pixels": "all"}, {"norm_pixels": True},
                                    {"lam_c": 0.5, "lam_r": 2.0}])
def test_forward_of_macrl(change):
    cfg = replace(SMALL["macrl"], bank=20, **change)
    model, (view1, view2, target1, target2) = build(cfg), [normal(6, 3, 16, 16, seed=i) for i in range(4)]
    f, g = (model.f_xi, model.g_xi) if cfg.keys == "momentum" else (model.encoder, model.g)
    if cfg.keys == "momentum":
        with torch.no_grad():
            f.norm.weight.add_(0.1)  # so that the networks differ
            g.fc2.weight.add_(0.1)
    bank = model.bank.keys.clone()
    torch.manual_seed(5)
    losses = model(view1, view2, target1, target2)
    torch.manual_seed(5)
    L1, vectors = [], []
    for view, target, ratio, decoder in ((view1, target1, 0.75, model.decoder_s),
                                         (view2, target2, 0.5, model.decoder_w)):
        mask = macrl.random_mask(6, 16, ratio)
        assert mask.sum() == 6 * 16 * ratio
        visible = torch.stack([(~row).nonzero().flatten() for row in mask])
        patches = macrl.patchify(target, 4)
        patches = macrl.normalize_patches(patches) if cfg.norm_pixels else patches
        error = (decoder(model.encoder(view, visible), visible) - patches).abs()
        L1.append(error.mean().item() if cfg.pixels == "all" else error[mask].mean().item())
        tokens = (f if view is view2 else model.encoder)(view, visible)
        vectors.append(tokens[:, 0] if cfg.pool == "cls" else tokens[:, 1:].mean(1))
    k = g(vectors[1])
    L_c = macrl.info_nce_loss(model.g(vectors[0]), k, bank, cfg.tau).item()
    assert losses["contrast"].item() == pytest.approx(L_c, rel=1e-5)
    assert [losses[f"reconstruction {branch}"].item() for branch in "sw"] == pytest.approx(L1, rel=1e-5)
    assert losses["reconstruction"].item() == pytest.approx(sum(L1) / 2, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(cfg.lam_c * L_c + cfg.lam_r * sum(L1) / 2, rel=1e-5)
    assert torch.allclose(model.bank.keys[:6], F.normalize(k, dim=1), atol=1e-6)
    assert torch.equal(model.bank.keys[6:], bank[6:])


@pytest.mark.parametrize("change, calls, terms", [
    ({}, {"encoder": 2, "g": 1, "f_xi": 1, "g_xi": 1, "decoder_s": 1, "decoder_w": 1}, 5),
    ({"keys": "shared"}, {"encoder": 2, "g": 2, "decoder_s": 1, "decoder_w": 1}, 5),
    ({"lam_c": 0.0}, {"encoder": 2, "decoder_s": 1, "decoder_w": 1}, 4),
    ({"lam_c": 0.0, "keys": "shared"}, {"encoder": 2, "decoder_s": 1, "decoder_w": 1}, 4),
    ({"lam_r": 0.0}, {"encoder": 1, "g": 1, "f_xi": 1, "g_xi": 1}, 2),
    ({"lam_r": 0.0, "keys": "shared"}, {"encoder": 2, "g": 2}, 2)])
def test_what_a_weight_of_0_leaves_out_of_macrl_is_not_computed(change, calls, terms):
    cfg = replace(SMALL["macrl"], **change)
    model, whole, counts = build(cfg), build(replace(cfg, lam_c=1.0, lam_r=1.0)), Counter()
    for name, part in model.named_children():
        part.register_forward_hook(lambda *_, name=name: counts.update([name]))
    bank = model.bank.keys.clone()
    results = []
    for network in (model, whole):
        torch.manual_seed(5)
        results.append(network(normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1)))
    losses, full = results
    assert counts == calls and len(losses) == terms
    for name in losses.keys() - {"loss"}:
        assert torch.equal(losses[name], full[name])  # what remains is as it was
    assert model.bank.pushed == (6 if "contrast" in losses else 0)
    assert torch.equal(model.bank.keys, bank) == ("contrast" not in losses)
    losses["loss"].backward()  # what is trained has a gradient, or DistributedDataParallel would wait for it
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert {name.split(".")[0] for name in trained} == calls.keys() - {"f_xi", "g_xi"}


def test_a_view_is_its_own_target_unless_another_is_given():
    model, view1, view2 = build(SMALL["macrl"]), normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1)
    given = []
    for targets in ((), (view1, view2), (view2, view1)):
        torch.manual_seed(5)
        given.append(model(view1, view2, *targets)["reconstruction"])
    assert torch.equal(given[0], given[1]) and not torch.equal(given[0], given[2])


def test_each_decoder_learns_from_its_own_branch():
    model = build(SMALL["macrl"])
    losses = model(normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1))
    for branch, own, other in (("s", model.decoder_s, model.decoder_w), ("w", model.decoder_w, model.decoder_s)):
        model.zero_grad()
        losses[f"reconstruction {branch}"].backward(retain_graph=True)
        assert all(p.grad.abs().sum() > 0 for p in own.parameters()) and all(p.grad is None for p in other.parameters())
        assert model.encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("keys", ["momentum", "shared"])
def test_contrast_reaches_the_encoder_through_keys_only_if_they_are_shared(keys):
    model = build(replace(SMALL["macrl"], keys=keys))
    view1, view2 = normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1).requires_grad_()
    model(view1, view2)["contrast"].backward()
    assert (view2.grad is not None and view2.grad.abs().sum() > 0) == (keys == "shared")


def test_branch_s_changes_its_colours_more_and_the_targets_are_not():
    torch.manual_seed(0)
    x, cfg = (255 * torch.rand(400, 3, 16, 16)).byte(), SMALL["macrl"]
    clean = macrl.clean_views(x, cfg)

    def changed(cfg):
        """The share of either branch's images that are not as they were."""
        return [((view - common.normalize(crop)).abs().amax((1, 2, 3)) > 1e-4).double().mean().item()
                for view, crop in zip(macrl.change_colours(clean, cfg), clean)]

    assert changed(cfg) == pytest.approx([1 - 0.2 * 0.8, 0.4], abs=0.08)                   # jitter or grey; jitter
    none = dict.fromkeys(["jitter_s", "jitter_w", "gray_s", "gray_w", "blur_s", "blur_w"], 0.0)
    for name in none:
        share = changed(replace(cfg, **{**none, name: 0.6}))
        assert share == pytest.approx([0.6, 0] if name.endswith("s") else [0, 0.6], abs=0.08), name
    grey = macrl.change_colours(clean, replace(cfg, **{**none, "gray_s": 1.0}))[0]
    assert torch.allclose(grey, common.normalize(rgb_to_grayscale(clean[0], 3)), atol=1e-5)
    whole = torch.rand(400, 3, 64, 64)
    for least in ((0.2, 0.9), (0.9, 0.2)):  # the larger a crop, the more is noise averaged out
        crops = macrl.clean_views(whole, replace(cfg, crop_min_s=least[0], crop_min_w=least[1]))
        noise = [crop.diff(dim=3).square().mean((1, 2, 3)) for crop in crops]
        assert (noise[0].mean() > 1.5 * noise[1].mean()) == (least[0] < least[1])
        spread = [part.std() / part.mean() for part in noise]
        assert (spread[0] > 3 * spread[1]) == (least[0] < least[1])                        # the largest is the whole
        assert (crops[0] - crops[1]).abs().mean() > 0.05


@pytest.mark.parametrize("make", [macrl.clean_views, macrl.views])
def test_both_branches_of_macrl_crop_in_true_proportions(make):
    given, plain = [], dict.fromkeys(["jitter_s", "jitter_w", "gray_s"], 0.0)
    for aspect in (None, torch.ones(8), torch.full((8,), 4.0)):
        torch.manual_seed(0)
        given.append(make((255 * normal(8, 3, 64, 64).sigmoid()).byte(), replace(SMALL["macrl"], **plain), aspect))
    for square, ones, wide in zip(*given):
        assert torch.equal(square, ones) and all((square - wide).abs().amax((1, 2, 3)) > 1e-3)


@pytest.mark.parametrize("change", [{}, {"pixels": "all"}, {"norm_pixels": True}])
def test_reconstruct_shows_either_branch(change):
    model, x, target = build(replace(SMALL["macrl"], **change)), normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1)
    with torch.no_grad():
        for value, decoder in ((2.0, model.decoder_s), (3.0, model.decoder_w)):
            decoder.pred.weight.zero_()
            decoder.pred.bias.fill_(value)
    for branch, ratio, value in (("s", 0.75, 2.0), ("w", 0.5, 3.0)):
        masked, shown = model.reconstruct(x, branch, target)
        hidden = masked != x
        assert hidden.double().mean() == ratio
        patches = macrl.patchify(target, 4)
        expected = torch.full_like(patches, value)
        if "norm_pixels" in change:
            expected = patches.mean(2, keepdim=True) + value * patches.std(2, keepdim=True)
        expected = macrl.unpatchify(expected.expand_as(patches), 4)
        assert torch.allclose(shown, expected if "pixels" in change else torch.where(hidden, expected, x), atol=1e-4)


def test_momentum_networks_of_macrl_begin_as_copies():
    model = build(SMALL["macrl"])
    for one, average in ((model.encoder, model.f_xi), (model.g, model.g_xi)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), average.parameters()))
        assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize("lam_c", [0.0, 1.0])
def test_averages_of_macrl_move_only_where_there_is_contrast(few, tmp_path, lam_c, monkeypatch):
    moved = []
    monkeypatch.setattr(macrl, "ema", lambda average, model, m: moved.append(type(average)))
    macrl.train(replace(SMALL["macrl"], epochs=1, warmup=0, lam_c=lam_c, out=str(tmp_path / "run")))
    assert moved == [macrl.Encoder, torch.nn.Sequential] * (2 if lam_c > 0 else 0)         # in each of two steps


@pytest.mark.parametrize("restore", ["clean", "view"])
def test_training_restores_the_crop_before_its_colours_were_changed(few, tmp_path, restore, monkeypatch):
    forward, given = macrl.MACRL.forward, []
    monkeypatch.setattr(macrl.MACRL, "forward", lambda *args: given.append(args[1:]) or forward(*args))
    macrl.train(replace(SMALL["macrl"], epochs=1, warmup=0, jitter_s=0.0, jitter_w=0.0, gray_s=1.0, restore=restore,
                        out=str(tmp_path / "run")))
    for view1, view2, *targets in given:
        assert len(targets) == (2 if restore == "clean" else 0)
        if targets:
            target1, target2 = targets
            grey = rgb_to_grayscale(common.denormalize(target1), 3)
            assert torch.allclose(common.denormalize(view1), grey, atol=1e-5) and torch.equal(view2, target2)
            assert not torch.allclose(view1, target1)

# What stands in for a GPU: the meta device

class OneDevice(TorchDispatchMode):
    """Fails where an operation mixes devices; copies from one to another are what they are for."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = [y for x in (*args, *(kwargs or {}).values()) for y in (x if isinstance(x, (list, tuple)) else [x])]
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        assert len(devices) < 2 or "copy" in str(func), f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cfg", [*SMALL.values(), *BACKBONES[1:]], ids=lambda cfg: f"{type(cfg).__module__}-{cfg.dim}-"
                         + getattr(cfg, "backbone", ""))
def test_a_step_waits_for_nothing_and_stays_on_its_device(cfg, monkeypatch):
    """On the meta device .item(), .cpu() and nonzero raise. It shows no waits and no strays, not right kernels."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **kw: contextlib.nullcontext() if device == "meta" else
                        autocast(device, *args, **kw))
    model = build(cfg).to("meta")
    images, aspect = torch.zeros(8, 3, 16, 16, dtype=torch.uint8, device="meta"), torch.ones(8, device="meta")
    with OneDevice():
        views = sys.modules[type(cfg).__module__].views(images, cfg, aspect)
        assert all(view.device.type == "meta" and view.shape == (8, 3, 16, 16) for view in views)
        model(*views)["loss"].backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        views[0].sum().item()
    with pytest.raises(AssertionError), OneDevice():
        views[0] @ torch.ones(16, 16)


# What the files and their pages promise

VIEWS = {"views", "contrastive_crop", "clean_views", "change_colours", "Boxes"}  # these use common's crops and colours


def definitions(method):
    """The functions and classes of a method's file: name → syntax tree."""
    tree = ast.parse((HERE / f"{method}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def source(method, name):
    """The text of a function, a class or a method ("Encoder.forward") of a method's file."""
    node, text = {"": ast.parse((HERE / f"{method}.py").read_text())}[""], (HERE / f"{method}.py").read_text()
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == part)
    return ast.get_source_segment(text, node)


@every_method
def test_model_code_needs_nothing_of_the_project(method):
    own = {path.stem for path in HERE.glob("*.py")}
    imports = [node for node in ast.parse((HERE / f"{method}.py").read_text()).body
               if isinstance(node, ast.ImportFrom) and node.module in own]
    foreign = {alias.asname or alias.name for node in imports for alias in node.names}
    assert {"Run", "load_data"} <= foreign and len(imports) == 1
    for name, node in definitions(method).items():
        if name not in {"Config", "train", "main"} | VIEWS:
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert not used & foreign, f"{name} needs {used & foreign}"


PARTS = {"mclim": "dcl_loss info_nce_loss reconstruction_loss random_mask ema Encoder MCLim",
         "mvmae": "nt_xent_loss reconstruction_loss Encoder MVMAE", "cmae": "location_loss semantic_boxes Encoder CMAE",
         "macrl": "info_nce_loss Bank Encoder MACRL", "camae": "idm_mask plb_update PLB masked_mse Encoder CAMAE"}


@pytest.mark.parametrize("method, part", [(method, part) for method in METHODS for part in PARTS[method].split()])
def test_a_part_runs_when_it_is_copied_as_text(method, part):
    """With torch, nn, F, dist, math, copy, OrderedDict and the functions that it visibly calls."""
    known, wanted, taken = definitions(method), [part], {}
    while wanted:
        name = wanted.pop()
        if name in known and name not in taken and name not in ("SwinEncoder", "HiViTEncoder"):
            taken[name] = source(method, name)
            wanted += [n.id for n in ast.walk(known[name]) if isinstance(n, ast.Name)]
    space = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "dist": torch.distributed, "math": math,
             "copy": copy, "OrderedDict": OrderedDict}
    exec("\n\n".join(taken.values()), space)
    outcome = []
    for where in (space, vars(MODULES[method])):
        torch.manual_seed(0)
        z, x, mask = normal(6, 16), normal(6, 3, 16, 16), torch.arange(96).view(6, 16) % 3 > 0
        call = {"dcl_loss": lambda f: f(z, z.flip(1), 0.2), "nt_xent_loss": lambda f: f(z, z.flip(1), 0.2),
                "info_nce_loss": lambda f: f(z, z.flip(1), *[z] * (method == "macrl"), 0.2),
                "reconstruction_loss": lambda f: f(normal(6, 16, 5), normal(6, 16, 5, seed=1), mask),
                "masked_mse": lambda f: f(normal(6, 16, 5), normal(6, 16, 5, seed=1), mask),
                "random_mask": lambda f: f(6, 16, 0.5), "idm_mask": lambda f: f(z, 0.75),
                "plb_update": lambda f: f(z[0].softmax(0), z[1], 0.9, 0.2),
                "location_loss": lambda f: f(normal(6, 4, 16), mask[:, :4].long()),
                "semantic_boxes": lambda f: f(z.view(6, 4, 4), 0.1),
                "ema": lambda f: f(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), 0.9),
                "Encoder": lambda f: f(SMALL[method]).features(x),
                "Bank": lambda f: f(5, 16).keys, "PLB": lambda f: f(3).draw(5, 0, 0)}
        run_it = call.get(part, lambda f: f(SMALL[method])(x, x.flip(3))["loss"])
        outcome.append(run_it(where[part]))
    assert outcome[0] is outcome[1] is None or torch.equal(*outcome)


def test_a_block_that_files_share_is_the_same_to_the_letter():
    own, sources = {"Config", "Encoder", "train", "main", "views"}, {}  # a paper's own, and its losses
    for method in METHODS:
        for name in definitions(method):
            if name not in own and not name.endswith("_loss"):
                sources.setdefault(name, []).append(source(method, name))
    shared = {name for name, texts in sources.items() if len(texts) > 1}
    assert {"Attention", "Block", "patchify", "gather", "random_mask", "ema", "Decoder"} <= shared
    for name in shared:
        assert len(set(sources[name])) == 1, name


@every_method
def test_every_equation_stands_on_a_line_of_code_and_in_the_walk(method):
    text = (HERE / f"{method}.py").read_text().split('"""', 2)[2]
    marked = {int(n) for line in text.splitlines() if "#" in line and re.match(r"\s*[^\s#]", line)
              for n in re.findall(r"Eq\. (\d+)", line.split("#", 1)[1])}
    walked = {int(n) for row in walk(method) for n in re.findall(r"Eq\. (\d+)", row[0])}
    assert marked >= set(METHODS[method]) and walked >= set(METHODS[method])


def walk(method):
    """The rows of the page's table "The walk" that quote code: paper, formula, code, where."""
    page = (HERE / "papers" / f"{method}.md").read_text()
    part = page[page.index("## The walk"):page.index("## What the")]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in part.splitlines() if "|" in line]
    return [row for row in cells if len(row) == 4 and "`" in row[2]]


@every_method
def test_the_page_quotes_the_file(method):
    rows = walk(method)
    assert len(rows) > 8
    for _, _, code, where in rows:
        text = " ".join(source(method, where.strip("`")).split())
        for quote in re.findall(r"`([^`]+)`", code):
            assert text.count(" ".join(quote.split())) == 1, f"{where} does not hold {quote!r} once"


@every_method
def test_the_page_names_flags_that_exist_and_draws_whole_formulas(method):
    page = (HERE / "papers" / f"{method}.md").read_text()
    modules = *MODULES.values(), eval_finetune
    fields = {field.name for module in modules for field in dataclasses.fields(module.Config)}
    others = {"baselines", "seeds", "nproc_per_node", "rows", "gflop"}
    for flag in re.findall(r"--(?:no-)?([a-z][a-z0-9-]*)", page):
        assert flag.replace("-", "_") in fields | others, f"--{flag}"
    for formula in re.findall(r"\$([^$]+)\$", page):
        assert formula.count("{") == formula.count("}") and "|" not in formula and "*" not in formula, formula
