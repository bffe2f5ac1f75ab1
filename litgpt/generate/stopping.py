"""Where answers end: sequences of tokens or of characters."""

from collections.abc import Iterable, Sequence


class StopMatcher:
    """Holds back what may turn out to be the start of a stop sequence, of tokens or of characters.

    Args:
        sequences: Any of them ends the row. Where two end at the same place, the longer one is taken away.
    """

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.sequences = [list(sequence) for sequence in sequences if len(sequence) > 0]
        self.held: list = []
        self.stopped: list | None = None  # the sequence that was found

    def push(self, new: Iterable) -> list:
        """Take tokens or characters and return those that are now safe to show."""
        if self.stopped is not None:
            return []
        shown = []
        for element in new:
            self.held.append(element)
            found = [sequence for sequence in self.sequences if self.held[-len(sequence) :] == sequence]
            if found:
                self.stopped = max(found, key=len)
                shown += self.held[: -len(self.stopped)]
                self.held = []
                break
            waiting = max((n for sequence in self.sequences if (n := self._overlap(sequence))), default=0)
            n_safe = len(self.held) - waiting
            shown += self.held[:n_safe]
            del self.held[:n_safe]
        return shown

    def flush(self) -> list:
        """Return what is still held back: nothing more will come."""
        held, self.held = self.held, []
        return held

    def _overlap(self, sequence: list) -> int:
        """Return how long a start of the sequence stands at the end of what is held."""
        longest = min(len(sequence) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held[-n:] == sequence[:n]), 0)
