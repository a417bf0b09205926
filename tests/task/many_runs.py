"""train.py and evaluate.py several times in one launch. RUNS: a JSON list of what is typed."""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "loop")]

import torch
from fsdp2_on_cpu import fsdp2_on_cpu
from recorded_run import OneLaunch

import evaluate
import train
from runtime import launch


def main():
    one_launch = OneLaunch()
    for program, *arguments in json.loads(os.environ["RUNS"]):
        sys.argv = [program, *arguments]
        try:
            {"train.py": train, "evaluate.py": evaluate}[program].main()
        except SystemExit as ended:
            assert not ended.code
        except launch.UserError as error:  # on every process
            one_launch.accelerator.print(f"refused: {error}")
        accelerator = one_launch.accelerator
        accelerator.free_memory()
        torch.compiler.reset()
        plugin = accelerator.state.fsdp_plugin if os.environ.get("FSDP2_ON_CPU") else None
        if plugin is not None:  # else the next model is divided by the layers of this one
            vars(plugin).update(vars(type(plugin)(fsdp_version=2)))
        accelerator.print(f"--- {' '.join(arguments)}", flush=True)
    one_launch.finish(accelerator)


if __name__ == "__main__":
    fsdp2_on_cpu()
    with launch.errors_in_one_line():
        main()
