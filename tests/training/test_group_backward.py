import dataclasses

import pytest
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.training.group import train_group
from flexlora.training.group_backward import GroupBackward
from flexlora.training.group_decoder import written_out
from flexlora.training.one_client import LocalTraining

SGD = LocalTraining("sgd", batch_size=2)


def distance(left, right):
    assert left.keys() == right.keys()
    assert all(left[path].scaling == right[path].scaling for path in left)
    pairs = [(left[path], right[path]) for path in left]
    return max(float(torch.cat([(a.A - b.A).flatten(), (a.B - b.B).flatten()]).abs().max()) for a, b in pairs)


def test_a_llama_is_written_out_whatever_peft_has_put_into_it(model, jobs):
    assert written_out(model.network) is not None
    model.load(jobs[0].broadcast)
    assert GroupBackward(model)._decoder is not None
    # With factors in it, it is no longer the base.
    assert written_out(model.network) is None


@pytest.mark.parametrize("loss_on_all", [False, True])
def test_written_out_and_by_autograd_the_gradients_are_the_same(model, jobs, monkeypatch, loss_on_all):
    if loss_on_all:
        everywhere = [
            [EncodedExample(example.input_ids, example.input_ids) for example in job.examples] for job in jobs
        ]
        jobs = [dataclasses.replace(job, examples=own) for job, own in zip(jobs, everywhere, strict=True)]
    settings = LocalTraining("sgd", batch_size=4)
    fast = list(train_group(model, jobs, settings))
    monkeypatch.setattr("flexlora.training.group_backward.decoder_of", lambda network: None)
    slow = list(train_group(model, jobs, settings))
    assert max(distance(left.adapter, right.adapter) for left, right in zip(fast, slow, strict=True)) < 1e-5
