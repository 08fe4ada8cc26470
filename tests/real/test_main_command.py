"""The README's main command, shortened: four daemons, real text, falling loss, one model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(2400)]


def test_a_swarm_learns_real_text_and_ends_with_one_model(tmp_path: Path) -> None:
    swarm = [sys.executable, "-m", "shoal.node.cli", "swarm", "--peers", "4", "--turns", "4"]
    done = subprocess.run(
        swarm, cwd=tmp_path, capture_output=True, text=True, timeout=2300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "join from another terminal:" in done.stdout
    assert "fingerprints: all 4 equal" in done.stdout
    summary = json.loads((tmp_path / "swarm-stdlib-bytes" / "summary.json").read_text())
    assert summary["steps"] == 120
    assert summary["after"] < 5 < summary["before"], summary
    # Four turns only: to join costs as much as they do.
    assert summary["reference"] / summary["sent"] > 20, summary
