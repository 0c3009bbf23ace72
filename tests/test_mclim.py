"""MCLim: its formulas as plain loops, its masks, its three encoders, its second branch."""
import math

import pytest
import torch

import mclim
from augment import normalize
from common import load_checkpoint
from conftest import build, normal, small

BACKBONES = {"vit": {}, "swin": {"backbone": "swin", "dim": 192},
             "hivit": {"backbone": "hivit", "dim": 192}}
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def pair(B=4):
    return normal(B, 3, 16, 16), normal(B, 3, 16, 16, seed=1)


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_contrastive_losses_equal_the_printed_sums(tau):
    B, z = 5, {1: normal(5, 7), 2: normal(5, 7, seed=1)}

    def product(k, i, l, j):
        a, b = z[k][i].tolist(), z[l][j].tolist()
        length = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        return sum(x * y for x, y in zip(a, b)) / length / tau

    dcl, nce = [], []
    for k in (1, 2):
        for i in range(B):
            U = sum(math.exp(product(k, i, l, j)) for l in (1, 2) for j in range(B) if j != i)
            p = product(1, i, 2, i)
            dcl.append(-p + math.log(U))  # Eq. 9 with Eq. 8
            nce.append(-math.log(math.exp(p) / (math.exp(p) + U)))  # Eq. 7
    for loss, terms in ((mclim.dcl_loss, dcl), (mclim.info_nce_loss, nce)):
        with torch.autocast("cpu", torch.bfloat16):  # the losses are in float32
            found = loss(z[1], z[2], tau).item()
        assert found == pytest.approx(sum(terms) / 10, rel=1e-5)


def test_a_patch_is_masked_where_its_block_is():
    mask = mclim.random_mask(3, 16, 0.5)
    fine = mclim.repeat_blocks(mask, 12)
    for y in range(12):
        for x in range(12):
            assert torch.equal(fine[:, 12 * y + x], mask[:, 4 * (y // 3) + x // 3])


@pytest.mark.parametrize("backbone, side, masked", [("vit", 16, 118), ("swin", 32, 29),
                                                    ("hivit", 32, 29)])
def test_sizes_of_the_paper(backbone, side, masked):
    """Blocks of 32×32 for Swin and HiViT, §3.2, and the parameters of Table 1 (see the page)."""
    with torch.device("meta"):
        model = mclim.MCLim(mclim.Config(backbone=backbone))
    assert model.N_b == (224 // side) ** 2 and round(0.6 * model.N_b) == masked
    size = sum(p.numel() for p in model.encoder.parameters())
    assert round(size / 1e6, 2) == {"vit": 43.12, "swin": 48.88, "hivit": 34.32}[backbone]


@every_backbone
def test_masked_pixels_do_not_reach_the_encoder(backbone):
    model, x = build(small("mclim", **BACKBONES[backbone])), normal(4, 3, 16, 16)
    mask = mclim.random_mask(4, model.N_b, 0.5)
    hidden = mclim.repeat_blocks(mask, 16).view(4, 1, 16, 16)
    tokens, other_masked, other_visible = (
        model.encoder(image, mask, model.mask_token)
        for image in (x, x.masked_fill(hidden, 7.0), x.masked_fill(~hidden, 7.0)))
    assert torch.equal(tokens, other_masked) and not torch.allclose(tokens, other_visible)
    other_token = model.encoder(x, mask, model.mask_token + 1)
    assert not torch.allclose(tokens, other_token)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_predicted_patches_get_their_mean_and_deviation_back(norm_pixels):
    model = build(small("mclim", norm_pixels=norm_pixels, pixels="all", head="linear"))
    torch.nn.init.zeros_(model.T1.weight)
    torch.nn.init.constant_(model.T1.bias, 2.0)
    image = normal(3, 3, 16, 16)
    true = mclim.patchify(image, 4)
    expected = 2 * true.std(2) + true.mean(2) if norm_pixels else torch.full((3, 16), 2.0)
    shown = mclim.patchify(model.reconstruct(image)[1], 4)
    assert torch.allclose(shown, expected[:, :, None].expand_as(shown), atol=1e-3)


@pytest.mark.parametrize("changes", [
    {}, {"pixels": "all"}, {"contrast": "infonce", "lam": 0.5}, {"target": "shared"},
    {"target": "separate"}, {"norm_pixels": False}, {"pool": "visible"}], ids=str)
def test_forward_is_section_2(changes):
    cfg = small("mclim", **changes)
    model, (view1, view2) = build(cfg), pair(6)
    if cfg.target == "momentum":
        torch.nn.init.constant_(model.F2.norm.weight, 1.1)  # so that the branches differ
    mask = mclim.random_mask(6, 16, 0.6)
    losses = model(view1, view2, mask)
    Z1 = model.T1(model.encoder(view1, mask, model.mask_token))  # Eq. 1, 3
    target = mclim.patchify(view1, 4)
    if cfg.norm_pixels:
        target = (target - target.mean(2, True)) / target.std(2, keepdim=True)
    errors = (Z1 - target).square()
    L1 = errors[mask].mean() if cfg.pixels == "masked" else errors.mean()  # Eq. 4, 6
    chosen = ~mask if cfg.pool == "visible" else torch.ones_like(mask)
    z1 = torch.stack([Z[row].mean(0) for Z, row in zip(Z1, chosen)])
    z2 = model.T2(model.F2(view2)).mean(1)  # Eq. 2, 5
    L2 = (mclim.dcl_loss if cfg.contrast == "dcl" else mclim.info_nce_loss)(z1, z2, cfg.tau)
    assert losses["reconstruction"].item() == pytest.approx(L1.item(), rel=1e-5)
    assert losses["contrast"].item() == pytest.approx(L2.item(), rel=1e-5)
    loss = cfg.lam * L1 + L2  # Eq. 10
    assert losses["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    weight = model.encoder.blocks[0].attn.qkv.weight
    found, expected = (torch.autograd.grad(x, weight)[0] for x in (losses["loss"], loss))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backbone, head, target, freeze", [
    ("vit", "mlp", "momentum", True), ("vit", "mlp", "shared", True),
    ("vit", "mlp", "separate", True), ("vit", "linear", "separate", False),
    ("vit", "vit", "momentum", False), ("swin", "vit", "separate", True),
    ("hivit", "vit", "momentum", True), ("hivit", "mlp", "separate", True)])
def test_which_parameters_are_trained(backbone, head, target, freeze):
    cfg = small("mclim", head=head, target=target, freeze_patch=freeze, **BACKBONES[backbone])
    model = build(cfg)
    model(*pair())["loss"].backward()
    for name, p in model.named_parameters():
        frozen = target == "momentum" and name.startswith(("F2.", "T2."))
        frozen |= freeze and ".patch_embed." in name
        assert p.requires_grad != frozen, name
        assert p.grad is None if frozen else p.grad.abs().sum() > 0, name


def test_weights_of_branch_2():
    for target, same, equal in (("momentum", False, True), ("shared", True, True),
                                ("separate", False, False)):
        model = build(small("mclim", target=target))
        for one, two in ((model.encoder, model.F2), (model.T1, model.T2)):
            assert (one is two) == same
            weights = [next(p for p in part.parameters() if p.ndim > 1) for part in (one, two)]
            assert torch.equal(*weights) == equal


def test_init_is_loaded_into_each_branch_and_separate_weights_are_no_average(
        tmp_path, monkeypatch):
    monkeypatch.setattr(mclim, "ema", lambda *_: pytest.fail("an average"))
    monkeypatch.setattr(mclim.Run, "draw", lambda *_: None)
    cfg = small("mclim", images=16, warmup=0, lr=1e-12, target="separate")
    encoder = build(small("mclim", seed=5)).encoder
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    cfg.init, cfg.out = str(tmp_path / "encoder.pt"), str(tmp_path / "run")
    state = load_checkpoint(mclim.train(cfg))["model"]
    for name, value in encoder.state_dict().items():
        assert torch.allclose(state[f"encoder.{name}"], value, atol=1e-6), name
        assert torch.allclose(state[f"F2.{name}"], value, atol=1e-6), name


def test_flags_give_moco_v3_and_simmim():
    moco = build(small("mclim", mask=0.0, lam=0.0))
    view1, view2 = pair()
    losses = moco(view1, view2)
    z1, z2 = moco.T1(moco.encoder(view1)).mean(1), moco.T2(moco.F2(view2)).mean(1)
    assert set(losses) == {"loss", "contrast"} and not moco.mask_token.requires_grad
    assert losses["loss"].item() == pytest.approx(mclim.dcl_loss(z1, z2, 0.2).item(), rel=1e-5)
    simmim = build(small("mclim", contrast="none"))
    losses = simmim(view1, None)
    assert set(losses) == {"loss", "reconstruction"} and losses["loss"] == losses["reconstruction"]
    assert not hasattr(simmim, "F2")


def test_views_are_section_2_1():
    cfg = small("mclim", img=24, crop_min=1.0, crop_max=1.0, jitter=0.0, gray=0.0)
    flat = (255 * torch.rand(6, 3, 1, 1)).byte().expand(6, 3, 16, 16)
    expected = normalize(flat[:, :, :1, :1] / 255).expand(6, 3, 24, 24)
    for changes in ({}, {"jitter": 1.0}, {"gray": 1.0}):
        view1, view2 = mclim.views(flat, small("mclim", **{**vars(cfg), **changes}))
        assert torch.allclose(view1, expected, atol=1e-5)  # only branch 2 is changed
        assert torch.allclose(view2, expected, atol=1e-2) == (not changes)
    rgb = view2 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    rgb = rgb + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    assert torch.allclose(rgb, rgb.mean(1, keepdim=True).expand_as(rgb), atol=1e-5)
    steps = (255 * torch.rand(6, 3, 16, 16)).byte()
    sharp, blurred = (mclim.views(steps, small("mclim", **{**vars(cfg), "img": 16, "blur": blur}))
                      for blur in (0.0, 1.0))
    assert torch.equal(sharp[0], blurred[0]) and blurred[1].var() < 0.9 * sharp[1].var()


def test_crops_are_65_to_90_percent_and_independent():
    """A horizontal and a vertical ramp: the range of values in a crop tells its area."""
    ramp = torch.arange(256).expand(32, 256, 256)
    images = torch.stack([ramp, ramp.mT, ramp], 1).byte()
    cfg = small("mclim", img=64, jitter=0.0, gray=0.0)
    areas = []
    for view in mclim.views(images, cfg):
        rgb = view * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        spans = rgb.amax((2, 3)) - rgb.amin((2, 3))
        areas.append(spans[:, 0] * spans[:, 1])
    assert not torch.allclose(*areas, atol=0.02)
    assert 0.63 < min(map(torch.min, areas)) < 0.69 and 0.82 < max(map(torch.max, areas)) < 0.91


def test_attention_is_in_float32_on_a_cpu(monkeypatch):
    seen, attention = set(), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, *rest: seen.add(q.dtype) or attention(q, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        build(small("mclim", **BACKBONES["hivit"])).encoder(normal(2, 3, 16, 16))
    assert seen == {torch.float32}


@every_backbone
def test_a_mask_does_not_change_the_precision_of_any_part(backbone):
    model, x = build(small("mclim", **BACKBONES[backbone])), normal(2, 3, 16, 16)
    seen = []
    for name, part in model.encoder.named_modules():
        part.register_forward_pre_hook(
            lambda part, inputs, name=name: seen.append((name, inputs[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model.encoder(x, mclim.random_mask(2, model.N_b, 0.5), model.mask_token)
        masked = seen.copy()
        seen.clear()
        model.encoder(x)
    assert masked == seen
