from flexlora.training.common_ranks import CommonRanks, common_ranks


def test_on_a_cpu_factors_are_stored_at_their_own_ranks(make_broadcast):
    broadcast = make_broadcast(3, 5)
    ranks = common_ranks("cpu", 10**6, [broadcast, make_broadcast(8)])
    assert ranks == CommonRanks()
    own = {path: factors.rank for path, factors in broadcast.trainable.items()}
    assert ranks.stored(broadcast.trainable, is_trained=True) == own


def test_on_a_gpu_clients_of_a_small_base_are_stored_at_the_largest_rank_of_each_module(make_broadcast):
    broadcasts = [make_broadcast(2, 20), make_broadcast(40, 3, frozen=(18,)), make_broadcast(1, frozen=(24, 17))]
    ranks = common_ranks("cuda", 10**6, iter(broadcasts))
    first, second, *_ = broadcasts[0].trainable
    for broadcast in broadcasts:
        trained = ranks.stored(broadcast.trainable, is_trained=True)
        assert trained.keys() == broadcast.trainable.keys()
        assert (trained[first], trained[second]) == (40, 20)
    frozen = ranks.stored(broadcasts[1].frozen, is_trained=False)
    assert (frozen[first], frozen[second]) == (24, 18)


def test_on_a_gpu_a_large_base_pads_small_ranks_only(make_broadcast):
    broadcasts = [make_broadcast(2), make_broadcast(40)]
    ranks = common_ranks("cuda", 7 * 10**9, broadcasts)
    assert [set(ranks.stored(one.trainable, is_trained=True).values()) for one in broadcasts] == [{16}, {40}]
