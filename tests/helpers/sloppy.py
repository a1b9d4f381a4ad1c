"""Responses of sloppy receivers, and the status that curl and Go read in them.

The second and third column are what curl 7.88.1 (`%{http_code}`) and Go 1.26.8 (`StatusCode`) made of
them, each sent in one piece before the connection was closed; 0: an error without a status.
"""

from receivers import head

FINAL = 200  # a lower status announces a response

OK = b"HTTP/1.1 200 OK\r\n"


SLOPPY: dict[str, tuple[bytes, int, int]] = {
    # valid responses
    "an empty 200": (head(content_length=0), 200, 200),
    "a 200 with a body": (head(content_length=2) + b"ok", 200, 200),
    "a 204": (head("204 No Content"), 204, 204),
    "a 202 in chunks": (
        head("202 Accepted", transfer_encoding="chunked") + b"2\r\nok\r\n0\r\n\r\n",
        202,
        202,
    ),
    "a 200 until close": (OK + b"\r\nok", 200, 200),
    "a 201 of HTTP/1.0": (b"HTTP/1.0 201 Created\r\n\r\nok", 201, 201),
    "announcements before it": (
        head("100 Continue") + head("103 Early Hints", link="a") + head(content_length=0),
        200,
        200,
    ),
    # bodies that differ from their headers
    "a body past its length": (head(content_length=2) + b"ok, and more", 200, 200),
    "a body short of its length": (head(content_length=20) + b"ok", 200, 200),
    "a body on a length of 0": (head(content_length=0) + b"ok", 200, 200),
    "a body on a 204": (head("204 No Content") + b"ok", 204, 204),
    "a body on a 204 that announces it": (head("204 No Content", content_length=2) + b"ok", 204, 204),
    "chunks on a 204": (
        head("204 No Content", transfer_encoding="chunked") + b"2\r\nok\r\n0\r\n\r\n",
        204,
        204,
    ),
    "a body on a 205": (head("205 Reset Content", content_length=2) + b"ok", 205, 205),
    "a second answer behind it": (
        head(content_length=2) + b"ok" + head("500 Unasked", content_length=0),
        200,
        200,
    ),
    "empty lines behind it": (head(content_length=2) + b"ok\r\n\r\n", 200, 200),
    "no body at all": (head(content_length=1), 200, 200),
    "a chunk size that is not a number": (
        head(transfer_encoding="chunked") + b"zz\r\nok\r\n0\r\n\r\n",
        200,
        200,
    ),
    "a chunk longer than its size": (
        head(transfer_encoding="chunked") + b"1\r\ntoo long\r\n0\r\n\r\n",
        200,
        200,
    ),
    "chunks that stop": (head(transfer_encoding="chunked") + b"2\r\nok\r\n", 200, 200),
    "chunks without the last empty line": (head(transfer_encoding="chunked") + b"2\r\nok\r\n0\r\n", 200, 200),
    "an enormous chunk size": (head(transfer_encoding="chunked") + b"f" * 40 + b"\r\nok", 200, 200),
    "a negative chunk size": (head(transfer_encoding="chunked") + b"-1\r\nok", 200, 200),
    "chunked without chunks": (head(transfer_encoding="chunked") + b'{"ok":true}', 200, 200),
    "chunked with nothing": (head(transfer_encoding="chunked"), 200, 200),
    "bytes behind the last chunk": (head(transfer_encoding="chunked") + b"0\r\n\r\nmore", 200, 200),
    "a malformed trailer": (head(transfer_encoding="chunked") + b"0\r\nno trailer\r\n\r\n", 200, 200),
    "gzip that is none": (head(content_encoding="gzip", content_length=2) + b"ok", 200, 200),
    # broken lines after the status line
    "two lengths": (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nok", 200, 0),
    "the same length twice": (OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok", 200, 200),
    "a list of lengths": (head(content_length="2, 2") + b"ok", 200, 0),
    "length and chunks": (head(content_length=2, transfer_encoding="chunked") + b"ok", 200, 200),
    "a negative length": (head(content_length=-1) + b"ok", 200, 0),
    "a length with a word in it": (head(content_length="two") + b"ok", 200, 0),
    "a length with a unit": (head(content_length="2 bytes") + b"ok", 200, 0),
    "an empty length": (head(content_length="") + b"ok", 200, 200),
    "a length of 40 digits": (head(content_length="9" * 40) + b"ok", 200, 0),
    "an unknown transfer encoding": (head(transfer_encoding="sponge") + b"ok", 200, 0),
    "identity as transfer encoding": (head(transfer_encoding="identity", content_length=2) + b"ok", 200, 0),
    "NUL in a header": (OK + b"X-Nul: a\0b\r\n\r\n", 200, 0),
    "a header without a name": (OK + b": nameless\r\n\r\n", 200, 0),
    "a header without a colon": (OK + b"nonsense\r\nContent-Length: 0\r\n\r\n", 200, 0),
    "a space in a header's name": (OK + b"X Y: z\r\nContent-Length: 0\r\n\r\n", 200, 200),
    "a space before the colon": (OK + b"Content-Length : 2\r\n\r\nok", 200, 200),
    "a header that is folded": (OK + b"X-Long: one\r\n  two\r\nContent-Length: 0\r\n\r\n", 200, 200),
    "a header that begins folded": (OK + b" folded: yes\r\nContent-Length: 0\r\n\r\n", 200, 0),
    "bytes beyond ASCII in a header": (OK + b"X-Name: caf\xe9\xff\r\nContent-Length: 0\r\n\r\n", 200, 200),
    "a control character in a header": (OK + b"X-Bell: \x07\r\nContent-Length: 0\r\n\r\n", 200, 0),
    "line ends without CR": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", 200, 200),
    "line ends of both kinds": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\n\r\nok", 200, 200),
    "a head that stops": (OK + b"Content-Le", 200, 0),
    "a status line and nothing else": (OK, 200, 0),
    "200 headers": (OK + b"X-More: yes\r\n" * 200 + b"Content-Length: 0\r\n\r\n", 200, 200),
    "a header of 100,000 bytes": (
        OK + b"X-Long: " + b"x" * 100_000 + b"\r\nContent-Length: 0\r\n\r\n",
        200,
        200,
    ),
    "an upgrade offered with it": (head(upgrade="h2c", connection="Upgrade", content_length=0), 200, 200),
    # the status line itself
    "no reason": (b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", 200, 200),
    "no reason and no space": (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200, 200),
    "a reason glued to the status": (b"HTTP/1.1 200OK\r\nContent-Length: 0\r\n\r\n", 200, 0),
    "two spaces before the status": (b"HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n", 200, 200),
    "a tab before the status": (b"HTTP/1.1\t200 OK\r\nContent-Length: 0\r\n\r\n", 0, 0),
    "a reason beyond ASCII": (b"HTTP/1.1 200 \xe2\x9c\x93\r\nContent-Length: 0\r\n\r\n", 200, 200),
    "an unknown HTTP version": (b"HTTP/9.7 200 OK\r\nContent-Length: 0\r\n\r\n", 0, 200),
    "HTTP/2 in plain text": (b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n", 200, 0),
    "HTTP/1.2": (b"HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n", 0, 200),
    "an empty line before it": (b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 0, 0),
    "a blank before it": (b" HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 0, 0),
    "the status 299": (head("299 Odd", content_length=0), 299, 299),
    # responses that are not a success
    "a 500 with a broken body": (head("500 Sorry", transfer_encoding="chunked") + b"zz\r\n", 500, 500),
    "a 404 with two lengths": (b"HTTP/1.1 404 No\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 404, 0),
    "a redirect with a broken head": (b"HTTP/1.1 302 Found\r\nnonsense\r\n\r\n", 302, 0),
    "a 400 whose head stops": (b"HTTP/1.1 400 Bad\r\nCont", 400, 0),
    # no response
    "nothing": (b"", 0, 0),
    "HTTP/0.9": (b"<html>hello</html>", 0, 0),
    "a status line that stops": (b"HTTP/1.1 200 O", 0, 0),
    "a status of one digit": (b"HTTP/1.1 2 OK\r\n\r\n", 0, 0),
    "a status of four digits": (b"HTTP/1.1 2000 OK\r\n\r\n", 0, 0),
    "a status that is a word": (b"HTTP/1.1 OK 200\r\n\r\n", 0, 0),
    "announcements and no answer": (head("100 Continue") + head("102 Processing"), 102, 0),
    "a 200 in an announcement": (b"HTTP/1.1 100 Continue\r\nX: HTTP/1.1 200 OK\r\n\r\n", 100, 0),
    "another protocol": (b"220 mail.example ESMTP\r\n", 0, 0),
}

LENIENT = {"an empty line before it": 200, "a tab before the status": 200, "a blank before it": 200}
"""Responses in which the relay reads a status, but neither curl nor Go does."""


def status_of(name: str) -> int | None:
    """Return the status that the relay must read: that of curl or Go; None: no response."""
    _, curl, go = SLOPPY[name]
    status = LENIENT.get(name, max(curl, go))
    return status if status >= FINAL else None
