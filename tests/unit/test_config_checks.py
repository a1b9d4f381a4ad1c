"""Checks of addresses, names and headers."""

import pytest

from relay.config import validators
from relay.config.secrets import Secret, Url

KEY = "bGlrZSBhIHNlY3JldCwgYnV0IGxvbmdlciB0aGFuIHRoYXQ="  # 35 bytes

GOOD = [
    (validators.listen, "127.0.0.1:8080"),
    (validators.listen, "localhost:0"),
    (validators.listen, "[::1]:8080"),
    (validators.listen, "0.0.0.0:65535"),
    (validators.listen_or_off, ""),
    (validators.network, "10.0.0.0/8"),
    (validators.network, "10.1.2.3"),
    (validators.network, "fd00::/8"),
    (validators.file_name, "my relay.sock"),
    (validators.storage, Url("sqlite:relay.db")),
    (validators.storage, Url("postgresql://relay@db/relay")),
    (validators.storage, Url("postgres://db1,db2:5433/relay?sslmode=verify-full&pooler=true")),
    (validators.storage, Url("postgresql:///relay?host=/run/postgresql")),
    (validators.storage, Url("postgresql://relay:hunter2@db/relay", is_hidden=True)),
    (validators.listen_url, Url("postgres://relay@db1,db2:5433/relay?sslmode=verify-full")),
    (validators.listen_url, Url("postgresql://relay:hunter2@db/relay", is_hidden=True)),
    (validators.url, Url("https://crm.example/hooks?x=1")),
    (validators.url, Url("http://127.0.0.1:9000/hooks")),
    (validators.url, Url("http://[::1]:9000")),
    (validators.proxy, Secret("http://proxy.example:3128")),
    (validators.proxy, Secret("http://proxy.example")),
    (validators.proxy, Secret("http://relay:p%40ss@[::1]:3128/")),
    (validators.web_origin, "*"),
    (validators.web_origin, "https://shop.example:8443"),
    (validators.web_origin, "https://shop.example:80"),
    (validators.web_origin, "http://[::1]:8080"),
    (validators.final_status, 300),
    (validators.final_status, 413),
    (validators.final_status, 599),
    (validators.prefix, ""),
    (validators.prefix, "/acme"),
    (validators.prefix, "/acme/two"),
    (validators.name, "crm"),
    (validators.name, "0_a-b"),
    (validators.name, "a" * 64),
    (validators.pattern, "*"),
    (validators.pattern, "!adorn.attire.*"),
    (validators.header_name, "X-Api-Key"),
    (validators.header_name, "authorization"),
    (validators.header_value, Secret("Bearer a\tb ü")),
    (validators.signing_secret, Secret("whsec_" + KEY)),
    (validators.signing_secret, Secret(KEY)),
]

BAD = [
    (validators.final_status, 200, "300 to 599, got 200"),
    (validators.final_status, 299, "300 to 599"),
    (validators.final_status, 600, "300 to 599"),
    (validators.final_status, -400, "300 to 599"),
    (validators.final_status, 410, "disables the destination"),
    (validators.listen, "8080", "host:port"),
    (validators.listen, ":8080", "host:port"),
    (validators.listen, "", "host:port"),
    (validators.listen, "localhost:", "host:port"),
    (validators.listen, "localhost:http", "host:port"),
    (validators.listen, "localhost:65536", "host:port"),
    (validators.listen, "localhost:0080001", "host:port"),
    (validators.listen, "localhost:٨٠", "host:port"),
    (validators.listen, "::1:8080", "host:port"),
    (validators.listen, "[::1:8080", "host:port"),
    (validators.listen, "[localhost]:80", "host:port"),
    (validators.listen, "http://localhost:80", "host:port"),
    (validators.listen_or_off, "off", "host:port"),
    (validators.network, "10.0.0.0/40", "network"),
    (validators.network, "proxy.example", "network"),
    (validators.file_name, "relay.sock\n", "control characters"),
    (validators.storage, Url("relay.db"), "sqlite:"),
    (validators.storage, Url("sqlite:"), "sqlite:"),
    (validators.storage, Url("mysql://db/relay"), '"postgresql://USER@HOST/DATABASE"'),
    (validators.storage, Url("postgresql:relay"), '"postgresql://USER@HOST/DATABASE"'),
    (validators.storage, Url("postgresql://db"), "names no database"),
    (validators.storage, Url("postgresql://db/"), "names no database"),
    (validators.storage, Url("postgresql://[::1/relay"), "its hosts or options cannot be read"),
    (validators.storage, Url("postgresql://relay:hunter2@db/relay"), "write it as a secret"),
    (validators.storage, Url("postgresql://db/relay?password=hunter2"), "write it as a secret"),
    (validators.listen_url, Url("sqlite:relay.db"), '"postgresql://USER@HOST/DATABASE"'),
    (validators.listen_url, Url("postgresql://db"), "names no database"),
    (validators.listen_url, Url("postgresql://db/relay?pooler=true"), "without pooler=true"),
    (
        validators.listen_url,
        Url("postgresql://u:hunter2@db/relay"),
        'listen_url = { env = "RELAY',
    ),
    (validators.url, Url("crm.example"), "http://"),
    (validators.url, Url("ftp://crm.example"), "http://"),
    (validators.url, Url("https://"), "no host"),
    (validators.url, Url("https:///hooks"), "no host"),
    (validators.url, Url("https://user:hush@crm.example"), "must not contain a user name"),
    (validators.url, Url("https://hush@crm.example"), "must not contain a user name"),
    (validators.url, Url("https://crm.example:99999"), "cannot be read"),
    (validators.url, Url("https://[::1/hooks"), "cannot be read"),
    (validators.url, Url("https://crm.example/a b"), "spaces"),
    (validators.url, Url("https://crm.example/a\nb"), "spaces"),
    (validators.proxy, Secret(""), "HTTP proxy"),
    (validators.proxy, Secret("hush"), "HTTP proxy"),
    (validators.proxy, Secret("hush:3128"), "HTTP proxy"),
    (validators.proxy, Secret("https://hush:3128"), "HTTP proxy"),
    (validators.proxy, Secret("socks5://hush:1080"), "HTTP proxy"),
    (validators.proxy, Secret("http://"), "cannot be read|no host"),
    (validators.proxy, Secret("http://hush:0"), "no port"),
    (validators.proxy, Secret("http://hush:99999"), "cannot be read"),
    (validators.proxy, Secret("http://hush@[::1"), "cannot be read"),
    (validators.proxy, Secret("http://hush:3128/path"), "ends with its host and port"),
    (validators.proxy, Secret("http://hush:3128?x"), "ends with its host and port"),
    (validators.proxy, Secret("http://hush:3128#x"), "ends with its host and port"),
    (validators.proxy, Secret("http://hu sh:3128"), "cannot be read|spaces"),
    (validators.proxy, Secret("http://a:hush\n@proxy.example:3128"), "spaces"),
    (validators.web_origin, "shop.example", "origin"),
    (validators.web_origin, "https://shop.example/", "origin"),
    (validators.web_origin, "https://Shop.Example", 'browsers send this origin as "https://shop.example"'),
    (
        validators.web_origin,
        "https://shop.example:443",
        'browsers send this origin as "https://shop.example"',
    ),
    (validators.web_origin, "http://shop.example:80", 'browsers send this origin as "http://shop.example"'),
    (validators.web_origin, "https://*.shop.example", "list each origin"),
    (validators.web_origin, "https://bücher.example", "xn--"),
    (validators.prefix, "acme", "a slash at its start"),
    (validators.prefix, "/acme/", "none at its end"),
    (validators.prefix, "/", "none at its end"),
    (validators.prefix, "/a//b", "path"),
    (validators.prefix, "/{shop}", "path"),
    (validators.prefix, "/a?b", "path"),
    (validators.name, "", "1 to 64"),
    (validators.name, "a" * 65, "1 to 64"),
    (validators.name, "Crm", "1 to 64"),
    (validators.name, "-crm", "1 to 64"),
    (validators.name, "crm.eu", "1 to 64"),
    (validators.name, "crm\n", "1 to 64"),
    (validators.pattern, "", "empty"),
    (validators.pattern, "!", "empty"),
    (validators.header_name, "X Api", "not a valid"),
    (validators.header_name, "", "not a valid"),
    (validators.header_name, "X-Api:", "not a valid"),
    (validators.header_name, "Webhook-Id", "itself"),
    (validators.header_name, "Content-Length", "itself"),
    (validators.header_name, "HOST", "itself"),
    (validators.header_name, "transfer-encoding", "itself"),
    (validators.header_name, "Connection", "itself"),
    (validators.header_value, Secret("hush\r\nX: y"), "line breaks"),
    (validators.header_value, Secret("hush\0"), "control"),
    (validators.signing_secret, Secret("whsec_hush"), "24 to 64"),
    (validators.signing_secret, Secret("whsec_" + "A" * 400), "24 to 64"),
]


@pytest.mark.parametrize(("check", "value"), GOOD)
def test_a_valid_value_is_returned_unchanged(check, value):
    assert check(value) is value


@pytest.mark.parametrize(("check", "value", "message"), BAD)
def test_an_invalid_value_is_refused_without_showing_a_secret(check, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:8080", "127.0.0.1", 8080), ("[::1]:0", "::1", 0), ("localhost:80", "localhost", 80)],
)
def test_a_listener_splits_into_host_and_port(text, host, port):
    assert validators.split_listen(text) == (host, port)


def test_a_referenced_file_must_exist(tmp_path):
    (tmp_path / "ca.pem").write_text("x")
    assert validators.existing_file(tmp_path / "ca.pem") == tmp_path / "ca.pem"
    with pytest.raises(ValueError, match=r"no\.pem cannot be read: No such file"):
        validators.existing_file(tmp_path / "no.pem")
