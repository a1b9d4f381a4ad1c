"""Endpoints of the admin API. Each endpoint is declared once, at its handler.

The declaration determines its route, the validation of its query and body, and its OpenAPI operation.
"""

import re
import types
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

import msgspec
from aiohttp import web

from relay import __version__
from relay.api.auth import check_scope
from relay.api.query_params import plain, read_query, without_none
from relay.api.responses import LINES, body_of, respond
from relay.config.schema import Scope

T = TypeVar("T")
H = TypeVar("H", bound=Callable[..., Awaitable[Any]])

JSON = "application/json"
EVENT_STREAM = "text/event-stream"


class Page(msgspec.Struct, Generic[T]):
    """One page of a list."""

    items: tuple[T, ...]
    next_cursor: str | None


class IdPage(Page[T], Generic[T]):
    """One page of events, deliveries or attempts."""

    id_digits: Annotated[
        int,
        msgspec.Meta(
            description="Hex digits, without prefix and dashes, that are enough to look up each event or "
            "delivery of this page."
        ),
    ]


class Lines(Generic[T]):
    """Response of a long operation: lines of JSON with its progress, then its result or its error."""


class _Progress(msgspec.Struct):
    progress: dict[str, Any]


class _Result(msgspec.Struct, Generic[T]):
    result: T


class ProblemView(msgspec.Struct):
    """One problem of config.toml."""

    file: str
    line: int
    key: str
    problem: str


class ErrorDetailView(msgspec.Struct):
    """Why a request failed."""

    code: str
    message: str
    hint: Annotated[str, msgspec.Meta(description="What to do next. May be empty.")]
    problems: tuple[ProblemView, ...] | msgspec.UnsetType = msgspec.UNSET


class ErrorView(msgspec.Struct):
    """The response to a failed request."""

    error: ErrorDetailView


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path."""

    method: str
    path: str  # as aiohttp writes it
    name: str  # its operationId
    summary: str
    query: type[msgspec.Struct] | None  # None: query parameters are ignored
    body: Any  # a Struct, the content type of a body that the handler reads itself, or None
    optional_body: bool  # whether an empty body counts as `{}`
    answers: Mapping[int, Any]  # type of the response by status
    content: str  # content type of the responses
    find: str | None  # name of a method that raises `UnknownError` if the path names an unknown object
    scope: Scope | None  # that its token needs; None: it needs no token

    @property
    def documented_path(self) -> str:
        """Return the path as OpenAPI writes it."""
        return re.sub(r"{(\w+):[^{}]*}", r"{\1}", self.path)

    def route(
        self, handler: Callable[..., Awaitable[Any]], find: Callable[[web.Request], object] | None = None
    ) -> web.RouteDef:
        """Return the route to a bound handler; `find` is the bound method of that name."""
        read_body = isinstance(self.body, type)
        status = min(self.answers)

        async def answer(request: web.Request) -> web.StreamResponse:
            if self.scope is not None:
                check_scope(request, self.scope)
            if find is not None:
                find(request)
            arguments = [] if self.query is None else [read_query(dict(request.query), self.query)]
            if read_body:
                arguments.append(await body_of(request, self.body, optional=self.optional_body))
            result = await handler(request, *arguments)
            return result if isinstance(result, web.StreamResponse) else respond(result, status)

        options = {"allow_head": False} if self.method == "GET" and self.content == EVENT_STREAM else {}
        return web.RouteDef(self.method, self.path, answer, options)


def endpoint(
    method: str,
    path: str,
    name: str,
    summary: str,
    *,
    returns: Any,
    query: type[msgspec.Struct] | None = None,
    body: Any = None,
    optional_body: bool = False,
    find: str | None = None,
    status: int = 200,
    also: Mapping[int, Any] | None = None,
    content: str = JSON,
    public: bool = False,
    scope: Scope | None = None,
) -> Callable[[H], H]:
    """Declare an endpoint at its handler.

    Args:
        method: GET, POST or DELETE.
        path: as aiohttp writes it, with `{name}` or `{name:pattern}`.
        name: its operationId in the OpenAPI document.
        summary: one sentence.
        returns: the type of the response, a union of types, `Page[…]` or `Lines[…]`.
        query: Struct of the query parameters; the handler takes it after the request.
        body: Struct of the request body, which the handler takes last; or the content type of a body that
            the handler reads itself.
        optional_body: whether an empty body counts as `{}`.
        find: name of a method that gets the request and raises `UnknownError` if its path names an unknown
            object. It is called before the body is read, so that such a request gets 404 with any body.
        status: of the response.
        also: further statuses and the types of their responses.
        content: content type of the response.
        public: whether it needs no token.
        scope: of the tokens that may use it; by default `read` if it changes nothing, else `operate`.
    """
    if any(get_origin(each) is Lines for each in (returns, *get_args(returns))):
        content = LINES
    declared = Endpoint(
        method=method, path=path, name=name, summary=summary, query=query, body=body,
        optional_body=optional_body, find=find,
        answers={status: returns, **(also or {})}, content=content,
        scope=None if public else scope or ("read" if method == "GET" else "operate"),
    )  # fmt: skip

    def declare(handler: H) -> H:
        setattr(handler, "endpoint", declared)  # noqa: B010 - functions have no declared attributes
        return handler

    return declare


def endpoints_of(resource: type) -> dict[str, Endpoint]:
    """Return the endpoints that a class declares, by the names of their handlers."""
    found = {name: getattr(each, "endpoint", None) for name, each in vars(resource).items()}
    return {name: each for name, each in found.items() if each is not None}


def routes_of(resource: object) -> list[web.RouteDef]:
    """Return the routes to the handlers of an object."""
    declared = endpoints_of(type(resource))
    return [
        each.route(getattr(resource, name), None if each.find is None else getattr(resource, each.find))
        for name, each in declared.items()
    ]


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI document of the given endpoints."""
    declared = tuple(endpoints)
    schemas = _Schemas(declared)
    paths: dict[str, dict[str, Any]] = {}
    for each in declared:
        paths.setdefault(each.documented_path, {})[each.method.lower()] = _operation(each, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hookferry admin API",
            "version": __version__,
            "description": "On the unix socket, and on the admin listener with one of `[admin] tokens`."
            " See docs/api.md.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "http://127.0.0.1:8081", "description": "`[admin] listen`"}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "One of `[admin] tokens`, with the named scope or one that includes it: "
                    "`read`, `operate`, `admin`. The unix socket needs none.",
                }
            },
            "responses": {"Error": {"description": "Error", **_content(JSON, schemas.of(ErrorView))}},
            "schemas": schemas.components,
        },
    }


class _Schemas:
    """The JSON schemas of all types that the given endpoints use."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        declared = tuple(endpoints)
        self.components: dict[str, Any] = {}
        self._made: dict[Any, Any] = {}
        answers = [part for each in declared for answer in each.answers.values() for part in _parts(answer)]
        self._add([ErrorView, *answers], is_answer=True)
        queries = [type_ for each in declared for type_, _ in _parameters(each.query)]
        bodies = [each.body for each in declared if isinstance(each.body, type)]
        self._add([*queries, *bodies], is_answer=False)

    def of(self, type_: Any) -> Any:
        """Return the schema of a type; a reference if the type is a component."""
        return self._made[type_]

    def _add(self, kinds: Iterable[Any], *, is_answer: bool) -> None:
        distinct = tuple(dict.fromkeys(kinds))
        made, found = msgspec.json.schema_components(distinct, ref_template="#/components/schemas/{name}")
        inline = {f"#/components/schemas/{name}": each for name, each in found.items() if "_" in name}
        self._made |= dict(zip(distinct, _clean(made, inline, is_answer=is_answer), strict=True))
        named = {name: each for name, each in found.items() if "_" not in name}
        cleaned = _clean(named, inline, is_answer=is_answer)
        self.components |= {_without_view(name): each for name, each in cleaned.items()}


def _parts(answer: Any) -> tuple[Any, ...]:
    """Return the types of the documents that a response consists of."""
    if get_origin(answer) is Lines:
        result: Any = _Result  # mypy accepts no computed type
        return (_Progress, result[get_args(answer)[0]], ErrorView)
    if get_origin(answer) in (Union, types.UnionType):  # msgspec describes only tagged unions of Structs
        return tuple(part for each in get_args(answer) for part in _parts(each))
    return (answer,)


def _without_view(name: str) -> str:
    return name.removesuffix("View")


def _clean(value: Any, inline: Mapping[str, Any], *, is_answer: bool) -> Any:
    """Return a schema for the document: objects closed, generic types inline, names without View.

    A response has all of its fields, also those with a default; only `UNSET` fields may be absent.
    """
    if isinstance(value, list | tuple):
        return [_clean(each, inline, is_answer=is_answer) for each in value]
    if not isinstance(value, dict):
        return value
    reference = value.get("$ref", "")
    if reference in inline:
        cleaned: dict[str, Any] = _clean(inline[reference], inline, is_answer=is_answer)
        return {key: each for key, each in cleaned.items() if key not in ("title", "description")}
    if reference:
        return {**value, "$ref": _without_view(reference)}
    made = {key: _clean(each, inline, is_answer=is_answer) for key, each in value.items()}
    if "enum" in made:
        made["type"] = "string"
    if "title" in made and "properties" in made:  # a Struct
        made["additionalProperties"] = False
        if is_answer:
            fields = value["properties"].items()
            made["required"] = [
                name for name, each in fields if name in value.get("required", ()) or "default" in each
            ]
    if is_answer or made.get("default", ...) is None:
        made.pop("default", None)
    if isinstance(made.get("title"), str):
        made["title"] = _without_view(made["title"])
    return made


def _operation(each: Endpoint, schemas: _Schemas) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": each.name, "summary": each.summary}
    if parameters := [*_path_parameters(each.path), *_query_parameters(each.query, schemas)]:
        operation["parameters"] = parameters
    if each.body is not None:
        is_type = isinstance(each.body, type)
        kind, schema = (JSON, schemas.of(each.body)) if is_type else (each.body, {"type": "string"})
        operation["requestBody"] = {"required": not each.optional_body, **_content(kind, schema)}
    answers: dict[str, Any] = {}
    for status, answer in each.answers.items():
        options = [schemas.of(part) for part in _parts(answer)]
        schema = options[0] if len(options) == 1 else {"anyOf": options}
        answers[str(status)] = {"description": _PHRASES[status], **_content(each.content, schema)}
    operation["responses"] = {**answers, "default": {"$ref": "#/components/responses/Error"}}
    operation["security"] = [] if each.scope is None else [{"token": [each.scope]}]
    return operation


_PHRASES = {200: "OK", 201: "Created", 409: "Conflict", 503: "Service Unavailable"}


def _content(kind: str, schema: Any) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema}}}


def _path_parameters(path: str) -> Iterator[dict[str, Any]]:
    for name, pattern in re.findall(r"{(\w+)(?::([^{}]*))?}", path):
        words = {"enum": pattern.split("|")} if re.fullmatch(r"\w+(\|\w+)+", pattern) else {}
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", **words}}


def _query_parameters(query: type[msgspec.Struct] | None, schemas: _Schemas) -> Iterator[dict[str, Any]]:
    for type_, field in _parameters(query):
        meta = plain(field.type)[1]
        schema = {key: each for key, each in schemas.of(type_).items() if key != "description"}
        if choices := (meta.extra or {}).get("choices"):
            schema["enum"] = list(choices)
        if not field.required and field.default is not None:
            schema["default"] = field.default
        is_text = "type" in schema or "enum" in schema  # anything else is JSON in a query
        described: dict[str, Any] = {
            "name": field.name, "in": "query", "description": meta.description
        }  # fmt: skip
        described |= {"required": True} if field.required else {}
        yield described | ({"schema": schema} if is_text else _content(JSON, schema))


def _parameters(query: type[msgspec.Struct] | None) -> Iterator[tuple[Any, msgspec.structs.FieldInfo]]:
    """Yield each parameter of a query with its type, without `| None`."""
    for field in () if query is None else msgspec.structs.fields(query):
        yield without_none(field.type), field
