"""From token ids to text while they arrive: whole characters only, and stop strings cut off."""

from collections.abc import Callable, Sequence


class Detokenizer:
    """Turns ids into text piece by piece; the pieces joined equal the whole decoded at once.

    A character may span several tokens, and a decoder may treat the first token of a text in its
    own way (SentencePiece drops its space). So a piece is the difference between the decoded text
    with and without the new tokens, and is held back while it ends in an unfinished character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Start a text.

        Args:
            decode: Text of a list of ids, with U+FFFD for bytes that are no UTF-8.
        """
        self._decode = decode
        self._ids: list[int] = []
        self._prefix = 0  # ids[prefix:read] gave the last piece: context for the next one
        self._read = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` completes; empty while a character is unfinished."""
        self._ids.extend(token_ids)
        text = self._decode(self._ids[self._prefix :])
        return "" if text.endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """Return what was held back, with U+FFFD for bytes that never became a character."""
        return self._take(self._decode(self._ids[self._prefix :]))

    def _take(self, text: str) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        if len(text) <= len(before):
            return ""  # special tokens only: useless as context, so the old context stays
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(before) :]


class StopStrings:
    """Cuts a text before the first of some strings, which may come in several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for `stops`, none of them empty."""
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """Return the text that is safe to show: no stop string can begin in it any more.

        >>> stops = StopStrings(["END"])
        >>> stops.add("one E"), stops.add("N"), stops.add("tire END two"), stops.matched
        ('one ', '', 'ENtire ', 'END')
        """
        if self.matched is not None or not self._stops:
            return "" if self.matched is not None else text
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # The one that ends first, then the longest: neither the order of the stop strings nor
            # how the text was cut into pieces makes a difference.
            at, self.matched = min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
            self._held = ""
            return text[:at]
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back; nothing more can come."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Longest end of `text` that begins `stop`."""
        for size in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
