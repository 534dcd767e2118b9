"""What a run will take, before it is run: FLOPs, memory, time, and each parameter's learning rate.

    python cdslm.py --size 16b --parallel fsdp --dry-run --devices 64       no data is read, no memory taken
    python cdslm.py --size small --print-params

Imported by `cdslm.py` when it is needed.
"""
import itertools
import json
import os
import time

import torch
import torch.distributed as dist

from cdslm import GUIDED, STEPS, Diffusion, MMDiT, count, decide, levels, make_optimizers, ranks, role
from corpus import UserError
from devices import check_division, multiplies_bf16

KEPT = {torch.float32: 92, torch.bfloat16: 58}  # bytes that a token leaves in a block for the backward pass, over d


def memory(config, devices, device, dtype):
    """GiB on each device at the peak of a step: the weights with their average, gradients, the optimiser's state, what
    the forward pass keeps for the backward pass, the total; and that if blocks are computed again."""
    with torch.device("meta"):
        model = MMDiT(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    whole, item = sum(sizes.values()), dtype.itemsize
    matrices = sum(n for name, n in sizes.items() if role(model, name) == "hidden") if config.optimizer == "muon" else 0
    share = devices if config.parallel == "fsdp" else 1
    cast = 0 if item == 4 else item * whole                                   # autocast's copies, made once a step
    if share > 1:
        cast = 2 * item * max(sum(p.numel() for p in block.parameters()) for block in model.blocks)  # two are gathered
    windows = config.micro_batch or max(1, config.batch_size // devices)
    accumulated = 4 * whole if share > 1 and windows * devices < config.batch_size else 0   # not yet exchanged
    frames = config.ctx_frames + config.gen_frames
    tokens, heads = frames // config.patch_size, model.blocks[0].heads
    block = windows * tokens * (KEPT[dtype] * config.width + (item * heads * tokens if device.type == "cpu" else 0))
    ends = windows * frames * config.channels * 4 * 8                         # speech, noise, prediction and the like
    ends += block // 2                                                        # gradients on their way through a block
    again = windows * tokens * config.width * item * config.depth + block + ends
    need = {"weights": 8 * whole / share + cast, "gradients": 4 * whole / share + accumulated,
            "optimiser": (8 * whole - 4 * matrices) / share, "activations": config.depth * block + ends}
    need["total"] = sum(need.values())
    need["total with --checkpoint-activations"] = need["total"] - need["activations"] + again
    return {name: size / 2 ** 30 for name, size in need.items()}


def afford(config, device, dtype):
    """Raise UserError if a device can't hold its part of the run."""
    need = memory(config, ranks()[1], device, dtype)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    total = need["total with --checkpoint-activations" if config.checkpoint_activations else "total"]
    if total > there / 2 ** 30:
        parts = ", ".join(f"{name} {need[name]:.3g}" for name in list(need)[:4])
        raise UserError(f"--size {config.size} needs {total:.3g} GiB on each device ({parts}), and this one has "
                        f"{there / 2 ** 30:.3g}; see --dry-run with --devices, --parallel fsdp, --micro-batch")


def dry_run(config):
    """Say what a run would be, without data and without allocating it."""
    (device, dtype), size, devices = decide(config), count(config), max(1, config.devices)
    check_division(config, devices)
    if config.devices:
        device, dtype = torch.device("cuda"), torch.float32 if config.dtype == "fp32" else torch.bfloat16
    tokens, windows = size["tokens"] * config.batch_size, config.batch_size * config.steps
    evaluations = sum(1 + (GUIDED[0] < phi < GUIDED[1]) for phi in levels(config, STEPS)[:-1])
    facts = {"size": config.size, "device": str(device), "dtype": str(dtype)[6:], "parameters": size["parameters"],
             "ctx_frames": config.ctx_frames, "gen_frames": config.gen_frames, "tokens_per_step": tokens,
             "flops_per_step": size["flops"] * config.batch_size, "tokens": tokens * config.steps,
             "flops": size["flops"] * windows, "6ND": 6 * size["parameters"] * tokens * config.steps,
             "flops_per_window_spoken": evaluations * size["flops_forward"],
             "devices": devices, "days": size["flops"] * windows / (devices * config.tflops * 1e12) / 86400}
    facts |= {f"GiB: {name}": value for name, value in memory(config, devices, device, dtype).items()}
    lines = [f"{name:>40}  {value:.3g}" if isinstance(value, float) else f"{name:>40}  {value}"
             for name, value in facts.items()]
    print(json.dumps(facts) if config.json else "\n".join(lines))


def print_params(config):
    """Name, shape, role, learning rate and weight decay of every parameter."""
    with torch.device("meta"):
        model = MMDiT(config)
    groups = {parameter: group for optimizer in make_optimizers(model, config) for group in optimizer.param_groups
              for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        shape, group = "x".join(map(str, parameter.shape)), groups[parameter]
        print(f"{name:28} {shape:>12}  {role(model, name):7} lr {group['lr']:.3g}  wd {group['weight_decay']:.3g}")


def seconds_a_step(config, device, dtype):
    """Seconds that a training step takes here: the fastest of four, which leave nothing behind."""
    model = MMDiT(config).to(device)
    optimizers, diffusion = make_optimizers(model, config, dtype), Diffusion(config)
    micro = config.micro_batch or config.batch_size
    ctx, x0 = (torch.randn(micro, n, config.channels, device=device) for n in (config.ctx_frames, config.gen_frames))
    times = [time.perf_counter()]
    for _ in range(4):
        for _ in range(config.batch_size // micro):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                guess = config.self_condition > 0
                diffusion.loss(model, x0, ctx, torch.ones(micro, device=device), x0, guess).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.zeros(1, device=device).item()                                  # a GPU is not done when it has its orders
        times.append(time.perf_counter())
    return min(b - a for a, b in itertools.pairwise(times))


def announce(config, device, dtype):
    """Print what will be trained, and on what."""
    size, precision = count(config), str(dtype)[6:]
    if dtype == torch.float32 and not multiplies_bf16(device):
        precision += f" (this {device.type} has no bf16 in hardware)"
    print(f"{config.size}: {size['parameters'] / 1e6:.2f} M parameters on {device} in {precision}; "
          f"{config.steps} steps of {config.batch_size} windows of {size['tokens']} tokens, "
          f"{size['flops'] * config.batch_size / 1e9:.3g} GFLOP a step")
    if dist.is_initialized():
        print(f"{ranks()[1]} ranks, each with {'a shard' if config.parallel == 'fsdp' else 'a copy'} of the model")
