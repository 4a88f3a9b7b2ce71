"""Configurations are bounded, strict, and say which field is wrong."""

from typing import Any, get_args

import pytest

from tuning.config import INITS, LEARNING_RATES, ConfigError, Method, make_run_config, make_train_config


def test_every_method_has_a_usual_beginning_and_learning_rate() -> None:
    assert set(get_args(Method)) == INITS.keys() == LEARNING_RATES.keys()
    for method in get_args(Method):
        config = make_train_config({"method": method, "num_steps": 1})
        assert config.usual_init == INITS[method][0]
        assert config.usual_learning_rate == LEARNING_RATES[method] > 0


def test_given_values_come_before_usual_ones() -> None:
    config = make_train_config({"num_steps": 1, "init": "labels", "learning_rate": 1})
    assert (config.usual_init, config.usual_learning_rate) == ("labels", 1.0)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens", "greater than or equal to 1"),
        ({"num_steps": 10**9}, "num_steps", "less than or equal to 1000000"),
        ({"batch_size": True}, "batch_size", "valid integer"),
        ({"batch_size": "16"}, "batch_size", "valid integer"),
        ({"learning_rate": 0.0}, "learning_rate", "greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate", "finite"),
        ({"weight_decay": 1.5}, "weight_decay", "less than or equal to 1"),
        ({"optimizer": "sgd"}, "optimizer", "'adamw' or 'adafactor'"),
        ({"seed": 2**31}, "seed", "less than or equal to"),
        ({"method": "prefix_tuning", "init": "labels"}, "init", "prefix_tuning starts from random, not labels"),
        ({"init_text": "some text"}, "init_text", "is for init 'text'"),
        ({"init": "text", "init_text": ""}, "init_text", "at least 1 character"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size", "prompt_tuning has no encoder"),
        ({"epochs": 3}, "epochs", "is not known; there are method, num_virtual_tokens"),
    ],
)
def test_wrong_value_is_refused_with_its_field(changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_train_config({"num_steps": 10} | changes)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert message in str(caught.value)


def test_number_of_steps_must_be_said() -> None:
    with pytest.raises(ConfigError, match="num_steps: field required"):
        make_train_config({})


def test_run_is_bounded_too() -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_pass: "):
        make_run_config({"max_tokens_per_pass": 0})
    with pytest.raises(ConfigError, match="threads: is not known; there are max_tokens_per_pass"):
        make_run_config({"threads": 2})
