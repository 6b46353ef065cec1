"""MosaicML Composer: methods as algorithms of its Trainer, and monitors as its callbacks."""

from composer_sam.extras import extra

with extra('composer', __name__):
    import composer  # noqa: F401 (only to name the extra where it is not installed)

from composer_sam.trainers.composer.geometry_monitor import GradientGeometryMonitor
from composer_sam.trainers.composer.sharpness_monitor import SharpnessMonitor

__all__ = ['GradientGeometryMonitor', 'SharpnessMonitor']
