import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from serving.http_edge import run_while_connected

Receive = Callable[[], Awaitable[Message]]


def hang_up_when(gone: asyncio.Event) -> Receive:
    """The receiving end of a connection whose client leaves when `gone` is set."""

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


def test_work_runs_to_its_end_while_the_client_stays() -> None:
    async def main() -> int:
        return await run_while_connected(asyncio.sleep(0, 5), hang_up_when(asyncio.Event()))

    assert asyncio.run(main()) == 5


def test_an_error_of_the_work_comes_through() -> None:
    async def fail() -> None:
        raise LookupError("lost")

    async def main() -> None:
        await run_while_connected(fail(), hang_up_when(asyncio.Event()))

    with pytest.raises(LookupError, match="lost"):
        asyncio.run(main())


@pytest.mark.parametrize("by_whom", ["client", "server"])
def test_work_is_cancelled_and_its_clean_up_may_await(by_whom: str) -> None:
    steps: list[str] = []

    async def main() -> None:
        begun, gone = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)
                steps.append("cleaned up")

        running = asyncio.create_task(run_while_connected(work(), hang_up_when(gone)))
        await begun.wait()
        if by_whom == "client":
            gone.set()
        else:
            running.cancel()
        try:
            await running
        except (ClientDisconnect, asyncio.CancelledError) as error:
            steps.append(type(error).__name__)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert steps == ["cleaned up", "ClientDisconnect" if by_whom == "client" else "CancelledError"]


def test_a_failing_clean_up_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise LookupError("could not let go")

    async def main() -> None:
        gone = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, gone.set)
        await run_while_connected(work(), hang_up_when(gone))

    with pytest.raises(ClientDisconnect):
        asyncio.run(main())
    assert "could not let go" in caplog.text
