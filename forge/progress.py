"""How the forge's work says how far it is. Whoever shows it decides how."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of); `of` is 0 where nothing can be counted."""


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""
