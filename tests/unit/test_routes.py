"""The handler of a path: literals before placeholders, in any order of declaration."""

import pytest

from relay.config.schema import SourceConfig
from relay.errors import Malformed, NotFound
from relay.ingest.routes import Routes, mounts_of
from relay.source import Reply, Source, route


class Paths(Source):
    """Every kind of template."""

    @route("GET", "/a/{one}/{two}")
    def both(self, incoming):
        return Reply(body="both")

    @route("GET", "/a/{one}/end")
    def first(self, incoming):
        return Reply(body="first")

    @route("GET", "/a/b/{two}")
    def second(self, incoming):
        return Reply(body="second")

    @route("GET", "/a/{other}/stop")
    def stop(self, incoming):
        return Reply(body="stop")

    @route("GET", "/a/b/end")
    def literal(self, incoming):
        return Reply(body="literal")

    @route("PUT", "/a/{one}/end")
    def put(self, incoming):
        return Reply(body="put")

    @route("GET", "/w/{id:path}/beat")
    def beat(self, incoming):
        return Reply(body="beat")

    @route("GET", "/w/{id:path}/beat/now")
    def now(self, incoming):
        return Reply(body="now")

    @route("DELETE", "/w/{id:path}")
    def leave(self, incoming):
        return Reply(body="leave")


@pytest.fixture(scope="module")
def routes():
    config = SourceConfig(name="paths", plugin="paths", settings=Paths(), prefix="/mounted")
    return Routes(mounts_of({"paths": config}))


@pytest.mark.parametrize(
    ("path", "body", "params"),
    [
        ("/a/b/end", "literal", {}),
        ("/a/x/end", "first", {"one": "x"}),
        ("/a/x/stop", "stop", {"other": "x"}),
        ("/a/b/y", "second", {"two": "y"}),
        ("/a/x/y", "both", {"one": "x", "two": "y"}),
        ("/a/{one}/y", "both", {"one": "{one}", "two": "y"}),
        ("/a/%2F%20/%C3%A9", "both", {"one": "/ ", "two": "\u00e9"}),
        ("/a//end", "first", {"one": ""}),
        ("/w/x/beat", "beat", {"id": "x"}),
        ("/w/x%2Fy/beat", "beat", {"id": "x/y"}),
        ("/w/x/y/beat", "beat", {"id": "x/y"}),
        ("/w/x/y%2Fz/%C3%A9/beat", "beat", {"id": "x/y/z/\u00e9"}),
        ("/w/x/beat/beat", "beat", {"id": "x/beat"}),
        ("/w/http://x:1/beat", "beat", {"id": "http://x:1"}),
        ("/w/x/beat/now", "now", {"id": "x"}),
        ("/w/x/y/beat/now", "now", {"id": "x/y"}),
    ],
)
def test_the_template_with_the_fewest_placeholders_that_fits_wins(routes, path, body, params):
    match = routes.find(f"/mounted{path}")
    assert (match.handlers["GET"](None).body, match.params) == (body, params)


def test_a_placeholder_spans_segments_only_for_a_method_that_it_has(routes):
    match = routes.find("/mounted/w/x/y", "DELETE")
    assert (match.handlers["DELETE"](None).body, match.params) == ("leave", {"id": "x/y"})
    for method in ("GET", "POST"):
        with pytest.raises(NotFound):
            routes.find("/mounted/w/x/y", method)
    assert routes.find("/mounted/w/x", "POST").params == {"id": "x"}  # known: 405, not 404


@pytest.mark.parametrize("path", ["/w//x/beat", "/w/x//beat", "/w/x/y/beat/", "/w/x/", "/w//", "/w//x"])
def test_an_empty_segment_at_an_edge_is_part_of_no_placeholder(routes, path):
    with pytest.raises(NotFound):
        routes.find(f"/mounted{path}", "GET" if "beat" in path else "DELETE")


def test_two_placeholders_that_span_are_refused_where_they_are_declared():
    with pytest.raises(ValueError, match="may have one"):
        route("GET", "/{a:path}/{b:path}")


def test_the_methods_of_one_path_are_found_together(routes):
    assert set(routes.find("/mounted/a/x/end").handlers) == {"GET", "PUT"}


@pytest.mark.parametrize("path", ["/a/x", "/a/x/y/z", "/b/x/end", "", "/", "//x/end"])
def test_a_path_that_fits_no_template_is_not_found(routes, path):
    with pytest.raises(NotFound):
        routes.find(f"/mounted{path}")
    with pytest.raises(NotFound):
        routes.find("/a/x/end")


def test_a_placeholder_that_is_not_utf_8_is_malformed(routes):
    with pytest.raises(Malformed):
        routes.find("/mounted/a/%FF/y")
