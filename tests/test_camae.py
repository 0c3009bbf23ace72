"""CAMAE: Eq. 1 to 6 against plain loops, IDM, PLB over epochs, the momentum networks, each flag."""
import pytest
import torch
import torch.nn.functional as F

import camae
from conftest import build, normal, small

ALONE = {"mim": False, "freeze_patch": True}                        # MoCo v3 but for the predictor


def test_contrast_alone_with_a_predictor_is_moco_v3():
    """Its loss is 2τ times the sum of both directions, here it is their mean."""
    cfg = small("camae", predictor=True, **ALONE)
    model, views = build(cfg), (normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1))
    for module in (model.momentum_encoder.norm, model.momentum_projector[3]):
        module.weight.data.add_(0.1)                                # not equal to the trained one
    f, g, h = model.encoder, model.projector, model.predictor
    q1, q2 = (F.normalize(h(g(f(x)[:, 0])), dim=1) for x in views)
    k1, k2 = (F.normalize(model.momentum_projector(model.momentum_encoder(x)[:, 0]), dim=1)
              for x in views)
    loss = sum(F.cross_entropy(torch.einsum("nc,mc->nm", q, k) / cfg.tau, torch.arange(6))
               * (2 * cfg.tau) for q, k in ((q1, k2), (q2, k1)))
    found = model(*views)
    found["loss"].backward()
    assert list(found) == ["loss", "contrast"]
    assert 4 * cfg.tau * found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert [type(layer).__name__ for layer in h] == [
        "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert h[0].weight.grad.abs().sum() > 0 and f.patch_embed.proj.weight.grad is None
    assert not list(build(small("camae")).predictor.parameters())   # off by default


@pytest.mark.parametrize("plb_loss", ["mean", "sum"])
def test_plb_sees_equation_2_at_the_scale_of_its_flag(plb_loss):
    cfg = small("camae", plb_loss=plb_loss, mask=0.25)
    y, x, mask = normal(3, 16, 48), normal(3, 16, 48, seed=1), camae.random_mask(3, 16, 0.25)
    errors = [[(x[i, h, c] - y[i, h, c]).item() ** 2 for h in range(16) for c in range(48)
               if mask[i, h]] for i in range(3)]
    expected = sum(sum(row) / (len(row) if plb_loss == "mean" else 1) for row in errors) / 3
    found = camae.plb_scale(cfg) * camae.masked_mse(y, x, mask).item()
    assert found == pytest.approx(expected, rel=1e-5)
