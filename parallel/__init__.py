"""Tensor, sequence and data parallelism over a mesh of ranks.

The only package that communicates. It knows nothing about GPT.
"""

from parallel.collectives import (
    any_rank,
    gather_json,
    is_blocking_frame,
    move_to,
    sum_on_host,
    sum_over,
    synchronize,
)
from parallel.context import context_parallel_attention
from parallel.data_parallel import (
    free_gathered_weights,
    set_gradient_sync,
    set_reshard_after_backward,
    shard_over_data_parallel,
)
from parallel.gradients import (
    are_finite,
    clip_gradients,
    squared_norm,
    sum_partial_gradients,
)
from parallel.layers import (
    MergedColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    lookup,
    vocab_parallel_logits,
)
from parallel.loss import Losses, vocab_parallel_loss
from parallel.mappings import gather_vocabulary, sequence_shard
from parallel.mesh import Mesh, close_mesh, init_mesh, wait_for_all_ranks
from parallel.parameters import (
    LocalShard,
    declare_parameter,
    initialise_parameters,
    local_shards,
)
from parallel.pipeline import forward_only, run_pipeline
from parallel.randomness import DropoutStream, dropout_add, fold_seed, row_positions
from parallel.replica_check import compare_replicas
from parallel.transport.backend import is_transport_frame, lost_connection
from parallel.transport.heartbeats import Heartbeats
from parallel.transport.rendezvous import DeviceError, machine_id

__all__ = [
    "DeviceError",
    "DropoutStream",
    "Heartbeats",
    "LocalShard",
    "Losses",
    "MergedColumnParallelLinear",
    "Mesh",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "any_rank",
    "are_finite",
    "clip_gradients",
    "close_mesh",
    "compare_replicas",
    "context_parallel_attention",
    "declare_parameter",
    "dropout_add",
    "fold_seed",
    "forward_only",
    "free_gathered_weights",
    "gather_json",
    "gather_vocabulary",
    "init_mesh",
    "initialise_parameters",
    "is_blocking_frame",
    "is_transport_frame",
    "local_shards",
    "lookup",
    "lost_connection",
    "machine_id",
    "move_to",
    "row_positions",
    "run_pipeline",
    "sequence_shard",
    "set_gradient_sync",
    "set_reshard_after_backward",
    "shard_over_data_parallel",
    "squared_norm",
    "sum_on_host",
    "sum_over",
    "sum_partial_gradients",
    "synchronize",
    "vocab_parallel_logits",
    "vocab_parallel_loss",
    "wait_for_all_ranks",
]
