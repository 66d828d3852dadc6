"""Turn Ray's errors into one line."""

from __future__ import annotations

from samray.errors import SamrayError

RAY_DATAS_ADVICE = "\nFailed to apply UDF transform"
"""Ray Data appends advice on retries to each error message; here only storage retries."""


def plain_error(error: BaseException) -> BaseException:
    """Unwrap a samray error from Ray's, or reduce Ray's error to one line."""
    inner: BaseException | None = error
    while inner is not None:
        cause = getattr(inner, "cause", None)
        inner = cause if isinstance(cause, BaseException) else inner.__cause__
        # Ray derives a class from the task's error and its own, with the original as `cause`: the innermost is ours.
        if isinstance(inner, SamrayError) and not hasattr(inner, "cause"):
            inner.args = (str(inner).partition(RAY_DATAS_ADVICE)[0],)
            return inner
    # The last line of a traceback says what happened.
    lines = [line.strip() for line in str(error).partition(RAY_DATAS_ADVICE)[0].splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    plain = SamrayError(f"the run ended early: {lines[-1]}; run the same command to resume")
    plain.__cause__ = error
    return plain
