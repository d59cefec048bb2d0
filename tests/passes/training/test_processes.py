"""Two processes over gloo end with the weights of one, and a process that is killed from outside goes on."""

from __future__ import annotations

import os
import signal
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


settings = {"epochs": 3, "learning_rate": 1e-2, "accumulate": 2, "checkpoint_dir": target + ".checkpoints"}
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
