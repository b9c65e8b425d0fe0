"""Training in a notebook that somebody watches: a frontend by hand, which presses buttons."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from conftest import CHECKOUT, draw_frames, tiny_config
from jupyter_client.manager import start_new_kernel

from bunny_lora import live, report
from bunny_lora.core import lock, requests
from bunny_lora.core.status import StatusFile, read_status
from bunny_lora.trainer import LoRATrainer

MANY = 1_000_000
TRAINING = {"max_train_steps": MANY, "save_steps": MANY, "validation_prompt": "ellie"}

TRAIN = """
from bunny_lora import live
from bunny_lora.config import load_config
from bunny_lora.trainer import LoRATrainer
final = await live.train(LoRATrainer(config=load_config("params/job.yaml")))
"""


class Frontend:
    """Runs code in a kernel as JupyterLab asks for it, and keeps what comes back."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self.said: list[dict[str, Any]] = []
        self.buttons: dict[str, str] = {}

    def _send(self, kind: str, content: dict[str, Any]) -> str:
        message = self.client.session.msg(kind, content)
        message["header"]["msg_id"] = message["msg_id"] = str(uuid.uuid4())
        self.client.shell_channel.send(message)
        return message["msg_id"]

    def run(self, code: str) -> str:
        about = {"silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        return self._send("execute_request", {"code": code, "stop_on_error": True} | about)

    def press(self, label: str) -> None:
        click = {"method": "custom", "content": {"event": "click"}}
        self._send("comm_msg", {"comm_id": self.buttons[label], "data": click})

    def until(self, condition: Callable[[], bool]) -> None:
        """Listen until a condition holds."""
        while not condition():
            try:
                message = self.client.get_iopub_msg(timeout=0.2)
            except Empty:
                assert self.manager.is_alive()
                continue
            self.said.append(message)
            state = message["content"].get("data", {}).get("state", {})
            if message["msg_type"] == "comm_open" and state.get("_model_name") == "ButtonModel":
                self.buttons[state["description"]] = message["content"]["comm_id"]
            assert message["msg_type"] != "error" or "StoppedError" in str(message["content"])

    def has_ended(self, request: str) -> bool:
        return any(
            message["msg_type"] == "status"
            and message["content"]["execution_state"] == "idle"
            and message["parent_header"].get("msg_id") == request
            for message in self.said
        )

    def kinds(self) -> list[str]:
        return [message["msg_type"] for message in self.said]


@pytest.fixture
def frontend(project: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Frontend]:
    draw_frames(project / "data" / "instance_images", 4)
    (project / "params" / "job.yaml").write_text(tiny_config(tiny_model, training=TRAINING).to_yaml())
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("BUNNY_LORA_PROGRESS", raising=False)
    made = Frontend()
    yield made
    made.client.stop_channels()
    made.manager.shutdown_kernel(now=True)


def test_buttons_act_while_it_trains_and_the_run_goes_on_to_the_same_bytes(
    frontend: Frontend, project: Path, tiny_model: str
) -> None:
    run = project / "run"
    request = frontend.run(TRAIN)
    frontend.until(lambda: len(list(report.run_state.read_steps(run)[0])) > 2)
    frontend.press("save now")
    frontend.press("sample now")
    frontend.until(lambda: any(run.glob("checkpoint-*/keep")) and any(run.glob("samples/step-*/*.png")))
    assert not frontend.has_ended(request)
    frontend.press("stop after this step")
    frontend.until(lambda: frontend.has_ended(request))
    assert read_status(run).state == "stopped"
    assert "stream" in frontend.kinds() and "error" in frontend.kinds()
    replaced = [m for m in frontend.said if m["msg_type"] == "update_display_data"]
    kinds = replaced[-1]["content"]["data"]
    assert {"image/png", "image/jpeg"} & set(kinds), "the view gives way to a figure"
    stopped_at = report.read_run(run).step
    for folder in ("run", "unwatched"):
        training = {"max_train_steps": stopped_at + 2, "save_steps": MANY}
        LoRATrainer(config=tiny_config(tiny_model, output_dir=folder, training=training)).train()
    files = [path.relative_to(run) for path in (run / "final").rglob("*.safetensors")]
    assert files
    for path in [*files, Path("log.jsonl")]:
        assert (run / path).read_bytes() == (project / "unwatched" / path).read_bytes()


def test_runs_of_others_are_followed_and_can_be_asked(frontend: Frontend, project: Path) -> None:
    run = project / "run"
    with lock.acquire(run):
        StatusFile(run).write("working", "training")
        frontend.run("from bunny_lora import live\nlive.watch(live.folders('run'))")
        frontend.until(lambda: "stop after this step" in frontend.buttons)
        log = (run / "log.jsonl").open("w")
        record = {"step": 7, "loss": 0.5, "learning_rate": 1e-4, "n_images": 2}
        with log:
            log.write(json.dumps(record) + "\n")
        frontend.until(lambda: any("7" in _table(message) for message in frontend.said))
        frontend.press("stop after this step")
        frontend.until(lambda: requests.pending(run) == ["stop"])


def _table(message: dict[str, Any]) -> str:
    value = str(message["content"].get("data", {}).get("state", {}).get("value", ""))
    return value.partition("<th style='text-align: left; padding-right: 1em'>step</th>")[2][:20]


def test_a_view_has_what_the_files_say_and_its_buttons_write_requests(project: Path) -> None:
    run = project / "outputs" / "run"
    run.mkdir(parents=True)
    record = {
        "step": 1,
        "loss": 0.5,
        "learning_rate": 1e-4,
        "n_images": 2,
        "characters": {"<ellie>": 2},
    }
    (run / "log.jsonl").write_text(json.dumps(record) + "\n")
    view = live.RunView(run)
    with lock.acquire(run):
        view.refresh()
        assert not any(button.disabled for button in view.buttons.values())
        view.buttons["save"].click()
        assert requests.pending(run) == ["save"] and view.buttons["save"].disabled
        assert "&lt;ellie&gt; 2" in view.table.value and 'alt="outputs/run' in view.figure.value
        requests.clear(run)
        view.refresh()
        assert not view.buttons["save"].disabled
    StatusFile(run).write("finished")
    view.refresh()
    assert all(button.disabled for button in view.buttons.values()), "nobody is there to be asked"


def test_the_view_draws_seldom_enough(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = live.RunView(project)
    now, drawn = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(view, "refresh", lambda: (drawn.append(now[0]), now.__setitem__(0, now[0] + 1)))
    for _ in range(60):
        view.refresh_if_due()
        now[0] += 1
    assert drawn == [100.0, 116.0, 132.0, 148.0], "each took a second, which is much"
