"""A text to score with evaluate.py: read into memory, without a cache."""

import itertools
import logging
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import xxhash

from configs.errors import UserError
from configs.schema import SourceConfig
from data.cached_corpus import Corpus
from data.corpus.encoding import encode_segments, is_lossy
from data.corpus.report import describe_counts, no_documents
from data.corpus.segments import from_document, target_bytes
from data.corpus.sources import read_records
from data.packing import Int64Array
from data.source_files import SourceKeys, source_files
from data.token_file import Targets, TokenArray, TokenFile, token_dtype
from data.tokenizer import Tokenizer

_KEYS = SourceKeys("", "path")  # the settings of evaluate.py have no sections
_BATCH_RECORDS = 256  # encoded in one call, on all cores

logger = logging.getLogger("microtron")


def load_eval_corpus(source: SourceConfig, tokenizer: Tokenizer, tokenizer_path: Path) -> Corpus:
    """Read a source into memory, without a cache, as a corpus with all its documents held out.

    Duplicates stay: the score is that of the text as it is. Raise UserError or FileNotFoundError
    if the source cannot be read or has no documents.
    """
    documents: list[TokenArray] = []
    document_bytes: list[int] = []
    bounds: list[Int64Array] = []
    skipped: Counter[str] = Counter()
    lossy = num_tokens = 0
    has_targets = source.format != "text"
    dtype = token_dtype(tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        records = read_records(source, _KEYS, source_files(source, _KEYS), Path(scratch))
        while batch := list(itertools.islice(records, _BATCH_RECORDS)):
            skipped.update(record.reason for record in batch if record.reason is not None)
            texts = [text for record in batch for text in record.texts]
            of_batch = [from_document(t) if has_targets else ["", t] for t in texts]
            encoded = encode_segments(of_batch, tokenizer, dtype)
            for segments, (document, ends) in zip(of_batch, encoded, strict=True):
                lossy += is_lossy(document, ends, segments, tokenizer)
                bounds.append(ends + num_tokens)
                num_tokens += len(document)
                documents.append(document)
                document_bytes.append(target_bytes(segments))
    if not documents:
        raise UserError(
            f"source={source.source} path={source.path!r} {no_documents(source, skipped)}"
        )
    if skipped:
        logger.warning("not scored: %s", describe_counts(skipped))
    tokens = np.concatenate(documents)
    offsets = np.cumsum([0, *(len(document) for document in documents)])
    targets = Targets(np.concatenate(bounds)) if has_targets else None
    num_bytes = np.array(document_bytes, dtype=np.int64)
    file = TokenFile(tokens, offsets, num_bytes, targets=targets)
    digest = xxhash.xxh3_128()
    for part in (tokens, offsets, num_bytes, *([targets.bounds] if targets else [])):
        digest.update(part.tobytes())
    unknown = int(np.count_nonzero(tokens == tokenizer.unk_id))
    validation = {"unknown": unknown, "lossy": lossy, "compared": len(documents)}
    summary = {"skipped": dict(skipped), "validation": validation}
    return Corpus(tokenizer, tokenizer_path, file, file, digest.hexdigest(), summary)
