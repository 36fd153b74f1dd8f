"""The one page of settings: every key, its type, its default and its unit.

Defaults < `config=NAME.yaml` < `section.key=value` on the command line. The dataclasses are frozen,
so a run cannot change its own configuration. Facts that follow from several keys are properties
here, so that no second place works them out. What is allowed is checked in `configs/validate.py`.

Names are Megatron-LM's where Megatron-LM has one. Nothing here imports torch.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

_SWIGLU_MULTIPLE = 64  # divides over up to 64 tensor-parallel ranks


@dataclass(frozen=True)
class RunConfig:
    """Which run this is: its folder, its seed, and how it starts and ends."""

    name: str | None = None  # folder below `directory`; null: the stem of the config file
    directory: str = "runs"
    seed: int = 1234  # decides initial weights, dropout masks and the order of samples
    resume: Literal["auto", "never", "must"] = "auto"
    stop_at_step: int | None = None  # save and end this launch there; null: at train.train_steps
    # Seconds during training in which no rank makes progress: then the stuck rank is named, its
    # stack traces are written to the run folder, and the run ends with exit code 75; 0: no watch.
    # Reading and writing checkpoints may take ten times as long.
    hang_timeout_s: float = 480.0

    @property
    def file_timeout_s(self) -> float:
        """The limit of one wait for a file of a checkpoint: flushing a large one is no hang."""
        return 10 * self.hang_timeout_s


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the GPT."""

    num_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    num_query_groups: int | None = None  # key-value heads (GQA); null: as many as attention heads
    ffn_hidden_size: int | None = None  # null: 4 x hidden_size; swiglu: 8/3, up to a multiple of 64
    seq_length: int = 1024  # positions in a row, also the rows of a learned position table
    hidden_dropout: float = 0.0  # after the embedding, the attention projection and the MLP
    attention_dropout: float = 0.0  # on attention probabilities; depends on the layout
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    norm_epsilon: float = 1e-5
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"  # exact, GPT-2's form, gated
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    rotary_base: float = 10000.0  # of rope: pair i of d/2 turns once in 2 pi base^(2 i / d) tokens
    add_bias_linear: bool = True  # biases of all linear layers
    qk_layernorm: bool = False  # normalise each head's query and key, before rope
    untie_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02  # of all matrices and embeddings
    use_scaled_init_method: bool = True  # residual projections: divided by sqrt(2 x num_layers)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, `d = h / a`."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_groups(self) -> int:
        """Key-value heads, `g`; each serves a/g query heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Channels inside the MLP, `f`."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            # Three matrices of 8/3 h have the weights of two of 4 h (Shazeer 2020).
            return -(-8 * self.hidden_size // (3 * _SWIGLU_MULTIPLE)) * _SWIGLU_MULTIPLE
        return 4 * self.hidden_size

    @property
    def has_chains(self) -> bool:
        """Whether there are chains of operations on single elements for train.compile to fuse."""
        return (
            self.hidden_dropout > 0
            or self.normalization == "RMSNorm"
            or self.position_embedding_type == "rope"
            or self.activation == "swiglu"
        )


Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """How one model and one batch are spread over the ranks; data parallel size is what remains."""

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = True  # split norms and dropout over the sequence; no effect at size 1
    # When a tp rank sends under a product of a linear layer: where backward allows it, or of both
    # directions in pieces (for slow wires); none: never, and it keeps gathered inputs.
    tp_comm_overlap: Literal["none", "backward", "both"] = "backward"
    # Gather weights and (with gradient_sync=step) sum gradients over dp under the work of other
    # layers. GPUs always do; with shared_memory there is nothing to hide.
    dp_comm_overlap: bool = True
    # On processors, ranks of one host meet in memory that they share, not through gloo's sockets.
    shared_memory: bool = True
    # What backward makes again: selective, the outputs of norms and activations (nearly free);
    # full, all but the inputs of layers (a third more products).
    recompute_granularity: Recompute = "none"
    # When gradients are reduced over dp: once a step (least traffic), or after every micro-batch
    # (least memory: no unsharded float32 gradients are kept).
    gradient_sync: Literal["step", "micro_batch"] = "step"


@dataclass(frozen=True)
class SourceConfig:
    """Where text comes from."""

    source: Literal["python_stdlib", "text", "jsonl", "parquet", "arrow", "hub"] = "python_stdlib"
    path: str | None = None  # file, folder, glob or hub name; null only for python_stdlib
    text_field: str = "text"  # the column of jsonl, parquet, arrow and hub rows that holds the text
    hub_config: str | None = None  # configuration name of a hub dataset
    hub_split: str = "train"
    hub_revision: str | None = None
    # Held-out text in the same format, a file, folder, glob or hub name; documents that are in it
    # are not trained on, and validation_fraction has no effect. null: hold out part of the source.
    validation_path: str | None = None


@dataclass(frozen=True)
class WeightedSource(SourceConfig):
    """One source of a mixture."""

    weight: float = 1.0  # its share of the rows of training is weight / sum of weights


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Where text comes from and how it becomes rows of tokens."""

    # A mixture in place of one source: [{source: text, path: a.txt, weight: 3}, {...}]. A mapping
    # has the keys above, without data., and weight (default 1), a source's share of the rows.
    sources: tuple[WeightedSource, ...] = ()
    tokenizer: str | None = None  # a sentencepiece model file; null: train one on the source
    vocab_size: int = 8192  # rows of the embedding; a trained tokenizer has as many pieces
    sequence_mode: Literal["pack", "pad"] = "pack"
    # Of pack: stream cuts rows from documents laid end to end; best_fit splits only documents
    # longer than a row, and leaves a few slots empty.
    packing: Literal["stream", "best_fit"] = "stream"
    # Of pack: attention and positions stay inside each document (in pad they always do). Attention
    # then takes a mask, [s, s] for each row, where else it knows to be causal.
    inter_document_masking: bool = False
    # Share of documents held out for evaluation; of a single document, or of a few large ones, the
    # share of bytes at the end.
    validation_fraction: float = 0.01
    cache_directory: str = "~/.cache/microtron"

    @property
    def mixture(self) -> dict[str, WeightedSource]:
        """All sources, by what their keys begin with; one if only the single keys are given."""
        if self.sources:
            return {f"data.sources[{number}]": one for number, one in enumerate(self.sources)}
        single = {field.name: getattr(self, field.name) for field in fields(SourceConfig)}
        return {"data": WeightedSource(**single)}


@dataclass(frozen=True)
class TrainConfig:
    """How long and in which pieces; batch sizes are in sequences."""

    train_steps: int = 1000  # updates of the weights
    global_batch_size: int = 32  # sequences a step over all ranks
    micro_batch_size: int = 8  # sequences in one forward and backward of one data-parallel rank
    # Times the mean square of log sum exp of the logits, added to the loss; keeps logits from
    # drifting (PaLM: 1e-4). train/loss in the logs is without it.
    z_loss_coeff: float = 0.0
    # Steps whose loss or gradient norm is not finite are left out, so many in a row; one more, and
    # the run goes back to its newest checkpoint and passes over the samples since.
    max_skipped_in_a_row: int = 5
    max_rollbacks: int = 2  # to one checkpoint; one more ends the run with exit code 5
    # A loss so many nats above the median of the last 32 counts as not finite; null: none does.
    loss_spike_nats: float | None = None
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16: bfloat16 compute, float32 master weights
    # auto: GPUs if there are any, and then each rank needs one of its own.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    # Make one kernel each of dropout with its residual, RMSNorm, rotary positions and SwiGLU, with
    # torch.compile: up to a minute at the first start on a machine, seconds later on.
    compile: bool = True


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and gradient clipping."""

    lr: float = 6e-4  # peak learning rate
    min_lr: float | None = None  # learning rate at the end of the decay; null: a tenth of lr
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    lr_warmup_steps: int = 0
    lr_wsd_decay_steps: int | None = None  # of WSD's final decay; null: a tenth of train_steps
    weight_decay: float = 0.1  # on matrices and embeddings; never on norms and biases
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0  # largest global gradient norm; 0: no clipping

    @property
    def final_lr(self) -> float:
        """The learning rate at the end of the decay."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on held-out documents, and a text sample, while training."""

    interval: int = 250  # steps between evaluations; there is one at the end too; 0: none at all
    max_sequences: int = 128  # rows of held-out text at most; whole documents are taken
    sample_tokens: int = 128  # tokens of text written at each evaluation; 0: no sample
    sample_prompt: str = "def __init__(self"  # no space at its end: pieces begin with theirs
    sample_temperature: float = 0.7  # 0: always the likeliest token


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many checkpoints to keep."""

    save_interval: int = 250  # steps; there is a save at the end and on a signal too; 0: only those
    keep: int = 2  # newest checkpoints kept; 0: all
    max_failed_saves: int = 2  # so many failures in a row end the run with exit code 1
    async_save: bool = True  # train on while a copy is written, where there is memory for the copy


@dataclass(frozen=True)
class LoggingConfig:
    """What a person sees while it runs; metrics.jsonl gets every step whatever is set here."""

    log_interval: int = 1  # steps between console lines
    # First and last step of which every rank writes a trace of torch.profiler to profile/, and
    # rank 0 says where the time went; null: none.
    profile_steps: tuple[int, int] | None = None
    # offline: kept in the run folder; auto: online if there is a key.
    wandb: Literal["auto", "online", "offline", "disabled"] = "offline"
    wandb_project: str = "microtron"


@dataclass(frozen=True)
class DebugConfig:
    """Checks on the run itself."""

    # Steps between comparisons, by hash, of what ranks should hold alike (norms and their moments
    # over tp, gathered weights over dp); there is one at the start always; 0: only that.
    audit_interval: int = 100
    # On a GPU: kernels that add in a fixed order, so that a run repeats to the bit; slower. On a
    # processor all do.
    deterministic: bool = False


@dataclass(frozen=True)
class Config:
    """All sections."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
