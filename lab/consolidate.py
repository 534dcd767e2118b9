"""consolidate: checkpoints in shards, and one file from them.

    python -m lab.consolidate out/xl      checkpoint.shards/ -> checkpoint.pt; the trunk alike

With `--parallel fsdp`, each rank writes its own shard with torch.distributed.checkpoint, in a
thread, while training goes on. A run goes on from shards with any number of devices, with or
without FSDP. sample.py and eval_pjsd.py need the one file, and so does cdslm.py without the lab. A
run that ends makes it by itself; this program makes it earlier. It takes a machine with memory for
16 bytes a parameter, but no GPU. As everywhere, a new checkpoint replaces the old one when it is
whole, and the one before is kept.
"""
import contextlib
import functools
import pickle
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as tools
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cdslm import (MMDiT, Parser, UserError, can_go_on, check_room, cli, count, load,
                   make_optimizers, read_config, save)

NAMES = "checkpoint", "checkpoint.previous", "trunk"
# What the index of a checkpoint is made of, besides torch's types of numbers.
IN_AN_INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "bfloat16"},
    "pathlib": {"PosixPath", "WindowsPath"},
}


# --------------------------------------------------------------------------------------------------
# Reading. torch keeps the index of a checkpoint as a pickle, and a pickle may run code.

class Unpickler(pickle.Unpickler):
    """Makes only what an index is made of."""

    def find_class(self, module, name):
        if name not in IN_AN_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """torch's reader of shards; it runs no code that a file may hold."""

    def read_metadata(self, *arguments, **options):
        with open(Path(self.path) / ".metadata", "rb") as file:
            index = Unpickler(file).load()
        for entry in index.state_dict_metadata.values():
            if not isinstance(entry, TensorStorageMetadata):  # torch would unpickle it
                raise pickle.UnpicklingError("an entry is not a tensor")
        return index


def tensors(model, ema, optimizers):
    """State dicts of the tensors of a run, or of this rank's shards of them. They share memory with
    the run: to load them is to set it."""
    return {
        "model": tools.get_model_state_dict(model),
        "ema": tools.get_model_state_dict(ema),
        "optimizer": tools.get_optimizer_state_dict(model, optimizers)["state"],
    }


def read(place, model, ema, optimizers, group=None):
    """Set a run's tensors from a checkpoint in shards, of any number of ranks. All ranks of the
    process group read together. Returns the run's facts: step, steps, skipped. Raises UserError if
    it cannot be read."""
    facts = load(place / "facts.pt")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")      # one process
            dcp.load(tensors(model, ema, optimizers), storage_reader=Reader(place),
                     process_group=group)
        again = load(place / "facts.pt")
    except dcp.CheckpointException:
        raise UserError(f"{place}: damaged, or of another network") from None
    if again["step"] != facts["step"]:
        raise UserError(f"{place}: the run has replaced it while it was read; try again")
    return facts


def fitting(folder, config):
    """The checkpoints in shards from which a run of `config.steps` can go on: [(step, folder)], the
    newest first."""
    found = []
    for place in (folder / f"{name}.shards" for name in NAMES):
        if not place.exists():
            continue
        try:
            facts = load(place / "facts.pt")
        except UserError as error:
            print(f"warning: {error}; trying the one before")
            continue
        if can_go_on(facts, config):
            found.append((facts["step"], place))
    return sorted(found, reverse=True)


def restore(trainer, one_file, found):
    """Trainer.restore for a folder that holds shards, too: `found` is the checkpoint in one file
    that `one_file` would go on from, or None."""
    folder, config = Path(trainer.config.out), trainer.config
    for step, place in fitting(folder, config):
        if found and step <= found["step"]:
            break
        try:
            facts = read(place, trainer.model, trainer.ema, trainer.optimizers)
        except UserError as error:
            print(f"warning: {error}; trying the one before")
            continue
        trainer.done, trainer.skipped = facts["step"], facts["skipped"]
        return
    if found is None and any(folder.glob("*.shards")):
        raise UserError(f"{folder} has no checkpoint that --steps {config.steps} can go on from; "
                        "ask for more steps, or choose another --out")
    one_file(found)


# --------------------------------------------------------------------------------------------------
# Writing.

def swap(new, place):
    """A folder that is whole becomes `place`; the old one is kept as NAME.previous.shards. At every
    moment one of them is there."""
    previous = place.with_suffix(".previous.shards")
    oldest = place.with_name(f".{place.name}.oldest")
    shutil.rmtree(oldest, ignore_errors=True)
    if place.exists():
        if previous.exists():
            previous.rename(oldest)
        place.rename(previous)
    new.rename(place)
    shutil.rmtree(oldest, ignore_errors=True)


class Writer:
    """Saves a trainer's checkpoints in shards. Its thread waits until all ranks have written theirs
    and then puts the new checkpoint in its place."""

    def __init__(self, trainer):
        self.trainer, self.thread, self.writing = trainer, ThreadPoolExecutor(1), None
        # Training exchanges gradients at the same time, over another group.
        self.group = dist.new_group(backend="gloo")
        self.rank_0 = dist.new_group([0], backend="gloo")

    def save(self, path):
        """Copy the shards to the host's memory and begin to write them: NAME.pt -> NAME.shards."""
        self.finish()
        trainer, place = self.trainer, path.with_suffix(".shards")
        trainer.saved = time.monotonic()
        new = place.with_name(f".{place.name}.tmp")
        if trainer.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(exist_ok=True)
            save(new / "facts.pt", step=trainer.done, steps=trainer.config.steps,
                 skipped=trainer.skipped)
        state = tensors(trainer.model, trainer.ema, trainer.optimizers)
        written = dcp.async_save(state, checkpoint_id=new, process_group=self.group)
        self.writing = self.thread.submit(self.complete, written, new, place)

    def complete(self, written, new, place):
        written.result()
        if self.trainer.rank == 0:
            swap(new, place)

    def finish(self):
        """Wait until the last checkpoint is on the disk. Raises UserError if it can't be."""
        if self.writing:
            try:
                self.writing.result()
            except (dcp.CheckpointException, OSError):
                raise UserError(f"{self.trainer.config.out}: the checkpoint could not be written "
                                "(is the disk full?); the old one is kept") from None


@contextlib.contextmanager
def attend(trainer):
    """Around the training loop: it goes on from shards, if the folder has some; FSDP writes shards,
    and at the end of the run rank 0 makes files of them."""
    trainer.restore = functools.partial(restore, trainer, trainer.restore)
    if trainer.config.parallel != "fsdp":
        yield
        return
    writer, folder = Writer(trainer), Path(trainer.config.out)
    trainer.save = writer.save
    yield
    writer.finish()
    if trainer.stopping:
        print(f"to sample from it: python -m lab.consolidate {folder}")
    elif trainer.rank == 0:
        for name in ("trunk", "checkpoint"):
            if consolidate(folder, name, writer.rank_0):
                shutil.rmtree(folder / f"{name}.shards")


# --------------------------------------------------------------------------------------------------
# One file.

def consolidate(folder, name, group=None):
    """NAME.shards -> NAME.pt in a run folder, as `Trainer.save` writes it; one that is as new stays
    as it is. `group` is of this process alone. Returns whether there are such shards."""
    place, path, config = folder / f"{name}.shards", folder / f"{name}.pt", read_config(folder)
    if not place.exists():
        return False
    if path.exists() and load(path, mmap=True)["step"] >= load(place / "facts.pt")["step"]:
        return True
    check_room(path, 16 * count(config)["parameters"], path.name)
    with torch.device("meta"):
        model, ema = MMDiT(config), MMDiT(config)
    model.to_empty(device="cpu")
    ema.to_empty(device="cpu")
    optimizers = make_optimizers(model, config)
    facts = read(place, model, ema, optimizers, group)
    optimizer = tools.get_optimizer_state_dict(model, optimizers)
    save(path, **facts, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer)
    print(f"{path}: step {facts['step']}")
    return True


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    folder = parser.parse_args().run
    read_config(folder)
    if not any([consolidate(folder, name) for name in ("trunk", "checkpoint")]):
        raise UserError(f"{folder}: no checkpoint in shards; --parallel fsdp saves such")


if __name__ == "__main__":
    cli(main)
