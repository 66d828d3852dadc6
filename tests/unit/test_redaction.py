"""What `storage.redact` hides, in as many forms as credentials come, and what it leaves."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from samray import storage
from samray.inputs.rows import redact_all

S = "sEcReT"  # every form below holds it, and what is shown must not

FORMS = {
    "password": f"https://user:{S}@host/x.jpg",
    "ftp": f"ftp://user:{S}@host/x.jpg",
    "sftp with port": f"sftp://user:{S}@host:22/x.jpg",
    "token as user": f"https://{S}@host/x.jpg",
    "empty user": f"https://:{S}@host/x.jpg",
    "empty password": f"https://{S}:@host/x.jpg",
    "AWS secret": f"s3://AKIA123:ab{S}cd@bucket/x.jpg",
    "AWS secret with a slash": f"s3://AKIA123:ab/{S}@bucket/x.jpg",
    "AWS secret with slashes and plus": f"s3://AKIA123:{S}/a+b/{S}@bucket/x.jpg",
    "secret of digits and a slash": f"s3://AKIA123:123/{S}@bucket/x.jpg",
    "web password of digits and a slash": f"https://user:123/{S}@example.org/x.jpg",
    "secret that ends with a slash": f"s3://AKIA123:{S}/@bucket/x.jpg",
    "password with @": f"https://user:a@{S}@host/x.jpg",
    "password with @ and a slash": f"https://user:a@b/{S}@host/x.jpg",
    "user with @": f"https://me@example.org:{S}@host/x.jpg",
    "password with a quote": f"https://user:a'{S}@host/x.jpg",
    "password with a double quote": f'https://user:a"{S}@host/x.jpg',
    "password with a space": f"https://user:a {S}@host/x.jpg",
    "password with a colon": f"https://user:a:{S}@host/x.jpg",
    "password with a question mark": f"https://user:a?{S}@host/x.jpg",
    "password with a hash": f"https://user:a#{S}@host/x.jpg",
    "password with an ampersand": f"https://user:a&{S}=b@host/x.jpg",
    "password with brackets": f"https://user:<{S}>@host/x.jpg",
    "encoded password": f"https://user:a%40{S}%2F@host/x.jpg",
    "password of other letters": f"https://user:pä{S}ß@host/x.jpg",
    "X-Amz-Signature": f"https://h/x.jpg?X-Amz-Algorithm=AWS4&X-Amz-Signature={S}",
    "X-Amz-Credential": f"https://h/x.jpg?X-Amz-Credential={S}%2F2026%2Fs3&v=1",
    "X-Amz-Security-Token": f"https://h/x.jpg?X-Amz-Security-Token={S}",
    "X-Goog-Signature": f"https://h/x.jpg?X-Goog-Signature={S}",
    "Signature": f"https://h/x.jpg?AWSAccessKeyId=AKIA&Expires=1&Signature={S}%3D",
    "sig": f"https://a.blob.core.windows.net/c/x.jpg?sv=2022&sp=r&sig={S}%3D",
    "token": f"https://h/x.jpg?token={S}",
    "access_token": f"https://h/x.jpg?access_token={S}",
    "code": f"https://h/x.jpg?code={S}",
    "auth": f"https://h/x.jpg?auth={S}",
    "key": f"https://h/x.jpg?key={S}",
    "hmac": f"https://h/x.jpg?w=640&hmac={S}&h=480",
    "a name that nobody knows": f"https://h/x.jpg?zzz={S}",
    "a hash under the name of a size": f"https://h/x.jpg?w=640&h=0123456789abcdef{S}",
    "an encoded name": f"https://h/x.jpg?%73ig={S}",
    "an array": f"https://h/x.jpg?sig[]={S}",
    "upper case": f"https://h/x.jpg?SIG={S}",
    "value with a quote": f"https://h/x.jpg?sig=a'{S}",
    "value with a double quote": f'https://h/x.jpg?sig=a"{S}',
    "value with a space": f"https://h/x.jpg?sig=a {S}",
    "value with =": f"https://h/x.jpg?sig=a={S}==",
    "value with ?": f"https://h/x.jpg?sig=a?{S}",
    "value with a slash": f"https://h/x.jpg?sig=a/{S}/b",
    "semicolons": f"https://h/x.jpg?v=1;sig={S}",
    "path parameter": f"https://h/x.jpg;jsessionid={S}",
    "fragment": f"https://h/x.jpg#access_token={S}",
    "query without a name": f"https://h/x.jpg?{S}{S}",
    "URL in a harmless parameter": f"https://h/fetch?image=https%3A%2F%2Fu%3A{S}%40i%2Fx.jpg",
    "URL in a harmless parameter, not encoded": f"https://h/fetch?image=https://u:{S}@i/x.jpg",
    "harmless parameter that holds a query": f"https://h/fetch?path=x.jpg%3Fsig%3D{S}",
    "member of a tar": f"tar://a/b.jpg::https://user:{S}@host/x.tar",
    "member of a signed tar": f"tar://a/b.jpg::https://host/x.tar?sig={S}",
    "row of Parquet": f"s3://K:{S}@b/x.parquet#row=3",
    "chain": f"simplecache::s3://KEY:a/{S}@bucket/x.jpg",
    "scheme in capitals": f"HTTPS://user:{S}@host/x.jpg",
    "one slash": f"s3:/KEY:a/{S}@bucket/x.jpg",
    "both": f"https://user:{S}@host/x.jpg?sig={S}",
}
TEXTS = {
    "in a sentence": f"cannot read https://user:{S}@host/x.jpg: permission denied",
    "in quotes": f"404, message='Not Found', url='https://host/x.jpg?sig={S}'",
    "in brackets": f"<Response [403]> (https://host/x.jpg?sig={S}), see https://docs/",
    "relative": f"Max retries exceeded with url: /x.jpg?sig={S} (Caused by ...)",
    "two URIs": f"s3://K:a/{S}@b/x and https://u:{S}@h/y differ",
    "two lines": f"first https://u:{S}@h/x\nthen https://h/x?sig={S}",
    "bearer": f"headers: Authorization: Bearer {S}{S}",
    "basic": f"{{'Authorization': 'Basic {S}dXNlcg=='}}",
}


@pytest.mark.parametrize("form", [*FORMS, *TEXTS])
def test_credentials_are_hidden(form: str) -> None:
    text = (FORMS | TEXTS)[form]
    shown = storage.redact(text)
    assert S not in shown
    assert "***" in shown
    assert storage.redact(shown) == shown


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sentence", ["cannot read {}: it does not exist", "'{}'", 'url="{}"', "({}), and more"])
def test_credentials_are_hidden_in_errors_that_quote_the_uri(form: str, sentence: str) -> None:
    uri = FORMS[form]
    assert S not in storage.redact_error(ValueError(sentence.format(uri)), uri)


@pytest.mark.parametrize("form", [form for form in FORMS if "space" not in form])
def test_credentials_are_hidden_in_sentences(form: str) -> None:
    assert S not in storage.redact(f"cannot read {FORMS[form]}: it does not exist")


@pytest.mark.parametrize(
    "harmless",
    [
        "/home/a@b/c?d=e",
        "/data/photos/a:b@2x.jpg",
        "s3://b/user@example/x.jpg",
        "s3://bucket/photos/icon@2x.jpg",
        "https://host:8080/photos/icon@2x.jpg",
        "https://host/x.jpg?v=7&w=640&name=cat.jpg",
        "https://host/x?versionId=3LgKq9wxyzA",
        "https://host/x.parquet#row=12345",
        "https://host/image?id=12345678",
        "abfs://container@account.dfs.core.windows.net/x.jpg",
        "tar://a:b@c.jpg::/data/x.tar",
        "s3://b/img_????.png",
        "hdfs://namenode:8020/a/b@2x.jpg",
        "http://[::1]:9000/bucket/img@2x.jpg",
        "http://[fe80::1%eth0]/bucket/img@2x.jpg",
        "cannot read s3://bucket: it does not exist; write to me@example.org",
        "unknown setting masks.x; did you mean masks.y?",
        "Basic English, bearer of news",
    ],
)
def test_all_else_is_left(harmless: str) -> None:
    assert storage.redact(harmless) == harmless
    assert not storage.has_credentials(harmless)
    assert not storage.is_redacted(harmless)


@pytest.mark.parametrize(
    ("uri", "is_fast"),
    [
        ("https://host:80/a/b.jpg?w=640&H=-4.5&", True),
        ("https://host/ü.jpg?id=abc_DEF~1&page=2", True),
        ("https://host/x.jpg?", True),
        ("x.jpg?v=7", True),
        ("https://host/x.jpg?w=640&sig=abcdef", False),
        ("https://host/x.jpg?w=640#a", False),
        *((form, False) for form in FORMS.values()),
    ],
)
def test_the_fast_pattern_matches_nothing_that_is_hidden(uri: str, is_fast: bool) -> None:
    assert pc.match_substring_regex(pa.scalar(uri), storage.HARMLESS_QUERY).as_py() == is_fast
    assert not is_fast or storage.redact(uri) == uri
    texts = pa.chunked_array([[None, uri], [], ["s3://b/x", uri]], pa.string())
    assert redact_all(texts).to_pylist() == [None, storage.redact(uri), "s3://b/x", storage.redact(uri)]


def test_what_remains_says_which_file_is_meant() -> None:
    assert storage.redact("s3://AKIA:se/cr+et@bucket/a/b.jpg") == "s3://***@bucket/a/b.jpg"
    shown = storage.redact("https://h/x.jpg?w=640&X-Amz-Signature=abcdef&v=7")
    assert shown == "https://h/x.jpg?w=640&X-Amz-Signature=***&v=7"
    assert storage.is_redacted(shown)
    assert storage.is_redacted("s3://***@bucket/a/b.jpg")


def test_errors_do_not_quote_credentials_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"key": "AKIA-of-conf", "secret": "conf/se+cret", "endpoint_url": "http://h:9000"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env/se+cret")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2022&sig=abcdefgh")
    quoted = "AKIA-of-conf, conf/se+cret, env/se+cret, env%2Fse%2Bcret, sv=2022&sig=abcdefgh"
    shown = storage.redact_error(ValueError(f"http://h:9000 refuses {quoted}"))
    assert shown == "http://h:9000 refuses ***, ***, ***, ***, ***"


def test_long_hostile_texts_take_no_time() -> None:
    pieces = ("a", "a://", "?a=", "a://u:", "@", "a:b@", "?", "a://a:1/@b.c/", " ?a=b", "basic ", "a://h ", "x=", "a:")
    for piece in pieces:  # each takes minutes if any step is quadratic
        for start in ("", "https://u:"):
            storage.redact(start + piece * 10_000)
