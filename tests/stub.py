"""What stands where a launcher does in tests of sweeps, and the sweep that uses it."""

import json
import shlex
import sys
import threading
import time
from pathlib import Path

from mixup_recipes.pages.sweep import sweep
from mixup_recipes.recipe import to_yaml
from mixup_recipes.runs import sweep_runs
from mixup_recipes.runs.sweep import plan, read_sweep

# What stands where a launcher does: it acts as train_mixup.py would, without the training.
STUB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

def put(path, text):  # whole or not at all, as others read it meanwhile
    path.with_name(f".{path.name}.tmp").write_text(text)
    os.replace(path.with_name(f".{path.name}.tmp"), path)

here, args = Path(__file__).parent, sys.argv[2:]
folder = Path(args[args.index("--output_dir") + 1])
with (here / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
what = json.loads((here / "what.json").read_text()).get(folder.name, "finish")
print("first line\\n\\n" + "\\n".join(f"{folder.name} line {i}" for i in range(9)), flush=True)
folder.mkdir(parents=True, exist_ok=True)
put(folder / "recipe.yaml", (here / f"{folder.name}.yaml").read_text())
(here / f"env-{folder.name}").write_text(json.dumps(dict(os.environ)))
if what == "meet":  # goes on when another one is there, too
    (here / f"met-{folder.name}").touch()
    deadline = time.monotonic() + 30
    while len(list(here.glob("met-*"))) < 2:
        time.sleep(0.02)
        if time.monotonic() > deadline:
            sys.exit(3)
if what in ("wait", "stubborn"):
    save = lambda *_: ((here / "saved").touch(), (here / f"saved-{folder.name}").touch(), sys.exit(75))
    signal.signal(signal.SIGTERM, save if what == "wait" else lambda *_: (here / "asked").touch())
    (here / "pid").write_text(str(os.getpid()))
    (here / "waiting").touch()
    time.sleep(60)
    (here / "over").touch()
if what == "leave":  # as accelerate launch does: the launcher ends at once, its process saves
    child = "import pathlib, signal, sys, time; p = pathlib.Path(sys.argv[1])\\n"
    child += "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), p.joinpath('saved').touch(), sys.exit(75)))\\n"
    child += "p.joinpath('waiting').touch(); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", child, here])
    time.sleep(60)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what.isdigit():
    sys.exit(int(what))
text = (folder / "recipe.yaml").read_text()
epochs = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("epochs: ")) - (what == "early")
seed, log = int(args[args.index("--seed") + 1]), []
for epoch in range(1, epochs + 1):
    line = {"epoch": epoch, "update": epoch, "perf": {"seconds": 60.0 * epoch, "img_per_s": 100.0}}
    log.append(line | {"mode": "train", "loss": 2.0, "images": 4, "lr": 0.1})
    log.append(line | {"mode": "val", "top1": 50.0 + seed, "top5": 90.0, "nll": 1.0, "ece": 3.0, "count": 30})
put(folder / "summary.csv", "epoch,train_loss\\n" + "".join(f"{e},2.0\\n" for e in range(1, epochs + 1)))
put(folder / "log.jsonl", "".join(json.dumps(line) + "\\n" for line in log))
"""


class Stub:
    """The stub as a launcher, what it is to do for which run, and the sweep that uses it."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        (folder / "stub.py").write_text(STUB)
        self.waits = (folder / "waiting").exists
        (folder / "calls").touch()
        self.base = {"recipes": ["quickstart_vanilla", "quickstart_cutmix"], "set": ["epochs=2"]}
        self.base |= {"output_dir": str(self.out), "launcher": shlex.join([sys.executable, f"{folder}/stub.py"])}

    def runs(self, **given):
        """The runs; their recipes lie ready for the stub."""
        runs = plan(read_sweep(None, self.base | given))
        for run in runs:
            (self.folder / f"{run.name}.yaml").write_text(to_yaml(run.recipe))
        return runs

    def __call__(self, what=None, tables=False, jobs=1, **given):
        """Run the sweep, with the tables and plots at its end or without; ``what`` the stub is to do, by run."""
        runs = self.runs(**given)
        self.tell(what or {})
        self.out.mkdir(exist_ok=True)
        return sweep(None, self.base | given, jobs=jobs) if tables else sweep_runs.run_all(runs, jobs=jobs)

    def tell(self, what):
        (self.folder / "what.json").write_text(json.dumps(what))

    def calls(self):
        """The arguments of every start of the stub, the script's path first."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def called(self):
        return [Path(args[args.index("--output_dir") + 1]).name for args in self.calls()]


def soon(condition, action=lambda: None):
    """Do something once a condition holds, beside the main thread."""

    def wait():
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread
