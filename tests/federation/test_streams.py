"""Random streams are functions of their arguments and of nothing else."""

from flexlora.federation.streams import stream, stream_seed


def test_streams_are_the_same_in_every_process_and_version():
    # First 8 bytes of sha256('[7, "cohort", 3, "task0001"]'), shifted right by one, from the sha256sum command.
    assert stream_seed(7, "cohort", 3, "task0001") == 7171292808205170462
    # PCG64 seeded by numpy's SeedSequence is specified bit by bit, so its numbers may be written down too.
    assert stream(7, "cohort", 3, "task0001").integers(10**9) == 405290363


def test_streams_differ_in_every_argument():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "a", 1, 2), (0, "a", 12), (0, "a", "1", "2")]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= stream_seed(*key) < 2**63 for key in keys)


def test_a_stream_starts_at_its_beginning_every_time():
    first, second = stream(3, "cohort", 1), stream(3, "cohort", 1)
    assert first.random(5).tolist() == second.random(5).tolist()
    assert first.random() == second.random()
