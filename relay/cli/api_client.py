"""The running relay, as commands reach it: its admin API over the unix socket, or by URL and token.

Plain `http.client`: a command must start fast, and aiohttp alone takes longer to import than it to answer.
"""

import functools
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

from relay.cli.exit_codes import FAILED, INTERRUPTED, NOT_ALLOWED, NOTHING, UNREACHABLE, CommandError
from relay.cli.options import FILE, config_option
from relay.cli.output import show_progress
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import Service, installed, service_of
from relay.config.paths import find_config, is_there, look_for_config, socket_path
from relay.config.problems import ConfigError
from relay.config.schema import Admin, Config
from relay.config.tables import bind_tables

STREAM = "text/event-stream"


class Stream:
    """What happens at the relay, one thing after the other, until it ends the stream or cannot be heard.

    The relay says something every 15 s: a connection that is silent for longer than any answer may take
    is a lost one.
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
        """Yield each event's name and what it says."""
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
        """Return the next line with its end; `""`: there is none."""
        try:
            line = self._response.readline()
        except (OSError, http.client.HTTPException):
            return ""
        return line.decode() if line.endswith(b"\n") else ""


VARIABLE = "RELAY_SOCKET"
RUNTIME = Path("/run/relay")
"""Where the socket is with `RuntimeDirectory=relay`; a shell does not have the unit's environment."""

SECONDS = 60.0
"""How long an answer may take to begin."""

_CODES: Mapping[int, int] = {
    HTTPStatus.UNAUTHORIZED: NOT_ALLOWED,
    HTTPStatus.FORBIDDEN: NOT_ALLOWED,
    HTTPStatus.NOT_FOUND: NOTHING,
}


class _Place(Protocol):
    """Where a relay listens."""

    name: str
    headers: Mapping[str, str]

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection, not open yet."""
        ...

    def silent(self) -> str:
        """Return what to try when nobody answers there."""
        ...

    def denied(self) -> str:
        """Return what to try when this user may not connect there."""
        ...


class Daemon:
    """Asks the running relay; every path starts below `/api/` and is given segment by segment.

    All verbs raise `CommandError` where the relay cannot be reached, does not allow it, or says no.
    """

    def __init__(self, place: _Place) -> None:
        self._place = place

    def get(self, *path: str, **query: object) -> Any:
        """Return what is there; a query's value None leaves it out.

        `daemon.get("destinations", name)`, `daemon.get("deliveries", state="dead", limit=50)`.
        """
        return self._ask("GET", path, _query(query))

    def post(self, *path: str, body: object = None) -> Any:
        """Have something done and return what came of it; `body` is anything that JSON can say."""
        return self._ask("POST", path, body=body)

    def delete(self, *path: str) -> Any:
        """Remove something and return what came of it."""
        return self._ask("DELETE", path)

    def read(self, *path: str) -> bytes:
        """Return what is there as it came, byte for byte."""
        status, content = self._exchange("GET", path)
        if status != HTTPStatus.OK:
            self._refused(status, self._decode(content))
        return content

    def lines(
        self, method: str, *path: str, body: object = None, **query: object
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the lines of JSON of an answer as they come; closing the iterator hangs up."""
        for line in self.stream(method, *path, body=body, **query):
            yield self._decode(line)

    def stream(
        self, method: str, *path: str, body: object = None, **query: object
    ) -> Generator[bytes, None, None]:
        """Yield the lines of an answer as they come; closing the iterator hangs up."""
        with self._failing(), closing(self._place.connect()) as connection:
            self._send(connection, method, path, _query(query), body)
            response = connection.getresponse()
            if response.status != HTTPStatus.OK:
                self._refused(response.status, self._decode(response.read()))
            yield from response

    def follow(self, *path: str, **query: object) -> Stream:
        """Hear what happens there; it has begun when this returns, and ends as said at `Stream`."""
        with self._failing(), ExitStack() as ending:
            connection = ending.enter_context(closing(self._place.connect()))
            self._send(connection, "GET", path, _query(query), None)
            response = connection.getresponse()
            if response.status == HTTPStatus.OK and response.getheader("Content-Type", "").startswith(STREAM):
                ending.pop_all()
                return Stream(connection, response)
            return self._refused(response.status, self._decode(response.read()))

    def send(self, *path: str, chunks: Iterable[bytes], **query: object) -> Any:
        """Send a body piece by piece and return what came of it; an early answer ends the sending."""
        with self._failing(), closing(self._place.connect()) as connection:
            connection.putrequest("POST", _target(path, _query(query)))
            headers = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}
            for name, value in {**headers, **self._place.headers}.items():
                connection.putheader(name, value)
            connection.endheaders()
            with suppress(BrokenPipeError, ConnectionResetError):  # it has answered and said why, one hopes
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

    def _ask(self, method: str, path: tuple[str, ...], query: str = "", body: object = None) -> Any:
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
        """Say in words why nobody could be asked."""
        try:
            yield
        except PermissionError:
            raise CommandError(
                f"may not use {self._place.name}", hint=self._place.denied(), code=NOT_ALLOWED
            ) from None
        except TimeoutError:
            raise self._unreachable(f"{self._place.name} does not answer") from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise self._unreachable(f"no relay answers at {self._place.name}: {why}") from None

    def _decode(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            raise self._unreachable(f"what answers at {self._place.name} is no relay") from None

    def _unreachable(self, message: str) -> CommandError:
        return CommandError(message, hint=self._place.silent(), code=UNREACHABLE)

    def _refused(self, status: int, answer: Any) -> Never:
        error = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(error, dict):
            raise self._unreachable(f"what answers at {self._place.name} is no relay (HTTP {status})")
        message, hint = str(error.get("message") or f"HTTP {status}"), str(error.get("hint") or "")
        raise CommandError(message, hint=hint, code=_CODES.get(status, FAILED))


def _target(path: tuple[str, ...], query: str) -> str:
    if "" in path:
        raise click.UsageError("an argument is empty: is a variable of the shell not set?")
    return "/".join(["/api", *(quote(segment, safe="") for segment in path)]) + query


def _has_answered(connection: http.client.HTTPConnection) -> bool:
    """Whether something can be read; over TLS that may be anything, so it says nothing there."""
    if isinstance(connection.sock, ssl.SSLSocket):
        return False
    return bool(select.select([connection.sock], [], [], 0)[0])


def _query(query: Mapping[str, object]) -> str:
    told = {name: value for name, value in query.items() if value is not None}
    return f"?{urlencode(told)}" if told else ""


class _Socket:
    """A unix socket on this machine; its permissions are the access control."""

    headers: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def connect(self) -> http.client.HTTPConnection:
        return _SocketConnection(self.path)

    def silent(self) -> str:
        if _service_at(self.path) is not None:
            return "start it with `systemctl start relay`; `systemctl status relay` says why it does not run"
        return f"start one with `relay serve`, or name its socket with --socket or {VARIABLE}"

    def denied(self) -> str:
        service = _service_at(self.path)
        if service is None:
            return "run the command as root, or as a member of the group that the socket belongs to"
        group = service.group
        return f"run the command as root, or as a member of the group {group}: `adduser NAME {group}`"


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("relay", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _Url:
    """An admin listener somewhere, which wants one of `[admin] tokens`."""

    def __init__(self, url: str, token: str) -> None:
        self.name = url
        parts = urlsplit(url)
        try:
            self._address = (parts.hostname or "", parts.port)
        except ValueError:
            self._address = ("", None)
        if parts.scheme not in ("http", "https") or not self._address[0] or parts.path.strip("/"):
            raise click.BadParameter('expected "http://host:port" or "https://host:port"', param_hint="--url")
        self._secure = parts.scheme == "https"
        self.headers: Mapping[str, str] = {"Authorization": f"Bearer {token}"}

    def connect(self) -> http.client.HTTPConnection:
        host, port = self._address
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
        return http.client.HTTPConnection(host, port, timeout=SECONDS)

    def silent(self) -> str:
        return "see `[admin] listen` in its config.toml; it is reached from its own machine by default"

    def denied(self) -> str:
        return "a firewall of this machine forbids the connection"


def daemon_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which relay is meant, and that one as its argument `daemon`."""

    @config_option
    @click.option(
        "--socket",
        "socket_file",
        type=FILE,
        envvar=VARIABLE,
        show_envvar=True,
        help="The relay's unix socket; else the configuration's.",
    )
    @click.option("--url", help='A relay elsewhere: its admin listener, such as "http://127.0.0.1:8081".')
    @click.option(
        "--token-file",
        type=FILE,
        help="With --url: the file that one of its `[admin] tokens` stands in.",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        config: Path | None,
        socket_file: Path | None,
        url: str | None,
        token_file: Path | None,
        **options: Any,
    ) -> Any:
        place: _Place
        if url is not None:
            if token_file is None:
                raise click.UsageError("--url needs --token-file")
            place = _Url(url, _token(token_file))
        elif token_file is not None:
            raise click.UsageError("--token-file goes with --url")
        else:
            place = _Socket(socket_file or _socket_of(config))
        return command(*args, daemon=Daemon(place), **options)

    return wrapped


def _token(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError as error:
        hint = "it must be readable for who runs the command"
        raise CommandError(f"{file} cannot be read: {error.strerror}", hint=hint, code=NOT_ALLOWED) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CommandError(f"{file} cannot be read: {why}", hint="write the token into it") from None


def _socket_of(given: Path | None) -> Path:
    """Return the socket of the configuration; what is wrong with it otherwise does not matter here."""
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
    """Return the socket that the service's daemon has, also where this user may not read its config."""
    environ = {**service.directories, **os.environ}
    try:
        config = bind_tables(Binder(read(service.config), environ, lenient=True))
    except ConfigError:  # the daemon that holds its sockets until the config is mended has the default, too
        config = Config(path=service.config, state_dir=Path(environ.get("STATE_DIRECTORY", RUNTIME)))
    return socket_path(config, environ)


def _service_at(socket_file: Path) -> Service | None:
    """Return the installed service if this is its socket."""
    service = installed()
    return service if service is not None and _socket_of_service(service) == socket_file else None


AGAIN = 0.5
"""Seconds between tries to reach a relay that was there before."""


def live(
    daemon: Daemon, what: str, away: Callable[[], None], back: Callable[[], None], **query: object
) -> Generator[tuple[str, Any], None, None]:
    """Yield what a stream says; `away` is called whenever it has ended, `back` when it goes on.

    Raises:
        CommandError: the relay was not there to begin with, or does not allow it.
    """
    stream = daemon.follow(what, **query)
    while True:
        with stream:
            yield from stream
        away()
        stream = _again(daemon, what, query)
        back()


def _again(daemon: Daemon, what: str, query: dict[str, object]) -> Stream:
    while True:
        try:
            return daemon.follow(what, **query)
        except CommandError as error:
            # One that starts or stops, or has no room for the moment, will have it later.
            if error.code not in (UNREACHABLE, FAILED):
                raise
        time.sleep(AGAIN)


def work(
    daemon: Daemon,
    *path: str,
    method: str = "POST",
    body: object = None,
    tell: Callable[[Mapping[str, Any]], str],
    stopped: str,
) -> Any:
    """Have the relay do long work, show how far it is, and return what came of it.

    Ctrl-C hangs up, which ends the work; `stopped` says what that means.

    Raises:
        CommandError: it failed, was interrupted, or the relay went away.
    """
    try:
        with closing(daemon.lines(method, *path, body=body)) as lines:
            for line in lines:
                if "result" in line:
                    return line["result"]
                if "error" in line:
                    raise CommandError(line["error"]["message"], hint=line["error"]["hint"], code=FAILED)
                show_progress(tell(line["progress"]))
    except KeyboardInterrupt:
        raise CommandError(f"interrupted: {stopped}", code=INTERRUPTED) from None
    finally:
        show_progress("")
    raise CommandError("the relay ended before it was through", hint="see its log; run the command again")
