"""What addresses, names and headers must look like."""

import pytest

from relay.config import checks
from relay.config.secret import Secret

KEY = "bGlrZSBhIHNlY3JldCwgYnV0IGxvbmdlciB0aGFuIHRoYXQ="  # 35 bytes

GOOD = [
    (checks.listen, "127.0.0.1:8080"),
    (checks.listen, "localhost:0"),
    (checks.listen, "[::1]:8080"),
    (checks.listen, "0.0.0.0:65535"),
    (checks.listen_or_off, ""),
    (checks.network, "10.0.0.0/8"),
    (checks.network, "10.1.2.3"),
    (checks.network, "fd00::/8"),
    (checks.file_name, "my relay.sock"),
    (checks.storage, "sqlite:relay.db"),
    (checks.url, "https://crm.example/hooks?x=1"),
    (checks.url, "http://127.0.0.1:9000/hooks"),
    (checks.url, "http://[::1]:9000"),
    (checks.proxy, Secret("http://proxy.example:3128")),
    (checks.proxy, Secret("http://proxy.example")),
    (checks.proxy, Secret("http://relay:p%40ss@[::1]:3128/")),
    (checks.web_origin, "*"),
    (checks.web_origin, "https://shop.example:8443"),
    (checks.web_origin, "https://shop.example:80"),
    (checks.web_origin, "http://[::1]:8080"),
    (checks.final_status, 300),
    (checks.final_status, 413),
    (checks.final_status, 599),
    (checks.prefix, ""),
    (checks.prefix, "/acme"),
    (checks.prefix, "/acme/two"),
    (checks.name, "crm"),
    (checks.name, "0_a-b"),
    (checks.name, "a" * 64),
    (checks.pattern, "*"),
    (checks.pattern, "!adorn.attire.*"),
    (checks.header_name, "X-Api-Key"),
    (checks.header_name, "authorization"),
    (checks.header_value, Secret("Bearer a\tb ü")),
    (checks.signing_secret, Secret("whsec_" + KEY)),
    (checks.signing_secret, Secret(KEY)),
]

BAD = [
    (checks.final_status, 200, "300 to 599, got 200"),
    (checks.final_status, 299, "300 to 599"),
    (checks.final_status, 600, "300 to 599"),
    (checks.final_status, -400, "300 to 599"),
    (checks.final_status, 410, "disables the destination"),
    (checks.listen, "8080", "host:port"),
    (checks.listen, ":8080", "host:port"),
    (checks.listen, "", "host:port"),
    (checks.listen, "localhost:", "host:port"),
    (checks.listen, "localhost:http", "host:port"),
    (checks.listen, "localhost:65536", "host:port"),
    (checks.listen, "localhost:0080001", "host:port"),
    (checks.listen, "localhost:٨٠", "host:port"),
    (checks.listen, "::1:8080", "host:port"),
    (checks.listen, "[::1:8080", "host:port"),
    (checks.listen, "[localhost]:80", "host:port"),
    (checks.listen, "http://localhost:80", "host:port"),
    (checks.listen_or_off, "off", "host:port"),
    (checks.network, "10.0.0.0/40", "network"),
    (checks.network, "proxy.example", "network"),
    (checks.file_name, "relay.sock\n", "control characters"),
    (checks.storage, "relay.db", "sqlite:"),
    (checks.storage, "sqlite:", "sqlite:"),
    (checks.storage, "postgresql://x", "sqlite:"),
    (checks.url, "crm.example", "http://"),
    (checks.url, "ftp://crm.example", "http://"),
    (checks.url, "https://", "no host"),
    (checks.url, "https:///hooks", "no host"),
    (checks.url, "https://user:hush@crm.example", "no user name"),
    (checks.url, "https://hush@crm.example", "no user name"),
    (checks.url, "https://crm.example:99999", "cannot be read"),
    (checks.url, "https://[::1/hooks", "cannot be read"),
    (checks.url, "https://crm.example/a b", "spaces"),
    (checks.url, "https://crm.example/a\nb", "spaces"),
    (checks.proxy, Secret(""), "HTTP proxy"),
    (checks.proxy, Secret("hush"), "HTTP proxy"),
    (checks.proxy, Secret("hush:3128"), "HTTP proxy"),
    (checks.proxy, Secret("https://hush:3128"), "HTTP proxy"),
    (checks.proxy, Secret("socks5://hush:1080"), "HTTP proxy"),
    (checks.proxy, Secret("http://"), "cannot be read|no host"),
    (checks.proxy, Secret("http://hush:0"), "no port"),
    (checks.proxy, Secret("http://hush:99999"), "cannot be read"),
    (checks.proxy, Secret("http://hush@[::1"), "cannot be read"),
    (checks.proxy, Secret("http://hush:3128/path"), "ends with its host and port"),
    (checks.proxy, Secret("http://hush:3128?x"), "ends with its host and port"),
    (checks.proxy, Secret("http://hush:3128#x"), "ends with its host and port"),
    (checks.proxy, Secret("http://hu sh:3128"), "cannot be read|spaces"),
    (checks.proxy, Secret("http://a:hush\n@proxy.example:3128"), "spaces"),
    (checks.web_origin, "shop.example", "origin"),
    (checks.web_origin, "https://shop.example/", "origin"),
    (checks.web_origin, "https://Shop.Example", 'browsers send this origin as "https://shop.example"'),
    (checks.web_origin, "https://shop.example:443", 'browsers send this origin as "https://shop.example"'),
    (checks.web_origin, "http://shop.example:80", 'browsers send this origin as "http://shop.example"'),
    (checks.web_origin, "https://*.shop.example", "list each origin"),
    (checks.web_origin, "https://bücher.example", "xn--"),
    (checks.prefix, "acme", "a slash first"),
    (checks.prefix, "/acme/", "none at the end"),
    (checks.prefix, "/", "none at the end"),
    (checks.prefix, "/a//b", "path"),
    (checks.prefix, "/{shop}", "path"),
    (checks.prefix, "/a?b", "path"),
    (checks.name, "", "1 to 64"),
    (checks.name, "a" * 65, "1 to 64"),
    (checks.name, "Crm", "1 to 64"),
    (checks.name, "-crm", "1 to 64"),
    (checks.name, "crm.eu", "1 to 64"),
    (checks.name, "crm\n", "1 to 64"),
    (checks.pattern, "", "empty"),
    (checks.pattern, "!", "empty"),
    (checks.header_name, "X Api", "not a legal"),
    (checks.header_name, "", "not a legal"),
    (checks.header_name, "X-Api:", "not a legal"),
    (checks.header_name, "Webhook-Id", "itself"),
    (checks.header_name, "Content-Length", "itself"),
    (checks.header_name, "HOST", "itself"),
    (checks.header_name, "transfer-encoding", "itself"),
    (checks.header_name, "Connection", "itself"),
    (checks.header_value, Secret("hush\r\nX: y"), "line breaks"),
    (checks.header_value, Secret("hush\0"), "control"),
    (checks.signing_secret, Secret("whsec_hush"), "24 to 64"),
    (checks.signing_secret, Secret("whsec_" + "A" * 400), "24 to 64"),
]


@pytest.mark.parametrize(("check", "value"), GOOD)
def test_what_is_fine_comes_back_unchanged(check, value):
    assert check(value) is value


@pytest.mark.parametrize(("check", "value", "says"), BAD)
def test_what_is_not_is_refused_with_a_reason_that_holds_no_secret(check, value, says):
    with pytest.raises(ValueError, match=says) as caught:
        check(value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:8080", "127.0.0.1", 8080), ("[::1]:0", "::1", 0), ("localhost:80", "localhost", 80)],
)
def test_a_listener_splits_into_host_and_port(text, host, port):
    assert checks.split_listen(text) == (host, port)


def test_a_file_must_be_there(tmp_path):
    (tmp_path / "ca.pem").write_text("x")
    assert checks.existing_file(tmp_path / "ca.pem") == tmp_path / "ca.pem"
    with pytest.raises(ValueError, match=r"no\.pem cannot be read: No such file"):
        checks.existing_file(tmp_path / "no.pem")
