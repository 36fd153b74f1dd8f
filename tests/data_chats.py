"""Fifty conversations with their targets, written by hand, and a tokenizer of one token per byte.

Notation: ^ is bos, $ is eos, | is a newline, every other character is a token (é is two), and
braces enclose targets.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

SEQ_LENGTH = 64  # of the third column
# Messages, all tokens, and what remains of a document of more than 65 tokens.
CHATS: list[tuple[list[str], str] | tuple[list[str], str, str]] = [
    # One turn.
    (["u:Hi", "a:Yo"], "^[user]|Hi|[assistant]|{Yo$}"),
    (["u:Hi", "a:Yo."], "^[user]|Hi|[assistant]|{Yo.$}"),
    (["u:Hi!", "a:Yo"], "^[user]|Hi!|[assistant]|{Yo$}"),
    (["u:2+2?", "a:4"], "^[user]|2+2?|[assistant]|{4$}"),
    (["u:Name?", "a:Bo"], "^[user]|Name?|[assistant]|{Bo$}"),
    (["u:Sky?", "a:Blue"], "^[user]|Sky?|[assistant]|{Blue$}"),
    (["u:Count", "a:1 2 3 4 5"], "^[user]|Count|[assistant]|{1 2 3 4 5$}"),
    (["u:Café?", "a:Olé"], "^[user]|Café?|[assistant]|{Olé$}"),
    (["u:Smile", "a:😀"], "^[user]|Smile|[assistant]|{😀$}"),
    (["u:a\nb", "a:c\n\nd\n"], "^[user]|a|b|[assistant]|{c||d|$}"),
    (["u: x ", "a: y "], "^[user]| x |[assistant]|{ y $}"),
    (["u:Tab", "a:\t"], "^[user]|Tab|[assistant]|{\t$}"),
    (["u:Say [user]", "a:[user]"], "^[user]|Say [user]|[assistant]|{[user]$}"),
    (["u:[assistant]", "a:No"], "^[user]|[assistant]|[assistant]|{No$}"),
    (["u:End </s>?", "a:<s></s>"], "^[user]|End </s>?|[assistant]|{<s></s>$}"),
    (["u:One letter", "a:Z"], "^[user]|One letter|[assistant]|{Z$}"),
    # Instructions.
    (["s:Be brief.", "u:Hi", "a:Yo"], "^[system]|Be brief.|[user]|Hi|[assistant]|{Yo$}"),
    (["s:Rhyme.", "u:Cat", "a:Hat"], "^[system]|Rhyme.|[user]|Cat|[assistant]|{Hat$}"),
    (["s:Rhyme.", "u:Dog", "a:Log"], "^[system]|Rhyme.|[user]|Dog|[assistant]|{Log$}"),
    (["s:Greet.", "a:Hello"], "^[system]|Greet.|[assistant]|{Hello$}"),
    (["u:Hi", "s:Be rude.", "a:No"], "^[user]|Hi|[system]|Be rude.|[assistant]|{No$}"),
    # Several turns.
    (
        ["u:Hi", "a:Yo", "u:Ok", "a:Bye"],
        "^[user]|Hi|[assistant]|{Yo$}[user]|Ok|[assistant]|{Bye$}",
    ),
    (["u:A", "a:B", "u:C", "a:D"], "^[user]|A|[assistant]|{B$}[user]|C|[assistant]|{D$}"),
    (["u:1", "a:2", "u:3", "a:4"], "^[user]|1|[assistant]|{2$}[user]|3|[assistant]|{4$}"),
    (["u:A", "a:B", "a:C"], "^[user]|A|[assistant]|{B$}[assistant]|{C$}"),
    (["u:A", "u:B", "a:C"], "^[user]|A|[user]|B|[assistant]|{C$}"),
    (["a:Hello"], "^[assistant]|{Hello$}"),
    (["a:Hello", "a:Again"], "^[assistant]|{Hello$}[assistant]|{Again$}"),
    (["a:Hello", "u:Hi", "a:So?"], "^[assistant]|{Hello$}[user]|Hi|[assistant]|{So?$}"),
    # Messages after the last answer are left out.
    (["u:Hi", "a:Yes", "u:Ok"], "^[user]|Hi|[assistant]|{Yes$}"),
    (["u:Hi", "a:Yep", "u:Ok", "s:Stop."], "^[user]|Hi|[assistant]|{Yep$}"),
    # Empty messages.
    (["u:", "a:Yo"], "^[user]||[assistant]|{Yo$}"),
    (["s:", "u:Hi", "a:Yo"], "^[system]||[user]|Hi|[assistant]|{Yo$}"),
    (["s:", "u:", "a:Yo"], "^[system]||[user]||[assistant]|{Yo$}"),
    (["u:A", "a:B", "u:", "a:D"], "^[user]|A|[assistant]|{B$}[user]||[assistant]|{D$}"),
    (["u:Hi", "a:"], "empty assistant turn"),
    (["u:A", "a:B", "u:C", "a:"], "empty assistant turn"),
    (["u:A", "a:", "u:C", "a:D"], "empty assistant turn"),
    (["u:Hi"], "no assistant turn"),
    (["s:Be brief.", "u:Hi"], "no assistant turn"),
    ([], "no assistant turn"),
    # 65 tokens fit; of 66 the last is lost.
    (
        ["u:Hi", "a:abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMN"],
        "^[user]|Hi|[assistant]|{abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMN$}",
    ),
    (
        ["u:Hi", "a:abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNO"],
        "^[user]|Hi|[assistant]|{abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNO$}",
        "^[user]|Hi|[assistant]|{abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNO}",
    ),
    # Answers that are too long.
    (
        ["u:Hi", "a:abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ"],
        "^[user]|Hi|[assistant]|{abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ$}",
        "^[user]|Hi|[assistant]|{abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNO}",
    ),
    (
        ["u:Hi", "a:Yo", "u:Why", "a:Because it is so and will always be so"],
        "^[user]|Hi|[assistant]|{Yo$}[user]|Why|[assistant]|"
        "{Because it is so and will always be so$}",
        "^[user]|Hi|[assistant]|{Yo$}[user]|Why|[assistant]|{Because it is so}",
    ),
    # The context of the second answer ends at the 65th token, or after it.
    (
        ["u:Hi", "a:Yo", "u:Why, and why not so", "a:So"],
        "^[user]|Hi|[assistant]|{Yo$}[user]|Why, and why not so|[assistant]|{So$}",
        "^[user]|Hi|[assistant]|{Yo$}[user]|Why, and why not so|[assistant]|",
    ),
    (
        ["u:Hi", "a:Yo", "u:Why, and why not, and so on, and on, and on?", "a:So"],
        "^[user]|Hi|[assistant]|{Yo$}[user]|Why, and why not, and so on, and on, and on?|"
        "[assistant]|{So$}",
        "^[user]|Hi|[assistant]|{Yo$}[user]|Why, and why not, and so on, and",
    ),
    # No answer fits.
    (
        ["u:abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ", "a:Yo"],
        "^[user]|abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ|[assistant]|{Yo$}",
        "",
    ),
    (
        ["s:Answer in one word, please.", "u:What is the color of the sky?", "a:Blue"],
        "^[system]|Answer in one word, please.|[user]|What is the color of the sky?|[assistant]|"
        "{Blue$}",
        "",
    ),
    (["u:Last", "a:Done"], "^[user]|Last|[assistant]|{Done$}"),
]
_ROLES = {"s": "system", "u": "user", "a": "assistant"}


def messages_of(turns: list[str]) -> list[dict[str, str]]:
    """Return the messages of a conversation in the table."""
    return [{"role": _ROLES[turn[0]], "content": turn[2:]} for turn in turns]


def write_chats(path: Path) -> Path:
    """Write the conversations as lines of JSON."""
    rows = [{"messages": messages_of(chat[0])} for chat in CHATS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_byte_tokenizer(folder: Path) -> Path:
    """Write a tokenizer.json: id 0 is bos, 1 is eos, b + 2 is the byte b; returns its folder."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    names = [chr(b) if b in visible else chr(next(others)) for b in range(256)]  # of GPT-2
    vocabulary = {name: number for number, name in enumerate(["<s>", "</s>", *names])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    beside = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    return folder


def notation(tokens: Any, is_target: Any) -> str:
    """Return the notation of tokens of `write_byte_tokenizer`."""
    found, inside = bytearray(), False
    for token, target in zip(np.asarray(tokens).tolist(), is_target, strict=True):
        if target != inside:
            found += b"{" if target else b"}"
            inside = bool(target)
        found += {0: b"^", 1: b"$", 12: b"|"}.get(token) or bytes([token - 2])
    return (found + b"}" * inside).decode()
