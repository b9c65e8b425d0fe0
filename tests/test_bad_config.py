"""Configurations gone wrong: an error that names the place, all at once, never a crash."""

import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bunny_lora.config import Config, assign, known_keys, load_config, set_key, validate
from bunny_lora.errors import BunnyLoraError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
FILES = {
    "a key twice": (
        "finetuning:\n  seed: 1\n  resolution: 64\n  seed: 2\n",
        "key seed .* lines 2 and 4",
    ),
    "a key twice inside": ("finetuning: {lora: {rank: 1,\n rank: 2}}", "key rank .* lines 1 and 2"),
    "the section twice": ("finetuning: {}\nfinetuning: {}\n", "key finetuning .* lines 1 and 2"),
    "a tab": ("finetuning:\n\tseed: 1\n", r"cannot start any token(?s:.*)line 2, column 1"),
    "laughs": (LAUGHS + "finetuning: {source: *a9}", "unfold to more than 100,000 values"),
    "laughs elsewhere": (LAUGHS + "finetuning: {}", "unfold to more than 100,000 values"),
    "merged laughs": (
        LAUGHS.replace("[x, x, x, x, x, x, x, x, x]", "{x: 1}") + "finetuning: {}",
        "unfold to more than",
    ),
    "an anchor in itself": ("finetuning: &a {lora: *a}", "nested more than 50 levels deep"),
    "deep lists": ("finetuning: " + "[" * 3000, "nested too deeply"),
    "deep mappings": ("finetuning: " + "{a: " * 3000, "nested too deeply"),
    "a number as a key": (
        "finetuning: {1: 2, null: 3}",
        r"- 1: Keys should be strings.*(?s:.*)- None: ",
    ),
    "a list as a key": ("finetuning: {[a]: 2}", "unhashable key"),
    "a time of day": ("finetuning: {lora: {rank: 10:30}}", r"rank: .*integer \(got '10:30'\)"),
    "endless digits": ("finetuning: {lora: {rank: " + "9" * 5000 + "}}", "not a YAML file"),
    "endless hex": (
        "finetuning: {lora: {rank: 0x" + "f" * 6000 + "}}",
        "rank: should be a smaller number",
    ),
    "a Python object": (
        "finetuning: !!python/object/apply:os.system [x]",
        "not determine a constructor",
    ),
    "two documents": ("finetuning: {}\n---\nfinetuning: {}", "single document"),
    "NUL": ("finetuning: {source: a\0b}", "special characters are not allowed"),
    "a list": ("finetuning: []", r"holds no keys but \[\]"),
    "false": ("finetuning: no", "holds no keys but False"),
    "much text": ("#" * 10_000_001, "longer than"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gone_wrong_is_refused_at_once_and_in_words(tmp_path, name):
    text, message = FILES[name]
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(BunnyLoraError, match=f"(?s)a.yaml.*{message}") as error:
        load_config(tmp_path / "a.yaml")
    assert time.process_time() - started < 5
    assert len(str(error.value)) < 2000


def test_a_configuration_in_unicode_is_read_and_another_encoding_named(tmp_path):
    path, text = tmp_path / "a.yaml", "finetuning: {instance_prompt: café}"
    path.write_bytes(text.encode("utf-16"))
    assert load_config(path).instance_prompt == "café"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BunnyLoraError, match=r"not UTF-8 text \(byte \d+\)"):
        load_config(path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "absent.yaml", "."])
def test_an_impossible_file_name_is_the_users_mistake(path):
    with pytest.raises(BunnyLoraError):
        load_config(path)


def test_what_other_programs_keep_in_the_file_is_left_to_them(tmp_path):
    text = "other: {a: 1, a: 2}\nbase: &b {rank: 3}\nfinetuning: {lora: {<<: *b, alpha: 1}}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert load_config(tmp_path / "a.yaml").lora.rank == 3


JUNK = [None, True, -1, 0, 10**30, 10**5000, 1.5, 1e300, math.nan, math.inf, "", "x", "a\0b", "\ud800"]
JUNK += [[], {}, [1], {"a": 1}, [None], b"x", object(), "9" * 5000, [[]], {1: 2}]


@pytest.mark.parametrize("key", known_keys())
def test_any_junk_under_any_key_is_taken_or_refused_by_name(key):
    for value in JUNK:
        section: dict = {}
        set_key(section, key, value)
        try:
            config = validate(section)
        except BunnyLoraError as error:
            assert f"  - {key.split('.')[0]}" in str(error)
            assert len(str(error)) < 500
        else:
            assert yaml.safe_load(config.to_yaml())["finetuning"] == config.model_dump(mode="json")


AS_WRITTEN = ["0123", "-0123", "0_7", "10:30", "1:30.5", "2020-01-31", "2020-99-99"]


@pytest.mark.parametrize("written", AS_WRITTEN)
def test_what_only_old_yaml_takes_for_a_number_or_a_date_is_read_as_written(tmp_path, written):
    text = f"finetuning: {{source: {written}, evaluation: {{prompts: [{written}]}}}}"
    (tmp_path / "a.yaml").write_text(text)
    config = load_config(tmp_path / "a.yaml")
    assert (config.source, config.evaluation.prompts) == (written, [written])
    (tmp_path / "a.yaml").write_text(config.to_yaml(comments=True))
    assert load_config(tmp_path / "a.yaml").model_dump() == config.model_dump()


def test_zeros_before_a_number_do_not_make_it_octal():
    overrides: dict = {}
    assign(overrides, "training.seed=0123")
    assert validate(overrides).training.seed == 123


NO_TEXT = {"yes": "True", "42": "42", "1.10": "1.1", "{name}": "{'name': None}", "": "None"}


@pytest.mark.parametrize("key", ["instance_prompt", "training.validation_prompt", "evaluation.prompts"])
@pytest.mark.parametrize("written", NO_TEXT)
def test_what_yaml_takes_for_no_text_is_refused_in_one_line(key, written):
    for value in (written, f"[{written or '~'}]"):
        overrides: dict = {}
        assign(overrides, f"{key}={value}")
        with pytest.raises(BunnyLoraError) as error:
            validate(overrides)
        (line,) = str(error.value).splitlines()[1:]
        assert line == f"  - {key}: should be text, in quotes if need be (got {NO_TEXT[written]})"


@pytest.mark.parametrize("key", ["snr_gamma", "save_minutes", "keep_checkpoints"])
def test_no_where_a_number_or_nothing_is_meant_says_how_nothing_is_written(key):
    with pytest.raises(BunnyLoraError, match=rf"{key}: should be a number or null \(got False\)"):
        validate({"training": {key: False}})


@pytest.mark.parametrize("key", ["lora.rank", "lora.alpha", "training.seed", "training.max_grad_norm"])
def test_true_is_no_number(key):
    section: dict = {}
    set_key(section, key, True)
    with pytest.raises(BunnyLoraError, match=rf"{key}: should be a number \(got True\)"):
        validate(section)


@pytest.mark.parametrize("place", [".", "..", "../..", "/", "~", "../.", "./", "PROJECT", "HOME"])
def test_a_run_folder_is_never_the_whole_project_or_home(project, place):
    place = {"PROJECT": str(project), "HOME": str(Path.home())}.get(place, place)
    for key in ("output_dir", "data_dir"):
        with pytest.raises(BunnyLoraError, match=f"{key}: .*name one inside"):
            validate({key: place})


def test_every_wrong_value_is_told_at_once():
    section: dict = {}
    wrong = known_keys()
    for key in wrong:
        set_key(section, key, {"not": {"this": 1}})
    with pytest.raises(BunnyLoraError) as error:
        validate(section)
    assert [key for key in wrong if f"- {key}" not in str(error.value)] == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from([*known_keys(), "lora", "training", "evaluation"]) | st.text(max_size=8)
QUIET = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@QUIET
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_section_is_refused_in_words_or_reads_back_to_the_same(tmp_path, values):
    section: dict = {}
    for key, value in values.items():
        set_key(section, key, value)
    try:
        config = validate(section)
    except BunnyLoraError as error:
        assert "`finetuning:`" in str(error)
        return
    for text in (config.to_yaml(comments=True), config.user_yaml()):
        (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
        assert load_config(tmp_path / "again.yaml").model_dump() == config.model_dump()


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)


@QUIET
@given(
    TEXTS, st.lists(TEXTS, max_size=3), st.integers(0, 2**63 - 1), st.floats(1e-12, 1, exclude_min=True)
)
def test_valid_values_read_back_to_the_same(tmp_path, text, prompts, seed, rate):
    training = {"validation_prompt": prompts, "seed": seed, "learning_rate": rate}
    config = validate({"instance_prompt": text, "training": training})
    (tmp_path / "again.yaml").write_text(config.to_yaml(comments=True), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").model_dump() == config.model_dump()
    assert config.training.validation_prompts == prompts


@QUIET
@given(st.text(max_size=40) | st.binary(max_size=60))
def test_any_file_and_any_setting_is_read_or_refused(tmp_path, content):
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    (tmp_path / "a.yaml").write_bytes(b"finetuning: " + data)
    for read in (
        lambda: load_config(tmp_path / "a.yaml"),
        lambda: assign({}, data.decode("utf-8", "replace")),
        lambda: assign({}, f"lora.rank={data.decode('utf-8', 'replace')}"),
    ):
        try:
            read()
        except BunnyLoraError as error:
            assert str(error)


# --- what is recorded of a path


def test_paths_are_recorded_without_the_users_name_and_found_again(project, monkeypatch):
    home = project.parent / "home" / "somebody"
    monkeypatch.setenv("HOME", str(home))
    given_paths = {
        "base_model": str(home / "models" / "sd"),
        "output_dir": str(project / "outputs" / "mine"),
        "data_dir": "training_data/mine",
        "source": "~/films/one",
    }
    config = validate(given_paths)
    assert config.base_model == "~/models/sd"
    assert (config.output_dir, config.data_dir) == ("outputs/mine", "training_data/mine")
    assert config.source == "~/films/one"
    for text in (config.to_yaml(), config.user_yaml()):
        assert "somebody" not in text and str(project) not in text
    assert Path(config.base_model).expanduser() == Path(given_paths["base_model"])
    assert validate({"base_model": "/mnt/models/sd"}).base_model == "/mnt/models/sd"


def test_an_address_which_may_hold_a_token_is_refused_without_being_repeated():
    with pytest.raises(BunnyLoraError, match="base_model: takes a folder") as error:
        validate({"base_model": "https://user:hf_secret@huggingface.co/a/b"})
    assert "hf_secret" not in str(error.value)


def test_the_defaults_are_what_they_are_recorded_as():
    assert validate(Config().model_dump()).model_dump() == Config().model_dump()


def test_a_range_of_timesteps_that_holds_none_is_refused():
    with pytest.raises(BunnyLoraError, match="timestep_bias_begin has to lie below timestep_bias_end"):
        validate({"training": {"timestep_bias_begin": 700, "timestep_bias_end": 700}})
