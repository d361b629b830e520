"""The router: which target a method and a path mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Generic, TypeAlias, TypeVar

from ..errors import MethodNotAllowed, NotFound

T = TypeVar('T')
Places: TypeAlias = tuple[tuple[int, str], ...]  # the placeholders of a route: which segment, and its name
_MOST_FOUND: Final = 512  # matches that are kept, of paths that are not longer than this
_LONGEST_FOUND: Final = 256
_ANY: Final = '{}'  # stands for a placeholder


class Router(Generic[T]):
    """Finds the target of a method and path. `match` gives (target, values of the placeholders) or raises."""

    def __init__(self) -> None:
        self._routes: dict[str, dict[str, tuple[T, Places]]] = {}  # by path, its placeholders blanked; by method
        self._shapes: dict[int, list[tuple[int, ...]]] = {}  # by number of segments: which of them are placeholders
        self._found: dict[tuple[str, str], tuple[T, Mapping[str, str]]] = {}  # what `match` gave lately

    def add(self, method: str, path: str, target: T) -> None:
        """A route; a segment {name} matches any one segment. Exact paths come before patterns."""
        self._found.clear()
        parts = path.split('/')
        places = tuple((i, part[1:-1]) for i, part in enumerate(parts) if part[:1] == '{')
        shape = tuple(i for i, _ in places)
        self._routes.setdefault(_blanked(parts, shape), {})[method] = target, places
        shapes = self._shapes.setdefault(len(parts), [])
        if shape and shape not in shapes:
            shapes.append(shape)

    def match(self, method: str, path: str) -> tuple[T, Mapping[str, str]]:
        """Raises NotFound, or MethodNotAllowed with the methods that there are."""
        found = self._found.get((method, path))
        if found is None:
            found = self._match(method, path)
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            if len(path) <= _LONGEST_FOUND:
                self._found[method, path] = found
        return found

    def _match(self, method: str, path: str) -> tuple[T, dict[str, str]]:
        method_there = 'GET' if method == 'HEAD' else method
        for methods in self._find(path):
            if method_there in methods:
                target, places = methods[method_there]
                parts = path.split('/')
                return target, {name: parts[i] for i, name in places}
        allowed = self.allow(path)
        raise MethodNotAllowed(f'{path} takes {allowed}, not {method}', allow=allowed)

    def _find(self, path: str) -> Iterator[dict[str, tuple[T, Places]]]:
        """The routes that fit a path by method, those without placeholders first."""
        exact = self._routes.get(path)
        if exact is not None:
            yield exact
        parts = path.split('/')
        for shape in self._shapes.get(len(parts), ()):
            routes = self._routes.get(_blanked(parts, shape))
            if routes is not None:
                yield routes

    def allow(self, path: str) -> str:
        """The methods of a path, for OPTIONS. Raises NotFound."""
        names = {method for methods in self._find(path) for method in methods}
        if not names:
            raise NotFound(f'{path[:200]} is not a path of this server', code='no-such-path')
        return ', '.join(sorted(names | {'OPTIONS'} | ({'HEAD'} if 'GET' in names else set())))


def _blanked(parts: list[str], shape: Iterable[int]) -> str:
    """A path with the segments of a shape blanked, but for empty ones, which match no placeholder."""
    blanked = parts.copy()
    for i in shape:
        blanked[i] = parts[i] and _ANY
    return '/'.join(blanked)
