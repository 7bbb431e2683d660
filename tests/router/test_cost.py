import pytest

from cache.events import ReplicaLoad, Tier
from router.cost import REMOTE, CostModel


def test_loading_takes_bytes_over_bandwidth() -> None:
    costs = CostModel(bytes_per_token=1000, dram_bytes_per_s=1e6, disk_bytes_per_s=1e5, remote_bytes_per_s=1e4)
    assert costs.seconds_to_load(Tier.DEVICE, 500) == 0
    assert costs.seconds_to_load(Tier.DRAM, 500) == pytest.approx(0.5)
    assert costs.seconds_to_load(Tier.DISK, 500) == pytest.approx(5)
    assert costs.seconds_to_load(REMOTE, 500) == pytest.approx(50)


def test_computing_takes_tokens_over_speed() -> None:
    assert CostModel(bytes_per_token=1, prefill_tokens_per_s=250).seconds_to_compute(1000) == pytest.approx(4)


def test_a_token_takes_longer_the_more_there_are_before_it() -> None:
    costs = CostModel(bytes_per_token=1, prefill_tokens_per_s=500, prefill_s_per_position=1e-6)
    assert costs.seconds_to_compute(1000) == pytest.approx(2 + 0.5)
    assert costs.seconds_to_compute(1000, 4000) == pytest.approx(2 + 4.5)
    whole = costs.seconds_to_compute(3000)
    parts = costs.seconds_to_compute(1200) + costs.seconds_to_compute(1800, 1200)
    assert parts == pytest.approx(whole), "a prompt costs the same in one go and in parts"


def test_measurements_replace_defaults_one_by_one() -> None:
    assumed = CostModel(bytes_per_token=1)
    load = ReplicaLoad("r", "decode", 0, 0, 0, 700.0, 0.0, ((Tier.DISK, 9e8),), 2e-7)
    measured = assumed.measured(load)
    assert measured.prefill_tokens_per_s == 700
    assert measured.disk_bytes_per_s == 9e8
    assert measured.prefill_s_per_position == 2e-7
    assert measured.decode_step_s == assumed.decode_step_s, "0 means not measured yet"
    assert measured.dram_bytes_per_s == assumed.dram_bytes_per_s


def test_speed_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"CostModel\.disk_bytes_per_s is 0, it must be positive"):
        CostModel(bytes_per_token=1, disk_bytes_per_s=0)
    with pytest.raises(ValueError, match=r"CostModel\.prefill_s_per_position is -1"):
        CostModel(bytes_per_token=1, prefill_s_per_position=-1)
