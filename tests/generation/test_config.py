from math import inf

import pytest

from megachat.config import ConfigModel, build_config
from megachat.errors import ConfigError
from megachat.generation.config import GenerationConfig, SamplingConfig


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            SamplingConfig,
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "min_new_tokens 9 exceeds max_new_tokens 8",
        ),
        (
            SamplingConfig,
            {"max_new_tokens": 0},
            "max_new_tokens: input should be greater than or equal to 1",
        ),
        (
            SamplingConfig,
            {"temperature": -0.1},
            "temperature: input should be greater than or equal to 0",
        ),
        (SamplingConfig, {"temperature": inf}, "temperature: input should be a finite number"),
        (SamplingConfig, {"repetition_penalty": inf}, "repetition_penalty: input should be a fini"),
        (GenerationConfig, {"kv_cache_gb": inf}, "kv_cache_gb: input should be a finite number"),
        (SamplingConfig, {"top_p": 0.0}, "top_p: input should be greater than 0"),
        (SamplingConfig, {"top_p": 1.1}, "top_p: input should be less than or equal to 1"),
        (SamplingConfig, {"top_k": -1}, "top_k: input should be greater than or equal to 0"),
        (GenerationConfig, {"kv_cache_gb": 0.0}, "kv_cache_gb: input should be greater than 0"),
        (GenerationConfig, {"backend": "gpu"}, "backend: input should be"),
        (
            SamplingConfig,
            {"temperatur": 1.0},
            "temperatur: unknown key (did you mean 'temperature'?)",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    section: type[ConfigModel], values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(section, values, source="run.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
