"""Two tenants on one engine and one warehouse: neither finds what the other has stored, in no tier."""

from dataclasses import replace
from pathlib import Path

import pytest

from cache.events import Tier
from cache.extent import Origin
from cache.fingerprint import Fingerprint
from cache.messages import PurgeQuery
from serving.protocol import SamplingParams, Usage
from serving.tenants import label_of, salt_of
from tests.serving.engine.harness import (
    BLOCK_SIZE,
    TIMEOUT_S,
    EngineUnderTest,
    Handoff,
    make_engine,
    open_store,
    prompt_of,
    running,
)

PLAIN = Fingerprint("weights", "config", "float32", "float32", BLOCK_SIZE)
PROMPT = prompt_of(BLOCK_SIZE * 3 + 5)


def ask(engine: EngineUnderTest, tenant: str, session: str = "") -> Usage:
    """What it cost to answer the one prompt to a tenant."""
    root = replace(PLAIN, tenant_salt=salt_of(tenant)).root_hash()
    origin = Origin(label_of(tenant), session)
    return engine.submit(PROMPT, SamplingParams(4, temperature=0.0), root=root, origin=origin).wait().cost


def test_another_tenant_is_a_miss_in_the_pool(tiny_model_dir: Path) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        assert ask(engine, "anna").cached_tokens == 0
        assert ask(engine, "bert").cached_tokens == 0
        assert ask(engine, "").cached_tokens == 0
        for tenant in ("anna", "bert", ""):
            assert ask(engine, tenant).device_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.DISK])
def test_another_tenant_is_a_miss_in_the_warehouse(tiny_model_dir: Path, tmp_path: Path, tier: Tier) -> None:
    """On disk: after a restart of the node store."""
    store = open_store(tmp_path)
    with running(make_engine(tiny_model_dir, store)) as engine:
        ask(engine, "anna")
    if tier is Tier.DISK:
        store.close()
        store = open_store(tmp_path)
    with store:
        with running(make_engine(tiny_model_dir, store)) as engine:
            assert ask(engine, "bert").cached_tokens == 0
            assert ask(engine, "").cached_tokens == 0
            usage = ask(engine, "anna")
        found = {Tier.DRAM: usage.dram_tokens, Tier.DISK: usage.disk_tokens}
        assert found == {Tier.DRAM: 0, Tier.DISK: 0} | {tier: len(PROMPT) - 1}


def test_a_turn_says_whose_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with running(make_engine(tiny_model_dir, store)) as engine:
            for tenant, session in (("anna", "one"), ("anna", "two"), ("bert", "one")):
                ask(engine, tenant, session)
        # The second session of the same tenant stored nothing: all that it said had been said before.
        assert store.purge(PurgeQuery(label_of("anna"), "two")).num_tokens == 0
        assert store.purge(PurgeQuery(label_of("anna"), "one")).num_tokens == len(PROMPT) + 3
        assert store.purge(PurgeQuery(label_of("bert"))).num_tokens == len(PROMPT) + 3
        assert store.stats().num_extents == 0


def test_what_prefill_hands_off_says_whose_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with (
            running(make_engine(tiny_model_dir, store, replica_id="prefill")) as prefill,
            running(make_engine(tiny_model_dir, store, replica_id="decode")) as decode,
        ):
            params, origin = SamplingParams(1, temperature=0.0), Origin(label_of("anna"), "one")
            answer = Handoff(prefill, decode).submit(PROMPT, params, "request", origin=origin).wait()
            assert answer.cost.prefill_tokens == len(PROMPT)
        assert store.purge(PurgeQuery(*origin)).num_tokens == len(PROMPT)
        assert store.stats().num_extents == 0


def test_a_purge_takes_the_pools_blocks_of_one_tenant(tiny_model_dir: Path) -> None:
    num_blocks = -(-(len(PROMPT) + 3) // BLOCK_SIZE)
    with running(make_engine(tiny_model_dir)) as engine:
        ask(engine, "anna", "one")
        ask(engine, "bert", "one")
        assert engine.engine.purge(PurgeQuery(label_of("anna"), "two")).result(TIMEOUT_S) == 0
        assert engine.engine.purge(PurgeQuery(label_of("anna"))).result(TIMEOUT_S) == num_blocks
        assert ask(engine, "anna").cached_tokens == 0
        assert ask(engine, "bert").device_tokens == len(PROMPT) - 1
    assert engine.engine.purge(PurgeQuery(label_of("bert"))).result(TIMEOUT_S) == 0, "an engine that has ended"


@pytest.mark.parametrize("is_meant", [True, False])
def test_what_is_under_way_when_it_is_purged_is_not_kept(tiny_model_dir: Path, *, is_meant: bool) -> None:
    with open_store(None) as store:
        with running(make_engine(tiny_model_dir, store)) as engine:
            pending = engine.submit(PROMPT, SamplingParams(40, temperature=0.0), origin=Origin("acme", "one"))
            pending.first()
            num_found = engine.engine.purge(PurgeQuery("acme", "one" if is_meant else "two")).result(TIMEOUT_S)
            assert bool(num_found) is is_meant
            assert len(pending.wait().token_ids) == 39, "the answer itself goes on"
            again = engine.greedy(PROMPT, 1)
            assert again.cost.device_tokens == (0 if is_meant else len(PROMPT) - 1)
        assert store.purge(PurgeQuery("acme")).num_tokens == (0 if is_meant else len(PROMPT) + 39)
