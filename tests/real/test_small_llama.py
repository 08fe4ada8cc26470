"""The fine-tuning recipe: a small LLaMA made in a swarm, tuned in another by LoRA, loaded again."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.daemons import Daemon

from shoal.node import swarm
from shoal.node.config import to_toml
from shoal.node.status import State

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        find_spec("transformers") is None or find_spec("peft") is None,
        reason="the extra hf is not installed: pip install 'shoal[hf]'",
    ),
]
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SIZE = "--width 32 --layers 2 --heads 2 --vocabulary 400 --context 64"


def call(*argv: str, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=1200, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    return said


def shoal(*argv: str, cwd: Path, code: int = 0) -> str:
    return call("-m", "shoal.node.cli", *argv, cwd=cwd, code=code)


def ended(said: str) -> tuple[float, float]:
    """Check that all hold one model; return the held-out measure before and after."""
    assert "fingerprints: all 2 equal" in said
    found = re.search(r"nats per token: ([\d.]+) before, ([\d.]+) after", said)
    assert found is not None, said
    return float(found[1]), float(found[2])


def tuning(folder: Path, turns: int) -> Path:
    """Write the shipped run file for this small model, and something to learn."""
    tables = swarm.adapt(swarm.read_run("finetune"), peers=2, turns=turns)
    tables["task"]["context"] = 64
    (folder / "finetune.toml").write_text(to_toml(tables))
    notes = (
        {"prompt": f"How much is {a} and {b}?", "completion": f" It is {a + b}."}
        for a in range(20)
        for b in range(20)
    )
    (folder / "notes.jsonl").write_text("\n".join(map(json.dumps, notes)))
    return folder / "finetune.toml"


def test_the_recipe(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # a model out of nothing, trained by two daemons
    script = str(DEPLOY / "small_llama.py")
    train = "--peers 2 --turns 4 --steps 15"
    said = call(script, "base", *SIZE.split(), *train.split(), cwd=tmp_path)
    before, after = ended(said)
    assert after < before - 0.8
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.config.model_type == "llama"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "base")) == 400

    # tuned by two others
    run_file = tuning(tmp_path, turns=6)
    given = ("--base", "base", "--data", "notes.jsonl")
    said = shoal("swarm", str(run_file), "--peers", "2", *given, "--dir", "tuning", cwd=tmp_path)
    begun, tuned = ended(said)
    assert tuned < begun - 0.5
    for peer in ("peer-1", "peer-2"):  # --base is in node.toml
        assert "agrees" in shoal("replay", f"tuning/{peer}", "--evaluate", cwd=tmp_path)
    shoal("export", "tuned.safetensors", "tuning/peer-2", cwd=tmp_path)
    convert = (str(DEPLOY / "to_hugging_face.py"), "tuned.safetensors", "tuned")
    call(*convert, "--base", "base", cwd=tmp_path)
    again = shoal(
        "simulate",
        str(run_file),
        "--peers",
        "2",
        "--turns",
        "1",
        "--json",
        "--base",
        "tuned",
        "--data",
        "notes.jsonl",
        cwd=tmp_path,
    )
    assert json.loads(again)["first_evaluation"] == pytest.approx(tuned, abs=0.1)

    # who holds another base takes no part
    call(script, "other", "--no-swarm", *SIZE.split(), "--seed", "8", cwd=tmp_path)
    founder, late = Daemon(tmp_path / "tuning" / "peer-1"), Daemon(tmp_path / "late")
    listen = ("--listen", "127.0.0.1:0", "--libp2p", "off")
    try:
        founder.start("start", str(founder.directory), *listen)
        (join,) = founder.wait("up", lambda status: status.join).join
        other = ("--base", str(tmp_path / "other"), "--dir", str(late.directory))
        late.start("join", join, *other, *listen)
        status = late.wait("turned away", lambda status: status.state == State.DEGRADED)
        assert "start from the founder's model if --base names one" in status.why
    finally:
        codes = founder.stop(), late.stop()
    assert codes == (0, 0)
