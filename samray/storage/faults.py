"""What an error of some storage backend means: try again, already there, one file's fault, or the end of the run."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from typing import Final

from samray.errors import FileError, NotFoundError, StorageError
from samray.storage.uris import redact

MAX_ATTEMPTS: Final = 6


_TRANSIENT_ERRNO: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
        getattr(errno, "EREMOTEIO", errno.EIO),
    }
)
_TRANSIENT_CODES: Final = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_TRANSIENT_STATUS: Final = frozenset({408, 409, 429, 500, 502, 503, 504})
_BAD_CREDENTIALS: Final = frozenset(
    {
        "AccountProblem",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "InvalidToken",
        "NotSignedUp",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from; s3fs keeps the server's own answer there."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__


def server_answer(error: BaseException) -> tuple[str, int]:
    """The code and HTTP status that the server gave; ("", 0) where the error holds none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):
            code = str(response.get("Error", {}).get("Code", ""))
            return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)
        for name in ("status", "status_code", "code"):  # aiohttp, Azure, Google
            status = getattr(cause, name, None)
            if isinstance(status, int) and 100 <= status < 600:
                return "", status
    return "", 0


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    code, status = server_answer(error)
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return True
    if code or status:
        return False
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError):
        return False
    for cause in _causes(error):
        if isinstance(cause, TimeoutError | ConnectionError):
            return True
        if isinstance(cause, OSError) and cause.errno in _TRANSIENT_ERRNO:
            return True
        # Named, not imported: samray needs none of these packages for local files.
        names = {f"{kind.__module__}.{kind.__name__}" for kind in type(cause).__mro__}
        if names & {
            "aiohttp.client_exceptions.ClientConnectionError",
            "aiohttp.client_exceptions.ClientPayloadError",
            "asyncio.exceptions.IncompleteReadError",
            "botocore.exceptions.ConnectionError",
            "botocore.exceptions.HTTPClientError",
            "botocore.exceptions.IncompleteReadError",
            "botocore.parsers.ResponseParserError",
            "http.client.IncompleteRead",
        }:
            return True
    return False


def is_conflict(error: BaseException) -> bool:
    """Whether a conditional create failed because the object is there."""
    if isinstance(error, FileExistsError):
        return True
    code, status = server_answer(error)
    return code == "PreconditionFailed" or status == 412


def as_storage_error(error: Exception, doing: str, uri: str) -> StorageError:
    """The error as a sentence: what was tried, where, what came, what to do."""
    where = redact(uri)
    code, status = server_answer(error)
    said = redact(error).strip().rstrip(".") or type(error).__name__
    if isinstance(error, FileNotFoundError) or status == 404:
        missing = "its bucket or folder is not there and cannot be made" if doing == "write" else "it does not exist"
        return NotFoundError(f"cannot {doing} {where}: {missing}")
    if code in _BAD_CREDENTIALS or "Credential" in type(error).__name__:
        return StorageError(
            f"cannot {doing} {where}: the storage refused the credentials ({code or said}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile or role) and check their validity"
        )
    if isinstance(error, PermissionError) or status in (401, 403):
        return FileError(f"cannot {doing} {where}: permission denied ({code or said}); grant it, or use another place")
    if is_transient(error):
        return StorageError(
            f"cannot {doing} {where} after {MAX_ATTEMPTS} attempts: {said}; "
            "check that the storage and its endpoint can be reached, then run the same command again"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return StorageError(f"cannot {doing} {where}: {said}; make room or give another OUTPUT")
    return FileError(f"cannot {doing} {where}: {said}")
