"""MACRL: its losses as plain loops, its branches, bank, momentum keys and degenerate cases."""
import dataclasses

import pytest
import torch

import macrl
from augment import normalize, random_hflip, random_resized_crop
from conftest import build, normal, small
from images import load_images


def four(B=6):
    """x_s, x_w, c_s and c_w of B images, all different."""
    return [normal(B, 3, 16, 16, seed=i) for i in range(4)]


@pytest.mark.parametrize("changes", [
    {}, {"keys": "momentum", "bank": 20}, {"pool": "cls"}, {"pixels": "all"}, {"restore": "view"},
    {"norm_pixels": True}, {"lam_c": 0.5, "lam_r": 2.0, "tau": 0.5}])
def test_forward_is_the_step_of_the_docstring(changes):
    cfg = small("macrl", **changes)
    model, (x_s, x_w, c_s, c_w) = build(cfg), four()
    f, g = model.encoder, model.g
    if cfg.keys == "momentum":
        f, g = model.f_xi, model.g_xi
        with torch.no_grad():
            f.norm.weight[:24].add_(1)  # so that the networks differ
            g.fc2.weight[:9].mul_(-1)
    bank = model.bank.clone()
    mask_s, mask_w = macrl.random_mask(6, 16, 0.75), macrl.random_mask(6, 16, 0.5)
    losses = model(x_s, x_w, c_s, c_w, mask_s, mask_w)

    vectors, L1 = [], []
    for x, c, mask, decoder, network in ((x_s, c_s, mask_s, model.decoder_s, model.encoder),
                                         (x_w, c_w, mask_w, model.decoder_w, f)):
        ids = torch.stack([(~row).nonzero()[:, 0] for row in mask])
        target = macrl.patchify(x if cfg.restore == "view" else c, 4)
        target = macrl.normalize_patches(target) if cfg.norm_pixels else target
        error = (decoder(model.encoder(x, ids), ids) - target).abs()
        L1.append(error.mean() if cfg.pixels == "all" else error[mask].mean())
        tokens = network(x, ids)
        vectors.append(tokens[:, 0] if cfg.pool == "cls" else tokens[:, 1:].mean(1))
    k = g(vectors[1])
    expected = {"contrast": macrl.info_nce_loss(model.g(vectors[0]), k, bank, cfg.tau),
                "reconstruction": (L1[0] + L1[1]) / 2, "reconstruction s": L1[0],
                "reconstruction w": L1[1]}
    expected["loss"] = cfg.lam_c * expected["contrast"] + cfg.lam_r * expected["reconstruction"]
    assert losses.keys() == expected.keys()
    for name in losses:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name
    assert torch.allclose(model.bank, torch.cat([bank, k])[6:], atol=1e-5)
    assert not model.bank.requires_grad


def test_a_view_is_its_own_target_and_masks_are_random_unless_they_are_given(monkeypatch):
    model, (x_s, x_w, c_s, c_w) = build(small("macrl")), four()
    draw, drawn = macrl.random_mask, []
    masks = draw(6, 16, 0.75), draw(6, 16, 0.5)

    def draw_and_keep(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(macrl, "random_mask", draw_and_keep)
    alone, same, other = (model(x_s, x_w, *c, *masks)["reconstruction"].item()
                          for c in ((None, None), (x_s, x_w), (c_s, c_w)))
    assert alone == same != other and not drawn
    losses = model(x_s, x_w)
    assert [mask.sum().item() / 6 for mask in drawn] == [12, 8]  # s has the higher mask ratio
    assert torch.equal(losses["loss"], model(x_s, x_w, None, None, *drawn[:2])["loss"])


def test_the_bank_is_first_in_first_out():
    for M in (0, 5, 13):
        model = build(small("macrl", bank=M))
        rows, keys = model.bank, []
        model.g.register_forward_hook(lambda module, inputs, output: keys.append(output.detach()))
        for B in (2, 6, 3):
            model(*four(B))
            rows = torch.cat([rows, keys[-1]])  # k follows q
        assert torch.equal(model.bank, rows[len(rows) - M:]) and len(model.bank) == M
        assert torch.equal(model.state_dict()["bank"], model.bank)


@pytest.mark.parametrize("keys", ["shared", "momentum"])
def test_keys_have_a_gradient_only_if_the_encoder_makes_them(keys):
    model, (x_s, x_w, *crops) = build(small("macrl", keys=keys)), four()
    model(x_s, x_w.requires_grad_(), *crops)["contrast"].backward()
    assert (x_w.grad is not None and x_w.grad.abs().sum() > 0) == (keys == "shared")


@pytest.mark.parametrize("keys", ["shared", "momentum"])
@pytest.mark.parametrize("off, terms, frozen", [
    ("lam_c", {"loss", "reconstruction", "reconstruction s", "reconstruction w"}, {"g"}),
    ("lam_r", {"loss", "contrast"}, {"decoder_s", "decoder_w"})])
def test_a_weight_of_0_leaves_its_loss_out(keys, off, terms, frozen):
    model = build(small("macrl", keys=keys, bank=9, **{off: 0.0}))
    whole, bank = build(small("macrl", keys=keys, bank=9)), model.bank.clone()
    masks = macrl.random_mask(6, 16, 0.75), macrl.random_mask(6, 16, 0.5)
    losses, full = model(*four(), *masks), whole(*four(), *masks)
    assert losses.keys() == terms
    assert all(torch.equal(losses[name], full[name]) for name in terms - {"loss"})
    assert torch.equal(bank, model.bank) == (off == "lam_c")
    losses["loss"].backward()  # DistributedDataParallel waits for the gradient of each parameter
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    fixed = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == frozen | ({"f_xi", "g_xi"} if keys == "momentum" else set())


def test_views_are_the_crops_with_other_colours_and_the_crops():
    images = load_images("shapes", "train", 18)[torch.arange(400)]
    cfg = small("macrl", crop_min_s=0.3, crop_min_w=0.6)
    torch.manual_seed(1)
    crops = [normalize(random_hflip(random_resized_crop(images, 16, (least, 1.0))))
             for least in (0.3, 0.6)]
    torch.manual_seed(1)
    x_s, x_w, *given = macrl.views(images, cfg)
    assert torch.equal(given[0], crops[0]) and torch.equal(given[1], crops[1])
    none = dict.fromkeys(["jitter_s", "jitter_w", "gray_s", "gray_w", "blur_s", "blur_w"], 0.0)

    def changed(**probabilities):
        """The fractions of x_s and x_w that differ from their crops."""
        x_s, x_w, c_s, c_w = macrl.views(images, dataclasses.replace(cfg, **probabilities))
        return [((x - c).abs().amax((1, 2, 3)) > 1e-3).float().mean().item()
                for x, c in ((x_s, c_s), (x_w, c_w))]
    for name in none:
        fraction = changed(**{**none, name: 0.6})
        expected = [0.6, 0] if name.endswith("s") else [0, 0.6]
        assert fraction == pytest.approx(expected, abs=0.1), name


@pytest.mark.parametrize("changes", [{}, {"pixels": "all"}, {"norm_pixels": True}])
def test_reconstruct_shows_either_branch(changes):
    model, x = build(small("macrl", **changes)), normal(4, 3, 16, 16)
    patches = macrl.patchify(x, 4)
    for branch, ratio, decoder in (("s", 0.75, model.decoder_s), ("w", 0.5, model.decoder_w)):
        torch.nn.init.zeros_(decoder.pred.weight)
        torch.nn.init.constant_(decoder.pred.bias, ratio)
        masked, shown = model.reconstruct(x, branch)
        hidden = masked != x
        assert hidden.float().mean() == ratio and not masked[hidden].any()
        expected = torch.full_like(patches, ratio)
        if "norm_pixels" in changes:
            expected = patches.mean(2, keepdim=True) + ratio * patches.std(2, keepdim=True)
        expected = macrl.unpatchify(expected.expand_as(patches), 4)
        if "pixels" not in changes:
            expected = torch.where(hidden, expected, x)
        assert torch.allclose(shown, expected, atol=1e-4)


def test_values_at_the_edge_work():
    for changes in ({"mask_w": 0.0, "pixels": "all"}, {"mask_w": 0.0, "lam_r": 0.0},
                    {"batch": 1, "lam_c": 0.0}):
        losses = build(small("macrl", **changes))(*four(1 if "batch" in changes else 6))
        assert losses["loss"].isfinite()
