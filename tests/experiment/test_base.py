"""Which device a configuration names."""

import pytest

from flexlora.experiment.base import BaseModelError, resolve_device


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(BaseModelError, match=r"model\.device=cuda:99"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == "cpu"
