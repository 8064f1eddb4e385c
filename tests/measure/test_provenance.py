import json
import subprocess
from pathlib import Path

import torch

from hybridattn.measure.provenance import commit, cpu_name, json_sha256, provenance


def test_the_provenance_of_figures():
    config = {"b": [1, 2], "a": None}
    facts = provenance(config)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    assert facts["cpu"] == cpu_name() != ""
    assert facts["config"] == config
    assert facts["config_sha256"] == json_sha256(config)


def test_equal_configurations_have_equal_hashes():
    assert json_sha256({"a": 1, "b": 2}) == json_sha256({"b": 2, "a": 1}) != json_sha256({"a": 1, "b": 3})
    assert json_sha256({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_the_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path: Path):
    file = tmp_path / "code.py"
    file.write_text("1")
    assert commit(file) is None
    git(tmp_path, "init")
    assert commit(file) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--no-verify", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(file) == head
    file.write_text("2")
    assert commit(file) == f"{head}-dirty"
    (tmp_path / "new.py").write_text("3")
    assert commit(tmp_path / "new.py") is None


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, with an identity; returns what it prints."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "core.hooksPath=/dev/null"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
