from __future__ import annotations

from fdserve.server.response_store import ResponseStore, StoredResponse


def stored(size: int) -> StoredResponse:
    return StoredResponse(b"b" * (size // 2), b"i" * (size - size // 2), {})


def test_a_response_is_found_until_it_is_deleted() -> None:
    store = ResponseStore()
    store.put("a", stored(10))
    assert store.get("a") == stored(10)
    assert store.size == 10
    assert store.delete("a")
    assert not store.delete("a")
    assert store.get("a") is None
    assert (len(store), store.size) == (0, 0)


def test_items_are_found_as_long_as_their_response_is() -> None:
    store = ResponseStore(max_responses=2)
    store.put("a", StoredResponse(b"", b"", {"y": b"a"}))
    store.put("b", StoredResponse(b"", b"", {"x": b"b", "w": b"c"}))
    assert [store.item(name) for name in "wxyz"] == [b"c", b"b", b"a", None]
    store.delete("a")
    assert store.item("y") is None
    assert store.item("x") == b"b"
    store.put("c", stored(1))
    store.put("d", stored(1))
    assert store.item("x") is None
    assert store.size == 2


def test_past_the_number_the_least_recently_used_goes() -> None:
    store = ResponseStore(max_responses=3)
    for name in "abc":
        store.put(name, stored(1))
    store.get("a")
    store.put("d", stored(1))
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    assert store.size == 3


def test_past_the_bytes_as_many_go_as_it_takes() -> None:
    store = ResponseStore(max_bytes=100)
    for name in "abcd":
        store.put(name, stored(25))
    store.put("e", stored(40))
    assert [name for name in "abcde" if store.get(name)] == ["c", "d", "e"]
    assert store.size == 90


def test_what_is_too_large_is_not_kept_and_drives_nothing_out() -> None:
    store = ResponseStore(max_bytes=100)
    store.put("a", stored(60))
    store.put("b", stored(101))
    assert store.get("b") is None
    assert store.get("a") is not None
