"""Where the program runs: device and precision, and many devices at once.

    torchrun --nproc_per_node=8 cdslm.py --size medium                     a copy of the model on each device (DDP)
    torchrun --nproc_per_node=8 cdslm.py --size 11b --parallel fsdp        a shard of it on each (FSDP2)

torchrun runs the program once a device; each of these processes is a rank. Nothing here knows of speech.
"""
import contextlib
import ctypes
import datetime
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.nn.functional as F

from corpus import UserError, reason

WITHOUT_BF16 = set("SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split())  # of oneDNN's names


def decide(config):
    """(device, dtype) from what was asked and what the machine has. Raises UserError for a device that isn't there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise UserError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}: here are {torch.cuda.device_count()} GPUs")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()                                  # "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: {reason(error)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                            # TF32
    bf16 = config.dtype == "bf16" or config.dtype == "auto" and multiplies_bf16(device)
    return device, torch.bfloat16 if bf16 else torch.float32


def multiplies_bf16(device):
    """Whether the device multiplies bf16 in hardware. On a CPU the instruction sets in use count as well: torch and
    oneDNN can be told to do without the newer ones, and emulating bf16 is 30 times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return False
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BF16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def ranks():
    """Which of the processes that torchrun started this is, and how many there are; without torchrun 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_division(config, count):
    """Raises UserError if a batch can't be divided over so many devices."""
    if config.batch_size % (count * (config.micro_batch or 1)):
        raise UserError(f"--batch-size {config.batch_size} must divide evenly over {count} devices and forward passes "
                        f"of {config.micro_batch or 1} windows")


def check_launch(config):
    """Raise UserError if the flags don't suit the number of processes that were started."""
    if config.parallel == "fsdp" and "WORLD_SIZE" not in os.environ:
        raise UserError("--parallel fsdp is for many devices: torchrun --nproc_per_node=8 cdslm.py --parallel fsdp ...")
    if config.parallel == "fsdp" and config.optimizer == "muon":
        raise UserError("--parallel fsdp needs --optimizer adamw: Muon updates whole matrices, not shards of them")
    check_division(config, ranks()[1])


@contextlib.contextmanager
def together():
    """Under torchrun, in touch with the other ranks. If one of them is lost, the others soon stop with a UserError."""
    rank, _ = ranks()
    if "WORLD_SIZE" not in os.environ:
        yield rank
        return
    dist.init_process_group(timeout=datetime.timedelta(minutes=30))           # rank 0 may be writing a checkpoint
    sys.stdout = open(os.devnull, "w") if rank else sys.stdout
    try:
        yield rank
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError(f"rank {rank}: another rank stopped, or is out of reach; the last checkpoint is whole, and the "
                        "same command goes on from it") from None
    dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first():
    """What is done within, rank 0 does alone, however long it takes; then the others do it."""
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7)) if dist.is_initialized() else None
    if ranks()[0]:
        dist.barrier(patient)
    yield
    if patient and ranks()[0] == 0:
        dist.barrier(patient)


def shard(model, device, dtype):
    """A copy of a model, in shards over all ranks (FSDP2), with rank 0's weights. Blocks are gathered when they are
    needed, in `dtype`; gradients are averaged and weights updated in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")                 # nothing writes into the model's output
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)      # noise levels stay precise
    with torch.device("meta"):
        sharded = type(model)(model.config)
    for part in [*sharded.blocks, sharded]:
        fully_shard(part, mp_policy=policy, reshard_after_forward=True)
    sharded.to_empty(device=device)
    state_dicts().set_model_state_dict(sharded, {} if ranks()[0] else model.state_dict(), options=from_rank_0())
    return sharded


def from_rank_0():
    """How full state dicts are loaded: rank 0 has them, and hands each rank what it needs."""
    return state_dicts().StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())


def state_dicts():
    """torch's tools for the state dicts of many devices; half a second to import, which --help need not wait for."""
    from torch.distributed.checkpoint import state_dict
    return state_dict


def compiled(network, device):
    """torch.compile it, where a trial shows that this works; elsewhere say why not, and go on without."""
    try:
        torch.compile(F.gelu)(torch.ones(8, device=device))
        return torch.compile(network)
    except Exception as error:  # each platform and compiler has its own
        print(f"--compile does not work here ({reason(error)}); going on without")
        return network


@contextlib.contextmanager
def interruptible():
    """Yields a list that holds the signal's number once Ctrl-C or SIGTERM came; a second one stops at once."""
    came, before = [], {}
    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ahead:
    """work(x), done in a thread of its own while the result before is used: nobody waits for the disk, or for noise."""

    def __init__(self, work):
        self.work, self.thread, self.coming = work, ThreadPoolExecutor(1), {}

    def __call__(self, x, following):
        """work(x); and begin with what will be asked for next."""
        now = self.coming.get(x) or self.thread.submit(self.work, x)
        self.coming = {following: self.thread.submit(self.work, following)}
        return now.result()


def keep_memory():
    """Have Linux's malloc keep what is freed: it would hand large tensors back, to page them in anew at each step. A
    step of `tiny` takes a tenth less so."""
    with contextlib.suppress(OSError, AttributeError):                        # other systems have no glibc
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6").mallopt, -1, -3
        mallopt(trim_threshold, 2 ** 30)
        mallopt(mmap_threshold, 2 ** 30) or mallopt(mmap_threshold, 2 ** 25)  # old ones allow no more than 32 MiB
