"""Classify the errors of storage backends: retry, an error of this file, or the end of the run.

One table each for the server's error codes, HTTP statuses, errno and client exceptions, checked in this order, from
specific to general. Whatever may succeed next time is retried. A missing file is that file's own error; for any other
refusal `samray.inputs.fetch` first checks whether other files can still be read.
"""

from __future__ import annotations

import enum
import errno
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from samray.errors import BucketNotFoundError, FileError, NotFoundError, RefusedError, StorageError, UnavailableError
from samray.storage.redaction import redact, redact_error
from samray.storage.uris import is_local


class Fault(enum.Enum):
    """The treatment of an error."""

    RETRY = "retry"
    """May succeed next time: throttling, a broken connection, a server restart, a damaged body."""
    MISSING = "missing"
    """The file does not exist."""
    FILE = "file"
    """This file is refused, and perhaps all others: only reading others shows it."""
    RUN = "run"
    """No request will succeed: wrong or expired credentials, a wrong clock, a full disk."""


def _codes(fault: Fault, codes: str) -> dict[str, Fault]:
    return dict.fromkeys(codes.split(), fault)


_SERVICE_CODES: Final[dict[str, Fault]] = {
    **_codes(
        Fault.RETRY,
        """BadDigest BandwidthLimitExceeded Busy ClientDisconnected ConditionalRequestConflict ContentSHA256Mismatch
        DependencyTimeoutException IncompleteBody InvalidPart KMSInternalException KeyUnavailableException
        LimitExceededException Md5Mismatch NoSuchUpload OperationAborted PriorRequestNotComplete
        ProvisionedThroughputExceededException TransactionInProgressException XAmzContentChecksumMismatch
        XAmzContentSHA256Mismatch XMinioServerNotInitialized""",
    ),
    **_codes(Fault.MISSING, "BlobNotFound NoSuchKey NoSuchVersion"),
    # A missing bucket says nothing about a file in it.
    **_codes(Fault.FILE, "ContainerNotFound NoSuchBucket NotImplemented"),
    **_codes(
        Fault.RUN,
        """AccountProblem AuthFailure AuthenticationFailed AuthorizationQueryParametersError CredentialsNotSupported
        ExpiredToken ExpiredTokenException IncompleteSignature InvalidAccessKeyId InvalidClientTokenId InvalidPayer
        InvalidSecurity InvalidSignatureException InvalidToken MissingAuthenticationToken MissingSecurityElement
        MissingAuthenticationTokenException MissingSecurityHeader NotSignedUp OptInRequired RequestExpired
        RequestTimeTooSkewed SignatureDoesNotMatch TokenRefreshRequired UnrecognizedClientException UserSuspended""",
    ),
}
_THROTTLING: Final = re.compile(
    r"Throttl|SlowDown|TooManyRequests|RequestLimitExceeded|Time(?:d)?[Oo]ut|Unavailable|ServerBusy|^Internal\w*"
    r"|InsufficientResources|Overload"
)
"""Codes that mean "later", in the spellings of various S3-compatible services."""

_RATE_LIMIT: Final = re.compile(r"[rR]ateLimitExceeded")
"""Google's reason for a 403 that means "later"."""

_HTTP_STATUS: Final[dict[int, Fault]] = {
    **dict.fromkeys((408, 409, 420, 421, 423, 425, 429, 449, 460, 499), Fault.RETRY),
    **dict.fromkeys(range(500, 600), Fault.RETRY),
    **dict.fromkeys((404, 410), Fault.MISSING),
}
"""Every other status of 300 or above is Fault.FILE."""


def _errnos(fault: Fault, names: str) -> dict[int, Fault]:
    """Some of them exist only on Linux."""
    return {getattr(errno, name): fault for name in names.split() if hasattr(errno, name)}


_ERRNO: Final[dict[int, Fault]] = {
    **_errnos(
        Fault.RETRY,
        """EADDRINUSE EADDRNOTAVAIL EAGAIN EALREADY EBUSY ECOMM ECONNABORTED ECONNREFUSED ECONNRESET EDEADLK EHOSTDOWN
        EHOSTUNREACH EINPROGRESS EINTR EIO EMFILE ENETDOWN ENETRESET ENETUNREACH ENFILE ENOBUFS ENOLCK ENOLINK ENOMEM
        ENONET ENOTCONN EPIPE EPROTO EREMOTEIO ESHUTDOWN ESTALE ETIME ETIMEDOUT ETXTBSY""",
    ),
    **_errnos(Fault.MISSING, "ENOENT"),
    **_errnos(Fault.RUN, "EDQUOT ENOSPC EROFS"),
}
"""Every other number is Fault.FILE."""
_OWN_ERRNO: Final = frozenset(_errnos(Fault.FILE, "EFBIG EILSEQ EINVAL EISDIR ELOOP ENAMETOOLONG ENOTDIR EOVERFLOW"))
"""Errors of one file only. A lost device or an expired ticket affects all files."""

# By name, not imported: local files need none of these packages. The first pattern that matches the class or a base
# wins.
_EXCEPTIONS: Final[tuple[tuple[re.Pattern[str], Fault], ...]] = tuple(
    (re.compile(pattern), fault)
    for pattern, fault in (
        (r"botocore\.exceptions\.(CredentialRetrievalError|MetadataRetrievalError)", Fault.RETRY),  # or throttled
        (r"botocore\.exceptions\.(\w*Credential\w*|\w*Token\w*|NoRegionError|\w*SSO\w*|ProfileNotFound)", Fault.RUN),
        (r"azure\.core\.exceptions\.ClientAuthenticationError", Fault.RUN),
        (r"google\.auth\.exceptions\.(RefreshError|DefaultCredentialsError)", Fault.RUN),
        (r"aiohttp\.client_exceptions\.(InvalidURL|NonHttpUrl\w*|ClientConnectorCertificateError)", Fault.FILE),
        (r"aiohttp\.(client_exceptions|http_exceptions)\.\w+", Fault.RETRY),
        (r"botocore\.exceptions\.(HTTPClientError|ConnectionError|\w*ChecksumError|IncompleteReadError)", Fault.RETRY),
        (r"botocore\.exceptions\.(ResponseStreamingError|ReadTimeoutError|ConnectTimeoutError)", Fault.RETRY),
        (r"botocore\.parsers\.ResponseParserError", Fault.RETRY),
        (r"azure\.core\.exceptions\.(ServiceRequest\w*|ServiceResponse\w*|IncompleteReadError)", Fault.RETRY),
        (r"google\.auth\.exceptions\.TransportError", Fault.RETRY),
        (r"gcsfs\.(retry|checkers)\.ChecksumError", Fault.RETRY),
        (r"google\.resumable_media\.common\.DataCorruption", Fault.RETRY),
        (r"requests\.exceptions\.(ConnectionError|Timeout|ChunkedEncodingError|ContentDecodingError)", Fault.RETRY),
        (r"urllib3\.exceptions\.(ProtocolError|TimeoutError|IncompleteRead|DecodeError)", Fault.RETRY),
        (r"http\.client\.HTTPException", Fault.RETRY),
        (r"asyncio\.exceptions\.IncompleteReadError", Fault.RETRY),
        (r"ftplib\.error_(temp|reply|proto)", Fault.RETRY),
        (r"paramiko\.ssh_exception\.AuthenticationException", Fault.RUN),
        (r"paramiko\.ssh_exception\.\w+", Fault.RETRY),
        (r"zlib\.error", Fault.RETRY),  # a compressed body truncated or damaged in transit
        (r"builtins\.EOFError", Fault.RETRY),
    )
)


class DamagedBodyError(OSError):
    """A body of the wrong length: it was truncated in transit, whatever its status."""


_AIOHTTP_PARSER: Final = "aiohttp.http_exceptions"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its chain of causes; s3fs keeps the server's response there."""
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def server_answer(error: BaseException) -> tuple[str, int]:
    """The server's error code and HTTP status; ("", 0) if the error has none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), _as_status(status)
        # aiohttp's parser has a class attribute `code` = 400 and sets it as a status, although no server sent it.
        if type(cause.__cause__).__module__ == _AIOHTTP_PARSER:
            continue
        for name in () if type(cause).__module__ == _AIOHTTP_PARSER else ("status", "status_code", "code"):
            if status := _as_status(getattr(cause, name, 0)):
                return str(getattr(cause, "error_code", "") or ""), status
        if status := _as_status(getattr(response, "status_code", 0)):  # requests
            return "", status
    return "", 0


def _as_status(value: Any) -> int:
    try:
        status = int(value)
    except (TypeError, ValueError):
        return 0
    return status if 300 <= status < 1000 else 0


def fault_of(error: BaseException) -> Fault:
    """Classify the error of a storage backend."""
    code, status = server_answer(error)
    code = "" if code.isdigit() else code.rpartition(".")[2]  # botocore repeats the status of a HEAD; KMS has a prefix
    if code in _SERVICE_CODES:
        return _SERVICE_CODES[code]
    if _THROTTLING.search(code):
        return Fault.RETRY
    if status == 403 and any(_RATE_LIMIT.search(str(cause)) for cause in _causes(error)):
        return Fault.RETRY
    if status:
        return _HTTP_STATUS.get(status, Fault.FILE)
    # No server answered: the client's exception decides, and if it is only a wrapper, its cause.
    for cause in _causes(error):
        fault = _fault_of_exception(cause)
        if fault is not None:
            return fault
    return Fault.FILE


def _fault_of_exception(error: BaseException) -> Fault | None:
    """None if the exception alone is not specific, for example a wrapper around another one."""
    if isinstance(error, FileNotFoundError):
        return Fault.MISSING
    # Before SSLError, its base class: a wrong certificate stays wrong, a broken handshake may not.
    if isinstance(error, ssl.SSLCertVerificationError):
        return Fault.FILE
    if isinstance(error, DamagedBodyError | TimeoutError | ConnectionError | socket.gaierror | ssl.SSLError):
        return Fault.RETRY
    names = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    for pattern, fault in _EXCEPTIONS:
        if any(pattern.fullmatch(name) for name in names):
            return fault
    # After the table: aiohttp's connection errors are OSErrors, too.
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNO.get(error.errno, Fault.FILE)
    return None


def is_conflict(error: BaseException) -> bool:
    """Whether a conditional create failed because the object exists."""
    if isinstance(error, FileExistsError):
        return True
    code, status = server_answer(error)
    return code == "PreconditionFailed" or status == 412


def as_storage_error(error: Exception, doing: str, uri: str, tried: str = "") -> StorageError:
    """Describe the error in a sentence: what was tried, where, the response, and what to do.

    tried: attempts and duration, for an error that was retried.
    """
    where = redact(uri)
    code, status = server_answer(error)
    reason = redact_error(error, uri).strip().rstrip(".") or type(error).__name__
    # asyncio's TimeoutError has no text.
    if isinstance(error, TimeoutError) and not str(error):
        reason = "no response in time"
    fault = fault_of(error)
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return BucketNotFoundError(f"cannot {doing} {where}: its bucket does not exist")
    if fault is Fault.MISSING:
        missing = (
            "its bucket or folder does not exist and cannot be created" if doing == "write" else "it does not exist"
        )
        return NotFoundError(f"cannot {doing} {where}: {missing}")
    if fault is Fault.RUN and isinstance(error, OSError) and error.errno in _ERRNO and not (code or status):
        # A full or read-only disk, not the answer of a server.
        return StorageError(f"cannot {doing} {where}: {reason}; free some space or choose another OUTPUT")
    if code.startswith("RequestTimeTooSkewed"):
        return StorageError(f"cannot {doing} {where}: the clock of this machine is wrong ({reason}); set it")
    if fault is Fault.RUN:
        return StorageError(
            f"cannot {doing} {where}: the storage refused the credentials ({code or reason}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile or role) and check their validity"
        )
    if fault is Fault.RETRY:
        return UnavailableError(
            f"cannot {doing} {where}{tried}: {reason}; "
            "check that the storage and its endpoint can be reached, then run the same command again"
        )
    if isinstance(error, NotADirectoryError) and is_local(uri):
        file = next((str(path) for path in Path(uri).parents if path.is_file()), uri)
        return FileError(
            f"cannot {doing} {where}: {redact(file)} is a file; expected a folder, or a name that does not exist"
        )
    if isinstance(error, PermissionError) or status in (401, 403):
        return RefusedError(
            f"cannot {doing} {where}: permission denied ({code or reason}); grant it, or use another place"
        )
    if code or status:
        return RefusedError(f"cannot {doing} {where}: {reason}")
    if _is_of_one_file(error):
        return FileError(f"cannot {doing} {where}: {reason}")
    return RefusedError(f"cannot {doing} {where}: {reason}")  # all other files may fail the same way


def _is_of_one_file(error: Exception) -> bool:
    """Whether an error that no server sent is certainly about this file: its name or its type."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ssl.SSLError):
        return error.errno in _OWN_ERRNO
    # Clients raise ValueError for impossible names. OpenSSL's errors are also ValueErrors.
    return isinstance(error, ValueError) and not isinstance(error, ssl.SSLError)
