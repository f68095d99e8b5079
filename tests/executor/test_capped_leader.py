"""A benchmark's leader holds blocks of its cache back as its client says."""

from types import SimpleNamespace
from typing import Any, cast

from capped_leader import CappedLeader
from client import Client
from rankwright.executor.cache_room import CacheRoom


class Wire:
    """Both ends of a connection: what is sent, a leader takes."""

    def __init__(self, leader: CappedLeader) -> None:
        self.leader = leader

    def send_bytes(self, data: bytes) -> None:
        """Have the leader take it."""
        self.leader._take(data)


def test_a_cap_leaves_so_many_blocks_until_the_next() -> None:
    room = CacheRoom(10, 16, num_parts=2, prefix_cache=False)
    leader = CappedLeader.__new__(CappedLeader)
    leader.scheduler = cast(Any, SimpleNamespace(room=room))
    leader._held = [[], []]
    client = Client.__new__(Client)
    client._connection = cast(Any, Wire(leader))
    left = []
    for blocks in (4, 7, None, 99):
        client.cap_cache(blocks)
        left.append([pool.num_free for pool in room.pools])
    assert left == [[4, 4], [7, 7], [10, 10], [10, 10]]
