"""The files of a tokenizer: their kind, size, bos and eos. No torch here.

A tokenizer is a sentencepiece model or, if its name ends in .json, a Hugging Face tokenizer.json.
The latter does not say which tokens are bos and eos: files next to it do, or else the settings.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, bad_setting
from configs.schema import Config

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # in a folder; the first that exists counts
_TOKEN_FILES = ("tokenizer_config.json", "config.json", "generation_config.json")
_MAX_EXAMPLES = 4  # tokens in an error


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer's file, read but not loaded."""

    path: Path
    content: bytes
    vocab_size: int  # the largest id + 1
    # Of a tokenizer.json; a sentencepiece model defines its own bos and eos.
    spec: dict[str, Any] | None = None
    bos_token: str | None = None
    eos_token: str | None = None


def resolve_tokenizer(config: Config) -> Config:
    """Fill in size, bos and eos of `data.tokenizer`; ConfigError if the settings do not fit it."""
    data = config.data
    if data.tokenizer is None:
        _refuse_tokens(config, "data.tokenizer=null: the trained tokenizer defines its own")
        return replace(config, data=replace(data, vocab_size=data.padded_vocab_size))
    path = Path(expand_path("data.tokenizer", data.tokenizer))
    file = read_tokenizer(path, "data.tokenizer", data.bos_token, data.eos_token)
    if file.spec is None:
        _refuse_tokens(config, "a sentencepiece model, which defines its own")
    if data.vocab_size is not None and data.vocab_size < file.vocab_size:
        problem = f"is less than the {file.vocab_size} ids of data.tokenizer={data.tokenizer}"
        fix = f"set data.vocab_size=null, which takes {file.vocab_size}, or a larger number"
        raise bad_setting("data.vocab_size", data.vocab_size, f"{problem}; {fix}")
    data = replace(data, vocab_size=data.vocab_size or file.vocab_size)
    data = replace(data, bos_token=file.bos_token, eos_token=file.eos_token)
    return replace(config, data=data)


def _refuse_tokens(config: Config, why: str) -> None:
    for leaf in ("bos_token", "eos_token"):
        if (token := getattr(config.data, leaf)) is not None:
            key = f"data.{leaf}"
            raise bad_setting(key, token, f"has no effect with {why}; set {key}=null")


def expand_path(key: str, path: str) -> str:
    """Return a path with `~` expanded; refuse one that the locale cannot represent."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        problem = f"is not a valid file name in the locale's encoding {error.encoding}"
        raise bad_setting(key, path, f"{problem}; set PYTHONUTF8=1") from None
    return os.path.expanduser(path)


def find_tokenizer(path: Path, key: str) -> Path:
    """Return the file that a path means, which may be a folder; `key` names the setting."""
    given, fix = f"{key}={path}", "give a sentencepiece model, a tokenizer.json"
    names = [name for name in TOKENIZER_FILES if os.path.isfile(path / name)]
    if os.path.isdir(path) and not names:
        found = f"is a folder without {' and '.join(TOKENIZER_FILES)}"
        raise ConfigError(f"{given} {found}; {fix}, or a folder with one of them")
    file = path / names[0] if names else path
    if not os.path.isfile(file):  # False for a name that is too long, where Path raises
        raise ConfigError(f"{given} does not exist; {fix}, or a folder with one of them")
    if not os.access(file, os.R_OK):
        raise ConfigError(f"{given}: {file} may not be read by this user; change its permissions")
    return file


def read_tokenizer(
    path: Path, key: str, bos_token: str | None = None, eos_token: str | None = None
) -> TokenizerFile:
    """Read a file, or that of a folder; ConfigError if it is damaged, or bos or eos is unknown.

    A given bos or eos must not differ from what the files next to a tokenizer.json say.
    """
    file = find_tokenizer(path, key)
    content, origin = file.read_bytes(), f"{key}={file}"
    if file.suffix != ".json":
        return TokenizerFile(file, content, load_sentencepiece(content, origin).get_piece_size())
    try:
        spec = json.loads(content)
        vocabulary = spec["model"]["vocab"]
        if isinstance(vocabulary, list):  # of a unigram model: pairs of a piece and its score
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        added = spec.get("added_tokens") or []
        ids = vocabulary | {token["content"]: token["id"] for token in added}
        vocab_size = max(ids.values()) + 1
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{origin} is not a readable tokenizer.json") from error
    tokens = []
    for name, given in (("bos", bos_token), ("eos", eos_token)):
        setting = f"{key.removesuffix('tokenizer')}{name}_token"
        beside, says = _token_beside(file, name, ids)
        if beside is not None and given not in (None, beside):
            fix = f"set {setting}=null to use {beside}, or change the file"
            raise ConfigError(f"{setting}={given}, but {says} says {name} is {beside}; {fix}")
        found = beside or given
        if found is None or found not in ids:
            examples = ", ".join([token["content"] for token in added][:_MAX_EXAMPLES])
            hint = f"; its added tokens are {examples}" if added else ""
            problem = f"{origin} has no token {found!r}"
            if not found:
                files = f"{', '.join(_TOKEN_FILES)} next to it say which token is {name}"
                problem = f"neither {origin} nor {files}"
            raise ConfigError(f"{problem}; set {setting} to one of its tokens{hint}")
        tokens.append(found)
    return TokenizerFile(file, content, vocab_size, spec, *tokens)


def load_sentencepiece(content: bytes, origin: str) -> Any:
    """Return the processor of a sentencepiece model; ConfigError if it cannot be used."""
    import sentencepiece  # noqa: PLC0415  most launches that only check settings do not need it

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise ConfigError(f"{origin} is not a readable sentencepiece model") from error
    if processor.get_piece_size() == 0:  # sentencepiece accepts an empty file
        raise ConfigError(f"{origin} is not a readable sentencepiece model: it has no pieces")
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise ConfigError(
            f"{origin} has bos_id={processor.bos_id()} and eos_id={processor.eos_id()}; both must "
            "be defined, since documents begin with bos and end with eos"
        )
    return processor


def _token_beside(
    file: Path, name: str, ids: dict[str, int]
) -> tuple[str, Path] | tuple[None, None]:
    """Return bos or eos by the first file next to a tokenizer.json that has it, and that file."""
    tokens = {i: token for token, i in ids.items()}
    for beside in (file.with_name(other) for other in _TOKEN_FILES):
        try:
            options = json.loads(beside.read_bytes()) if beside.is_file() else {}
            token, token_id = options.get(f"{name}_token"), options.get(f"{name}_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{beside} is not a JSON object: {error}") from error
        token = token.get("content") if isinstance(token, dict) else token
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if isinstance(token, str) and token in ids:
            return token, beside
        if isinstance(token_id, int) and token_id in tokens:
            return tokens[token_id], beside
    return None, None
