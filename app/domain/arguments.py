"""Tool arguments, as the model writes them (JSON text) and as people see them (an object)."""

import json
from typing import Any

RAW = "_raw"


def parse_arguments(text: str) -> dict[str, Any]:
    """Return the arguments as an object; what is not a JSON object stands under ``_raw``."""
    try:
        value = json.loads(text)
    except ValueError:
        return {RAW: text}
    return value if isinstance(value, dict) else {RAW: text}


def write_arguments(arguments: dict[str, Any]) -> str:
    """Return a text that ``parse_arguments`` reads as ``arguments``; what was raw comes back as it was."""
    raw = arguments.get(RAW)
    if len(arguments) == 1 and isinstance(raw, str):
        return raw
    return json.dumps(arguments, ensure_ascii=False)
