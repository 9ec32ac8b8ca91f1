"""Children of real parents: scripts without a main guard, one that is killed and one that ends by itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexlora.data.pretraining import BASE_FOLDER

PATIENCE_SECONDS = 120

PARENT = """
import sys, time
sys.path[:0] = [{tests!r}]
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast
from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.simulation import SimulationEngine
from flexlora.engines.processes import ChildProcesses, ProcessEngine
from flexlora.lora.factors import Scaling
from flexlora.data.prompts import EncodedExample
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.one_client import LocalTraining
import torch
torch.set_num_threads(1)
model = AdaptedModel(*load_base_model({base!r}, dtype="float32", device="cpu", attn_implementation="sdpa"))
plan = RankPlan("small", (("self_attn", 2),))
shapes = target_modules(model.network, "all-linear")
broadcast = Broadcast(model.initial_adapter(plan.resolve(shapes), Scaling("constant_alpha", 16.0), 0))
row = tuple(range(3, 133))
simulation = SimulationEngine(model, lambda client_id: [EncodedExample(row, row)] * 4, LocalTraining(batch_size=4))
engine = ProcessEngine(simulation, ChildProcesses(model, ["cpu"], 1, seconds_before_children=0))
cohort = [ClientSpec(str(index), plan, 4) for index in range(4)]
order = RoundOrder(1, 0, 0.01, "float32", (), cohort, {{plan: Parcel(broadcast, "float32")}})
while not engine.children.are_ready():
    list(engine.train(order))
print(engine.children.trainers[0].process.pid, flush=True)
{end}
"""


def is_running(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.integration
def test_a_parent_without_a_main_guard_leaves_no_child_behind_however_it_ends(tmp_path):
    # Both at once, because starting takes the time.
    parents = {code: start(tmp_path / f"{-code}.py", end) for code, end in ENDS.items()}
    for code, parent in parents.items():
        with parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert code == 3 or is_running(child)
            if code < 0:
                parent.kill()
        assert parent.returncode == code
        assert has_ended(child)


ENDS = {-signal.SIGKILL: "time.sleep(3600)", 3: "raise SystemExit(3)"}


def start(script, end):
    script.write_text(PARENT.format(tests=str(script.parent), base=str(BASE_FOLDER), end=end), encoding="utf-8")
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def has_ended(process_id):
    for _ in range(10 * PATIENCE_SECONDS):
        if not is_running(process_id):
            return True
        time.sleep(0.1)
    return False


EARLY = """
import os, socket, subprocess, sys, time
ours, theirs = socket.socketpair()
command = [sys.executable, "-P", "-m", "flexlora.engines.process_child", str(theirs.fileno()), "0", str(os.getpid())]
child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
# As a fork of this process would, it holds the other end open, so the socket tells the child nothing.
keeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[ours.fileno()])
print(child.pid, keeper.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_child_whose_parent_dies_while_it_imports_ends_soon_after(end):
    with subprocess.Popen([sys.executable, "-c", EARLY], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child, keeper = map(int, parent.stdout.readline().split())
        try:
            time.sleep(0.5)
            parent.send_signal(end)
            parent.wait()
            start = time.monotonic()
            while is_running(child) and time.monotonic() - start < 10:
                time.sleep(0.05)
            # Two seconds on a machine that has a core to spare.
            assert not is_running(child)
        finally:
            os.kill(keeper, signal.SIGKILL)


@pytest.mark.parametrize("module", ["flexlora.orphans", "flexlora.engines.process_child"])
def test_what_watches_the_parent_imports_nothing_that_takes_long(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
