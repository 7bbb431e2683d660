"""The log of steps forgets the oldest and tells the rest in order."""

from serving.engine.step_log import StepLog, StepRecord


def step(ended_at: float, num_tokens: int = 1) -> StepRecord:
    return StepRecord(ended_at - 0.5, ended_at, 1, num_tokens)


def test_steps_are_told_in_order_from_a_time_on() -> None:
    log = StepLog()
    for at in (1.0, 2.0, 3.0):
        log.note(step(at))
    assert [each.ended_at for each in log.since(1.0)] == [2.0, 3.0]
    assert [each.ended_at for each in log.since(0.0)] == [1.0, 2.0, 3.0]
    assert log.since(3.0) == ()


def test_the_oldest_steps_are_forgotten() -> None:
    log = StepLog(max_steps=2)
    for at in (1.0, 2.0, 3.0):
        log.note(step(at))
    assert [each.ended_at for each in log.since(0.0)] == [2.0, 3.0]
    assert repr(log) == "<StepLog 2 steps>"


def test_a_step_of_one_token_each_only_decodes() -> None:
    assert step(1.0).is_decode
    assert not step(1.0, num_tokens=32).is_decode
    assert step(1.0).seconds == 0.5
