"""How stored bytes are vouched for: by a checksum, or, with keys, by being encrypted.

Sealed bytes are one format byte and either a CRC-32 of four bytes and JSON, or, in format
``ENCRYPTED``, what the key ring made of the body. Either way they count only together with their
``cover``: what the store keeps beside them, and whose they are. A flipped column or a swapped row
is noticed, by a checksum against chance or, with keys, by design.

What keys do not do. Who can write to the database's files can have a row without encryption taken for
one of before the keys: such rows are read for ever. They can put an older encrypted one back in its own
place. The columns of a session's record and the rows of idempotency keys have a checksum only, also with
keys, in SQLite and PostgreSQL: whoever changes one can make the checksum fit. The texts and fingerprints
in them are encrypted.
"""

import json
from typing import Any, Protocol
from zlib import crc32

import orjson

from app.domain.errors import SnapshotUnreadable
from app.stores.codec import COMPACT, PLAIN

ENCRYPTED = 3
_CRC_BYTES = 4
_HEAD_BYTES = 1 + _CRC_BYTES


class UnknownKey(Exception):
    """Nothing in the ring decrypts it: its key is missing, or it is not what was encrypted here."""


class Keys(Protocol):
    """What ``keyring.KeyRing`` does: its library of C is only for those who encrypt."""

    def encrypt(self, plain: bytes, bound_to: bytes) -> bytes: ...
    def decrypt(self, raw: bytes, bound_to: bytes) -> bytes:
        """Raises: UnknownKey."""


class Sealer:
    """Seals with the first of ``keys``, or with a checksum if there are none; opens both.

    That rows without encryption are read with keys, too, is what lets an operator begin to encrypt.
    """

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys

    @property
    def encrypts(self) -> bool:
        return self._keys is not None

    def seal(self, body: bytes, cover: bytes) -> bytes:
        """Return ``body``, which ``codec.to_body`` made, sealed together with ``cover``."""
        if self._keys is not None:
            return bytes([ENCRYPTED]) + self._keys.encrypt(body, cover)
        return body[:1] + _checksum(body[0], body[1:], cover) + body[1:]

    def open(self, raw: Any, cover: bytes) -> Any:
        """Return the JSON value in ``raw``.

        Raises:
            SnapshotUnreadable: unknown format, wrong checksum, missing key, no JSON.
        """
        number, payload = self._open(raw, cover)
        try:
            if number == COMPACT:
                return orjson.loads(payload)
            if number == PLAIN:
                return json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise SnapshotUnreadable from error
        raise SnapshotUnreadable

    def open_body(self, raw: Any, cover: bytes) -> bytes:
        """Return the body that was sealed: its format byte and its JSON, unread.

        Raises:
            SnapshotUnreadable: wrong checksum, or missing key.
        """
        number, payload = self._open(raw, cover)
        return bytes([number]) + payload

    def _open(self, raw: Any, cover: bytes) -> tuple[int, bytes]:
        """Return a body's format and its JSON."""
        if not isinstance(raw, bytes) or len(raw) <= _HEAD_BYTES:
            raise SnapshotUnreadable
        if raw[0] == ENCRYPTED:
            body = self._decrypt(raw, cover)
            return body[0], body[1:]
        payload = raw[_HEAD_BYTES:]
        if raw[1:_HEAD_BYTES] != _checksum(raw[0], payload, cover):
            raise SnapshotUnreadable
        return raw[0], payload

    def _decrypt(self, raw: bytes, cover: bytes) -> bytes:
        if self._keys is None:
            raise SnapshotUnreadable
        try:
            body = self._keys.decrypt(raw[1:], cover)
        except UnknownKey as error:
            raise SnapshotUnreadable from error
        if not body:
            raise SnapshotUnreadable
        return body


NO_KEYS = Sealer()


def is_encrypted(raw: Any) -> bool:
    return isinstance(raw, bytes) and raw[:1] == bytes([ENCRYPTED])


def _checksum(format_number: int, payload: bytes, cover: bytes) -> bytes:
    return crc32(cover, crc32(payload, format_number)).to_bytes(_CRC_BYTES, "big")
