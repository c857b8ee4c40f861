from __future__ import annotations

import pytest

from nas.errors import UnknownNameError
from nas.spaces import SPACES, find_space


def test_a_space_is_found_by_its_own_name():
    for name, space in SPACES.items():
        assert space.name == name
        assert find_space(name) is space


def test_an_unknown_space_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown space 'dart': did you mean 'darts'"):
        find_space("dart")
