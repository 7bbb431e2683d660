from hypothesis import given
from hypothesis import strategies as st

from router.holdings import IN_DISK, IN_DRAM, NOT_HERE, Holdings, Sources


def test_own_pool_first_then_own_tiers_then_other_nodes() -> None:
    holdings = Holdings(
        devices={"r": 3},
        nodes={
            "own": bytes([IN_DRAM, IN_DRAM, NOT_HERE, IN_DRAM, NOT_HERE, IN_DISK, NOT_HERE]),
            "other": bytes([NOT_HERE, IN_DRAM, NOT_HERE, IN_DRAM, IN_DISK, IN_DISK, NOT_HERE]),
        },
    )
    assert holdings.sources("r", "own") == Sources(device_blocks=3, dram_blocks=1, disk_blocks=1, remote_blocks=1)
    assert holdings.sources("elsewhere", "own") == Sources(dram_blocks=2), "block 2 is nowhere but in r's pool"
    assert holdings.sources("elsewhere", "new").remote_blocks == 2


def test_nothing_held() -> None:
    assert Holdings().sources("r", "n").num_blocks == 0
    assert Holdings(devices={"r": 4}).sources("r", "n") == Sources(device_blocks=4)


@given(
    st.integers(0, 6),
    st.integers(0, 6).flatmap(
        lambda length: st.dictionaries(
            st.sampled_from(["a", "b", "c"]),
            st.lists(st.sampled_from([NOT_HERE, IN_DRAM, IN_DISK]), min_size=length, max_size=length).map(bytes),
        )
    ),
)
def test_sources_agree_with_a_walk_over_the_blocks(num_device: int, nodes: dict[str, bytes]) -> None:
    counts = {IN_DRAM: 0, IN_DISK: 0, NOT_HERE: 0}
    length = max((len(codes) for codes in nodes.values()), default=0)
    for i in range(num_device, length):
        if not any(codes[i] for codes in nodes.values()):
            break
        counts[nodes["a"][i] if "a" in nodes else NOT_HERE] += 1
    expected = Sources(num_device, counts[IN_DRAM], counts[IN_DISK], counts[NOT_HERE])
    assert Holdings({"r": num_device}, nodes).sources("r", "a") == expected
