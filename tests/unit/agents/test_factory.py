"""From a session's record to a live agent."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from app.agents.factory import AutogenFactory
from app.agents.profiles import builtin_profiles, pick_params, with_revision
from app.domain.catalog import WHOLE_CONTEXT, AgentProfile, ContextPolicy
from app.domain.errors import AgentNotFound, InvalidInput, UnknownModel
from app.domain.session import DEFAULT_AGENT_ID, Path
from app.domain.state import SharedState, Surroundings
from app.domain.turn import AssistantText, ToolCall, ToolCalls, UserText
from app.models.providers import demo_provider, make_provider
from app.models.registry import ModelRegistry
from tests.unit.agents.making import demo_models, make_path, make_session, run


async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def make_factory() -> AutogenFactory:
    openai = make_provider("openai", models=["gpt-5"])
    local = make_provider("local", base_url="http://127.0.0.1:1/v1", model="l")
    coder = AgentProfile("coder", "C", "", "You code.", provider="openai", model="gpt-5", tools=("add",))
    profiles = (*builtin_profiles(), with_revision(coder))
    return AutogenFactory(ModelRegistry([demo_provider(), openai, local], "demo"), profiles, tools=[add])


def test_the_built_in_profile() -> None:
    """Without configuration there is one helpful assistant."""
    (profile,) = AutogenFactory(demo_models()).profiles()
    assert profile.agent_id == DEFAULT_AGENT_ID
    assert profile.system_prompt == "You are a helpful assistant."


@pytest.mark.parametrize(
    ("session", "model"),
    [
        ({}, ("demo", "demo")),
        ({"provider": "openai"}, ("openai", "gpt-5-mini")),
        ({"provider": "openai", "model": "gpt-5"}, ("openai", "gpt-5")),
        ({"agent_id": "coder"}, ("openai", "gpt-5")),
        ({"agent_id": "coder", "model": "gpt-5-mini"}, ("openai", "gpt-5-mini")),
        ({"agent_id": "coder", "provider": "openai"}, ("openai", "gpt-5")),
        ({"agent_id": "coder", "provider": "local"}, ("local", "l")),
    ],
)
def test_who_answers(session: dict[str, Any], model: tuple[str, str]) -> None:
    """The session decides before its profile, and that before the default."""
    factory = make_factory()
    factory.check(make_session(**session))
    assert factory.model_of(make_session(**session)) == model


def test_sessions_that_could_not_run_are_refused() -> None:
    """An unknown profile, provider or model is named by its error."""
    factory = make_factory()
    with pytest.raises(AgentNotFound):
        factory.check(make_session(agent_id="nobody"))
    with pytest.raises(UnknownModel):
        factory.check(make_session(provider="nobody"))
    with pytest.raises(UnknownModel):
        factory.check(make_session(provider="openai", model="gpt-1"))


def test_the_stamp_says_what_an_agent_was_built_from() -> None:
    """A built agent carries the stamp that its session asks for, until one of the two changes."""
    factory = make_factory()
    session = make_session(head="head", rev=3)
    agent = factory.build(session, make_path())
    assert agent.stamp == factory.stamp_of(session)
    assert agent.stamp != factory.stamp_of(make_session(head="head", rev=4))
    assert agent.stamp != factory.stamp_of(make_session(head="head", rev=3, agent_id="coder"))


async def test_refitting_keeps_the_context() -> None:
    """A new prompt and model around the same messages; head and note stay."""
    factory = make_factory()
    agent = factory.build(make_session(), make_path(UserText("我叫张三"), AssistantText("好")))
    factory.refit(agent, make_session(rev=2, params={"temperature": 0.1}))
    assert agent.stamp == replace(factory.stamp_of(make_session(rev=2)), head="head")
    answer, _ = await run(agent, "我叫什么？")
    assert answer.messages[1] == AssistantText("你叫张三。")


def test_workbenches_are_shared() -> None:
    """Agents with the same tools have one workbench."""
    factory = make_factory()
    assert factory._workbench(("add",)) is factory._workbench(("add",))
    assert factory._workbench(("add",)).has_tools
    assert not factory._workbench(()).has_tools


def test_a_profile_with_an_unknown_tool_stops_the_start() -> None:
    """The mistake is found before the first turn."""
    with pytest.raises(ValueError, match="no tool hammer"):
        AutogenFactory(demo_models(), [AgentProfile("a", "A", "", "", tools=("hammer",))])


def test_revisions_follow_the_configuration() -> None:
    """The same profile has the same revision in every process, another one another."""
    profile = AgentProfile("a", "A", "", "Prompt")
    assert with_revision(profile) == with_revision(with_revision(profile))
    assert with_revision(profile).revision != with_revision(AgentProfile("a", "A", "", "Prompt.")).revision


@pytest.mark.parametrize("chosen", [["add", "sk-canary"], ["rm"], ["add "], ["add", "add", "Add"]])
def test_a_capability_that_the_agent_has_not_is_refused(chosen: list[str]) -> None:
    """The error names the field, and nothing that was sent."""
    template = {"capabilities": chosen}
    with pytest.raises(InvalidInput) as caught:
        make_factory().check(make_session(agent_id="coder", template=template))
    assert caught.value.field == "template.capabilities"
    assert not any(name in caught.value.message.split() for name in chosen)


@pytest.mark.parametrize("template", [None, {}, {"capabilities": None}, {"capabilities": []}])
def test_no_capability_is_never_too_much(template: dict[str, Any] | None) -> None:
    """An agent without tools takes them too, and the profile's own are fine."""
    make_factory().check(make_session(template=template))
    own = {"capabilities": ["add"]}
    make_factory().check(make_session(agent_id="coder", template=own))
    assert make_factory().model_of(make_session(agent_id="coder")) == ("openai", "gpt-5")


def prompting(prompt: str) -> AutogenFactory:
    return AutogenFactory(demo_models(), [with_revision(AgentProfile("assistant", "A", "", prompt))])


def surroundings(name: str, rev: int) -> Surroundings:
    return Surroundings(app=SharedState(rev=1), user=SharedState({"name": name}, rev))


def prompt_of(agent: Any) -> str:
    (message,) = agent._shell._system_messages
    return str(message.content)


def test_an_agent_follows_the_shared_state_that_its_prompt_names() -> None:
    """Its stamp has the revisions: another one is another stamp, and refitted it has the new values."""
    factory, session = prompting("Help {user:name}{x}."), make_session(head="head", state={"x": "!"})
    assert factory.names_shared(session)
    old, new = surroundings("Ann", 1), surroundings("Bob", 2)
    agent = factory.build(session, make_path(UserText("q")), old)
    assert prompt_of(agent) == "Help Ann!."
    assert agent.stamp == factory.stamp_of(session, old) != factory.stamp_of(session, new)
    assert agent.stamp.shared == (1, 1)
    factory.refit(agent, session, new)
    assert agent.stamp == factory.stamp_of(session, new)
    assert (prompt_of(agent), agent._context.mark()) == ("Help Bob!.", 1)


def test_an_agent_that_names_no_shared_state_knows_of_none() -> None:
    """One that was built without it must be refitted before it can be used as one with it."""
    plain = prompting("Help {name}.")
    assert not plain.names_shared(make_session())
    assert plain.build(make_session(), make_path()).stamp.shared is None
    named, session = prompting("Help {app:name}."), make_session(head="head")
    agent = named.build(session, make_path())
    assert agent.stamp != named.stamp_of(session, Surroundings())


def test_a_session_without_its_profile_names_nothing() -> None:
    """The error is the one that its turn ends with."""
    with pytest.raises(AgentNotFound):
        make_factory().names_shared(make_session(agent_id="nobody"))


def test_the_estimate_grows_with_the_history() -> None:
    """An empty agent is some 8 KiB; stored bytes count one and a half times, in whole bytes."""
    factory = make_factory()
    empty = factory.build(make_session(), make_path())
    full = factory.build(make_session(), make_path(UserText("q"), stored_bytes=1001))
    assert (empty.estimated_bytes, full.estimated_bytes) == (8192, 8192 + 1501)
    assert isinstance(full.estimated_bytes, int)


async def test_the_estimate_grows_with_a_turn() -> None:
    """What a turn adds is counted without walking the history."""
    agent = make_factory().build(make_session(), make_path())
    before = agent.estimated_bytes
    await run(agent, "x" * 1000)
    assert agent.estimated_bytes - before > 1500


async def test_tokens_are_estimated_from_the_whole_context() -> None:
    """At the start, after each turn, and the same for a warm agent and a restored one."""
    factory = make_factory()
    policy = ContextPolicy("last", 1)
    warm = AutogenFactory(demo_models(), context_policy=policy).build(make_session(), make_path())
    assert warm.estimated_tokens == 0
    first, _ = await run(warm, "My name is Alice")
    after_one = warm.estimated_tokens
    second, _ = await run(warm, "你好")
    restored = factory.build(make_session(), make_path(*first.messages, *second.messages))
    assert after_one == factory.build(make_session(), make_path(*first.messages)).estimated_tokens
    assert restored.estimated_tokens == warm.estimated_tokens > after_one


async def test_a_compacted_path_begins_with_its_summary() -> None:
    """As a question and its answer, before the turns that came after; it counts as context."""
    path = Path("head", "note", (UserText("q"), AssistantText("a")), 0, summary="They met.")
    agent = make_factory().build(make_session(note="note"), path)
    assert [message.content for message in agent._context.shown([])] == [
        "Summarise our conversation so far.",
        "They met.",
        "q",
        "a",
    ]
    assert agent.stamp.note == "note"
    assert agent.estimated_tokens == (4 + 9) + (4 + 3) + (4 + 1) + (4 + 1)


def test_libraries_are_kept_quiet() -> None:
    """Prompts do not get into the log, nor what OpenTelemetry says about cancelled turns."""
    logging.getLogger("autogen_core.events").setLevel(logging.INFO)
    make_factory()
    assert logging.getLogger("autogen_core.events").level == logging.WARNING
    assert logging.getLogger("opentelemetry.context").level == logging.CRITICAL


async def test_a_restored_context_holds_what_a_warm_one_does() -> None:
    """An agent built from a turn's messages equals the agent that lived through it."""
    factory = make_factory()
    warm = factory.build(make_session(), make_path())
    first, _ = await run(warm, "My name is Alice")
    second, _ = await run(warm, "Who am I?")
    restored = factory.build(make_session(), make_path(*first.messages, *second.messages))
    assert restored._context._encoded == warm._context._encoded


def test_a_template_chooses_from_the_profiles_tools() -> None:
    """Capabilities leave tools out; they never bring any."""
    factory = make_factory()
    chosen = factory.build(make_session(agent_id="coder", template={"capabilities": []}), make_path())
    assert chosen._shell._workbench == [factory._workbench(())]
    both = {"capabilities": ["add", "rm"]}
    given = factory.build(make_session(agent_id="coder", template=both), make_path())
    assert given._shell._workbench == [factory._workbench(("add",))]


def test_a_context_with_tools_is_built() -> None:
    """Calls of an earlier turn are in the context as calls."""
    calls = ToolCalls((ToolCall("c", "add", "{}"),))
    agent = make_factory().build(make_session(), make_path(UserText("q"), calls))
    assert agent._context.mark() == 2


@pytest.mark.parametrize(
    ("own", "params"),
    [
        ({}, {"temperature": 0.5, "seed": 1}),
        ({"temperature": 0.1}, {"temperature": 0.1, "seed": 1}),
        ({"temperature": 0.0, "seed": 0, "stop": ["x"]}, {"temperature": 0.0, "seed": 0, "stop": ["x"]}),
    ],
)
def test_a_sessions_params_go_before_its_profiles(own: dict[str, Any], params: dict[str, Any]) -> None:
    """Each by itself; those that the session left alone are the profile's."""
    profile = AgentProfile("a", "A", "", "", params={"temperature": 0.5, "seed": 1})
    assert pick_params(profile, own) == params


def limited(policy: ContextPolicy | None, rounds: int | None) -> AgentProfile:
    return with_revision(
        AgentProfile("assistant", "A", "", "P", context_policy=policy, max_tool_iterations=rounds)
    )


def test_a_profile_without_limits_has_the_servers() -> None:
    """Its own policy and rounds go before the default ones."""
    default, own = ContextPolicy("tokens", 9), ContextPolicy("last", 4)
    for profile, policy, rounds in (
        (limited(None, None), default, 8),
        (limited(own, 3), own, 3),
        (limited(WHOLE_CONTEXT, None), WHOLE_CONTEXT, 8),
    ):
        factory = AutogenFactory(demo_models(), [profile], context_policy=default)
        agent = factory.build(make_session(), make_path())
        assert agent._context.policy == policy
        assert agent._shell._max_tool_iterations == rounds


def test_a_live_agent_follows_a_changed_profile() -> None:
    """Its stamp differs, and refitted it has what the new profile says and the messages from before."""
    old, new = limited(ContextPolicy("last", 4), 2), limited(None, 3)
    agent = AutogenFactory(demo_models(), [old]).build(make_session(), make_path(UserText("q")))
    changed = AutogenFactory(demo_models(), [new])
    assert agent.stamp != changed.stamp_of(make_session())
    changed.refit(agent, make_session())
    assert agent.stamp == replace(changed.stamp_of(make_session()), head="head")
    assert (agent._context.policy, agent._shell._max_tool_iterations) == (WHOLE_CONTEXT, 3)
    assert agent._context.mark() == 1
