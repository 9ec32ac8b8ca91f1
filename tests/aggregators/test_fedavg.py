import torch

from flexlora.aggregators.contract_case import SCALINGS, Case
from flexlora.aggregators.fedavg import FedAvg
from flexlora.aggregators.fedit import FedIt
from flexlora.aggregators.settings import traits_of


def test_the_server_does_to_the_bit_what_it_does_under_fedit() -> None:
    for scaling in SCALINGS:
        case, reference = Case(FedAvg, {}, scaling), Case(FedIt, {}, scaling)
        state, expected = case.after_a_round(), reference.after_a_round()
        for module, factors in expected.adapter.items():
            assert torch.equal(state.adapter[module].A, factors.A)
            assert torch.equal(state.adapter[module].B, factors.B)


def test_clients_are_to_train_with_sgd() -> None:
    assert traits_of(FedAvg).local_optimizer == "sgd"
    assert traits_of(FedIt).local_optimizer is None
