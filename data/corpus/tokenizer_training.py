"""Training of a lossless sentencepiece tokenizer: every text decodes to itself."""

import io
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sentencepiece

from configs.errors import UserError

# When it changes, raise RECIPE_VERSION in data/cached_corpus.py.
_RECIPE: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n"],
    "split_digits": True,
    "pad_id": -1,
    "num_threads": 8,  # fixed, because it is written into the model file
    "minloglevel": 3,
}
_NUM_FIXED_PIECES = 260  # unknown, bos, eos, newline and 256 bytes
_TRAINING_ATTEMPTS = 3  # the second nearly always has the right number of characters
_MIN_COVERAGE = 0.98  # the least that sentencepiece accepts


def train_tokenizer(sentences: Sequence[str], vocab_size: int) -> bytes:
    """Train the lossless BPE tokenizer and return a model of exactly `vocab_size` pieces.

    Sentences must not contain newlines: the newline is a symbol of its own.
    """
    counts = [count for _, count in Counter("".join(sentences)).most_common()]
    if not counts:
        raise UserError(
            "no tokenizer can be trained: the training text has no characters besides newlines; "
            "use more text, or give data.tokenizer"
        )
    # Characters get at most half of the free pieces; rarer ones are written as bytes.
    num_characters = max(0, vocab_size - _NUM_FIXED_PIECES) // 2
    for attempt in itertools.count(1):
        coverage = sum(counts[:num_characters]) / sum(counts)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=vocab_size,
                character_coverage=max(_MIN_COVERAGE, coverage),
                **_RECIPE,
            )
            break
        except RuntimeError as error:
            found = re.search(r"value <= (\d+)", str(error))
            missing = vocab_size - int(found[1]) if found else 0
            if not missing or attempt == _TRAINING_ATTEMPTS or num_characters >= len(counts):
                raise UserError(_explain(str(error), vocab_size, missing)) from error
            num_characters += missing  # where there are too few merges to learn
    return model.getvalue()


def _explain(message: str, vocab_size: int, missing: int) -> str:
    """Turn sentencepiece's message about the number of pieces into one about our setting."""
    given = f"data.vocab_size={vocab_size}"
    if missing > 0:
        return (
            f"{given} is too large for this corpus, from which at most {vocab_size - missing} "
            f"pieces can be learned; set data.vocab_size={vocab_size - missing} or less, or use "
            "more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"{given} is too small: bytes and the frequent characters of this corpus take "
            f"{smallest[1]} pieces; set data.vocab_size to more than that"
        )
    return f"no tokenizer of {given} pieces could be trained: {message}"
