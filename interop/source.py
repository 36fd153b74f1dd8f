"""A model of Hugging Face as it lies in a folder: its config.json, and where its tensors are.

Nothing of it is run and nothing is unpickled: JSON, safetensors and a sentencepiece model are read.
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
from data.corpus.hub import requests_to_hub

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 3  # names in an error
_FLOATS = ("F32", "BF16", "F16")
# A model saved without its head leaves out what its names begin with.
_PREFIXES = ("transformer.", "model.")
# What older files hold besides weights: masks and angles.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Source:
    """A folder whose config.json has been read and whose files are there."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]  # of each tensor, by the name that the file has for it

    def read(self, name: str) -> Tensor:
        """One tensor in full, in the precision of the file."""
        stored = self._stored(name)
        # Opened for each tensor: what has been read of a mapped file is memory while any is in use.
        with safe_open(self.files[stored], "pt") as file:
            return file.get_tensor(stored)

    def require(self, shapes: Mapping[str, tuple[int, ...]], *, ignored: str | None) -> None:
        """Raise ValueError unless the tensors of these names and shapes are all that is there.

        Besides `ignored`, and what is no weight.
        """
        if missing := [name for name in shapes if self._stored(name) not in self.files]:
            raise UserError(f"{self.folder} has no tensor {_listed(missing)}")
        for name, shape in shapes.items():
            stored = self._stored(name)
            with safe_open(self.files[stored], "pt") as file:
                found = file.get_slice(stored)
                if (theirs := tuple(found.get_shape())) != tuple(shape):
                    raise UserError(
                        f"{self.folder}: {name} is {list(theirs)}, which its config.json makes "
                        f"{list(shape)}"
                    )
                if found.get_dtype() not in _FLOATS:
                    raise UserError(
                        f"{self.folder}: {name} is {found.get_dtype()}, not one of "
                        f"{', '.join(_FLOATS)}; give the weights before they were quantised"
                    )
        used = {self._stored(name) for name in shapes} | {ignored}
        if unknown := [n for n in self.files if n not in used and not n.endswith(_BUFFERS)]:
            raise UserError(f"{self.folder} has {_listed(unknown)}, for which ours has no place")

    def _stored(self, name: str) -> str:
        """What the files call a tensor of the whole model."""
        for prefix in _PREFIXES:
            if name not in self.files and name.startswith(prefix):
                return name.removeprefix(prefix)
        return name


def open_source(folder: Path) -> Source:
    """A local folder; raises UserError saying what is missing or cannot be read."""
    config = _read_json(folder / "config.json")
    files = dict(_tensor_files(folder))
    return Source(folder, config, files)


def download(name: str, revision: str | None) -> Path:
    """The folder of a model of the hub, in its cache; raises UserError if it cannot be had."""
    patterns = [_SINGLE, _INDEX, "model-*.safetensors", "config.json", "tokenizer.model"]
    with requests_to_hub(f"source={name} is no folder here, and"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    if (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / _INDEX} has no weight_map")
        names = set(weight_map.values())
    elif (folder / _SINGLE).is_file():
        names = {_SINGLE}
    else:
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = (
            f"{pickled[0]} is a pickle, which can run code and is not read; save it again with "
            "transformers, which writes safetensors"
            if pickled
            else "give a folder with safetensors"
        )
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
        raise UserError(f"{path} is not a mapping")
    return content


def _listed(names: list[str]) -> str:
    beyond = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {beyond} more" if beyond > 0 else "")
