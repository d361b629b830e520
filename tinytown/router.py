"""The router: which target a method and a path mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from .errors import MethodNotAllowed, NotFound

T = TypeVar('T')


class Router(Generic[T]):
    """Finds the target of a method and path. `match` gives (target, values of the placeholders) or raises."""

    def __init__(self) -> None:
        self._exact: dict[str, dict[str, T]] = {}
        self._patterns: dict[int, list[tuple[list[str], dict[str, T]]]] = {}

    def add(self, method: str, path: str, target: T) -> None:
        """A route; a segment {name} matches any one segment. Exact paths come before patterns."""
        if '{' not in path:
            self._exact.setdefault(path, {})[method] = target
            return
        parts = path.split('/')
        same_length = self._patterns.setdefault(len(parts), [])
        for known, methods in same_length:
            if known == parts:
                methods[method] = target
                return
        same_length.append((parts, {method: target}))

    def match(self, method: str, path: str) -> tuple[T, dict[str, str]]:
        """Raises NotFound, or MethodNotAllowed with the methods that there are."""
        method_there = 'GET' if method == 'HEAD' else method
        for methods, pattern, parts in self._find(path):
            target = methods.get(method_there)
            if target is not None:
                return target, {p[1:-1]: part for p, part in zip(pattern, parts, strict=True) if p[:1] == '{'}
        allowed = self.allow(path)
        raise MethodNotAllowed(f'{path} takes {allowed}, not {method}', allow=allowed)

    def _find(self, path: str) -> Iterator[tuple[dict[str, T], list[str], list[str]]]:
        """What fits a path, the exact route first: its targets by method, its segments and those of the path."""
        exact = self._exact.get(path)
        if exact is not None:
            yield exact, [], []
        parts = path.split('/')
        for pattern, methods in self._patterns.get(len(parts), ()):
            if all(p == part or (p[:1] == '{' and part) for p, part in zip(pattern, parts, strict=True)):
                yield methods, pattern, parts

    def allow(self, path: str) -> str:
        """The methods of a path, for OPTIONS. Raises NotFound."""
        names = {method for methods, _, _ in self._find(path) for method in methods}
        if not names:
            raise NotFound(f'{path[:200]} is not a path of this server', code='no-such-path')
        return ', '.join(sorted(names | {'OPTIONS'} | ({'HEAD'} if 'GET' in names else set())))
