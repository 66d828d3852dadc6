"""What Ray says of an error, in one line."""

from __future__ import annotations

from samray.errors import SamrayError

RAY_DATAS_ADVICE = "\nFailed to apply UDF transform"
"""Ray Data appends to the message of each error how to make it retry, which here storage alone does."""


def plain_error(error: BaseException) -> BaseException:
    """Our own error out of Ray's wrapping, or one that says in a line what Ray's says in a hundred."""
    inner: BaseException | None = error
    while inner is not None:
        cause = getattr(inner, "cause", None)
        inner = cause if isinstance(cause, BaseException) else inner.__cause__
        if isinstance(inner, SamrayError) and not hasattr(inner, "cause"):
            inner.args = (str(inner).partition(RAY_DATAS_ADVICE)[0],)
            return inner
    lines = [line.strip() for line in str(error).partition(RAY_DATAS_ADVICE)[0].splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    plain = SamrayError(f"the run ended early: {lines[-1]}; the same command again goes on from here")
    plain.__cause__ = error
    return plain
