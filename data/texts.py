"""Any text as documents to be scored, without a cache: read once, tokenized, and forgotten."""

import itertools
import logging
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from configs.schema import SourceConfig
from data.corpus.files import DATA_KEYS, source_files
from data.corpus.prepare import Corpus
from data.corpus.report import describe_counts
from data.token_file import TokenFile, encoded, token_dtype
from data.tokenizer import Tokenizer

_RECORDS_AT_ONCE = 256  # encoded in one call, on all cores

logger = logging.getLogger("microtron")


def load_eval_corpus(source: SourceConfig, tokenizer: Tokenizer, tokenizer_path: Path) -> Corpus:
    """A corpus in memory whose documents, held out and not, are all those of a source in order.

    Duplicates are among them: a score is of the text as it is. Raises UserError or
    FileNotFoundError where the source cannot be read or has none.
    """
    # Here, not at the top: importing `datasets` takes a second, and training needs no reading.
    from data.corpus.sources import read_records  # noqa: PLC0415

    documents: list[npt.NDArray[np.unsignedinteger]] = []
    document_bytes: list[int] = []
    skipped: Counter[str] = Counter()
    lossy = 0
    dtype = token_dtype(tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        records = read_records(source, DATA_KEYS, source_files(source), Path(scratch))
        while batch := list(itertools.islice(records, _RECORDS_AT_ONCE)):
            skipped.update(record.reason for record in batch if record.reason is not None)
            texts = [text for record in batch for text in record.texts]
            document_bytes += [len(text.encode()) for text in texts]
            documents += (found := list(encoded(texts, tokenizer, dtype)))
            lossy += sum(
                tokenizer.decode(document[1:-1].tolist()) != text
                for document, text in zip(found, texts, strict=True)
            )
    if not documents:
        reasons = describe_counts(skipped)
        raise UserError(
            f"source={source.source} path={source.path!r} yields no documents; skipped: "
            f"{reasons or 'nothing'}; give non-empty UTF-8 text"
        )
    if skipped:
        logger.warning("not scored: %s", describe_counts(skipped))
    offsets = np.cumsum([0, *(len(document) for document in documents)])
    tokens, sizes = np.concatenate(documents), np.array(document_bytes, dtype=np.int64)
    digest = xxhash.xxh3_128()
    for part in (tokens, offsets, sizes):
        digest.update(part.tobytes())
    file = TokenFile(tokens, offsets, sizes)
    unknown = int(np.count_nonzero(tokens == tokenizer.unk_id))
    validation = {"unknown": unknown, "lossy": lossy, "compared": len(documents)}
    summary = {"skipped": dict(skipped), "validation": validation}
    return Corpus(tokenizer, tokenizer_path, file, file, digest.hexdigest(), summary)
