"""Plain values: made to be stored as JSON, and read back with checks that name the place."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from numbers import Real
from typing import Any, TypeVar

from .errors import ConfigError

T = TypeVar("T")
Read = Callable[[Any, str], T]


def plain_json(value: Any) -> Any:
    """The value as JSON can hold it: tuples and arrays as lists, infinity and NaN as "inf", "-inf" and "nan".

    What has no such form (a quantisation setting, a function) is stood for by its class's name.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain_json(item) for item in value)
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    return type(value).__name__


def rounded_down(value: float, digits: int = 2) -> float:
    """The next number of so many decimal places below a value: what is shown of a bound must hold as it is shown."""
    return _rounded(value, digits, ROUND_FLOOR)


def rounded_up(value: float, digits: int = 2) -> float:
    """Likewise, next above it."""
    return _rounded(value, digits, ROUND_CEILING)


def _rounded(value: float, digits: int, way: str) -> float:
    if not math.isfinite(value):
        return value
    return float(Decimal(value).quantize(Decimal(1).scaleb(-digits), way))


def digest(value: Any, length: int = 16) -> str:
    """So many hex digits that a value of JSON determines, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ConfigError, naming the option, unless its value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")


def numbers(wanted: str, given: Any, holds: Callable[[Any], bool] = math.isfinite, least: int = 1) -> tuple[float, ...]:
    """An option that is one number or a list of them, as a tuple.

    Raises:
        ConfigError: saying what was `wanted`, unless there are at least so many and `holds` is true of each.
    """
    listed = tuple(given) if isinstance(given, Iterable) else (given,)
    sound = all(isinstance(one, Real) and not isinstance(one, bool) and holds(one) for one in listed)
    if not sound or len(listed) < least:
        raise ConfigError(f"{wanted}, not {given!r}")
    return tuple(map(float, listed))


class Fields:
    """A JSON object read field by field; whatever is not as expected is a ConfigError that names the place."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected an object, found {type(value).__name__}")
        self._left = dict(value)
        self._where = where

    def __call__(self, key: str, read: Read[T]) -> T:
        if key not in self._left:
            raise ConfigError(f"{self._where}: {key} is missing")
        return read(self._left.pop(key), f"{self._where}.{key}")

    def maybe(self, key: str, read: Read[T]) -> T | None:
        """None where there is no such key."""
        return self(key, read) if key in self._left else None

    def end(self) -> None:
        """Raises ConfigError for what nobody asked for."""
        if self._left:
            raise ConfigError(f"{self._where}: unknown {', '.join(sorted(map(repr, self._left)))}")


def text(value: Any, where: str) -> str:
    try:
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair could not be printed
            return value
    except UnicodeEncodeError:
        pass
    raise ConfigError(f"{where}: expected text, found {value!r:.50}")


def integer(value: Any, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64:
        return value
    raise ConfigError(f"{where}: expected a whole number, found {value!r:.50}")


def number(value: Any, where: str) -> float:
    if value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    return float(integer(value, where))


def json_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def optional(read: Read[T]) -> Read[T | None]:
    return lambda value, where: None if value is None else read(value, where)


def tuple_of(read: Read[T]) -> Read[tuple[T, ...]]:
    def read_all(value: Any, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {type(value).__name__}")
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read_all


def mapping_of(read: Read[T]) -> Read[dict[str, T]]:
    def read_all(value: Any, where: str) -> dict[str, T]:
        return {text(key, where): read(item, f"{where}.{key}") for key, item in json_object(value, where).items()}

    return read_all
