import pytest

from router.load import InFlight


def test_requests_and_tokens_count_while_the_block_runs() -> None:
    in_flight = InFlight()
    with in_flight.track("a", 100), in_flight.track("a", 50), in_flight.track("b", 1):
        assert (in_flight.num_requests("a"), in_flight.num_tokens("a")) == (2, 150)
        assert repr(in_flight) == "<InFlight a=2/150 b=1/1>"
        in_flight.check_integrity()
    assert (in_flight.num_requests("a"), in_flight.num_tokens("a")) == (0, 0)
    assert repr(in_flight) == "<InFlight nothing>"


def test_tokens_go_at_the_first_token_and_the_request_at_its_end() -> None:
    in_flight = InFlight()
    with in_flight.track("a", 100) as tracked:
        tracked.prefilled()
        tracked.prefilled()
        assert (in_flight.num_requests("a"), in_flight.num_tokens("a")) == (1, 0)
    assert in_flight.num_requests("a") == 0


def test_a_failing_request_is_not_left_behind() -> None:
    in_flight = InFlight()
    with pytest.raises(RuntimeError, match="lost"), in_flight.track("a", 100):
        raise RuntimeError("lost")
    assert repr(in_flight) == "<InFlight nothing>"


def test_overlapping_requests_end_in_any_order() -> None:
    in_flight = InFlight()
    first, second = in_flight.track("a", 10), in_flight.track("a", 20)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (in_flight.num_requests("a"), in_flight.num_tokens("a")) == (1, 20)
    second.__exit__(None, None, None)
    assert (in_flight.num_requests("a"), in_flight.num_tokens("a")) == (0, 0)
