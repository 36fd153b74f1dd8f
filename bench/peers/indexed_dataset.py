"""The part of `bench.megatron_data` that runs megatron-core's IndexedDataset.

Reads the given prefixes of a folder, writes their documents again in other dtypes, half of them in
two sequences, and leaves what it read in read.json.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core import __version__
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

_DTYPES = {"int16": np.int16, "int32": np.int32, "int64": np.int64, "uint16": np.uint16}


def main(folder: Path, prefixes: list[str]) -> int:
    """Read and write."""
    read = {}
    for prefix in prefixes:
        dataset = IndexedDataset(str(folder / prefix))
        bounds = dataset.document_indices.tolist()
        read[prefix] = [
            np.concatenate([dataset[i] for i in range(start, end)]).tolist()
            for start, end in itertools.pairwise(bounds)
        ]
    written = []
    for name, dtype in _DTYPES.items():
        prefix = f"theirs-{name}"
        builder = IndexedDatasetBuilder(str(folder / f"{prefix}.bin"), dtype=dtype)
        for number, document in enumerate(read[prefixes[0]]):
            cut = len(document) // 2 if number % 2 else 0
            lengths = [cut, len(document) - cut] if cut else [len(document)]
            builder.add_document(torch.tensor(document), lengths)
        builder.finalize(str(folder / f"{prefix}.idx"))
        written.append(prefix)
    found = {"version": __version__, "documents": read, "written": written}
    (folder / "read.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
