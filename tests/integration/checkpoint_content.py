"""What a checkpoint holds, in a form that two runs can be compared by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def comparable(item: Any) -> Any:
    """A checkpoint's content without clocks, names of runs and files, and addresses of objects."""
    if isinstance(item, (torch.Tensor, np.ndarray)):
        return item.tolist()
    if isinstance(item, dict):
        left_out = ('run_name', 'all_saved_checkpoints_to_timestamp', 'repr')
        return {k: comparable(v) for k, v in item.items() if k not in left_out and not str(k).endswith('_wct')}
    if isinstance(item, (list, tuple)):
        return [comparable(value) for value in item]
    return item
