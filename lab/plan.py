"""plan: what a run will take, before it is run: parameters, FLOPs, memory, time.

    python -m lab.plan --size 16b --parallel fsdp --devices 64    reads no data, takes no memory
    python -m lab.plan --size small --print-params                each parameter's role and rates

It takes every flag of cdslm.py, and `python cdslm.py --dry-run` is the same program.
"""
import itertools
import json
import os
import shutil
import subprocess
import time

import torch
from tqdm import tqdm

from cdslm import (LAUNCHED, STEPS, Config, Diffusion, MMDiT, UserError, autocast, check_division,
                   cli, config_parser, count, decide, is_guided, levels, make_optimizers, ranks,
                   role, to_config)

# Bytes per token and channel that a block keeps for the backward pass, without attention's scores.
# CUDA's autocast keeps 63: it normalises in float32.
KEPT = {torch.float32: 92, torch.bfloat16: 58}
KEPT_ON_CUDA = KEPT | {torch.bfloat16: 63}
WARM, TRIAL = 10, 40                  # the speed of a run is measured between these steps


def memory(config, devices, device, dtype):
    """{part: GiB} on each device at the peak of a step: weights with their EMA, gradients, the
    optimiser's state, activations kept for the backward pass, the total; and the total with
    activation checkpointing."""
    with torch.device("meta"):
        model = MMDiT(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    whole, item = sum(sizes.values()), dtype.itemsize
    matrices = 0
    if config.optimizer == "muon":
        matrices = sum(n for name, n in sizes.items() if role(model, name) == "hidden")

    # Copies of the weights in `dtype`: autocast's, or those of the two blocks that FSDP2 gathers.
    sharded = config.parallel == "fsdp" and devices > 1
    share = devices if sharded else 1
    cast = 0 if item == 4 else item * whole
    if sharded:
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        cast = 2 * item * max(blocks)

    windows = config.micro_batch or max(1, config.batch_size // devices)
    accumulated = 0                                   # gradients that are not yet exchanged
    if sharded and windows * devices < config.batch_size:
        accumulated = 4 * whole
    frames = config.ctx_frames + config.gen_frames
    tokens, heads = frames // config.patch_size, model.blocks[0].heads
    scores = item * heads * tokens if device.type == "cpu" else 0
    kept = KEPT_ON_CUDA if device.type == "cuda" else KEPT
    block = windows * tokens * (kept[dtype] * config.width + scores)
    ends = windows * frames * config.channels * 4 * 8         # speech, noise, prediction and others
    ends += block // 2                                        # gradients on their way
    recomputed = windows * tokens * config.width * item * config.depth + block + ends

    need = {
        "weights": 8 * whole / share + cast,
        "gradients": 4 * whole / share + accumulated,
        "optimiser": (8 * whole - 4 * matrices) / share,
        "activations": config.depth * block + ends,
    }
    need["total"] = sum(need.values())
    saved = need["activations"] - recomputed
    need["total with --checkpoint-activations"] = need["total"] - saved
    return {name: size / 2 ** 30 for name, size in need.items()}


def afford(config, device, dtype):
    """Raise UserError if a device can't hold its part of the run."""
    need = memory(config, ranks()[1], device, dtype)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        # What is free, or kept by this process for later; some is lost in fragments.
        there = 0.9 * (torch.cuda.mem_get_info(device)[0] + unused)
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    total = need["total"]
    if config.checkpoint_activations:
        total = need["total with --checkpoint-activations"]
    if total > there / 2 ** 30:
        parts = ", ".join(f"{name} {need[name]:.3g}" for name in list(need)[:4])
        raise UserError(f"--size {config.size} needs {total:.3g} GiB on each device ({parts}), and "
                        f"this one has {there / 2 ** 30:.3g} for it; see --dry-run with --devices, "
                        "--parallel fsdp, --micro-batch")


def note_unused_gpu(config, device):
    """Say so if an NVIDIA driver answers, but this torch can't use it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None or config.device != "auto"
    if device.type != "cpu" or hidden or not shutil.which("nvidia-smi"):
        return
    if subprocess.run("nvidia-smi", capture_output=True).returncode:
        return
    why = "was built without CUDA;"
    if torch.version.cuda:
        why = f"needs a driver for CUDA {torch.version.cuda}; update the driver, or"
    print(f"note: there is an NVIDIA GPU, but this torch {why} pip install torch --force-reinstall "
          "--index-url https://download.pytorch.org/whl/cu128 (cu126 for an older GPU or driver)")


class Pace:
    """The time limit of a run, --minutes: its first steps tell how long it would take. The decay of
    the learning rate follows the number of steps, so they are reduced only once, early."""

    def __init__(self, config, first):
        self.config, self.first, self.warm = config, first, None
        self.timed = config.minutes and config.lr_schedule == "wsd" and ranks()[1] == 1

    def shortens(self, done):
        """Whether the run gets fewer steps, now that `done` are done; it began after `first`."""
        if done == self.first + WARM:
            self.warm = time.perf_counter()
        if done != self.first + TRIAL or self.first >= TRIAL or not self.timed:
            return False
        seconds = (time.perf_counter() - self.warm) / (TRIAL - WARM)
        return keep_to_time(self.config, done, seconds)


def keep_to_time(config, done, seconds):
    """Reduce the steps of a run so that at `seconds` per step it ends `minutes` after its launch.
    Returns whether they changed."""
    spent = (time.perf_counter() - LAUNCHED) / 60
    # The rest is for validation, sound, and a machine that slows down.
    affordable = (0.85 * config.minutes - spent) * 60 / seconds
    full, fewer = config.steps, max(2 * done, int(done + affordable) // 100 * 100)
    if fewer >= full:
        return False
    config.steps = fewer
    tqdm.write(f"{full} steps would take {full * seconds / 60:.0f} minutes here: training for "
               f"{config.steps} instead; for all of them add --steps {full}")
    return True


def facts(config, devices, tflops):
    """What a run would be, as a dictionary; nothing is allocated. `devices` GPUs that each sustain
    `tflops` 10^12 FLOPs a second; 0: this machine."""
    device, dtype = decide(config)
    if devices:
        device = torch.device("cuda")
        dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
    count_of_devices = max(1, devices)
    check_division(config, count_of_devices)

    size = count(config)
    tokens, windows = size["tokens"] * config.batch_size, config.batch_size * config.steps
    guided = [is_guided(config, phi) for phi in levels(config, STEPS)[:-1]]
    flops = size["flops"] * windows
    found = {
        "size": config.size, "device": str(device), "dtype": str(dtype)[6:],
        "parameters": size["parameters"], "ctx_frames": config.ctx_frames,
        "gen_frames": config.gen_frames, "tokens_per_step": tokens,
        "flops_per_step": size["flops"] * config.batch_size, "tokens": tokens * config.steps,
        "flops": flops, "6ND": 6 * size["parameters"] * tokens * config.steps,
        "flops_per_window_spoken": (len(guided) + sum(guided)) * size["flops_forward"],
        "devices": count_of_devices, "days": flops / (count_of_devices * tflops * 1e12) / 86400}
    need = memory(config, count_of_devices, device, dtype)
    return found | {f"GiB: {name}": value for name, value in need.items()}


def human(name, value):
    """A value as people read it: 15.8 B, 410 G, 7.4 TiB, 3.2 days."""
    if isinstance(value, str):
        return value
    if name.startswith("GiB"):
        return f"{value / 1024:.3g} TiB" if value >= 1024 else f"{value:.3g} GiB"
    if name == "days":
        return f"{value:.3g} days" if value >= 1 else f"{value * 24:.3g} hours"
    if value < 100_000:
        return f"{value:.6g}"
    if "flops" in name or name == "6ND":
        return f"{value:.3g} FLOPs"
    for size, letter in ((1e12, "T"), (1e9, "B" if name == "parameters" else "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value / 1e3:.3g} k"


def print_params(config):
    """Print name, shape, role, learning rate and weight decay of every parameter."""
    with torch.device("meta"):
        model = MMDiT(config)
    groups = {}
    for optimizer in make_optimizers(model, config):
        for group in optimizer.param_groups:
            groups |= dict.fromkeys(group["params"], group)
    for name, parameter in model.named_parameters():
        shape, group = "x".join(map(str, parameter.shape)), groups[parameter]
        rates = f"lr {group['lr']:.3g}  wd {group['weight_decay']:.3g}"
        print(f"{name:28} {shape:>12}  {role(model, name):7} {rates}")


def seconds_a_step(config, device, dtype):
    """Seconds of a training step here: the fastest of four, which leave nothing behind."""
    model, diffusion = MMDiT(config).to(device), Diffusion(config)
    optimizers = make_optimizers(model, config, dtype)
    micro = config.micro_batch or config.batch_size
    ctx = torch.randn(micro, config.ctx_frames, config.channels, device=device)
    x0 = torch.randn(micro, config.gen_frames, config.channels, device=device)
    phi, estimate = torch.ones(micro, device=device), config.self_condition > 0
    times = [time.perf_counter()]
    for _ in range(4):
        for _ in range(config.batch_size // micro):
            with autocast(device, dtype):
                diffusion.loss(model, x0, ctx, phi, x0, estimate).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.zeros(1, device=device).item()          # waits for the device
        times.append(time.perf_counter())
    return min(b - a for a, b in itertools.pairwise(times))


def command_line(config):
    """The flags of cdslm.py that give this configuration, as a list of words."""
    usual, words = vars(Config(size=config.size)), ["--size", config.size]
    for name, value in vars(config).items():
        if value == usual[name]:
            continue
        flag = name.replace("_", "-")
        words.append(f"--no-{flag}" if value is False else f"--{flag}")
        if isinstance(value, list):
            words += map(str, value)
        elif not isinstance(value, bool):                     # a switch has no value
            words.append(str(value))
    return words


def parse(argv=None):
    """Command line -> arguments, which hold all fields of Config too."""
    parser = config_parser(__doc__)
    group = parser.add_argument_group("plan")
    group.add_argument("--dry-run", action="store_true", help="this program's job: print the plan")
    group.add_argument("--print-params", action="store_true",
                       help="print each parameter's shape, role, learning rate and weight decay")
    group.add_argument("--devices", type=int, default=0, help="plan for so many GPUs [here]")
    group.add_argument("--tflops", type=float, default=400.0,
                       help="what each sustains; 400 is two fifths of an H100's bf16 peak [400]")
    group.add_argument("--json", action="store_true", help="print the plan as JSON")
    arguments = parser.parse_args(argv)
    if arguments.devices < 0 or not 0 < arguments.tflops < float("inf"):
        raise UserError("--devices must be at least 0, --tflops more than 0")
    return arguments


def main():
    arguments = parse()
    config = to_config(arguments)
    if arguments.print_params:
        return print_params(config)
    found = facts(config, arguments.devices, arguments.tflops)
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            title = name.removeprefix("GiB: ").replace("_", " ")
            print(f"{title:>40}  {human(name, value)}")


if __name__ == "__main__":
    cli(main)
