"""Moddy: refused senders, and the health check."""

import pytest
from samples import sources

from relay import __version__
from relay.errors import Draining, PluginFailed, Unauthenticated
from relay.source import Incoming
from relay.sources.moddy import HEALTH, PATH

SOURCE = sources()["moddy"]
HEAD = Incoming.of("POST", PATH)


@pytest.mark.parametrize(
    ("problem", "status", "error"),
    [
        ("missing", 401, "Missing Authorization header"),
        ("scheme", 401, "Invalid Authorization format"),
        ("unknown", 403, "Invalid internal API secret"),
    ],
)
def test_each_problem_of_a_token_has_its_reply(problem, status, error):
    reply = SOURCE.refuse(Unauthenticated(problem=problem), HEAD)
    assert (reply.status, reply.body) == (status, {"error": error})


def test_an_internal_failure_has_the_reply_of_the_contract():
    reply = SOURCE.refuse(PluginFailed(), HEAD)
    assert (reply.status, reply.body) == (500, {"detail": "Failed to process event"})


def test_a_temporary_failure_is_json():
    reply = SOURCE.refuse(Draining(), HEAD)
    assert (reply.status, reply.body) == (503, {"detail": "Shutting down"})


@pytest.mark.parametrize("path", [route[1] for route in SOURCE.routes()])
@pytest.mark.parametrize("header", [{}, {"Authorization": "dev-token"}, {"Authorization": "Bearer wrong"}])
def test_every_path_requires_the_secret(path, header):
    with pytest.raises(Unauthenticated):
        SOURCE.verify(Incoming.of("GET", path, header))


def test_the_health_check_succeeds_with_the_secret():
    incoming = Incoming.of("GET", HEALTH, {"Authorization": "Bearer dev-token"})
    SOURCE.verify(incoming)
    reply = SOURCE.health(incoming)
    assert (reply.status, reply.body["status"], reply.body["version"]) == (200, "healthy", __version__)
