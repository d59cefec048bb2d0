"""Two processes over gloo end with the weights of one, or all with its error; one that is killed goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = """\
import os, sys, time, torch, lobo_fx
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from lobo_fx.passes import Distill, FineTune

torch.set_num_threads(1)
target, kind, slow = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2 if slow else 0.0), nn.Linear(16, 3)).eval()
teacher = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(), nn.Linear(9, 3)).eval()
generator = torch.Generator().manual_seed(1)
x, y = torch.randn(37, 6, generator=generator), torch.randint(0, 3, (37,), generator=generator)
data = list(zip(x.split(7), y.split(7)))


def loss(outputs, labels):
    time.sleep(slow)
    return cross_entropy(outputs, labels)


def score(module):
    with torch.no_grad():
        return -float(cross_entropy(module(x), y))


rate = 1e-2 if kind == "tune" else "auto"
settings = {"epochs": 3, "learning_rate": rate, "accumulate": 2, "checkpoint_dir": target + ".checkpoints"}
pass_ = FineTune(**settings) if kind == "tune" else Distill(teacher, features={"0": "0", "1": "1"}, **settings)
result = lobo_fx.compile(
    net, [pass_], example_inputs=x[:2], train_data=data, loss_fn=loss, evaluate=score, progress=False
)
save_file(dict(result.module.state_dict()), f"{target}.{os.environ.get('RANK', '0')}")
"""


def command(folder: Path, *arguments: str, processes: int = 1) -> list[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(many if processes > 1 else []), str(script), *arguments]


ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tune", "distill"])
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path, kind: str) -> None:
    for processes in (1, 2):
        name = str(tmp_path / f"of_{processes}")
        subprocess.run(command(tmp_path, name, kind, "0", processes=processes), check=True, env=ENVIRONMENT)
    one, *two = (load_file(tmp_path / name) for name in ("of_1.0", "of_2.0", "of_2.1"))
    for found in two:
        assert all((one[name] - value).abs().max() <= 1e-5 for name, value in found.items())


@pytest.mark.slow
def test_a_process_killed_at_any_time_goes_on(tmp_path: Path) -> None:
    whole, broken = (str(tmp_path / name) for name in ("whole", "broken"))
    subprocess.run(command(tmp_path, whole, "tune", "0.001"), check=True, env=ENVIRONMENT)
    kept = Path(f"{broken}.checkpoints") / "training.json"
    with subprocess.Popen(command(tmp_path, broken, "tune", "0.3"), env=ENVIRONMENT) as process:
        end = time.monotonic() + 60
        while not kept.exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)  # into the second epoch
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command(tmp_path, broken, "tune", "0.001"), check=True, env=ENVIRONMENT)
    one, other = load_file(f"{whole}.0"), load_file(f"{broken}.0")
    assert all(one[name].equal(value) for name, value in other.items())


FAILING = """\
import json, os, sys, time, torch, lobo_fx
from torch import nn
from torch.nn.functional import cross_entropy
from lobo_fx.passes import FineTune

torch.set_num_threads(1)
target, rank = sys.argv[1], int(os.environ["RANK"])
x, y = torch.randn(16, 6), torch.arange(16) % 3
kind, calls, scores = "", 0, 0


class Loader:
    def __len__(self):
        return 4

    def __iter__(self):
        for index, batch in enumerate(zip(x.split(4), y.split(4))):
            if kind == "loader" and rank == 1 and index == 2:
                raise OSError("its disk is gone")
            yield batch


def loss(outputs, labels):
    global calls
    calls += rank == 1
    if kind in ("loss", "trial") and calls == 3:
        raise ZeroDivisionError("in the third batch")
    return cross_entropy(outputs, labels) * (float("nan") if kind == "loss is NaN" and calls == 3 else 1)


def score(module):
    global scores
    scores += 1
    if scores == 2:  # in training, on the main process alone
        raise ZeroDivisionError("no score")
    return 1.0


said = {}
for kind in ("loader", "loss", "trial", "loss is NaN", "evaluate", "none", "checkpoint"):
    calls = 0
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    folder = f"{target}.{rank}" if kind in ("none", "checkpoint") else None
    tuned = FineTune(epochs=2, learning_rate="auto" if kind == "trial" else 1e-2, checkpoint_dir=folder)
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.uniform_(parameter)
    try:
        result = lobo_fx.compile(
            net,
            [tuned],
            example_inputs=x[:2],
            train_data=Loader(),
            loss_fn=loss,
            evaluate=score if kind == "evaluate" else None,
            progress=False,
        )
        said[kind] = " ".join(note.reason for note in result.report.notes)
    except Exception as error:
        said[kind] = f"{type(error).__name__}: {error}"
with open(f"{target}.{rank}.json", "w") as file:
    json.dump(said, file)
time.sleep(1)  # a process that goes closes its connections, which frees one that waits for it
"""


@pytest.mark.slow
def test_what_fails_on_one_process_ends_all_with_its_error(tmp_path: Path) -> None:
    script, target = tmp_path / "script.py", tmp_path / "said"
    script.write_text(FAILING)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    many = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = [
        subprocess.Popen([sys.executable, script, target], env=many | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    try:
        assert [process.wait(120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    main, other = (json.loads(Path(f"{target}.{rank}.json").read_text()) for rank in (0, 1))
    for kind, words in {"loader": "its disk is gone", "loss": "in the third batch", "trial": "third batch"}.items():
        assert words in other[kind]
        assert main[kind].startswith("InvalidInput: process 1 failed with ")
        assert words in main[kind]
    assert "no score" in main["evaluate"]
    assert other["evaluate"].startswith("InvalidInput: process 0 failed with ")
    for said in (main, other):
        assert "Stopped early: the loss is nan at step 3 (epoch 1, batch 3)" in said["loss is NaN"]
        assert "8 batches in 2 epochs" in said["none"]
        assert "processes find different checkpoints" in said["checkpoint"]
        assert "(one of batch 8, none)" in said["checkpoint"]
