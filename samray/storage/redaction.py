"""Hide what must not be shown or stored: user names, passwords, tokens and signatures in URIs, and in texts with URIs.

Decided by structure, not by a list of secret names: everything before the `@` of a URI's host, and every query value
that is not known to be harmless.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote

HIDDEN: Final = "***"

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{1,30}):/{1,2}")
_NO_HOST: Final = frozenset({"file", "local", "memory", "tar", "zip"})
_CONTAINER_AT_ACCOUNT: Final = frozenset({"abfs", "abfss", "wasb", "wasbs"})
"""Schemes in which `name@host` is a location, not a user."""
_BUCKET_FIRST: Final = frozenset({"s3", "s3a", "gs", "gcs", "az", "oss", "r2", "b2"})
"""Schemes without ports: what follows a colon is a password."""
_HARMLESS_NAMES: Final = frozenset(
    """
    alt bbox bg bucket category class collection crop dataset date day download dpr end ext file file_name fileid
    filename fit fm fmt fname format frame from h height hl i id ids idx image image_id imageid img index label lang lat
    layer level limit locale lon mime month n name number offset order p page partnumber path photo photo_id pic picture
    q quality raw region resize rotate row scale seed size sort split src start sz t tile time to type v version
    versionid w width x y year z zoom
    """.split()  # noqa: SIM905  (a list of words)
)
"""Parameters that select an image or its format."""
_MOST_HARMLESS: Final = 128
_MOST_OF_A_LETTER: Final = 16
"""Maximum characters of the value of `h=`, `w=` and similar: a longer value is not a size or position but a hash."""
HARMLESS_QUERY: Final = (
    rf"^[^@?#;\s]*\?(?:(?i:{'|'.join(sorted(_HARMLESS_NAMES))})=[A-Za-z0-9_.,~+\-]{{0,{_MOST_OF_A_LETTER}}}(?:&|$))*$"
)
"""Matches nearly all URIs with a query that `redact` leaves unchanged, and no others. For Arrow: Python is slower."""
# Too short to be secret.
_SHORT: Final = re.compile(r"[0-9]{1,3}|.|true|false|")
_QUERY: Final = re.compile(r"[?#;]")
_PART: Final = re.compile(r"[^&;#]+")
_PARAMETER: Final = re.compile(r"(?:[^=&;#/\s]{0,100}\?)?(?P<name>[^=&;#?/\s]{0,100})=(?P<value>[^&;#]*)")
_FREE_QUERY: Final = re.compile(r"\?(?=[^=&;#?/\s]{1,100}=)\S*")
_HEADER: Final = re.compile(r"(?i)\b(?:bearer|basic)\s+(?P<value>[A-Za-z0-9._~+/=\-]{8,})")
_HOST: Final = re.compile(
    r"(?:localhost|\[[0-9a-f:.]+\]|[A-Za-z0-9_\-]+(?:\.[A-Za-z0-9_\-]+)+|[^/@]+:\d{1,5})(?=[/?#]|$)"
)
_IPV6_HOST: Final = re.compile(r"\[[0-9A-Fa-f:.]+(?:%[\w.]+)?\](?::\d{1,5})?(?=[/?#\s]|$)")
_PORT: Final = re.compile(r"\d{1,5}(?=[/?#]|[\s'\"<>),;:.\]}]|$)")
_TRAILING: Final = "'\"<>)],.:;}"
_PLAIN_NAME: Final = re.compile(r"(?i)[^=]*\.(?:jpe?g|png|webp|bmp|tiff?|gif|tar|parquet)")

_HARMLESS_OPTIONS: Final = re.compile(
    r"(?i)(?:.*(?:url|endpoint|region|block_?size|cache_?type|acl|version|timeout|retries|protocol|addressing_style"
    r"|profile|project|bucket|host|port|account_name|mode|path|dir|consistency|location))$"
)
"""Filesystem options, by the end of their names, whose values may be shown."""
_SECRET_VARIABLE: Final = re.compile(
    r"(?i)secret|token|passw|credential|access_?key|account_?key|sas|connection_string|api_?key"
)
_LEAST_SECRET: Final = 6
_NAMES: Final = "categories"
"""Key of the names of masks."""

Span = tuple[int, int]


def redact(text: object) -> str:
    """Replace every credential in `text`, a URI or a text with URIs, with `***`. Idempotent."""
    text = str(text)
    return _without(text, _spans(text)) if _may_hold_any(text) else text


def has_credentials(uri: str) -> bool:
    """Whether the URI has something that `redact` would hide."""
    return _may_hold_any(uri) and redact(uri) != uri


def is_redacted(uri: str) -> bool:
    """Whether credentials of the URI were hidden: it identifies an image, but may not suffice to read it."""
    return f"//{HIDDEN}@" in uri or f"={HIDDEN}" in uri or f"?{HIDDEN}" in uri


def redact_error(error: object, uri: str = "") -> str:
    """The redacted text of a storage client's error, which may quote the requested URI in any encoding, or credentials
    from the environment."""
    text = str(error)
    if uri:
        text = text.replace(uri, redact(uri))
    secrets = {*_secrets_of(uri), *_secrets_of_environment()}
    forms = {form for secret in secrets for form in (secret, unquote(secret), quote(secret, ""), quote(secret))}
    # Longest first: a short secret may be part of a long one, whose rest would then stay.
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return redact(text)


def _may_hold_any(text: str) -> bool:
    # A cheap test first: most texts have no credentials.
    return ":/" in text or "?" in text or "asic " in text.lower() or "earer " in text.lower()


def _without(text: str, spans: Iterator[Span]) -> str:
    shown, last = [], 0
    for start, end in sorted(spans):
        if start >= last:
            # Spans may overlap; what is already hidden is left out.
            shown += [text[last:start], HIDDEN]
            last = end
    return "".join(shown) + text[last:]


# --- where the credentials are -------------------------------------------------------------------------------------


def _spans(text: str) -> Iterator[Span]:
    """Start and end of each credential in the text."""
    schemes = list(_SCHEME.finditer(text))
    yield from _free_spans(text, 0, schemes[0].start() if schemes else len(text))
    # A text that is one URI may contain spaces; within a sentence a URI ends at the first space.
    is_only_uri = bool(schemes) and schemes[0].start() == 0 and not re.search(r"[:;,.] |\n", text)
    for i, scheme in enumerate(schemes):
        start, end = scheme.end(), schemes[i + 1].start() if i + 1 < len(schemes) else len(text)
        if (length := _userinfo_length(text[start:end], scheme[1].lower(), is_only_uri)) > 0:
            yield start, start + length - 1  # the @ stays
            start += length
        uri = text[start:end] if is_only_uri else re.match(r"\S*", text[start:end])[0]  # type: ignore[index]
        if query := _QUERY.search(uri):
            at = start + query.end()
            is_web = scheme[1].lower() in ("http", "https")
            yield from _query_spans(
                text, at, start + len(uri), is_only_uri=is_only_uri, bare=is_web and query[0] == "?"
            )
        yield from _free_spans(text, start + len(uri), end)


def _userinfo_length(rest: str, scheme: str, is_only_uri: bool) -> int:
    """Length of user name and password, with their @, at the start of `rest` (what follows `scheme://`); 0 if none.

    Accepts passwords as people write them: with slashes, `@`, `?`, quotes and spaces that should be encoded.
    """
    if scheme in _NO_HOST:
        return 0
    user = re.match(r"[^/?#@:\n]*" if is_only_uri else r"[^/?#@:\s]*", rest)
    assert user is not None
    run = rest if is_only_uri else re.match(r"\S*", rest)[0]  # type: ignore[index]
    # The colons of an IPv6 address do not start a password.
    if _IPV6_HOST.match(rest):
        return 0
    if rest[user.end() :].startswith("@"):
        if scheme in _CONTAINER_AT_ACCOUNT:
            return 0
        # Several @: all before the last one of the host part is user and password.
        authority = re.match(r"[^/?#\s]*", rest)
        assert authority is not None
        end = authority[0].rindex("@") + 1
        return end + _userinfo_length(rest[end:], scheme, is_only_uri)
    if not rest[user.end() :].startswith(":"):
        return 0
    secret = rest[user.end() + 1 :]
    at = run.rfind("@") + 1
    # A port after the colon, unless an @ and a host follow: then the digits start a password.
    if scheme not in _BUCKET_FIRST and _PORT.match(secret):
        return at if at and _HOST.match(rest, at) and "/" in rest[at:] else 0
    if secret[:1].isspace():
        return 0  # the colon of a sentence
    if not at:  # a password with spaces
        line = rest[: rest.find("\n")] if "\n" in rest else rest
        at = line.rfind("@", 0, 300) + 1
        return at if at and re.match(r"[A-Za-z0-9_.\-]+(?:[:/?]|$)", line[at:]) else 0
    return at


def _query_spans(text: str, start: int, end: int, *, is_only_uri: bool, bare: bool) -> Iterator[Span]:
    """The values in `name=value&...` from start to end. bare: a query without a name may also be a token."""
    for part in _PART.finditer(text, start, end):
        parameter = _PARAMETER.match(text, part.start(), end)
        if parameter is None:
            item = part[0] if is_only_uri else part[0].rstrip(_TRAILING)
            # ?eyJhbGciOi... may be a token as a whole; a file name like ?photo.jpg is not.
            if bare and len(item) >= 8 and not _PLAIN_NAME.fullmatch(item) and item.lower() not in _HARMLESS_NAMES:
                yield part.start(), part.start() + len(item)
            continue
        first, last = parameter.span("value")
        value = text[first:last]
        if not is_only_uri:
            value = value.rstrip(_TRAILING)
        if not _is_harmless(parameter["name"], value):
            yield first, first + len(value)


def _is_harmless(name: str, value: str) -> bool:
    if value == HIDDEN or _SHORT.fullmatch(value):
        return True
    plain = unquote(value)
    most = _MOST_OF_A_LETTER if len(name) == 1 else _MOST_HARMLESS
    known = name.lower() in _HARMLESS_NAMES and len(value) <= most
    # A harmless name may hold another URL with its own signature, as in ?src=https://...
    return known and not any(mark in plain for mark in ("://", "=", "?", "@"))


def _free_spans(text: str, start: int, end: int) -> Iterator[Span]:
    """Outside of URIs: queries of paths, as some clients quote them, and headers."""
    for query in _FREE_QUERY.finditer(text, start, end):
        yield from _query_spans(text, query.start() + 1, query.end(), is_only_uri=False, bare=False)
    for header in _HEADER.finditer(text, start, end):
        yield header.span("value")


# --- which they are ------------------------------------------------------------------------------------------------


def _secrets_of(uri: str) -> Iterator[str]:
    for start, end in _spans(uri):
        hidden = uri[start:end]
        for secret in (hidden, hidden.partition(":")[2]):
            # A short string would be replaced everywhere in the text.
            if len(secret) >= _LEAST_SECRET:
                yield secret


def _secrets_of_environment() -> Iterator[str]:
    """Keys and passwords from fsspec's configuration (`FSSPEC_*`, ~/.config/fsspec) or the environment."""
    from fsspec.config import conf

    yield from _secret_options(conf)
    for name, value in os.environ.items():
        # A path, as in AWS_WEB_IDENTITY_TOKEN_FILE, is not the secret itself.
        if _SECRET_VARIABLE.search(name) and len(value) >= _LEAST_SECRET and not os.path.exists(value):
            yield value


def _secret_options(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_options(value)
        elif isinstance(value, str) and len(value) >= _LEAST_SECRET and not _HARMLESS_OPTIONS.match(str(name)):
            yield value


def redact_json(value: Any) -> Any:
    """A JSON round trip of the value, without the credentials in its strings. `categories` stay as they are: masks have
    the same names, and "basic armchair" looks like a header."""
    if isinstance(value, Mapping):
        return {redact(str(key)): item if key == _NAMES else redact_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_json(item) for item in value]
    return redact(value) if isinstance(value, str) else value
