"""What every warehouse promises through its client: the same bits, or fewer of them; never wrong ones."""

from cache.client import WarehouseClient
from cache.extent import ExtentHeader, Image
from tests.cache.chains import BLOCK_SIZE, fill, offer, query, read_and_check, root_of

TOKENS = list(range(100, 150))
"""Twelve full blocks and a tail of two tokens."""


class WarehouseContract:
    """`client` is a fixture of the inheriting class; `settle` waits until its tiers have come to rest."""

    def settle(self, client: WarehouseClient) -> None:
        """For warehouses whose blocks move by themselves."""

    def test_what_was_stored_is_read_back_to_the_bit(self, client: WarehouseClient) -> None:
        assert client.store(offer(TOKENS), fill)
        self.settle(client)
        assert read_and_check(client, query(TOKENS)).tokens == len(TOKENS)

    def test_nothing_is_found_before_it_is_stored(self, client: WarehouseClient) -> None:
        assert client.lookup(query(TOKENS)).pieces == ()

    def test_a_longer_prompt_finds_all_of_its_history(self, client: WarehouseClient) -> None:
        client.store(offer(TOKENS), fill)
        self.settle(client)
        assert read_and_check(client, query([*TOKENS, 1, 2, 3, 4, 5])).tokens == len(TOKENS)

    def test_a_fork_inside_a_block_shares_up_to_the_fork(self, client: WarehouseClient) -> None:
        client.store(offer(TOKENS), fill)
        self.settle(client)
        for at in (1, 4, 6, 47, 49):
            assert read_and_check(client, query([*TOKENS[:at], 7, 7, 7, 7])).tokens == at

    def test_turns_of_a_session_store_only_what_is_new(self, client: WarehouseClient) -> None:
        num_filled = 0

        def fill_and_count(header: ExtentHeader, image: Image) -> None:
            nonlocal num_filled
            num_filled += header.num_blocks
            fill(header, image)

        for end in (10, 23, 50):
            assert client.store(offer(TOKENS[:end]), fill_and_count)
            self.settle(client)
        assert read_and_check(client, query(TOKENS)).tokens == len(TOKENS)
        assert num_filled == 12 + 3, "twelve full blocks and a tail at the end of each turn"

    def test_a_reader_that_has_the_first_blocks_gets_the_rest(self, client: WarehouseClient) -> None:
        client.store(offer(TOKENS), fill)
        self.settle(client)
        for first in (1, 5, 12):
            assert read_and_check(client, query(TOKENS, first=first)).tokens == len(TOKENS)

    def test_chains_of_another_root_are_never_found(self, client: WarehouseClient) -> None:
        client.store(offer(TOKENS), fill)
        for other in (root_of(weights="changed"), root_of(tenant_salt="another"), root_of(numerics="int4")):
            assert read_and_check(client, query(TOKENS, root=other)).granted_tokens == 0

    def test_storing_again_fills_nothing(self, client: WarehouseClient) -> None:
        client.store(offer(TOKENS), fill)
        assert client.store(offer(TOKENS), _never)

    def test_a_handoff_is_read_by_its_owner(self, client: WarehouseClient) -> None:
        assert client.store(offer(TOKENS[:48], with_tail=False, handoff_owner="request"), fill)
        assert read_and_check(client, query(TOKENS[:48], "request")).tokens == 48
        assert read_and_check(client, query(TOKENS[:48], "someone else")).tokens in range(0, 49, BLOCK_SIZE)


def _never(*args: object) -> None:
    raise AssertionError("everything is stored already")
