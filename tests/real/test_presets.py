"""Every recipe of the ledger in a real swarm of daemons: it ends with one identical model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.training import presets

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", presets.LEDGER)
def test_four_daemons_end_with_one_model(name: str, tmp_path: Path) -> None:
    swarm = ("swarm", "digits", "--peers", "4", "--turns", "8", "--preset", name)
    done = subprocess.run(
        [sys.executable, "-m", "shoal.node.cli", *swarm, "--dir", str(tmp_path / "swarm")],
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fingerprints: all 4 equal" in done.stdout
    found = re.search(r"accuracy: ([\d.]+) before, ([\d.]+) after", done.stdout)
    assert found is not None, done.stdout
    assert float(found[2]) > float(found[1])
