"""Sealed bytes: noticed when they change, readable by nobody without the key, bound to their place."""

import base64
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.errors import SnapshotUnreadable
from app.stores.codec import to_body
from app.stores.keyring import KeyRing
from app.stores.sealing import Sealer

KEYS = [bytes([n]) * 32 for n in range(3)]
PLAIN, OLD = Sealer(), Sealer(KeyRing(KEYS[:1]))
RING = Sealer(KeyRing([KEYS[1], KEYS[0]]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def encoded(key: bytes, *, urlsafe: bool = False) -> str:
    return (base64.urlsafe_b64encode if urlsafe else base64.b64encode)(key).decode()


@pytest.mark.parametrize("sealer", [PLAIN, RING], ids=["checksum", "encrypted"])
@given(value=JSON, cover=st.binary(max_size=40))
def test_what_is_sealed_is_read_again(sealer: Sealer, value: object, cover: bytes) -> None:
    """Whatever JSON can hold comes back as it was, together with its cover only."""
    raw = sealer.seal(to_body(value), cover)
    assert sealer.open(raw, cover) == value
    with pytest.raises(SnapshotUnreadable):
        sealer.open(raw, cover + b"x")


@pytest.mark.parametrize("sealer", [PLAIN, RING], ids=["checksum", "encrypted"])
def test_every_flipped_bit_is_noticed(sealer: Sealer) -> None:
    """No bit of it can change without that being said."""
    raw = sealer.seal(to_body({"text": "hello"}), b"cover")
    for position in range(len(raw) * 8):
        broken = bytearray(raw)
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises(SnapshotUnreadable):
            sealer.open(bytes(broken), b"cover")


@pytest.mark.parametrize(
    "raw", [None, "text", b"", b"\x01", b"\x03", b"\x03" + bytes(40), b"\x09" + bytes(9)]
)
def test_what_is_no_seal_is_said_to_be_none(raw: object) -> None:
    """Nothing, another type and too little are unreadable, not a crash."""
    for sealer in (PLAIN, RING):
        with pytest.raises(SnapshotUnreadable):
            sealer.open(raw, b"")


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    """A ring reads what its older keys wrote and what was never encrypted; without the key nobody does."""
    body = to_body(["marker"])
    old, plain, new = OLD.seal(body, b"c"), PLAIN.seal(body, b"c"), RING.seal(body, b"c")
    assert [RING.open(raw, b"c") for raw in (old, plain, new)] == [["marker"]] * 3
    assert b"marker" not in old + new
    for sealer, raw in ((OLD, new), (PLAIN, new), (PLAIN, old)):
        with pytest.raises(SnapshotUnreadable):
            sealer.open(raw, b"c")


def test_nothing_is_encrypted_the_same_twice() -> None:
    """Equal texts do not show that they are equal."""
    assert RING.seal(to_body("same"), b"") != RING.seal(to_body("same"), b"")


@pytest.mark.parametrize("urlsafe", [False, True])
def test_keys_are_read_from_base64(urlsafe: bool) -> None:
    """Either alphabet, with or without padding and spaces."""
    first, second = os.urandom(32), os.urandom(32)
    text = f" {encoded(first, urlsafe=urlsafe)} , {encoded(second, urlsafe=urlsafe).rstrip('=')}"
    raw = Sealer(KeyRing([first])).seal(to_body(1), b"")
    assert Sealer(KeyRing.parse(text)).open(raw, b"") == 1
    anew = Sealer(KeyRing.parse(text)).seal(to_body(1), b"")
    assert Sealer(KeyRing([first])).open(anew, b"") == 1  # the first encrypts


@pytest.mark.parametrize("text", ["", "short", encoded(bytes(31)), encoded(bytes(32)) + ",", "é" * 44])
def test_what_is_no_key_is_refused_without_repeating_it(text: str) -> None:
    """The message says which one is wrong, and never what it was."""
    with pytest.raises(ValueError, match=r"key [12] is not 32 bytes in base64") as refusal:
        KeyRing.parse(text)
    assert not text or text not in str(refusal.value)


def test_a_key_given_twice_is_refused() -> None:
    """It would be a ring that cannot be rotated as its operator thinks."""
    with pytest.raises(ValueError, match="twice"):
        KeyRing.parse(f"{encoded(bytes(32))},{encoded(bytes(32))}")
