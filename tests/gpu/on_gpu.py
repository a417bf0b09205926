"""train.py with one thing done to it. DO: "no waits", a slow process, or how busy the device is."""

import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "loop")]

import torch
from torch.profiler import ProfilerActivity, profile

import evaluate
import train
from runtime import launch

train_step, maybe_log = train.train_step, evaluate.maybe_log_save_evaluate
began = None


def no_waits(accelerator, model, batch):
    """From the second update on a wait is an error, in forward, backward, clipping and step."""
    torch.cuda.set_sync_debug_mode("error" if began else "default")
    return train_step(accelerator, model, batch)


def after_an_update(accelerator, model, state, config, evaluations):
    global began
    torch.cuda.set_sync_debug_mode("default")
    if os.environ["DO"] == "slow" and state.step == 1 and accelerator.is_main_process:
        time.sleep(float(os.environ["SECONDS_SLOW"]))
    maybe_log(accelerator, model, state, config, evaluations)
    if os.environ["DO"] == "busy" and state.step in (10, 30):
        torch.accelerator.synchronize()
        if state.step == 10:
            profiler.start()
            began = time.perf_counter()
        else:
            seconds = time.perf_counter() - began
            profiler.stop()
            kernels = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
            accelerator.print(f"20 updates: {seconds:.3f} s, of these {kernels:.3f} s in kernels")
    began = began or (state.step > 0)


if __name__ == "__main__":
    profiler = profile(activities=[ProfilerActivity.CUDA])
    train.maybe_log_save_evaluate = after_an_update
    if os.environ["DO"] == "no waits":
        train.train_step = no_waits
    with launch.errors_in_one_line():
        train.main()
