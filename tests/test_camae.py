"""CAMAE: Eq. 1 to 6 against plain loops, IDM, PLB over epochs, the momentum networks, each flag."""
import csv
import math

import pytest
import torch

import camae
from common import load_checkpoint, seed_step
from conftest import ROOT, build, normal, small

VIEWS = normal(6, 3, 16, 16), normal(6, 3, 16, 16, seed=1)
HEAD = torch.tensor([1])


def apart(cfg):
    """A model whose momentum networks differ from the trained ones."""
    model = build(cfg)
    for module in (model.momentum_encoder.norm, model.momentum_projector[3]):
        module.weight.data.add_(0.1)
    return model


def attention(encoder, x):
    """Attention of the class token in the last block, (B, 3, H, W) → (B, K, N)."""
    return camae.class_attention(encoder.blocks[-1], encoder(x, return_last_block_input=True)[1])


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_idm_masks_the_patches_with_the_most_attention_equation_3(ratio):
    attention = normal(6, 16).softmax(1)
    for row, mask in zip(attention.tolist(), camae.idm_mask(attention, ratio).tolist()):
        most = sorted(range(16), key=lambda h: -row[h])[:round(16 * ratio)]
        assert [h for h in range(16) if mask[h]] == sorted(most)


def test_plb_update_is_equation_4_for_losses_of_any_size():
    p, losses, lam, eps = [0.5, 0.2, 0.3], [0.3, 0.7, 0.1], 0.9, 0.2
    total = sum(math.exp(L / eps) for L in losses)
    expected = [(1 - lam) * q + lam * math.exp(L / eps) / total for q, L in zip(p, losses)]
    for shift in (0, 1e6):                                          # exp(1e6) is infinite
        found = camae.plb_update(torch.tensor(p), torch.tensor(losses).double() + shift, lam, eps)
        assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_page_has_the_perplexity_that_equation_4_gives():
    page = (ROOT / "papers/camae.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    spread = next(row for row in rows if row and row[0] == "highest minus lowest loss")
    for heads in (3, 12):
        row = next(row for row in rows if row and row[0] == f"perplexity of {heads} heads")
        for loss, shown in zip(spread[1:], row[1:], strict=True):
            plb = camae.PLB(heads)
            plb.losses.copy_(torch.linspace(0, float(loss), heads))
            plb.update(lam=1, eps=0.2)
            assert f"{plb.row()['perplexity']:.2f}" == shown


def test_heads_are_drawn_by_p_and_the_same_in_all_processes_equation_5(monkeypatch):
    plb, p = camae.PLB(4), torch.tensor([0.0, 0.2, 0.7, 0.1])
    plb.p.copy_(p)
    heads = [plb.draw(0, step).item() for step in range(3000)]
    frequency = torch.tensor(heads).bincount(minlength=4) / len(heads)
    assert frequency[0] == 0 and (frequency - p).abs().max() < 0.03
    for rank in (0, 1):
        seed_step(0, 7, rank)
        assert [plb.draw(0, step).item() for step in range(20)] == heads[:20]
    assert heads[:100] != [plb.draw(1, step).item() for step in range(100)]
    for u, m in ((0.0, 1), (1.0, 3)):  # not head 0, whose p is 0; p may add up to less than 1
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([u]))
        assert plb.draw(0, 0) == m


def test_plb_gathers_an_epoch_and_an_undrawn_head_keeps_its_loss():
    plb = camae.PLB(3)
    for m, loss in ((0, 0.2), (2, 0.5), (0, 0.4)):
        plb.note(torch.tensor([m]), torch.tensor(loss))
    plb.end_epoch()
    assert plb.losses[[0, 2]].tolist() == pytest.approx([0.3, 0.5]) and plb.losses[1].isnan()
    plb.update(0.99, 0.2)                                           # head 1: the others' mean
    first = camae.plb_update(torch.full((3,), 1 / 3), torch.tensor([0.3, 0.4, 0.5]), 0.99, 0.2)
    assert torch.allclose(plb.p, first)
    plb.note(torch.tensor([1]), torch.tensor(0.1))
    plb.end_epoch()
    assert plb.losses.tolist() == pytest.approx([0.3, 0.1, 0.5])
    plb.update(0.99, 0.2)
    assert torch.allclose(plb.p, camae.plb_update(first, plb.losses, 0.99, 0.2))


@pytest.mark.parametrize("change", [
    {}, {"mask_by": "idm"}, {"mask_by": "random"}, {"contrast": False}, {"norm_pixels": True},
    {"contrast": False, "mask_by": "random"}, {"mim": False}, {"predictor": True}], ids=str)
def test_forward_is_section_iii_and_equation_6(change):
    cfg = small("camae", **change)
    model, (view1, view2), expected = apart(cfg), VIEWS, {}
    if cfg.contrast:
        predict = model.predictor if cfg.predictor else lambda z: z
        z1, z2 = (predict(model.projector(model.encoder(x)[:, 0])) for x in VIEWS)
        k1, k2 = (model.momentum_projector(model.momentum_encoder(x)[:, 0]) for x in VIEWS)
        expected["contrast"] = (camae.info_nce_loss(z1, k2, cfg.tau) / 2
                                + camae.info_nce_loss(z2, k1, cfg.tau) / 2)
    torch.manual_seed(5)
    mask = camae.random_mask(6, 16, 0.75)
    if cfg.mask_by != "random":
        mask = camae.idm_mask(attention(model.encoder, view1)[:, 1], 0.75)
    if cfg.mim:
        ids = torch.stack([(~row).nonzero().flatten() for row in mask])
        target = camae.patchify(view1, 4)
        target = camae.normalize_patches(target) if cfg.norm_pixels else target
        y = model.decoder(model.encoder(view1, ids), ids)
        expected["reconstruction"] = (y - target).square()[mask].mean()
    expected["loss"] = sum(expected.values())
    torch.manual_seed(5)
    found = model(view1, view2, HEAD)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5), name
    given = model(view1, view2, mask=mask)["loss"].item()
    assert given == pytest.approx(expected["loss"].item(), rel=1e-5)


def test_the_last_norm_of_a_projector_has_no_weights():
    projector, x = camae.moco_mlp(48, 96, 96, 32), normal(64, 48)
    assert len(projector) == 8 and not list(projector[-1].parameters())
    assert len(list(projector[1].parameters())) == 2
    assert len(build(small("camae", predictor=True)).predictor) == 5
    z = projector(x)
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, correction=0) - 1).abs().max() < 1e-2
    assert torch.equal(projector.eval()(x), z)                      # the statistics of the batch


def test_the_last_blocks_input_is_returned():
    encoder = build(small("camae")).encoder
    tokens, last_block_input = encoder(VIEWS[0], return_last_block_input=True)
    assert torch.equal(tokens, encoder.norm(encoder.blocks[-1](last_block_input)))


def test_drawing_a_mask_under_autocast_keeps_the_gradients():
    gradients = []
    for autocast in (False, True):
        model = build(small("camae", contrast=False, mask_by="idm"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(*VIEWS, HEAD)["loss"].backward()
        gradients.append([p.grad for p in model.encoder.blocks.parameters()])
    for full, rough in zip(*gradients):
        assert (full - rough).norm() < 0.2 * full.norm()


def test_recompute_gives_equal_gradients():
    gradients = []
    for recompute in (False, True):
        model, seen = build(small("camae", recompute=recompute)), []
        model.encoder.blocks[0].register_forward_pre_hook(lambda *args: seen.append(1))
        model(*VIEWS, HEAD)["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert len(seen) == (6 if recompute else 3)                 # view1, view2, masked view1
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_mask_of_a_reconstruction_is_that_of_a_random_head():
    model, x = build(small("camae")), VIEWS[0]
    torch.manual_seed(5)
    masked, _ = model.reconstruct(x)
    torch.manual_seed(5)
    head = torch.randint(3, (1,)).item()
    mask = camae.idm_mask(attention(model.encoder, x)[:, head], 0.75)
    assert torch.equal(camae.patchify(masked, 4).eq(0).all(2), mask)


@pytest.mark.parametrize("change, frozen", [
    ({"contrast": False, "predictor": True}, {"projector", "predictor"}),
    ({"mim": False}, {"decoder"}), ({"freeze_patch": True}, set())], ids=str)
def test_what_is_left_out_is_frozen(change, frozen, monkeypatch):
    """DistributedDataParallel needs a gradient for each weight that is not frozen."""
    model = build(small("camae", **change))
    for part in frozen:
        monkeypatch.setattr(getattr(model, part), "forward", None)          # not even computed
    model(*VIEWS)["loss"].backward()
    for name, p in model.named_parameters():
        still = (name.split(".")[0] in frozen | {"momentum_encoder", "momentum_projector"}
                 or name.startswith("encoder.patch_embed") and "freeze_patch" in change)
        assert p.requires_grad == (not still), name
        assert p.grad is None if still else p.grad.abs().sum() > 0, name


def test_views_are_changed_as_often_as_said():
    x = (255 * torch.rand(300, 3, 16, 16)).byte()
    none = {"jitter": 0.0, "gray": 0.0, "blur": 0.0, "crop_min": 1.0}
    for name in ("jitter", "gray", "blur"):
        views = []
        for p in (0.0, 0.6):
            torch.manual_seed(1)                                    # the same crops and flips
            views.append(camae.views(x, small("camae", **{**none, name: p}))[0])
        changed = (views[0] - views[1]).abs().amax((1, 2, 3)) > 1e-4
        assert changed.float().mean().item() == pytest.approx(0.6, abs=0.1), name
    assert torch.equal(*camae.views(x, small("camae", contrast=False)))


def test_a_head_is_drawn_used_and_noted_without_waiting(no_autocast):
    model, plb = build(small("camae")).to("meta"), camae.PLB(3).to("meta")
    m = plb.draw(0, 0)
    losses = model(*torch.zeros(2, 6, 3, 16, 16, device="meta"), m)
    plb.note(m, losses["reconstruction"])
    with pytest.raises((RuntimeError, NotImplementedError)):
        m.item()


@pytest.mark.parametrize("mask_by, plb_loss", [("idm", "mean"), ("plb", "sum")])
def test_training_logs_the_heads(mask_by, plb_loss, tmp_path, monkeypatch):
    forward, alone, told = camae.CAMAE.forward, camae.gather, []
    cfg = small("camae", images=32, epochs=3, mask_by=mask_by, plb_loss=plb_loss,
                out=str(tmp_path / "run"))
    scale = {"mean": 1, "sum": 12 * 48}[plb_loss]                   # 12 patches are masked

    def forward_and_tell(model, view1, view2, m=None):
        losses = forward(model, view1, view2, m)
        told.append((m.item() + 1, 2 * scale * losses["reconstruction"].item()))
        return losses

    def gather(z):  # as if a second process had three times the loss: twice on average
        return torch.cat([z, 3 * z]) if z.numel() == 1 else alone(z)

    monkeypatch.setattr(camae, "gather", gather)
    monkeypatch.setattr(camae.CAMAE, "forward", forward_and_tell)
    monkeypatch.setattr(camae.Run, "draw", lambda run, images: None)        # slow
    out = camae.train(cfg)                                          # six steps
    rows = [row for row in csv.DictReader(open(out / "metrics.csv")) if row["p of head 1"]]
    p, L = (torch.tensor([[float(row[f"{name} of head {m}"]) for m in (1, 2, 3)] for row in rows])
            for name in ("p", "loss"))
    state = load_checkpoint(out)
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert torch.allclose(p[0], torch.full((3,), 1 / 3))
    for epoch in range(3):
        for m in {head for head, _ in told[2 * epoch:][:2]}:
            mine = [loss for head, loss in told[2 * epoch:][:2] if head == m]
            assert L[epoch, m - 1].item() == pytest.approx(sum(mine) / len(mine), rel=1e-4)
        after = [*p[1:], state["plb"]["p"]][epoch]
        filled = torch.where(L[epoch].isnan(), L[epoch].nanmean(), L[epoch])
        expected = camae.plb_update(p[epoch], filled, 0.99, 0.2) if mask_by == "plb" else p[0]
        assert torch.allclose(after, expected, atol=1e-6)


def test_contrast_alone_has_no_heads_and_may_freeze_the_patch_embedding(tmp_path, monkeypatch):
    monkeypatch.setattr(camae.Run, "draw", lambda run, images: None)        # slow
    before = build(small("camae", seed=1)).encoder.state_dict()
    torch.save(before, tmp_path / "encoder.pt")
    out = camae.train(small("camae", images=32, mim=False, freeze_patch=True,
                            init=str(tmp_path / "encoder.pt"), out=str(tmp_path / "run")))
    row = list(csv.DictReader(open(out / "metrics.csv")))[0]
    assert not [name for name in row if "head" in name or name == "reconstruction"]
    after = load_checkpoint(out)["model"]
    name = "patch_embed.proj.weight"                                # frozen
    assert torch.equal(after[f"encoder.{name}"], before[name])
    assert not torch.equal(after["encoder.norm.weight"], before["norm.weight"])
