"""Text to batches: corpus, tokenizer, token files, rows, sampler and loader.

The package knows no process groups: a rank is an int. The names below need no torch, because
`data.prepare` does without it; `rows`, `loader`, `evaluation` and `tasks` do.
"""

from data.corpus.prepare import Corpus as Corpus
from data.corpus.prepare import prepare_corpus as prepare_corpus
from data.corpus.prepare import text_fingerprint as text_fingerprint
from data.sampler import SampleOrder as SampleOrder
from data.segments import CHAT_TEMPLATE as CHAT_TEMPLATE
from data.token_file import TokenFile as TokenFile
from data.token_file import encode_chat as encode_chat
from data.tokenizer import SentencePieceTokenizer as SentencePieceTokenizer
from data.tokenizer import Tokenizer as Tokenizer
from data.tokenizer import load_tokenizer as load_tokenizer
