"""profile: where the time and the memory of a training step go, by torch.profiler.

    python -m lab.profile --size tiny                        ten steps on this machine
    python -m lab.profile --size base --data my_recordings --compile --steps 20 --out prof
    torchrun --nproc_per_node=8 -m lab.profile --size xl --parallel fsdp ...    of rank 0

It takes every flag of cdslm.py. `--steps` are those that are profiled, after three that are not; as
a run is so short, the blocks are compiled only with `--compile`, even where training compiles them.
It prints the ten most expensive operators, how long a step waits for its batch, and on a GPU the
peak of memory. OUT/trace.json shows when each operator ran: open it at https://ui.perfetto.dev. OUT
is out/profile unless given, and no run folder: nothing is trained that is kept.
"""
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from cdslm import (Trainer, UserError, check_run, cli, config_parser, new_autoencoder, open_corpus,
                   replacing, to_config, together)
from lab import muon
from lab.bench import table

WARM = 3                              # steps until compilation and memory have settled
SHOWN = 10                            # operators


def make_trainer(config, rank, device, dtype):
    """A Trainer that has an untrained autoencoder and writes nothing."""
    if rank:
        dist.barrier()                                        # rank 0 makes the cache
    corpus = open_corpus(config)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    autoencoder = new_autoencoder(config).to(device)
    autoencoder.eval().requires_grad_(False)
    return Trainer(config, corpus, autoencoder, device, dtype)


def record(trainer, steps):
    """Train: (profiler, seconds of these steps, seconds in which they waited for batches)."""
    wait, cuda = 0.0, trainer.device.type == "cuda"
    for _ in range(WARM):
        trainer.finish(trainer.step())
    activities = [ProfilerActivity.CPU]
    if cuda:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats(trainer.device)
    with profile(activities=activities) as profiler:
        begun = time.perf_counter()
        before = None
        for _ in range(steps):
            with record_function("step"):
                row = trainer.step()
                wait += row["wait"]
                if before:
                    trainer.finish(before)                    # a step late, as in training
            before = row
        trainer.finish(before)
        seconds = time.perf_counter() - begun
    return profiler, seconds, wait


def operators(profiler, steps, cuda):
    """Rows of the most expensive operators: name, calls and milliseconds a step, share. Time in the
    operators that one calls is not its own. On a GPU, it is the time of the kernels it launches."""
    times = []
    for event in profiler.key_averages():
        # Kernels are listed once more by themselves, and so are named sections such as a step.
        if event.device_type != DeviceType.CPU or event.is_user_annotation:
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        times.append((own, event.count, event.key))
    total = sum(own for own, _, _ in times)
    return [(name, calls / steps, own / 1e3 / steps, own / total)
            for own, calls, name in sorted(times, reverse=True)[:SHOWN]]


def report(trainer, profiler, seconds, wait):
    """Print what was found."""
    config, cuda = trainer.config, trainer.device.type == "cuda"
    rows = operators(profiler, config.steps, cuda)
    where = "on the GPU" if cuda else "on the CPU"
    table(f"The most expensive operators, {where}, rank 0",
          ("operator", "calls a step", "ms a step", "share"), rows)
    flops = config.batch_size * trainer.size["flops"]
    print(f"\na step takes {1e3 * seconds / config.steps:.4g} ms, profiled; "
          f"{flops * config.steps / seconds / 1e12:.3g} TFLOP/s over all devices\n"
          f"of it, {1e3 * wait / config.steps:.3g} ms are spent waiting for the batch")
    if cuda:
        peak = torch.cuda.max_memory_allocated(trainer.device)
        print(f"peak memory of tensors: {peak / 2 ** 30:.3g} GiB")


def main():
    parser = config_parser(__doc__)
    parser.set_defaults(steps=10, out="out/profile")
    config = to_config(parser.parse_args())
    folder = Path(config.out)
    if any((folder / name).exists() for name in ("config.json", "checkpoint.pt")):
        raise UserError(f"--out {folder} holds a run; choose another folder for the trace")
    device, dtype = check_run(config)
    with together(device) as rank:
        trainer = make_trainer(config, rank, device, dtype)
        muon.share(trainer.optimizers)                        # as in training
        profiler, seconds, wait = record(trainer, config.steps)
        if rank == 0:
            report(trainer, profiler, seconds, wait)
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / "trace.json") as temporary:
                profiler.export_chrome_trace(str(temporary))
            print(f"{folder / 'trace.json'}: open it at https://ui.perfetto.dev")


if __name__ == "__main__":
    cli(main)
