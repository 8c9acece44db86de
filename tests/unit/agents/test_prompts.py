"""What stands in a session's system prompt: placeholders, where their values come from, what is text."""

from typing import Any

import pytest

from app.agents.profiles import names_shared, render_prompt
from app.domain.catalog import AgentProfile
from app.domain.state import SharedState, Surroundings
from tests.unit.agents.making import make_session

SHARED = Surroundings(
    app=SharedState({"motto": "Be brief.", "limits": {"tokens": 9}}, 3),
    user=SharedState({"name": "Ann", "{name}": "no key"}, 5),
)


def rendered(prompt: str, *, shared: Surroundings | None = None, **session: Any) -> str:
    return render_prompt(AgentProfile("a", "A", "", prompt), make_session(**session), shared)


@pytest.mark.parametrize(
    ("session", "prompt"),
    [
        ({}, "Help , !"),
        ({"state": {"name": "Ann"}}, "Help Ann, !"),
        ({"template": {"context": {"name": "Ann", "who": "Bob"}}}, "Help Ann, Bob!"),
        ({"state": {"name": "Ann"}, "template": {"context": {"name": "Bob", "who": "C"}}}, "Help Ann, C!"),
        ({"state": {"name": ""}, "template": {"context": {"name": "Bob"}}}, "Help , !"),
        ({"state": {"name": None}, "template": {"context": {"name": "Bob"}}}, "Help Bob, !"),
        ({"state": {"name": "Ann"}, "template": {"system_prompt": "Hi {name}"}}, "Hi Ann"),
        ({"template": {"system_prompt": "", "context": None}}, "Help , !"),
    ],
)
def test_values_come_from_the_state_before_the_context(session: dict[str, Any], prompt: str) -> None:
    """The template's prompt goes before the profile's; what nothing has a value for is empty."""
    assert rendered("Help {name}, {who}!", **session) == prompt


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("  as it is\n", "  as it is\n"),
        (7, "7"),
        (0, "0"),
        (False, "false"),
        (1.5, "1.5"),
        ([1, "a", None], '[1,"a",null]'),
        ({"城市": "北京"}, '{"城市":"北京"}'),
        ({}, "{}"),
        ("{other} {user:name}", "{other} {user:name}"),
        (["{other}"], '["{other}"]'),
        (r"\g<0> \1 {", r"\g<0> \1 {"),
    ],
)
def test_values_are_text(value: Any, text: str) -> None:
    """Texts stand as they are, others as JSON, and nothing in a value is read as a placeholder."""
    state = {"value": value, "other": "wrong"}
    assert rendered("<{value}>", state=state, shared=SHARED) == f"<{text}>"


def test_a_placeholder_is_not_made_of_two_values() -> None:
    """Braces that only meet in the result are text."""
    assert rendered("{{open}name}", state={"open": "{", "name": "x", "": "y"}) == "{{name}"


@pytest.mark.parametrize(
    "key", ["a", "_", "名字", "नाम", "naïve", "a1", "a-b", "a.b.c", "a-", "a_b", "x" * 256]
)
def test_a_key_begins_like_an_identifier(key: str) -> None:
    """In any script, and goes on with hyphens and dots too; a dot does not lead into a value."""
    assert rendered(f"<{{{key}}}>", state={key: "v", "a": "v" if key == "a" else {"b": {"c": "w"}}}) == "<v>"


@pytest.mark.parametrize(
    "text",
    [
        *("{}", "{ a}", "{a }", "{a b}", "{1}", "{1a}", "{-a}", "{.a}", "{a", "a}", "{a,b}", "{a|b}"),
        *('{"a": 1}', '{"a":1}', "{'a'}", "{a:1}", "{user:}", "{user:1}", "{user: name}", "{temp:a}"),
        *("{USER:name}", "{app:user:name}", "{a\n}", "{" + "x" * 257 + "}", "${1}", "{²}", "{a+b}"),
    ],
)
def test_other_braces_are_text(text: str) -> None:
    """JSON and code in a prompt stay as they are written."""
    values = {"a": "wrong", "1": "wrong", "": "wrong", "x" * 257: "wrong"}
    shared = Surroundings(SharedState(values), SharedState(values))
    assert rendered(text, state=values, shared=shared) == text


def test_shared_state_is_named_with_its_scope() -> None:
    """A bare key is never the user's or the application's, and theirs never the session's."""
    prompt = "{user:name}|{app:motto}|{app:limits}|{name}|{app:name}|{user:x}"
    assert rendered(prompt, state={"x": "own"}, shared=SHARED) == 'Ann|Be brief.|{"tokens":9}|||'
    assert rendered(prompt, state={"name": "own"}) == "|||own||"


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("{user:name}", True),
        ("a {app:x-y.z} b", True),
        ("{user: name} {app:1} {user:}, user:name", False),
        ("{user: 1} {app:名字}", True),
        ("{name}", False),
        ("", False),
    ],
)
def test_prompts_that_name_shared_state_are_told(prompt: str, names: bool) -> None:
    """Only a real placeholder counts, in whichever prompt is the session's."""
    own = make_session(template={"system_prompt": prompt or "x"})
    assert names_shared(AgentProfile("a", "A", "", "{user:x}" if not names else "x"), own) is names
    assert names_shared(AgentProfile("a", "A", "", prompt), make_session()) is names


def test_values_that_look_like_placeholders_name_nothing() -> None:
    """What a user puts into state or context makes no session read shared state."""
    session = make_session(state={"a": "{user:x}"}, template={"context": {"b": "{app:x}"}})
    assert not names_shared(AgentProfile("a", "A", "", "{a} {b}"), session)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{0.__class__.__mro__}", "{0.__class__.__mro__}"),
        ("{{7*7}}", "{{7*7}}"),
        ("${7*7} #{7*7} <%= 7*7 %> {% raw %}", "${7*7} #{7*7} <%= 7*7 %> {% raw %}"),
        ("{!r} {:>10} {name!r} {name:>10} {name[0]}", "{!r} {:>10} {name!r} {name:>10} {name[0]}"),
        ("{name.__class__}", ""),
        ("{__class__}{__globals__}", ""),
        ("%s %(name)s $name", "%s %(name)s $name"),
    ],
)
def test_no_template_language_is_spoken(text: str, shown: str) -> None:
    """Nothing is computed, and no attribute read: neither in a prompt nor in a value for one."""
    state = {"name": "Ann", "value": text}
    assert rendered(text, state=state) == shown
    assert rendered("{value}", state=state) == text
