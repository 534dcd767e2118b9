"""muon: under DDP each rank orthogonalises its share of the matrices, and all gather the whole.

All ranks hold the same gradients, so without this each would do the same work. Training calls it by
itself (`lab/process.py`); nobody needs to run it. Under FSDP2 Muon is refused (`cdslm.py`).
"""
import torch
import torch.distributed as dist

from cdslm import Muon, orthogonalize


def orthogonalize_shared(matrices, dtype):
    """As `cdslm.orthogonalize`, for matrices (N, rows, columns) that are the same on all ranks. A
    rank computes about N / ranks of them."""
    share = -(-len(matrices) // dist.get_world_size())
    first = dist.get_rank() * share
    mine = matrices[first:first + share]

    # All shares have the same size; where the last ones are short, what follows is left out.
    updates = torch.zeros(share, *matrices.shape[1:], dtype=dtype, device=matrices.device)
    if len(mine):
        updates[:len(mine)] = orthogonalize(mine, dtype)
    whole = [torch.empty_like(updates) for _ in range(dist.get_world_size())]
    dist.all_gather(whole, updates)
    return torch.cat(whole)[:len(matrices)]


def share(optimizers):
    """Have Muon, if it is among the optimisers, share its work between the ranks, if there are
    some."""
    for optimizer in optimizers:
        if dist.is_initialized() and isinstance(optimizer, Muon):
            optimizer.orthogonalize = orthogonalize_shared
