"""The response parser and sloppy responses, cut into segments in many ways."""

import time

import pytest
import receivers
from client import send
from receivers import head
from sloppy import OK, SLOPPY, status_of
from support import until

from relay.delivery.http.response import (
    HEAD_LIMIT,
    INTERIM_LIMIT,
    KEEP_LIMIT,
    LINE_LIMIT,
    READ_LIMIT,
    WIRE_LIMIT,
    ResponseParser,
)
from relay.delivery.http.result import of_status

pytestmark = pytest.mark.usefixtures("silence")

MOST_CUTS = 300


def read(pieces, *, ends=True):
    """Parse a response in these pieces; return its attributes."""
    reply = ResponseParser()
    for piece in pieces:
        reply.feed(piece)
    over = reply.is_over
    if ends:
        reply.end()
    known = (reply.status, reply.reason, reply.headers, bytes(reply.body), reply.whole, reply.trouble)
    return (*known, reply.keeps, reply.excess, over)


def cuts(data):
    """Return offsets to cut at: all of them, or those at both ends and some between."""
    if len(data) <= MOST_CUTS:
        return range(1, len(data))
    step = len(data) // MOST_CUTS
    return sorted({*range(1, 100), *range(100, len(data), step), *range(len(data) - 50, len(data))})


def segmentations(data):
    """Cut a response in two at every offset, into single bytes, and after each line."""
    yield from ((data[:at], data[at:]) for at in cuts(data))
    yield [data[at : at + 1] for at in range(len(data))]
    yield data.splitlines(keepends=True)


@pytest.mark.parametrize("name", SLOPPY)
def test_segmentation_does_not_change_the_response(name):
    data = SLOPPY[name][0]
    whole = read([data])
    assert whole[0] == status_of(name)
    for pieces in segmentations(data):
        assert read(pieces) == whole, pieces


@pytest.mark.parametrize("name", SLOPPY)
@pytest.mark.parametrize("cut", ["whole", "status line", "head", "lines"])
async def test_a_complete_status_line_decides(client_for, name, cut):
    data, status = SLOPPY[name][0], status_of(name)
    at = {"whole": len(data), "status line": data.find(b"\n") + 1, "head": data.find(b"\n\r\n") + 3}.get(cut)
    pieces = data.splitlines(keepends=True) if at is None else [data[:at], data[at:]]
    if len(pieces) > MOST_CUTS // 10:
        pieces = [data[:100], data[100:]]
    async with receivers.sends_in_pieces(pieces=pieces) as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.status == status
        assert answer.result == ("protocol" if status is None else of_status(status))
        assert len(receiver.requests) == 1


async def test_retry_headers_of_an_error_response_count_even_if_the_head_is_broken(client_for):
    broken = b"HTTP/1.1 503 Wait\r\nnonsense\r\nRetry-After: 7\r\nRetry-After: 9\r\nContent-Length: x\r\n\r\n"
    async with receivers.sends(answer=broken) as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.status, answer.headers) == (503, {"retry-after": "7"})


@pytest.mark.parametrize("status", ["204 No Content", "200 OK"])
async def test_late_bytes_after_a_response_do_not_fail_a_later_attempt(client_for, status):
    async with receivers.sends_more_later(status=status) as receiver:
        client = client_for()
        answers = [await send(client, receiver.url) for _ in range(20)]
        assert {answer.result for answer in answers} == {"ok"}
        assert len(receiver.requests) <= 21  # the first one reads the rest of its predecessor


async def test_after_excess_bytes_no_connection_is_kept_for_a_while(client_for, monkeypatch):
    monkeypatch.setattr("relay.delivery.http.http_client.DISTRUST", 1.0)
    async with receivers.sends_more_later(status="200 OK") as sloppy, receivers.answers() as tidy:
        client = client_for()
        await send(client, sloppy.url)
        await until(lambda: client._distrusted_until)  # the late bytes are noticed
        await send(client, tidy.url)
        await send(client, tidy.url)
        assert tidy.connections == 2
        await until(lambda: time.perf_counter() >= client._distrusted_until)
        await send(client, tidy.url)
        await send(client, tidy.url)
        assert tidy.connections == 3


KEPT = {
    "HTTP/1.1": (head(content_length=2) + b"ok", True),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
    "HTTP/1.0 with the wish": (
        b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 2\r\n\r\nok",
        True,
    ),
    "the wish to close": (head(content_length=2, connection="keep-alive, Close") + b"ok", False),
    "chunks": (head(transfer_encoding="chunked") + b"2;x=y\r\nok\r\n0\r\nTrailer: a\r\n\r\n", True),
    "a 204": (head("204 No Content"), True),
    "a 204 with a length": (head("204 No Content", content_length=2), False),
    "a 304 with a length": (head("304 Not Modified", content_length=2), False),
    "length and chunks": (head(content_length=2, transfer_encoding="chunked") + b"0\r\n\r\n", False),
    "more than announced": (head(content_length=2) + b"okay", False),
    "a broken header": (OK + b"nonsense\r\nContent-Length: 0\r\n\r\n", False),
    "too many headers": (OK + b"X: y\r\n" * 200 + b"\r\n", False),
    "switching protocols": (head("101 Switching Protocols", content_length=0), False),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_connection_is_kept_only_after_a_clean_response(name):
    data, keeps = KEPT[name]
    for pieces in ([data], *segmentations(data)):
        assert read(pieces, ends=False)[-3] == keeps, pieces


@pytest.mark.parametrize("count", [INTERIM_LIMIT, INTERIM_LIMIT + 1])
def test_responses_of_class_1xx_have_a_limit(count):
    data = head("102 Processing") * count + head(content_length=0)
    whole = read([data])
    assert whole[0] == (200 if count == INTERIM_LIMIT else None)
    assert read([data[at : at + 7] for at in range(0, len(data), 7)]) == whole


def test_a_body_is_read_and_kept_up_to_its_limits():
    for size, whole in ((KEEP_LIMIT, True), (KEEP_LIMIT + 1, False), (READ_LIMIT, False)):
        reply = ResponseParser()
        reply.feed(head(content_length=size) + bytes(size))
        assert (len(reply.body), reply.whole, reply.keeps) == (min(size, KEEP_LIMIT), whole, True)
    reply = ResponseParser()
    reply.feed(head(content_length=READ_LIMIT + 1) + bytes(READ_LIMIT + 1))
    assert (len(reply.body), reply.whole, reply.keeps, reply.is_over) == (KEEP_LIMIT, False, False, True)


ENDLESS = {
    "announcements": (b"", head("103 Early Hints"), None),
    "one announcement": (b"HTTP/1.1 103 Hints\r\n", b"X: y\r\n", None),
    "a status line": (b"HTTP/1.1 200 ", b"x", None),
    "empty lines": (b"", b"\r\n", None),
    "headers": (OK, b"X: y\r\n", 200),
    "a header": (OK + b"X: ", b"y", 200),
    "a body": (OK + b"\r\n", b"x", 200),
    "chunks": (head(transfer_encoding="chunked"), b"1\r\nx\r\n", 200),
    "remarks behind chunk sizes": (
        head(transfer_encoding="chunked"),
        b"1;" + b"r" * 8000 + b"\r\nx\r\n",
        200,
    ),
    "a remark": (head(transfer_encoding="chunked") + b"1;", b"r", 200),
    "trailers": (head(transfer_encoding="chunked") + b"0\r\n", b"X: y\r\n", 200),
    "a trailer": (head(transfer_encoding="chunked") + b"0\r\nX: ", b"y", 200),
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("size", [1000, 2**18])
def test_an_endless_response_is_cut_off(name, size):
    start, more, status = ENDLESS[name]
    reply = ResponseParser()
    reply.feed(start)
    fed = 0
    stream = more * (2 * WIRE_LIMIT // len(more))
    while not reply.is_over:
        assert fed < 1.5 * WIRE_LIMIT
        reply.feed(stream[fed : fed + size])
        fed += size
    assert (reply.status, reply.keeps) == (status, False)
    assert len(reply._pending) <= max(HEAD_LIMIT, LINE_LIMIT)
