"""``client.js`` as a package for bundlers: what npm packs, and the types that it declares."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import asgi_cluster
from tests.support.machine import ROOT, lacking, program

PACKAGE = ROOT / "asgi_cluster/centrifuge/js"

USE = """\
import { type Publication, ClusterClient, ClusterError, ErrorCode, LOGGED_OUT, connect } from "asgi-cluster";

const client: ClusterClient = connect("ws://localhost/realtime/websocket", { timeout: 1000 });
const room = client.subscribe<{ text: string }>("chat");
room.on("publication", ({ data }: Publication<{ text: string }>) => data.text.length);
client.on("logout", ({ code }) => code === LOGGED_OUT);
room.publish({ text: "hello" }).catch((error: ClusterError) => error.code === ErrorCode.TIMEOUT);
// @ts-expect-error: there is no such event
client.on("logouts", () => {});
// @ts-expect-error: a publication of this room has a text
room.publish({ texts: "hello" });
"""

OPTIONS = """\
{
  "compilerOptions": {
    "strict": true, "noEmit": true, "module": "nodenext", "target": "es2022",
    "lib": ["es2022", "dom"], "types": []
  },
  "files": ["use.ts"]
}
"""


def test_package_has_the_version_of_the_python_package() -> None:
    """One repository, one version."""
    assert json.loads((PACKAGE / "package.json").read_text())["version"] == asgi_cluster.__version__


def test_npm_packs_the_client_and_its_types() -> None:
    """Nothing else."""
    done = subprocess.run(
        [program("npm"), "pack", "--dry-run", "--json"],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        check=True,
    )
    [packed] = json.loads(done.stdout)
    assert {file["path"] for file in packed["files"]} == {"client.js", "client.d.ts", "package.json"}


def test_types_name_what_the_module_exports() -> None:
    """A value that only one of the two files has would fail at run time, or be out of reach."""
    exported = re.findall(
        r"^export (?:const|class|function) (\w+)", (PACKAGE / "client.js").read_text(), re.M
    )
    declared = re.findall(
        r"^export (?:declare )?(?:const|class|function) (\w+)", (PACKAGE / "client.d.ts").read_text(), re.M
    )
    assert set(declared) == set(exported)


@pytest.mark.timeout(180)
def test_types_are_understood_by_the_compiler(tmp_path: Path) -> None:
    """A strict TypeScript program imports the package by its name, and its mistakes are found."""
    npm = program("npm")
    installed = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--silent", "typescript@5"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    if installed.returncode:
        lacking("npm package typescript (npm install failed)")
    shutil.copytree(PACKAGE, tmp_path / "node_modules/asgi-cluster")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "use.ts").write_text(USE)
    (tmp_path / "tsconfig.json").write_text(OPTIONS)
    done = subprocess.run(
        [program("node"), "node_modules/typescript/bin/tsc", "-p", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
