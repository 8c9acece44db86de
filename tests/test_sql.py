"""SQL is put together from the stores' own constants and placeholders: no value is ever part of its text."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

STORES = Path(__file__).parents[1] / "app" / "stores"
SQL = re.compile(r"\b(SELECT|INSERT|UPDATE|DELETE|WHERE|VALUES|FROM|ORDER BY|SET|AND|OR|IN|VACUUM|PRAGMA)\b")
OURS = {
    "begin", "folded", "table", "where", "after", "conditions.where",  # made of constants and placeholders
    "' AND '.join([*terms, '(last_accessed, id) < (:time, :number)'])",
    "', '.join((f'{name} = 0' for name in _OF_ALL_TIME))",
    "round(limit_s * 1000)", "next(self._shards) % SHARDS",  # numbers, for settings of the connection
}  # fmt: skip
MARKS = re.compile(r"(marks|settings|conditions\.mark)\(")
CONSTANT = re.compile(r"_?[A-Z][A-Z_0-9]*( \+ [0-9])?\Z")


def parts_of_sql(source: str) -> Iterator[str]:
    """Yield what is put into each f-string with a word of SQL in it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        if SQL.search(text):
            yield from (
                ast.unparse(part.value) for part in node.values if isinstance(part, ast.FormattedValue)
            )


def is_ours(part: str) -> bool:
    return part in OURS or bool(MARKS.match(part) or CONSTANT.match(part))


def test_sql_is_made_of_constants_and_placeholders() -> None:
    """Nothing else stands in a statement; a new piece of one has to be looked at."""
    found = {
        (path.name, part)
        for path in STORES.rglob("*.py")
        for part in parts_of_sql(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 40
    assert {one for one in found if not is_ours(one[1])} == set()


def test_the_scan_sees_a_value() -> None:
    """What it is for is found."""
    (part,) = parts_of_sql("""f"SELECT * FROM sessions WHERE title = '{query.text}'" """)
    assert not is_ours(part)
