import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from bunny_lora.config import Config, assign, json_schema, known_keys, load_config, merge, validate
from bunny_lora.core import explain, schema
from bunny_lora.errors import BunnyLoraError

PARAMS = Path(__file__).resolve().parents[1] / "params"

# The configuration of a host pipeline: stages of its own around the section that is ours.
HOST_CONFIG = """
project: {name: short film, fps: 24}
pipeline:
  stages: [extract_frames, detect, select, analyze, finetune]
  parallel: false
detection: {model: anime-face, threshold: 0.4}
llm: {model: some-vision-model, unknown_to_us: [1, 2, 3]}
finetuning:
  base_model: "nota-ai/bk-sdm-tiny"
  method: lora
  output_dir: outputs/lora_weights
  device: cpu
  data_dir: training_data/instance_images
  instance_prompt: "cartoon character"
  resolution: 512
  center_crop: true
  random_flip: true
  lora:
    rank: 4
    alpha: 32
    dropout: 0.1
    target_modules: [to_k, to_q, to_v, to_out.0]
    train_text_encoder: true
  training:
    learning_rate: 5.0e-5
    batch_size: 1
    max_train_steps: 400
    gradient_accumulation_steps: 8
    gradient_checkpointing: true
    mixed_precision: "no"
    seed: 7
    save_steps: 50
    logging_steps: 5
    validation_prompt: "ellie, cartoon character, smiling"
    num_validation_images: 3
  prior_preservation:
    enabled: true
    num_class_images: 40
    class_prompt: "a character"
    class_data_dir: training_data/class_images
    prior_loss_weight: 0.8
  num_workers: 2
  pin_memory: true
  use_8bit_adam: false
logging: {level: INFO}
"""

DOCUMENTED_KEYS = yaml.safe_load("""
'': [base_model, method, output_dir, device, data_dir, instance_prompt, resolution, center_crop,
  random_flip, num_workers, pin_memory, use_8bit_adam]
lora.: [rank, alpha, dropout, target_modules, train_text_encoder]
training.: [learning_rate, batch_size, max_train_steps, gradient_accumulation_steps,
  gradient_checkpointing, mixed_precision, seed, save_steps, logging_steps, validation_prompt,
  num_validation_images, lr_scheduler, lr_warmup_steps, max_grad_norm]
prior_preservation.: [enabled, num_class_images, class_prompt, class_data_dir, prior_loss_weight]
""")


def leaves(section: dict, prefix: str = "") -> dict:
    """The section's values by dotted key."""
    found = {}
    for key, value in section.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def load_text(folder: Path, text: str) -> Config:
    (folder / "some.yaml").write_text(text, encoding="utf-8")
    return load_config(folder / "some.yaml")


def message_of(section: dict) -> str:
    with pytest.raises(BunnyLoraError) as caught:
        validate(section)
    return str(caught.value)


def test_every_documented_key_is_known():
    documented = {section + key for section, keys in DOCUMENTED_KEYS.items() for key in keys}
    assert len(documented) == 36
    assert documented <= set(known_keys())


def test_a_host_pipelines_config_loads_as_it_is_with_every_value_kept(tmp_path):
    config = load_text(tmp_path, HOST_CONFIG)
    written = leaves(yaml.safe_load(HOST_CONFIG)["finetuning"])
    read = leaves(config.model_dump())
    assert {key: read[key] for key in written} == written


@pytest.mark.parametrize("written", ["5.0e-5", "5e-5", '"5e-5"', "0.00005"])
def test_a_learning_rate_is_a_number_however_yaml_reads_it(tmp_path, written):
    config = load_text(tmp_path, f"finetuning: {{training: {{learning_rate: {written}}}}}")
    assert config.training.learning_rate == 5e-5


@pytest.mark.parametrize("written", ["no", '"no"', "No", "NO"])
def test_no_is_a_precision_with_and_without_quotes(tmp_path, written):
    config = load_text(tmp_path, f"finetuning: {{training: {{mixed_precision: {written}}}}}")
    assert config.training.mixed_precision == "no"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *((no, "never") for no in ("no", "No", "off", "false", '"no"', '"FALSE"', "never")),
        *((yes, "auto") for yes in ("yes", "on", "true", '"true"', "auto")),
        ("100", 100),
        ("checkpoint-100", "checkpoint-100"),
        ("0100", "0100"),
    ],
)
def test_resume_is_understood_however_yes_and_no_are_written(tmp_path, written, meant):
    assert load_text(tmp_path, f"finetuning: {{resume: {written}}}").resume == meant
    (tmp_path / "a.yaml").write_text("finetuning: {}")
    assert load_config(tmp_path / "a.yaml", {"resume": meant}).resume == meant


@pytest.mark.parametrize("written", ["", "''", "' '", "-1", "0", "1.5", "[1]", "{a: 1}", "null"])
def test_resume_says_what_it_takes(tmp_path, written):
    with pytest.raises(BunnyLoraError) as error:
        load_text(tmp_path, f"finetuning: {{resume: {written}}}")
    (line,) = str(error.value).splitlines()[1:]
    assert "resume: takes auto, never, or a checkpoint: its step, its folder's name or path (" in line


def test_validation_prompts_are_a_list_whether_one_or_several_are_written():
    assert validate({"training": {"validation_prompt": "rex"}}).training.validation_prompts == ["rex"]
    several = validate({"training": {"validation_prompt": ["rex", "phil"]}})
    assert several.training.validation_prompts == ["rex", "phil"]
    assert validate({}).training.validation_prompts == []


@pytest.mark.parametrize(
    "key", ["lora.target_modules", "lora.text_encoder_target_modules", "evaluation.prompts"]
)
def test_a_single_text_is_a_list_of_one(key):
    overrides: dict = {}
    assign(overrides, f"{key}=to_q")
    section, name = key.split(".")
    assert validate(overrides).model_dump()[section][name] == ["to_q"]
    assert jsonschema.Draft202012Validator(json_schema()).is_valid({"finetuning": overrides})
    assert message_of({section: {name: []}}).count("\n") == 1
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(
        {"finetuning": {section: {name: []}}}
    )


def test_a_comma_in_a_prompt_stays_and_a_list_of_layers_needs_its_brackets():
    assert validate({"evaluation": {"prompts": "{name}, sad"}}).evaluation.prompts == ["{name}, sad"]
    for written in ("to_q,to_k", "to_q to_k", "to_q, to_k", ["to_q, to_k"], ""):
        message = message_of({"lora": {"target_modules": written}})
        assert message.endswith("is no layer's name; write several as [to_q, to_v]")


def test_no_file_and_an_empty_section_both_mean_the_defaults(tmp_path):
    assert load_config() == Config()
    assert load_text(tmp_path, "finetuning:\n  # resolution: 256\n") == Config()


def test_a_section_with_every_key_commented_out_means_the_defaults_and_changes_nothing(tmp_path):
    text = "finetuning:\n  lora:\n    # rank: 4\n  resolution: 256\n"
    config = load_text(tmp_path, text)
    assert config.model_dump() == Config(resolution=256).model_dump()
    assert yaml.safe_load(config.user_yaml()) == {"finetuning": {"resolution": 256}}
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(yaml.safe_load(text))
    assert merge({"lora": {"rank": 4}}, {"lora": None}) == {"lora": {"rank": 4}}
    assert merge({"training": {"snr_gamma": 5}}, {"training": {"snr_gamma": None}}) == {
        "training": {"snr_gamma": None}
    }


@pytest.mark.parametrize("value", [4, "fast", [1], False])
def test_a_value_for_a_section_is_refused_in_words(value):
    assert "lora: is a section, with keys of its own below it (got " in message_of({"lora": value})


@pytest.mark.parametrize(
    ("section", "nearest"),
    [
        ({"lora": {"rnk": 4}}, "lora.rnk: unknown key; did you mean lora.rank?"),
        ({"resolutoin": 256}, "resolutoin: unknown key; did you mean resolution?"),
        ({"rank": 4}, "rank: unknown key; did you mean lora.rank?"),
        ({"learning_rate": 1e-4}, "did you mean training.learning_rate?"),
        ({"training": {"lr": 1e-4}}, "did you mean training.learning_rate?"),
        ({"training": {"max_steps": 5}}, "did you mean training.max_train_steps?"),
        ({"prior_preservation": {"clas_prompt": "x"}}, "did you mean prior_preservation.class_prompt?"),
        ({"pretrained_model_name_or_path": "x"}, "did you mean base_model?"),
        ({"seed": 1}, "did you mean training.seed or evaluation.seed?"),
        ({"training": {"resolution": 8}}, "did you mean resolution?"),
        ({"training": {"Learning-Rate": 1e-4}}, "did you mean training.learning_rate?"),
        ({"traning": {"seed": 1}}, "traning: unknown key; did you mean training?"),
        ({"LORA": {"rank": 1}}, "LORA: unknown key; did you mean lora?"),
        ({"training": {"unet_lr": 1e-4}}, "did you mean training.learning_rate?"),
        (
            {"text_encoder_lr": 1e-4},
            "did you mean training.text_encoder_learning_rate?",
        ),
        ({"network_dim": 4}, "did you mean lora.rank?"),
        ({"lora": {"network_alpha": 4}}, "did you mean lora.alpha?"),
        ({"train_batch_size": 4}, "did you mean training.batch_size?"),
        ({"max_train_epochs": 4}, "did you mean training.max_train_steps, in steps of the optimiser?"),
        ({"steps": 4}, "did you mean training.max_train_steps?"),
        ({"sampling": {"steps": 4}}, "did you mean sampling.num_inference_steps?"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(section, nearest):
    assert nearest in message_of(section)


@pytest.mark.parametrize("key", ["zzzzzz", "clip_skip", "noise_offset", "xformers", "logging_dir", "s"])
def test_an_unknown_key_like_no_other_gets_no_guess(key):
    assert message_of({key: 1}).endswith(f"{key}: unknown key")
    assert message_of({"training": {key: 1}}).endswith(f"training.{key}: unknown key")


def test_what_other_trainers_call_a_key_leads_to_one_there_is():
    there_are = schema.fields(Config)
    assert {meant.split(",")[0] for meant in explain.OTHER_NAMES.values()} <= set(there_are)
    assert not set(explain.OTHER_NAMES) & {key.split(".")[-1] for key in there_are}


def test_all_errors_are_shown_at_once():
    message = message_of(
        {
            "device": "cpu",
            "resolution": 100,
            "lora": {"rank": 0, "dropout": "much"},
            "training": {"mixed_precision": "fp16"},
            "speed": "fast",
        }
    )
    lines = message.splitlines()
    assert "5 errors" in lines[0]
    starts = [line.removeprefix("  - ").split(":")[0] for line in lines[1:]]
    assert sorted(starts) == sorted(["resolution", "lora.rank", "lora.dropout", "training", "speed"])


def test_an_error_shows_the_value_that_was_given():
    assert "(got 'much')" in message_of({"lora": {"dropout": "much"}})


def test_the_message_names_the_file(tmp_path):
    with pytest.raises(BunnyLoraError, match=r"some\.yaml: 1 error in"):
        load_text(tmp_path, "finetuning: {resolution: 100}")


def test_a_model_name_that_its_maker_does_not_list_is_explained():
    message = message_of({"base_model": "nota-ai/sd-v1-5-tiny"})
    assert "does not list" in message
    assert "set base_model: nota-ai/bk-sdm-tiny" in message


def test_what_needs_a_gpu_is_refused_on_cpu_and_allowed_elsewhere():
    half = {"training": {"mixed_precision": "fp16"}}
    assert "fp16 needs a GPU" in message_of({"device": "cpu", **half})
    for device in ("cuda", "auto"):
        assert validate({"device": device, **half}).device == device
    assert validate({"use_8bit_adam": True}).use_8bit_adam  # Known when it steps, not before.


@pytest.mark.parametrize("value", [".inf", ".nan", "-1", "0"])
def test_a_learning_rate_that_cannot_train_is_refused(tmp_path, value):
    with pytest.raises(BunnyLoraError, match=r"training\.learning_rate"):
        load_text(tmp_path, f"finetuning: {{training: {{learning_rate: {value}}}}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other: 1\n", "has no `finetuning:` section"),
        ("- a list\n", "has no `finetuning:` section"),
        ("", "has no `finetuning:` section"),
        ("finetuning: fast\n", "holds no keys but 'fast'"),
        ("finetuning: {resolution: [\n", "is not a YAML file"),
    ],
)
def test_a_file_without_a_readable_section_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(BunnyLoraError, match=message):
        load_text(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BunnyLoraError, match=r"No configuration at .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_a_byte_order_mark_from_a_windows_editor_does_no_harm(tmp_path):
    (tmp_path / "bom.yaml").write_text("finetuning: {resolution: 256}", encoding="utf-8-sig")
    assert load_config(tmp_path / "bom.yaml").resolution == 256


def test_the_resolved_configuration_reads_back_to_the_same_and_prints_the_same(tmp_path):
    for config in (Config(), load_text(tmp_path, HOST_CONFIG)):
        again = load_text(tmp_path, config.to_yaml())
        assert again.model_dump() == config.model_dump()
        assert again.to_yaml() == config.to_yaml()


def test_every_key_and_section_says_what_it_means():
    comments = schema.comments(Config, "finetuning")
    assert set(known_keys()) < {key.removeprefix("finetuning.") for key in comments}
    assert [key for key, text in comments.items() if len(text) < 15 or not text.endswith(".")] == []
    assert "".join(comments.values()).isascii()  # Printed to any terminal and any file.
    assert comments["finetuning.device"].endswith("One of cpu, cuda, auto.")


def test_comments_stand_above_their_keys_and_change_no_value(tmp_path):
    config = load_text(tmp_path, HOST_CONFIG)
    text = config.to_yaml(comments=True)
    assert load_text(tmp_path, text).model_dump() == config.model_dump()
    assert re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE) == config.to_yaml()
    lines = text.splitlines()
    assert lines[lines.index("  training:") + 1].startswith("    # Of AdamW")
    for number, line in enumerate(lines):
        if re.match(r" *\w+:", line):
            assert lines[number - 1].strip().startswith("#")


# The file that editors read


def test_the_schemas_file_is_the_models_own():
    written = json.loads((PARAMS / "schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "run `make schema`"


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_params_file_names_its_schema_and_keeps_to_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    jsonschema.validate(yaml.safe_load(text), json_schema())


def test_the_schema_describes_one_section_of_a_file_and_leaves_the_others_alone():
    check = jsonschema.Draft202012Validator(json_schema())
    check.check_schema(check.schema)
    assert check.is_valid({"finetuning": Config().model_dump(mode="json"), "llm": {"model": "x"}})
    assert check.is_valid({"finetuning": None})
    for wrong in ({"llm": {}}, {"finetuning": {"rnk": 4}}, {"finetuning": {"lora": {"rank": 0}}}):
        assert not check.is_valid(wrong)
    described = leaves(check.schema["$defs"]["LoRASection"]["properties"])
    assert described["rank.description"] == schema.fields(Config)["lora.rank"].description


def test_a_configuration_does_not_change_after_reading():
    with pytest.raises(ValueError, match="frozen"):
        Config().resolution = 256


def test_merging_replaces_values_and_keeps_their_neighbours():
    base = {"lora": {"rank": 4, "alpha": 8}, "device": "cpu"}
    changes = {"lora": {"rank": 16}, "resolution": 256}
    merged = merge(base, changes)
    assert merged == {"lora": {"rank": 16, "alpha": 8}, "device": "cpu", "resolution": 256}
    assert base == {"lora": {"rank": 4, "alpha": 8}, "device": "cpu"}


def test_overrides_win_over_the_file_and_are_validated_with_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("finetuning: {training: {seed: 1, max_train_steps: 9}}", encoding="utf-8")
    config = load_config(path, {"training": {"max_train_steps": 5}})
    assert (config.training.seed, config.training.max_train_steps) == (1, 5)
    with pytest.raises(BunnyLoraError, match="max_train_steps"):
        load_config(path, {"training": {"max_train_steps": 0}})


def test_set_reads_its_value_as_yaml_and_builds_the_sections():
    overrides: dict = {}
    for assignment in (
        "training.max_train_steps=5",
        "training.learning_rate=2e-4",
        "training.validation_prompt=[rex, 'ellie = smiling']",
        "random_flip=true",
        "instance_prompt=a=b#c",
        "evaluation.prompts=['{name} #1']",
    ):
        assign(overrides, assignment)
    config = validate(overrides)
    assert config.evaluation.prompts == ["{name} #1"]
    assert config.training.max_train_steps == 5
    assert config.training.learning_rate == 2e-4
    assert config.training.validation_prompts == ["rex", "ellie = smiling"]
    assert config.random_flip is True
    assert config.instance_prompt == "a=b#c"


def test_a_later_set_wins_also_where_an_earlier_one_was_no_section():
    overrides: dict = {}
    assign(overrides, "lora=8")
    assign(overrides, "lora.rank=8")
    assert overrides == {"lora": {"rank": 8}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        *(
            (text, "--set takes key=value")
            for text in ("training.seed", "=5", "training.=5", ".seed=5")
        ),
        ("lora.target_modules=[to_k", "not YAML"),
        *(
            (f"instance_prompt={text}", "# begins a comment")
            for text in ("red #1 hat", "#1 hat", "[a] # b")
        ),
    ],
)
def test_a_set_that_cannot_be_read_is_refused(assignment, message):
    with pytest.raises(BunnyLoraError, match=message):
        assign({}, assignment)
