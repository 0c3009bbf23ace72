"""The speed of lightly's MAE, for the comparison in RESULTS.md: as large as mvmae.py --tiny, fed by lightly's own way.

    pip install lightly timm
    python results/lightly_mae.py data/cifar10 100          a folder with train/CLASS/…, steps; then float32 or bfloat16

ImageFolder, MAETransform and a DataLoader of two workers; a ViT 192 wide and 4 deep with patches of 4 on 32 pixels, a
decoder 96 wide and 2 deep, mask ratio 0.75, batch 128, AdamW. Prints images/s from step 21 on.
"""
import sys, time

import torch
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.transforms import MAETransform
from timm.models.vision_transformer import VisionTransformer
from torchvision.datasets import ImageFolder


class MAE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=4, num_heads=3, num_classes=0)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(num_patches=64, patch_size=4, embed_dim=192, decoder_embed_dim=96,
                                      decoder_depth=2, decoder_num_heads=3, mlp_ratio=4.0)

    def forward(self, images):
        B, N = len(images), self.backbone.sequence_length  # N counts the class token
        keep, masked = utils.random_token_mask((B, N), mask_ratio=0.75, device=images.device)
        latent = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (B, N))
        tokens = self.decoder.decode(utils.set_at_index(tokens, keep, latent.type_as(tokens)))
        predicted = self.decoder.predict(utils.get_at_index(tokens, masked))
        target = utils.get_at_index(utils.patchify(images, 4), masked - 1)
        return torch.nn.functional.mse_loss(predicted, target)


def batches(folder):
    data = ImageFolder(f"{folder}/train", transform=MAETransform(input_size=32))
    loader = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True, drop_last=True, num_workers=2)
    while True:
        yield from loader


def main(folder, steps, precision="float32"):
    torch.manual_seed(0)
    model = MAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4)
    for step, (views, _) in zip(range(int(steps)), batches(folder)):
        if step == 20:
            begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(views[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    print(f"lightly, {precision}: {128 * (int(steps) - 20) / seconds:.1f} images/s, loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
