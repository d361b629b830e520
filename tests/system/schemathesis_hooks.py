"""What Schemathesis is to know of our API that an OpenAPI document can't say."""

from __future__ import annotations

import itertools
import re
from typing import Any

import schemathesis

_number = itertools.count()


@schemathesis.hook
def before_call(_context: schemathesis.HookContext, case: schemathesis.Case, _kwargs: dict[str, Any]) -> None:
    """Makes a request that fits the document one that can be met."""
    headers = case.headers
    if 'Authorization' in headers:
        headers.pop('X-API-Key', None)  # a key is sent once
    if re.fullmatch(r'[\x21-\x7e]{1,200}', headers.get('Idempotency-Key') or ''):
        headers['Idempotency-Key'] += f'-{next(_number)}'  # it stands for one request
    if case.meta and case.meta.generation.mode.is_positive:
        _adapt(case)


def _adapt(case: schemathesis.Case) -> None:
    body = case.body if isinstance(case.body, dict) else {}
    query = case.query or {}
    if case.path.endswith('/wait'):
        case.body = {'timeout': 0}
    elif case.path.endswith('/inbox/ack'):
        case.body = {'ids': body['ids']} if body.get('ids') else {'all': True}
    elif body.get('cli'):
        case.body = body | {'cli': 'demo'}  # one that this town has
    elif case.path.endswith('/logs') and 'offset' in query:
        query.pop('tail', None)
    elif case.path.endswith('/events'):
        query.pop('wait', None)
