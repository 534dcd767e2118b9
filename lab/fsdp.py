"""fsdp: what `--parallel fsdp` adds to cdslm.py: a shard of the model on each device (FSDP2).

    torchrun --nproc_per_node=8 cdslm.py --parallel fsdp --optimizer adamw ...

Its optimiser is AdamW: Muon updates whole matrices, not shards of them. Its checkpoints are in
shards, too: `lab/consolidate.py`.
"""
import contextlib
import warnings

import torch
from torch.distributed.checkpoint import state_dict as tools
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from cdslm import MMDiT, ranks


def shards(config, autoencoder, device, dtype):
    """The model of a run and its EMA, in shards over all ranks, with the weights that rank 0 has
    initialised. Both begin alike."""
    with torch.device("meta" if ranks()[0] else "cpu"):
        model = MMDiT(config)
    model.silence.copy_(autoencoder.silence())
    return shard(model, device, dtype), shard(model, device, dtype)


def shard(model, device, dtype):
    """A copy of a model, in shards over all ranks, with rank 0's weights. Blocks are gathered when
    they are needed, in `dtype`; gradients are averaged and weights updated in float32."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module") # nothing writes into its output
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    with torch.device("meta"):
        sharded = type(model)(model.config)
    for part in [*sharded.blocks, sharded]:
        fully_shard(part, mp_policy=policy, reshard_after_forward=True)
    sharded.to_empty(device=device)
    weights = {} if ranks()[0] else model.state_dict()
    options = tools.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    tools.set_model_state_dict(sharded, weights, options=options)

    @contextlib.contextmanager
    def no_sync():
        """As of DDP: gradients are not exchanged after the backward pass."""
        sharded.set_requires_gradient_sync(False)
        yield
        sharded.set_requires_gradient_sync(True)

    sharded.no_sync = no_sync
    return sharded
