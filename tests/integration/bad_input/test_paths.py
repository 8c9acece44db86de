"""Rows 1 to 19 of the catalogue: paths, on every route that has a name in its path."""

import pytest

from tests.integration.bad_input.asking import Asked, routes

NOT_FOUND = (404, "NOT_FOUND")
UNFIT = (422, "VALIDATION_ERROR")

NAMES = {
    "01 encoded slash": ("a%2Fb", NOT_FOUND),
    "01 encoded slash in small letters": ("a%2fb", NOT_FOUND),
    "02 way out": ("..%2f..%2fetc", NOT_FOUND),
    "03 encoded dots": ("%2e%2e", NOT_FOUND),
    "03 dots": ("..", NOT_FOUND),
    "03 dot": ("%2E", NOT_FOUND),
    "04 NUL": ("a%00b", NOT_FOUND),
    "05 no UTF-8": ("%ff", NOT_FOUND),
    "05 other no UTF-8": ("%fe", NOT_FOUND),
    "06 surrogate": ("%ed%a0%80", NOT_FOUND),
    "07 emoji": ("%F0%9F%98%80", UNFIT),
    "08 right to left": ("a%E2%80%AEb", UNFIT),
    "09 CRLF": ("a%0d%0ab", UNFIT),
    "09 CRLF and a header": ("a%0d%0aX-Evil:%201", UNFIT),
    "10 semicolon": ("a;b=1", UNFIT),
    "10 plus": ("a+b", UNFIT),
    "10 question mark": ("a%3Fb", UNFIT),
    "10 hash": ("a%23b", UNFIT),
    "11 long": ("a" * 10_000, UNFIT),
    "12 composed": ("%C3%A9", UNFIT),
    "12 decomposed": ("e%CC%81", UNFIT),
    "13 encoded twice": ("a%252Fb", UNFIT),
    "14 no encoding": ("%zz", UNFIT),
    "18 star": ("*", UNFIT),
    "18 glob": ("[a-z]*", UNFIT),
    "19 SQL": ("'%20OR%201=1--", UNFIT),
}
"""Of sessions, turns and checkpoints. Names of users, agents and applications are nearly free (``FREE``)."""

FREE = {
    "01 encoded slash": ("a%2Fb", NOT_FOUND),
    "03 dots": ("%2e%2e", NOT_FOUND),
    "04 NUL": ("a%00b", NOT_FOUND),
    "05 no UTF-8": ("%ff", NOT_FOUND),
    "06 surrogate": ("%ed%a0%80", NOT_FOUND),
    "08 line separator": ("%E2%80%A8", UNFIT),
    "09 CRLF": ("a%0d%0ab", UNFIT),
    "11 long": ("a" * 129, UNFIT),
}
NARROW_NAMES = ("session_id", "turn_id", "checkpoint_id")


@pytest.mark.parametrize("row", NAMES)
def test_ids(asked: Asked, row: str) -> None:
    """What cannot name anything is not found, what cannot be an id is invalid, wherever one stands."""
    text, expected = NAMES[row]
    seen = 0
    for route in routes():
        for name in route.names.intersection(NARROW_NAMES):
            body = b"{}" if route.has_body else None
            if route.has_body and expected == UNFIT and route.body:
                continue  # the body would be found wrong first, or as well
            asked.refused(*expected, asked.ask(route.method, route.at(**{name: text}), body))
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("row", FREE)
def test_names(asked: Asked, row: str) -> None:
    """The same for users, agents and applications, whose names may be in any script."""
    text, expected = FREE[row]
    for route in routes():
        for name in route.names.difference(NARROW_NAMES):
            body = b'{"state":{}}' if route.has_body else None
            asked.refused(*expected, asked.ask(route.method, route.at(**{name: text}), body))


@pytest.mark.parametrize(
    "row", ["15 case", "15 double slash", "15 and 16 slash at the end", "16 no redirect"]
)
def test_other_spellings(asked: Asked, row: str) -> None:
    """A path has one spelling; nothing leads from another one to it."""
    for route in routes():
        path = {
            "15 case": route.at().title(),
            "15 double slash": "/" + route.at(),
            "15 and 16 slash at the end": route.at() + "/",
            "16 no redirect": route.at() + "//",
        }[row]
        body = b"{}" if route.has_body else None
        asked.refused(*NOT_FOUND, asked.ask(route.method, path, body))


def test_17_another_server_in_the_target(asked: Asked) -> None:
    """An absolute target is answered for its path, and shows up in nothing."""
    for route in routes():
        if route.method == "GET":
            answer = asked.ask("GET", f"http://evil.example{route.at()}")
            assert answer.status in ((200, 404) if asked.parser == "httptools" else (404,))
            assert b"evil.example" not in b"".join(v.encode() for v in answer.headers.values())
            assert answer.status == 404 or b"evil.example" not in answer.body


def test_18_keys_of_stores(asked: Asked) -> None:
    """An id with a store's separator in it names a session of its own, which is not there."""
    for name in ("a:b", "s:head", "sess:other:meta", "a.b@c~d"):
        asked.refused(404, "SESSION_NOT_FOUND", asked.ask("GET", f"/sessions/{name}"))
