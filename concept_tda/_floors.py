"""Rooms of a floor, imported when they are first used: `ct.influence.curvature`."""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from sys import modules


def floor(name: str) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of the package `name`."""
    rooms = [module.name for module in iter_modules(modules[name].__path__) if not module.name.startswith("_")]

    def room(wanted):
        if wanted in rooms: return import_module(f"{name}.{wanted}")
        raise AttributeError(f"{name} has no room {wanted!r}; its rooms are {', '.join(rooms)}")

    return room, lambda: [*modules[name].__dict__, *rooms]
