"""One thread per test process: the problems are tiny, and threads that wait for each other on a busy machine cost more
than they bring (fifty-fold was seen)."""

from __future__ import annotations

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch

torch.set_num_threads(1)
