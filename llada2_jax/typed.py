"""Dataclasses from plain values (JSON, ConfigDicts): every value is of the type that its field
declares, or an error names it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


def names(cls: type) -> set[str]:
    """Of a dataclass's fields."""
    return {f.name for f in dataclasses.fields(cls)}


def build(cls: type, values: Mapping[str, Any], where: str, error: type[Exception]) -> Any:
    """A dataclass from {field: value}; dataclasses among its fields are mappings too.

    where: what the values are called in a message. error: what to raise for a field that is
    unknown, missing or of another type.
    """
    if not isinstance(values, Mapping):
        raise error(f"{where}={values!r} must be a group of fields")
    unknown = sorted(set(values) - names(cls))
    if unknown:
        known = ", ".join(sorted(names(cls)))
        raise error(f"{where}.{unknown[0]} is not a field; {where} has: {known}")
    for field in dataclasses.fields(cls):
        if field.name not in values and _required(field):
            raise error(f"{where}.{field.name} is missing")
    hints = typing.get_type_hints(cls)
    return cls(**{k: convert(hints[k], v, f"{where}.{k}", error) for k, v in values.items()})


def _required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def convert(hint: Any, value: Any, where: str, error: type[Exception]) -> Any:
    """`value` as the declared type, or an error; nothing is coerced but int to float."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where, error)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # with None
        [kind] = (part for part in parts if part is not types.NoneType)
        return None if value is None else convert(kind, value, where, error)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise error(f"{where}={value!r} must be a tuple")
        return tuple(convert(parts[0], v, f"{where}[{i}]", error) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise error(f"{where}={value!r} must be a group of fields")
        return value
    if hint is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    if type(value) is not hint:
        raise error(f"{where}={value!r} must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise error(f"{where}={value!r} must be finite")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise error(f"{where}={value!r} must fit 64 bits")
    return value
