"""Receivers that demand a client certificate, and the errors of unusable ones."""

import asyncio
import shutil
import socket
import ssl
import threading

import pytest
import receivers
from certificates import private_pem
from client import send
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from relay.config.client_cert import ClientCert
from relay.config.problems import ConfigError
from relay.config.schema import DestinationConfig
from relay.config.secrets import Secret, Url
from relay.delivery.http.http_client import HttpClient
from relay.errors import RelayError
from relay.plugin_loading.loader import load

PASSWORD = "open sesame"


@pytest.fixture(scope="module")
def files(certificates, tmp_path_factory):
    """A folder of certificates and keys, usable and unusable."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(certificates.path("client"), folder / "client.pem")
    shutil.copy(certificates.key, folder / "key.pem")
    (folder / "both.pem").write_bytes((folder / "client.pem").read_bytes() + certificates.key.read_bytes())
    locked = certificates.private(serialization.BestAvailableEncryption(PASSWORD.encode()))
    (folder / "locked.pem").write_bytes(locked)
    (folder / "strange.pem").write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1())))
    (folder / "rsa.pem").write_bytes(private_pem(rsa.generate_private_key(65537, 2048)))
    (folder / "binary.der").write_bytes(ssl.PEM_cert_to_DER_cert((folder / "client.pem").read_text()))
    lines = (folder / "client.pem").read_text().splitlines(keepends=True)
    (folder / "torn.pem").write_text("".join(lines[:2] + lines[3:]))
    (folder / "empty.pem").write_text("")
    return folder


class Demanding:
    """A blocking TLS server: unlike asyncio's, it sends an alert with the reason of a refusal."""

    def __init__(self, context):
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}/hook"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join()
        self._listener.close()

    def _serve(self):
        raw, _ = self._listener.accept()
        tls = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        with pytest.raises(ssl.SSLError):
            tls.do_handshake()
        with socket.socket(fileno=tls.detach()) as raw:
            while raw.recv(65_536):  # unread bytes at a close would turn the alert into a reset
                pass


@pytest.fixture
def demanding(certificates):
    """The TLS context of a receiver that accepts clients with a certificate of our CA."""
    return certificates.server("good", demanding=True)


@pytest.mark.parametrize(
    ("names", "password"),
    [
        ({"cert": "client.pem", "key": "key.pem"}, None),
        ({"cert": "both.pem"}, None),
        ({"cert": "client.pem", "key": "locked.pem"}, Secret(PASSWORD)),
    ],
)
async def test_a_receiver_that_demands_a_client_certificate_gets_it(
    certificates, demanding, files, names, password
):
    shown = ClientCert(**{key: files / name for key, name in names.items()}, password=password)
    destination = DestinationConfig(
        name="crm", url=Url(""), ca_file=certificates.ca, client_cert=shown, allow_private=True
    )
    client = HttpClient(destination)
    async with receivers.shows_certificates(tls=demanding) as receiver:
        answer = await send(client, receiver.url)
        await client.close()
        assert (answer.result, answer.body) == ("ok", b"relay.example")


async def test_a_receiver_that_demands_no_client_certificate_is_reached_too(client_for, certificates, files):
    shown = ClientCert(cert=files / "both.pem")
    async with receivers.shows_certificates(tls=certificates.server("good")) as receiver:
        answer = await send(client_for(ca_file=certificates.ca, client_cert=shown), receiver.url)
        assert (answer.result, answer.body) == ("ok", b"nobody")


async def test_a_client_certificate_does_not_replace_the_systems_cas(
    client_for, certificates, demanding, files, monkeypatch
):
    shown = ClientCert(cert=files / "both.pem")
    async with receivers.shows_certificates(tls=demanding) as receiver:
        stranger = await send(client_for(client_cert=shown), receiver.url)
        monkeypatch.setenv(
            "SSL_CERT_FILE", str(certificates.ca)
        )  # the file that OpenSSL uses as the system's CAs
        known = await send(client_for(client_cert=shown), receiver.url)
        assert (stranger.result, known.result) == ("tls", "ok")
        assert "certificate of 127.0.0.1 is not trusted" in stranger.error


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (ssl.TLSVersion.TLSv1_2, "failed: sslv3 alert handshake failure"),
        (ssl.TLSVersion.TLSv1_3, "the receiver ended TLS: tlsv13 alert certificate required"),
    ],
)
async def test_without_a_certificate_the_receivers_alert_is_the_reason(
    client_for, certificates, demanding, version, reason
):
    demanding.minimum_version = demanding.maximum_version = version
    with Demanding(demanding) as receiver:
        answer = await send(client_for(ca_file=certificates.ca), receiver.url)
    assert (answer.result, answer.status) == ("tls", None)
    assert answer.error.endswith(reason)


async def test_a_client_certificate_of_an_unknown_ca_is_a_tls_failure(client_for, certificates, demanding):
    shown = ClientCert(cert=certificates.path("self_signed"), key=certificates.key)
    with Demanding(demanding) as receiver:
        answer = await send(client_for(ca_file=certificates.ca, client_cert=shown), receiver.url)
    assert answer.result == "tls"
    assert answer.error.startswith("the receiver ended TLS: tlsv1 alert")


UNUSABLE = [
    ('cert = "absent.pem"', "absent.pem cannot be read: No such file or directory"),
    ('cert = "client.pem", key = "absent.pem"', "absent.pem cannot be read: No such file or directory"),
    ('cert = "."', " cannot be read: Is a directory"),
    ('cert = "empty.pem", key = "key.pem"', "empty.pem has no certificate in PEM form"),
    ('cert = "torn.pem", key = "key.pem"', "torn.pem has no certificate in PEM form"),
    ('cert = "binary.der", key = "key.pem"', "binary.der has no certificate in PEM form"),
    ('cert = "key.pem"', "key.pem has no certificate in PEM form"),
    ('cert = "client.pem"', "client.pem has no private key in PEM form"),
    ('cert = "client.pem", key = "empty.pem"', "empty.pem has no private key in PEM form"),
    ('cert = "client.pem", key = "strange.pem"', "strange.pem does not match the certificate in"),
    ('cert = "client.pem", key = "rsa.pem"', "rsa.pem does not match the certificate in"),
    ('cert = "client.pem", key = "locked.pem"', "locked.pem is encrypted; set `password`"),
    (
        'cert = "client.pem", key = "locked.pem", password = "hush"',
        "locked.pem is encrypted; `password` does not decrypt it",
    ),
    (
        f'cert = "client.pem", key = "locked.pem", password = "{"hush" * 1000}"',
        "locked.pem is encrypted; `password` does not decrypt it",
    ),
    ('key = "key.pem"', "missing; it has no default"),
    ('crt = "client.pem"', 'unknown key, did you mean "cert"?'),
]


@pytest.mark.parametrize(("table", "problem"), UNUSABLE)
def test_an_unusable_client_certificate_is_a_problem_that_names_the_file(files, table, problem):
    path = files / "config.toml"
    url = "https://receiver.example/hook"
    path.write_text(f'development = true\n[destinations.crm]\nurl = "{url}"\nclient_cert = {{ {table} }}\n')
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    text = str(caught.value)
    assert "config.toml:4: destinations.crm.client_cert" in text
    assert problem in text
    assert "hush" not in text


def test_a_client_certificate_that_became_unusable_after_the_check_stops_the_start(files):
    async def build():
        HttpClient(
            DestinationConfig(name="crm", url=Url(""), client_cert=ClientCert(cert=files / "empty.pem"))
        )

    with pytest.raises(RelayError, match=r"client_cert of crm: .*empty\.pem has no certificate"):
        asyncio.run(build())
