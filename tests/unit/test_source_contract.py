"""The contract of a source for plugins: maps, ids, types, and every refusal in an envelope."""

import msgspec
import pytest
from samples import sources

from relay import errors
from relay.errors import Invalid, MethodNotAllowed, Refusal, Unauthenticated
from relay.source import EMPTY, Accepted, Incoming, Source, as_map, as_value, check_id, check_type, route

REFUSALS = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, Refusal) and cls is not Refusal
]


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"[ \n ]", b"{}"])
def test_every_form_of_an_empty_map_becomes_an_empty_map(text):
    assert bytes(as_value(msgspec.Raw(text))) == b"{}"
    assert bytes(as_map(msgspec.Raw(text))) == b"{}"


def test_a_map_is_kept_byte_for_byte():
    raw = msgspec.Raw(b'{"price": 45000.00, "id": 18446744073709551616, "b":1, "a":2}')
    assert bytes(as_map(raw)) == bytes(raw)


@pytest.mark.parametrize("text", [b"[1]", b'"x"', b"0", b"true"])
def test_a_value_that_is_not_a_map_is_refused_only_where_a_map_is_required(text):
    assert bytes(as_value(msgspec.Raw(text))) == text
    with pytest.raises(Invalid) as caught:
        as_map(msgspec.Raw(text), "payload")
    assert (caught.value.field, caught.value.issue) == ("payload", "expected an object")


@pytest.mark.parametrize("id_", ["w", "worker 001", "Büro 東京", "a/b", "\u200b", "😀" * 256, "w" * 256])
def test_an_id_of_any_unicode_is_accepted(id_):
    assert check_id(id_) == id_


@pytest.mark.parametrize("id_", ["", "w" * 257, "a\nb", "a\x00", "\x7f", "\x85", "\ud800", "東\udfff"])
def test_an_id_with_control_characters_or_surrogates_or_too_long_is_refused(id_):
    with pytest.raises(Invalid) as caught:
        check_id(id_, "workerId")
    assert caught.value.field == "workerId"


@pytest.mark.parametrize("type_", ["a", "user.created", "größer als", "t" * 200])
def test_a_printable_type_is_accepted(type_):
    check_type(type_)


@pytest.mark.parametrize("type_", ["", "t" * 201, "a\tb", "a\u2028b", "\ud800"])
def test_an_unprintable_or_too_long_type_is_refused(type_):
    with pytest.raises(Invalid):
        check_type(type_, "name")


def head(refusal: type[Refusal], source: Source) -> Incoming:
    """Build a request below the source's paths whose body has not been read."""
    return Incoming.of("POST", source.owns[0], {"Authorization": f"Bearer {refusal.__name__}"})


@pytest.mark.parametrize("cls", REFUSALS)
def test_every_refusal_is_rendered_in_the_form_of_its_source(cls):
    refusal = cls()
    replies = {kind: source.refuse(refusal, head(cls, source)) for kind, source in sources().items()}
    bodies = {kind: msgspec.json.decode(msgspec.json.encode(reply.body)) for kind, reply in replies.items()}
    assert all(400 <= reply.status < 600 for reply in replies.values())
    assert bodies["lazychat"] == {"success": False, "error": refusal.detail}
    assert bodies["adorn"] == {"status": "error", "message": refusal.detail}
    assert bodies["whatsapp"] == {"success": False, "error": refusal.detail, "code": refusal.code.upper()}
    assert bodies["moddy"].keys() in ({"error"}, {"detail"})
    assert bodies["compozy"].keys() == {"success", "error"}
    assert bodies["compozy"]["error"].keys() == {"code", "message", "details"}
    assert bodies["compozy"]["error"]["message"]


@pytest.mark.parametrize("cls", REFUSALS)
def test_a_refusal_keeps_its_status_except_as_moddy_and_lazychat_document(cls):
    statuses = {kind: source.refuse(cls(), head(cls, source)).status for kind, source in sources().items()}
    moddy = {Unauthenticated: 403, Invalid: 422}.get(cls, cls.status)
    assert statuses == dict.fromkeys(statuses, cls.status) | {"moddy": moddy}


def test_a_source_lists_each_route_of_each_handler():
    class Bell(Source, kind="bell", owns=("/bell",)):
        @route("POST", "/bell")
        @route("PUT", "/bell/{id}")
        def ring(self, incoming: Incoming) -> Accepted:
            return Accepted(reply=incoming.params)

    assert sorted(Bell().routes()) == [("POST", "/bell", "ring"), ("PUT", "/bell/{id}", "ring")]
    assert (Bell.kind, Bell.owns) == ("bell", ("/bell",))


def test_a_minimal_source_accepts_everybody_and_refuses_in_plain_json():
    source, incoming = Source(), Incoming.of("GET", "/")
    source.verify(incoming)
    reply = source.refuse(MethodNotAllowed(allow=("POST",)), incoming)
    assert reply.body == {"error": {"code": "method_not_allowed", "message": "Method not allowed"}}
    assert (reply.status, source.warnings(), source.samples(), bytes(EMPTY)) == (405, (), (), b"{}")
