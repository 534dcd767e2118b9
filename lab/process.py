"""process: how the programs live with the system around them.

They go on although nobody reads what they print: the reader of a pipe may go away (`| head`), the
terminal may be closed, know only ASCII, or never have been there. They keep the memory that they
free; without this the sampler is slower by a third. And a run in training that is asked to stop
first finishes its step. The ranks of a run are compared: speech, decoder, and the weights of DDP.
"""
import contextlib
import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from cdslm import UserError, ranks
from lab import muon

# Relative difference of weights between ranks: kinds of GPU differ in the order of their sums.
DRIFT = 1e-4


class Unbreakable:
    """A text stream whose reader may go away, or that was never there: writing then does nothing.
    Characters that the terminal lacks are escaped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            encoding = self.stream.encoding or "utf-8"
            return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError, AttributeError):
            return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def keep_memory():
    """Have Linux's malloc keep what is freed instead of returning it to the system, from where it
    would be fetched anew at each step."""
    with contextlib.suppress(OSError, AttributeError):        # other systems have no glibc
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6").mallopt, -1, -3
        mallopt(trim_threshold, 2 ** 30)
        if not mallopt(mmap_threshold, 2 ** 30):
            mallopt(mmap_threshold, 2 ** 25)                  # the most that old versions allow


def prepare():
    """Make the output streams of this process unbreakable, and keep its memory."""
    keep_memory()
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)


@contextlib.contextmanager
def interruptible(signals):
    """Ctrl-C, SIGTERM and SIGUSR1 (of a batch system) are noted in `signals`; the training loop
    then saves a checkpoint and ends. A second one stops at once, but not under a launcher: torchrun
    may send the same signal twice."""
    launched = dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ
    if threading.current_thread() is not threading.main_thread():
        yield                                                 # no other thread gets signals
        return

    def note(number, frame):
        signals.append(number)
        if len(signals) > 1 and not launched:
            raise KeyboardInterrupt(number)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_alike(trainer):
    """Raise UserError unless all ranks have the same speech and decoder, as on a shared disk, and
    go on from the same step."""
    weights = [tensor.cpu().double().sum().item()             # of one kind of processor
               for tensor in trainer.autoencoder.state_dict().values()]
    found = [None] * ranks()[1]
    dist.all_gather_object(found, (trainer.corpus.contents, trainer.done, *weights))
    if len(set(found)) > 1:
        raise UserError("the ranks see different speech, another autoencoder.pt or another "
                        "checkpoint; put --data, --out and CDSLM_CACHE on a disk that all nodes "
                        "share")


@torch.no_grad()
def check_replicas(model, ema):
    """Raise UserError unless all ranks of DDP hold the same weights. Only gradients are exchanged,
    so a difference would never go away."""
    weights, exact = [*model.parameters(), *ema.parameters()], torch.float64
    sums = [weight.sum(dtype=exact) for weight in weights]
    norms = [torch.linalg.vector_norm(weight, dtype=exact) for weight in weights]
    mine = torch.stack([*sums, *norms]).tolist()
    found = [None] * ranks()[1]
    dist.all_gather_object(found, mine)

    differ, sums, norms = [], found[0][:len(weights)], found[0][len(weights):]
    for rank, others in enumerate(found):
        close = [abs(a - b) <= DRIFT * norm for a, b, norm in zip(others, sums, norms)]
        if not all(close):                                    # also where a sum is not a number
            differ.append(rank)
    if len(differ) > len(found) / 2:                          # the others agree: it is rank 0
        differ = [0]
    if differ:
        names = " and ".join(f"rank {rank}" for rank in differ)
        raise UserError(f"the weights of {names} differ from those of the other ranks; the same "
                        "command goes on from the last checkpoint, where they are equal")


def watch_replicas(trainer):
    """Have a DDP run compare its copies of the weights before each validation."""
    validate = trainer.validate

    def checked(*arguments):
        check_replicas(trainer.model, trainer.ema)
        return validate(*arguments)

    trainer.validate = checked


def watch_beginning(trainer):
    """Have the ranks compare what they begin with, or go on from."""
    restore = trainer.restore

    def checked(found):
        restore(found)
        check_alike(trainer)

    trainer.restore = checked


def sharded_checkpoints(trainer):
    """The context of a run with checkpoints in shards, if it is to write or may have to read
    them."""
    folder = Path(trainer.config.out)
    if trainer.config.parallel != "fsdp" and not any(folder.glob("*.shards")):
        return contextlib.nullcontext()
    from lab import consolidate                               # slow to import
    return consolidate.attend(trainer)


@contextlib.contextmanager
def attend(trainer):
    """Around the training loop: signals are noted, all ranks are alike and stay so, they share the
    work of Muon, and checkpoints may be in shards."""
    with interruptible(trainer.signals), sharded_checkpoints(trainer):
        if dist.is_initialized():
            watch_beginning(trainer)
            if trainer.config.parallel == "ddp":
                watch_replicas(trainer)
        muon.share(trainer.optimizers)
        yield
