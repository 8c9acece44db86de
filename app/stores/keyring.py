"""The operator's keys for what is stored: the first encrypts, all decrypt."""

import base64
import binascii
import os
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.stores.sealing import UnknownKey

KEY_BYTES = 32
ID_BYTES = 4
NONCE_BYTES = 12
"""Random: NIST SP 800-38D §8.3 allows 2^32 of them with one key; at 1,000 turns/s that is four weeks, or
ten days with Redis, which takes five for a turn, so a busy server rotates its keys more often than others."""
TAG_BYTES = 16


class KeyRing:
    """AES-256-GCM (NIST SP 800-38D) under one of several keys, each of 32 bytes.

    What is encrypted says by four bytes of the key's SHA-256 which key it needs.
    """

    def __init__(self, keys: list[bytes]) -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"a key ring needs keys of {KEY_BYTES} bytes each")
        self._ciphers = {sha256(key).digest()[:ID_BYTES]: AESGCM(key) for key in keys}
        if len(self._ciphers) != len(keys):
            raise ValueError("a key is given twice")
        self._first = next(iter(self._ciphers))

    @classmethod
    def parse(cls, text: str) -> "KeyRing":
        """Return the ring of comma-separated keys in base64, standard or URL-safe.

        Raises:
            ValueError: it is none; the message never repeats a key.
        """
        keys = []
        for number, part in enumerate(text.split(","), start=1):
            try:
                plain = part.strip().translate(str.maketrans("-_", "+/")).rstrip("=")
                key = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
            except (binascii.Error, ValueError):
                key = b""
            if len(key) != KEY_BYTES:
                raise ValueError(f"key {number} is not {KEY_BYTES} bytes in base64")
            keys.append(key)
        return cls(keys)

    def encrypt(self, plain: bytes, bound_to: bytes) -> bytes:
        """Return ``plain`` encrypted, to be decrypted only together with ``bound_to``."""
        nonce = os.urandom(NONCE_BYTES)
        return self._first + nonce + self._ciphers[self._first].encrypt(nonce, plain, bound_to)

    def decrypt(self, raw: bytes, bound_to: bytes) -> bytes:
        """Return what ``encrypt`` was given.

        Raises:
            UnknownKey: its key is missing, or either argument is not as it was.
        """
        cipher = self._ciphers.get(raw[:ID_BYTES])
        if cipher is None or len(raw) < ID_BYTES + NONCE_BYTES + TAG_BYTES:
            raise UnknownKey
        try:
            return cipher.decrypt(
                raw[ID_BYTES : ID_BYTES + NONCE_BYTES], raw[ID_BYTES + NONCE_BYTES :], bound_to
            )
        except InvalidTag:
            raise UnknownKey from None
