"""F1 config.rendering: a `Config` as YAML again, and the JSON Schema of the file."""

from __future__ import annotations

from typing import Any

import yaml

from proxy.config.checks import NOT_YET, parts
from proxy.config.environment import escape
from proxy.config.models import Config


def render(config: Config) -> str:
    """The effective config as YAML: secrets as ***, defaults included; itself a valid config."""
    data = config.model_dump(mode="json")
    for client, shown in zip(config.clients, data["clients"], strict=True):
        # What a client leaves out holds for it from the global limits; null would lift it.
        own = client.limits.model_fields_set
        shown["limits"] = {key: value for key, value in shown["limits"].items() if key in own}
    for where, part in reversed([*parts(config)]):  # the inner ones first, while they are there
        holder: Any = data
        for step in where:
            holder = holder[step]
        for key in NOT_YET.get(type(part), ()):
            del holder[key]
    text: str = yaml.safe_dump(escape(data), sort_keys=False, allow_unicode=True, width=1000)
    return text


def schema() -> dict[str, Any]:
    """The JSON Schema of what may be written in the file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
    }
