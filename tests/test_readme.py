"""The README's loop, run as it stands: three people, private repos, one Hub on loopback, the real client."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubserver import HubServer
from huggingface_hub import HfApi
from networks import make_images, make_network

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(kind: str, language: str) -> list[str]:
    """The code blocks of the README that a comment marks as `kind`."""
    return re.findall(rf"<!-- {re.escape(kind)} -->\n```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        for name in ("coordinator", "hospital-a", "hospital-b"):
            server.add_user(name, f"hf_{name}", orgs=["consortium"])
        server.add_user("timm", "hf_timm", orgs=["timm"])
        network = make_network("test_efficientnet", tmp_path / "pretrained")
        api = HfApi(endpoint=server.endpoint, token="hf_timm")
        api.create_repo("timm/tf_efficientnet_lite0.in1k")
        api.upload_folder(repo_id="timm/tf_efficientnet_lite0.in1k", folder_path=network)
        yield server


def shell(script: str, folder: Path, server: HubServer, token: str) -> str:
    """Run a script as somebody at a machine of their own; returns its output."""
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert token not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


def test_every_command_of_the_readme_works_in_its_order(hub, tmp_path):
    start, plan, measure = blocks("run: hub, coordinator", "bash")
    (site,) = blocks("run: hub, site", "bash")
    (recipe,) = blocks("file: recipe.yaml", "yaml")
    office = tmp_path / "office"
    shell(start, office, hub, "hf_coordinator")
    for letter in "ab":
        place = tmp_path / f"hospital-{letter}"
        make_images(place / "our-images", labels=("benign", "malignant"), each=6, seed=ord(letter))
        shell(site.replace("hospital-a", f"hospital-{letter}"), place, hub, f"hf_hospital-{letter}")
    (office / "recipe.yaml").write_text(recipe)
    for name in ("public-images", "public-test"):
        make_images(office / name, labels=("benign", "malignant"), each=5, seed=len(name))
    output = shell(plan, office, hub, "hf_coordinator")
    assert "pushed to " in output
    assert (office / "recipe.lock.yaml").exists()
    assert (office / "cosines.png").exists()
    assert "balanced accuracy" in shell(measure, office, hub, "hf_coordinator")
    api = HfApi(endpoint=hub.endpoint, token="hf_coordinator")
    for repo in ("skin-base", "skin-hospital-a", "skin-hospital-b", "skin-fused"):
        assert api.model_info(f"consortium/{repo}").private, repo
    (notebook,) = blocks("run: notebook", "python")
    (office / "notebook.py").write_text(notebook)
    shell("python notebook.py", office, hub, "hf_coordinator")
    assert (office / "fused-again" / "model.safetensors").exists()
    loaders = blocks("run: load", "python")
    assert len(loaders) == 2
    (office / "picture.jpg").write_bytes(next((office / "public-test").rglob("*.png")).read_bytes())
    for number, code in enumerate(loaders):
        (office / f"load{number}.py").write_text(code)
        shell(f"python load{number}.py", office, hub, "hf_coordinator")
        remote = code.replace("local-dir:./fused", "hf-hub:consortium/skin-fused").replace(
            "./fused", "consortium/skin-fused"
        )
        assert remote != code
        (office / f"remote{number}.py").write_text(remote)
        shell(f"python remote{number}.py", office, hub, "hf_coordinator")


def test_every_command_of_the_readme_is_marked_to_be_run():
    """The two commands after `pip install` are what `.ci/run` takes from the README and runs."""
    fenced = re.findall(r"(<!-- [^\n]* -->\n)?```(bash|python)\n(.*?)```", README, re.DOTALL)
    for mark, language, code in fenced:
        installs = language == "bash" and code.startswith('pip install ".[')
        assert mark.startswith("<!-- run:") or installs, code
    script = (ROOT / ".ci" / "run").read_text()
    assert "command_of test" in script
    assert "command_of demo" in script
    for extra in ("test", "demo"):
        assert re.search(rf'^pip install "\.\[{extra}\]" && ', README, re.MULTILINE)
