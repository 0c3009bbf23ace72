"""CMAE: the paper's formulas against plain Python, contrastive crops and boxes, what is trained."""
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import cmae
import common
from augment import crop_resize, normalize
from conftest import ROOT, build, normal, small
from images import Images, UserError


def two_views(batch=4):
    return normal(batch, 3, 16, 16), normal(batch, 3, 16, 16, seed=1)


@pytest.fixture
def few(monkeypatch):
    """train() sees these 32 images and draws no pictures."""
    images = Images(torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8))
    monkeypatch.setattr(cmae, "load_data", lambda cfg: (images, None))
    monkeypatch.setattr(common.Run, "draw", lambda *args: None)
    return images


# Eq. 1: boxes and crops

@pytest.mark.parametrize("k", [0.1, 0.5, 0.97])
def test_semantic_boxes_are_equation_1(k):
    heat = torch.rand(40, 5, 5)
    for M, box in zip(heat, cmae.semantic_boxes(heat, k)):
        hot = [(y, x) for y in range(5) for x in range(5) if M[y, x] > k] or [(0, 0), (4, 4)]
        top, bottom = min(y for y, _ in hot), max(y for y, _ in hot) + 1
        left, right = min(x for _, x in hot), max(x for _, x in hot) + 1
        assert box.tolist() == pytest.approx([top / 5, left / 5, bottom / 5, right / 5])


def cut(monkeypatch, images, make):
    """Top, left, height, width (B,) of the crops that make(images) cuts, as fractions."""
    boxes = []

    def crop_resize(images, box, size):
        boxes.append(box)
        return torch.zeros(len(images), 3, size, size)

    monkeypatch.setattr(cmae, "crop_resize", crop_resize)
    make(images)
    return [side.double() / images.pixels.shape[3] for side in boxes[-1]]


def blank(n, side, aspect=1.0):
    """n images of one colour without their memory."""
    pixels = torch.zeros(1, dtype=torch.uint8).expand(n, 3, side, side)
    return Images(pixels, aspect=torch.full((n,), aspect))


@pytest.mark.parametrize("alpha, area", [(0.6, 0.0004), (1.0, 0.16), (2.5, 0.5)])
def test_crop_centres_follow_the_beta_law_as_far_as_crops_fit(alpha, area, monkeypatch):
    """I is 0.1 … 0.8 by 0.3 … 0.9. A crop of side 0.7 fits between the centres 0.35 and 0.65."""
    n, box = 4000, torch.tensor([0.1, 0.3, 0.8, 0.9])
    top, left, height, width = cut(
        monkeypatch, blank(n, 20_000), lambda images: cmae.contrastive_crop(
            images, 1, (area, area), box.repeat(n, 1), alpha))
    cells = (torch.arange(200_000, dtype=torch.double) + 0.5) / 200_000
    law = (cells * (1 - cells)) ** (alpha - 1)
    law = law.cumsum(0) / law.sum()                                     # distribution function
    for start, length, ends in ((top, height, (0.1, 0.8)), (left, width, (0.3, 0.9))):
        low, high = ((end - length / 2).clamp(min=0).minimum(1 - length) for end in ends)
        u = ((start - low) / (high - low)).sort().values
        assert -1e-3 < u[0] and u[-1] < 1 + 1e-3                        # whole pixels
        gap = law[(u.clamp(0, 1 - 1e-9) * 200_000).long()] - torch.arange(n) / n
        assert gap.abs().max() < 1.95 / math.sqrt(n)                    # Kolmogorov-Smirnov, 0.001
    assert (top - left).std() > 0.05                                    # drawn independently


def test_crops_around_boxes_have_true_proportions(monkeypatch):
    """Images 1.25 times as wide as high, stored as squares."""
    cfg, images = small("cmae"), blank(400, 2000, 1.25)
    box = torch.full((400, 4), 0.5)
    top, left, height, width = cut(monkeypatch, images, lambda x: cmae.views(x, cfg, box))
    true = 1.25 * width / height
    assert 0.74 < true.min() < 0.80 and 1.25 < true.max() < 1.35
    assert 0.19 < (height * width).min() < 0.25 and (height * width).max() > 0.8
    assert (top + height / 2 - 0.5).abs().max() < 1e-3
    assert (left + width / 2 - 0.5).abs().max() < 1e-3


def test_boxes_are_found_in_their_epochs_belong_to_their_images_and_survive_a_resume(
        few, tmp_path, monkeypatch, capsys):
    seen, crop = [], cmae.contrastive_crop

    def spy(images, size, scale, boxes, alpha):
        rows = zip(images.pixels, boxes)
        seen.append({image.numpy().tobytes(): box.tolist() for image, box in rows})
        return crop(images, size, scale, boxes, alpha)

    monkeypatch.setattr(cmae, "contrastive_crop", spy)
    cfg = small("cmae", epochs=4, crop_from=1, crop_every=2, lr=5e-3,
                out=str(tmp_path / "a"))
    cmae.train(cfg)
    assert "no ContrastiveCrop" not in capsys.readouterr().out
    assert len(seen) == 2 * 2 * 3                           # two views, two steps, epochs 1 to 3
    first, second, third = ({**seen[i], **seen[i + 2]} for i in (0, 4, 8))
    assert first == second != third                         # computed in epochs 1 and 3
    state = common.load_checkpoint(tmp_path / "a")
    kept = [third[image.numpy().tobytes()] for image in few.pixels]
    assert state["boxes"]["boxes"].tolist() == kept

    def stop(run, *args):                                   # behind the first save with boxes
        if run.step == 4:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "evaluate", stop)
        cmae.train(replace(cfg, out=str(tmp_path / "b")))
    cmae.train(replace(cfg, out=str(tmp_path / "b"), resume=str(tmp_path / "b")))
    again = common.load_checkpoint(tmp_path / "b")
    for part in ("model", "boxes"):
        assert all(torch.equal(again[part][name], value) for name, value in state[part].items())
    monkeypatch.setattr(cmae.Boxes, "locate", None)         # never called: training is too short
    cmae.train(replace(cfg, epochs=1, out=str(tmp_path / "short")))
    assert "no ContrastiveCrop" in capsys.readouterr().out


def test_boxes_are_those_of_the_heat_maps_of_whole_images():
    cfg, pixels = small("cmae"), (255 * torch.rand(6, 3, 20, 20)).byte()
    model, boxes = build(cfg), cmae.Boxes(6)
    assert boxes.boxes.tolist() == [[0, 0, 1, 1]] * 6
    boxes.locate(model, pixels, torch.device("cpu"))
    zero, side = torch.zeros(1, dtype=torch.long), torch.full((1,), 20)
    for image, box in zip(pixels, boxes.boxes):
        x = normalize(crop_resize(image[None], [zero, zero, side, side], 16))
        assert torch.equal(cmae.semantic_boxes(model.heat(x), cfg.k)[0], box)


@pytest.mark.parametrize("heat", ["attention", "features"])
def test_the_heat_map_is_made_of_the_last_block(heat):
    model, x, last = build(small("cmae", heat=heat)), normal(3, 3, 16, 16), []
    model.encoder.norm.register_forward_pre_hook(lambda norm, args: last.append(args[0]))
    model.encoder(x)
    M = model.heat(x)
    assert M.shape == (3, 4, 4) and (M.amin((1, 2)) == 0).all() and (M.amax((1, 2)) == 1).all()
    source = last[0][:, 1:].abs().mean(2)
    source = model.encoder.attention(x).mean(1) if heat == "attention" else source
    low, high = source.amin(1, keepdim=True), source.amax(1, keepdim=True)
    assert torch.allclose(M.flatten(1), (source - low) / (high - low), atol=1e-5)


def test_attention_is_the_plain_softmax_in_float32_and_the_last_block_does_not_run():
    encoder, x, entered = build(small("cmae")).encoder, normal(2, 3, 16, 16), []
    block = encoder.blocks[-1]
    handle = block.register_forward_pre_hook(lambda block, args: entered.append(args[0]))
    encoder(x)
    handle.remove()
    block.register_forward_pre_hook(lambda *args: pytest.fail("the last block ran"))
    maps = encoder.attention(x)
    qkv = block.attn.qkv(block.norm1(entered[0]))
    q, k = qkv.unflatten(2, (3, 3, 16)).unbind(2)[:2]                   # (B, 1 + N, K, d)
    for head in range(3):
        full = torch.softmax(q[:, :, head] @ k[:, :, head].mT / 4, 2)   # (B, 1 + N, 1 + N)
        assert torch.allclose(maps[:, head], full[:, 0, 1:], atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder.attention(x)
    assert rough.dtype == torch.float32 and len(rough.unique()) > 90    # bfloat16: fewer values


@pytest.mark.parametrize("change", [{"decoder": "mlp"}, {"decoder": "conv"}, {"lam_con": 0.0}])
def test_attention_that_no_loss_trains_is_refused(change):
    for more in ({}, {"pool": "cls", "lam_ctr": 0.0}):
        with pytest.raises(UserError, match="--heat features"):
            small("cmae", **change, **more)
    for more in ({"heat": "features"}, {"pool": "cls"}):
        model, tokens = build(small("cmae", **change, **more)), []
        model.encoder.norm.register_forward_hook(lambda norm, args, out: tokens.append(out))
        gradient, = torch.autograd.grad(model(*two_views())["loss"], tokens[0])
        assert (gradient[:, 0] != 0).any() == ("pool" in more)          # of the class token


# Eq. 2 to 6

def test_restore_is_equation_2():
    mask, x, cls = cmae.random_mask(6, 16, 0.75), normal(6, 16, 5), normal(2, 6, 1, 5, seed=1)
    order = cmae.visible_first(mask)
    visible, masked = (torch.cat([c, cmae.take(x, ids)], 1)
                       for c, ids in zip(cls, order.split([4, 12], 1)))
    h = cmae.restore(visible, masked, order)
    assert torch.equal(h[:, 1:], x) and torch.allclose(h[:, :1], cls.mean(0))


@pytest.mark.parametrize("norm", ["norm", "squared"])
def test_location_loss_is_equation_5_or_its_square(norm):
    p, positions = normal(2, 3, 9), torch.tensor([[0, 4, 8], [1, 2, 7]])
    terms = []
    for b in range(2):
        for v in range(3):
            t = [float(n == positions[b, v]) for n in range(9)]
            square = sum((p[b, v, n].item() - t[n]) ** 2 for n in range(9))
            terms.append(square if norm == "squared" else math.sqrt(square))
    loss = cmae.location_loss(p, positions, norm)
    assert loss.item() == pytest.approx(sum(terms) / 6, rel=1e-5)


@pytest.mark.parametrize("change", [
    {}, {"lam_ctr": 0.5, "lam_loc": 2.0, "lam_con": 3.0}, {"pool": "cls"}, {"projection": "mlp"},
    {"location_from": "content"}, {"location_norm": "squared"}], ids=str)
def test_forward_is_sections_3_3_to_3_6(change):
    cfg = small("cmae", **change)
    model, (x_q, x_k) = build(cfg), two_views(6)
    with torch.no_grad():
        model.M_E.norm.weight.add_(normal(48))              # the two encoders differ
        for p in model.M_P.parameters():
            p.add_(0.1)
        model.location.fc2.weight.add_(normal(16, 48))      # it starts at 0
    torch.manual_seed(5)
    losses = model(x_q, x_k)
    torch.manual_seed(5)
    mask_q, mask_k = cmae.random_mask(6, 16, 0.75), cmae.random_mask(6, 16, 0.75)
    assert model(x_q, x_k, mask_q, mask_k) == losses        # the masks that it draws, or given ones
    vectors, visible = [], torch.stack([(~row).nonzero().flatten() for row in mask_q])
    for encoder, x, mask in ((model.encoder, x_q, mask_q), (model.M_E, x_k, mask_k)):
        h, cls = torch.empty(6, 16, 48), torch.zeros(6, 48)
        for part in (mask, ~mask):                          # Eq. 2, patch by patch
            ids = torch.stack([row.nonzero().flatten() for row in part])
            tokens = encoder(x, ids)
            cls += tokens[:, 0] / 2
            for b in range(6):
                h[b, ids[b]] = tokens[b, 1:]
        vectors.append(cls if cfg.pool == "cls" else h.mean(1))

    def two_layers(net, v):
        return F.gelu(v @ net.fc1.weight.mT + net.fc1.bias) @ net.fc2.weight.mT + net.fc2.bias

    def project(net, v):
        return v @ net.weight.mT + net.bias if cfg.projection == "linear" else two_layers(net, v)

    z_q, z_k = project(model.projection, vectors[0]), project(model.M_P, vectors[1])
    L_ctr = cmae.info_nce_loss(z_q, z_k, cfg.tau)
    q1 = model.encoder(x_q, visible)
    target = torch.stack([x_q[:, :, 4 * (n // 4):, 4 * (n % 4):][:, :, :4, :4].flatten(1)
                          for n in range(16)], 1)
    L_con = (model.decoder(q1, visible) - target).square()[mask_q].mean()
    if cfg.location_from == "content":
        model.encoder.pos_embed.zero_()
    p = two_layers(model.location, model.encoder(x_q, visible)[:, 1:])
    distance = (p - torch.eye(16)[visible]).square().sum(2)
    L_loc = (distance if cfg.location_norm == "squared" else distance.sqrt()).mean()
    loss = cfg.lam_ctr * L_ctr + cfg.lam_loc * L_loc + cfg.lam_con * L_con
    for name, value in (("contrast", L_ctr), ("location", L_loc), ("reconstruction", L_con),
                        ("loss", loss)):
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_no_gradient_flows_through_q2_and_the_momentum_encoder(pool):
    """q_1 sees only visible pixels: a gradient of masked pixels would come through q_2."""
    model, (x_q, x_k) = build(small("cmae", pool=pool)), two_views()
    x_q.requires_grad_()
    x_k.requires_grad_()
    mask = cmae.random_mask(4, 16, 0.75)
    loss = model(x_q, x_k, mask_q=mask)["contrast"]
    hidden = mask.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    of_q, of_k = torch.autograd.grad(loss, (x_q, x_k), allow_unused=True)
    of_q = of_q.abs().sum(1)
    assert (of_q[hidden] == 0).all() and (of_q[~hidden] != 0).any() and of_k is None


def test_the_location_head_starts_at_zero_and_computes_in_float32():
    model, kinds = build(small("cmae", lam_ctr=0.0, lam_con=0.0, heat="features")), []
    model.location.register_forward_hook(lambda head, args, p: kinds.append(p.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*two_views())["loss"]
    loss.backward()
    assert loss.item() == 1 and kinds == [torch.float32]
    assert model.location.fc2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("off", ["lam_ctr", "lam_loc", "lam_con"])
def test_a_weight_of_0_leaves_its_part_out(off):
    model = build(small("cmae", heat="features", location_from="content", **{off: 0.0}))
    model.location.fc2.weight.data.normal_()                # it starts at 0
    name, part, calls = {
        "lam_ctr": ("contrast", model.projection, [2, 0, 0]),           # q_1, content; no M_E
        "lam_loc": ("location", model.location, [2, 2, 0]),
        "lam_con": ("reconstruction", model.decoder, [3, 2, 0])}[off]
    counted, counts = (model.encoder, model.M_E, part), [0, 0, 0]
    for i, net in enumerate(counted):
        net.register_forward_hook(
            lambda net, args, out, i=i: counts.__setitem__(i, counts[i] + 1))
    losses = model(*two_views())
    assert set(losses) == {"loss", "contrast", "location", "reconstruction"} - {name}
    terms = [losses[term].item() for term in set(losses) - {"loss"}]
    assert losses["loss"].item() == pytest.approx(sum(terms)) and counts == calls
    losses["loss"].backward()
    assert not any(p.requires_grad for p in part.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# Decoders

DECODERS = ["transformer", "mlp", "conv", "hybrid-mlp", "hybrid-conv"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_block_of_a_decoder_trains(decoder):
    model = build(small("cmae", decoder=decoder, decoder_depth=3, heat="features"))
    kinds = {"transformer": "Block", "mlp": "MlpBlock", "conv": "ConvBlock"}
    middle = kinds[decoder.removeprefix("hybrid-")]
    outer = kinds.get(decoder, "Block")
    assert [type(block).__name__ for block in model.decoder.blocks] == [outer, middle, outer]
    model(*two_views())["reconstruction"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.decoder.blocks.parameters())


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_have_the_parameters_of_the_page(decoder):
    page = (ROOT / "papers/cmae.md").read_text()
    flag = f"--decoder {decoder}".removesuffix("--decoder transformer")
    heat = "--heat features" if decoder in ("mlp", "conv") else ""
    command = " ".join(f"python cmae.py --data tiny-imagenet {flag} {heat}".split())
    row = re.search(rf"\| ([\d.]+, [\d., ]+) \| `{command}` \|", page)
    for width, millions in zip((512, 256, 128, 64), row[1].split(","), strict=True):
        with torch.device("meta"):
            blocks = cmae.decoder_blocks(decoder, 8, width, 16, 14)
            count = sum(p.numel() for p in cmae.Decoder(224, 16, 768, width, blocks).parameters())
        assert f"{count / 1e6:.2f}" == millions.strip()


def test_the_convolution_is_depthwise_and_skips_the_class_token():
    """Its weights start with Xavier's deviation for 9 inputs and 9 outputs, √(2/18)."""
    blocks = [cmae.ConvBlock(256, 4)]
    block = cmae.Decoder(16, 4, 48, 256, blocks).blocks[0]
    assert block.kernel.std().item() == pytest.approx(1 / 3, rel=0.05)
    x, before = normal(1, 17, 256), []
    block.fc.register_forward_pre_hook(lambda fc, args: before.append(args[0]))
    out = block(x)
    assert torch.equal(out[:, 0], x[:, 0])
    image, y, column, c = block.norm(x)[0, 1:].unflatten(0, (4, 4)), 2, 1, 7
    value = sum(block.kernel[c, 0, i, j] * image[y + i - 1, column + j - 1, c]
                for i in range(3) for j in range(3))
    found = before[0][0, 4 * y + column, c]
    assert found.item() == pytest.approx(F.gelu(value).item(), abs=1e-5)


def test_crops_around_boxes_and_heat_maps_stay_on_their_device(no_autocast):
    cfg = small("cmae")
    images = Images(torch.zeros(8, 3, 16, 16, dtype=torch.uint8, device="meta"))
    views = cmae.views(images, cfg, torch.rand(8, 4))
    assert all(view.device.type == "meta" and view.shape == (8, 3, 16, 16) for view in views)
    assert cmae.semantic_boxes(build(cfg).to("meta").heat(views[0]), cfg.k).shape == (8, 4)
