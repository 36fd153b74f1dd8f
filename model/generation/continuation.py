"""The text of a continuation while its tokens come: nothing torn, nothing beyond where it stops."""

from collections.abc import Sequence

from data import Tokenizer

_REPLACEMENT = "\ufffd"  # what the tokenizer makes of bytes that are no character, or not yet


class Continuation:
    """What one sample adds to its prompt.

    It ends before the first of `end_ids`, or before `stop` in its text. Text is held back while it
    may be the first bytes of a character, or the beginning of `stop`.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], end_ids: set[int], stop: str | None
    ) -> None:
        self.ended = False
        self._tokenizer, self._end_ids, self._stop = tokenizer, end_ids, stop
        # Decoded along with what follows, since how a piece is written depends on the one before.
        self._before = list(prompt)
        self._undecoded: list[int] = []
        self._held = ""

    def add(self, token: int) -> str:
        """Take the next token; returns the text that is certain now, nothing once it has ended."""
        if self.ended:
            return ""
        if token in self._end_ids:
            return self.finish()
        self._undecoded.append(token)
        text = self._decode()
        # A character that comes byte by byte; at most four bytes, unless they are no character.
        if text.endswith(_REPLACEMENT):
            return ""
        self._before, self._undecoded = self._undecoded, []
        return self._release(text)

    def finish(self) -> str:
        """There are no more tokens; returns the rest of the text."""
        if self.ended:
            return ""
        text = self._release(self._decode()) + self._held
        self.ended, self._held = True, ""
        return text

    def _decode(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._undecoded])[len(before) :]

    def _release(self, text: str) -> str:
        """What can be shown of the text so far, now that so much has been added."""
        text = self._held + text
        if not self._stop:
            return text
        if (stop_at := text.find(self._stop)) >= 0:
            self.ended, self._held = True, ""
            return text[:stop_at]
        held = next(n for n in range(len(self._stop) - 1, -1, -1) if text.endswith(self._stop[:n]))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
