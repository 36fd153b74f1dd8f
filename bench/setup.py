"""Creates the environments of the peers, about 6 GB in all; `make bench-setup`.

Each peer has its own under $PEERS/v (default ~/.cache/peers/v), as their requirements exclude each
other. Our version of torch is installed first in all of them, so that no peer installs another.
"""

import subprocess
import sys
import tomllib

from bench.sides import ENVIRONMENTS, PEERS
from configs.load import SHIPPED

ROOT = SHIPPED[0].parent.parent


def main() -> int:
    """Update existing environments."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (torch,) = (wanted for wanted in project["dependencies"] if wanted.startswith("torch=="))
    for name, packages in ENVIRONMENTS.items():
        folder = PEERS / name
        sys.stdout.write(f"{folder}: {', '.join(packages)}\n")
        sys.stdout.flush()
        if not (folder / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, torch], check=True)
        subprocess.run([*install, torch, *packages], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
