"""Check that megatron-core reads the .bin and .idx that we write, and we those that it writes.

    python -m bench.megatron_data [PYTHON]      an interpreter with megatron-core; default: the
                                                one that make bench-setup makes

The documents are the pages of docs/.
"""

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.sides import MEGATRON
from configs import DataConfig
from data import TokenFile, prepare_corpus
from data.corpus.megatron import open_dataset
from data.prepare import write_dataset

ROOT = Path(__file__).parent.parent
_WIDE_VOCABULARY = 70_000  # beyond uint16


def main(python: Path) -> int:
    """Write, let the peer read and write, read, and compare document by document."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = DataConfig(
            source="text", path=f"{ROOT}/docs/*.md", vocab_size=1024, cache_directory=str(folder)
        )
        corpus = prepare_corpus(config, 16, 0)
        (tokens,) = corpus.train.parts
        wide = copy.copy(corpus.tokenizer)
        wide.vocab_size = _WIDE_VOCABULARY
        for prefix, tokenizer in (("uint16", corpus.tokenizer), ("int32", wide)):
            write_dataset(folder / prefix, tokens, tokenizer)
        command = [
            str(python),
            "-Wignore",
            "-m",
            "bench.peers.indexed_dataset",
            name,
            "uint16",
            "int32",
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        expected, peers = documents_of(tokens), json.loads((folder / "read.json").read_text())
        for read in peers["documents"].values():
            require_equal(read, expected)
        for prefix in peers["written"]:
            dataset = open_dataset(folder / f"{prefix}.bin", "written by megatron-core")
            read = [dataset.document(i).tolist() for i in range(len(dataset.documents) - 1)]
            require_equal(read, expected)
    sys.stdout.write(
        f"{len(expected)} documents of {tokens.num_tokens:,} tokens are equal both ways: "
        f"megatron-core {peers['version']} read {', '.join(peers['documents'])} and wrote "
        f"{', '.join(peers['written'])}\n"
    )
    return 0


def documents_of(tokens: TokenFile) -> list[list[int]]:
    """Return the tokens of each document."""
    bounds = zip(tokens.document_offsets[:-1], tokens.document_offsets[1:], strict=True)
    return [tokens.span(int(start), int(end)).tolist() for start, end in bounds]


def require_equal(found: list[list[int]], expected: list[list[int]]) -> None:
    """Raise RuntimeError unless all documents are equal."""
    if found != expected:
        raise RuntimeError("megatron-core and we disagree about a dataset")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else MEGATRON.python))
