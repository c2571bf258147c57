"""/metrics, read by Prometheus' own programs."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from pathlib import Path

import openai

from tests.parts import need
from tests.real.processes import CLIENT_KEY, Process, eventually, free_port, get, running


def answer_once(proxy: Process) -> None:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=CLIENT_KEY, max_retries=0) as sdk:
        stream = sdk.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "a short answer"}], stream=True
        )
        for _ in stream:
            pass


def test_promtool_finds_nothing_to_complain_of(aimock_proxy: Process) -> None:
    answer_once(aimock_proxy)
    checked = subprocess.run(
        [need("promtool"), "check", "metrics"],
        input=get(f"{aimock_proxy.url}/metrics").encode(),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_prometheus_scrapes(aimock_proxy: Process, tmp_path: Path) -> None:
    answer_once(aimock_proxy)
    target = aimock_proxy.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "sluice", "static_configs": [{"targets": [target]}]}],
    }
    file = tmp_path / "prometheus.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    listen = f"127.0.0.1:{free_port()}"
    argv: list[str | Path] = [need("prometheus"), f"--config.file={file}"]
    argv += [f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address={listen}"]
    with running(argv, f"http://{listen}", "/-/ready", tmp_path / "prometheus.log") as prometheus:

        def value(query: str) -> float:
            answer = get(
                f"{prometheus.url}/api/v1/query?" + urllib.parse.urlencode({"query": query})
            )
            result = json.loads(answer)["data"]["result"]
            return float(result[0]["value"][1]) if result else -1

        assert eventually(lambda: value('up{job="sluice"}') == 1, 20)
        assert eventually(lambda: value('sum(sluice_requests_total{code="200"})') >= 1)
        assert value('sum(sluice_outcomes_total{outcome="completed"})') >= 1
        assert value("sum(sluice_time_to_first_token_seconds_count)") >= 1
