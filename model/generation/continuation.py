"""Incremental detokenization: the text of a continuation while its tokens arrive."""

from collections.abc import Sequence

from data import Tokenizer

_REPLACEMENT = "\ufffd"  # decoded from bytes that are not, or not yet, a character


class Continuation:
    """The text that one sample adds to its prompt.

    It ends before the first of `end_ids` and before `stop` in its text. Text is held back while it
    may be an incomplete character or the beginning of `stop`.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], end_ids: set[int], stop: str | None
    ) -> None:
        self.ended = False
        self._tokenizer, self._end_ids, self._stop = tokenizer, end_ids, stop
        # Decoded again with each new token, whose text depends on the token before it.
        self._context = list(prompt)
        self._undecoded: list[int] = []
        self._held = ""
        self._tokens: list[int] = []

    @property
    def message(self) -> str:
        """The text as training encodes a message: without what joins it to the prompt's text."""
        text = self._tokenizer.decode(self._tokens)
        return text.partition(self._stop)[0] if self._stop else text

    def add(self, token: int) -> str:
        """Add a token; returns the text that is now certain, nothing after the end."""
        if self.ended:
            return ""
        if token in self._end_ids:
            return self.finish()
        self._tokens.append(token)
        self._undecoded.append(token)
        text = self._decode()
        if text.endswith(_REPLACEMENT):  # perhaps an incomplete character
            return ""
        self._context, self._undecoded = self._undecoded, []
        return self._release(text)

    def finish(self) -> str:
        """Return the remaining text, as there are no more tokens."""
        if self.ended:
            return ""
        text = self._release(self._decode()) + self._held
        self.ended, self._held = True, ""
        return text

    def _decode(self) -> str:
        context = self._tokenizer.decode(self._context)
        return self._tokenizer.decode([*self._context, *self._undecoded])[len(context) :]

    def _release(self, text: str) -> str:
        """Append to the held text, cut it at `stop`, and return what cannot begin a `stop`."""
        text = self._held + text
        if not self._stop:
            return text
        if (stop_at := text.find(self._stop)) >= 0:
            self.ended, self._held = True, ""
            return text[:stop_at]
        held = next(n for n in range(len(self._stop) - 1, -1, -1) if text.endswith(self._stop[:n]))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
