"""What comes with the package: configurations by name, shapes of their models, --version."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpg_megatron import __version__
from gpg_megatron.config.by_name import find_config, shipped_configs
from gpg_megatron.config.loading import load_config
from gpg_megatron.demo.settings import DemoSettings
from gpg_megatron.host.reaper import RUN_ID_VARIABLE
from gpg_megatron.model.hub import SHAPES
from gpg_megatron.model.shape import load_model_shape, shape_warnings
from gpg_megatron.start import train

ROOT = Path(__file__).resolve().parents[2]
NAMES = [file.stem for file in (ROOT / "configs").glob("*.yaml")]
COMMANDS = {
    "gpg-train": "gpg_megatron.start.train",
    "gpg-eval": "gpg_megatron.evaluation.cli",
    "gpg-data": "gpg_megatron.data.cli",
    "gpg-convert": "checkpoint_convert.__main__",
    "gpg-doctor": "gpg_megatron.start.doctor",
    "demo": "gpg_megatron.demo.make",
}


def test_a_shipped_configuration_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(shipped_configs()) == set(NAMES) and "demo_cpu" in NAMES
    assert load_config("demo_cpu") == load_config(ROOT / "configs" / "demo_cpu.yaml")
    (tmp_path / "demo_cpu").write_text("trainer: {seed: 7}")  # a file of the user's goes first
    assert find_config("demo_cpu") == Path("demo_cpu")
    assert find_config("configs/demo_cpu") == Path("configs/demo_cpu")


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_needs_nothing_but_the_package(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_ID_VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert train.main(["--config", name, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("model      ")
    assert list(tmp_path.iterdir()) == []


def test_the_shapes_are_those_of_the_shipped_models() -> None:
    files = {file.parent for file in SHAPES.rglob("config.json")}
    assert files == {SHAPES / load_config(name).model.path for name in NAMES}
    assert [line for file in files for line in shape_warnings(file)] == []
    demo = load_model_shape(SHAPES / "runs/demo_model/model", need_weights=False)
    made = DemoSettings()
    assert (demo.hidden_size, demo.ffn_size) == (made.hidden_size, made.intermediate_size)
    assert (demo.num_layers, demo.num_heads) == (made.num_layers, made.num_heads)
    assert demo.num_kv_heads == made.num_kv_heads
    assert demo.vocab_size <= made.max_vocab_size


@pytest.mark.parametrize("module", COMMANDS.values(), ids=COMMANDS)
def test_every_command_has_a_version(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"{__version__}\n"


INSTALLED = """
import sys
from gpg_megatron.config.by_name import shipped_configs
from gpg_megatron.start.train import main
sys.exit(any(main(["--config", name, "--dry-run"]) for name in shipped_configs()))
"""


@pytest.mark.slow
def test_an_installed_package_has_all_of_it(tmp_path: Path) -> None:
    """A wheel as pip makes it of a fresh clone, used elsewhere."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (tmp_path / "clone" / name).symlink_to(os.readlink(ROOT / name))
        else:
            (tmp_path / "clone" / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path / "clone", check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    tops = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"gpg_megatron", "checkpoint_convert"}
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model      ") == len(NAMES)
