"""Errors for people: what is wrong, the value found, where, and what repairs it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class KdError(Exception):
    """Bad input. Printed without a traceback; the process exits with `exit_code`.

    Args:
        what: one sentence naming the thing, the value found and the place.
        details: further lines, or (name, value) pairs printed as aligned `name: value`.
        fix: the command or change that repairs it.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, details: Sequence[str] | Mapping[str, object] = (), fix: str | None = None
    ) -> None:
        self.what = what
        self.details = (
            [f"{name}: {value}" for name, value in details.items()] if isinstance(details, Mapping) else [*details]
        )
        self.fix = fix
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.what, *(f"  {line}" for line in self.details)]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders (dask workers); keyword arguments do not survive the default.
        return _rebuild, (type(self), self.what, list(self.details), self.fix)

    def to_json(self) -> dict[str, object]:
        """The error as a JSON object, for `--json`."""
        return {"type": type(self).__name__, "what": self.what, "details": list(self.details), "fix": self.fix}


class UsageError(KdError):
    """The command line or configuration is malformed."""

    exit_code = 2


class RefusedError(KdError):
    """The input is well formed and refused: identity, budget or bad data."""

    exit_code = 3


class VerificationError(KdError):
    """Stored data is not what its record says."""

    exit_code = 4


class IncompleteError(KdError):
    """Some shards or steps failed; the rest is done and kept."""

    exit_code = 5


def _rebuild(cls: type[KdError], what: str, details: list[str], fix: str | None) -> KdError:
    return cls(what, details=details, fix=fix)


def near_match(name: str, known: Iterable[str]) -> str:
    """A parenthesis that helps with an unknown name: its nearest match, or the short list of known ones.

    >>> near_match("logit", ["logits", "hidden.cls"])
    " (did you mean 'logits'?)"
    >>> near_match("x", ["b", "a"])
    ' (known: a, b)'
    """
    names = sorted({*known})
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if near:
        return " (did you mean " + " or ".join(repr(n) for n in near) + "?)"
    return " (known: " + ", ".join(names) + ")" if names else ""
