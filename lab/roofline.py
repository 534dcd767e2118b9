"""roofline: what bounds a training step on a GPU, on paper (Williams et al. 2009).

    python -m lab.roofline --size base            one H100
    python -m lab.roofline --size medium --tflops 312 --bandwidth 2039      one A100

It runs the forward and backward pass on torch's meta device, which knows shapes and holds no
numbers, and counts what a GPU would be told to do: FLOPs of the matrix products, bytes that kernels
read and write, and kernels. Each gives a time that no eager step can beat. What the step takes is
between the largest of the three and their sum. Nothing here was measured on a GPU.

Counted as if weights and activations were bf16; under autocast some are float32, so real traffic is
larger. With micro-batches, each is counted. Self-conditioning, which the paper's sizes do not have,
is not, and the optimiser is counted as AdamW.
"""
from collections import Counter

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cdslm import Diffusion, MMDiT, UserError, cli, config_parser, count, to_config

# An H100; the time of a launch is typical.
GPU = {"tflops": (989, "dense bf16 TFLOP/s"),
       "bandwidth": (3350, "memory bandwidth, GB/s"),
       "launch": (5, "host microseconds a kernel")}
OPTIMISER_BYTES = 4 * (3 + 7 + 3)   # a parameter: gradient norm and clipping, AdamW, EMA in float32


class Kernels(TorchDispatchMode):
    """Counts kernels and the bytes of their arguments and results. A view launches no kernel."""

    def __init__(self):
        super().__init__()
        self.launches, self.bytes = 0, Counter()

    def add(self, kind, tensors):
        self.launches += 1
        self.bytes[kind] += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            products = "mm" in function.name() or "linear" in function.name()
            kind = "matrix products" if products else "element by element"
            self.add(kind, tree_leaves((args, kwargs, result)))
        return result


class FusedAttention(TorchFunctionMode):
    """Attention as one kernel forward and one backward, as on a GPU: the meta device would take it
    apart. Its FLOPs are 4 B H T^2 D forward, and 2.5 times that backward (Dao et al. 2022)."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels, self.flops = kernels, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args
        self.flops += 3.5 * 4 * q.numel() * k.shape[-2]
        self.kernels.add("attention", [q, k, v, v])
        self.kernels.add("attention", [q, k, v, v, q, k, v, v])
        return Shaped.apply(q, k, v)


class Shaped(torch.autograd.Function):
    """A result and gradients of attention's shapes, from no kernel."""

    @staticmethod
    def forward(ctx, q, k, v):
        return v.detach().view_as(v)

    @staticmethod
    def backward(ctx, grad):
        return grad.view_as(grad), grad.view_as(grad), grad.view_as(grad)


def step(config):
    """{part: (TFLOP, GB)} of a training step on one device, and its kernels."""
    windows = config.micro_batch or config.batch_size
    passes = config.batch_size // windows
    with torch.device("meta"):
        model = MMDiT(config).to(torch.bfloat16)
        x0 = torch.empty(windows, config.gen_frames, config.channels)
        ctx = torch.empty(windows, config.ctx_frames, config.channels)
        phi = torch.empty(windows)
    kernels = Kernels()
    attention = FusedAttention(kernels)
    with FlopCounterMode(display=False) as products, attention, kernels:
        losses = Diffusion(config).loss(model, x0, ctx, phi, torch.empty_like(x0))
        losses.mean().backward()

    flops = {"matrix products": products.get_total_flops(), "attention": attention.flops}
    parts = {kind: (passes * flops.get(kind, 0) / 1e12, passes * size / 1e9)
             for kind, size in kernels.bytes.items()}
    parts["norm, AdamW, EMA"] = 0, OPTIMISER_BYTES * count(config)["parameters"] / 1e9
    return parts, passes * kernels.launches


def main():
    parser = config_parser(__doc__)
    for name, (value, help) in GPU.items():
        parser.add_argument("--" + name, type=float, default=value, help=f"{help} [{value}]")
    arguments = parser.parse_args()
    config = to_config(arguments)
    if min(arguments.tflops, arguments.bandwidth, arguments.launch) <= 0:
        raise UserError("--tflops, --bandwidth and --launch must be more than 0")
    parts, launches = step(config)

    print(f"{config.size}: a step of {config.batch_size} windows\n")
    print("| part | TFLOP | GB | ms by FLOPs | ms by bytes |\n|---|---|---|---|---|")
    rows = parts | {"together": tuple(map(sum, zip(*parts.values())))}
    for name, (flops, size) in rows.items():
        print(f"| {name} | {flops:.3g} | {size:.3g} | {flops / arguments.tflops * 1e3:.3g} | "
              f"{size / arguments.bandwidth * 1e3:.3g} |")
    flops, size = rows["together"]
    compute, memory = flops / arguments.tflops * 1e3, size / arguments.bandwidth * 1e3
    host = launches * arguments.launch / 1e3
    print(f"\n{launches} kernels: {host:.3g} ms for the host to launch them")
    least, most = max(compute, memory, host), compute + memory + host
    print(f"so a step takes {least:.3g} to {most:.3g} ms, and the GPU does {compute / most:.2g} to "
          f"{compute / least:.2g} of its peak FLOP/s")


if __name__ == "__main__":
    cli(main)
