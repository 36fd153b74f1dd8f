"""A sentencepiece tokenizer as Hugging Face's tokenizer.json, with the same ids for every text.

[Note: pieces with spaces]
sentencepiece has U+2581 for a space inside its pieces. In most translations a U+2581 in a text
then becomes a space. Here pieces have spaces, and U+2581, which no piece has, falls apart into its
bytes as any rare character does; that is what `Tokenizer` makes of it.

[Note: merges]
sentencepiece joins the two neighbours whose joint piece has the highest score. tokenizers goes by a
list of pairs, so each way to cut a piece in two pieces is on it, in the order of the scores.

[Note: control pieces]
In sentencepiece `<s>` in a text is three characters. `split_special_tokens` says so to
transformers.
"""

from typing import Any

from configs.errors import UserError
from data.tokenizer import Tokenizer

_BLOCK = "\u2581"


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json.

    Raises UserError naming what of the sentencepiece model tokenizers has no equivalent for.
    """
    model = _parsed(tokenizer)
    _refuse(model)
    kinds, spec = type(model.pieces[0]), model.normalizer_spec
    vocab = {_spaced(piece.piece): index for index, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise UserError("two pieces of this sentencepiece model are the same but for U+2581")
    added = [
        _added_token(index, piece.piece, is_special=piece.type != kinds.USER_DEFINED)
        for index, piece in enumerate(model.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        or (piece.type == kinds.USER_DEFINED and len(piece.piece) > 1)
    ]
    normalizers = _normalizers(spec, tokenizer.can_cut)
    dummy = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *(dummy if spec.add_dummy_prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.trainer_spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(model),
        },
    }


def tokenizer_config(tokenizer: Tokenizer, seq_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json: how transformers is to use it. No bos is put before."""
    pieces = _parsed(tokenizer).pieces
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[tokenizer.bos_id].piece,
        "eos_token": pieces[tokenizer.eos_id].piece,
        "unk_token": next(piece.piece for piece in pieces if piece.type == type(piece).UNKNOWN),
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_length,
    }


def _parsed(tokenizer: Tokenizer) -> Any:
    # Here, not at the top: it registers messages for the whole process, and training needs none.
    from sentencepiece import sentencepiece_model_pb2 as messages  # noqa: PLC0415

    parsed: Any = vars(messages)["ModelProto"].FromString(tokenizer.model)
    return parsed


def _spaced(piece: str) -> str:
    return piece.replace(_BLOCK, " ")


def _added_token(index: int, content: str, *, is_special: bool) -> dict[str, Any]:
    return {
        "id": index,
        "content": _spaced(content),
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def _refuse(model: Any) -> None:
    trainer, spec = model.trainer_spec, model.normalizer_spec
    kinds = type(model.pieces[0])
    characters = {piece.piece for piece in model.pieces if len(piece.piece) == 1}
    normal = [piece.piece for piece in model.pieces if piece.type == kinds.NORMAL]
    changes_spaces = spec.add_dummy_prefix or spec.remove_extra_whitespaces
    problems = {
        "it is not of model_type=bpe": trainer.model_type != type(trainer).BPE,
        f"it normalises texts ({spec.name})": bool(spec.precompiled_charsmap),
        "it puts spaces at the ends of pieces": trainer.treat_whitespace_as_suffix,
        "it keeps spaces as they are": not spec.escape_whitespaces,
        "some of its pieces are unused": any(p.type == kinds.UNUSED for p in model.pieces),
        "it has user_defined_symbols and changes the spaces around them": changes_spaces
        and any(p.type == kinds.USER_DEFINED and len(p.piece) > 1 for p in model.pieces),
        "some characters of its pieces are no pieces": not characters.issuperset("".join(normal)),
    }
    found = [problem for problem, is_found in problems.items() if is_found]
    if found:
        raise UserError(
            "Hugging Face's tokenizers cannot give the ids of this sentencepiece model: "
            f"{', '.join(found)}"
        )


def _normalizers(spec: Any, can_cut: bool) -> list[dict[str, Any]]:
    """What happens to spaces before pieces are looked for, in sentencepiece's order."""

    def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    normalizers = []
    if spec.remove_extra_whitespaces:
        normalizers += [replaced({"Regex": r"\A +"}, ""), replaced({"Regex": " {2,}"}, " ")]
    if not can_cut:  # only where texts may be cut does `Tokenizer` tell U+2581 and a space apart
        normalizers.append(replaced({"String": _BLOCK}, " "))
    if spec.remove_extra_whitespaces:
        normalizers.append(replaced({"Regex": r" +\z"}, ""))
    if spec.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": " "})
    return normalizers


def _merges(model: Any) -> list[tuple[str, str]]:
    """Each way to make a piece of two, best first; see [Note: merges]."""
    kinds = type(model.pieces[0])
    normal = [piece for piece in model.pieces if piece.type == kinds.NORMAL]
    known = {_spaced(piece.piece) for piece in normal}
    merges = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = _spaced(piece.piece)
        cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
        merges += [(left, right) for left, right in cuts if left in known and right in known]
    return merges
