"""Names that cost nothing until they are used: at the front door, and by floor and room."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from sys import modules

from concept_tda._public import PUBLIC

ROOM_OF = {name: room for room, names in PUBLIC.items() for name in names.split()}
FLOORS = {room.split(".")[0] for room in PUBLIC}

Lookup = tuple[Callable[[str], object], Callable[[], list[str]]]


def front_door(package: str, names: list[str]) -> Lookup:
    """`__getattr__` and `__dir__` of the package: `names`, and the floors."""
    def look_up(name: str) -> object:
        if name in FLOORS: return import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}{where(name)}")
        value = getattr(import_module(f"{package}.{ROOM_OF[name]}"), name)
        setattr(modules[package], name, value)  # the next access does not come here
        return value

    def where(name: str) -> str:
        if name in ROOM_OF: return f"; it is {package}.{ROOM_OF[name]}.{name}"
        close = [] if name.startswith("_") else get_close_matches(name, [*names, *FLOORS], n=3)
        close = close or get_close_matches(name, [f"{room}.{word}" for word, room in ROOM_OF.items()], n=1)
        return f"; did you mean {' or '.join(close)}?" if close else ""

    return look_up, lambda: sorted([*vars(modules[package]), *FLOORS, *names])


def floor(package: str) -> Lookup:
    """`__getattr__` and `__dir__` of a floor: its rooms."""
    rooms = [room.name for room in iter_modules(modules[package].__path__) if not room.name.startswith("_")]

    def look_up(name: str) -> object:
        if name in rooms: return import_module(f"{package}.{name}")
        raise AttributeError(f"{package} has no room {name!r}; its rooms are {', '.join(rooms)}")

    return look_up, lambda: sorted([*vars(modules[package]), *rooms])
