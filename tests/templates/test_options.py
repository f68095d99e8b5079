from typing import Any

import pytest
from tests.templates.plans import plan, spec

from rankwright.templates.kubernetes_options import KubernetesOptions
from rankwright.templates.options import (
    MAX_KUBERNETES_NAME,
    SlurmOptions,
    default_name,
    parse_options,
)


def test_a_misspelt_option_names_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="no option 'namespce'; did you mean 'namespace'"):
        parse_options(KubernetesOptions, "kubernetes", {"namespce": "a"})


def test_an_option_near_to_none_lists_all() -> None:
    with pytest.raises(ValueError, match="it has name, partition, account, qos"):
        parse_options(SlurmOptions, "slurm", {"zzz": "a"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "a job"),
        ("name", "-job"),
        ("partition", "gpu;rm"),
        ("account", "a b"),
        ("time_limit", "soon"),
        ("time_limit", "1:2:3:4"),
        ("container_image", "--help"),
        ("container_image", "a b"),
        ("venv", "relative/venv"),
        ("log_dir", "/logs\n#SBATCH --nodes=9"),
        ("model_path", "/a:b"),
        ("port", 80),
        ("port", 65536),
        ("port", "http"),
        ("gpu_types", "h100-sxm=a,l4=a"),
        ("gpu_types", "l4=a,l4=b"),
    ],
)
def test_a_malformed_slurm_option_is_refused_in_one_line(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"option {option}=.*expected") as error:
        parse_options(SlurmOptions, "slurm", {option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "Upper"),
        ("name", "1st"),
        ("name", "a" * (MAX_KUBERNETES_NAME + 1)),
        ("namespace", "a_b"),
        ("image", ""),
        ("model_pvc", "A"),
        ("model_host_path", "relative"),
        ("gpu_resource", "gpu"),
        ("port", 0),
    ],
)
def test_a_malformed_kubernetes_option_is_refused_in_one_line(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"option {option}=.*expected") as error:
        parse_options(KubernetesOptions, "kubernetes", {option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["30", "90:00", "08:00:00", "2-00", "2-00:00:00", "UNLIMITED"])
def test_every_time_that_slurm_reads_is_taken(text: str) -> None:
    assert parse_options(SlurmOptions, "slurm", {"time_limit": text}).time_limit == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"venv": "/v", "container_image": "i"}, "not both"),
        ({"port": 20005}, "where the job's ranks meet"),
    ],
)
def test_slurm_options_that_exclude_each_other_say_so(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(SlurmOptions, "slurm", options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_pvc": "a", "model_host_path": "/m"}, "not both"),
        ({"model_path": "/models/llama"}, "say with model_pvc or model_host_path"),
        ({"model_path": "/data", "model_pvc": "a"}, "must be under /models"),
        ({"model_path": "/models-b", "model_pvc": "a"}, "must be under /models"),
        ({"port": 29500}, "where the ranks meet"),
    ],
)
def test_kubernetes_options_that_exclude_each_other_say_so(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(KubernetesOptions, "kubernetes", options)


def test_options_given_as_text_are_read() -> None:
    assert parse_options(SlurmOptions, "slurm", {"port": "9000"}).port == 9000


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.1-405B", "llama-3-1-405b"),
        ("/data/models/My Model/", "my-model"),
        ("01-ai/34B", "rankwright-34b"),
        ("///", "rankwright"),
        ("x/" + "a-" * 40, "a-" * 15 + "a-d0b77c3f"),
    ],
)
def test_the_default_name_is_the_models_and_valid_everywhere(model: str, name: str) -> None:
    made = default_name(plan(model=spec(model)))
    assert made == name
    assert len(made) <= MAX_KUBERNETES_NAME
    assert parse_options(SlurmOptions, "slurm", {"name": made}).name == made
    assert parse_options(KubernetesOptions, "kubernetes", {"name": made}).name == made


def test_long_names_that_begin_alike_stay_apart() -> None:
    names = {default_name(plan(model=spec("x/" + "a" * 60 + end))) for end in ("", "b", "c")}
    assert len(names) == 3
