import os
import uuid

import pytest

from relay.base.ids import delivery_id, event_id, replay_id, uuid7

MOMENT = 1_700_000_000_123_456


def test_an_id_is_a_uuid_of_version_7_and_the_rfc_s_variant():
    for number in range(2000):
        parsed = uuid.UUID(text := uuid7(MOMENT + number))
        assert (parsed.version, parsed.variant, str(parsed)) == (7, uuid.RFC_4122, text)


def test_an_id_starts_with_its_millisecond():
    assert uuid.UUID(uuid7(MOMENT)).int >> 80 == MOMENT // 1000


def test_ids_of_one_moment_differ():
    assert len({uuid7(MOMENT) for _ in range(2000)}) == 2000


def test_every_random_bit_is_sometimes_set_and_sometimes_not():
    tails = [uuid.UUID(uuid7(MOMENT)).int for _ in range(500)]
    always, ever = tails[0], 0
    for tail in tails:
        always, ever = always & tail, ever | tail
    fixed = 0xF << 76 | 0b11 << 62 | (1 << 128) - (1 << 80)
    assert always & ~fixed == 0
    assert ever | fixed == (1 << 128) - 1


@pytest.mark.parametrize(("make", "prefix"), [(event_id, "evt_"), (delivery_id, "dlv_"), (replay_id, "rpl_")])
def test_a_public_id_says_what_it_names(make, prefix):
    assert uuid.UUID(make(MOMENT).removeprefix(prefix)).version == 7


def test_a_forked_child_does_not_repeat_its_parent_s_ids():
    uuid7(MOMENT)  # the pool is filled
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(send, uuid7(MOMENT).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert uuid.UUID(theirs).version == 7
    assert theirs not in {uuid7(MOMENT) for _ in range(600)}
