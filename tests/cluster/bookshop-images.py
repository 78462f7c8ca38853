#!/usr/bin/env python3
"""Makes the bookshop's images without Docker, from the interpreters of this machine.

    bookshop-images.py OUT -- IMAGE_TOOL...

For every application one image tar in OUT, made by `IMAGE_TOOL TAR NAME [--entrypoint A,B]
[--user UID] FOLDER:/`. Needs Python 3.11 or later with pip (or ensurepip), Node and Go, on a Linux
machine with glibc. An image holds the interpreter, the libraries that `ldd` names, the application
and what it requires: what the Dockerfiles beside the applications make.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

APPS = Path(__file__).resolve().parents[2] / "examples/bookshop/apps"
USER = "10001"
# Parts of the standard library that no application uses.
LEFT_OUT = {"test", "idlelib", "tkinter", "ensurepip", "lib2to3", "turtledemo", "pydoc_data",
            "__pycache__", "site-packages", "dist-packages"}


def libraries(path):
    """Shared libraries that a program or library is linked with, and its loader."""
    told = subprocess.run(["ldd", path], capture_output=True, text=True)
    return set(re.findall(r"(/\S+) \(0x", told.stdout))


def copy(source, root, target=None):
    """Copies a file to the same place below `root`, following links."""
    to = root / str(target or source).lstrip("/")
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(os.path.realpath(source), to)


def link_up(root):
    """Adds the libraries of everything executable below `root`."""
    needed = set()
    for path in root.rglob("*"):
        if path.is_file() and (os.access(path, os.X_OK) or ".so" in path.name):
            needed |= libraries(path)
    for library in needed:
        # wheels carry their own libraries
        if not str(library).startswith(str(root)):
            copy(library, root)


def python(root, work, requirements=None):
    """The interpreter of this machine, its standard library and what is required."""
    interpreter = os.path.realpath(sys.executable)
    standard = Path(sysconfig.get_path("stdlib"))
    copy(interpreter, root, "/usr/bin/python3")
    to = root / "usr/lib" / standard.name
    shutil.copytree(standard, to, ignore=lambda _, names: [
        name for name in names if name in LEFT_OUT or name.startswith("config-")])
    if requirements:
        made = work / "venv"
        if not made.exists():
            venv.create(made, with_pip=True)
        subprocess.run([made / "bin/python", "-m", "pip", "install", "--quiet",
                        "--disable-pip-version-check", "--target", root / "app/lib",
                        "--requirement", requirements], check=True)
    link_up(root)


def main():
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    out, tool = Path(sys.argv[1]).resolve(), sys.argv[3:]
    out.mkdir(parents=True, exist_ok=True)
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)

    def image(name, entrypoint, env=()):
        tar = out / f"bookshop-{name}.tar"
        subprocess.run([*tool, tar, f"bookshop.local/{name}:v1", "--user", USER,
                        "--entrypoint", ",".join(entrypoint),
                        *(word for pair in env for word in ("--env", pair)),
                        f"{work / name}:/"], check=True)
        print(tar)

    home = "PYTHONHOME=/usr"
    for name, requirements in (("front", APPS / "front/requirements.txt"), ("stock", None),
                               ("visitor", None)):
        root = work / name
        python(root, work, requirements)
        copy(APPS / name / f"{name}.py", root, f"/app/{name}.py")
        if name == "front":
            copy(APPS / "reviews.proto", root, "/app/reviews.proto")
        image(name, ["/usr/bin/python3", f"/app/{name}.py"],
              (home, "PYTHONPATH=/app/lib:/app", "PYTHONDONTWRITEBYTECODE=1"))

    root = work / "catalog"
    node = subprocess.run(["node", "-p", "process.execPath"], capture_output=True, text=True,
                          check=True).stdout.strip()
    copy(node, root, "/usr/bin/node")
    copy(APPS / "catalog/catalog.js", root, "/app/catalog.js")
    link_up(root)
    image("catalog", ["/usr/bin/node", "/app/catalog.js"])

    root = work / "reviews"
    root.mkdir(parents=True)
    subprocess.run(["go", "build", "-trimpath", "-ldflags=-s -w", "-o", root / "reviews", "."],
                   cwd=APPS / "reviews", env=os.environ | {"CGO_ENABLED": "0"}, check=True)
    image("reviews", ["/reviews"])
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
