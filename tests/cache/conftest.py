"""Fixtures of the warehouse's tests."""

from collections.abc import Iterator

import pytest

from tests.ray_session import private_ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[str]:
    """A private Ray; gives the id of its node."""
    with private_ray() as node_id:
        yield node_id
