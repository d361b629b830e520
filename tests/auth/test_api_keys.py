"""API keys: generating, the configuration, verifying, and the commands that manage keys."""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tinytown import api_key_table, config
from tinytown.auth import api_keys
from tinytown.auth.api_keys import Checks, Keyring, check_hash, checksum, generate_key
from tinytown.auth.argon2id import matches
from tinytown.auth.rate_limit import Buckets
from tinytown.cli.main import main
from tinytown.errors import TooManyRequests, Unavailable, UsageError
from tinytown.model import READ, WRITE
from tinytown.settings import AuthSettings

HASH = '$argon2id$v=19$m=8192,t=1,p=1$c29tZXNhbHRzb21l$' + 'A' * 43
FULL = {'id': '0123abcd', 'hash': HASH, 'scopes': ['town.read']}


def settings(text: str) -> AuthSettings:
    return config.from_values(config.parse(text.encode(), 'the file') | {'name': 'x'}, Path()).townhall.auth


def entry(**changed: Any) -> str:
    """A valid [[townhall.auth.keys]] with some values changed; None leaves a line out."""
    return api_key_table.written({name: value for name, value in (FULL | changed).items() if value is not None})


# --------------------------------------------------------------------------------------------------------- generating


def test_a_new_key_matches_its_hash_and_no_other_key_does() -> None:
    made, other = generate_key(), generate_key()
    check_hash(made.hash, 'a new key')
    assert matches(made.key.encode(), made.hash)
    assert not matches(other.key.encode(), made.hash)
    assert not matches(b'', made.hash)
    assert len({made.id, other.id}) == 2
    assert generate_key(made.id).id == made.id


@pytest.mark.parametrize(
    'text',
    [
        HASH.replace('m=8192', 'm=8191'), HASH.replace('m=8192', 'm=4194304'), HASH.replace('t=1', 't=0'),
        HASH.replace('t=1', 't=11'), HASH.replace('p=1', 'p=5'), HASH.replace('p=1', 'p=0'),
        HASH.replace('m=8192', 'm=-1'), HASH.replace('argon2id', 'argon2i'), HASH.replace('v=19', 'v=16'),
        HASH[:-30], HASH + '$', HASH + '\n', 'secret', '$2b$12$' + 'a' * 53,
    ],
)  # fmt: skip
def test_a_hash_outside_the_bounds_stops_the_start_with_an_error_that_names_its_key(text: str) -> None:
    with pytest.raises(UsageError, match=r"^townhall.auth.keys: key '0123abcd': the hash .*make one:  tt generate"):
        Keyring(AuthSettings(keys=[FULL | {'hash': text}]))
    with pytest.raises(UsageError, match=r'^townhall.auth.api_key_hash: '):
        Keyring(AuthSettings(api_key_hash=text))


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        (entry(id='ci'), "key 1: id = 'ci': give the 8 hexadecimal digits"),
        (entry(id=None), 'key 1: id = None'),
        (entry() + entry(scopes=['admin']), "key '0123abcd' is there twice"),
        (entry(hash=None), "key '0123abcd': hash is missing"),
        (entry(scopes=None), "key '0123abcd': scopes: give a list of one or more of town.read"),
        (entry(scopes=[]), 'give a list of one or more of'),
        (entry(scopes=['town.raed']), 'give a list of one or more of'),
        (entry(scopes='admin'), 'give a list of one or more of'),
        (entry() + 'scope = "x"', "key '0123abcd': scope is not a field of a key; the fields are id, hash"),
        (entry(note=1), 'note: give text'),
        (entry(expires='soon'), "key '0123abcd': expires = soon: give a time like 2027-01-31T12:00:00Z"),
        (entry(expires='2027-01-31T12:00:00'), 'give a time like'),
        (entry() + 'expires = 2027-01-31', 'give a time like'),
        (entry() + 'expires = 7', 'give a time like'),
        ('townhall.auth.keys = "x"', 'write [[townhall.auth.keys]] above'),
        ('townhall.auth.keys = [1]', 'write [[townhall.auth.keys]] above'),
        ('[townhall.auth.keys]\nid = "x"', 'write [[townhall.auth.keys]] above'),
        ('townhall.auth.api_key_scopes = []', 'api_key_scopes = []: give a list of one or more of'),
        ('townhall.auth.api_key_scopes = ["all"]', 'give a list of one or more of'),
        ('townhall.auth.mode = "apikey"', "choose one of 'none', 'api_key', 'oidc'"),
    ],
)
def test_an_error_names_a_wrong_key_entry_without_its_hash(text: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        settings(text)
    assert says in str(raised.value)
    assert 'argon2' not in str(raised.value).replace('begins with $argon2id$', '')


def test_an_expiry_may_be_a_toml_time_or_a_text() -> None:
    for text in ('"2027-01-31T12:00:00Z"', '2027-01-31T12:00:00Z', '2027-01-31T13:00:00+01:00'):
        [key] = settings(entry() + f'expires = {text}\n').keys
        assert api_key_table.expiry(key) == datetime(2027, 1, 31, 12, tzinfo=UTC).timestamp()


# ---------------------------------------------------------------------------------------------------------- verifying


def test_a_key_claims_the_entry_of_its_id_and_any_other_text_that_of_api_key_hash() -> None:
    one, two = generate_key(), generate_key()
    keys = [{'id': made.id, 'hash': made.hash, 'scopes': ['town.read']} for made in (one, two)]
    ring = Keyring(AuthSettings(keys=keys))
    found = ring.claimed(two.key)
    assert found
    assert (found.id, found.principal.name, found.principal.scopes) == (two.id, f'key:{two.id}', frozenset({READ}))
    mistyped = two.key[:20] + ('a' if two.key[20] != 'a' else 'b') + two.key[21:]
    for text in ('', 'x', mistyped, two.key[:-1], two.key + 'a', generate_key().key, two.key.upper()):
        assert ring.claimed(text) is None
    with_plain = Keyring(AuthSettings(keys=keys, api_key_hash=HASH, api_key_scopes=['town.write']))
    for text in ('x', two.key[:-1], generate_key().key):
        found = with_plain.claimed(text)
        assert found
        assert (found.principal.name, found.principal.scopes) == ('api-key', frozenset({WRITE}))
    for text in ('', mistyped, 'x' * 513):
        assert with_plain.claimed(text) is None


def test_the_key_of_api_key_hash_may_do_everything_unless_its_scopes_say_otherwise() -> None:
    found = Keyring(settings(f"townhall.auth.api_key_hash = '{HASH}'")).claimed('x')
    assert found
    assert found.principal.may('agent.manage')


@pytest.fixture
def ring() -> tuple[str, api_keys.Entry]:
    made = generate_key()
    found = Keyring(AuthSettings(keys=[{'id': made.id, 'hash': made.hash, 'scopes': ['admin']}])).claimed(made.key)
    assert found
    return made.key, found


def test_a_key_is_hashed_once_even_if_several_clients_send_it_at_the_same_time(
    ring: tuple[str, api_keys.Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, found = ring
    hashed = []

    def counted(shown: bytes, text: str) -> bool:
        hashed.append(shown)
        return matches(shown, text)

    monkeypatch.setattr(api_keys, 'matches', counted)
    checks, answers = Checks(Buckets()), []
    threads = [threading.Thread(target=lambda: answers.append(checks.verify(key, found, 'a'))) for _ in range(12)]
    assert checks.recall(key) == ''
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 12
    assert len(hashed) == 1
    assert checks.recall(key) == found.hash
    assert checks.verify(key, found, 'a')
    assert len(hashed) == 1


def test_at_most_two_keys_are_hashed_at_once_and_a_full_queue_refuses_more(
    ring: tuple[str, api_keys.Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = ring
    may_go, started, running = threading.Event(), threading.Semaphore(0), []
    under_way = 0

    def held(_shown: bytes, _text: str) -> bool:
        nonlocal under_way
        under_way += 1
        running.append(under_way)
        started.release()
        may_go.wait(20)
        under_way -= 1
        return False

    monkeypatch.setattr(api_keys, 'matches', held)
    checks, refused = Checks(Buckets()), threading.Semaphore(0)

    def show(number: int) -> None:
        try:
            checks.verify(f'key {number}', found, f'10.0.0.{number}')
        except Unavailable:
            refused.release()

    threads = [threading.Thread(target=show, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for _ in range(24 - api_keys.MAX_HASHING - api_keys.MAX_WAITING_HASHES):
        assert refused.acquire(timeout=20)
    assert started.acquire(timeout=20)
    with pytest.raises(Unavailable):
        checks.admit(found, 'b')
    may_go.set()
    for thread in threads:
        thread.join()
    assert max(running) <= api_keys.MAX_HASHING
    checks.admit(found, 'b')


def test_after_too_many_wrong_keys_an_address_is_refused_unhashed_and_others_are_not(
    ring: tuple[str, api_keys.Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, found = ring
    now = [1000.0]
    checks = Checks(Buckets(lambda: now[0]))
    assert checks.verify(key, found, 'mallory')
    monkeypatch.setattr(api_keys, 'matches', lambda *_: False)
    for i in range(api_keys.FAILURES):
        checks.admit(found, 'mallory')
        assert not checks.verify(f'wrong {i}', found, 'mallory')
    with pytest.raises(TooManyRequests) as raised:
        checks.admit(found, 'mallory')
    assert raised.value.retry_after == 3
    checks.admit(found, 'alice')
    assert checks.recall(key) == found.hash
    now[0] += 3
    checks.admit(found, 'mallory')


def test_wrong_keys_are_counted_for_each_network_and_for_each_key_over_all_addresses(
    ring: tuple[str, api_keys.Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, found = ring
    checks = Checks(Buckets(lambda: 1000.0))
    assert checks.verify(key, found, '2001:db8::1')
    monkeypatch.setattr(api_keys, 'matches', lambda *_: False)

    def fail(times: int, address: str) -> None:
        for i in range(times):
            checks.admit(found, address.format(i))
            assert not checks.verify(f'wrong {i} {address}', found, address.format(i))

    fail(api_keys.FAILURES, '2001:db8::{:x}')
    with pytest.raises(TooManyRequests, match='too many wrong keys from 2001:db8::/64'):
        checks.admit(found, '2001:db8::ffff')
    fail(api_keys.FAILURES_OF_ALL - api_keys.FAILURES, '2001:db8:{:x}1::1')
    with pytest.raises(TooManyRequests, match='too many wrong keys from everywhere for this key'):
        checks.admit(found, '192.0.2.1')
    checks.admit(api_keys.Entry('another', found.hash, found.principal), '192.0.2.1')
    assert checks.recall(key) == found.hash


def test_the_number_of_remembered_keys_is_bounded(
    ring: tuple[str, api_keys.Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = ring
    monkeypatch.setattr(api_keys, 'matches', lambda *_: True)
    checks = Checks(Buckets())
    for i in range(api_keys.MAX_KNOWN + 5):
        assert checks.verify(f'key {i}', found, 'a')
    known = [i for i in range(api_keys.MAX_KNOWN + 5) if checks.recall(f'key {i}')]
    assert known == list(range(5, api_keys.MAX_KNOWN + 5))


# ----------------------------------------------------------------------------------------------------------- commands

Tt = Callable[..., tuple[int, str, str]]
MINE = '# mine\nname = "a" # name\n\n[townhall.auth]\n# about auth\nmode = "none" # for now\n\n[agent_clis]\nx = "y"'


@pytest.fixture
def tt(directory: Path, capsys: pytest.CaptureFixture[str]) -> Tt:
    (directory / config.FILE).write_bytes(MINE.encode())

    def run(*words: str) -> tuple[int, str, str]:
        status = main([*words, '--town', str(directory)])
        return status, *capsys.readouterr()

    return run


def made_by(tt: Tt, *words: str) -> dict[str, str]:
    status, out, _ = tt(*words, '--json')
    assert status == 0
    found: dict[str, str] = tomllib.loads('v = ' + out.replace('": "', '" = "'))['v']
    return found


@pytest.mark.parametrize('newline', ['\n', '\r\n'])
@pytest.mark.parametrize('mark', ['', '\ufeff'])
def test_writing_and_revoking_a_key_leaves_every_other_byte_of_the_file(
    directory: Path, tt: Tt, newline: str, mark: str
) -> None:
    file = directory / config.FILE
    before = (mark + MINE.replace('\n', newline)).encode()
    file.write_bytes(before)
    one, two = made_by(tt, 'generate-api-key', '--write'), made_by(tt, 'key', 'create', '--write', '--note', 'a "b"\\')
    assert file.stat().st_mode & 0o777 == 0o600
    auth_settings = config.load(directory).townhall.auth
    assert auth_settings.mode == 'api_key'
    assert auth_settings.keys == [
        {'id': one['id'], 'hash': one['hash'], 'scopes': ['admin']},
        {'id': two['id'], 'hash': two['hash'], 'scopes': ['town.read'], 'note': 'a "b"\\'},
    ]
    for made in (one, two):
        assert matches(made['key'].encode(), made['hash'])
    assert tt('key', 'revoke', one['id'])[0] == 0
    assert [key['id'] for key in config.load(directory).townhall.auth.keys] == [two['id']]
    assert tt('key', 'revoke', two['id'])[0] == 0
    expected = before.replace(b'mode = "none"', b'mode = "api_key"')
    assert file.read_bytes() == expected + newline.encode()  # the last line had no line end and has one now


def test_a_rotated_key_keeps_its_id_scopes_and_comments(directory: Path, tt: Tt) -> None:
    file = directory / config.FILE
    made = made_by(tt, 'key', 'create', '--scopes', 'town.read, town.write', '--expires', '2099-01-01T00:00:00Z',
                   '--write')  # fmt: skip
    text = file.read_text().replace('\nscopes', ' # hashed\n# of the build\nscopes')
    file.write_text(text)
    again = made_by(tt, 'key', 'rotate', made['id'])
    assert again['id'] == made['id']
    assert file.read_text() == text.replace(made['hash'], again['hash'])
    [key] = config.load(directory).townhall.auth.keys
    assert (key['scopes'], key['expires']) == (['town.read', 'town.write'], '2099-01-01T00:00:00Z')
    assert matches(again['key'].encode(), key['hash'])
    assert tt('key', 'revoke', made['id'])[0] == 0
    assert 'of the build' not in file.read_text()


def test_the_lines_to_paste_are_valid_as_they_are(directory: Path, tt: Tt) -> None:
    file = directory / config.FILE
    status, out, _ = tt('key', 'create', '--expires', '90d')
    assert status == 0
    pasted = out[out.index('[townhall.auth]') : out.index('The key is shown')]
    assert file.read_text() == MINE
    file.write_text('name = "a"\n' + pasted)
    found = config.load(directory).townhall.auth
    [key] = found.keys
    assert found.mode == 'api_key'
    assert f'hash  {key["hash"]}\n' in out
    days = ((api_key_table.expiry(key) or 0) - datetime.now(UTC).timestamp()) / 86400
    assert 89.9 < days <= 90


def test_the_list_shows_scopes_notes_and_expiry_and_never_a_hash(directory: Path, tt: Tt) -> None:
    assert tt('key', 'list')[1] == 'townhall.auth.mode is "none", so townhall does not ask for keys.\n'
    made = made_by(tt, 'key', 'create', '--note', 'for CI', '--expires', '2099-01-01T00:00:00Z', '--write')
    with open(directory / config.FILE, 'a') as file:
        file.write(entry(expires='2020-01-01T00:00:00Z'))
    assert tt('key', 'list')[1].splitlines() == [
        f'{made["id"]}  town.read  until 2099-01-01T00:00:00Z  for CI',
        '0123abcd  town.read  expired 2020-01-01T00:00:00Z',
    ]
    listed = tt('key', 'list', '--json')[1] + tt('config')[1] + tt('config', '--json')[1]
    assert 'argon2' not in listed


@pytest.mark.parametrize(
    ('words', 'status', 'says'),
    [
        ('key create --scopes all', 2, '--scopes all: give a list of one or more of town.read'),
        ('key create --scopes=', 2, 'give a list'),
        ('key create --expires soon', 2, '--expires soon: give 90d, 12h, or a time'),
        ('key create --expires 2020-01-01T00:00:00Z', 2, 'that time is in the past'),
        ('key create --expires 0d', 2, 'give 90d'),
        ('key revoke 0123abcd', 1, "There is no key '0123abcd'"),
        ('key rotate 0123abcd', 1, 'see tt key list'),
        ('key revoke', 2, 'ID'),
        ('key create --write --url http://x', 2, 'acts on this machine'),
    ],
)
def test_a_wrong_command_changes_nothing(directory: Path, tt: Tt, words: str, status: int, says: str) -> None:
    found = tt(*words.split(' '))
    assert (found[0], found[1]) == (status, '')
    assert says in found[2]
    assert (directory / config.FILE).read_text() == MINE


@pytest.mark.parametrize(
    'text',
    [
        f'name = "a"\n[townhall.auth]\nkeys = [{{id = "0123abcd", hash = "{HASH}", scopes = ["admin"]}}]',
        'name = "a"\ntownhall = {auth = {mode = "none"}}\n',
    ],
)
def test_a_file_that_can_not_be_edited_safely_is_left_alone(directory: Path, tt: Tt, text: str) -> None:
    file = directory / config.FILE
    file.write_text(text)
    for words in (('key', 'create', '--write'), ('key', 'revoke', '0123abcd'), ('key', 'rotate', '0123abcd')):
        status, _, said = tt(*words)
        assert status != 0
        assert 'by hand' in said or 'There is no key' in said
        assert file.read_text() == text


def test_concurrent_commands_lose_no_key(directory: Path) -> None:
    (directory / config.FILE).write_text(MINE)
    threads = [threading.Thread(target=main, args=(['key', 'create', '--write', '--town', str(directory)],))
               for _ in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(config.load(directory).townhall.auth.keys) == 8


def test_the_checksum_covers_everything_before_it() -> None:
    made = generate_key()
    body, _, check = made.key.rpartition('_')
    assert check == checksum(body)
    assert body.startswith(f'tt_{made.id}_')
