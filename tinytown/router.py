"""The router: which target a method and a path mean."""

from __future__ import annotations

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
        methods, values = self._find(path)
        target = methods.get('GET' if method == 'HEAD' else method)
        if target is None:
            raise MethodNotAllowed(f'{path} takes {self.allowed(methods)}, not {method}', allow=self.allowed(methods))
        return target, values

    def _find(self, path: str) -> tuple[dict[str, T], dict[str, str]]:
        exact = self._exact.get(path)
        if exact is not None:
            return exact, {}
        parts = path.split('/')
        for pattern, methods in self._patterns.get(len(parts), ()):
            if all(p == part or (p[:1] == '{' and part) for p, part in zip(pattern, parts, strict=True)):
                return methods, {p[1:-1]: part for p, part in zip(pattern, parts, strict=True) if p[:1] == '{'}
        raise NotFound(f'{path[:200]} is not a path of this server', code='no-such-path')

    @staticmethod
    def allowed(methods: dict[str, T]) -> str:
        names = set(methods) | {'OPTIONS'} | ({'HEAD'} if 'GET' in methods else set())
        return ', '.join(sorted(names))

    def allow(self, path: str) -> str:
        """The methods of a path, for OPTIONS. Raises NotFound."""
        return self.allowed(self._find(path)[0])
