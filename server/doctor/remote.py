"""A running server: does it answer, is it ready, and do its own counters tell of trouble?"""

from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server import __version__
from server.doctor.findings import Finding

_TIMEOUT = httpx.Timeout(10.0, connect=5.0)
# Each of these should be 0 for ever.
_ALARMS: Mapping[str, tuple[str, str]] = {
    "promptmux_isolation_violations_total": (
        "rows stopped by the isolation check",
        "take the server out of service, keep its log, and run `promptmux check`",
    ),
    "promptmux_prompt_digest_mismatch_total": (
        "prompts no longer have their digest",
        "the disk gives back other bytes than were written: restore a backup elsewhere",
    ),
}
_AUDITS = "promptmux_isolation_audits_total"
_KV_USAGE = "promptmux_kv_cache_usage_ratio"
_WAITING = "promptmux_num_requests_waiting"


def check_server(url: str, key: str | None, *, transport: httpx.BaseTransport | None = None) -> Iterator[Finding]:
    """Findings about the server at `url`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT, transport=transport) as client:
        try:
            version = client.get("/version").raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            advice = "`promptmux serve` starts one; --url or PROMPTMUX_URL says where it is"
            yield Finding("server", "wrong", f"{url} does not answer as promptmux: {error}", advice)
            return
        yield from _judge_version(url, version)
        yield from _judge_health(client)
        yield from _judge_metrics(client)


def _judge_version(url: str, version: Mapping[str, Any]) -> Iterator[Finding]:
    number, backbone = version.get("version"), version.get("backbone")
    if number == __version__:
        yield Finding("server", "ok", f"{url}, promptmux {number}")
    else:
        yield Finding(
            "server", "ok", f"{url}, promptmux {number}; this command is {__version__}", "use the same release"
        )
    if not isinstance(backbone, dict):
        yield Finding("served backbone", "slow", "not loaded yet", "wait until /readyz answers 200")
        return
    told = [str(backbone.get(name)) for name in ("name", "dtype", "device", "path", "kernel", "compiled")]
    detail = "{}, {} on {}, path {}, kernel {}, compiled steps: {}".format(*told)
    if backbone.get("path") == "dense":
        yield Finding(
            "served backbone", "slow", detail, "its model attends by itself; docs/architectures.md lists others"
        )
    elif backbone.get("kernel") == "gather":
        yield Finding("served backbone", "slow", detail, "native kernels are missing there: give it a C++ compiler")
    elif backbone.get("compiled") == "failed":
        yield Finding("served backbone", "slow", detail, "the server's log says why steps could not be compiled")
    else:
        yield Finding("served backbone", "ok", detail)


def _judge_health(client: httpx.Client) -> Iterator[Finding]:
    for path in ("/livez", "/health"):
        response = client.get(path)
        if response.is_success:
            continue
        try:
            error = response.json()["error"]
            detail = f"{path}: {error['code']}, {error['message']}"
        except (ValueError, KeyError, TypeError):
            detail = f"{path}: HTTP {response.status_code}"
        waiting = '"loading"' in response.text or '"draining"' in response.text
        advice = "wait, if it has just been started" if waiting else "restart it; its log says what happened"
        yield Finding("health", "slow" if waiting else "wrong", detail, advice)
        return
    yield Finding("health", "ok", "alive and ready")


def _judge_metrics(client: httpx.Client) -> Iterator[Finding]:
    response = client.get("/metrics")
    if not response.is_success:
        yield Finding("metrics", "ok", f"not to be read by this key (HTTP {response.status_code})")
        return
    found = _sums(response.text)
    alarms = [
        Finding("metrics", "wrong", f"{found[name]:.0f} {what}", advice)
        for name, (what, advice) in _ALARMS.items()
        if found.get(name)
    ]
    if failed := found.get(f"{_AUDITS}:mismatch"):
        advice = "run `promptmux check`; keep the server's log"
        alarms.append(Finding("metrics", "wrong", f"{failed:.0f} audits found another answer", advice))
    yield from alarms
    usage, waiting = found.get(_KV_USAGE, 0.0), found.get(_WAITING, 0.0)
    if waiting and usage > 0.95:
        advice = "raise kv_cache_bytes, or run another replica"
        yield Finding("load", "slow", f"{waiting:.0f} requests wait, the rows' memory is {usage:.0%} full", advice)
    else:
        yield Finding("load", "ok", f"{waiting:.0f} requests wait, the rows' memory is {usage:.0%} full")
    if not alarms:
        yield Finding("metrics", "ok", "no isolation violation, no digest mismatch, no failed audit")


def _sums(text: str) -> dict[str, float]:
    """Each series' sum over its labels, and that of each result of the audits as `name:result`."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
            if sample.name == _AUDITS:
                name = f"{_AUDITS}:{sample.labels.get('result')}"
                sums[name] = sums.get(name, 0.0) + sample.value
    return sums
