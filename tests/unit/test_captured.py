"""Captured requests, in the forms that tools write."""

import base64
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.diagnosis.captured import read_captured

BODY = b'{\r\n  "a": 1\r\n}'
RAW = b"POST /hook?x=1 HTTP/1.1\r\nHost: a\r\nX-One: 1\r\nContent-Length: 14\r\n\r\n" + BODY


def read(content, body=None):
    return read_captured(content, body)


@pytest.mark.parametrize(
    "content",
    [
        RAW,
        b"\xef\xbb\xbf" + RAW,
        b"\n\n" + RAW,
        RAW + b"\n",  # an editor's
        RAW.replace(b"\r\nX-One: 1", b"\nX-One:1"),
        RAW.replace(b"\r\n\r\n" + BODY, b"\n\n" + BODY),
        b"POST /hook?x=1\r\n" + RAW.partition(b"\r\n")[2],
        json.dumps(
            {"method": "post", "path": "/hook?x=1", "headers": {"X-One": ["1"]}, "body": BODY.decode()}
        ).encode(),
        json.dumps(
            {"path": "/hook?x=1", "headers": {"x-one": "1"}, "body_base64": base64.b64encode(BODY).decode()}
        ).encode(),
    ],
)
def test_the_same_request_is_read_from_every_form(content):
    captured = read(content)
    assert (captured.method, captured.target, captured.headers["x-one"]) == ("POST", "/hook?x=1", "1")
    assert captured.body == BODY
    assert captured.findings == ()


def test_line_ends_changed_by_an_editor_are_restored():
    unix = BODY.replace(b"\r\n", b"\n")
    captured = read(RAW.replace(BODY, unix))
    assert captured.body == BODY
    assert "from CRLF to LF" in captured.notes[0]
    captured = read(RAW.replace(b"14", b"12"))
    assert captured.body == unix
    assert "from LF to CRLF" in captured.notes[0]


def test_text_after_the_body_is_ignored_and_reported():
    captured = read(RAW + b"POST /next HTTP/1.1\r\n\r\n")
    assert captured.body == BODY
    assert captured.notes == ("only the first 14 bytes were used, as in Content-Length",)


@pytest.mark.parametrize(
    ("body", "message"),
    [(BODY[:-4], "truncated: 10 of 14 bytes"), (BODY[:-1], "a newline at the end may have been lost")],
)
def test_a_truncated_body_is_a_finding(body, message):
    [finding] = read(RAW.replace(BODY, body)).findings
    assert (finding.cause, finding.where) == ("bytes", "body")
    assert message in finding.what


def test_an_invalid_length_is_a_finding():
    [finding] = read(RAW.replace(b"14", b"many")).findings
    assert finding.what == "invalid Content-Length: 'many'"
    assert read(RAW.replace(b"14", b"{auto}") + b"\n").body == BODY


def test_chunks_are_joined_unless_they_already_are():
    head = RAW.partition(b"\r\n\r\n")[0].replace(b"Content-Length: 14", b"Transfer-Encoding: chunked")
    chunks = b"4;x=y\r\n" + BODY[:4] + b"\r\na\r\n" + BODY[4:] + b"\r\n0\r\n\r\n"
    assert read(head + b"\r\n\r\n" + chunks).body == BODY
    assert read(head + b"\r\n\r\n" + BODY).body == BODY
    assert read(head + b"\r\n\r\n" + chunks[:12]).body == chunks[:12]


CURL = b"""\
*   Trying 127.0.0.1:8080...
* Connected to localhost (127.0.0.1) port 8080
> POST /hook?x=1 HTTP/1.1
> Host: localhost:8080
> X-One: 1
> Content-Length: 14
>\x20
} [14 bytes data]
< HTTP/1.1 401 Unauthorized
< X-One: 2
<\x20
{"error": 1}
"""


@pytest.mark.parametrize("content", [CURL, CURL.replace(b"\n", b"\r\n")])
def test_the_output_of_curl_is_read_with_a_separate_body(content):
    captured = read(content, BODY)
    assert (captured.method, captured.target, captured.headers["X-One"]) == ("POST", "/hook?x=1", "1")
    assert (captured.body, captured.findings) == (BODY, ())
    assert captured.notes == ("`curl -v` prints no body",)
    [finding] = read(content).findings
    assert "truncated: 0 of 14 bytes" in finding.what
    assert "--data @FILE" in finding.do


def test_headers_alone_are_a_request_without_a_known_path():
    captured = read(b"webhook-id: evt_1\nHTTP_WEBHOOK_TIMESTAMP: 12\n\n{}")
    assert (captured.method, captured.target, captured.body) == ("POST", "", b"{}")
    assert captured.headers["webhook-timestamp"] == "12"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a request"),
        (b"hello\n\nbody", "expected a request"),
        (b"POST / HTTP/1.1\nA: b\ns3cret\n\n", "header 2 has no name; expected a request"),
        (b"{", "invalid JSON: "),
        (b'{"body": {"a": 1}}', "give the body as text, or as body_base64"),
        (b'{"body_base64": "?"}', "invalid JSON: "),
    ],
)
def test_an_invalid_capture_is_an_error(content, message):
    with pytest.raises(ValueError, match=r".") as error:
        read(content)
    assert message in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_header_broken_into_lines_is_joined_and_reported():
    captured = read(b"POST / HTTP/1.1\r\nAuthorization: Bearer abc\r\n  def\r\nHost: a\r\n\r\n")
    assert captured.headers["Authorization"] == "Bearer abcdef"
    assert captured.notes == ("lines that begin with a space were joined to the previous header",)


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda raw: RAW[:60] + raw))
def test_any_bytes_are_a_request_or_an_error(content):
    with contextlib.suppress(ValueError):
        assert read(content).method.isalpha()
