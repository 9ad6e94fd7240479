"""The contract of StateStore, on the double and on a real server."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from fraud_nb.adapters import redis_store
from fraud_nb.adapters.memory import MemoryStateStore
from fraud_nb.adapters.ports import SHARED, Fenced, StateStore, StoreUnavailable
from fraud_nb.adapters.redis_store import EvictingStore, RedisStateStore
from fraud_nb.features.profile import Profiles
from fraud_nb.features.windows import EVENT
from fraud_nb.pipeline.stream import recall


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[StateStore]:
    if request.param == "memory":
        yield MemoryStateStore()
        return
    address = request.getfixturevalue("servers").redis
    redis.Redis.from_url(address).flushdb()
    real = RedisStateStore(address)
    yield real
    real.close()


def test_unknown_is_none(store: StateStore) -> None:
    assert store.watermark(0) is None
    assert store.load(0, ["ada", "bob"]) == (None, [None, None])
    assert store.load(0, []) == (None, [])


def test_profiles_and_watermark_together(store: StateStore) -> None:
    store.save({0: (None, 3), 2: (None, 0)}, {(0, "ada"): b"\x00\xff", (2, "bob"): b""})
    assert (store.watermark(0), store.watermark(1), store.watermark(2)) == (3, None, 0)
    assert store.load(0, ["bob", "ada"]) == (3, [None, b"\x00\xff"])
    assert store.load(2, ["bob"]) == (0, [b""])
    store.save({0: (3, 4)}, {(0, "ada"): b"later"})
    assert (store.watermark(0), store.load(0, ["ada"])) == (4, (4, [b"later"]))


def test_watermark_may_move_alone(store: StateStore) -> None:
    store.save({0: (None, 7)}, {})
    store.save({}, {})
    assert store.watermark(0) == 7


@pytest.mark.parametrize("expected", [None, 0, 4, 6])
def test_unexpected_watermark_changes_nothing(store: StateStore, expected: int | None) -> None:
    store.save({0: (None, 5), 1: (None, 5)}, {(0, "ada"): b"old", (1, "bob"): b"old"})
    with pytest.raises(Fenced):
        store.save({1: (5, 9), 0: (expected, 9)}, {(0, "ada"): b"new", (1, "bob"): b"new"})
    assert (store.watermark(0), store.watermark(1)) == (5, 5)
    assert store.load(0, ["ada"]) == store.load(1, ["bob"]) == (5, [b"old"])


def test_shared_tiles_have_a_watermark_of_their_own(store: StateStore) -> None:
    store.save({0: (None, 5), SHARED: (None, -3)}, {(0, "m:gold"): b"a customer", (SHARED, "m:gold"): b"a shop"})
    assert (store.load(0, ["m:gold"]), store.load(SHARED, ["m:gold"])) == ((5, [b"a customer"]), (-3, [b"a shop"]))
    store.wipe(SHARED)
    assert (store.load(0, ["m:gold"]), store.load(SHARED, ["m:gold"])) == ((5, [b"a customer"]), (None, [None]))


def test_profile_without_watermark_is_refused(store: StateStore) -> None:
    with pytest.raises(ValueError, match="without a watermark"):
        store.save({0: (None, 1)}, {(1, "ada"): b"stray"})
    assert store.watermark(0) is None


def test_wipe_forgets_one_partition(store: StateStore) -> None:
    many = {(1, f"customer-{number}"): b"profile" for number in range(2_500)}
    store.save({1: (None, 2), 11: (None, 2)}, {**many, (11, "ada"): b"kept"})
    store.wipe(1)
    assert store.watermark(1) is None
    assert not any(store.load(1, [customer for _, customer in many])[1])
    assert store.load(11, ["ada"]) == (2, [b"kept"])
    store.save({1: (None, 1)}, {})


def test_customers_with_any_name(store: StateStore) -> None:
    names = ["*", "a:b", "{9}", "", "ü", "a b", "[x]"]
    store.save({0: (None, 1)}, {(0, name): name.encode() for name in names})
    assert store.load(0, names) == (1, [name.encode() for name in names])
    store.wipe(0)
    assert store.load(0, names) == (None, [None] * len(names))


def test_thousand_profiles(store: StateStore) -> None:
    profiles = {(0, f"customer-{number}"): os.urandom(3_000) for number in range(1_000)}
    store.save({0: (None, 1)}, profiles)
    assert store.load(0, [customer for _, customer in profiles]) == (1, list(profiles.values()))


@pytest.mark.parametrize(
    "stored",
    [b"\x07 of another day", b"\x07" + bytes(EVENT.itemsize), b"\x01 cut short"],
    ids=["of another day", "of the right length", "cut short"],
)
def test_profiles_of_another_codec_are_rebuilt(store: StateStore, stored: bytes) -> None:
    """Never read, never migrated: wiped, so that whoever claims the partition next makes them from the log."""
    store.save({0: (None, 5)}, {(0, "ada"): stored})
    with pytest.raises(Fenced, match="other code"):
        recall(store, Profiles(), 0, 5, ["ada"])
    assert store.load(0, ["ada"]) == (None, [None])


def test_an_emptied_store_is_not_a_store_of_strangers(store: StateStore) -> None:
    """Who was a customer a moment ago must not become a new one because the store was emptied or set back."""
    store.save({0: (None, 5)}, {(0, "ada"): b"\x01"})
    recall(store, Profiles(), 0, 5, ["ada", "bob"])
    for expected in (None, 4, 6):
        with pytest.raises(Fenced):
            recall(store, Profiles(), 0, expected, ["ada"])
    store.wipe(0)
    with pytest.raises(Fenced):
        recall(store, Profiles(), 0, 5, ["ada"])


def test_change_between_watch_and_exec_is_fenced(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = redis.Redis.from_url(servers.redis)
    client.flushdb()
    store = RedisStateStore(servers.redis)
    multi = redis.client.Pipeline.multi

    def another_worker_first(pipe: Any) -> None:
        client.set("fraud:{0}:offset", 9)
        multi(pipe)

    monkeypatch.setattr(redis.client.Pipeline, "multi", another_worker_first)
    with pytest.raises(Fenced):
        store.save({0: (None, 1)}, {(0, "ada"): b"late"})
    assert store.load(0, ["ada"]) == (9, [None])


def test_half_a_wipe_is_never_believed(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = redis.Redis.from_url(servers.redis)
    client.flushdb()
    store = RedisStateStore(servers.redis)
    store.save({0: (None, 3)}, {(0, "ada"): b"profile"})

    def broken(*words: Any) -> None:
        raise redis.ConnectionError

    monkeypatch.setattr(store._redis, "scan", broken)
    with pytest.raises(StoreUnavailable):
        store.wipe(0)
    assert store.watermark(0) is None


def test_who_slept_in_the_middle_of_a_wipe_does_not_go_on(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A successor has wiped, too, and built everything anew meanwhile, under the same keys."""
    redis.Redis.from_url(servers.redis).flushdb()
    sleeper, successor = RedisStateStore(servers.redis), RedisStateStore(servers.redis)
    sleeper.save({0: (None, 3)}, {(0, "ada"): b"profile"})

    def others_meanwhile(name: str) -> None:
        monkeypatch.undo()
        successor.wipe(0)
        successor.save({0: (None, 7)}, {(0, "ada"): b"built anew"})

    monkeypatch.setattr(redis_store, "failpoint", others_meanwhile)
    with pytest.raises(Fenced):
        sleeper.wipe(0)
    assert successor.load(0, ["ada"]) == (7, [b"built anew"])


def test_between_look_and_deletion_nobody_may_fill_a_partition(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    redis.Redis.from_url(servers.redis).flushdb()
    sleeper, successor = RedisStateStore(servers.redis), RedisStateStore(servers.redis)
    sleeper.save({0: (None, 3)}, {(0, "ada"): b"profile"})
    multi = redis.client.Pipeline.multi

    def successor_first(pipe: Any) -> None:
        monkeypatch.undo()
        successor.save({0: (None, 7)}, {(0, "ada"): b"built anew"})
        multi(pipe)

    monkeypatch.setattr(redis.client.Pipeline, "multi", successor_first)
    with pytest.raises(Fenced):
        sleeper.wipe(0)
    assert successor.load(0, ["ada"]) == (7, [b"built anew"])


def test_evicting_server_is_refused(servers: Any) -> None:
    client = redis.Redis.from_url(servers.redis)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(EvictingStore, match="allkeys-lru"):
            RedisStateStore(servers.redis)
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_full_server_is_loud_and_changes_nothing(servers: Any) -> None:
    client = redis.Redis.from_url(servers.redis)
    client.flushdb()
    store = RedisStateStore(servers.redis)
    client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(StoreUnavailable):
            store.save({0: (None, 1)}, {(0, "ada"): os.urandom(2_000_000)})
    finally:
        client.config_set("maxmemory", "0")
    assert store.load(0, ["ada"]) == (None, [None])


def test_silent_server_is_given_up(servers: Any) -> None:
    store = RedisStateStore(servers.redis, timeout_s=0.2)
    redis.Redis.from_url(servers.redis).client_pause(1_500)
    with pytest.raises(StoreUnavailable, match="Timeout"):
        store.watermark(0)
