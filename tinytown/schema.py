"""Makes JSON Schema from Python annotations, and validates arguments against them.

A function's signature is its contract. `signature` turns keyword-only parameters into `Parameter`s, which are text,
whole numbers, booleans, and lists of these. A `Parameter` knows its JSON Schema (2020-12), checks JSON values, and
reads text from a query string or a command line. `json_schema` describes any annotation built of str, int, float, bool,
None, Literal, list, dict, TypedDict, unions with None, and Annotated with `model.Field`. `core/dispatch.py` validates
the arguments of every call with this module.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import Invalid
from .model import Field

_SCALARS: dict[Any, str] = {str: 'string', int: 'integer', float: 'number', bool: 'boolean', type(None): 'null'}
_NOUNS = {'string': 'text', 'integer': 'a whole number', 'boolean': 'true or false', 'array': 'a list'}
_MAX_ERRORS = 20  # reported per request


def json_schema(annotation: Any) -> dict[str, Any]:
    """The JSON Schema of an annotation. Raises TypeError if it has none."""
    if annotation in _SCALARS:
        return {'type': _SCALARS[annotation]}
    if annotation is Any:
        return {}
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return json_schema(args[0]) | _constraints(args[1])
    if origin is NotRequired:
        return json_schema(args[0])
    if origin is Literal:
        return {'type': 'string', 'enum': list(args)}
    if origin is list:
        return {'type': 'array', 'items': json_schema(args[0])}
    if origin is dict:
        return {'type': 'object', 'additionalProperties': json_schema(args[1])}
    if origin in (Union, types.UnionType):
        return _union([json_schema(arg) for arg in args])
    if is_typeddict(annotation):
        return _object(annotation)
    raise TypeError(f'{annotation!r} has no JSON Schema')


def _constraints(field: Field) -> dict[str, Any]:
    named = {
        'description': field.description,
        'pattern': f'^(?:{field.pattern})$' if field.pattern else '',
        'maxLength': field.max_length,
        'maxItems': field.max_items,
    }
    bounds = {'minimum': field.minimum, 'maximum': field.maximum}
    return {key: value for key, value in named.items() if value} | {k: v for k, v in bounds.items() if v is not None}


def _union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    kinds: list[str] = []
    for schema in schemas:
        kinds.append(schema['type'])
        merged |= schema
    merged['type'] = kinds
    if 'enum' in merged and 'null' in kinds:
        merged['enum'] = [*merged['enum'], None]
    return merged


def _object(annotation: Any) -> dict[str, Any]:
    hints = get_type_hints(annotation, include_extras=True)
    return {
        'type': 'object',
        'properties': {name: json_schema(hint) for name, hint in hints.items()},
        # not __required_keys__: it does not see NotRequired in annotations that are text (PEP 563)
        'required': [name for name, hint in hints.items() if get_origin(hint) is not NotRequired],
    }


# --------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of an operation."""

    name: str
    keyword: str  # its name in the function: `from_` for the argument `from`
    schema: dict[str, Any]
    pointer: str  # its place in the arguments (RFC 6901)
    required: bool
    hint: str
    _pattern: re.Pattern[str] | None
    _item: Parameter | None

    def check(self, value: Any, pointer: str, errors: list[dict[str, str]]) -> Any:
        """The value as the function takes it. Adds every violation to `errors`."""
        kind = self.schema['type']
        if kind == 'integer' and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # 1.0 is an integer (JSON Schema, 6.1.1)
        wrong = _TYPE_CHECKS[kind](value)
        if wrong:
            return _complain(errors, pointer, f'{_show(value)} is not {_NOUNS[kind]}')
        if kind == 'array':
            return self._check_items(value, pointer, errors)
        return value if not (text := self._violation(value)) else _complain(errors, pointer, text)

    def _violation(self, value: Any) -> str:
        schema = self.schema
        if isinstance(value, str):
            if 'enum' in schema and value not in schema['enum']:
                return f'{_show(value)} is not one of {", ".join(schema["enum"])}'
            if len(value) > schema.get('maxLength', len(value)):
                return f'is {len(value)} characters long; at most {schema["maxLength"]} are allowed'
            if not value.isprintable() and (bad := _FORBIDDEN.search(value)):
                return f'contains U+{ord(bad.group()):04X}, which is not allowed in text'
            if self._pattern and not self._pattern.fullmatch(value):
                return f'{_show(value)} does not fit: {self.hint}'
        elif isinstance(value, int) and not schema.get('minimum', value) <= value <= schema.get('maximum', value):
            return f'{value} is not between {schema.get("minimum", "…")} and {schema.get("maximum", "…")}'
        return ''

    def _check_items(self, values: list[Any], pointer: str, errors: list[dict[str, str]]) -> list[Any]:
        maximum = self.schema.get('maxItems', len(values))
        if len(values) > maximum:
            _complain(errors, pointer, f'has {len(values)} items; at most {maximum} are allowed')
            return values
        assert self._item is not None
        return [self._item.check(item, f'{pointer}/{i}', errors) for i, item in enumerate(values)]

    def read(self, text: str) -> Any:
        """The JSON value for text from a query string or command line; the text itself if it fits no other type."""
        kind = self.schema['type']
        if kind == 'integer' and re.fullmatch(r'-?[0-9]{1,15}', text):
            return int(text)
        if kind == 'boolean' and text.lower() in _BOOLEANS:
            return _BOOLEANS[text.lower()]
        return (text.split(',') if text else []) if kind == 'array' else text


_BOOLEANS = {'true': True, '1': True, 'yes': True, '': True, 'false': False, '0': False, 'no': False}
_FORBIDDEN = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]')  # controls except tab, LF, CR; lone surrogates
_TYPE_CHECKS: dict[str, Callable[[Any], bool]] = {
    'string': lambda value: not isinstance(value, str),
    'integer': lambda value: not isinstance(value, int) or isinstance(value, bool),
    'boolean': lambda value: not isinstance(value, bool),
    'array': lambda value: not isinstance(value, list),
}


def _complain(errors: list[dict[str, str]], pointer: str, detail: str) -> None:
    errors.append({'pointer': pointer, 'detail': detail})


def _show(value: Any) -> str:
    """A value for a message: cut to 80 characters, with unprintable characters escaped."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:79] + '…'


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):  # only `X | None`: an absent argument is None
        annotation = next(arg for arg in args if arg is not type(None))
        origin, args = get_origin(annotation), get_args(annotation)
    schema = json_schema(annotation)
    if schema.get('type') not in _TYPE_CHECKS:
        raise TypeError(f'{name}: {annotation!r} can not be an argument')
    field = args[1] if origin is Annotated else None
    base = args[0] if origin is Annotated else annotation
    item = _parameter(name, get_args(base)[0], inspect.Parameter.empty) if get_origin(base) is list else None
    required = default is inspect.Parameter.empty
    if not required and default not in (None, '', []):
        schema = schema | {'default': default}
    return Parameter(
        name=name.rstrip('_'),
        keyword=name,
        schema=schema,
        pointer=_pointer(name.rstrip('_')),
        required=required,
        hint=field.hint if field else '',
        _pattern=re.compile(field.pattern) if field and field.pattern else None,
        _item=item,
    )


@cache
def signature(function: Callable[..., Any]) -> tuple[dict[str, Parameter], Any]:
    """The keyword-only parameters of a function by name, and its return annotation."""
    hints = get_type_hints(function, include_extras=True)
    found = {
        name.rstrip('_'): _parameter(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return found, hints['return']


def validate(parameters: dict[str, Parameter], arguments: dict[str, Any]) -> dict[str, Any]:
    """The checked arguments for a call. Raises Invalid with a JSON pointer (RFC 6901) for every invalid place."""
    errors: list[dict[str, str]] = []
    checked: dict[str, Any] = {}
    for name, value in arguments.items():
        if len(errors) >= _MAX_ERRORS:
            break
        parameter = parameters.get(name)
        if parameter is None:
            known = ', '.join(parameters) or 'none'
            _complain(errors, _pointer(name), f'{_show(name)} is not an argument here; arguments: {known}')
        elif value is None and not parameter.required:
            continue
        else:
            checked[parameter.keyword] = parameter.check(value, parameter.pointer, errors)
    for name, parameter in parameters.items():
        if parameter.required and name not in arguments:
            _complain(errors, _pointer(name), f'{name} is missing')
    if errors:
        first = errors[0]
        more = f' (and {len(errors) - 1} more)' if len(errors) > 1 else ''
        raise Invalid(f'{first["pointer"]}: {first["detail"]}{more}', errors=errors)
    return checked


def _pointer(name: str) -> str:
    return '/' + name[:80].replace('~', '~0').replace('/', '~1')


def input_schema(parameters: dict[str, Parameter]) -> dict[str, Any]:
    """The JSON Schema of an operation's arguments as one object."""
    schema: dict[str, Any] = {
        'type': 'object',
        'properties': {name: parameter.schema for name, parameter in parameters.items()},
        'additionalProperties': False,
    }
    if required := [name for name, parameter in parameters.items() if parameter.required]:
        schema['required'] = required
    return schema


def output_schema(returned: Any) -> dict[str, Any]:
    """The JSON Schema of an operation's answer: the T of Step[T] or Step[Page[T]]. {} if it has none."""
    for part in typing.get_args(returned):
        if is_typeddict(part):
            return json_schema(part)
        if get_origin(part) is not None:
            inner = output_schema(part)
            if inner:
                return inner
    return {}
