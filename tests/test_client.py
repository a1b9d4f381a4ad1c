"""The client against the zoo: typed results, ended in time, flat memory, a silent log."""

import asyncio
import gzip
import hashlib
import logging
import socket
import threading
import time
import tracemalloc

import pytest
import receivers
from receivers import Certificates, head

from relay import __version__
from relay.config.model import DestinationConfig
from relay.delivery import resolver as resolver_module
from relay.delivery.answer import RESULTS, of_failure, of_status, one_line
from relay.delivery.client import KEEP_LIMIT, READ_LIMIT, Client
from relay.errors import RelayError

SHORT = 0.2  # seconds, for what only a timeout ends
AMPLE = 10.0  # seconds, for what must end by itself
GRACE = 0.2  # seconds that an attempt may last beyond its timeout


@pytest.fixture(autouse=True)
async def silence(caplog):
    """Fail a test after which anything of a receiver's doing shows in the log."""
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    caplog.set_level(logging.INFO)
    yield
    assert complaints == []
    assert [record.getMessage() for record in caplog.records] == []


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def client_for():
    """Make clients that are closed at the end."""
    clients = []

    def make(timeout=AMPLE, **settings):
        settings = {"connect_timeout": AMPLE, "allow_private": True, **settings}
        clients.append(Client(DestinationConfig(name="zoo", url="", timeout=timeout, **settings)))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


def name(value):
    """Name a case by its receiver alone."""
    return getattr(value, "__name__", "")


async def send(client, url, body=b"{}", **headers):
    return await client.send(url, {"content-type": "application/json", **headers}, body)


ENDS = [
    # what the receiver is like, the result, the status, a part of the error
    (receivers.hang, "timeout", None, "no answer within 200ms"),
    (receivers.never_reads, "timeout", None, "no answer within"),
    (receivers.hang_in_head, "timeout", None, "no answer within"),
    (receivers.drip_head, "timeout", None, "no answer within"),
    (receivers.hang_in_body, "ok", 200, "body was not complete within 200ms"),
    (receivers.drip_body, "5xx", 500, "body was not complete within"),
]


@pytest.mark.parametrize(("make", "result", "status", "error"), ENDS, ids=name)
async def test_a_receiver_that_stalls_is_left_at_the_total_timeout(client_for, make, result, status, error):
    async with make() as receiver:
        client, started = client_for(SHORT), time.perf_counter()
        answer = await send(client, receiver.url)
        lasted = time.perf_counter() - started
        assert (answer.result, answer.status) == (result, status)
        assert error in answer.error
        assert SHORT * 0.9 < lasted < SHORT + GRACE  # uvloop's clock ticks in milliseconds
        assert SHORT * 900 < answer.duration_ms <= lasted * 1000


async def test_an_upload_that_nobody_reads_is_left_at_the_total_timeout(client_for):
    async with receivers.never_reads() as receiver:
        client, started = client_for(SHORT), time.perf_counter()
        answer = await send(client, receiver.url, body=bytes(32 * 2**20))
        assert answer.result == "timeout"
        assert time.perf_counter() - started < SHORT + GRACE


async def test_a_connect_that_hangs_is_left_at_the_connect_timeout(client_for, certificates):
    async with receivers.never_reads(scheme="https") as receiver:  # takes TCP, never answers TLS
        client = client_for(AMPLE, connect_timeout=SHORT, ca_file=certificates.ca)
        started = time.perf_counter()
        answer = await send(client, receiver.url)
        assert (answer.result, answer.error) == ("timeout", "no connection to 127.0.0.1 within 200ms")
        assert time.perf_counter() - started < SHORT + GRACE


TOO_MUCH = [
    # what the receiver is like, the result, the status, a part of the error
    (receivers.endless_headers, "protocol", None, "Too many headers"),
    (receivers.informational_flood, "protocol", None, "far more than an answer"),
    (receivers.many_headers, "protocol", None, "Too many headers"),
    (receivers.huge_header, "protocol", None, "more than 8190 bytes"),
    (receivers.huge_status_line, "protocol", None, "more than 8190 bytes"),
    (receivers.huge_body, "ok", 200, None),
    (receivers.endless_chunks, "ok", 200, None),
    (receivers.endless_chunk_extension, "ok", 200, "far more than an answer"),
    (receivers.endless_trailers, "protocol", None, "Too many headers"),
    (receivers.gzip_bomb, "ok", 200, None),
]


@pytest.mark.parametrize(("make", "result", "status", "error"), TOO_MUCH, ids=name)
async def test_a_receiver_that_sends_too_much_costs_neither_time_nor_memory(
    client_for, make, result, status, error
):
    async with make() as receiver:
        client = client_for()
        await send(client, receiver.url)  # what is loaded and cached at first use is not counted
        before_sent = receiver.sent
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            answer = await send(client, receiver.url)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (answer.result, answer.status, answer.truncated) == (result, status, result == "ok")
        assert error is answer.error is None or error in answer.error
        assert len(answer.body) <= KEEP_LIMIT
        assert peak - before < 2**20
        assert answer.duration_ms < 2000
        assert receiver.sent - before_sent < 30 * 2**20  # socket buffers of loopback, for the most part


async def test_a_flood_over_tls_is_cut_off_as_well(client_for, certificates):
    async with receivers.huge_body(tls=certificates.server("good")) as receiver:
        answer = await send(client_for(ca_file=certificates.ca), receiver.url)
        assert (answer.result, answer.truncated, len(answer.body)) == ("ok", True, KEEP_LIMIT)
        await asyncio.wait_for(receiver.ended.wait(), 1)
        assert receiver.sent < 50 * 2**20


@pytest.mark.parametrize("nonsense", receivers.NONSENSE)
async def test_an_answer_that_is_none_is_a_protocol_failure(client_for, nonsense):
    async with receivers.says(answer=receivers.NONSENSE[nonsense]) as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.result == "protocol"
        assert answer.error.isprintable()
        assert 10 < len(answer.error) <= 300
        assert len(receiver.requests) == 1


@pytest.mark.parametrize("broken", receivers.BROKEN_BODIES)
async def test_a_yes_stays_a_yes_when_the_body_then_breaks(client_for, broken):
    async with receivers.breaks_its_body(answer=receivers.BROKEN_BODIES[broken]) as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status, answer.truncated) == ("ok", 200, True)
        assert answer.error.startswith("HTTP 200 OK; ")
        assert answer.duration_ms < 1000


@pytest.mark.parametrize("broken", receivers.BROKEN_BODIES)
async def test_a_body_that_breaks_together_with_its_head_is_a_typed_result(client_for, broken):
    """The parser of aiohttp forgets a head whose body is malformed in the same segment."""
    async with receivers.says(answer=receivers.BROKEN_BODIES[broken]) as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status) in (("ok", 200), ("protocol", None))
        assert answer.error is not None


@pytest.mark.parametrize(
    ("make", "result", "error"),
    [
        (receivers.closes_unanswered, "protocol", "closed the connection without an answer"),
        (receivers.resets, "connect", "Connection reset by peer"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_a_new_connection_that_dies_is_a_failure_and_not_tried_again(
    client_for, make, result, error, method
):
    async with make() as receiver:
        answer = await send(client_for(method=method), receiver.url)
        assert (answer.result, answer.status) == (result, None)
        assert error in answer.error
        assert receiver.connections == 1


async def test_a_connection_closed_before_the_request_is_a_failure_and_not_tried_again(client_for):
    async with receivers.closes_at_once() as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.result in ("connect", "protocol")  # whether the write or the read notices first
        assert receiver.connections == 1


async def test_a_yes_before_a_reset_stays_a_yes(client_for):
    async with receivers.resets_in_body() as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status, answer.body, answer.truncated) == ("ok", 200, b"begun", True)


async def test_a_port_that_nobody_listens_on_is_a_connect_failure(client_for):
    answer = await send(client_for(), f"http://127.0.0.1:{receivers.unused_port()}/")
    assert (answer.result, answer.status) == ("connect", None)
    assert answer.error.endswith("Connection refused")


# --- kept-alive connections ---------------------------------------------------------------------------


async def test_connections_are_kept_for_the_next_request(client_for):
    async with receivers.answers(body=b"fine") as receiver:
        client = client_for()
        for _ in range(5):
            assert (await send(client, receiver.url)).body == b"fine"
        assert (receiver.connections, len(receiver.requests)) == (1, 5)


@pytest.mark.parametrize("make", [receivers.closes_kept_alive, receivers.resets_kept_alive])
async def test_a_kept_connection_that_dies_is_replaced_within_the_attempt(client_for, make):
    async with make() as receiver:
        client = client_for()
        results = [(await send(client, receiver.url)).result for _ in range(5)]
        assert results == ["ok"] * 5
        assert len(receiver.requests) == 5


async def test_a_pool_full_of_dead_connections_fails_nobody(client_for):
    async with receivers.closes_kept_alive() as receiver:
        client = client_for()
        for _ in range(2):
            answers = await asyncio.gather(*(send(client, receiver.url) for _ in range(8)))
            assert [answer.result for answer in answers] == ["ok"] * 8


async def test_a_dead_connection_is_never_replaced_by_another_dead_one(client_for):
    async with receivers.closes_kept_alive() as receiver:
        client = client_for()
        await asyncio.gather(*(send(client, receiver.url) for _ in range(4)))
        assert [(await send(client, receiver.url)).result for _ in range(4)] == ["ok"] * 4


async def test_a_dead_connection_is_replaced_once_only(client_for):
    async with receivers.answers_once() as receiver:
        client = client_for()
        assert (await send(client, receiver.url)).result == "ok"
        assert (await send(client, receiver.url)).result == "protocol"
        assert receiver.connections == 2


async def test_an_answer_that_had_begun_is_not_asked_for_again(client_for):
    async with receivers.breaks_off_kept_alive() as receiver:
        client = client_for()
        assert (await send(client, receiver.url)).result == "ok"
        assert (await send(client, receiver.url)).result == "protocol"
        assert (receiver.connections, len(receiver.requests)) == (1, 2)


async def test_the_replacement_shares_the_total_timeout(client_for):
    async with receivers.answers() as receiver:
        client = client_for(SHORT)
        await send(client, receiver.url)
        receiver.habit = receivers.hang().habit  # for the next connection
        for task in receiver._tasks:
            task.cancel()
        started = time.perf_counter()
        assert (await send(client, receiver.url)).result == "timeout"
        assert time.perf_counter() - started < SHORT + GRACE


@pytest.mark.parametrize("make", [receivers.answers_before_reading, receivers.says_more_than_its_length])
async def test_a_connection_in_doubt_is_not_used_again(client_for, make):
    async with make() as receiver:
        client = client_for()
        first, second = [await send(client, receiver.url, body=bytes(4 * 2**20)) for _ in range(2)]
        assert first.result == second.result != "5xx"
        assert receiver.connections == 2


# --- what goes out ------------------------------------------------------------------------------------


async def test_a_request_has_our_headers_and_no_automatic_ones(client_for):
    async with receivers.answers() as receiver:
        await send(client_for(), receiver.url + "?a=b%2Fc", body=b'{"a":1}', **{"webhook-id": "evt_1"})
        (request,) = receiver.requests
        assert request.line == "POST /hook?a=b%2Fc HTTP/1.1"
        assert request.body == b'{"a":1}'
        assert request.headers == {
            "host": f"127.0.0.1:{receiver.port}",
            "user-agent": f"hookferry/{__version__}",
            "content-type": "application/json",
            "webhook-id": "evt_1",
            "content-length": "7",
        }


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("", "/"),
        ("/a%2Fb?sig=c%2Bd%2f%20e+f", "/a%2Fb?sig=c%2Bd%2f%20e+f"),
        ("/a/../b//c", "/a/../b//c"),
        ("?q=1", "/?q=1"),
        ("/ä b?q=ü", "/%C3%A4%20b?q=%C3%BC"),
        ("/a#fragment", "/a"),
    ],
)
async def test_a_url_goes_out_as_it_is_written(client_for, written, sent):
    async with receivers.answers() as receiver:
        await send(client_for(), receiver.url.removesuffix("/hook") + written)
        assert receiver.requests[0].line == f"POST {sent} HTTP/1.1"


async def test_a_user_and_password_in_the_url_become_basic_authentication(client_for):
    async with receivers.answers() as receiver:
        await send(client_for(), receiver.url.replace("//", "//user:p%40ss@"))
        assert receiver.requests[0].headers["authorization"] == "Basic dXNlcjpwQHNz"


async def test_the_method_and_the_user_agent_can_be_others(client_for):
    async with receivers.answers() as receiver:
        await send(client_for(method="PUT"), receiver.url, **{"User-Agent": "custom"})
        assert receiver.requests[0].line.startswith("PUT ")
        assert receiver.requests[0].headers["user-agent"] == "custom"


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3 * 2**20])
async def test_a_body_of_any_size_arrives_whole(client_for, size):
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with receivers.answers() as receiver:
        assert (await send(client_for(), receiver.url, body=body)).result == "ok"
        assert hashlib.sha256(receiver.requests[0].body).digest() == hashlib.sha256(body).digest()


async def test_cookies_are_forgotten(client_for):
    async with receivers.answers(set_cookie="session=1; Path=/") as receiver:
        client, url = client_for(), f"http://localhost:{receiver.port}/"  # an address would have none anyway
        await send(client, url)
        await send(client, url)
        assert "cookie" not in receiver.requests[1].headers


async def test_proxies_of_the_environment_are_ignored(client_for, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{receivers.unused_port()}")
    async with receivers.answers() as receiver:
        assert (await send(client_for(), receiver.url)).result == "ok"


async def test_a_header_with_a_line_break_is_refused_before_anything_is_sent(client_for):
    async with receivers.answers() as receiver:
        with pytest.raises(ValueError, match="control character"):
            await send(client_for(), receiver.url, **{"x-split": "a\r\nx-evil: b"})
        assert receiver.requests == []


# --- what comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "result", "error"),
    [
        ("200 OK", "ok", None),
        ("201 Created", "ok", None),
        ("204 No Content", "ok", None),
        ("299 Odd", "ok", None),
        ("400 Bad Request", "4xx", "HTTP 400 Bad Request"),
        ("404 Not Found", "4xx", "HTTP 404 Not Found"),
        ("410 Gone", "4xx", "HTTP 410 Gone"),
        ("429 Too Many Requests", "429", "HTTP 429 Too Many Requests"),
        ("500 ", "5xx", "HTTP 500"),
        ("503 Service\tUnavailable", "5xx", "HTTP 503 Service Unavailable"),
        ("599 \x1b[31mred", "5xx", "HTTP 599 ?[31mred"),
    ],
)
async def test_a_status_has_its_class_and_its_line(client_for, status, result, error):
    async with receivers.answers(status=status) as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status, answer.error) == (result, int(status[:3]), error)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 307, 308])
@pytest.mark.parametrize(
    "place", ["http://169.254.169.254/latest", "//127.0.0.1/", "/elsewhere", "\x80:nonsense"]
)
async def test_a_redirect_is_a_failure_that_names_the_place_and_goes_nowhere(client_for, status, place):
    async with receivers.answers(status=f"{status} Elsewhere", location=place) as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status) == ("3xx", status)
        assert one_line(place) in answer.error
        assert "redirects are never followed" in answer.error
        assert (receiver.connections, len(receiver.requests)) == (1, 1)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("120", "120"),
        ("-1", "-1"),
        ("1_0", "1_0"),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 GMT"),
        ("9" * 200, "9" * 200),
        ("9" * 201, None),
        ("\udcd9\udca1", None),  # an Arabic digit in UTF-8
        ("1\t2", None),
    ],
)
async def test_a_retry_after_is_handed_on_where_it_is_plain_text(client_for, value, kept):
    async with receivers.answers(status="503 Busy", retry_after=value) as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.headers.get("retry-after") == kept


async def test_only_the_headers_that_steer_are_kept(client_for):
    async with receivers.answers(webhook_delivery="disable", x_other="1") as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.headers == {"webhook-delivery": "disable"}


@pytest.mark.parametrize(
    "size", [0, 1, KEEP_LIMIT - 1, KEEP_LIMIT, KEEP_LIMIT + 1, READ_LIMIT, READ_LIMIT + 1, 2**20]
)
async def test_the_beginning_of_a_body_is_kept_and_marked_when_there_was_more(client_for, size):
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with receivers.answers(body=body) as receiver:
        client = client_for()
        for _ in range(2):
            answer = await send(client, receiver.url)
            assert (answer.result, answer.body) == ("ok", body[:KEEP_LIMIT])
            assert answer.truncated == (size > KEEP_LIMIT)


async def test_a_packed_body_is_kept_packed(client_for):
    packed = gzip.compress(b"hello" * 10, mtime=0)
    async with receivers.answers(body=packed, content_encoding="gzip") as receiver:
        assert (await send(client_for(), receiver.url)).body == packed


@pytest.mark.parametrize(
    ("make", "body"),
    [(receivers.answers_in_chunks, b"in chunks"), (receivers.answers_until_close, b"until close")],
)
async def test_a_body_may_come_in_any_framing(client_for, make, body):
    async with make() as receiver:
        client = client_for()
        for _ in range(2):
            answer = await send(client, receiver.url)
            assert (answer.result, answer.body, answer.truncated) == ("ok", body, False)


async def test_an_answer_may_be_announced_first(client_for):
    early = head("100 Continue") + head("103 Early Hints", link="</a>")
    async with receivers.says(answer=early + head("201 Created", content_length=2) + b"ok") as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status, answer.body) == ("ok", 201, b"ok")


# --- TLS ----------------------------------------------------------------------------------------------


async def test_a_receiver_whose_authority_is_in_the_ca_file_is_trusted(client_for, certificates):
    async with receivers.answers(tls=certificates.server("good"), body=b"safe") as receiver:
        client = client_for(ca_file=certificates.ca)
        for _ in range(2):
            assert (await send(client, receiver.url)).body == b"safe"
        assert receiver.connections == 1


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        ("expired", "certificate has expired"),
        ("self_signed", "self-signed certificate"),
        ("wrong_name", "certificate is not valid for '127.0.0.1'"),
    ],
)
async def test_a_bad_certificate_is_a_tls_failure_with_its_reason(
    client_for, certificates, certificate, reason
):
    async with receivers.answers(tls=certificates.server(certificate)) as receiver:
        answer = await send(client_for(ca_file=certificates.ca), receiver.url)
        assert (answer.result, answer.status) == ("tls", None)
        assert (
            answer.error
            == f"certificate of 127.0.0.1 not accepted: {answer.error.partition('accepted: ')[2]}"
        )
        assert reason in answer.error
        assert receiver.requests == []


async def test_an_authority_that_nobody_trusts_is_a_tls_failure(client_for, certificates):
    async with receivers.answers(tls=certificates.server("good")) as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.result == "tls"
        assert "unable to get local issuer certificate" in answer.error


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (receivers.speaks_first, "wrong version number"),
        (receivers.closes_at_once, "broke off the TLS handshake"),
    ],
)
async def test_a_port_without_tls_is_a_tls_failure(client_for, make, reason):
    async with make(scheme="https") as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.result == "tls"
        assert reason in answer.error


def test_a_ca_file_that_cannot_be_used_stops_the_start_with_its_name(tmp_path):
    empty = tmp_path / "empty.pem"
    empty.write_text("no certificate")

    async def build(path):
        Client(DestinationConfig(name="zoo", url="", ca_file=path))

    for path in (empty, tmp_path / "absent.pem"):
        with pytest.raises(RelayError, match=path.name):
            asyncio.run(build(path))


async def test_a_connection_is_dropped_at_once_when_tls_would_wait_for_a_polite_end(client_for, certificates):
    async with receivers.never_reads(tls=certificates.server("good")) as receiver:
        client, sockets = client_for(SHORT, ca_file=certificates.ca), []
        connector = client._pooled.connector
        connector._socket_factory = lambda info: sockets.append(client._socket(info)) or sockets[-1]
        assert (await send(client, receiver.url)).result == "timeout"
        await asyncio.sleep(0)  # asyncio closes the socket in the next turn of the loop
        assert [sock.fileno() for sock in sockets] == [-1]


# --- names --------------------------------------------------------------------------------------------


@pytest.fixture
def dead_dns(monkeypatch):
    """Let every look-up of a name but `localhost` hang until the end of the test."""
    released, real = threading.Event(), socket.getaddrinfo

    def hang(host, *args, **kwargs):
        if host != "localhost":
            released.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(resolver_module.socket, "getaddrinfo", hang)
    yield
    released.set()


async def test_a_name_without_an_address_is_a_dns_failure(client_for, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(resolver_module.socket, "getaddrinfo", fail)
    answer = await send(client_for(), "http://absent.example/")
    assert (answer.result, answer.error) == (
        "dns",
        "cannot resolve absent.example: Name or service not known",
    )


async def test_a_name_that_is_looked_up_in_vain_ends_at_the_connect_timeout(client_for, dead_dns):
    answer = await send(client_for(connect_timeout=SHORT), "http://dead.example/")
    assert (answer.result, answer.error) == ("dns", "the name was not resolved within 200ms")


async def test_dead_names_hold_up_neither_other_destinations_nor_other_threads(client_for, dead_dns):
    dead = [asyncio.create_task(send(client_for(), f"http://dead{number}.example/")) for number in range(40)]
    async with receivers.answers() as receiver:
        async with asyncio.timeout(2):
            healthy = await send(client_for(), f"http://localhost:{receiver.port}/")
            await asyncio.to_thread(int)
        assert healthy.result == "ok"
    assert not any(task.done() for task in dead)
    held = [thread for thread in threading.enumerate() if thread.name.startswith("dns dead")]
    assert len(held) == 40
    assert all(thread.daemon for thread in held)  # else they would hold the exit of the process
    for task in dead:
        task.cancel()
    await asyncio.wait(dead)


async def test_a_name_that_cannot_be_encoded_is_no_more_than_a_failed_look_up():
    with pytest.raises(OSError, match="not a host name"):
        await resolver_module.Resolver().resolve("x" * 64 + ".example")


async def test_a_link_local_address_keeps_its_zone(monkeypatch):
    info = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 3))
    monkeypatch.setattr(resolver_module.socket, "getaddrinfo", lambda *_, **__: [info])
    (found,) = await resolver_module.Resolver().resolve("printer.local", 80)
    assert found["host"] == "fe80::1%3"


@pytest.mark.parametrize(
    "url", ["ftp://receiver.example/", "http://127.1/", "http:///", "nothing", "http://[::1/"]
)
async def test_a_url_that_cannot_be_dialled_is_blocked_and_stays_out_of_the_error(client_for, url):
    answer = await send(client_for(), url.replace("//", "//user:hunter2@", 1))
    assert answer.result == "blocked"
    assert "hunter2" not in answer.error


# --- ends ---------------------------------------------------------------------------------------------


async def test_a_cancelled_send_hangs_up_and_leaves_nothing_behind(client_for):
    async with receivers.hang() as receiver:
        client = client_for()
        sending = asyncio.create_task(send(client, receiver.url))
        async with asyncio.timeout(2):
            await receiver.until(requests=1)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            await receiver.ended.wait()
        assert not client._pooled.connector._acquired


async def test_hanging_receivers_delay_no_other(client_for):
    async with receivers.hang() as hanging, receivers.answers() as healthy:
        waiting = [asyncio.create_task(send(client_for(), hanging.url)) for _ in range(20)]
        async with asyncio.timeout(2):
            await hanging.until(requests=20)
            assert (await send(client_for(), healthy.url)).result == "ok"
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_client_closes_its_connections(client_for):
    async with receivers.answers() as receiver:
        client = client_for()
        await send(client, receiver.url)
        await client.close()
        await asyncio.wait_for(receiver.ended.wait(), 1)


def test_every_status_has_a_result_of_the_closed_list():
    assert {of_status(status) for status in range(1000)} == {"ok", "3xx", "4xx", "429", "5xx", "protocol"}
    assert set(RESULTS) > {of_status(status) for status in range(1000)}


def test_an_error_of_an_unknown_kind_has_a_result_all_the_same():
    result, text = of_failure(RuntimeError("odd"))
    assert (result, "odd" in text) == ("protocol", True)


def test_an_error_line_is_short_printable_and_one():
    assert one_line("a\r\n\tb  c\x1b[0m\u202e") == "a b c?[0m?"
    assert len(one_line("x" * 10_000)) == 300
