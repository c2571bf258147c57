"""What the README shows is true: its config loads, names every setting, and its numbers hold."""

from __future__ import annotations

import re
import time
from pathlib import Path

import yaml

from proxy import config
from proxy.errors import KINDS
from proxy.observe import Observer
from tests.breaks import BREAKS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLE, CONFIG, SEVERAL = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
ENVIRON = {"OPENAI_API_KEY": "sk-none", "WEB_KEY": "sk-web"}


def test_its_config_loads_and_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    shown, effective = (
        yaml.safe_load(CONFIG),
        config.render(config.load(file, ENVIRON)),
    )
    assert shown.keys() == yaml.safe_load(effective).keys()
    upstream = yaml.safe_load(effective)["upstreams"]["openai"]
    assert upstream.keys() - shown["upstreams"]["openai"].keys() == {"api_key_file"}
    route = yaml.safe_load(effective)["routes"][0]
    assert route.keys() == shown["routes"][0].keys()


def test_the_defaults_it_shows_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    shown = config.load(file, ENVIRON)
    file.write_text("upstreams: {openai: {base_url: https://api.openai.com/v1, api_key: sk-none}}")
    examples = {"routes": (), "clients": (), "limits": config.Limits()}
    plain = config.load(file, {})
    assert shown.model_copy(update=examples) == plain.model_copy(update=examples)
    says_all, says_nothing = shown.routes
    own = {"models": (), "name": ""}
    assert says_all.model_copy(update=own) == says_nothing.model_copy(update=own)


def test_its_example_with_several_upstreams_loads(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(SEVERAL)
    failover, alias = config.load(file, ENVIRON).routes
    assert (failover.upstreams, alias.model) == (("openai", "local"), "tiny-chat")


def test_its_example_with_clients_loads(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(EXAMPLE)
    assert [client.name for client in config.load(file, ENVIRON).clients] == ["web"]


def test_every_error_code_is_in_its_table() -> None:
    for code in KINDS.keys() - {"internal_error"}:
        assert f"`{code}`" in README, code


def test_the_threat_model_names_tests_that_exist() -> None:
    named = re.findall(
        r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/threat-model.md").read_text()
    )
    assert len(named) > 20
    for file, test in named:
        assert (ROOT / file).exists(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), test


async def test_every_metric_is_in_its_table() -> None:
    observer = Observer(config.load(ROOT / "config.yaml", {}), time.monotonic)
    names = re.findall(r"^# TYPE (sluice_\S+)", observer.render().decode(), re.MULTILINE)
    assert len(names) > 10
    for name in names:
        assert f"`{name}`" in README, name


def test_it_counts_the_breaks_and_each_fits_the_code() -> None:
    assert f"in {len(BREAKS)} ways" in README
    for each in BREAKS:
        assert each.old in (ROOT / "proxy" / each.file).read_text(), each.name
