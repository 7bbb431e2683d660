"""TargetRouter on a real local Ray Serve: three replicas, and an ingress that calls them all at once."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle


@dataclass(frozen=True)
class Call:
    target: str | None
    wait_s: float = 0.0


class Engine:
    async def __call__(self, call: Call | None = None) -> str:
        await asyncio.sleep(call.wait_s if call else 0.0)
        replica_id: str = serve.get_replica_context().replica_id.unique_id
        return replica_id


class Gateway:
    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = engine

    async def all_at_once(self, targets: list[str | None], wait_s: float) -> list[str]:
        return list(await asyncio.gather(*(self._engine.remote(Call(target, wait_s)) for target in targets)))

    async def while_held(self, held: str, targets: list[str | None]) -> list[str]:
        """Calls made while the replica `held` is full."""
        holder = asyncio.ensure_future(self.all_at_once([held], 1.0))
        await asyncio.sleep(0.3)
        answers = await self.all_at_once(targets, 0.3)
        assert await holder == [held]
        return answers

    async def one(self, target: str | None) -> str:
        answer: str = await self._engine.remote(Call(target))
        return answer

    async def without_argument(self) -> str:
        answer: str = await self._engine.remote()
        return answer


def _app() -> serve.Application:
    router = RequestRouterConfig.model_validate(
        {"request_router_class": "router.serve_adapter.TargetRouter", "request_router_kwargs": {"seed": 1}}
    )
    options = {"num_cpus": 0}
    engine = serve.deployment(
        num_replicas=3, max_ongoing_requests=1, ray_actor_options=options, request_router_config=router
    )(Engine)
    return serve.deployment(ray_actor_options=options)(Gateway).bind(engine.bind())


@pytest.fixture(scope="module")
def gateway(local_ray: str) -> Iterator[DeploymentHandle[Any]]:
    serve.start(proxy_location="Disabled")
    yield serve.run(_app(), name="adapter", route_prefix=None)
    serve.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def replicas(gateway: DeploymentHandle[Any]) -> list[str]:
    """Ids of the three replicas: one call each, held until all have one."""
    answers = gateway.all_at_once.remote([None] * 3, 1.0).result(timeout_s=60)
    assert len(set(answers)) == 3
    return sorted(answers)


def test_target_is_obeyed(gateway: DeploymentHandle[Any], replicas: list[str]) -> None:
    targets = replicas * 4
    assert [gateway.one.remote(target).result(timeout_s=30) for target in targets] == targets


def test_calls_at_once_do_not_swap_their_targets(gateway: DeploymentHandle[Any], replicas: list[str]) -> None:
    first, second, third = replicas
    for targets in ([first, second, third], [third, first, second], [second, third, first]):
        assert gateway.all_at_once.remote(targets, 0.2).result(timeout_s=30) == targets


def test_replica_found_first_is_not_given_to_the_request_that_came_first(
    gateway: DeploymentHandle[Any], replicas: list[str]
) -> None:
    first, second, third = replicas
    for target in replicas:
        gateway.one.remote(target).result(timeout_s=30)
    # The first call finds its target full and has to ask around, the second one's is known to be free.
    answers = gateway.while_held.remote(first, [first, second]).result(timeout_s=30)
    assert answers == [third, second]


def test_full_target_falls_through_to_another(gateway: DeploymentHandle[Any], replicas: list[str]) -> None:
    # Each replica takes one request at a time, so two of these three cannot have what they want.
    answers = gateway.all_at_once.remote([replicas[0]] * 3, 1.0).result(timeout_s=30)
    assert sorted(answers) == replicas


def test_more_calls_than_slots_all_end(gateway: DeploymentHandle[Any], replicas: list[str]) -> None:
    answers = gateway.all_at_once.remote([replicas[0], None, replicas[1], None, replicas[2]] * 3, 0.05)
    assert set(answers.result(timeout_s=60)) <= set(replicas)


def test_gone_target_and_no_target_are_served(gateway: DeploymentHandle[Any], replicas: list[str]) -> None:
    assert gateway.one.remote("no-such-replica").result(timeout_s=30) in replicas
    assert gateway.one.remote(None).result(timeout_s=30) in replicas
    assert gateway.without_argument.remote().result(timeout_s=30) in replicas


def test_without_targets_load_spreads(gateway: DeploymentHandle[Any], replicas: list[str]) -> None:
    answers = {gateway.one.remote(None).result(timeout_s=30) for _ in range(30)}
    assert answers == set(replicas)
