"""What browsers are told with every response."""

from app.api.safety import DEFAULTS, with_safety


def test_what_lacks_is_added() -> None:
    """Nothing is there twice, and what was there stays, in its place."""
    assert with_safety([]) == list(DEFAULTS)
    own = [(b"cache-control", b"no-cache"), (b"x-own", b"1"), (b"x-own", b"2")]
    safe = with_safety(own)
    assert safe[:3] == own
    assert sorted(name for name, _ in safe[3:]) == sorted({name for name, _ in DEFAULTS} - {b"cache-control"})


def test_what_was_safe_stays_as_it_is() -> None:
    """An answer that came from another node, and was made safe there, is passed on unchanged."""
    safe = with_safety([(b"x-own", b"1")])
    assert with_safety(safe) == safe
