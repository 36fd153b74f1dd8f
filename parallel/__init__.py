"""Tensor, sequence, context, pipeline and data parallelism over a mesh of ranks.

The only package that communicates. It knows nothing about GPT.
"""

from parallel.collectives import any_rank as any_rank
from parallel.collectives import gather_json as gather_json
from parallel.collectives import is_blocking_frame as is_blocking_frame
from parallel.collectives import move_to as move_to
from parallel.collectives import sum_on_host as sum_on_host
from parallel.collectives import sum_over as sum_over
from parallel.collectives import synchronize as synchronize
from parallel.context import context_parallel_attention as context_parallel_attention
from parallel.data_parallel import free_gathered_weights as free_gathered_weights
from parallel.data_parallel import set_gradient_sync as set_gradient_sync
from parallel.data_parallel import set_reshard_after_backward as set_reshard_after_backward
from parallel.data_parallel import shard_over_data_parallel as shard_over_data_parallel
from parallel.gradients import are_finite as are_finite
from parallel.gradients import clip_gradients as clip_gradients
from parallel.gradients import local_gradients as local_gradients
from parallel.gradients import squared_norm as squared_norm
from parallel.gradients import sum_partial_gradients as sum_partial_gradients
from parallel.layers import MergedColumnParallelLinear as MergedColumnParallelLinear
from parallel.layers import RowParallelLinear as RowParallelLinear
from parallel.layers import VocabParallelEmbedding as VocabParallelEmbedding
from parallel.layers import lookup as lookup
from parallel.layers import vocab_parallel_logits as vocab_parallel_logits
from parallel.loss import Losses as Losses
from parallel.loss import vocab_parallel_loss as vocab_parallel_loss
from parallel.mappings import gather_vocabulary as gather_vocabulary
from parallel.mappings import sequence_shard as sequence_shard
from parallel.mesh import Mesh as Mesh
from parallel.mesh import close_mesh as close_mesh
from parallel.mesh import init_mesh as init_mesh
from parallel.mesh import wait_for_all_ranks as wait_for_all_ranks
from parallel.parameters import LocalShard as LocalShard
from parallel.parameters import declarations as declarations
from parallel.parameters import declare_parameter as declare_parameter
from parallel.parameters import initialise_parameters as initialise_parameters
from parallel.parameters import local_shards as local_shards
from parallel.pipeline import forward_only as forward_only
from parallel.pipeline import max_alive as max_alive
from parallel.pipeline import run_pipeline as run_pipeline
from parallel.randomness import DropoutStream as DropoutStream
from parallel.randomness import dropout_add as dropout_add
from parallel.randomness import fold_seed as fold_seed
from parallel.randomness import prepare_masks as prepare_masks
from parallel.replica_check import compare_replicas as compare_replicas
from parallel.transport.backend import is_transport_frame as is_transport_frame
from parallel.transport.backend import lost_connection as lost_connection
from parallel.transport.heartbeats import Heartbeats as Heartbeats
from parallel.transport.rendezvous import DeviceError as DeviceError
from parallel.transport.rendezvous import machine_id as machine_id
from parallel.whole_matrices import WholeMatrices as WholeMatrices
