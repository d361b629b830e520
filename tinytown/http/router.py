"""The router: finds the target (an operation, for `rest.app`) of a method and a path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Generic, TypeAlias, TypeVar

from ..errors import MethodNotAllowed, NotFound

T = TypeVar('T')
Places: TypeAlias = tuple[tuple[int, str], ...]  # the placeholders of a route: which segment, and its name
_MAX_CACHED: Final = 512  # matches
_MAX_CACHED_PATH: Final = 256  # characters of a path whose match is cached
_ANY: Final = '{}'  # replaces a placeholder's segment


class Router(Generic[T]):
    """Finds the target of a method and path. `add` all routes first, then call `match`."""

    def __init__(self) -> None:
        self._routes: dict[str, dict[str, tuple[T, Places]]] = {}  # by path with blanked placeholders, then by method
        self._shapes: dict[int, list[tuple[int, ...]]] = {}  # by number of segments: which of them are placeholders
        self._cache: dict[tuple[str, str], tuple[T, Mapping[str, str]]] = {}  # recent results of `match`

    def add(self, method: str, path: str, target: T) -> None:
        """Adds a route. A segment {name} matches any one segment. Exact paths win over paths with placeholders."""
        self._cache.clear()
        parts = path.split('/')
        places = tuple((i, part[1:-1]) for i, part in enumerate(parts) if part[:1] == '{')
        shape = tuple(i for i, _ in places)
        self._routes.setdefault(_blanked(parts, shape), {})[method] = target, places
        shapes = self._shapes.setdefault(len(parts), [])
        if shape and shape not in shapes:
            shapes.append(shape)

    def match(self, method: str, path: str) -> tuple[T, Mapping[str, str]]:
        """(target, values of the placeholders). Raises NotFound; MethodNotAllowed, with the methods of the path."""
        match = self._cache.get((method, path))
        if match is None:
            match = self._match(method, path)
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            if len(path) <= _MAX_CACHED_PATH:
                self._cache[method, path] = match
        return match

    def _match(self, method: str, path: str) -> tuple[T, dict[str, str]]:
        routed_method = 'GET' if method == 'HEAD' else method
        for methods in self._find(path):
            if routed_method in methods:
                target, places = methods[routed_method]
                parts = path.split('/')
                return target, {name: parts[i] for i, name in places}
        allowed = self.allow(path)
        raise MethodNotAllowed(f'{path} supports {allowed}, not {method}', allow=allowed)

    def _find(self, path: str) -> Iterator[dict[str, tuple[T, Places]]]:
        """The routes that match a path, by method; those without placeholders first."""
        exact = self._routes.get(path)
        if exact is not None:
            yield exact
        parts = path.split('/')
        for shape in self._shapes.get(len(parts), ()):
            routes = self._routes.get(_blanked(parts, shape))
            if routes is not None:
                yield routes

    def allow(self, path: str) -> str:
        """The methods of a path, as in the header Allow. Raises NotFound."""
        names = {method for methods in self._find(path) for method in methods}
        if not names:
            raise NotFound(f'this server has no path {path[:200]}', code='no-such-path')
        return ', '.join(sorted(names | {'OPTIONS'} | ({'HEAD'} if 'GET' in names else set())))


def _blanked(parts: list[str], shape: Iterable[int]) -> str:
    """A path with the segments of a shape blanked. Empty segments stay, because they match no placeholder."""
    blanked = parts.copy()
    for i in shape:
        blanked[i] = parts[i] and _ANY
    return '/'.join(blanked)
