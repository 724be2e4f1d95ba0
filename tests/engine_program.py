"""A run as `torchrun` starts it, for the tests of several processes.

engine_program.py CONFIG.json OUT OPTIONS PROGRAM: the last is JSON with what to do:
`loss` (plain, chunked or fast), `dies_at` (the forward pass at which rank 1 is killed).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from gptlib import speed, training
from gptlib.workshop.distribution import Processes
from gptlib.workshop.runs import RunOptions, run_training
from gptlib.workshop.watching import errors_in_one_line


torch.set_num_threads(1)
values, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
config = training.TrainConfig.from_dict(values)
options = RunOptions(out=out, **json.loads(sys.argv[3]))
program = json.loads(sys.argv[4])
loss = {
    "plain": training.plain_loss,
    "chunked": speed.FastLoss(chunked=True, compiled=False),
    "compiled": speed.FastLoss(chunked=True, compiled=True),
}[program.get("loss", "plain")]
calls, exchanges, wrap = 0, [], Processes.wrap


def loss_fn(model, x, y):
    global calls
    calls += model.training
    if calls == program.get("dies_at") and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(model, x, y)


def counting(world, module):
    """Count the exchanges of gradients: the last bucket of each comes by once."""
    module = wrap(world, module)

    def hook(state, bucket):
        exchanges.append(bucket.is_last())
        buffer = bucket.buffer().div_(world.size)
        work = torch.distributed.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    if world.size > 1:
        module.register_comm_hook(None, hook)
    return module


Processes.wrap = counting
with errors_in_one_line():
    run_training(config, options, loss_fn=loss_fn)
if os.environ.get("RANK") == "0":
    out.with_suffix(".exchanges").write_text(str(sum(exchanges)))
