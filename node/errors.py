"""The three kinds of error, of which two are classes (the third, our own bugs, crashes loudly).

Exception
├── ConfigError   the operator's: one line with the remedy, exit code 2
└── PeerError     another peer's: dropped, counted by reason, its sender scored
"""


class ConfigError(Exception):
    """Something the operator can mend. Its text is one line that names the value and the remedy."""


class PeerError(Exception):
    """Something another peer did or failed to do.

    `reason` is one of a small fixed set, for counters; the text is for people.
    """

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(text or reason)
        self.reason = reason
