"""Options that several commands share, and the config that they describe."""

import argparse
import json
from pathlib import Path

from serving.config import Config, load_config


def add_config_options(command: argparse.ArgumentParser) -> None:
    """Where the config comes from."""
    command.add_argument("--config", metavar="FILE", type=Path, help="config file in YAML")
    command.add_argument("--warehouse", metavar="DIR", help="folder of the warehouse's disk tier")
    command.add_argument("--set", metavar="A.B=C", action="append", default=[], help="set one key of the config")


def config_of(parsed: argparse.Namespace) -> Config:
    """The config that the options describe; named options win over --set, which wins over the file."""
    named = {"model.name": "model", "http.host": "host", "http.port": "port", "cache.directory": "warehouse"}
    overrides = list(parsed.set)
    for key, option in named.items():
        value = getattr(parsed, option, None)
        if value is not None:
            # Quoted, or YAML would read the path ~ as null; a port is a number and stays bare.
            overrides.append(f"{key}={value}" if option == "port" else f"{key}={json.dumps(value)}")
    return load_config(parsed.config, overrides)
