"""Trusted certificates, and the errors of the others."""

import asyncio

import pytest
import receivers
from client import SHORT, send

from relay.base.clock import SECOND
from relay.config.schema import DestinationConfig
from relay.config.secrets import Url
from relay.delivery.http.http_client import Certificate, HttpClient
from relay.delivery.http.response import KEEP_LIMIT
from relay.errors import RelayError

pytestmark = pytest.mark.usefixtures("silence")


async def test_a_receiver_with_a_ca_from_the_ca_file_is_trusted(client_for, certificates):
    async with receivers.answers(tls=certificates.server("good"), body=b"safe") as receiver:
        client = client_for(ca_file=certificates.ca)
        for _ in range(2):
            assert (await send(client, receiver.url)).body == b"safe"
        assert receiver.connections == 1
    assert client.certificate.ends == certificates.ends("good")


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
            == f"certificate of 127.0.0.1 is not trusted: {answer.error.partition('trusted: ')[2]}"
        )
        assert reason in answer.error
        assert receiver.requests == []


async def test_the_end_of_a_certificate_is_that_of_the_latest_connect(client_for, certificates):
    client = client_for(ca_file=certificates.ca)
    assert client.certificate is None
    async with receivers.answers() as receiver:
        assert (await send(client, receiver.url)).result == "ok"
    assert client.certificate is None
    for certificate, result in (("good", "ok"), ("expired", "tls"), ("brief", "ok")):
        async with receivers.answers(tls=certificates.server(certificate)) as receiver:
            assert (await send(client, receiver.url)).result == result
        ends = certificates.ends("brief" if certificate == "brief" else "good")
        assert client.certificate.ends == ends  # a handshake that fails changes nothing


async def test_an_unknown_ca_is_a_tls_failure(client_for, certificates):
    async with receivers.answers(tls=certificates.server("good")) as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.result == "tls"
        assert "unable to get local issuer certificate" in answer.error


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (receivers.sends_first, "wrong version number"),
        (receivers.closes_at_once, "closed the connection during the TLS handshake"),
    ],
)
async def test_a_port_without_tls_is_a_tls_failure(client_for, make, reason):
    async with make(scheme="https") as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.result == "tls"
        assert reason in answer.error


def test_an_unusable_ca_file_stops_the_start_and_is_named(tmp_path):
    empty = tmp_path / "empty.pem"
    empty.write_text("no certificate")

    async def build(path):
        HttpClient(DestinationConfig(name="zoo", url=Url(""), ca_file=path))

    for path in (empty, tmp_path / "absent.pem"):
        with pytest.raises(RelayError, match=path.name):
            asyncio.run(build(path))


async def test_a_tls_connection_is_aborted_without_an_orderly_close(client_for, certificates):
    async with receivers.never_reads(tls=certificates.server("good")) as receiver:
        client, sockets = client_for(SHORT, ca_file=certificates.ca), []
        connector = client._pooled
        connector._socket_factory = lambda info: sockets.append(client._socket(info)) or sockets[-1]
        assert (await send(client, receiver.url)).result == "timeout"
        await asyncio.sleep(0)  # asyncio closes the socket in the next turn of the loop
        assert [sock.fileno() for sock in sockets] == [-1]


async def test_a_flood_over_tls_is_cut_off(client_for, certificates):
    async with receivers.huge_body(tls=certificates.server("good")) as receiver:
        answer = await send(client_for(ca_file=certificates.ca), receiver.url)
        assert (answer.result, answer.truncated, len(answer.body)) == ("ok", True, KEEP_LIMIT)
        await asyncio.wait_for(receiver.ended.wait(), 1)
        assert receiver.sent < 50 * 2**20


@pytest.mark.parametrize(("valid", "before"), [(398, 14), (90, 14), (47, 11.75), (6, 1.5), (1, 0.25)])
def test_a_renewal_is_overdue_a_quarter_of_the_period_before_the_end(valid, before):
    day = 86_400 * SECOND
    assert Certificate(5 * day, (5 + valid) * day).renewal_overdue == (5 + valid - before) * day
