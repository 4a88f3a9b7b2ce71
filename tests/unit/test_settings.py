"""Settings: which source wins, what is refused, and that every field is described."""

import inspect
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.setting_types import MIB
from server.settings import GROUPS, Settings, env_name, flag_name
from server.settings_sources import OTHER_ENV_NAMES, SettingsError, load_settings, resolve_settings


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "promptmux.toml"
    path.write_text('port = 9001\nmax_rows = 11\nhost = "::1"\n')
    return path


def test_flag_beats_environment_beats_file_beats_default(config_file: Path) -> None:
    resolved = resolve_settings(
        {"port": "9003", "dtype": None}, config_file, {"PROMPTMUX_PORT": "9002", "PROMPTMUX_MAX_ROWS": "12"}
    )

    assert resolved.settings.port == 9003
    assert resolved.settings.max_rows == 12
    assert resolved.settings.host == "::1"
    assert resolved.settings.dtype == "auto"
    assert resolved.origins["port"] == "flag --port"
    assert resolved.origins["max_rows"] == "environment PROMPTMUX_MAX_ROWS"
    assert resolved.origins["host"] == f"file {config_file}"
    assert resolved.origins["dtype"] == "default"


@pytest.mark.parametrize(
    ("given", "winner"),
    [
        (("flag", "environment"), "flag"),
        (("flag", "file"), "flag"),
        (("flag",), "flag"),
        (("environment", "file"), "environment"),
        (("environment",), "environment"),
        (("file",), "file"),
        ((), "default"),
    ],
)
def test_of_each_pair_of_sources_the_stronger_one_wins(tmp_path: Path, given: tuple[str, ...], winner: str) -> None:
    values = {"flag": 3, "environment": 2, "file": 1, "default": 64}
    file = tmp_path / "settings.toml"
    file.write_text("max_rows = 1\n" if "file" in given else "")

    resolved = resolve_settings(
        {"max_rows": "3" if "flag" in given else None},
        file,
        {"PROMPTMUX_MAX_ROWS": "2"} if "environment" in given else {},
    )

    assert resolved.settings.max_rows == values[winner]
    assert resolved.origins["max_rows"].split()[0] == winner


@pytest.mark.parametrize(
    ("flags", "env", "key"),
    [
        ({"max_row": "1"}, {}, "max_row"),
        ({}, {"PROMPTMUX_MAX_ROW": "1"}, "PROMPTMUX_MAX_ROW"),
        ({}, {"PROMPTMUX_max_rows": "1"}, "PROMPTMUX_max_rows"),
        ({}, {"PROMPTMUX_": "1"}, "PROMPTMUX_"),
        ({}, {"PROMPTMUX_NOTHING_LIKE_IT": ""}, "PROMPTMUX_NOTHING_LIKE_IT"),
    ],
)
def test_unknown_key_is_fatal(flags: dict[str, str], env: dict[str, str], key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, env=env)

    assert caught.value.key == key
    assert key in str(caught.value)


def test_unknown_key_of_the_file_is_fatal_and_says_which_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("max_rowz = 3\n")

    with pytest.raises(SettingsError, match="did you mean max_rows") as caught:
        load_settings(config_file=path, env={})

    assert caught.value.origin == f"file {path}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot read"), ("port = ", "not valid TOML"), ("[server]\nport = 1\n", "unknown setting server")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "settings.toml"
    if content is not None:
        path.write_text(content)

    with pytest.raises(SettingsError, match=reason) as caught:
        load_settings(config_file=path, env={})

    assert str(path) in str(caught.value)


def test_variables_of_other_parts_and_of_other_programs_are_left_alone() -> None:
    env = dict.fromkeys(OTHER_ENV_NAMES, "x") | {"PATH": "/bin", "XPROMPTMUX_PORT": "1", "promptmux_port": "1"}

    assert load_settings(env=env).port == 8000


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load_settings(env={"PROMPTMUX_PORT": "", "PROMPTMUX_MODEL": ""}).model is None


@pytest.mark.parametrize(
    "variable",
    ["PROMPTMUX_PORT", "PROMPTMUX_SERVICE_HOST", "PROMPTMUX_SERVICE_PORT_HTTP", "PROMPTMUX_PORT_8000_TCP_ADDR"],
)
def test_service_links_of_kubernetes_are_explained(variable: str) -> None:
    with pytest.raises(SettingsError, match="enableServiceLinks"):
        load_settings(env={variable: "tcp://10.0.0.7:8000"})


OUT_OF_RANGE = [
    ("quantization", "int4"),
    ("store", "mysql://u:p@host/db"),
    ("store_max_stale_s", "-1"),
    ("compile", "always"),
    ("deterministic", "yes"),
    ("overlap", "yes"),
    ("text_cache", "true"),
    ("model", ""),
    ("host", ""),
    ("port", "-1"),
    ("port", "65536"),
    ("port", "http"),
    ("dtype", "int8"),
    ("device", "tpu"),
    ("device", "cuda:"),
    ("num_threads", "0"),
    ("num_threads", "1025"),
    ("max_model_len", "7"),
    ("max_model_len", "16777217"),
    ("drain_timeout_s", "-1"),
    ("drain_timeout_s", "86401"),
    ("failure_grace_s", "-1"),
    ("failure_grace_s", "86401"),
    ("body_timeout_s", "0"),
    ("body_timeout_s", "86401"),
    ("upload_timeout_s", "0"),
    ("upload_timeout_s", "86401"),
    ("slow_reader_timeout_s", "0"),
    ("slow_reader_timeout_s", "inf"),
    ("ping_interval_s", "0"),
    ("ping_interval_s", "nan"),
    ("data_dir", 3),
    ("cache_dir", 3),
    ("demo_dir", 3),
    ("max_rows", "0"),
    ("max_rows", "4097"),
    ("max_rows", "1.5"),
    ("max_rows", True),
    ("max_step_tokens", "0"),
    ("max_step_tokens", "1048577"),
    ("prefill_chunk", "0"),
    ("prefill_chunk", "1048577"),
    ("max_waiting_rows", "0"),
    ("max_waiting_rows", "1000001"),
    ("kv_cache_bytes", "4095"),
    ("prefix_cache_bytes", "lots"),
    ("prefix_cache_bytes", "1KiB"),
    ("host_prompt_bytes", "-1"),
    ("max_virtual_tokens", "0"),
    ("max_virtual_tokens", "65537"),
    ("max_body_bytes", "1023"),
    ("max_upload_bytes", "1023"),
    ("max_request_tokens", "0"),
    ("max_prompts", "0"),
    ("max_prompts", "65537"),
    ("allow_training", "yes"),
    ("training_share", "-0.1"),
    ("training_share", "0.91"),
    ("training_jobs_at_once", "0"),
    ("training_jobs_at_once", "65"),
    ("max_training_steps", "0"),
    ("max_training_steps", "1000001"),
    ("max_training_tokens", "15"),
    ("max_training_tokens", "1000001"),
    ("max_training_parameters", "999"),
    ("max_training_file_bytes", "1023"),
    ("max_training_file_bytes", "257MiB"),
    ("max_tenant_training_bytes", "1023"),
    ("max_tenant_training_jobs", "0"),
    ("max_tenant_training_jobs", "10001"),
    ("audit_share", "-0.01"),
    ("audit_share", "1.01"),
    ("audit_share", "nan"),
    ("log_format", "xml"),
    ("log_level", "loud"),
    ("receipts_max_rows", "-1"),
    ("receipts_max_rows", "1000000001"),
    ("metrics_port", "65536"),
    ("metrics_key_required", "true"),
    ("default_requests_per_minute", "-1"),
    ("default_tokens_per_minute", "1.5"),
    ("default_max_running_rows", "-1"),
    ("default_max_prompts", "-1"),
    ("default_max_prompt_bytes", "lots"),
    ("default_max_virtual_tokens", "-1"),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_value_out_of_range_names_the_setting_and_its_source(name: str, value: object) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({name: value}, env={})

    assert caught.value.key == name
    assert caught.value.origin == f"flag {flag_name(name)}"


def test_every_setting_has_a_refused_value_in_these_tests() -> None:
    assert {name for name, _ in OUT_OF_RANGE} == set(Settings.model_fields)


IN_RANGE = [
    ("port", "0", 0),
    ("port", "65535", 65535),
    ("device", "cuda:3", "cuda:3"),
    ("max_rows", "1", 1),
    ("audit_share", "0", 0.0),
    ("audit_share", "1", 1.0),
    ("drain_timeout_s", "0", 0.0),
    ("prefix_cache_bytes", "2MiB", 2 * MIB),
    ("prefix_cache_bytes", "4096", 4096),
    ("kv_cache_bytes", "1 GB", 10**9),
    ("kv_cache_bytes", 5000, 5000),
    ("data_dir", "~/prompts", Path("~/prompts").expanduser()),
]


@pytest.mark.parametrize(("name", "value", "expected"), IN_RANGE)
def test_value_at_the_edge_is_taken(name: str, value: object, expected: object) -> None:
    assert getattr(load_settings({name: value}, env={}), name) == expected


@pytest.mark.parametrize(
    "flags", [{"max_rows": "600"}, {"max_step_tokens": "100"}, {"max_step_tokens": "10", "prefill_chunk": "10"}]
)
def test_budgets_that_contradict_each_other_are_refused(flags: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="max_step_tokens"):
        load_settings(flags, env={})


def test_settings_cannot_be_changed_nor_made_with_unknown_names() -> None:
    settings = Settings()

    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Settings.model_validate({"prot": 1})


def test_folders_follow_the_desktop_standard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "PROMPTMUX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().data_dir == tmp_path / ".local/share/promptmux"
    assert Settings().cache_dir == tmp_path / ".cache/promptmux"

    monkeypatch.setenv("XDG_DATA_HOME", "/srv/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/srv/cache")
    assert Settings().data_dir == Path("/srv/data/promptmux")
    assert Settings().cache_dir == Path("/srv/cache/promptmux")

    monkeypatch.setenv("PROMPTMUX_CACHE", "/srv/own")
    assert Settings().cache_dir == Path("/srv/own")


def test_every_setting_is_described_and_in_exactly_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]

    assert sorted(grouped) == sorted(Settings.model_fields)
    assert all(field.description for field in Settings.model_fields.values())


def test_no_setting_takes_the_name_of_another_part_s_variable() -> None:
    assert OTHER_ENV_NAMES.isdisjoint(env_name(name) for name in Settings.model_fields)


def test_settings_are_made_the_same_whatever_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMUX_PORT", "9999")

    assert Settings().port == 8000
    assert load_settings(env={}).port == 8000
    assert load_settings().port == 9999
    assert "env" in inspect.signature(load_settings).parameters
