"""That no row of the catalogue of 104 bad inputs is forgotten: each has a test here, or a place elsewhere.

A test's name or its parameter begins with the row's number. Where the contract asks for something else
than the catalogue, it counts: a path that cannot be an id is 422, not 404 (7 to 14, 18, 19); free data may
be nested (76, 77); a repeat of a request whose key is in use is attached to that (90).
"""

import re
from pathlib import Path

HERE = Path(__file__).parent
ELSEWHERE = {
    **dict.fromkeys((61, 62, 63), "tests/integration/test_arrival.py"),  # how long a request may take
    **dict.fromkeys((89, 90), "tests/integration/test_idempotency.py"),
    91: "tests/acceptance/test_isolation.py",  # another user's key
    **dict.fromkeys((94, 95, 96), "tests/integration/test_http_identity.py"),  # credentials
    **dict.fromkeys((97, 98, 99), "tests/unit/identity/test_tokens.py"),
    101: "tests/integration/bad_input/test_http.py",  # with 69: there is no cookie, so a type is all it takes
    104: "tests/acceptance/test_isolation.py",  # admin's routes as a user
}
NOT_HERE = {
    **dict.fromkeys(
        (84, 85, 86, 87), "nothing is ever fetched from, or sent to, an address that a user gives"
    ),
    **dict.fromkeys(
        (102, 103), "no page shows what users wrote; JSON is not sniffed, and runs nowhere (CSP)"
    ),
}


def test_every_row_has_its_place() -> None:
    """Once: in a test, in a file elsewhere that is there, or among those that cannot apply."""
    text = "\n".join(path.read_text() for path in HERE.glob("test_*.py") if path != Path(__file__))
    named = re.findall(r"def test_(\d\d+)(?:_(\d\d+))?_|[\"\'](\d\d|100)(?: and (\d\d))? [^,]", text)
    here = {int(number) for numbers in named for number in numbers if number}
    assert here | ELSEWHERE.keys() | NOT_HERE.keys() == set(range(1, 105))
    assert not here & (ELSEWHERE.keys() | NOT_HERE.keys())
    assert all((HERE.parents[2] / place).is_file() for place in ELSEWHERE.values())
