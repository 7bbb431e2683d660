import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from serving.http_edge import EventStream, run_while_connected

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


def test_events_are_closed_when_a_client_that_does_not_read_hangs_up() -> None:
    async def main() -> None:
        gone, closed = asyncio.Event(), asyncio.Event()

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                while True:
                    yield b"data: x\n\n"
            finally:
                closed.set()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                gone.set()
                await asyncio.Event().wait()

        with pytest.raises(ClientDisconnect):
            await EventStream(events())({"type": "http"}, hang_up_when(gone), send)
        assert closed.is_set()

    asyncio.run(main())


def test_a_server_that_refuses_to_send_means_that_the_client_has_gone() -> None:
    async def main() -> None:
        async def events() -> AsyncGenerator[bytes, None]:
            yield b"data: x\n\n"

        async def send(message: Message) -> None:
            raise OSError("closed")

        with pytest.raises(ClientDisconnect):
            await EventStream(events())({"type": "http"}, hang_up_when(asyncio.Event()), send)

    asyncio.run(main())
