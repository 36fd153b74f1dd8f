"""Text to batches: corpus, tokenizer, token files, rows, sampler and loader.

The package knows no process groups: a rank is an int. `data/corpus/` makes tokens of text, in a
process of its own; training does not import it. The names below need no torch, because
`data.prepare` does without it; `rows`, `loader`, `evaluation` and `tasks` do.
"""

from data.cached_corpus import Corpus as Corpus
from data.cached_corpus import find_text as find_text
from data.cached_corpus import prepare_corpus as prepare_corpus
from data.sampler import SampleOrder as SampleOrder
from data.token_file import TokenFile as TokenFile
from data.tokenizer import SentencePieceTokenizer as SentencePieceTokenizer
from data.tokenizer import Tokenizer as Tokenizer
from data.tokenizer import load_tokenizer as load_tokenizer
