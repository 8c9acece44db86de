"""Profiles from a file: what is read, what is imported, and every mistake by file, key and reason."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.agents.profile_file import ParamsEntry, ProfileFileError, load_profiles
from app.api.native.fields import Params
from app.domain.catalog import ContextPolicy
from app.domain.session import DEFAULT_AGENT_ID
from app.models.providers import demo_provider, make_provider
from app.models.registry import ModelRegistry

MODULE = "profile_tools_of_a_test"
OTHER = "other_tools_of_a_test"
SECRET = "sk-canary-0123456789"
TOOLS = '''
from autogen_core.tools import FunctionTool

async def now() -> str:
    """Tell the time."""
    return "noon"

def plain(text: str) -> str:
    """Say it again."""
    return text

def untyped(text):
    """Take anything."""

tool = FunctionTool(plain, "A tool of AutoGen.", name="ready")
number = 7
'''

Load = Callable[..., Any]


async def clock() -> str:
    """Tell the time of the program that embeds us."""
    return "noon"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Return what loads a file with the given content: text, bytes or an object (as JSON, which is YAML)."""
    (tmp_path / f"{MODULE}.py").write_text(TOOLS)
    (tmp_path / f"{OTHER}.py").write_text('async def now() -> str:\n    """Tell it."""\n    return ""\n')
    (tmp_path / "breaks_of_a_test.py").write_text(f"raise RuntimeError({SECRET!r})\n")
    (tmp_path / "exits_of_a_test.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(sys, "path", sys.path[:])
    openai = make_provider("openai", models=["gpt-5"], api_key=SECRET)
    models = ModelRegistry([demo_provider(), openai], "demo")

    def load(content: Any, *tools: Any, name: str = "agents.json") -> Any:
        path = tmp_path / name
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_profiles(str(path), models, tools)

    yield load
    for name in (MODULE, OTHER, "breaks_of_a_test", "exits_of_a_test"):
        sys.modules.pop(name, None)


EVERY_KEY = {
    "allowed_tools": [f"{MODULE}:now", f"{MODULE}:tool", f"{OTHER}:now"],
    "agents": {
        "coder": {
            "name": "Coder",
            "description": "Writes code.",
            "system_prompt": "你写代码。",
            "provider": "openai",
            "model": "gpt-5",
            "params": {"temperature": 0, "max_tokens": 9, "reasoning_effort": "low", "stop": "END"},
            "tools": [f"{MODULE}:now", "clock", f"{MODULE}:tool"],
            "context_policy": "last:4",
            "max_tool_iterations": 3,
        }
    },
}
EVERY_KEY_IN_YAML = f"""\
# One of each.
allowed_tools:
- {MODULE}:now
- {MODULE}:tool
- "{OTHER}:now"
agents:
  coder:
    name: Coder
    description: >-
      Writes
      code.
    system_prompt: 你写代码。
    provider: openai
    model: 'gpt-5'
    params: {{temperature: 0, max_tokens: 9, reasoning_effort: low, stop: END}}
    tools: ["{MODULE}:now", clock, "{MODULE}:tool"]
    context_policy: last:4
    max_tool_iterations: 3
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("agents.json", EVERY_KEY),
        ("agents.yaml", EVERY_KEY),
        ("agents.yaml", EVERY_KEY_IN_YAML),
        ("AGENTS.YML", "\ufeff" + EVERY_KEY_IN_YAML),
    ],
)
def test_every_key_is_read(load: Load, name: str, content: Any) -> None:
    """A profile says what its entry says, its tools by their names, in either language."""
    found = load(content, clock, name=name)
    _, profile = found.profiles
    assert (profile.agent_id, profile.name, profile.description) == ("coder", "Coder", "Writes code.")
    assert (profile.system_prompt, profile.provider, profile.model) == ("你写代码。", "openai", "gpt-5")
    assert profile.params == {
        "temperature": 0,
        "max_tokens": 9,
        "reasoning_effort": "low",
        "stop": ["END"],
    }
    assert profile.tools == ("now", "clock", "ready")
    assert profile.context_policy == ContextPolicy("last", 4)
    assert profile.max_tool_iterations == 3
    assert {tool.name for tool in found.tools} == {"now", "clock", "ready"}
    assert OTHER not in sys.modules


def test_an_entry_may_be_empty(load: Load) -> None:
    """Everything is left to the server's defaults, and the agent is called by its id."""
    _, profile = load({"agents": {"写作": {}}}).profiles
    assert (profile.agent_id, profile.name, profile.system_prompt, profile.tools) == ("写作", "写作", "", ())
    assert (profile.provider, profile.model, profile.params) == (None, None, {})
    assert (profile.context_policy, profile.max_tool_iterations) == (None, None)


def test_the_built_in_assistant_stays_unless_the_file_has_its_own(load: Load) -> None:
    """Sessions that name no agent always have one; its own tools are the program's."""
    kept, _ = load({"agents": {"coder": {}}}, clock).profiles
    assert (kept.agent_id, kept.tools) == (DEFAULT_AGENT_ID, ("clock",))
    (own,) = load({"agents": {DEFAULT_AGENT_ID: {"system_prompt": "Mine."}}}, clock).profiles
    assert (own.system_prompt, own.tools) == ("Mine.", ())


def test_without_a_file_there_are_the_built_in_profiles() -> None:
    """Each has the tools that the program brought."""
    found = load_profiles(None, ModelRegistry([demo_provider()], "demo"), [clock])
    assert [(p.agent_id, p.tools) for p in found.profiles] == [(DEFAULT_AGENT_ID, ("clock",))]
    assert [tool.name for tool in found.tools] == ["clock"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "B"},
        {"description": "B"},
        {"system_prompt": "B"},
        {"provider": "openai"},
        {"model": "demo"},
        {"params": {"seed": 1}},
        {"tools": ["clock"]},
        {"context_policy": "last:1"},
        {"max_tool_iterations": 2},
    ],
)
def test_a_change_of_any_key_changes_the_revision(load: Load, change: dict[str, Any]) -> None:
    """Live agents of the old profile are told apart from those of the new one."""
    before, same = (load({"agents": {"a": {}}}, clock).profiles[1].revision for _ in range(2))
    after = load({"agents": {"a": change}}, clock).profiles[1].revision
    assert before == same != after


def test_params_have_the_rules_of_a_request() -> None:
    """What the file takes as ``params`` is what ``POST /chat`` takes."""

    def rules(model: Any) -> Any:
        schema = model.model_json_schema()["properties"]
        kept = ("anyOf", "default")
        return {name: {key: one[key] for key in kept} for name, one in schema.items()}

    assert rules(ParamsEntry) == rules(Params)


def agent(**entry: Any) -> dict[str, Any]:
    return {"allowed_tools": [f"{MODULE}:now"], "agents": {"a": entry}}


MISTAKES = [
    ("", "line 1 column 1: is not JSON"),
    ('{"agents":\n x}', "line 2 column 2: is not JSON: Expecting value"),
    ("agents:\n  a: {}\n", "line 1 column 1: is not JSON"),
    (b'{"agents": "\xff"}', "is not JSON in UTF-8"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"agents": {"a": {"params": {"seed": ' + "7" * 5000 + "}}}}", "is not JSON in UTF-8"),
    (" " * ((4 << 20) + 1), "is larger than 4194304 bytes"),
    ('{"agents": {"a": {"model": "x", "model": "y"}}}', "model: appears twice"),
    ([], "must be an object"),
    ({}, "agents: is required"),
    ({"agents": []}, "agents: must be an object"),
    ({"agents": {}}, "agents: Dictionary should have at least 1 item"),
    ({"agents": {"a": {}}, "api_key": SECRET}, "api_key: is not a known key"),
    ({"agents": {"a": SECRET}}, "agents.a: must be an object"),
    ({"agents": {"a/b": {}}}, "agents.a/b: must have no slash"),
    ({"agents": {"": {}}}, "agents.: must have 1 to 128 characters"),
    ({"agents": {"a\nb": {}}}, "agents.a?b: must have no slash and no control character"),
    ({"agents": {"x" * 300: {}}}, "…: must have 1 to 128 characters"),
    (agent(prompt=SECRET), "agents.a.prompt: is not a known key"),
    (agent(name=""), "agents.a.name: String should have at least 1 character"),
    (agent(system_prompt=7), "agents.a.system_prompt: Input should be a valid string"),
    ('{"agents": {"a": {"system_prompt": "\\ud800"}}}', "agents.a.system_prompt: must be text in Unicode"),
    (agent(system_prompt="x" * 100_001), "agents.a.system_prompt: String should have at most 100000"),
    (
        agent(params={"temperature": 3}),
        "agents.a.params.temperature: Input should be less than or equal to 2",
    ),
    ('{"agents": {"a": {"params": {"top_p": NaN}}}}', "agents.a.params.top_p: Input should be"),
    (agent(params={"temperature": SECRET}), "agents.a.params.temperature: Input should be a valid number"),
    (agent(params={"api_key": SECRET}), "agents.a.params.api_key: is not a known key"),
    (agent(params={"max_tokens": True}), "agents.a.params.max_tokens: Input should be a valid integer"),
    (agent(params={"reasoning_effort": SECRET}), "agents.a.params.reasoning_effort: Input should be 'none'"),
    (agent(params={"stop": ["", "b"]}), "agents.a.params.stop.0: String should have at least 1"),
    (agent(params=None), "agents.a.params: must be an object"),
    (agent(context_policy=SECRET), "agents.a.context_policy: must be all, last:<n> or tokens:<n>"),
    (agent(context_policy=4), "agents.a.context_policy: must be a text"),
    (agent(context_policy={"unit": "all", "limit": 1}), "agents.a.context_policy: must be a text"),
    (
        agent(max_tool_iterations=0),
        "agents.a.max_tool_iterations: Input should be greater than or equal to 1",
    ),
    (agent(max_tool_iterations=101), "agents.a.max_tool_iterations: Input should be less than or equal"),
    (agent(max_tool_iterations="3"), "agents.a.max_tool_iterations: Input should be a valid integer"),
    (agent(provider=SECRET), "agents.a.provider: is not configured (configured: demo, openai)"),
    (agent(model=SECRET), "agents.a.model: is not among the models"),
    (agent(provider="openai", model="demo"), "agents.a.model: is not among the models"),
    (agent(tools=f"{MODULE}:now"), "agents.a.tools: Input should be a valid list"),
    (agent(tools=[f"{MODULE}:now"] * 2), "agents.a.tools: must not name anything twice"),
    (agent(tools=[f"{MODULE}:plain"]), "agents.a.tools.0: is not in allowed_tools"),
    (agent(tools=["os:system"]), "agents.a.tools.0: is not in allowed_tools"),
    (agent(tools=["now"]), "agents.a.tools.0: is not package.module:function"),
    ({"allowed_tools": [SECRET], "agents": {"a": {}}}, "allowed_tools.0: must be package.module:function"),
    ({"allowed_tools": ["m:f", "m:f"], "agents": {"a": {}}}, "allowed_tools: must not name anything twice"),
]


def refusal(load: Load, content: Any, name: str) -> str:
    """Return what is said of the file, which is one line without any value; nothing was imported."""
    with pytest.raises(ProfileFileError) as caught:
        load(content, name=name)
    message = str(caught.value)
    assert message.startswith("AGENTS_FILE ")
    assert message.isprintable()
    assert "canary" not in message
    assert MODULE not in sys.modules
    return message.partition(f"{name}: ")[2]


def fits(said: str, reason: str) -> bool:
    """Whether ``said`` begins with ``reason``; one that begins with … is somewhere in it."""
    return reason in said if reason.startswith("…") else said.startswith(reason)


@pytest.mark.parametrize(("content", "reason"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named(load: Load, content: Any, reason: str) -> None:
    """The error has file, key and reason."""
    assert fits(refusal(load, content, "agents.json"), reason)


OF_BOTH = [(content, reason) for content, reason in MISTAKES if not isinstance(content, str | bytes)]


@pytest.mark.parametrize(("content", "reason"), OF_BOTH, ids=range(len(OF_BOTH)))
def test_a_mistake_is_named_in_yaml_too(load: Load, content: Any, reason: str) -> None:
    """The same with the line, where it is about something that is there."""
    said = refusal(load, content, "agents.yaml")
    assert fits(said, reason)
    assert said.endswith(" (line 1)") or not reason.partition(": ")[1] or "required" in reason


BEGUN = "agents:\n  a:\n    "


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "must be an object"),
        ("# nothing\n", "must be an object"),
        ("agents: a: b", "line 1 column 10: is not YAML: mapping values are not allowed here"),
        (BEGUN + "\tname: x", "line 3 column 5: is not YAML: found character '\\t'"),
        (BEGUN + f"name: !{SECRET}!x y", "line 3 column 11: is not YAML: found undefined tag handle …"),
        (BEGUN + 'name: "\\q"', "line 3 column 13: is not YAML: found unknown escape character 'q'"),
        (BEGUN + "name: \x07", "line 3: has a character that YAML does not allow"),
        (BEGUN + 'name: "\\Uffffffff"', "has a character or a number that cannot be read"),
        (BEGUN + 'name: "\\ud800"', "agents.a.name: must be text in Unicode (line 3)"),
        (BEGUN + f"params: {{seed: {'7' * 5000}}}", "has a character or a number that cannot be read"),
        (b"agents: \xff", "is not YAML in UTF-8"),
        ("[" * 400, "line 1: is nested too deeply"),
        ("- " * 400, "line 1: is nested too deeply"),
        (BEGUN + "model: x\n    'model': y", "agents.a.model: appears twice in the same object (line 4)"),
        ("agents:\n  1: {}\n  '1': {}", "agents.1: appears twice in the same object (line 3)"),
        (BEGUN + "name: x\n---\nagents: {}", "line 4: begins a second document"),
        ("agents:\n  a: &a {}\n  b: *a", "line 2: has an anchor or an alias"),
        ("agents:\n  a: {}\n  b: *a", "line 3: has an anchor or an alias"),
        ("agents:\n  &a a: {}", "line 2: has an anchor or an alias"),
        ("agents:\n  <<: {a: {}}", "line 2: has a merge key"),
        ("agents:\n  [a]: {}", "line 2: has a key that is not a text"),
        ("agents: !!python/object/apply:os.getcwd []", "line 1: has a tag"),
        ("agents:\n  !!str a: {}", "line 2: has a tag"),
        (BEGUN + "name: yes\n    prompt: x", "agents.a.prompt: is not a known key (line 4)"),
        (BEGUN + "name: true", "agents.a.name: Input should be a valid string (line 3)"),
        (BEGUN + "name: 1.10", "agents.a.name: Input should be a valid string (line 3)"),
        (BEGUN + "system_prompt:", "agents.a.system_prompt: Input should be a valid string (line 3)"),
        (BEGUN + "max_tool_iterations: 010", "agents.a.max_tool_iterations: Input should be a valid integer"),
        (BEGUN + "max_tool_iterations: 0x3", "agents.a.max_tool_iterations: Input should be a valid integer"),
        (BEGUN + "max_tool_iterations: '3'", "agents.a.max_tool_iterations: Input should be a valid integer"),
        (BEGUN + "max_tool_iterations: 3.0", "agents.a.max_tool_iterations: Input should be a valid integer"),
        (BEGUN + "params:\n      seed: 1_000", "agents.a.params.seed: Input should be a valid integer"),
        (BEGUN + "params: {top_p: .nan}", "agents.a.params.top_p: Input should be a valid number (line 3)"),
        (BEGUN + "params: {stop: [x, yes, no, 1]}", "agents.a.params.stop.3: Input should be a valid string"),
        (BEGUN + f"tools:\n    - {MODULE}:now", "agents.a.tools.0: is not in allowed_tools (line 4)"),
    ],
)
def test_a_mistake_in_yaml_is_named(load: Load, content: Any, reason: str) -> None:
    """The error has file, key, reason and line, whether it is about YAML itself or what it says."""
    assert refusal(load, content, "agents.yml").startswith(reason)


@pytest.mark.parametrize("text", ["2026-11-20", "12:30", "yes", "off", "0o17", "1_000", ".5", "1e", "None"])
def test_what_is_no_number_in_json_is_text_in_yaml(load: Load, text: str) -> None:
    """Dates and the words and numbers of other versions of YAML stay as they are written."""
    assert load(f"agents: {{a: {{name: {text}}}}}", name="agents.yaml").profiles[1].name == text


@pytest.mark.parametrize("name", ["agents", "agents.toml", "agents.json.txt", ".yaml"])
def test_a_file_of_another_kind_is_refused(load: Load, name: str) -> None:
    """What is in it does not matter."""
    assert refusal(load, {"agents": {"a": {}}}, name) == "must have a name that ends in .json, .yaml or .yml"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_module_of_a_test:f", "cannot be imported: there is no module no_module_of_a_test"),
        (f"{MODULE}.sub:f", f"cannot be imported: there is no module {MODULE}.sub"),
        ("breaks_of_a_test:f", "cannot be imported: RuntimeError"),
        ("exits_of_a_test:f", "cannot be imported: SystemExit"),
        (f"{MODULE}:missing", "is not in its module"),
        (f"{MODULE}:number", "is neither a function nor a tool"),
        (f"{MODULE}:FunctionTool", "is neither a function nor a tool"),
        (f"{MODULE}:untyped", "must have a type for every argument"),
        (f"{OTHER}:now", "has the same name as another tool"),
    ],
)
def test_a_tool_that_is_none_is_named(load: Load, path: str, reason: str) -> None:
    """An allowed path that leads to no usable tool stops the start; what its module said is not shown."""
    good = f"{MODULE}:now"
    with pytest.raises(ProfileFileError) as caught:
        load({"allowed_tools": [good, path], "agents": {"a": {"tools": [good]}, "b": {"tools": [path]}}})
    assert f"agents.json: agents.b.tools.0: {reason}" in str(caught.value)
    assert "canary" not in str(caught.value)


def test_the_files_folder_is_the_last_to_be_searched(load: Load, tmp_path: Path) -> None:
    """A module beside the file takes no other's place, and without a tool the folder is not searched."""
    (tmp_path / "json.py").write_text('def loads(text: str) -> str:\n    """Mine."""\n    return text\n')
    load({"agents": {"a": {}}})
    assert str(tmp_path) not in sys.path
    with pytest.raises(ProfileFileError, match="must have a type"):  # the library's own has none
        load({"allowed_tools": ["json:loads"], "agents": {"a": {"tools": ["json:loads"]}}})
    load(agent(tools=[f"{MODULE}:now"]))
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)


def test_a_tool_with_the_name_of_a_given_one_is_refused(load: Load) -> None:
    """Neither takes the other's place."""

    async def now() -> str:
        """Tell the program's time."""
        return ""

    with pytest.raises(ProfileFileError, match="same name as another tool"):
        load(agent(tools=[f"{MODULE}:now"]), now)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.json", "AGENTS_FILE missing.json: cannot be read: No such file or directory"),
        (".", "AGENTS_FILE .: cannot be read: Is a directory"),
        ("a\0b", "AGENTS_FILE a?b: cannot be read: not a file name"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(path: str, reason: str) -> None:
    """The error says which file and why."""
    with pytest.raises(ProfileFileError) as caught:
        load_profiles(path, ModelRegistry([demo_provider()], "demo"))
    assert str(caught.value) == reason
