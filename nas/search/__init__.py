"""How to look for an architecture. A new differentiable method is one file and one row here."""

from nas.errors import UnknownNameError
from nas.search.bilevel import BilevelSearch, SearchResult
from nas.search.darts import SecondOrderDarts
from nas.search.method import Method, SearchConfig
from nas.search.pcdarts import PartialChannelDarts
from nas.search.pdarts import ProgressiveDarts
from nas.search.stages import Stage

METHODS: dict[str, Method] = {
    method.name: method
    for method in (Method(), SecondOrderDarts(), PartialChannelDarts(), ProgressiveDarts())
}


def find_method(name: str) -> Method:
    """The search method called ``name``.

    Raises:
        UnknownNameError: there is none of that name; the message suggests the nearest.
    """
    if name not in METHODS:
        raise UnknownNameError("search method", name, METHODS)
    return METHODS[name]


__all__ = [
    "METHODS",
    "BilevelSearch",
    "Method",
    "SearchConfig",
    "SearchResult",
    "Stage",
    "find_method",
]
