"""Text to batches: sources, tokenizer, token files, rows, sampler and loader.

The package knows no process groups: a rank is an int. What programs need is named here.
"""

from data.corpus.prepare import Corpus, prepare_corpus, text_fingerprint
from data.evaluation import EvaluationSet, evaluation_batches
from data.loader import BatchLoader, StepBatch, rows_of_corpus
from data.mixture import SampleOrder
from data.rows import IGNORED_TARGET, MicroBatch
from data.texts import load_eval_corpus
from data.token_file import TokenFile
from data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "IGNORED_TARGET",
    "BatchLoader",
    "Corpus",
    "EvaluationSet",
    "MicroBatch",
    "SampleOrder",
    "StepBatch",
    "TokenFile",
    "Tokenizer",
    "evaluation_batches",
    "load_eval_corpus",
    "load_tokenizer",
    "prepare_corpus",
    "rows_of_corpus",
    "text_fingerprint",
]
