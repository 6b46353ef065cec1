"""Bad values are named, with what would work, when the method is made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast, get_origin

import pytest

from composer_sam import SAM, registry


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'rho': 0}, 'rho must be a finite number > 0, got 0'),
        ({'rho': -0.1}, 'rho must be a finite number > 0, got -0.1'),
        ({'rho': float('inf')}, 'rho must be a finite number > 0, got inf'),
        ({'rho': '0.1'}, "rho must be a finite number > 0, got '0.1'"),
        ({'epsilon': -1e-9}, 'epsilon must be a finite number >= 0, got -1e-09'),
    ],
)
def test_sam_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAM(**values)


@pytest.mark.parametrize(
    ('name', 'values', 'message'),
    [
        ('WSAM', {'gamma': 1.0}, 'gamma must be a finite number >= 0 and < 1, got 1.0'),
        ('WSAM', {'gamma': -0.1}, 'gamma must be a finite number >= 0 and < 1, got -0.1'),
        ('WSAM', {'max_norm': 0}, 'max_norm must be a finite number > 0, got 0'),
        ('WSAM', {'decouple': 'no'}, "decouple must be true or false, got 'no'"),
        ('GAM', {'grad_rho': -0.02}, 'grad_rho must be a finite number > 0, got -0.02'),
        ('GAM', {'grad_norm_rho': 0.0}, 'grad_norm_rho must be a finite number > 0, got 0.0'),
        ('GAM', {'grad_beta_2': float('nan')}, 'grad_beta_2 must be a finite number, got nan'),
        ('ASAM', {'eta': -1}, 'eta must be a finite number >= 0, got -1'),
        (
            'SAMDirection',
            {'granularity': 'layer'},
            "granularity must be one of global, tensor, elementwise, got 'layer'",
        ),
        ('SAMMagnitude', {'granularity': None}, 'granularity must be one of global, tensor, elementwise, got None'),
        ('SGDHess', {'interval_hessian': 0}, 'interval_hessian must be an integer >= 1, got 0'),
        ('SGDHess', {'sync_first_pass': True}, 'sync_first_pass=True means nothing to SGDHess'),
        ('MSAM', {'sync_first_pass': True}, 'sync_first_pass=True means nothing to MSAM'),
        ('DPSAT', {'sync_first_pass': True}, 'sync_first_pass=True means nothing to DPSAT'),
        ('GSAM', {'alpha': -0.1}, 'alpha must be a finite number >= 0, got -0.1'),
        ('FriendlySAM', {'lmbda': 1.0}, 'lmbda must be a finite number >= 0 and < 1, got 1.0'),
        ('FriendlySAM', {'sigma': -1}, 'sigma must be a finite number >= 0, got -1'),
        ('VaSSO', {'theta': 0.0}, 'theta must be a finite number > 0 and <= 1, got 0.0'),
        ('LookSAM', {'k': 0}, 'k must be an integer >= 1, got 0'),
        ('LookSAM', {'granularity': 'elementwise'}, "granularity must be one of global, tensor, got 'elementwise'"),
        ('AESAM', {'decay': 1.0}, 'decay must be a finite number >= 0 and < 1, got 1.0'),
        ('AESAM', {'total_steps': 0}, 'total_steps must be an integer >= 1, got 0'),
        ('AESAM', {'lambda_1': float('inf')}, 'lambda_1 must be a finite number, got inf'),
        ('RandomSAM', {'p': 0.0}, 'p must be a finite number > 0 and <= 1, got 0.0'),
        ('RandomSAM', {'p': 1.5}, 'p must be a finite number > 0 and <= 1, got 1.5'),
        ('RandomSAM', {'seed': 0.5}, 'seed must be an integer .*got 0.5'),
        ('GNP', {'norm_perturbations': 1}, 'norm_perturbations must be true or false, got 1'),
        ('SAGM', {'alpha': -1e-3}, 'alpha must be a finite number >= 0, got -0.001'),
        ('CRSAM', {'gamma': float('nan')}, 'gamma must be a finite number, got nan'),
        ('FisherSAM', {'gamma': 0}, 'gamma must be a finite number > 0, got 0'),
        ('FisherSAM', {'eta': -1}, 'eta must be a finite number >= 0, got -1'),
        ('USAM', {'rho': 0}, 'rho must be a finite number > 0, got 0'),
    ],
)
def test_values_of_the_other_methods(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry[name](**values)


@pytest.mark.parametrize('name', sorted(registry))
@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'interval': 0}, 'interval must be an integer >= 1, got 0'),
        ({'interval': 2.0}, 'interval must be an integer >= 1, got 2.0'),
        ({'interval': True}, 'interval must be an integer >= 1, got True'),
        ({'start': '20ba', 'end': '10ba'}, "start must lie before end, got start='20ba' and end='10ba'"),
        ({'start': '0.5dur', 'end': '0.5dur'}, 'start must lie before end'),
        ({'start': 'soon'}, "start must be a Composer time such as .* got 'soon'"),
        ({'end': 10}, 'end must be a Composer time such as .* got 10'),
        ({'start': '-1ep'}, 'start must'),
        ({'sync_first_pass': 'yes'}, "sync_first_pass must be true or false, got 'yes'"),
    ],
)
def test_shared_values(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry[name](**values)


def test_unknown_hyperparameters_are_an_error() -> None:
    with pytest.raises(TypeError, match='roh'):
        cast(Any, SAM)(roh=0.1)


def test_windows_follow_the_trainers_time() -> None:
    pytest.importorskip('composer')
    from composer.core import State, Time, Timestamp

    from composer_sam.trainers.composer.host import ComposerMoment

    def perturbed(method: SAM) -> list[int]:
        length = Time.from_timestring('4ep')
        moments = [
            ComposerMoment(
                batch,
                cast(
                    State,
                    SimpleNamespace(
                        timestamp=Timestamp(batch=batch, epoch=batch // 5, batch_in_epoch=batch % 5),
                        max_duration=length,
                    ),
                ),
            )
            for batch in range(20)
        ]
        return [moment.batch for moment in moments if method.perturbs(moment)]

    assert perturbed(SAM(start='0.5dur')) == list(range(10, 20))
    assert perturbed(SAM(end='1ep')) == list(range(5))
    assert perturbed(SAM(start='3ba', end='0.25dur')) == [3, 4]
    assert perturbed(SAM(interval=7)) == [6, 13]


def test_the_registry_holds_every_file_of_the_package() -> None:
    import importlib.util
    import pkgutil

    import composer_sam.methods
    from composer_sam.methods.base import SharpnessAware

    found = set()
    for module in pkgutil.iter_modules(composer_sam.methods.__path__):
        if module.name == 'llm_foundry' and importlib.util.find_spec('composer') is None:
            continue  # it hands the methods to LLM Foundry, which needs Composer
        members = vars(importlib.import_module(f'composer_sam.methods.{module.name}')).values()
        found |= {
            m.__name__ for m in members if isinstance(m, type) and not get_origin(m) and issubclass(m, SharpnessAware)
        }
    assert found - {'SharpnessAware'} == set(registry)


@pytest.mark.parametrize('name', sorted(registry))
def test_a_method_is_documented(name: str) -> None:
    method = registry[name]
    doc = method.__doc__ or ''
    for part in ('.. math::', 'Args:', 'Passes and memory:', 'Example:', 'Reference:'):
        assert part in doc, part
    passes = method().passes
    assert f'{passes} passes' in doc or (passes == 1 and '1 pass per perturbing step' in doc)
    assert method.paper.split(',')[0].split()[0] in doc
    assert 'https://' in method.paper
