"""Client of the daemon's admin API: over its unix socket, or by URL and token.

It uses `http.client`, because a command must start fast: the import of aiohttp takes longer than a request.
"""

import http.client
import json
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, Never, Protocol, Self
from urllib.parse import quote, urlencode, urlsplit

import click

from relay.cli.main import FAILED, INTERRUPTED, NOT_ALLOWED, NOTHING, UNREACHABLE, CommandError, file_error
from relay.cli.output import show_progress
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import Service, installed, service_of, start_command
from relay.config.paths import find_config, is_there, look_for_config, socket_path
from relay.config.problems import ConfigError
from relay.config.schema import Admin, Config
from relay.config.tables import bind_tables

STREAM = "text/event-stream"


class Stream:
    """Server-sent events of the daemon, until it closes the stream or the connection breaks.

    The daemon writes at least every 15 s. A connection that is silent for `TIMEOUT` is lost.
    Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._connection.close()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and the decoded data of each event."""
        name, data = "", ""
        while line := self._line():
            field, _, value = line.rstrip("\n").partition(": ")
            match field:
                case "event":
                    name = value
                case "data":
                    data = value
                case "" if name:
                    yield name, json.loads(data)
                    name, data = "", ""

    def _line(self) -> str:
        """Return the next line with its newline, `""` at the end of the stream."""
        try:
            line = self._response.readline()
        except (OSError, http.client.HTTPException):
            return ""
        return line.decode() if line.endswith(b"\n") else ""


VARIABLE = "RELAY_SOCKET"
URL_VARIABLE = "RELAY_URL"
TOKEN_FILE_VARIABLE = "RELAY_TOKEN_FILE"  # noqa: S105 - the name of a variable
TOKEN_VARIABLE = "RELAY_TOKEN"  # noqa: S105 - the name of a variable
RUNTIME = Path("/run/relay")
"""Folder of the socket with `RuntimeDirectory=relay`; a shell lacks the unit's environment."""

TIMEOUT = 60.0
"""Seconds until a response must start."""

_CODES: Mapping[int, int] = {
    HTTPStatus.UNAUTHORIZED: NOT_ALLOWED,
    HTTPStatus.FORBIDDEN: NOT_ALLOWED,
    HTTPStatus.NOT_FOUND: NOTHING,
}


class _Place(Protocol):
    """An address of the daemon."""

    name: str  # for messages; includes the environment variable that named it
    headers: Mapping[str, str]
    token: str  # where the token in `headers` comes from, for messages; "": there is none
    url: str | None  # None: a unix socket

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection that is not open yet."""
        ...

    def unreachable_hint(self) -> str:
        """Return the hint for a daemon that does not answer."""
        ...

    def denied_hint(self) -> str:
        """Return the hint for a user without permission to connect."""
        ...


class Daemon:
    """The admin API. A path is below `/api/`, one argument per segment.

    Every method raises `CommandError` if the daemon cannot be reached or responds with an error.
    """

    def __init__(self, place: _Place) -> None:
        self._place = place

    @property
    def url(self) -> str | None:
        """The URL of a remote daemon, without a final slash; None: it is at a unix socket."""
        return self._place.url

    def get(self, *path: str, **query: object) -> Any:
        """Send GET and return the response; query parameters that are None are left out.

        `daemon.get("destinations", name)`, `daemon.get("deliveries", state="dead", limit=50)`.
        """
        return self._request("GET", path, _query(query))

    def post(self, *path: str, body: object = None) -> Any:
        """Send POST with a JSON body and return the response."""
        return self._request("POST", path, body=body)

    def delete(self, *path: str) -> Any:
        """Send DELETE and return the response."""
        return self._request("DELETE", path)

    def read(self, *path: str) -> bytes:
        """Send GET and return the response body as bytes."""
        status, content = self._exchange("GET", path)
        if status != HTTPStatus.OK:
            self._refused(status, self._decode(content))
        return content

    def lines(
        self, method: str, *path: str, body: object = None, **query: object
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the decoded JSON lines of a response as they arrive; close the iterator to disconnect."""
        for line in self.stream(method, *path, body=body, **query):
            yield self._decode(line)

    def stream(
        self, method: str, *path: str, body: object = None, **query: object
    ) -> Generator[bytes, None, None]:
        """Yield the lines of a response as they arrive; close the iterator to disconnect."""
        with self._failing(), closing(self._place.connect()) as connection:
            self._send(connection, method, path, _query(query), body)
            response = connection.getresponse()
            if response.status != HTTPStatus.OK:
                self._refused(response.status, self._decode(response.read()))
            yield from response

    def follow(self, *path: str, **query: object) -> Stream:
        """Open a stream of server-sent events; it is open when this returns."""
        with self._failing(), ExitStack() as ending:
            connection = ending.enter_context(closing(self._place.connect()))
            self._send(connection, "GET", path, _query(query), None)
            response = connection.getresponse()
            if response.status == HTTPStatus.OK and response.getheader("Content-Type", "").startswith(STREAM):
                ending.pop_all()
                return Stream(connection, response)
            return self._refused(response.status, self._decode(response.read()))

    def send(self, *path: str, chunks: Iterable[bytes], **query: object) -> Any:
        """Send a chunked POST and return the response; an early response ends the upload."""
        with self._failing(), closing(self._place.connect()) as connection:
            connection.putrequest("POST", _target(path, _query(query)))
            headers = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}
            for name, value in {**headers, **self._place.headers}.items():
                connection.putheader(name, value)
            connection.endheaders()
            with suppress(BrokenPipeError, ConnectionResetError):  # the response usually has the reason
                for chunk in chunks:
                    if _has_answered(connection):
                        break
                    connection.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                else:
                    connection.send(b"0\r\n\r\n")
            response = connection.getresponse()
            status, answer = response.status, self._decode(response.read())
        if status != HTTPStatus.OK:
            self._refused(status, answer)
        return answer

    def _request(self, method: str, path: tuple[str, ...], query: str = "", body: object = None) -> Any:
        status, content = self._exchange(method, path, query, body)
        answer = self._decode(content)
        if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            self._refused(status, answer)
        return answer

    def _exchange(
        self, method: str, path: tuple[str, ...], query: str = "", body: object = None
    ) -> tuple[int, bytes]:
        with self._failing(), closing(self._place.connect()) as connection:
            self._send(connection, method, path, query, body)
            response = connection.getresponse()
            return response.status, response.read()

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: tuple[str, ...],
        query: str,
        body: object,
    ) -> None:
        headers = {"Accept": "application/json", "Content-Type": "application/json", **self._place.headers}
        payload = None if body is None else json.dumps(body).encode()
        connection.request(method, _target(path, query), payload, headers)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn a failed connection into an error with a hint."""
        try:
            yield
        except PermissionError:
            raise CommandError(
                f"cannot connect to {self._place.name}: permission denied",
                hint=self._place.denied_hint(),
                code=NOT_ALLOWED,
            ) from None
        except TimeoutError:
            raise self._unreachable(f"no answer from {self._place.name} within {TIMEOUT:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise self._unreachable(f"cannot connect to the daemon at {self._place.name}: {why}") from None

    def _decode(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            raise self._unreachable(f"{self._place.name} is not a hookferry admin API") from None

    def _unreachable(self, message: str) -> CommandError:
        return CommandError(message, hint=self._place.unreachable_hint(), code=UNREACHABLE)

    def _refused(self, status: int, answer: Any) -> Never:
        error = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(error, dict):
            raise self._unreachable(f"{self._place.name} is not a hookferry admin API (HTTP {status})")
        message, hint = str(error.get("message") or f"HTTP {status}"), str(error.get("hint") or "")
        if status == HTTPStatus.UNAUTHORIZED and self._place.token:
            hint = f"{self._place.name} does not accept the token from {self._place.token};"
            hint += " use one of `[admin] tokens` in its config.toml"
        raise CommandError(message, hint=hint, code=_CODES.get(status, FAILED))


def _target(path: tuple[str, ...], query: str) -> str:
    if "" in path:
        raise click.UsageError("an argument is empty; check the shell variables in the command")
    return "/".join(["/api", *(quote(segment, safe="") for segment in path)]) + query


def _has_answered(connection: http.client.HTTPConnection) -> bool:
    """Return whether a response has started; always False over TLS, where other records arrive as well."""
    if isinstance(connection.sock, ssl.SSLSocket):
        return False
    return bool(select.select([connection.sock], [], [], 0)[0])


def _query(query: Mapping[str, object]) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    return f"?{urlencode(given)}" if given else ""


class _Socket:
    """The unix socket; its file permissions control access."""

    token = ""
    url: str | None = None

    def __init__(self, path: Path, variable: str, timeout: float) -> None:
        behind = os.environ.get("SUDO_USER") or os.environ.get("DOAS_USER")
        self.headers: Mapping[str, str] = {"X-Relay-Operator": behind} if behind else {}
        self.path = path
        self.name = f"{path}{_from(variable)}"
        self._timeout = timeout

    def connect(self) -> http.client.HTTPConnection:
        return _SocketConnection(self.path, self._timeout)

    def unreachable_hint(self) -> str:
        if _service_at(self.path) is not None:
            return f"start it with `{start_command()}`; `systemctl status relay` shows why it is not running"
        return f"start it with `relay serve`, or name its socket with --socket or {VARIABLE}"

    def denied_hint(self) -> str:
        service = _service_at(self.path)
        if service is None:
            return "run the command as root, or as a member of the group that owns the socket"
        group = service.group
        return f"run the command as root, or as a member of the group {group}: `adduser NAME {group}`"


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("relay", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _Url:
    """An admin listener; it requires one of `[admin] tokens`."""

    def __init__(self, url: str, variable: str, token: tuple[str, str], timeout: float) -> None:
        self.name = f"{url}{_from(variable)}"
        self.url: str | None = url.rstrip("/")
        secret, self.token = token
        self._timeout = timeout
        parts = urlsplit(url)
        try:
            self._address = (parts.hostname or "", parts.port)
        except ValueError:
            self._address = ("", None)
        if parts.scheme not in ("http", "https") or not self._address[0] or parts.path.strip("/"):
            what = f'expected "http://host:port" or "https://host:port", got "{url}"'
            raise click.BadParameter(what, param_hint=variable or "--url")
        self._secure = parts.scheme == "https"
        self.headers: Mapping[str, str] = {"Authorization": f"Bearer {secret}"}

    def connect(self) -> http.client.HTTPConnection:
        host, port = self._address
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self._timeout, context=context)
        return http.client.HTTPConnection(host, port, timeout=self._timeout)

    def unreachable_hint(self) -> str:
        return "check `[admin] listen` in its config.toml; by default it accepts local connections only"

    def denied_hint(self) -> str:
        return "a firewall on this machine blocks the connection"


def _from(variable: str) -> str:
    return f" (from {variable})" if variable else ""


def daemon_at(
    config: Path | None,
    socket_file: Path | None,
    url: str | None,
    token_file: Path | None,
    *,
    environ: Mapping[str, str] = os.environ,
    timeout: float | None = None,
) -> Daemon:
    """Return the client for the daemon that a command's options name, else the environment.

    An option on the command line has priority over variables. `timeout` is in seconds, `TIMEOUT` by default.

    Raises:
        UsageError: the options or the variables contradict each other.
    """
    given_url, given_socket = environ.get(URL_VARIABLE), environ.get(VARIABLE)
    timeout = TIMEOUT if timeout is None else timeout
    if url is not None:
        if socket_file is not None:
            raise click.UsageError("--url and --socket name two daemons; use one of them")
        return Daemon(_Url(url, "", _token(token_file, environ, "--url"), timeout))
    if socket_file is None and config is None and given_url:
        if given_socket:
            what = f"{URL_VARIABLE} and {VARIABLE} are both set, and name two daemons"
            raise click.UsageError(f"{what}; unset one of them, or use --url or --socket")
        return Daemon(_Url(given_url, URL_VARIABLE, _token(token_file, environ, URL_VARIABLE), timeout))
    if token_file is not None:
        raise click.UsageError(f"--token-file needs --url or {URL_VARIABLE}")
    if socket_file is None and config is None and given_socket:
        return Daemon(_Socket(Path(given_socket), VARIABLE, timeout))
    return Daemon(_Socket(socket_file or _socket_of(config), "", timeout))


def _token(given: Path | None, environ: Mapping[str, str], needed_by: str) -> tuple[str, str]:
    """Return the token for an admin listener, and where it comes from.

    Raises:
        UsageError: neither an option nor the environment has one.
        CommandError: its file cannot be read, or it cannot be a token.
    """
    named = environ.get(TOKEN_FILE_VARIABLE)
    if given is not None:
        token, place = _token_in(given), f"{given}"
    elif named:
        token, place = _token_in(Path(named)), f"{named}{_from(TOKEN_FILE_VARIABLE)}"
    elif (value := environ.get(TOKEN_VARIABLE)) is not None:
        token, place = value.strip(), TOKEN_VARIABLE
    else:
        raise click.UsageError(f"{needed_by} needs --token-file, {TOKEN_FILE_VARIABLE} or {TOKEN_VARIABLE}")
    if not token.isascii() or not token.isprintable() or set(token) & {" "} or not token:
        why = "is empty" if not token else "contains spaces, line breaks or characters other than ASCII"
        raise CommandError(f"the token from {place} {why}", hint="an admin token is one line of ASCII text")
    return token, place


def _token_in(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError as error:
        raise file_error(f"cannot read {file}", error, "make the file readable for this user") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CommandError(
            f"cannot read {file}: {why}", hint="write the admin token into this file"
        ) from None


def _socket_of(given: Path | None) -> Path:
    """Return the socket of the configuration, despite problems in other parts of the file."""
    file = look_for_config(given)
    if file is None and is_there(RUNTIME / Admin().socket):
        return RUNTIME / Admin().socket
    if (service := service_of(file)) is not None:
        return _socket_of_service(service)
    file = find_config(given)
    config = bind_tables(Binder(read(file), os.environ, lenient=True))
    path, in_runtime = socket_path(config), RUNTIME / config.admin.socket
    return in_runtime if is_there(in_runtime) and not is_there(path) else path


def _socket_of_service(service: Service) -> Path:
    """Return the socket of the installed service, even if this user cannot read its configuration."""
    environ = {**service.directories, **os.environ}
    try:
        config = bind_tables(Binder(read(service.config), environ, lenient=True))
    except ConfigError:  # a daemon that waits for a valid configuration uses the default socket
        config = Config(path=service.config, state_dir=Path(environ.get("STATE_DIRECTORY", RUNTIME)))
    return socket_path(config, environ)


def _service_at(socket_file: Path) -> Service | None:
    """Return the installed service if the socket belongs to it."""
    service = installed()
    return service if service is not None and _socket_of_service(service) == socket_file else None


RETRY_EVERY = 0.5
"""Seconds between attempts to reconnect to a daemon that restarts."""


def follow_stream(
    daemon: Daemon,
    name: str,
    lost: Callable[[], None],
    restored: Callable[[], None],
    *,
    since: str | None = None,
    **query: object,
) -> Generator[tuple[str, Any], None, None]:
    """Yield the events of a stream; reconnect after the daemon restarts.

    `lost` is called when the stream ends, `restored` after it is open again. `since` is only sent at first.

    Raises:
        CommandError: the first connection fails, or the daemon does not allow the stream.
    """
    stream = daemon.follow(name, since=since, **query)
    while True:
        with stream:
            yield from stream
        lost()
        stream = _reconnected(daemon, name, query)
        restored()


def _reconnected(daemon: Daemon, name: str, query: dict[str, object]) -> Stream:
    while True:
        try:
            return daemon.follow(name, **query)
        except CommandError as error:
            # A daemon that starts, stops or has its maximum of followers accepts the stream later.
            if error.code not in (UNREACHABLE, FAILED):
                raise
        time.sleep(RETRY_EVERY)


def run_operation(
    daemon: Daemon,
    *path: str,
    method: str = "POST",
    body: object = None,
    describe: Callable[[Mapping[str, Any]], str],
    stopped: str,
) -> Any:
    """Run a long operation in the daemon, show its progress, and return its result.

    Ctrl-C disconnects, which stops the operation; `stopped` is the message about the unfinished part.

    Raises:
        CommandError: the operation failed or was interrupted, or the daemon stopped.
    """
    try:
        with closing(daemon.lines(method, *path, body=body)) as lines:
            for line in lines:
                if "result" in line:
                    return line["result"]
                if "error" in line:
                    raise CommandError(line["error"]["message"], hint=line["error"]["hint"], code=FAILED)
                show_progress(describe(line["progress"]))
    except KeyboardInterrupt:
        raise CommandError(f"interrupted: {stopped}", code=INTERRUPTED) from None
    finally:
        show_progress("")
    raise CommandError(
        "the daemon stopped before the operation finished",
        hint="check its log, then run the command again",
    )
