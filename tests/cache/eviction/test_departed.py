"""The memory of what has left a tier."""

from cache.eviction.departed import MOST_HITS, PLACES_PER_EXTENT, Departed, digest_of


def filled(num_extents: int, num_departed: int) -> Departed:
    departed = Departed()
    departed.grow_for(num_extents)
    for number in range(num_departed):
        departed.remember(digest_of(f"{number}"), number % 5)
    return departed


def recalled(departed: Departed, number: int) -> int | None:
    return departed.recall(digest_of(f"{number}"))


def test_what_left_is_remembered_with_its_hits_until_it_comes_back() -> None:
    departed = filled(100, 100)
    assert repr(departed) == "<Departed 100 in 1024 places>"
    assert [recalled(departed, number) for number in range(100)] == [number % 5 for number in range(100)]
    assert [recalled(departed, number) for number in range(100)] == [None] * 100


def test_many_hits_are_all_the_same() -> None:
    departed = Departed()
    departed.remember(5, 1000)
    assert departed.recall(5) == MOST_HITS


def test_a_digest_that_looks_like_an_empty_place_is_not_remembered() -> None:
    departed = Departed()
    departed.remember(0, 3)
    assert departed.recall(0) is None


def test_it_remembers_the_last_few_times_as_many_as_the_tier_holds_and_forgets_the_others() -> None:
    num_extents = 2000
    departed = filled(num_extents, 40 * num_extents)
    last = range(37 * num_extents, 40 * num_extents)
    missing = [number for number in last if recalled(departed, number) is None]
    assert len(missing) < 0.001 * len(last)
    assert all(recalled(departed, number) is None for number in range(40 * num_extents - 7 * num_extents))


def test_hardly_anything_is_taken_for_something_else() -> None:
    departed = filled(2000, 20_000)
    strangers = [number for number in range(100_000, 200_000) if recalled(departed, number) is not None]
    assert len(strangers) < 20


def test_it_grows_with_the_tier() -> None:
    departed = Departed()
    for num_extents in (1, 1000, 3000):
        departed.grow_for(num_extents)
    num_places = int(repr(departed).split()[3])
    assert PLACES_PER_EXTENT * 3000 <= num_places <= PLACES_PER_EXTENT * 3000 * 1.25
