#!/usr/bin/env python3
"""What bench_recovery.py measures Musher against: the peer's network under torchrun, with a checkpoint an epoch.

torchrun --nproc-per-node N --max-restarts R elastic_peer.py PEER_DDP_PY CHECKPOINT STEPS_AN_EPOCH EPOCHS BATCH WIDTH SIZE

A worker that dies makes torchrun end and start all of them; they go on from the last epoch's end. Prints a JSON line
{"time", "rank", "step", "pid"} for each step that a rank has applied. Random tensors: the loader is not measured.
"""
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

peer, checkpoint, steps, epochs, batch, width, size = sys.argv[1:]
# Its network without its main job, which it begins when it is loaded.
definitions = Path(peer).read_text().split("\ndef main")[0]
network = {"__name__": "peer"}
exec(compile(definitions, peer, "exec"), network)

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = network["UNet"](width=float(width))
optimizer = torch.optim.Adam(model.parameters(), eps=1e-7)
step = 0
if os.path.exists(checkpoint):
    saved = torch.load(checkpoint)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
ddp = DistributedDataParallel(model)
images = torch.rand(int(batch), 3, int(size), int(size))
masks = torch.randint(0, 3, (int(batch), int(size) // 2, int(size) // 2))
while step < int(steps) * int(epochs):
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(ddp(images), masks).backward()
    optimizer.step()
    step += 1
    record = {"time": time.time(), "rank": dist.get_rank(), "step": step, "pid": os.getpid()}
    os.write(1, (json.dumps(record) + "\n").encode())  # whole, whoever else writes
    if step % int(steps) == 0 and dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, checkpoint + ".new")
        os.replace(checkpoint + ".new", checkpoint)
dist.destroy_process_group()
