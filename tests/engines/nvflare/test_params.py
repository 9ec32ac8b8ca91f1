"""Parameters of NVFlare's models, against arrays written by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from flexlora.engines.nvflare.params import NvflareError, adapter_in, check_scalings, params_of, scalings_of
from flexlora.lora.factors import Scaling

RULE = Scaling("rslora", 6.0)
A, B = "base_model.model.wide.lora_A.weight", "base_model.model.wide.lora_B.weight"


def params() -> dict[Any, Any]:
    return {A: np.arange(24, dtype=np.float64).reshape(4, 6), B: np.ones((5, 4), np.float16)}


def test_arrays_become_factors_in_float32_with_the_scaling_of_their_rank() -> None:
    adapter = adapter_in(params(), RULE)
    own = adapter["wide"]
    assert (own.A.dtype, own.B.dtype, own.scaling) == (torch.float32, torch.float32, 3.0)
    np.testing.assert_array_equal(own.A.numpy(), params()[A])
    back = params_of(adapter)
    assert back.keys() == {A, B} and back[A].dtype == np.float32
    assert scalings_of(adapter) == {"wide": 3.0}


def test_factors_share_no_memory_with_what_arrived() -> None:
    arrived = {key: np.asarray(value, np.float32) for key, value in params().items()}
    adapter = adapter_in(arrived, RULE)
    arrived[A][:] = 0
    assert adapter["wide"].A.any()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "cannot be read as an array"),
        ([[1.0], [1.0, 2.0]], "cannot be read as an array"),
        (np.array([[object()]]), "cannot be read as an array"),
        (np.ones((4, 6), np.complex64), "matrix of floats"),
        (np.ones((4, 6), np.int32), "matrix of floats"),
        (np.float32(1), "matrix of floats"),
        (None, "cannot be read as an array"),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused_by_name(value: Any, reason: str) -> None:
    with pytest.raises(NvflareError, match=reason) as raised:
        adapter_in({**params(), A: value}, RULE)
    assert A in str(raised.value)


@pytest.mark.parametrize("value", [None, 3, [1], "weights"])
def test_a_model_that_is_no_mapping_is_refused(value: Any) -> None:
    with pytest.raises(NvflareError, match="mapping of names to arrays"):
        adapter_in(value, RULE)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (None, "got NoneType"),
        (3.0, "got float"),
        ({}, "got None"),
        ({"wide": "3.0"}, "got '3.0'"),
        ({"wide": float("nan")}, "got nan"),
        ({"wide": 1.5}, "wide: scaling must be 3 at rank 4.*got 1.5"),
    ],
)
def test_another_scaling_than_that_of_the_rank_is_refused(told: Any, reason: str) -> None:
    with pytest.raises(NvflareError, match=reason):
        check_scalings(adapter_in(params(), RULE), told)
    check_scalings(adapter_in(params(), RULE), {"wide": 3})
