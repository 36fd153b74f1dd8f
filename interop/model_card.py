"""The README.md of an exported model, from the files of its run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint
from configs import Config, SourceConfig, flatten
from model import num_parameters

_EVALUATION = {
    "eval/loss": "nats per token",
    "eval/perplexity": "perplexity",
    "eval/bits_per_byte": "bits per byte",
}
# Not the paths of the training machine.
_SECTIONS = ("model.", "train.", "optimizer.")
_KEYS = ("run.seed", "data.vocab_size", "data.sequence_mode", "data.inter_document_masking")


def model_card(config: Config, checkpoint: Checkpoint, metrics: Path, architecture: str) -> str:
    """Describe the model, its training data, its quality and how to load it."""
    progress = checkpoint.state["progress"]
    parameters = num_parameters(config.model, config.data.padded_vocab_size)
    training = _training(config, checkpoint.state) + _origin(progress)
    settings = {
        key: value
        for key, value in flatten(config).items()
        if key.startswith(_SECTIONS) or key in _KEYS
    }
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
---

# {config.run.name}

A `{architecture}` of {parameters:,} parameters, {training}

{_evaluation(metrics, progress["step"])}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer({json.dumps(config.evaluate.sample_prompt or "def ")}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

In training, each document began with `tokenizer.bos_token` and ended with `tokenizer.eos_token`.
`tokenizer(text, add_special_tokens=False)` gives the ids in between.

## Training settings

| key | value |
|---|---|
{chr(10).join(f"| `{key}` | {json.dumps(value)} |" for key, value in settings.items())}
"""


def _training(config: Config, state: Mapping[str, Any]) -> str:
    if state["data_fingerprint"] is None:
        source = f" from `{state['imported_from']}`" if "imported_from" in state else ""
        return f"imported{source} with Microtron and not trained further."
    corpus = " and ".join(_corpus(source) for source in config.data.mixture.values())
    progress = state["progress"]
    return (
        f"trained with Microtron: {progress['step']:,} steps,\n{progress['tokens']:,} tokens of "
        f"{corpus}."
    )


def _corpus(source: SourceConfig) -> str:
    if source.path is None:
        return "the Python standard library's source text"
    is_name = source.source == "hub" and not Path(source.path).is_dir()
    name = source.path if is_name else Path(source.path).name
    return f"`{name}` ({source.source})"


def _origin(progress: dict[str, Any]) -> str:
    """The runs whose weights this one began with, the latest first."""
    runs, origin = [], progress.get("origin")
    while origin is not None:
        runs.append(f"`{origin['run']}` (step {origin['step']:,}, {origin['tokens']:,} tokens)")
        origin = origin["origin"]
    chain = ", which began with those of ".join(runs)
    return f"\nIt began with the weights of {chain}." if runs else ""


def _evaluation(metrics: Path, step: int) -> str:
    """The last evaluation up to this step, in words."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    # A kill may have cut off the last line. Non-finite values are null.
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    rows = [row for row in rows if row["step"] <= step and None not in map(row.get, _EVALUATION)]
    if not rows:
        return "It was not evaluated during training."
    last = rows[-1]
    values = ", ".join(f"{last[key]:.4g} {unit}" for key, unit in _EVALUATION.items())
    return f"On held-out documents of the training text, at step {last['step']:,}: {values}."
