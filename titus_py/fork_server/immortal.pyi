#: Whether this interpreter can have them (CPython 3.12 and 3.13).
AVAILABLE: bool

def immortalize(objects: list[object]) -> list[object]: ...
