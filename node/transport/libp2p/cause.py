"""Why something failed, in one line."""


def innermost(error: BaseException) -> str:
    """Return the first real cause inside trio's exception groups, on one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
