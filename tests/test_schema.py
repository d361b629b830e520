"""JSON Schema from annotations, and the validation of arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from jsonschema import Draft202012Validator

from tinytown.errors import Invalid
from tinytown.model import AgentRef, Cursor, Field, Limit, Nickname, Tags, TaskText
from tinytown.schema import Parameter, input_schema, json_schema, output_schema, signature, validate
from tinytown.state.store import Page, Step

Word = Annotated[str, Field('A word', '[a-z]+', 'lower-case letters', max_length=5)]
Few = Annotated[int, Field('A few', minimum=0, maximum=9)]


class Inner(TypedDict):
    number: int | None


class Outer(TypedDict):
    inner: list[Inner]
    note: NotRequired[str]


@pytest.mark.parametrize(
    ('annotation', 'schema'),
    [
        (str, {'type': 'string'}),
        (int, {'type': 'integer'}),
        (float, {'type': 'number'}),
        (bool, {'type': 'boolean'}),
        (type(None), {'type': 'null'}),
        (Any, {}),
        (list[int], {'type': 'array', 'items': {'type': 'integer'}}),
        (dict[str, int], {'type': 'object', 'additionalProperties': {'type': 'integer'}}),
        (Literal['a', 'b'], {'type': 'string', 'enum': ['a', 'b']}),
        (Literal['a'] | None, {'type': ['string', 'null'], 'enum': ['a', None]}),
        (str | None, {'type': ['string', 'null']}),
        (NotRequired[str], {'type': 'string'}),
        (
            Word,
            {'type': 'string', 'description': 'A word', 'pattern': '^(?:[a-z]+)$', 'maxLength': 5},
        ),
        (Few, {'type': 'integer', 'description': 'A few', 'minimum': 0, 'maximum': 9}),
        (
            Inner | None,
            {
                'type': ['object', 'null'],
                'properties': {'number': {'type': ['integer', 'null']}},
                'required': ['number'],
            },
        ),
    ],
)
def test_an_annotation_has_its_json_schema(annotation: Any, schema: dict[str, Any]) -> None:
    assert json_schema(annotation) == schema
    Draft202012Validator.check_schema(schema)


def test_a_typed_dict_requires_all_fields_except_not_required_ones() -> None:
    schema = json_schema(Outer)
    assert schema['required'] == ['inner']
    good = Draft202012Validator(schema)
    assert good.is_valid({'inner': [{'number': None}]})
    assert not good.is_valid({'inner': [{}]})
    assert not good.is_valid({'note': 'x'})


@pytest.mark.parametrize('annotation', [bytes, set[str], complex, Callable[[], None]])
def test_an_annotation_without_json_form_is_refused(annotation: Any) -> None:
    with pytest.raises(TypeError, match='has no JSON Schema'):
        json_schema(annotation)


def plain(_call: object) -> Step[Outer]:
    raise NotImplementedError


def paged(_call: object) -> Step[Page[Outer]]:
    raise NotImplementedError


@pytest.mark.parametrize('function', [plain, paged])
def test_the_output_schema_is_that_of_the_return_annotation(function: Callable[..., Any]) -> None:
    assert output_schema(signature(function)[1]) == json_schema(Outer)


# --------------------------------------------------------------------------------------------------------- arguments


def sample(
    _call: object,
    *,
    agent: AgentRef,
    from_: AgentRef | None = None,
    text: TaskText = 'nothing',
    kind: Literal['task', 'info'] = 'task',
    word: Word | None = None,
    few: Few = 3,
    open: bool = False,
    tags: Tags = [],  # noqa: B006 (never changed)
    nickname: Nickname | None = None,
    limit: Limit = 500,
    cursor: Cursor = '',
) -> Step[Outer]:
    raise NotImplementedError


PARAMETERS = signature(sample)[0]


def places(arguments: dict[str, Any], parameters: dict[str, Parameter] = PARAMETERS) -> dict[str, str]:
    """The errors in arguments, by pointer."""
    with pytest.raises(Invalid) as caught:
        validate(parameters, arguments)
    assert caught.value.errors
    return {each['pointer']: each['detail'] for each in caught.value.errors}


def test_valid_arguments_are_returned_under_the_function_s_parameter_names() -> None:
    given = {'agent': 'backend', 'from': 'conductor', 'text': 'a\tb\r\nä…', 'kind': 'info', 'word': 'word', 'few': 0}
    given |= {'open': True, 'tags': ['x', 'y z'], 'nickname': 'The Boss', 'limit': 500}
    expected = {('from_' if name == 'from' else name): value for name, value in given.items()}
    assert validate(PARAMETERS, given) == expected


def test_null_for_an_optional_argument_is_the_same_as_leaving_it_out() -> None:
    given = {name: None for name in PARAMETERS if name != 'agent'}
    assert validate(PARAMETERS, {'agent': 'a'} | given) == {'agent': 'a'}


@pytest.mark.parametrize(
    ('name', 'value', 'complaint'),
    [
        ('agent', None, 'null is not text'),
        ('agent', 5, '5 is not text'),
        ('agent', True, 'true is not text'),
        ('agent', ['a'], "['a'] is not text"),
        ('agent', '', 'does not fit: a letter or digit'),
        ('agent', '../etc', "'../etc' does not fit"),
        ('agent', 'a\n', "'a\\n' does not fit"),
        ('agent', 'a' * 64, 'at most 63'),
        ('agent', 'bäckend', 'does not fit'),
        ('agent', 'tt:{test}:town', 'does not fit'),
        ('text', '', 'not blank'),
        ('text', 'x' * 65537, 'is 65537 characters long; at most 65536 are allowed'),
        ('text', 'a\x00b', 'contains U+0000'),
        ('text', 'a\x1b[2J', 'contains U+001B'),
        ('text', 'a\x7f', 'contains U+007F'),
        ('text', 'a\ud800b', 'contains U+D800'),
        ('word', 'abcdef', 'is 6 characters long'),
        ('kind', 'other', "'other' is not one of task, info"),
        ('kind', 1, '1 is not text'),
        ('few', -1, '-1 is not between 0 and 9'),
        ('few', 10, '10 is not between 0 and 9'),
        ('few', 10**19, 'is not between 0 and 9'),
        ('few', True, 'true is not a whole number'),
        ('few', 1.5, '1.5 is not a whole number'),
        ('few', '1', "'1' is not a whole number"),
        ('open', 1, '1 is not true or false'),
        ('open', 'yes', "'yes' is not true or false"),
        ('tags', 'x', "'x' is not a list"),
        ('tags', {'a': 1}, 'is not a list'),
        ('tags', ['x'] * 33, 'has 33 items; at most 32 are allowed'),
        ('nickname', 'a\x85b', 'without control characters'),
        ('nickname', '', '1 to 63 characters'),
        ('limit', 0, 'is not between 1 and 500'),
        ('limit', 501, 'is not between 1 and 500'),
        ('cursor', 'x', 'a value of next_cursor'),
        ('cursor', '', 'a value of next_cursor'),
    ],
)
def test_an_error_names_the_place_the_value_and_the_constraint(name: str, value: Any, complaint: str) -> None:
    found = places({'agent': 'a', name: value})
    assert list(found) == [f'/{name}']
    assert complaint in found[f'/{name}']


def test_a_whole_number_may_be_written_with_a_fraction_of_zero() -> None:
    given = validate(PARAMETERS, {'agent': 'a', 'few': 3.0})
    assert (given['few'], type(given['few'])) == (3, int)
    for value in (1e300, float(2**53), 3.5):
        assert list(places({'agent': 'a', 'few': value})) == ['/few']


@pytest.mark.parametrize('name', ['text', 'nickname', 'tags'])
def test_the_accepted_characters_are_those_that_the_schema_allows(name: str) -> None:
    published = Draft202012Validator(PARAMETERS[name].schema)
    for number in (*range(0xD800), *range(0xE000, 0x10000), 0x1F600):
        for text in (chr(number), f'a{chr(number)}b'):
            value = [text] if name == 'tags' else text
            errors: list[dict[str, str]] = []
            PARAMETERS[name].check(value, '', errors)
            assert published.is_valid(value) == (not errors), (text, errors)


def test_an_item_of_a_list_is_named_by_its_index() -> None:
    assert list(places({'agent': 'a', 'tags': ['fine', 'a,b', 3, 'x\ny']})) == ['/tags/1', '/tags/2', '/tags/3']


def test_all_errors_are_reported_at_once() -> None:
    found = places({'few': 99, 'odd': 1})
    assert found == {
        '/few': '99 is not between 0 and 9',
        '/odd': f"'odd' is not an argument here; arguments: {', '.join(PARAMETERS)}",
        '/agent': 'agent is missing',
    }


@pytest.mark.parametrize(('name', 'pointer'), [('a/b', '/a~1b'), ('a~b', '/a~0b'), ('', '/'), ('from_', '/from_')])
def test_a_pointer_is_escaped_as_in_rfc_6901(name: str, pointer: str) -> None:
    assert pointer in places({'agent': 'a', name: 1})


def test_many_unknown_fields_get_a_short_answer() -> None:
    with pytest.raises(Invalid) as caught:
        validate(PARAMETERS, {f'{i}' + 'x' * 1000: 1 for i in range(1000)})
    assert len(str(caught.value.problem())) < 10_000


def test_a_long_invalid_value_is_shortened_in_the_message() -> None:
    assert all(len(detail) < 200 for detail in places({'agent': 'x' * 100_000}).values())


@pytest.mark.parametrize(
    ('name', 'text', 'value'),
    [
        ('few', '7', 7),
        ('few', '-7', -7),
        ('few', '+7', '+7'),
        ('few', '1_0', '1_0'),
        ('few', ' 7', ' 7'),
        ('few', '\u0667', '\u0667'),
        ('few', '9' * 16, '9' * 16),
        ('few', '', ''),
        ('open', 'true', True),
        ('open', 'False', False),
        ('open', '', True),
        ('open', '0', False),
        ('open', 'maybe', 'maybe'),
        ('tags', 'a,b', ['a', 'b']),
        ('tags', '', []),
        ('agent', '12', '12'),
    ],
)
def test_query_text_is_converted_to_the_type_of_the_parameter(name: str, text: str, value: Any) -> None:
    read = PARAMETERS[name].read(text)
    assert (type(read), read) == (type(value), value)


def test_the_input_schema_allows_no_other_properties_and_accepts_its_defaults() -> None:
    schema = input_schema(PARAMETERS)
    Draft202012Validator.check_schema(schema)
    assert schema['required'] == ['agent']
    assert schema['additionalProperties'] is False
    defaults = {name: each['default'] for name, each in schema['properties'].items() if 'default' in each}
    assert defaults == {'text': 'nothing', 'kind': 'task', 'few': 3, 'open': False, 'limit': 500}
    Draft202012Validator(schema).validate({'agent': 'a'} | defaults)
    assert validate(PARAMETERS, {'agent': 'a'} | defaults)


@pytest.mark.parametrize(
    ('arguments', 'good'),
    [
        ({'agent': 'a'}, True),
        ({'agent': 'a b'}, False),
        ({}, False),
        ({'agent': 'a', 'few': 10}, False),
        ({'agent': 'a', 'few': True}, False),
        ({'agent': 'a', 'tags': ['a,b']}, False),
        ({'agent': 'a', 'tags': ['ab']}, True),
        ({'agent': 'a', 'more': 1}, False),
        ({'agent': 'a', 'kind': 'x'}, False),
    ],
)
def test_the_published_schema_and_the_validation_agree(arguments: dict[str, Any], good: bool) -> None:
    assert Draft202012Validator(input_schema(PARAMETERS)).is_valid(arguments) is good
    if good:
        validate(PARAMETERS, arguments)
    else:
        places(arguments)


@pytest.mark.parametrize('annotation', [float, dict[str, int], Outer])
def test_a_parameter_of_an_unsupported_type_is_refused_at_definition(annotation: Any) -> None:
    def odd(_call: object, *, value: Any) -> Step[Outer]:
        raise NotImplementedError

    odd.__annotations__ = {'value': annotation, 'return': Step[Outer]}
    assert list(inspect.signature(odd).parameters) == ['_call', 'value']
    with pytest.raises(TypeError, match='can not be an argument'):
        signature(odd)
