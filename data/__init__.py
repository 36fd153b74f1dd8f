"""Text to batches: corpus, tokenizer, token files, rows, sampler and loader.

The package knows no process groups: a rank is an int. The names below are its interface. Those that
need torch are imported when they are first used, because `data.prepare` does without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from data.corpus.prepare import Corpus, prepare_corpus, text_fingerprint
from data.sampler import SampleOrder
from data.segments import CHAT_TEMPLATE
from data.token_file import TokenFile, encode_chat
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from data.evaluation import EvaluationSet, load_eval_corpus
    from data.loader import BatchLoader, StepBatch, rows_of_corpus
    from data.rows import IGNORED_TARGET, MicroBatch
    from data.tasks import TaskResult, TaskSet

__all__ = [
    "CHAT_TEMPLATE",
    "IGNORED_TARGET",
    "BatchLoader",
    "Corpus",
    "EvaluationSet",
    "MicroBatch",
    "SampleOrder",
    "SentencePieceTokenizer",
    "StepBatch",
    "TaskResult",
    "TaskSet",
    "TokenFile",
    "Tokenizer",
    "encode_chat",
    "load_eval_corpus",
    "load_tokenizer",
    "prepare_corpus",
    "rows_of_corpus",
    "text_fingerprint",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module in ("rows", "loader", "evaluation", "tasks") if name in __all__ else ():
            members = vars(importlib.import_module(f"data.{module}"))
            if name in members:
                return members[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
