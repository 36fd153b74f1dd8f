"""Records of which only some tokens are targets: prompt-completion pairs and conversations.

A record becomes segments: contexts and targets in turn, a context first. Each is encoded on its
own, and eos follows each target. Only the tokens of targets and their eos are scored. A text is one
target after an empty context.

[Note: chat template]
A message is a line with its role in brackets, and its content. A newline ends it, or eos if it is
the assistant's:

    <s>[system]
    You are brief.
    [user]
    Hello
    [assistant]
    Hi!</s>[user]
    ...

The template needs no tokens besides bos and eos. The lines with roles are contexts. Messages after
the last one of the assistant are left out in training, because no target follows.
"""

import json
from collections.abc import Iterable, Mapping

# The same for Hugging Face transformers, as tokenizer_config.json contains it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + ']\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)
_ROLES = ("system", "user", "assistant")


def pair_segments(prompt: object, completion: object) -> tuple[list[str], str | None]:
    """Return the segments of a prompt-completion pair, or none and why it is skipped."""
    if prompt is None or completion is None:
        return [], "null"
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return [], "not a string"
    return ([prompt, completion], None) if completion else ([], "empty completion")


def conversation_segments(messages: object) -> tuple[list[str], str | None]:
    """Return the segments of a conversation, or none and why it is skipped."""
    if messages is None:
        return [], "null"
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return [], "not a list of messages"
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            return [], "unknown role"
        if role == "assistant" and content in (None, ""):
            return [], "empty assistant turn"
        if not isinstance(content, str):
            return [], "content not a string"
    segments = _chat_segments(messages)[:-1]
    return (segments, None) if segments else ([], "no assistant turn")


def chat_prompt(messages: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the segments of a conversation that the assistant is to continue."""
    *segments, last = _chat_segments(messages)
    return [*segments, f"{last}[assistant]\n"]


def _chat_segments(messages: Iterable[Mapping[str, str]]) -> list[str]:
    """Return segments by the chat template; the last one is a context."""
    segments = [""]
    for message in messages:
        segments[-1] += f"[{message['role']}]\n"
        if message["role"] == "assistant":
            segments += [message["content"], ""]
        else:
            segments[-1] += f"{message['content']}\n"
    return segments


def to_document(segments: list[str]) -> str:
    """Return segments as one string, which `from_document` reads."""
    return json.dumps(segments, ensure_ascii=False)


def from_document(document: str) -> list[str]:
    """Return the segments of a string of `to_document`."""
    segments: list[str] = json.loads(document)
    return segments


def target_bytes(segments: list[str]) -> int:
    """Return the UTF-8 bytes of the targets."""
    return sum(len(text.encode()) for text in segments[1::2])
