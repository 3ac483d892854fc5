"""What every table of settings can do: check each value where it is made, and name what is wrong.

No setting is named here; the settings are in `sections`.
"""

import difflib
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, get_args

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from sdft.errors import SdftError

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""No value is converted but an integer to a float: text is no number, and true is no 1."""

LIST = Field(strict=False)
"""Marks a tuple, which a TOML file and the command line give as a list."""

FREE_ON_RESUME = "free on resume"
"""Marks a setting that may differ between a run and its resumption."""


@dataclass(frozen=True, config=STRICT)
class Settings:
    """A frozen dataclass whose values are checked when it is made, also by `dataclasses.replace`.

    Raises SdftError that names the setting, its value and what is valid. A section of the config is declared with its
    name, as in `class LoraConfig(Settings, section="lora")`.
    """

    sections: ClassVar[dict[str, type["Settings"]]] = {}
    section: ClassVar[str | None] = None

    def __init_subclass__(cls, section: str | None = None) -> None:
        cls.section = section
        if section is not None:
            Settings.sections[section] = cls

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, data: Any, check: ModelWrapValidatorHandler["Settings"]) -> "Settings":
        try:
            return check(data)
        except ValidationError as error:
            raise SdftError(_problem(cls, error)) from None

    @classmethod
    def named(cls, name: str) -> str:
        """A setting of the class as the user writes it, such as lora.rank."""
        return f"{cls.section}.{name}" if cls.section else name

    @classmethod
    def declared(cls) -> dict[str, FieldInfo]:
        """The settings of the class, with the type, the range and the text of each."""
        found: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
        return found


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts `where` in front of an error about settings that come from there."""
    try:
        yield
    except SdftError as error:
        raise SdftError(f"{where}: {error}") from None


TYPES = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a table",
    "finite_number": "a finite number",
}


def _problem(cls: type[Settings], error: ValidationError) -> str:
    """The first mistake, in words: the setting's dotted name, its value, and what is valid."""
    first = error.errors(include_url=False)[0]
    kind, value, place = first["type"], first["input"], first["loc"]
    if kind == "dataclass_exact_type":
        return f"{cls.section} must be a table, [{cls.section}], or {cls.__name__}(...) in Python, not {value!r}"
    name = str(place[0]) if place else ""
    if kind == "unexpected_keyword_argument":
        return f"unknown key {cls.named(name)!r}; {_suggestion(cls, name)}"
    key = ".".join([cls.named(name), *(str(part) for part in place[1:] if isinstance(part, str))])
    if kind == "literal_error":
        choices = first["ctx"]["expected"].replace(" or ", ", ").removeprefix("'', ")
        near = difflib.get_close_matches(str(value), choices.replace("'", "").split(", "), n=1)
        return f"{key} = {value!r} is not one of {choices}" + (f"; did you mean {near[0]!r}?" if near else "")
    field = cls.declared().get(name)
    if kind in TYPES:
        return f"{key} = {value!r} must be {TYPES[kind]}"
    if kind in ("missing", "too_long") and field:
        return f"{key} = {value!r} must have {len(get_args(field.annotation))} entries"
    if field and (valid := _range(field, place)):
        text = re.split(r"(?<=\.)\s", field.description or "")[0]
        return f"{key} = {value!r} must be {valid} ({text.removesuffix('.')})"
    return f"{key} = {value!r}: {first['msg']}"


def _range(field: FieldInfo, place: tuple[int | str, ...]) -> str:
    """The range of a field, or of the entry of it that is meant, in words: above 0 and at most 1."""
    bounds, parts = field.metadata, get_args(field.annotation)
    if parts:
        index = place[1] if len(place) > 1 and isinstance(place[1], int) else 0  # 0: of an optional setting
        bounds = [b for info in get_args(parts[index])[1:] for b in getattr(info, "metadata", ())]
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(
        f"{words[name]} {getattr(bound, name)}" for bound in bounds for name in words if hasattr(bound, name)
    )


def keys() -> dict[str, FieldInfo]:
    """Every setting of a config by its dotted name, such as optim.lr, in the order of the sections."""
    found: dict[str, FieldInfo] = {}
    for name, field in Settings.sections[""].declared().items():
        section = Settings.sections.get(name)
        found |= {section.named(key): f for key, f in section.declared().items()} if section else {name: field}
    return found


def _suggestion(cls: type[Settings], name: str) -> str:
    """The setting that was probably meant, in this section or in another one; if none is near, all of this section."""
    here = {cls.named(key): field for key, field in cls.declared().items()}
    near = nearest(name, here, here if cls.section is None else here | keys())
    return f"did you mean {near!r}?" if near else f"valid here: {', '.join(here)}"


def nearest(name: str, here: Container[str], settings: Mapping[str, FieldInfo]) -> str | None:
    """The dotted name, among `settings`, that `name` without its section probably means; None if none is near.

    here: the dotted names of the section in which the user wrote it, which are preferred.
    """
    scores = {}
    for key, field in settings.items():
        section, _, last = key.rpartition(".")
        likeness = max(_alike(name, last), _alike(name, f"{section}_{last}"))
        # A user may know a setting by the words of its description, such as learning_rate.
        text = (field.description or "").lower()
        described = "_" in name and name.lower().replace("_", " ") in text
        scores[key] = max(likeness, 0.7 + 7 / len(text) if described else 0) + 0.05 * (key in here)
    best = max(scores, key=lambda key: scores[key])
    return best if scores[best] > 0.7 else None


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other).ratio()
