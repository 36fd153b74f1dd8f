"""A Hugging Face model in a folder: its config.json, and where its tensors are.

Reads JSON and safetensors only: no code of the model is run and nothing is unpickled.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError
from configs.tokenizer_files import TOKENIZER_FILES
from data.corpus.hub import requests_to_hub

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_SHOWN = 3  # names in an error
_FLOATS = ("F32", "BF16", "F16")
# A model that was saved without its head lacks these at the start of its names.
_PREFIXES = ("transformer.", "model.")
# Masks and rotary frequencies, which older files contain besides the weights.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Source:
    """A folder whose config.json and tensor names have been read."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]  # by the names of the tensors in the files

    def read(self, name: str) -> Tensor:
        """Read a full tensor in the precision of the file."""
        stored = self._stored_name(name)
        # Opened per tensor: what has been read of a mapped file counts as memory while it is open.
        with safe_open(self.files[stored], "pt") as file:
            return file.get_tensor(stored)

    def require(self, shapes: Mapping[str, tuple[int, ...]], *, ignored: str | None) -> None:
        """Raise UserError unless the folder has exactly these tensors, besides `ignored`."""
        if missing := [name for name in shapes if self._stored_name(name) not in self.files]:
            raise UserError(f"{self.folder} lacks the tensors {_first(missing)}")
        for name, shape in shapes.items():
            stored = self._stored_name(name)
            with safe_open(self.files[stored], "pt") as file:
                tensor = file.get_slice(stored)
                if tensor.get_shape() != list(shape):
                    raise UserError(
                        f"{self.folder}: {name} has shape {tensor.get_shape()}; "
                        f"its config.json implies {list(shape)}"
                    )
                if tensor.get_dtype() not in _FLOATS:
                    raise UserError(
                        f"{self.folder}: {name} is {tensor.get_dtype()}, not one of "
                        f"{', '.join(_FLOATS)}; use the unquantized weights"
                    )
        used = {self._stored_name(name) for name in shapes} | {ignored}
        if unknown := [n for n in self.files if n not in used and not n.endswith(_BUFFERS)]:
            raise UserError(f"{self.folder} has {_first(unknown)}, which this model does not have")

    def _stored_name(self, name: str) -> str:
        for prefix in _PREFIXES:
            if name not in self.files and name.startswith(prefix):
                return name.removeprefix(prefix)
        return name


def open_source(folder: Path) -> Source:
    """Open a local folder; raises UserError if files are missing or invalid."""
    config = _read_json(folder / "config.json")
    return Source(folder, config, dict(_tensor_files(folder)))


def download(name: str, revision: str | None) -> Path:
    """Download a model of the hub into its cache; returns the folder."""
    names = ["config.json", "generation_config.json", "tokenizer_config.json", *TOKENIZER_FILES]
    patterns = [_SINGLE, _INDEX, "model-*.safetensors", *names]
    with requests_to_hub(f"source={name} is not a folder, and"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    if (folder / _SINGLE).is_file():  # which transformers also takes if there are both
        names = {_SINGLE}
    elif (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / _INDEX} has no weight_map")
        names = set(weight_map.values())
    else:
        hint = "give a folder with safetensors files"
        if pickled := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
            hint = f"{pickled[0]} is a pickle, which is not read because it can run code; "
            hint += "save the model again with transformers, which writes safetensors"
        raise UserError(f"{folder} has no {_SINGLE} and no {_INDEX}; {hint}")
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / _INDEX} names {name!r}, which is not a file beside it")
        try:
            with safe_open(folder / name, "pt") as file:
                yield from ((tensor, folder / name) for tensor in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; give the folder of a model")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
