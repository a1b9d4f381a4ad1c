import os
import uuid

import pytest

from relay.base.ids import DELIVERY, EVENT, REPLAY, new_id

MOMENT = 1_700_000_000_123_456


def test_an_id_is_a_uuid_of_version_7_and_the_rfc_s_variant():
    for number in range(2000):
        parsed = uuid.UUID(text := new_id("", MOMENT + number))
        assert (parsed.version, parsed.variant, str(parsed)) == (7, uuid.RFC_4122, text)


def test_an_id_starts_with_its_millisecond():
    assert uuid.UUID(new_id("", MOMENT)).int >> 80 == MOMENT // 1000


def test_ids_of_one_moment_differ():
    assert len({new_id("", MOMENT) for _ in range(2000)}) == 2000


def test_every_random_bit_takes_both_values():
    tails = [uuid.UUID(new_id("", MOMENT)).int for _ in range(500)]
    always, ever = tails[0], 0
    for tail in tails:
        always, ever = always & tail, ever | tail
    fixed = 0xF << 76 | 0b11 << 62 | (1 << 128) - (1 << 80)
    assert always & ~fixed == 0
    assert ever | fixed == (1 << 128) - 1


@pytest.mark.parametrize(("prefix", "text"), [(EVENT, "evt_"), (DELIVERY, "dlv_"), (REPLAY, "rpl_")])
def test_a_public_id_has_the_prefix_of_its_kind(prefix, text):
    id_ = new_id(prefix, MOMENT)
    assert id_.startswith(text)
    assert uuid.UUID(id_.removeprefix(text)).version == 7


def test_a_forked_child_does_not_repeat_its_parent_s_ids():
    new_id("", MOMENT)  # the pool is filled
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(send, new_id("", MOMENT).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert uuid.UUID(theirs).version == 7
    assert theirs not in {new_id("", MOMENT) for _ in range(600)}
