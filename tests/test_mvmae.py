"""Multi-View MAE: its formulas as plain loops, its masks, its degenerate case MAE."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mvmae
from conftest import build, normal, small
from images import load_images


def test_nt_xent_equals_the_printed_sums():
    z1, z2, tau = normal(5, 8), normal(5, 8, seed=1), 0.3
    z = [z for pair in zip(z1, z2) for z in pair]  # z_1, z_2, …: 2k - 1 and 2k belong together

    def sim(i, j):  # Eq. 5
        return (z[i] @ z[j] / (z[i].norm() * z[j].norm())).item()

    def ell(i, j):  # Eq. 4
        others = [math.exp(sim(i, k) / tau) for k in range(10) if k != i]
        return -math.log(math.exp(sim(i, j) / tau) / sum(others))

    printed = sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(5)) / 10  # Eq. 6
    with torch.autocast("cpu", torch.bfloat16):  # the loss is in float32
        loss = mvmae.nt_xent_loss(z1, z2, tau).item()
    assert loss == pytest.approx(printed, rel=1e-5)


def test_mask_has_equally_many_patches_in_each_row_and_is_uniform():
    mask = mvmae.random_mask(4000, 25, 0.6)
    assert mask.dtype == torch.bool and (mask.sum(1) == 15).all()
    assert (mask.float().mean(0) - 0.6).abs().max() < 5 * math.sqrt(0.24 / 4000)
    assert not torch.equal(mask[0], mask[1])


def test_visible_ids_are_the_unmasked_patches_in_order():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert mvmae.visible_first(mask).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    x = normal(2, 4, 3)
    assert torch.equal(mvmae.take(x, torch.tensor([[1, 3], [0, 1]])),
                       torch.stack([x[0, [1, 3]], x[1, [0, 1]]]))


def test_patches_are_cut_and_joined():
    x = normal(2, 3, 12, 12)
    patches = mvmae.patchify(x, 4)
    for n, c, i, j in [(0, 0, 0, 0), (5, 2, 3, 1), (7, 1, 0, 2)]:
        assert torch.equal(patches[:, n, c * 16 + i * 4 + j],
                           x[:, c, n // 3 * 4 + i, n % 3 * 4 + j])
    assert torch.equal(mvmae.unpatchify(patches, 4), x)
    normalized = mvmae.normalize_patches(patches)
    assert torch.allclose(normalized.mean(2), torch.zeros(2, 9), atol=1e-5)
    assert torch.allclose(normalized.std(2), torch.ones(2, 9), atol=1e-4)
    assert torch.allclose(mvmae.denormalize_patches(normalized, patches), patches, atol=1e-5)


def test_attention_is_softmax_of_queries_and_keys_times_values():
    attention, x = mvmae.Attention(12, 3), normal(2, 5, 12)
    q, k, v = attention.qkv(x).chunk(3, 2)
    heads = [torch.softmax(q[:, :, i:i + 4] @ k[:, :, i:i + 4].mT / 2, 2) @ v[:, :, i:i + 4]
             for i in (0, 4, 8)]
    assert torch.allclose(attention(x), attention.proj(torch.cat(heads, 2)), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert mvmae.attend(*normal(3, 2, 3, 5, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("changes", [
    {}, {"pool": "cls"}, {"pixels": "all"}, {"norm_pixels": True}, {"targets": "one", "lam": 0}],
    ids=str)
def test_forward_is_the_step_of_the_docstring(changes):
    cfg = small("mvmae", **{"lam": 1.5, "tau": 0.5, **changes})
    model, view1, view2 = build(cfg), normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1)
    x = view1 if cfg.targets == "one" else torch.cat([view1, view2])
    mask = mvmae.random_mask(len(x), 16, 0.8)
    losses = model(view1, view2, mask)
    ids = torch.stack([(~row).nonzero()[:, 0] for row in mask])  # (B or 2B, 3)
    z, target = model.encoder(x, ids), mvmae.patchify(x, 4)
    target = mvmae.normalize_patches(target) if cfg.norm_pixels else target
    error = (model.decoder(z, ids) - target).square()
    L_r = error.mean() if cfg.pixels == "all" else error[mask].mean()  # Eq. 3
    expected = {"loss": L_r, "reconstruction": L_r}
    if cfg.lam > 0:
        vectors = z[:, 0] if cfg.pool == "cls" else z[:, 1:].mean(1)
        expected["contrast"] = mvmae.nt_xent_loss(*vectors.chunk(2), 0.5)
        expected["loss"] = L_r + 1.5 * expected["contrast"]  # Eq. 7
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_masked_patches_do_not_reach_the_encoder():
    model, view = build(small("mvmae", lam=0, targets="one")), normal(2, 3, 16, 16)
    mask = mvmae.random_mask(2, 16, 0.8)
    ids = mvmae.visible_first(mask)[:, :model.V]
    patches = mvmae.patchify(view, 4).masked_fill(mask[:, :, None], 9.0)
    assert torch.equal(model.encoder(view, ids), model.encoder(mvmae.unpatchify(patches, 4), ids))


def test_targets():
    images = load_images("shapes", "train", 18)
    for targets, same in (("two", False), ("same", True), ("one", True)):
        cfg = small("mvmae", targets=targets, lam=0 if targets == "one" else 2)
        view1, view2 = mvmae.views(images[torch.arange(4)], cfg)
        assert view1.shape == (4, 3, 16, 16) and torch.equal(view1, view2) == same


def test_views_are_bicubic_crops():
    images = load_images("shapes", "train", 18)[torch.arange(64)]
    view = mvmae.views(images, small("mvmae", crop_min=1.0, img=64))[0]
    linear = F.interpolate(images.pixels / 255.0, 64, mode="bilinear")
    pixels = view * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor(
        [0.485, 0.456, 0.406])[:, None, None]
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert (pixels > linear.amax((2, 3), keepdim=True) + 0.01).any()  # only bicubic overshoots


def test_the_learning_rate():
    rates = [mvmae.cosine_lr(step, 100, 10, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.002
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_weight_decay_spares_biases_norms_and_tokens():
    model = build(small("mvmae"))
    decayed, plain = mvmae.param_groups(model, 0.05)
    spared = {id(p) for p in plain["params"]}
    for name, p in model.named_parameters():
        spare = name.endswith("bias") or "norm" in name or "token" in name
        assert (id(p) in spared) == spare, name
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def maes_pos_embed(dim, grid):
    """MAE's get_2d_sincos_pos_embed, in its own steps: float64, the column first."""
    column, row = np.meshgrid(np.arange(grid, dtype=np.float32), np.arange(grid, dtype=np.float32))
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    halves = []
    for position in (column, row):
        out = position.reshape(-1)[:, None] * omega[None]
        halves.append(np.concatenate([np.sin(out), np.cos(out)], 1))
    return torch.from_numpy(np.concatenate(halves, 1)).float()[None]


@pytest.mark.parametrize("dim, grid", [(16, 3), (192, 8), (512, 14), (768, 14)])
def test_positions_equal_maes_to_the_bit(dim, grid):
    assert torch.equal(mvmae.sincos_pos_embed(dim, grid), maes_pos_embed(dim, grid))
