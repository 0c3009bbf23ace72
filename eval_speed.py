"""How fast a method is, and how much memory it takes: its views, reading, its training step.

    python eval_speed.py mclim                          the paper's configuration; flags of mclim.py may follow
    python eval_speed.py mclim --tiny --batch 128

Each rate but that of reading is the median of at least three runs and five seconds, after a warm-up. Prints:
  views       source images of 32 pixels, 64 at a time, whose two views are made at 32 pixels and at the configuration's
              size; for MCLim also by PIL and torchvision's transforms in a DataLoader of two workers
  counted     for the views of one step: copies from host to device, and operations that start a kernel on it
  reading     one pass over a set that streams from its memory-mapped file, from the disk and then from memory (where
              the system can be asked to forget what it has read)
  room        the memory that a step keeps for each image until its backward pass, in bfloat16, without and with
              --recompute; and, from this, the largest batch for a GPU of 12, 24 and 80 GB (1 GB is 10⁹ bytes). On a
              CPU without bfloat16 this part takes minutes
  step        forward, backward and AdamW on random views, without the moving average: in training's precision and in
              float32, with --compile also compiled. Rates in training's precision are followed by the step's TFLOP/s
              and those of an 8192³ matrix product (2048³ on a CPU)
  one view    where the encoder sees visible patches only: its forward and backward and the decoder's, against the same
              with all patches visible
--recompute and --no-amp change nothing here.
"""
import importlib, math, os, pathlib, statistics, sys, tempfile, time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode  # documented, though its module's name begins with _
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from common import Batches, answer, autocast, check, command_line, param_groups, recompute, start_processes
from eval_linear import model_class
from images import MEAN, STD


def rate(step, device, seconds=5.0):
    """Runs of `step` a second: the median over at least three runs and `seconds`, after two to warm up."""
    times = []
    while len(times) < 5 or sum(times[2:]) < seconds:
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1 / statistics.median(times[2:])


class Counter(TorchDispatchMode):
    """Counts on the `meta` device, which stands for a GPU: kernels, and how many of them are copies from the host."""
    copies, kernels = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, torch.Tensor) and first.is_meta and not function.is_view and name != "_unsafe_view":
            self.kernels += 1
            self.copies += name == "_to_copy" and not args[0].is_meta or name == "copy_" and not args[1].is_meta
        return out


def count_copies(job):
    """(copies from host to device, operations that start a kernel there) of job(), which computes on `meta` tensors."""
    torch.manual_seed(0)
    with Counter() as counter:
        job()
    return counter.copies, counter.kernels


def convolution_backward_flop(grad, x, weight, *rest, **_):
    """FLOP of a convolution's backward, from the shapes: as many as forward has, for each gradient asked for. (torch's
    own count of the weight's is too large by the number of groups.)"""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(rest[-1][:2])


def gflop_per_image(cfg):
    """GFLOP an image of a training step's forward and backward at `cfg`: matrix products and convolutions, attention's
    among them, a product and a sum counted as two.

    Counted on the CPU, so that it is the same on every machine, at a batch of two: the products of each image's vector
    with all others' are nearly left out, and they are small. Views, optimiser, moving averages, CMAE's heat maps, and
    what --recompute computes twice are left out. The global random numbers stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        model = model_class(sys.modules[type(cfg).__module__])(cfg)
        view1, view2 = torch.randn(2, 2, 3, cfg.img, cfg.img)  # (2, 3, H, W) each
        mapping = {torch.ops.aten.convolution_backward: convolution_backward_flop}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(view1, view2)["loss"].backward()
    return counter.get_total_flops() / len(view1) / 1e9


def saved_bytes(model, cfg, images, device):
    """(bytes that the forward pass of a step on so many images keeps for its backward in bfloat16 autocast, how many
    blocks of the encoder it goes through with gradient). Parameters are left out, their bfloat16 copies are not."""
    kept, own, passes = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}, []

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def note_input(block, inputs):  # --recompute keeps it, which saved_tensors_hooks does not see
        if torch.is_grad_enabled():
            note(inputs[0])
            passes.append(block)
    blocks = [block for block in model.encoder.modules() if "mlp" in dict(block.named_children())]
    handles = [block.register_forward_pre_hook(note_input) for block in blocks]
    view1, view2 = torch.randn(2, images, 3, cfg.img, cfg.img, device=device)
    with torch.autocast(device.type, torch.bfloat16), saved_tensors_hooks(note, lambda x: x):
        losses = model(view1, view2)
    for handle in handles:
        handle.remove()
    del losses  # all that was kept lives until here, so that no two tensors had the same place
    return sum(size for place, size in kept.items() if place not in own), len(passes)


def room(module, cfg, device):
    """{"plain" and "with --recompute": (bytes that a step keeps of each image, bytes that it needs at its peak)}.

    At its peak, in backward, a step also holds the gradients in one block of the encoder, and with --recompute that
    block's own tensors, which it has just computed again. On a CPU, too, a ViT's attention is counted in bfloat16.
    """
    def of_an_image():
        return saved_bytes(model, cfg, 3, device)[0] - saved_bytes(model, cfg, 2, device)[0]
    torch.manual_seed(0)
    model = model_class(module)(cfg).to(device)
    attend, module.attend = module.attend, F.scaled_dot_product_attention  # on CPUs it would leave bfloat16
    try:
        plain, (_, passes) = of_an_image(), saved_bytes(model, cfg, 2, device)
        recompute(model)
        less = of_an_image()
    finally:
        module.attend = attend
    block = (plain - less) / passes
    return {"plain": (plain, plain + block), "with --recompute": (less, less + 2 * block)}


def largest_batch(model, cfg, needed, gigabytes):
    """How many images of `needed` bytes each so much memory holds, beside their two views in float32, the weights,
    their gradients, AdamW's moments and bfloat16 copies; a tenth of the memory stays free."""
    fixed = sum(p.numel() * (4 + 4 + 8 + 2 if p.requires_grad else 4 + 2) for p in model.parameters())
    return max(0, int((0.9e9 * gigabytes - fixed) / (needed + 2 * 3 * 4 * cfg.img ** 2)))


def reading(cfg, here):
    """Images a second that Batches gives from a memory-mapped file of 2,048 images: from the disk, and from memory."""
    side, rates = cfg.store or round(cfg.img * 8 / 7), []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # /tmp may be memory
        file = pathlib.Path(folder, "images.npy")
        np.save(file, np.random.default_rng(0).integers(0, 256, (2048, 3, side, side), np.uint8))
        for source in ("disk", "memory"):
            if source == "disk":
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            images = torch.from_numpy(np.load(file, mmap_mode="r"))
            batches = Batches((images[:0], None, torch.ones(2048)), min(cfg.batch, 256), 0, here, torch.arange(2048))
            batches.images, begin = images, time.perf_counter()  # only now: Batches would move them to a GPU
            for step in range(len(batches)):
                batches[step]
            if here.device.type == "cuda":
                torch.cuda.synchronize()
            rates.append(len(batches) * batches.batch / (time.perf_counter() - begin))
    return rates


class PilViews(Dataset):
    """MCLim's two views as PIL and torchvision make them, image by image."""
    def __init__(self, images, cfg):
        self.images = [to_pil_image(image) for image in images]
        crop = transforms.RandomResizedCrop(cfg.img, (cfg.crop_min, cfg.crop_max))
        last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], cfg.jitter)
        blur = transforms.RandomApply([transforms.GaussianBlur(cfg.img // 10 // 2 * 2 + 1, (0.1, 2.0))], cfg.blur)
        self.view1 = transforms.Compose([crop, *last])
        self.view2 = transforms.Compose([crop, jitter, transforms.RandomGrayscale(cfg.gray), blur, *last])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.view1(self.images[i]), self.view2(self.images[i])


def measure(method, flags):
    """Prints all rates of `method` with `flags`. Raises UserError, OSError."""
    check(os.environ.get("WORLD_SIZE", "1") == "1", "torchrun", "eval_speed.py", "runs alone, on one device")
    check(method in ("mclim", "mvmae", "cmae", "macrl", "camae"), "METHOD", repr(method),
          "the first word must be a method, as in eval_speed.py mclim --tiny")
    module = importlib.import_module(method)
    cfg = command_line(method, module.Config, module.TINY, flags)
    here = start_processes(cfg.device)
    name = torch.cuda.get_device_name() if here.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; {method}, {cfg.img} pixels, patch {cfg.patch}, batch {cfg.batch}")

    pool = torch.randint(256, (1024, 3, 32, 32), dtype=torch.uint8)
    for img in sorted({32, cfg.img}):
        sized = replace(cfg, img=img, patch=4) if img == 32 else cfg
        batch = pool[:64].to(here.device)
        ours = 64 * rate(lambda: module.views(batch, sized), here.device)
        line = f"views       {img:3} pixels   {ours:10,.0f} images/s"
        if method == "mclim":
            loader = DataLoader(PilViews(pool, sized), 64, num_workers=2, persistent_workers=True)
            theirs = 1024 * rate(lambda: sum(len(view) for view, _ in loader), here.device)
            line += f"   PIL, two workers {theirs:8,.0f}   ratio {ours / theirs:.2f}"
        print(line, flush=True)
    batch = torch.empty(cfg.batch, 3, 256, 256, dtype=torch.uint8, device="meta")
    copies, kernels = count_copies(lambda: module.views(batch, cfg))
    print(f"counted     {copies} copies to the device and {kernels} kernels, of the views of a step", flush=True)
    if hasattr(os, "posix_fadvise"):
        disk, memory = reading(cfg, here)
        print(f"reading     {cfg.store or round(cfg.img * 8 / 7):3} pixels   {disk:10,.0f} images/s from the disk   "
              f"{memory:,.0f} from memory", flush=True)

    torch.manual_seed(0)
    model = model_class(module)(cfg).to(here.device)
    for how, (kept, needed) in room(module, cfg, here.device).items():
        fits = ", ".join(f"{largest_batch(model, cfg, needed, size):,} in {size} GB" for size in (12, 24, 80))
        print(f"room        {kept / 1e6:6.1f} MB an image, {how}: at most {fits}", flush=True)

    optimizer = torch.optim.AdamW(param_groups(model, cfg.wd), fused=True)
    view1, view2 = torch.randn(2, cfg.batch, 3, cfg.img, cfg.img, device=here.device)  # (B, 3, H, W) each

    def step(net, amp):
        with autocast(here.device, amp):
            loss = net(view1, view2)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with autocast(here.device):
        kind = torch.bfloat16 if torch.is_autocast_enabled(here.device.type) else torch.float32
    n, gflop = 8192 if here.device.type == "cuda" else 2048, gflop_per_image(cfg)
    a, b = (torch.randn(n, n, device=here.device, dtype=kind) for _ in range(2))
    peak = 2 * n ** 3 * rate(lambda: a @ b, here.device) / 1e12
    nets = {"": model}
    if cfg.compile:
        nets["compiled"] = torch.compile(model, options={"fallback_random": True})
    for amp in (True, False) if kind == torch.bfloat16 else (True,):
        for how, net in nets.items():
            speed = cfg.batch * rate(lambda: step(net, amp), here.device)
            share = f"   {speed * gflop / 1e3:.3g} of {peak:.3g} TFLOP/s" if amp else ""
            precision = str(kind if amp else torch.float32).removeprefix("torch.")
            print(f"step        {precision:8}   {speed:10,.1f} images/s{share}   {how}".rstrip(), flush=True)
    if kind == torch.float32:
        print("            in float32 alone: the device has no bfloat16 in hardware (AVX-512 BF16 or AMX on a CPU)")

    if hasattr(module, "visible_first"):
        every = torch.arange((cfg.img // cfg.patch) ** 2, device=here.device).expand(cfg.batch, -1)
        mask = module.random_mask(cfg.batch, (cfg.img // cfg.patch) ** 2, cfg.mask, here.device)
        V, decoder = int((~mask[0]).sum()), model.decoder_s if method == "macrl" else model.decoder

        def one_view(visible):
            with autocast(here.device):
                y = decoder(model.encoder(view1, visible), visible)
            y.float().square().mean().backward()
            optimizer.zero_grad()

        masked, whole = (1 / rate(lambda: one_view(visible), here.device)
                         for visible in (module.visible_first(mask)[:, :V], every))
        print(f"one view    mask {cfg.mask}   {masked:10.3f} s   unmasked {whole:.3f} s   ratio {masked / whole:.2f}")


def main(argv=None):
    """The command line; returns the exit status of `answer`."""
    method, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if method in ("-h", "--help"):
        print(__doc__)
        return 0
    return answer("eval_speed.py", lambda: measure(method, flags))


if __name__ == "__main__":
    sys.exit(main())
