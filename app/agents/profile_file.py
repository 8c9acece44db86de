"""Agent profiles from a file: read once at the start, refused with file, key and reason.

The file says ``{"allowed_tools": ["package.module:function"], "agents": {"<agent_id>": {...}}}``,
in JSON (``.json``) or in YAML (``.yaml``, ``.yml``). No module is imported that ``allowed_tools``
does not name and a profile does not use, and none before everything else in the file has been
found good. A message never repeats a value of the file: one of them may be a secret in the
wrong place.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from autogen_core.tools import BaseTool
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from app.agents.plain_yaml import YamlMistake, read_plain_yaml
from app.agents.profiles import builtin_profiles, with_revision
from app.agents.source import ModelSource
from app.agents.tools import ToolSource, to_tool
from app.domain.catalog import AgentProfile, ContextPolicy, parse_context_policy
from app.domain.errors import InvalidInput, UnknownModel
from app.domain.ids import parse_name

_MAX_BYTES: Final = 4 << 20
_KEY_MAX_CHARS: Final = 200
_TOOL_PATH: Final = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class ProfileFileError(ValueError):
    """The profiles cannot be used: one line with file, key and reason."""


@dataclass(frozen=True, slots=True)
class Profiles:
    """The kinds of agents, and every tool that they name."""

    profiles: tuple[AgentProfile, ...]
    tools: tuple[BaseTool[Any, Any], ...]


def load_profiles(path: str | None, models: ModelSource, tools: Sequence[ToolSource] = ()) -> Profiles:
    """Return the profiles of the file at ``path``; without one, the built-in ones.

    The built-in ones stay unless the file has an agent of the same id. ``tools`` may be
    named without being allowed: the program brought them itself. When a profile names others,
    the file's folder becomes the last place where modules are looked for: its tools may
    lie beside it, and take no other module's place.

    Raises:
        ProfileFileError: the file cannot be read, or something in it is wrong.
    """
    given = {tool.name: tool for tool in map(to_tool, tools)}
    builtin = builtin_profiles(tuple(given))
    if path is None:
        return Profiles(builtin, tuple(given.values()))
    lines: Mapping[str, int] = {}
    try:
        content, lines = _read(path)
        file = _parse(content)
        for agent_id, entry in file.agents.items():
            _check_model(f"agents.{agent_id}", entry, models)
        found = _find_tools(file, given, str(Path(path).absolute().parent))
    except _Mistake as mistake:
        where = f" (line {lines[mistake.key]})" if mistake.key in lines else ""
        raise ProfileFileError(f"AGENTS_FILE {_one_line(path)}: {mistake}{where}") from mistake
    kept = [profile for profile in builtin if profile.agent_id not in file.agents]
    own = [entry.to_profile(agent_id, found) for agent_id, entry in file.agents.items()]
    every = {tool.name: tool for tool in (*given.values(), *found.values())}
    return Profiles((*kept, *own), tuple(every.values()))


class _Mistake(Exception):
    """What is wrong, and where in the file."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{_one_line(key)}: {reason}" if key else reason)
        self.key = key


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _to_agent_id(text: str) -> str:
    try:
        return parse_name(text, "agent_id")
    except InvalidInput as error:
        raise ValueError(error.message) from None


def _to_policy(value: Any) -> Any:
    return parse_context_policy(value) if isinstance(value, str) else value


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError("must not name anything twice")
    return names


_Stop = Annotated[str, Field(min_length=1, max_length=200)]
_Stops = Annotated[list[_Stop], Field(min_length=1, max_length=8)]


class ParamsEntry(_Entry):
    """How the model is to answer; the rules are those of ``params`` in a request."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    seed: int | None = None
    stop: Annotated[_Stops, BeforeValidator(_as_list, json_schema_input_type=_Stop | _Stops)] | None = None


class _AgentEntry(_Entry):
    name: str | None = Field(default=None, min_length=1, max_length=200)
    description: str = Field(default="", max_length=2000)
    system_prompt: str = Field(default="", max_length=100_000)
    provider: str | None = Field(default=None, min_length=1, max_length=200)
    model: str | None = Field(default=None, min_length=1, max_length=200)
    params: ParamsEntry = Field(default_factory=ParamsEntry)
    tools: Annotated[list[str], AfterValidator(_unique)] = []
    context_policy: Annotated[ContextPolicy, BeforeValidator(_to_policy)] | None = None
    max_tool_iterations: int | None = Field(default=None, ge=1, le=100)

    def to_profile(self, agent_id: str, tools: Mapping[str, BaseTool[Any, Any]]) -> AgentProfile:
        return with_revision(
            AgentProfile(
                agent_id=agent_id,
                name=self.name or agent_id,
                description=self.description,
                system_prompt=self.system_prompt,
                provider=self.provider,
                model=self.model,
                tools=tuple(tools[name].name for name in self.tools),
                params=self.params.model_dump(exclude_none=True),
                context_policy=self.context_policy,
                max_tool_iterations=self.max_tool_iterations,
            )
        )


class _File(_Entry):
    allowed_tools: Annotated[
        list[Annotated[str, Field(pattern=_TOOL_PATH, max_length=200)]], AfterValidator(_unique)
    ] = []
    agents: dict[Annotated[str, AfterValidator(_to_agent_id)], _AgentEntry] = Field(min_length=1)


def _read(path: str) -> tuple[Any, Mapping[str, int]]:
    """Return what the file holds, and where in it each key is, as far as the parser knows."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise _Mistake("", f"cannot be read: {reason or 'not a file name'}") from error
    if len(raw) > _MAX_BYTES:
        raise _Mistake("", f"is larger than {_MAX_BYTES} bytes")
    ending = Path(path).suffix.lower()
    if ending == ".json":
        return _read_json(raw), {}
    if ending in (".yaml", ".yml"):
        return _read_yaml(raw)
    raise _Mistake("", "must have a name that ends in .json, .yaml or .yml")


def _read_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_refuse_doubles)
    except json.JSONDecodeError as error:
        raise _Mistake(f"line {error.lineno} column {error.colno}", f"is not JSON: {error.msg}") from None
    except RecursionError:
        raise _Mistake("", "is nested too deeply") from None
    except ValueError:  # an encoding, or a number of thousands of digits; its message shows the value
        raise _Mistake("", "is not JSON in UTF-8") from None


def _read_yaml(raw: bytes) -> tuple[Any, Mapping[str, int]]:
    try:
        read = read_plain_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Mistake("", "is not YAML in UTF-8") from None
    except YamlMistake as mistake:
        raise _Mistake(mistake.place, mistake.reason) from None
    return read.content, read.lines


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Mistake(key, "appears twice in the same object")
        found[key] = value
    return found


def _parse(content: Any) -> _File:
    try:
        return _File.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    raise _Mistake(key, _REASONS.get(problem["type"]) or problem["msg"].removeprefix("Value error, "))


_REASONS: Final[Mapping[str, str]] = {
    "extra_forbidden": "is not a known key",
    "missing": "is required",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "string_pattern_mismatch": "must be package.module:function",
    "string_unicode": "must be text in Unicode",
    "dataclass_type": "must be a text",
    "dataclass_exact_type": "must be a text",
}


def _check_model(key: str, entry: _AgentEntry, models: ModelSource) -> None:
    """Refuse an entry whose provider or model is not offered."""
    try:
        models.resolve(entry.provider, None)
    except UnknownModel as error:
        offered = ", ".join(dict.fromkeys(offer.provider for offer in models.offers()))
        raise _Mistake(f"{key}.provider", f"is not configured (configured: {offered})") from error
    try:
        models.resolve(entry.provider, entry.model)
    except UnknownModel as error:
        raise _Mistake(f"{key}.model", "is not among the models that its provider offers") from error


def _find_tools(
    file: _File, given: Mapping[str, BaseTool[Any, Any]], folder: str
) -> dict[str, BaseTool[Any, Any]]:
    """Return the tools by what the profiles call them: an import path, or a given tool's name."""
    found = dict(given)
    wanted = list(_wanted_tools(file))
    for key, path in wanted:
        if path not in found and path not in file.allowed_tools:
            known = "is not in allowed_tools" if ":" in path else "is not package.module:function"
            raise _Mistake(key, known)
    if any(path not in found for _, path in wanted) and folder not in sys.path:
        sys.path.append(folder)
    owners = {name: name for name in given}
    for key, path in wanted:
        if path not in found:
            tool = found[path] = _import_tool(key, path)
            if owners.setdefault(tool.name, path) != path:
                raise _Mistake(key, "has the same name as another tool")
    return found


def _wanted_tools(file: _File) -> Iterator[tuple[str, str]]:
    for agent_id, entry in file.agents.items():
        for index, path in enumerate(entry.tools):
            yield f"agents.{agent_id}.tools.{index}", path


def _import_tool(key: str, path: str) -> BaseTool[Any, Any]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise _Mistake(key, f"cannot be imported: there is no module {error.name}") from error
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise _Mistake(key, f"cannot be imported: {type(error).__name__}") from error
    if found is None:
        raise _Mistake(key, "is not in its module")
    if not (inspect.isfunction(found) or isinstance(found, BaseTool)):
        raise _Mistake(key, "is neither a function nor a tool of AutoGen")
    try:
        tool = to_tool(found)
        tool.schema  # noqa: B018  made now, so that a mistake in the annotations is found at the start
    except Exception as error:
        raise _Mistake(key, "must have a type for every argument and for its result") from error
    return tool


def _one_line(text: str) -> str:
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= _KEY_MAX_CHARS else f"{plain[:_KEY_MAX_CHARS]}…"
