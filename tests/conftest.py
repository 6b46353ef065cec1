"""One thread per test process: the problems are tiny, and threads that wait for each other on a busy machine cost more
than they bring (fifty-fold was seen)."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import hypothesis
import torch

torch.set_num_threads(1)

# A busy machine can take longer than any deadline for one example.
hypothesis.settings.register_profile('patient', deadline=None)
hypothesis.settings.load_profile('patient')

# Where Composer is not installed (make test-torch), the tests of what needs it are left out.
NEED_COMPOSER = [
    'integration/*',
    'gpu/*',
    'conformance/test_memory.py',
    'diagnostics/test_geometry_monitor.py',
    'diagnostics/test_objective.py',
    'diagnostics/test_sharpness_monitor.py',
    'distributed/test_diagnostics_ranks.py',
    'distributed/test_load_planner.py',
    'distributed/test_resume_ranks.py',
    'distributed/test_scale.py',
    'distributed/test_trainer_*.py',
    'unit/test_benchmark_needs.py',
    'unit/test_data.py',
    'unit/test_docs.py',
    'unit/test_doctests.py',
    'unit/test_landscape_captions.py',
    'unit/test_language_models.py',
    'unit/test_listings.py',
    'unit/test_readme.py',
    'unit/test_recipe_layers.py',
    'unit/test_recipe_names.py',
    'unit/test_recipe_schema.py',
    'unit/test_reports.py',
    'unit/test_study_picture.py',
    'unit/test_text.py',
    'unit/test_thrift.py',
]
collect_ignore_glob = [] if importlib.util.find_spec('composer') else NEED_COMPOSER
