"""A sentencepiece tokenizer as a Hugging Face tokenizer.json, with the same ids for every text.

[Note: spaces in pieces]
sentencepiece writes a space as U+2581 inside its pieces, so most conversions turn a U+2581 in a
text into a space. Here pieces contain spaces. No piece contains U+2581, so like any rare character
it is encoded as bytes, which is what `SentencePieceTokenizer` does too.

[Note: merges]
sentencepiece merges the two neighbours whose joint piece has the highest score; tokenizers merges
by a list of pairs. So the list has every way to split a piece in two, ordered by score.

[Note: control pieces]
sentencepiece encodes `<s>` in a text as three characters. `split_special_tokens` tells transformers
to do the same, unless there is a chat template.
"""

from typing import Any

from tokenizers import Tokenizer as Backend

from configs.errors import UserError
from data import SentencePieceTokenizer, Tokenizer
from data.corpus.encoding import encode_chat
from data.corpus.segments import chat_prompt

_BLOCK = "\u2581"
_CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Bye"},
]


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of tokenizer.json.

    Raises UserError naming the properties of the sentencepiece model that tokenizers lacks.
    """
    model = _parse(tokenizer)
    _refuse_unsupported(model)
    kinds, spec = type(model.pieces[0]), model.normalizer_spec
    added = [
        {
            "id": index,
            "content": _with_spaces(piece.piece),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type != kinds.USER_DEFINED,
        }
        for index, piece in enumerate(model.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        or (piece.type == kinds.USER_DEFINED and len(piece.piece) > 1)
    ]
    normalizers = _normalizers(spec, tokenizer.can_cut)
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.trainer_spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {_with_spaces(piece.piece): i for i, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def tokenizer_config(
    tokenizer: Tokenizer, seq_length: int, chat_template: str | None = None
) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    unknown = {} if tokenizer.unk_token is None else {"unk_token": tokenizer.unk_token}
    chat = {} if chat_template is None else {"chat_template": chat_template}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        **unknown,
        **chat,
        "split_special_tokens": chat_template is None,  # a template writes bos and eos as text
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_length,
    }


def encodes_chats_alike(tokenizer: Tokenizer, spec: bytes) -> bool:
    """Whether a conversation that tokenizer.json encodes as a whole has the tokens of training.

    It does not if the tokenizer puts a space before each text, and so before each message.
    """
    backend = Backend.from_str(spec.decode())
    backend.no_truncation()
    backend.no_padding()
    rendered = tokenizer.bos_token + "".join(
        text + tokenizer.eos_token * (number % 2) for number, text in enumerate(chat_prompt(_CHAT))
    )
    ids: list[int] = backend.encode(rendered, add_special_tokens=False).ids
    return ids == encode_chat(_CHAT, tokenizer)


def _parse(tokenizer: SentencePieceTokenizer) -> Any:
    # Not at the top: it registers messages for the whole process.
    from sentencepiece import sentencepiece_model_pb2 as messages  # noqa: PLC0415

    parsed: Any = vars(messages)["ModelProto"].FromString(tokenizer.content)
    return parsed


def _with_spaces(piece: str) -> str:
    return piece.replace(_BLOCK, " ")


def _refuse_unsupported(model: Any) -> None:
    trainer, spec = model.trainer_spec, model.normalizer_spec
    kinds = type(model.pieces[0])
    characters = {piece.piece for piece in model.pieces if len(piece.piece) == 1}
    normal = [piece.piece for piece in model.pieces if piece.type == kinds.NORMAL]
    changes_spaces = spec.add_dummy_prefix or spec.remove_extra_whitespaces
    texts = [_with_spaces(piece.piece) for piece in model.pieces]
    problems = {
        "its model_type is not bpe": trainer.model_type != type(trainer).BPE,
        f"it normalises texts ({spec.name})": bool(spec.precompiled_charsmap),
        "it puts spaces at the ends of pieces": trainer.treat_whitespace_as_suffix,
        "it does not escape spaces": not spec.escape_whitespaces,
        "it has unused pieces": any(p.type == kinds.UNUSED for p in model.pieces),
        "it has user_defined_symbols and changes the spaces around them": changes_spaces
        and any(p.type == kinds.USER_DEFINED and len(p.piece) > 1 for p in model.pieces),
        "some characters of its pieces are not pieces": not characters.issuperset("".join(normal)),
        "two of its pieces differ only in U+2581": len(set(texts)) < len(texts),
    }
    if found := [problem for problem, is_found in problems.items() if is_found]:
        raise UserError(
            "Hugging Face's tokenizers cannot reproduce the ids of this sentencepiece model: "
            f"{', '.join(found)}"
        )


def _normalizers(spec: Any, can_cut: bool) -> list[dict[str, Any]]:
    """Changes to spaces before encoding, in the order of sentencepiece."""

    def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    normalizers = []
    if spec.remove_extra_whitespaces:
        normalizers += [replaced({"Regex": r"\A +"}, ""), replaced({"Regex": " {2,}"}, " ")]
    if not can_cut:  # otherwise the tokenizer distinguishes U+2581 from a space
        normalizers.append(replaced({"String": _BLOCK}, " "))
    if spec.remove_extra_whitespaces:
        normalizers.append(replaced({"Regex": r" +\z"}, ""))
    if spec.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": " "})
    return normalizers


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every pair of pieces that forms a piece, best first; see [Note: merges]."""
    kinds = type(model.pieces[0])
    normal = [piece for piece in model.pieces if piece.type == kinds.NORMAL]
    known = {_with_spaces(piece.piece) for piece in normal}
    merges = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = _with_spaces(piece.piece)
        cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
        merges += [(left, right) for left, right in cuts if left in known and right in known]
    return merges
