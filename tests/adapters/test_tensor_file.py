"""Tensors written one at a time, against what the safetensors library writes of them all."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexlora.adapters.tensor_file import TensorSpool


def test_the_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide.b": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "né.weight": torch.randn(7, 2, generator=generator),
        "half": torch.randn(3, generator=generator).half(),
        "a.bfloat": torch.randn(2, 3, generator=generator).bfloat16(),
        "turned": torch.randn(4, 6, generator=generator).T,
    }
    with TensorSpool(tmp_path) as spool:
        for name, tensor in tensors.items():
            spool.add(name, tensor)
        spool.write(tmp_path / "spooled")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "saved", metadata={"format": "pt"})
    assert (tmp_path / "spooled").read_bytes() == (tmp_path / "saved").read_bytes()
    for name, tensor in load_file(tmp_path / "spooled").items():
        assert torch.equal(tensor, tensors[name])


def test_what_waits_has_no_name_and_goes_with_the_spool(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TensorSpool(tmp_path) as spool:
        spool.add("large", torch.zeros(1 << 20))
        assert os.listdir(tmp_path) == []
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
