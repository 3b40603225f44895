"""The picture of the Redis layers shows what the imports are."""

from __future__ import annotations

import ast
import re

from asgi_cluster.backends import redis
from tests.support.machine import ROOT

FOLDER = ROOT / "asgi_cluster/backends/redis"


def layers() -> list[set[str]]:
    """The modules in brackets, in order."""
    assert redis.__doc__ is not None
    return [set(names.split()) for names in re.findall(r"\[(.*?)\]", redis.__doc__)]


def imports(module: str) -> set[str]:
    """Siblings, typing-only imports included."""
    return {
        (node.module or "").rpartition(".")[2]
        for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module is not None
        and node.module.startswith("asgi_cluster.backends.redis.")
    }


def test_each_layer_uses_the_ones_above_it() -> None:
    """And none below; every module of the picture exists, and is in one layer."""
    below = set().union(*layers())
    assert sum(map(len, layers())) == len(below)
    for layer in layers():
        below -= layer
        for module in layer:
            assert not imports(module) & below, f"{module} uses a layer below its own"
