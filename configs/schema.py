"""Every setting: its key, type, range, default and help text.

The comment next to a field, or above it, is its help text. Names are Megatron-LM's where it has
one. Values that follow from several settings are properties here; `configs/validate.py` checks how
settings fit together.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

MAX_STEP = 99_999_999  # checkpoint folders have eight digits
_MAX_HANG_TIMEOUT_S = 1500  # collectives time out after 1800
_TRAINED_VOCAB_SIZE = 8192
_SWIGLU_MULTIPLE = 64  # divides over up to 64 tensor-parallel ranks

# The keys of the columns that a record has, by data.format.
COLUMNS = {
    "text": ("text_field",),
    "prompt_completion": ("prompt_field", "completion_field"),
    "messages": ("messages_field",),
}
# Renamed keys, old to new; the old name still works and logs a warning.
RENAMED = {
    "train.max_skipped_in_a_row": "train.max_consecutive_skips",
    "train.loss_spike_nats": "train.loss_spike_threshold_nats",
}
# Keys and values of earlier versions, ignored with a warning.
REMOVED = ("parallel.dp_comm_overlap",)
REMOVED_VALUES = {"parallel.tp_comm_overlap": "both"}


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; an open end is excluded."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.open_low else 'at least'} {self.low}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Steps = Annotated[int, Range(0, MAX_STEP)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, open_high=True)]
Prompt = Annotated[str, "may be empty"]


@dataclass(frozen=True)
class RunConfig:
    """Name and folder of the run, its seed, and how it starts and stops."""

    name: str | None = None  # Name of the run's folder; null: the config file's name without .yaml
    directory: str = "runs"  # Folder that holds the run folders
    # Seed of the initial weights, dropout masks, sample order and sampled text.
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1234
    # Whether to resume from the newest checkpoint; must: fail without one; never: start over.
    resume: Literal["auto", "never", "must"] = "auto"
    # Save and stop after this step; a later launch can resume. null: stop at train.train_steps.
    stop_at_step: Annotated[int, Range(1, MAX_STEP)] | None = None
    # Run folder, or one of its checkpoint directories, whose weights, model and tokenizer a new run
    # starts with; schedule, steps, tokens and sample order start anew. null: random weights.
    init_from: str | None = None
    # With init_from: also load the optimizer's moments and number of updates.
    init_optimizer: bool = False
    # After this many seconds without progress on any rank, name the stuck rank, write all stack
    # traces to the run folder and stop with exit code 75 (checkpoint files: ten times as long).
    # 0: no hang detection.
    hang_timeout_s: Annotated[float, Range(0, _MAX_HANG_TIMEOUT_S)] = 480.0

    @property
    def file_timeout_s(self) -> float:
        """Seconds that one wait for a checkpoint file may take."""
        return 10 * self.hang_timeout_s


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the GPT."""

    num_layers: Count = 12  # Number of transformer blocks
    hidden_size: Count = 768  # Channels of the residual stream
    num_attention_heads: Count = 12  # Number of query heads
    num_query_groups: Count | None = None  # Key-value heads (GQA); null: as many as query heads
    kv_channels: Count | None = None  # Channels per head; null: hidden_size / num_attention_heads
    # Channels inside the MLP; null: 4 x hidden_size, or 8/3 for swiglu, rounded up to 64.
    ffn_hidden_size: Count | None = None
    seq_length: Count = 1024  # Tokens per sequence (context length)
    hidden_dropout: Fraction = 0.0  # Dropout rate after the embedding, attention and MLP
    # Dropout rate of attention probabilities; the masks, and so the loss, depend on the layout.
    attention_dropout: Fraction = 0.0
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"  # Type of norm
    norm_epsilon: Positive = 1e-5  # Added to the variance in norms
    # MLP activation: exact GELU, its tanh approximation (as in GPT-2), or SwiGLU.
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    # Type of position embedding: a learned table, or rotary (RoPE).
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    rotary_base: Annotated[float, Range(1)] = 10000.0  # RoPE base (theta)
    # Fraction of each head's channels that RoPE rotates, from the first one on.
    rotary_percent: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    # llama3: divide low RoPE frequencies by rope_scaling_factor, as Llama 3.1 does; null: none.
    rope_scaling_type: Literal["llama3"] | None = None
    # Low frequencies are divided by it; Llama 3.1: 8, Llama 3.2: 32.
    rope_scaling_factor: Annotated[float, Range(1)] = 8.0
    # Scale frequencies with fewer than this many turns in rope_original_max_position fully.
    rope_low_freq_factor: Positive = 1.0
    # Keep frequencies with more than this many turns; in between, interpolate.
    rope_high_freq_factor: Positive = 4.0
    rope_original_max_position: Count = 8192  # Context length before the scaling
    add_bias_linear: bool = True  # Add biases to all linear layers
    add_qkv_bias: bool = False  # Add biases to queries, keys and values even without the others
    qk_layernorm: bool = False  # Normalize queries and keys per head, before RoPE
    untie_embeddings_and_output_weights: bool = False  # Separate weights for the output layer
    init_method_std: Positive = 0.02  # Standard deviation of initial matrices and embeddings
    use_scaled_init_method: bool = True  # Residual projections: std / sqrt(2 layers)

    @property
    def head_dim(self) -> int:
        """Channels per attention head, `d`."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def attention_size(self) -> int:
        """Channels of all query heads, `a d`; equal to `h` unless `kv_channels` says otherwise."""
        return self.num_attention_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels per attention head that RoPE rotates."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def num_groups(self) -> int:
        """Number of key-value heads, `g`; each serves a/g query heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Channels inside the MLP, `f`."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            # Three matrices of 8/3 h have as many weights as two of 4 h (Shazeer 2020).
            return -(-8 * self.hidden_size // (3 * _SWIGLU_MULTIPLE)) * _SWIGLU_MULTIPLE
        return 4 * self.hidden_size

    @property
    def has_chains(self) -> bool:
        """Whether the model has chains of pointwise operations that train.compile can fuse."""
        return (
            self.hidden_dropout > 0
            or self.normalization == "RMSNorm"
            or self.position_embedding_type == "rope"
            or self.activation == "swiglu"
        )


Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of model and batch over the ranks; data parallelism uses the remaining ranks."""

    tensor_model_parallel_size: Count = 1  # Number of ranks that share each layer (TP)
    # Copies of weights and optimizer state over the data-parallel ranks (HSDP): FSDP2 shards within
    # each group of neighbouring ranks, such as those of a host, and sums gradients across groups.
    data_parallel_replicate_size: Count = 1
    sequence_parallel: bool = True  # Split norms and dropout over the sequence among TP ranks
    context_parallel_size: Count = 1  # Number of ranks that share each sequence (CP)
    # How CP ranks exchange keys and values: gather them, or pass them around a ring (less memory).
    cp_comm_type: Literal["all_gather", "p2p"] = "all_gather"
    # Number of stages that split the layers (PP), each on its own ranks; schedule: 1F1B.
    pipeline_model_parallel_size: Count = 1
    # Chunks of layers per stage, for the interleaved schedule: a smaller bubble, more messages.
    # null: one.
    virtual_pipeline_model_parallel_size: Count | None = None
    # Overlap TP communication with matmuls in backward. none: no overlap; gathered inputs are then
    # kept for backward.
    tp_comm_overlap: Literal["none", "backward"] = "backward"
    # CPU only: ranks on one host communicate through shared memory instead of gloo sockets.
    shared_memory: bool = True
    # Activation checkpointing. selective: recompute norms and activation functions (nearly free);
    # full: store only the input of each layer (a third more matmul work).
    recompute_granularity: Recompute = "none"
    # Reduce gradients over data-parallel ranks per step (faster) or per micro_batch (less memory).
    gradient_sync: Literal["step", "micro_batch"] = "step"
    # Free the weights gathered over data-parallel ranks after each layer's forward and backward.
    # false: gather them once per step and keep them, 2 bytes per parameter in bf16; faster. In a
    # pipeline always false.
    reshard_after_forward: bool = True

    @property
    def ranks_per_replica(self) -> int:
        """Number of ranks that share one micro-batch: PP x CP x TP."""
        return (
            self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.tensor_model_parallel_size
        )

    @property
    def smallest_world_size(self) -> int:
        """Number of ranks that the layout needs, of which the world size is a multiple."""
        return self.ranks_per_replica * self.data_parallel_replicate_size


@dataclass(frozen=True)
class SourceConfig:
    """Where the text comes from."""

    # Kind of source; python_stdlib is the source code of Python's standard library.
    # megatron: tokens in PREFIX.bin and PREFIX.idx, by data.tokenizer.
    source: Literal["python_stdlib", "text", "jsonl", "parquet", "arrow", "megatron", "hub"] = (
        "python_stdlib"
    )
    # File, folder, glob, prefix (megatron) or hub dataset; null only for python_stdlib.
    path: str | None = None
    text_field: str = "text"  # Column that holds the text, in jsonl, parquet, arrow and hub rows
    # Kind of records. In prompt_completion only completions are targets; in messages, which are
    # conversations, only the turns of the assistant. Both need jsonl, parquet, arrow or hub rows.
    format: Literal["text", "prompt_completion", "messages"] = "text"
    prompt_field: str = "prompt"  # Column that holds the prompt, with format=prompt_completion
    # Column that holds the completion, with format=prompt_completion.
    completion_field: str = "completion"
    # Column that holds the list of messages, each with role and content, with format=messages.
    messages_field: str = "messages"
    hub_config: str | None = None  # Configuration of the hub dataset; null: its default
    hub_split: str = "train"  # Split of the hub dataset
    # Branch, tag or commit of the hub dataset; null: the newest when first read into this cache.
    hub_revision: str | None = None
    # Validation text (file, folder, glob or hub dataset, same format), never trained on; replaces
    # validation_fraction. null: hold out part of the source.
    validation_path: str | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a record consists of, by their keys."""
        return {key: getattr(self, key) for key in COLUMNS[self.format]}


@dataclass(frozen=True)
class WeightedSource(SourceConfig):
    """One source of a mixture."""

    # Relative weight: the source supplies weight / (sum of weights) of the training sequences.
    weight: Annotated[float, Range(0, 1e9, open_low=True)] = 1.0


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Where the text comes from, and how it becomes sequences of tokens."""

    # A mixture instead of one source: [{source: text, path: a.txt, weight: 3}, {...}], where weight
    # (default 1) is the relative number of sequences.
    sources: tuple[WeightedSource, ...] = ()
    # Sentencepiece model, Hugging Face tokenizer.json, or a folder with one of them; null: train a
    # tokenizer on the source.
    tokenizer: str | None = None
    # First token of each document, where neither tokenizer_config.json nor config.json next to a
    # tokenizer.json says it. Sentencepiece models define their own.
    bos_token: str | None = None
    # Last token of each document, where those files do not say it; may equal bos.
    eos_token: str | None = None
    # Rows of the embedding; more than the tokenizer has are unused. null: the size of the
    # tokenizer, 8192 if one is trained.
    vocab_size: Annotated[int, Range(1, 2**31)] | None = None
    # Fill each sequence with several documents (pack), or pad each document to one (pad).
    sequence_mode: Literal["pack", "pad"] = "pack"
    # With pack: cut concatenated documents (stream), or split only documents longer than a sequence
    # (best_fit), at the cost of a little padding. null: stream, but best_fit if data.format is not
    # text.
    packing: Literal["stream", "best_fit"] | None = None
    # With pack: restart attention and positions at each document. null: false, but true if
    # data.format is not text.
    inter_document_masking: bool | None = None
    # Fraction of documents held out for evaluation; of the bytes, if there are few documents.
    validation_fraction: Fraction = 0.01
    cache_directory: str = "~/.cache/microtron"  # Folder for tokenized text and trained tokenizers

    def __post_init__(self) -> None:
        """Replace null in packing and inter_document_masking."""
        needed = self.has_partial_targets and self.sequence_mode == "pack"
        if self.packing is None:
            object.__setattr__(self, "packing", "best_fit" if needed else "stream")
        if self.inter_document_masking is None:
            object.__setattr__(self, "inter_document_masking", needed)

    @property
    def has_partial_targets(self) -> bool:
        """Whether only some tokens of a source are targets."""
        return any(source.format != "text" for source in self.mixture.values())

    @property
    def masks_documents(self) -> bool:
        """Whether attention stays inside documents; in mode pad a row holds only one."""
        return bool(self.inter_document_masking) and self.sequence_mode == "pack"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding. Loading a configuration replaces null by the tokenizer's size."""
        assert self.vocab_size is not None or self.tokenizer is None, "resolve_tokenizer sets it"
        return self.vocab_size or _TRAINED_VOCAB_SIZE

    @property
    def mixture(self) -> dict[str, WeightedSource]:
        """All sources by the prefix of their keys: `data`, or `data.sources[i]` for a mixture."""
        if self.sources:
            return {f"data.sources[{i}]": source for i, source in enumerate(self.sources)}
        single = {field.name: getattr(self, field.name) for field in fields(SourceConfig)}
        return {"data": WeightedSource(**single)}


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batch sizes, numerics and hardware."""

    train_steps: Steps = 1000  # Number of optimizer steps; with time_limit_s: the maximum
    # Seconds for all training steps, compilation included, evaluations and saves excluded. When it
    # begins, the run times a few steps, and sets train_steps to the number that fits; a resume
    # keeps that number on any layout. null: no limit.
    time_limit_s: Positive | None = None
    global_batch_size: Count = 32  # Sequences per step, over all ranks
    micro_batch_size: Count = 8  # Sequences per forward and backward pass of one data-parallel rank
    # Weight of the z-loss, mean(logsumexp(logits)^2) (PaLM: 1e-4); train/loss excludes it.
    z_loss_coeff: NonNegative = 0.0
    # Skip up to this many consecutive steps with a non-finite loss or gradient norm, then roll back
    # to the newest checkpoint and skip the samples seen since.
    max_consecutive_skips: CountOrZero = 5
    max_rollbacks: CountOrZero = 2  # Rollbacks to the same checkpoint before exit code 5
    # Also skip a step whose loss is this many nats above the median of the last 32; null: never.
    loss_spike_threshold_nats: Positive | None = None
    precision: Literal["bf16", "fp32"] = "bf16"  # Precision of compute; weights are in float32
    # Device of all ranks; auto: one GPU per rank if there are any GPUs, else CPUs.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    # CPU threads per rank; null: from SLURM_CPUS_PER_TASK or OMP_NUM_THREADS, else cores / ranks.
    num_threads: Count | None = None
    # Fuse pointwise operations with torch.compile; the first start takes up to a minute longer.
    compile: bool = True


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, the learning rate schedule, and gradient clipping."""

    # muon: for the matrices of attention and MLP, with AdamW for all other weights.
    name: Literal["adamw", "muon"] = "adamw"
    lr: NonNegative = 6e-4  # Peak learning rate
    # Peak learning rate of Muon, scaled by sqrt(max(1, rows / columns)) of each matrix, on the
    # schedule of lr. null: lr, scaled by 0.2 sqrt(max(rows, columns)): updates as large as AdamW's.
    muon_lr: Positive | None = None
    muon_momentum: Fraction = 0.95  # Decay rate of Muon's momentum (Nesterov)
    muon_num_ns_steps: Count = 5  # Newton-Schulz iterations of Muon
    min_lr: NonNegative | None = None  # Learning rate at the end of the decay; null: lr / 10
    # Shape of the decay after warmup; WSD: constant, then linear at the end.
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    lr_warmup_steps: CountOrZero = 0  # Steps of linear warmup from 0 to lr
    lr_wsd_decay_steps: Count | None = None  # Steps of WSD's final decay; null: train_steps / 10
    weight_decay: NonNegative = 0.1  # Of matrices and embeddings; norms and biases have none
    adam_beta1: Fraction = 0.9  # Decay rate of the first moment
    adam_beta2: Fraction = 0.95  # Decay rate of the second moment
    adam_eps: Positive = 1e-8  # Added to the denominator of the update
    clip_grad: NonNegative = 1.0  # Maximum global gradient norm; 0: no clipping

    @property
    def final_lr(self) -> float:
        """The learning rate at the end of the decay."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on held-out documents during training, and a text sample."""

    interval: CountOrZero = 250  # Steps between evaluations, plus one at the end; 0: never
    max_sequences: Count = 128  # Maximum number of held-out sequences; documents are not cut
    # Multiple-choice files to score as well, JSON lines with context, choices and answer; see
    # docs/data.md.
    tasks: tuple[str, ...] = ()
    sample_tokens: CountOrZero = 128  # Tokens to generate at each evaluation; 0: no sample
    # Prompt of the sample, without trailing space; null: the beginning of a held-out document.
    sample_prompt: Prompt | None = None
    sample_temperature: NonNegative = 0.7  # Sampling temperature; 0: greedy


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many checkpoints to keep."""

    save_interval: CountOrZero = 250  # Steps between saves; 0: only at the end and on a signal
    keep: CountOrZero = 2  # Number of newest checkpoints to keep; 0: all
    max_failed_saves: Count = 2  # Exit with code 1 after this many consecutive failed saves
    async_save: bool = True  # Write in the background, if memory allows a copy of the state


@dataclass(frozen=True)
class LoggingConfig:
    """Console, profiler and Weights & Biases; metrics.jsonl always has every step."""

    log_interval: Count = 1  # Steps between console lines
    # First and last step to trace with torch.profiler, into profile/ of the run; null: none.
    profile_steps: tuple[int, int] | None = None
    # Weights & Biases mode. offline: write to the run folder; auto: online if an API key is set.
    wandb: Literal["auto", "online", "offline", "disabled"] = "offline"
    wandb_project: str = "microtron"  # Weights & Biases project


@dataclass(frozen=True)
class DebugConfig:
    """Checks for hardware faults and bugs."""

    # Steps between checks that replicas are equal (by hash) on all ranks; 0: only at the start.
    audit_interval: CountOrZero = 100
    # Use deterministic GPU kernels, so that a run repeats bit for bit; slower. CPUs always do.
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
