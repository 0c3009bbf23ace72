"""How fast a method is on this machine.

    python speed.py mclim                        the paper's configuration
    python speed.py mclim --tiny --batch 64      any flags of the method file
    python speed.py mclim --tiny --compile       the compiled model

Prints images/s, the median of at least three calls and five seconds, after two warm-up calls:
  reading    batches of random uint8 images, copied to the device or, if they fit, indexed there
  views      the two views of each image
  step       forward, backward and AdamW on random views, in the precision that training uses;
             without the moving averages that some methods update
  together   all three
and the fraction of the device's matrix rate that the step reaches: its floating-point operations
against those of a product of two large square matrices in the same precision. On a GPU also the
peak of allocated memory.
"""
import argparse
import importlib
import math
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import (Batches, autocast, make_config, make_parser, report_errors, require,
                    start_processes)
from images import Images


def load_method(name):
    """The module of a method file in this folder, "mclim" or "mclim.py". Raises UserError."""
    folder = Path(__file__).parent
    file = folder / f"{name.removesuffix('.py')}.py"
    require(file.parent == folder and file.exists(), f"METHOD {name}: not a file of {folder}")
    module = importlib.import_module(file.stem)
    require(hasattr(module, "Model"), f"METHOD {name}: {file.name} has no class Model")
    return module


def config_of(module, flags, **fixed):
    """The Config of a method's command line; `fixed` values take precedence. Raises UserError."""
    parser = make_parser(module.__file__, module.__doc__, module.Config, module.TINY)
    typed = vars(parser.parse_args(flags)) | fixed
    return make_config(typed, module.Config, module.TINY, module.__name__)


def convolution_backward_flop(grad, x, weight, *rest, **_):
    """Operations of a convolution's backward pass: those of the forward for each gradient needed
    (input, weight). torch's own count is too large for grouped convolutions."""
    needed = rest[-1][:2]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(needed)


def gflop_per_image(module, cfg):
    """10⁹ floating-point operations of forward and backward for one image: those of matrix
    products and convolutions, a multiplication and an addition counted as two.

    Counted on the CPU with a batch of two. The similarities between images grow with the batch
    and are small; views, optimizer and moving averages are not counted.
    """
    with torch.random.fork_rng(devices=[]):
        model = module.Model(cfg)
        view1, view2 = torch.randn(2, 2, 3, cfg.img, cfg.img)                   # (2, 3, H, W) each
        mapping = {torch.ops.aten.convolution_backward: convolution_backward_flop}
        with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                model(view1, view2)["loss"].backward()
    return counter.get_total_flops() / len(view1) / 1e9


def seconds(call, device, least=5.0):
    """Seconds of call(): the median of at least three calls and `least` seconds. Two calls warm
    up."""
    times = []
    while len(times) < 5 or sum(times[2:]) < least:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def matrix_rate(device, dtype):
    """Floating-point operations per second of a product of two large square matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / seconds(lambda: a @ b, device)


def measure(module, cfg):
    """Prints the rates of a method. Raises UserError."""
    device, _, _ = start_processes(cfg.device)
    cuda = device.type == "cuda"
    with autocast(device, cfg.amp):
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if enabled else torch.float32
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    precision = str(dtype).removeprefix("torch.")
    print(f"{module.__name__} on {name}, torch {torch.__version__}: batch {cfg.batch}, "
          f"{cfg.img}×{cfg.img} pixels, patch {cfg.patch}, {precision}", flush=True)

    def tell(name, call, note=""):
        rate = cfg.batch / seconds(call, device)
        print(f"{name:9} {rate:12,.1f} images/s   {note}".rstrip(), flush=True)
        return rate

    torch.manual_seed(cfg.seed)
    side = round(cfg.img * 8 / 7)
    pixels = torch.randint(256, (cfg.batch, 3, side, side), dtype=torch.uint8)
    batches = Batches(Images(pixels), cfg.batch, cfg.seed, device)
    batch = batches[0]
    view1, view2 = torch.randn(2, cfg.batch, 3, cfg.img, cfg.img, device=device)
    model = module.Model(cfg).to(device)
    net = torch.compile(model, options={"fallback_random": True}) if cfg.compile else model
    optimizer = torch.optim.AdamW(module.param_groups(model, cfg.wd), fused=True)

    def step(view1, view2):
        with autocast(device, cfg.amp):
            losses = net(view1, view2)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    tell("reading", lambda: batches[0], f"of {side}×{side} pixels")
    tell("views", lambda: module.views(batch, cfg))
    rate = tell("step", lambda: step(view1, view2), "compiled" if cfg.compile else "")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    tell("together", lambda: step(*module.views(batches[0], cfg)[:2]))
    if cuda:
        print(f"peak of allocated memory: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    gflop, limit = gflop_per_image(module, cfg), matrix_rate(device, dtype) / 1e9
    print(f"the step computes {gflop:.4g} GFLOP per image, {rate * gflop / 1e3:.3g} TFLOP/s: "
          f"{rate * gflop / limit:.3f} of the {limit / 1e3:.3g} TFLOP/s of a matrix product")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        "speed.py", usage="%(prog)s METHOD [--flag value ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", metavar="METHOD", help="a method file, as mclim")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of the method file")
    args = parser.parse_args(argv)
    with report_errors(parser):
        module = load_method(args.method)
        measure(module, config_of(module, args.flags))


if __name__ == "__main__":
    main()
