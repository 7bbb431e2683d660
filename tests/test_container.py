"""The image's recipe, as far as it can be checked without building it."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = (ROOT / "Containerfile").read_text()


def instructions(name: str) -> list[str]:
    joined = RECIPE.replace("\\\n", " ")
    return [line.partition(" ")[2].strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_it_copies_only_what_is_there() -> None:
    for copied in instructions("COPY"):
        *sources, _ = copied.split()
        assert all((ROOT / source).exists() for source in sources), copied


def test_it_copies_every_package() -> None:
    copied = {source for each in instructions("COPY") for source in each.split()[:-1]}
    assert {"cache", "router", "serving", "configs", "pyproject.toml", "constraints.txt"} <= copied


def test_it_runs_the_command_without_being_root() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (entry,) = instructions("ENTRYPOINT")
    assert re.findall(r'"([^"]+)"', entry)[0] in scripts
    (user,) = instructions("USER")
    assert user != "root"
