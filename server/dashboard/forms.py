"""Forms drawn from JSON schemas, and JSON read back from what a browser sends."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server import strict_json
from server.asset_parameters import upload_kind

Kind = Literal["integer", "number", "boolean", "choice", "text", "json"]


@dataclass(frozen=True)
class Choice:
    """One entry of a selection; `value` is what the form sends."""

    value: str
    label: str


@dataclass(frozen=True)
class Field:
    """One field of a form; `value` is what it shows, `error` why that was not accepted.

    `upload` is the kind of the uploads that it names, if it does.
    """

    name: str
    label: str
    kind: Kind
    value: str = ""
    help: str = ""
    required: bool = False
    choices: tuple[Choice, ...] = ()
    minimum: float | int | None = None
    maximum: float | int | None = None
    error: str | None = None
    upload: str = ""

    @property
    def element_id(self) -> str:
        """The id of the input element."""
        return "f-" + self.name.replace(".", "-").replace("/", "-")

    @property
    def step(self) -> str:
        """The step of a number's input."""
        return "1" if self.kind == "integer" else "any"


def fields_of(
    schema: Mapping[str, Any],
    values: Mapping[str, Any],
    errors: Mapping[str, str],
    prefix: str = "",
) -> tuple[Field, ...]:
    """Return a field for every property of an object's schema.

    `values` is JSON by property; a value that could not be read may be there as text. `errors` maps
    properties to what is wrong with them. The fields' names begin with `prefix`.
    """
    required = schema.get("required", ())
    found = []
    for name, raw in schema.get("properties", {}).items():
        rule = _resolved(raw, schema)
        kind = _kind(rule)
        shown = values[name] if name in values else rule.get("default")
        found.append(
            Field(
                name=prefix + name,
                label=_words(name),
                kind=kind,
                value=_shown(shown, kind),
                help=rule.get("description", ""),
                required=name in required and kind not in ("boolean", "json"),
                choices=_choices(rule, is_required=name in required),
                minimum=_bound(rule, "minimum", "exclusiveMinimum", +1),
                maximum=_bound(rule, "maximum", "exclusiveMaximum", -1),
                error=errors.get(name),
                upload=upload_kind(rule) or "",
            )
        )
    return tuple(found)


def read(schema: Mapping[str, Any], form: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Return the JSON that a form stands for.

    An empty field leaves its property to the default, or is null where that is not the default. A
    text that is no number, and JSON that cannot be read, stay text: the model says what is wrong.
    """
    values: dict[str, Any] = {}
    for name, raw in schema.get("properties", {}).items():
        rule = _resolved(raw, schema)
        kind = _kind(rule)
        text = form.get(prefix + name, "").strip()
        if kind == "boolean":
            values[name] = text != ""
        elif text:
            values[name] = _parsed(text, kind, rule)
        elif _is_nullable(rule) and rule.get("default") is not None:
            values[name] = None
    return values


def number(text: str, kind: Kind = "number") -> Any:
    """Return the number that a text says; the text itself where it says none."""
    try:
        return int(text) if kind == "integer" else float(text)
    except ValueError:
        return text


def _parsed(text: str, kind: Kind, rule: Mapping[str, Any]) -> Any:
    if kind in ("integer", "number"):
        return number(text, kind)
    if kind == "choice":
        return next((value for value in _values(rule) if _shown(value, kind) == text), text)
    if kind == "json":
        try:
            return strict_json.loads(text)
        except ValueError:
            return text
    return text


def _resolved(rule: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Follow a reference; of `X or null` take X, and remember that null is allowed."""
    found = dict(rule)
    branches = found.pop("anyOf", None)
    if branches is not None:
        others = [branch for branch in branches if branch.get("type") != "null"]
        nullable = len(others) < len(branches)
        inner = _resolved(others[0], schema) if len(others) == 1 else {"type": "any"}
        found = {**inner, **found, "nullable": nullable}
    if "$ref" in found:
        target: Any = schema
        for part in found.pop("$ref").removeprefix("#/").split("/"):
            target = target[part]
        found = {**target, **found}
    return found


def _kind(rule: Mapping[str, Any]) -> Kind:
    if "enum" in rule or "const" in rule:
        return "choice"
    kinds: dict[Any, Kind] = {
        "integer": "integer",
        "number": "number",
        "boolean": "boolean",
        "string": "text",
    }
    kind = rule.get("type")
    if kind == "boolean" and rule.get("nullable"):
        return "choice"
    return kinds.get(kind, "json") if isinstance(kind, str) else "json"


def _values(rule: Mapping[str, Any]) -> Sequence[Any]:
    if rule.get("type") == "boolean":
        return (True, False)
    return rule["enum"] if "enum" in rule else (rule["const"],)


def _choices(rule: Mapping[str, Any], is_required: bool) -> tuple[Choice, ...]:
    if _kind(rule) != "choice":
        return ()
    shown = [_shown(value, "choice") for value in _values(rule)]
    empty = [Choice("", "–")] if _is_nullable(rule) and not is_required else []
    return (*empty, *(Choice(text, text) for text in shown))


def _is_nullable(rule: Mapping[str, Any]) -> bool:
    return bool(rule.get("nullable"))


def _bound(rule: Mapping[str, Any], inclusive: str, exclusive: str, step: int) -> Any:
    if inclusive in rule:
        return rule[inclusive]
    bound = rule.get(exclusive)
    if bound is None or rule.get("type") != "integer":
        return bound
    return bound + step


def _shown(value: Any, kind: Kind) -> str:
    if isinstance(value, str):
        return value
    if value is None or (kind == "boolean" and value is False):
        return ""
    if isinstance(value, bool | list | dict):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _words(name: str) -> str:
    """Return a property's name as a label: batch_size → Batch size."""
    return (name[:1].upper() + name[1:]).replace("_", " ")
